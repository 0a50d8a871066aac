"""What two processes do for test_distributed.py, started as torchrun starts them."""

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
from pathlib import Path
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, Trainer, TrainingArguments

import qrefta
from qrefta.cli import quiet_libraries
from qrefta.nn.linear import AdaptedLinear
from qrefta.train.checkpoints import whole_checkpoints
from qrefta.train.data import load_classification
from qrefta.train.finetune import finetune, round_masters
from qrefta.train.models import load_classifier
from tests.models import VOCAB, tiny_llama

DOCS = Path(__file__).parents[1] / "docs" / "distributed.md"
TEXT = [{"input_ids": row, "labels": row} for row in torch.arange(64 * 8).view(64, 8) % VOCAB]
BREAKS = "bert.encoder.layer.1.intermediate.dense"
# SGD, since Adam blows up what rounding makes of gradients near zero
STEPS = {
    "max_steps": 5,
    "save_steps": 2,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "progress": False,
}


def torchrun(work, folder):
    """Do `work(folder)` in two processes; they fork from one that has imported everything, which saves seconds."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="tests", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, monitor_interval=0.05, start_method="forkserver",
    )  # fmt: skip
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        elastic_launch(config, _entry)(work.__name__, folder)
    finally:  # the launcher leaves its own
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _entry(work, folder):
    signal.alarm(240)  # a process that waits for another would wait for ever
    torch.set_num_threads(1)
    gc.freeze()  # as conftest.py says
    with (
        open(folder / f"{work}{os.environ['RANK']}.txt", "w") as file,
        contextlib.redirect_stdout(file),
    ):
        globals()[work](folder)


def killed(folder):
    """The command line, until the second process is killed after the first checkpoint."""
    if os.environ["RANK"] == "1":
        threading.Thread(
            target=_die,
            args=(folder / "killed" / "checkpoint-4" / "trainer_state.json",),
            daemon=True,
        ).start()
    _command(folder)


def _die(file):
    while not file.exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def _command(folder, *options):
    words = ["finetune", *map(str, (folder / "tiny", folder / "data", folder / "killed")), *options]
    with mock.patch.object(
        sys, "argv", ["qrefta", *words, "--rank=8", "--batch-size=8", "--max-steps=16"]
    ):
        runpy.run_module("qrefta", run_name="__main__")


def everything(folder):
    quiet_libraries()
    found = dict(replicated(folder))
    shard_on_cpu()
    found |= dict(sharded(folder)) | dict(refused(folder))
    torch.save(found, folder / f"found{os.environ['RANK']}.pt")


def replicated(folder):
    """DDP: as one process; as the command line but without a stop; and where this was killed."""
    model = start(folder)
    yield "ddp", (tune(folder, "ddp", model, 8), trained(model))
    yield "ddp stops", stops(folder, folder / "ddp-stops", torch.inf)
    model = qrefta.prepare(load_classifier(str(folder / "tiny"), ["0", "1"], seed=0), rank=8)
    options = {
        "max_steps": 16,
        "save_steps": 0.25,
        "optimizer": "adamw_torch",
        "learning_rate": 1e-3,
    }
    tune(folder, "whole", model, 8, **options)
    with contextlib.suppress(SystemExit):
        _command(folder, "--resume")
    yield "no GPUs", message(lambda: tune(folder, "no", start(folder), 8, fsdp=True))
    del os.environ["ACCELERATE_USE_FSDP"]  # accelerate's, for all Trainers to come


def sharded(folder):
    """FSDP2: as one process, resumed from a checkpoint, as documented, and by hand."""
    model = start(folder)
    yield (
        "fsdp",
        (tune(folder, "fsdp", model, 8, fsdp=True, gradient_checkpointing=True), trained(model)),
    )
    yield (
        "shares",
        [
            parameter.to_local().nbytes / parameter.full_tensor().nbytes
            for parameter in packed(model)
        ],
    )
    first_alone(lambda: shutil.rmtree(folder / "fsdp" / "checkpoint-5"))
    model = start(folder)
    tune(folder, "fsdp", model, 8, fsdp=True, resume=True)
    yield "resumed", trained(model)
    yield "fsdp stops", stops(folder, folder / "fsdp-stops", torch.inf, fsdp=True)
    yield "fsdp stops backwards", stops(folder, folder / "fsdp-backwards", 1.0, fsdp=True)
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
    config = {
        "version": 1,
        "sync_module_states": False,
    }  # without GPUs accelerate refuses to broadcast
    arguments = TrainingArguments(
        folder / "no", fsdp=True, fsdp_config=config, use_cpu=True, report_to="none"
    )
    yield "fsdp1", message(Trainer, start(folder), arguments)


def documented(folder):
    """Trainers of the page's Python, on a tiny model and two CPUs."""
    first_alone(lambda: language_model().save_pretrained(folder / "documented" / "prepared-model"))
    text = DOCS.read_text(encoding="utf-8").replace(
        '"out",', '"out", use_cpu=True, logging_steps=1,'
    )
    text = text.replace("fsdp_size=8", "fsdp_size=2")
    namespace, trainers = {"train_dataset": TEXT}, []
    with contextlib.chdir(folder / "documented"):
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
            exec(block, namespace)
            trainers.append(namespace["trainer"])
            os.environ.pop("ACCELERATE_USE_FSDP", None)  # the first block's
        trainers[1].train()
        trainers[1].save_model("at-load")
    return trainers


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
    whole_checkpoints(Trainer)(language_model(), arguments, train_dataset=TEXT).train()
    os.environ.pop("ACCELERATE_USE_FSDP", None)


class Broken(torch.autograd.Function):
    """The input times `by`; its gradient is NaN."""

    @staticmethod
    def forward(ctx, x, by):
        return by * x

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan, None


def stops(folder, name, by, **options):
    """What a run says in which one layer of the second process breaks, in its third step."""
    model, calls = start(folder), itertools.count()

    def hook(module, args, output):
        return Broken.apply(output, by) if module.training and next(calls) >= 2 else output

    if os.environ["RANK"] == "1":
        model.get_submodule(BREAKS).register_forward_hook(hook, prepend=True)
    return message(lambda: tune(folder, name, model, 8, **options))


@torch.no_grad()
def reloaded(model):
    """Whether logits follow what is loaded, and come back with it."""
    batch = TEXT[0]["input_ids"].unsqueeze(0)
    state = {name: tensor.clone() for name, tensor in model.eval().state_dict().items()}
    before = model(batch).logits
    model.load_state_dict(
        {name: 2 * tensor if name.endswith(".A") else tensor for name, tensor in state.items()}
    )
    changed = model(batch).logits
    model.load_state_dict(state)
    return not torch.equal(before, changed), torch.equal(before, model(batch).logits)


def gathered(model):
    """Packed weights as the blocks compute with them."""
    for block in model.model.layers:
        block.unshard()
    found = [parameter.detach().clone() for parameter in packed(model)]
    for block in model.model.layers:
        block.reshard()
    return found


def shard_on_cpu():
    """accelerate turns FSDP on for GPUs only; what it then calls takes CPUs too."""
    begin = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **options):
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = (
                DistributedType.FSDP
            )
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = init


def first_alone(function):
    if PartialState().is_main_process:
        function()
    PartialState().wait_for_everyone()


def message(function, *arguments):
    try:
        function(*arguments)
    except (ValueError, FloatingPointError) as error:
        return str(error)
    return "nothing was raised"


def start(folder):
    """A prepared classifier without dropout, whose factors are not rounded; the same in every process."""
    return copy.deepcopy(_start(folder))


@functools.cache
def _start(folder):
    model = load_classifier(str(folder / "tiny"), ["0", "1"], seed=0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return qrefta.prepare(model, rank=8, factor_dtype="float32")


def language_model():
    return qrefta.prepare(tiny_llama(), rank=8)


def tune(folder, name, model, batch_size, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    data = load_classification(folder / "data")
    return finetune(
        model, tokenizer, data, folder / name, batch_size=batch_size, **(STEPS | options)
    )


def trained(model):
    """Everything that trains, whole."""
    found = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in found.items()
    }


def packed(model):
    layers = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    return [parameter for layer in layers for parameter in (layer.weight, layer.absmax)]


def losses(trainer):
    """Mean over the processes, at each step."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]
