"""The setting `gradient_checkpointing` of a run, by keyword and in args."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainerCallback, TrainingArguments

import qrefta
from qrefta.nn.checkpointing import selective_contexts
from qrefta.train.arguments import training_arguments
from qrefta.train.finetune import finetune
from qrefta.train.models import load_classifier
from tests.models import tiny_llama
from tests.tiny import color_data, tiny_folder, tiny_tokenizer
from tests.train.talk import chat_rows, pair_rows, words, write_rows

# transformers 5.24 renamed it to activation_checkpointing
old_name = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
SELECTIVE = {"selective": True}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A classifier without dropout, with which attention on a CPU is no single operator."""
    folder = tiny_folder(tmp_path_factory.mktemp("tiny"))
    model = load_classifier(str(folder), ["red", "blue"], seed=0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture(scope="module")
def prepared(dense):
    return qrefta.prepare(copy.deepcopy(dense), rank=8, scales="absmax", progress=False)


class Watch(TrainerCallback):
    """The function that the blocks checkpoint with, during the run."""

    context_fn = None

    def on_step_end(self, args, state, control, model, **_):
        modules = [vars(module) for module in model.modules()]
        function = next(
            owner["_gradient_checkpointing_func"]
            for owner in modules
            if "_gradient_checkpointing_func" in owner
        )
        self.context_fn = function.keywords.get("context_fn")


def run(model, folder, *callbacks, **settings):
    """The trained parameters of a short run of a copy, and the copy."""
    model = copy.deepcopy(model)
    settings = {"max_steps": 3, "progress": False} | settings
    finetune(model, tiny_tokenizer(), color_data(), folder, callbacks=callbacks, **settings)
    return [parameter for parameter in model.parameters() if parameter.requires_grad], model


@pytest.mark.slow
def test_a_selective_run_gives_the_same_model_and_leaves_its_methods_alone(prepared, tmp_path):
    watch = Watch()
    expected, _ = run(prepared, tmp_path / "none")
    found, model = run(prepared, tmp_path / "some", watch, gradient_checkpointing="selective")
    assert watch.context_fn is selective_contexts
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "gradient_checkpointing_enable" not in vars(model)


@old_name
def test_args_ask_for_it_with_the_key_that_trl_has(prepared, tmp_path):
    """And every third layer alone, an option that transformers takes itself."""
    watch = Watch()
    args = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=SELECTIVE | {"every_n_layers": 3},
        report_to="none",
        use_cpu=True,
    )
    _, model = run(prepared, None, watch, args=args, max_steps=None)
    assert watch.context_fn is selective_contexts
    checkpointed = [block.gradient_checkpointing for block in model.bert.encoder.layer]
    assert checkpointed == [True, False, False]


def test_a_peft_model_takes_it(dense, tmp_path):
    watch = Watch()
    model = get_peft_model(dense, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    finetune(
        model,
        tiny_tokenizer(),
        color_data(),
        tmp_path,
        max_steps=1,
        gradient_checkpointing="selective",
        callbacks=[watch],
        progress=False,
    )
    assert watch.context_fn is selective_contexts


@old_name
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_trl_trainers_take_it(task, tmp_path):
    pytest.importorskip("trl")
    watch = Watch()
    rows = chat_rows(20) if task == "sft" else pair_rows(20)
    model = qrefta.prepare(tiny_llama(), rank=4, refine=0, progress=False)
    finetune(
        model,
        words(),
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "out",
        task=task,
        max_steps=1,
        batch_size=2,
        max_length=32,
        gradient_checkpointing="selective",
        callbacks=[watch],
        progress=False,
    )
    assert watch.context_fn is selective_contexts
    assert "gradient_checkpointing_enable" not in vars(model)


def test_arguments_with_it_are_json(tmp_path):
    """Trainer's loggers write them so."""
    args = training_arguments(
        "classify",
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs=SELECTIVE,
    )
    options = json.loads(args.to_json_string())["gradient_checkpointing_kwargs"]
    assert options == {"use_reentrant": False, "selective": True}


def test_a_wrong_value_is_refused_with_the_allowed_ones(prepared, tmp_path):
    with pytest.raises(ValueError, match="is 'attention'; it must be True, False or 'selective'"):
        run(prepared, tmp_path, gradient_checkpointing="attention")
