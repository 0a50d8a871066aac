"""Work of two processes for test_distributed.py, started as torchrun starts them."""

import contextlib
import copy
import functools
import gc
import itertools
import os
import re
import runpy
import shutil
import signal
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset, DatasetDict
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, Trainer, TrainingArguments

import qrefta
from qrefta._compat.transformers import SampledTrainer
from qrefta.cli import quiet_libraries
from qrefta.nn.linear import AdaptedLinear
from qrefta.train.arguments import training_arguments
from qrefta.train.balance import BalancedSampler
from qrefta.train.calibration import task_batches
from qrefta.train.checkpoints import WholeCheckpoints
from qrefta.train.data import load_classification
from qrefta.train.finetune import finetune
from qrefta.train.mean_loss import LossByRows
from qrefta.train.models import load_classifier
from qrefta.train.rates import CALIBRATED_RATE
from qrefta.train.run import round_masters
from qrefta.train.tasks import TASKS
from qrefta.train.tasks.classify import text_classes
from tests.models import VOCAB, tiny_bert, tiny_llama
from tests.tiny import color_rows, tiny_tokenizer
from tests.train.talk import chat_rows, words

DOCS = Path(__file__).parents[1] / "docs" / "distributed.md"
TEXT = [{"input_ids": row, "labels": row} for row in torch.arange(64 * 8).view(64, 8) % VOCAB]
BREAKS = "bert.encoder.layer.1.intermediate.dense"
ROWS = 32  # to train on: two steps an epoch, so every checkpoint but the last is inside one
STEPS = 4
SETTINGS = {
    "max_steps": STEPS,
    "save_steps": 3,
    "optim": "sgd",  # Adam amplifies rounding in gradients near zero
    "learning_rate": 0.1,
    "disable_tqdm": True,
}
WARNINGS: list[str] = []  # of deprecations, by finetune in this process
COMMAND_STEPS = 12  # of the command line, which saves at every quarter


def torchrun(work, folder, processes=2):
    """Call `work(folder)` in processes that are forked from one that has imported everything."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="tests",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.05,
        start_method="forkserver",
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        elastic_launch(config, _entry)(work, folder)
    finally:  # the launcher leaves its handlers behind
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _entry(work, folder):
    signal.alarm(240)  # else a process could wait forever for the other
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    with (
        open(folder / f"{work.__name__}{os.environ['RANK']}.txt", "w") as file,
        contextlib.redirect_stdout(file),
    ):
        work(folder)


def killed(folder):
    """The command line, until the second process is killed after the first checkpoint."""
    if os.environ["RANK"] == "1":
        first = folder / "killed" / f"checkpoint-{COMMAND_STEPS // 4}" / "trainer_state.json"
        threading.Thread(target=_die, args=(first,), daemon=True).start()
    _command(folder)


def _die(file):
    while not file.exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def _command(folder, *options):
    paths = [str(folder / name) for name in ("tiny", "data", "killed")]
    options = [
        *options,
        "--method=refta",
        "--rank=8",
        "--batch-size=8",
        f"--max-steps={COMMAND_STEPS}",
    ]
    with mock.patch.object(sys, "argv", ["qrefta", "finetune", *paths, *options]):
        runpy.run_module("qrefta", run_name="__main__")


def _prepared_as_by_the_command(folder):
    """Calibrated on the training rows."""
    dense = load_classifier(str(folder / "tiny"), ["0", "1"], seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    batches = task_batches("classify", dense, tokenizer, _data(folder))
    return qrefta.prepare(dense, method="refta", rank=8, calibration=batches)


def everything(folder):
    """All other runs; saves their results by name."""
    quiet_libraries()
    results = dict(replicated(folder))
    shard_on_cpu()
    results |= dict(sharded(folder))
    results |= dict(refused(folder))
    results["warnings"] = WARNINGS
    torch.save(results, folder / f"results{os.environ['RANK']}.pt")


def replicated(folder):
    """DDP: with the settings of one process; as the command line without a stop; and resumed."""
    model = start(folder)
    yield "ddp", (tune(folder, "ddp", model, 8), trained(model))
    yield "ddp stops", stops(folder, "ddp-stops", torch.inf)
    yield "test losses", chat_losses(folder / "chats")
    yield "class losses", class_losses(folder)
    model = _prepared_as_by_the_command(folder)
    settings = {
        "max_steps": COMMAND_STEPS,
        "save_steps": 0.25,
        "optim": "adamw_torch",
        "learning_rate": CALIBRATED_RATE,  # as the command chooses
    }
    tune(folder, "whole", model, 8, recipe=text_classes, **settings)
    with contextlib.suppress(SystemExit):
        _command(folder, "--resume")
    yield "no GPUs", message(lambda: tune(folder, "no", start(folder), 8, fsdp=True))
    del os.environ["ACCELERATE_USE_FSDP"]  # accelerate sets it for all later Trainers


def sharded(folder):
    """FSDP2: with the settings of one process, resumed, as documented, and by hand."""
    model = start(folder)
    result = tune(folder, "fsdp", model, 8, fsdp=True, gradient_checkpointing=True)
    yield "fsdp", (result, trained(model))
    yield "shares", [share(parameter) for parameter in packed(model)]
    first_alone(lambda: shutil.rmtree(folder / "fsdp" / f"checkpoint-{STEPS}"))
    model = start(folder)
    tune(folder, "fsdp", model, 8, fsdp=True, resume=True)
    yield "resumed", trained(model)
    yield "fsdp stops", stops(folder, "fsdp-stops", torch.inf, fsdp=True)
    yield "fsdp stops backwards", stops(folder, "fsdp-backwards", 1.0, fsdp=True)
    first, second = documented(folder)
    yield "documented", losses(first)
    yield "sharded at load", losses(second)
    model = first.model
    yield "loaded", reloaded(model)
    round_masters(model)  # while the factors are gathered
    model.save_pretrained(folder / "documented" / "together")
    with mock.patch("qrefta.distributed._SAVING_S", 0.2):
        alone = []
        first_alone(lambda: alone.append(message(model.save_pretrained, folder / "alone")))
    yield "alone", alone
    checkpoint_in_full(folder)
    yield "gathered", gathered(model)
    yield "merge", message(qrefta.merge, model)
    model.model.layers[0].unshard()
    yield "layer", message(model.model.layers[0].mlp.up_proj, torch.randn(2, 32))


def refused(folder):
    """FSDP1; without GPUs accelerate refuses to broadcast, so that is off."""
    config = {"version": 1, "sync_module_states": False}
    arguments = TrainingArguments(
        folder / "no", fsdp=True, fsdp_config=config, use_cpu=True, report_to="none"
    )
    yield "fsdp1", message(Trainer, start(folder), arguments)


def documented(folder):
    """Trainers of the page's Python, on a tiny model and two CPUs."""
    first_alone(lambda: language_model().save_pretrained(folder / "documented" / "prepared-model"))
    text = DOCS.read_text(encoding="utf-8")
    text = text.replace('"out",', '"out", use_cpu=True, logging_steps=1,')
    text = text.replace("fsdp_size=8", "fsdp_size=2")
    namespace = {"train_dataset": TEXT}
    trainers = []
    with contextlib.chdir(folder / "documented"):
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            exec(block, namespace)
            trainers.append(namespace["trainer"])
            os.environ.pop("ACCELERATE_USE_FSDP", None)  # set by the first block
        trainers[-1].train()
        trainers[-1].save_model("at-load")
    return trainers[0], trainers[-1]


def checkpoint_in_full(folder):
    """A checkpoint that all processes gather and the first one saves."""
    arguments = TrainingArguments(
        folder / "full",
        fsdp=True,
        fsdp_config={"version": 2},
        use_cpu=True,
        max_steps=1,
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    WholeCheckpoints(language_model(), arguments, train_dataset=TEXT).train()
    os.environ.pop("ACCELERATE_USE_FSDP", None)


class Broken(torch.autograd.Function):
    """The input times `by`; its gradient is NaN."""

    @staticmethod
    def forward(ctx, x, by):
        return by * x

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan, None


def stops(folder, name, by, **settings):
    """The error of a run in which a layer of the second process breaks in the last step."""
    model = start(folder)
    calls = itertools.count()

    def hook(module, args, output):
        return Broken.apply(output, by) if module.training and next(calls) >= STEPS - 1 else output

    if os.environ["RANK"] == "1":
        model.get_submodule(BREAKS).register_forward_hook(hook, prepend=True)
    return message(lambda: tune(folder, name, model, 8, **settings))


@torch.no_grad()
def reloaded(model):
    """Whether the logits follow a changed state dict, and return with the first one."""
    batch = TEXT[0]["input_ids"].unsqueeze(0)
    state = {name: tensor.clone() for name, tensor in model.eval().state_dict().items()}
    doubled = {
        name: 2 * tensor if name.endswith(".A") else tensor for name, tensor in state.items()
    }
    before = model(batch).logits
    model.load_state_dict(doubled)
    changed = model(batch).logits
    model.load_state_dict(state)
    after = model(batch).logits
    return not torch.equal(before, changed), torch.equal(before, after)


def gathered(model):
    """Packed weights as the blocks compute with them."""
    for block in model.model.layers:
        block.unshard()
    weights = [parameter.detach().clone() for parameter in packed(model)]
    for block in model.model.layers:
        block.reshard()
    return weights


def shard_on_cpu():
    """Let accelerate switch FSDP on without GPUs; its functions for FSDP work on CPUs too."""
    begin = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **options):
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


def first_alone(function):
    """Call a function in the first process; the other waits."""
    if PartialState().is_main_process:
        function()
    PartialState().wait_for_everyone()


def message(function, *arguments):
    """The text of the error that a call raises."""
    try:
        function(*arguments)
    except (ValueError, FloatingPointError) as error:
        return str(error)
    return "nothing was raised"


def start(folder):
    """A prepared classifier without dropout and with float32 factors; equal in all processes."""
    return copy.deepcopy(_start(folder))


@functools.cache
def _start(folder):
    model = load_classifier(str(folder / "tiny"), ["0", "1"], seed=0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return qrefta.prepare(model, method="refta", rank=8, factor_dtype="float32")


def language_model():
    return copy.deepcopy(_language_model())


@functools.cache
def _language_model():
    return qrefta.prepare(tiny_llama(), rank=8)


@functools.cache
def _data(folder):
    return load_classification(folder / "data")


class _JoinedOrder(LossByRows, SampledTrainer):
    """Takes the order of joined rows."""

    def sampler_of(self, rows):
        return BalancedSampler([len(row) for row in rows["input_ids"]], 16, seed=0)


def balanced_classes(*data):
    """The recipe of text with labels, in the order of joined rows, whatever the processes."""
    return replace(text_classes(*data), trainer=_JoinedOrder)


def tune(folder, name, model, batch_size, resume=False, recipe=balanced_classes, **settings):
    """Finetune in `folder`/`name`."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    settings = SETTINGS | settings | {"per_device_train_batch_size": batch_size}
    task = TASKS["classify"]._replace(recipe=recipe)
    with mock.patch.dict(TASKS, classify=task), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        args = training_arguments("classify", folder / name, **settings)
        result = finetune(model, tokenizer, _data(folder), args=args, resume=resume)
    categories = (DeprecationWarning, FutureWarning)
    WARNINGS.extend(str(row.message) for row in caught if issubclass(row.category, categories))
    return result


def chat_losses(folder):
    """Test losses of conversations of unequal lengths, three for two processes; padded, one and two
    rows a batch, and joined without padding.
    """
    long = [{"role": "user", "content": "what is sky ?"}]
    long.append({"role": "assistant", "content": "blue " * 20})
    rows = Dataset.from_list([{"messages": long}, *chat_rows(2)])
    found = []
    for size, padding_free in ((1, False), (2, False), (2, True)):
        options = {"batch_size": size, "padding_free": padding_free, "max_steps": 1, "task": "sft"}
        data = DatasetDict(train=rows, test=rows)
        result = qrefta.finetune(
            tiny_llama(32), words(), data, folder / str(len(found)), progress=False, **options
        )
        found.append(result.test_loss_before)
    return found


def class_losses(folder):
    """Test losses of texts with classes, five for two processes, one and two rows a batch."""
    texts = [row["text"] for row in color_rows(5, seed=0)]
    rows = Dataset.from_list([{"text": text, "label": n % 3} for n, text in enumerate(texts)])
    found = []
    for size in (1, 2):
        options = {"batch_size": size, "max_steps": 1, "task": "classify"}
        data = DatasetDict(train=rows, test=rows)
        result = qrefta.finetune(
            tiny_bert(),
            tiny_tokenizer(),
            data,
            folder / f"classes{size}",
            progress=False,
            **options,
        )
        found.append(result.test_loss_before)
    return found


def trained(model):
    """All trainable parameters, whole."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensor = parameter.detach()
            tensors[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensors


def share(parameter):
    """The share of a sharded parameter's bytes in this process."""
    return parameter.to_local().nbytes / parameter.full_tensor().nbytes


def packed(model):
    """Codes and scales of all layers."""
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    return [parameter for layer in layers for parameter in (layer.weight, layer.absmax)]


def losses(trainer):
    """Mean over the processes, at each step."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
