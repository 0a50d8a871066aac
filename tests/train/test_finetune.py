"""The recipe: learns, resumes bit for bit, stores compact factors, and refuses unfit data."""

import copy
import json
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    AutoTokenizer,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import qrefta
from qrefta.config.stack import BANK
from qrefta.train.arguments import training_arguments
from qrefta.train.checkpoints import last_checkpoint
from qrefta.train.finetune import finetune
from qrefta.train.models import load_classifier
from qrefta.train.tasks.classify import text_classes
from tests.models import build, decoder_sizes
from tests.tiny import color_data, color_rows, tiny_folder, tiny_tokenizer

# Evaluates and saves every two steps, at one rate.
OFTEN = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 2,
    "lr_scheduler_type": "constant",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def start(folder):
    """A prepared classifier; copy it before training."""
    return qrefta.prepare(
        load_classifier(str(folder), ["red", "blue"], seed=0), rank=8, scales="absmax"
    )


@pytest.fixture(scope="module")
def data():
    return color_data()


@pytest.fixture
def train(start, data, tmp_path):
    """Train a copy of the prepared classifier; the model and the result."""

    def run(name, resume=False, callbacks=(), **settings):
        model = copy.deepcopy(start)
        settings = {"per_device_train_batch_size": 16, "learning_rate": 1e-2} | settings
        args = training_arguments("classify", tmp_path / name, disable_tqdm=True, **settings)
        result = finetune(
            model, tiny_tokenizer(), data, args=args, resume=resume, callbacks=callbacks
        )
        return model, result

    return run


@pytest.fixture(scope="module")
def learned(start, data, tmp_path_factory):
    """A run by keywords alone: its model, result and folder."""
    model = copy.deepcopy(start)
    out = tmp_path_factory.mktemp("learned")
    result = finetune(
        model,
        tiny_tokenizer(),
        data,
        out,
        epochs=4,
        learning_rate=2e-2,
        batch_size=16,
        progress=False,
    )
    return model, result, out


@pytest.mark.slow
def test_training_learns_the_task_and_the_saved_model_keeps_it(learned):
    model, result, out = learned
    assert result.accuracy_after > max(0.9, result.accuracy_before)
    assert result.steps == 24
    sizes = 3 * [(32, 32)] + [(32, 32), (64, 32), (32, 64)]
    assert result.trained_parameters == 8 * sum(map(sum, sizes)) + 2 * 32 + 2
    assert result.trained_parameters == model.num_parameters(only_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(out)
    batch = tokenizer([row["text"] for row in color_rows(4, seed=3)], return_tensors="pt")
    with torch.no_grad():
        loaded = qrefta.load(out)(**batch).logits
        expected = model.eval()(**batch).logits
    assert_close(loaded, expected, rtol=0, atol=0)


def test_only_factors_and_head_move(start, learned):
    model, _, _ = learned
    before = start.state_dict()
    moved = set()
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, before[name]):
            moved.add(name)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trained
    assert all(name.startswith((BANK, "classifier")) for name in trained)


def test_final_model_stores_bf16_factors_and_checkpoints_their_masters(learned):
    _, _, out = learned
    final = load_file(out / "model.safetensors")
    checkpoint = load_file(last_checkpoint(out) / "model.safetensors")
    factors = [name for name in final if name.startswith(BANK) and name.endswith((".A", ".B"))]
    assert factors
    assert {final[name].dtype for name in factors} == {torch.bfloat16}
    assert {checkpoint[name].dtype for name in factors} == {torch.float32}


@pytest.mark.parametrize("settings", [{"max_steps": 8}, {"num_train_epochs": 2}])
def test_a_run_that_has_ended_takes_no_further_step(settings, train, data):
    """Trainer took one step more in every call, and wrote another model."""
    settings |= {"lr_scheduler_type": "constant", "save_steps": 4}
    first, result = train("run", **settings)
    for _ in range(2):
        again, repeated = train("run", resume=True, **settings)
        assert repeated.steps == result.steps
        assert repeated.test_loss == result.test_loss
        assert_close(again.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_a_run_that_stopped_early_takes_no_further_step(train):
    settings = OFTEN | {"max_steps": 40, "load_best_model_at_end": True}
    first, result = train(
        "run", callbacks=[EarlyStoppingCallback(2, early_stopping_threshold=9.0)], **settings
    )
    assert result.steps < 40
    again, repeated = train(
        "run", True, callbacks=[EarlyStoppingCallback(2, early_stopping_threshold=9.0)], **settings
    )
    assert repeated.steps == result.steps
    assert_close(again.state_dict(), first.state_dict(), rtol=0, atol=0)


def test_a_run_that_stopped_early_goes_on_without_early_stopping_or_with_more_patience(train):
    settings = OFTEN | {"max_steps": 12}
    early = {"load_best_model_at_end": True}
    stop = EarlyStoppingCallback(1, early_stopping_threshold=9.0)
    _, result = train("run", callbacks=[stop], **settings | early)
    assert result.steps == 4
    patient = EarlyStoppingCallback(3, early_stopping_threshold=9.0)
    _, more = train("run", True, callbacks=[patient], **settings | early)
    assert more.steps == 8
    _, longer = train("run", True, **settings)
    assert longer.steps == 12


def test_a_run_that_has_ended_goes_on_to_more_steps(train):
    settings = {"lr_scheduler_type": "constant", "save_steps": 4}
    train("run", max_steps=8, **settings)
    longer, result = train("run", resume=True, max_steps=12, **settings)
    whole, _ = train("whole", max_steps=12, **settings)
    assert result.steps == 12
    assert_close(longer.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(train, monkeypatch):
    settings = {"max_steps": 4, "save_steps": 2}
    whole, uninterrupted = train("whole", **settings)
    step = Trainer.training_step
    counted = []

    def stop_after_three(trainer, *arguments):
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *arguments)

    def count(*arguments):
        counted.append(1)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            train("cut", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", count)
        resumed, result = train("cut", resume=True, **settings)
    assert result.steps == 4
    assert result.test_loss_before == uninterrupted.test_loss_before
    assert len(counted) == 2  # from checkpoint-2 on
    for (name, expected), actual in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(actual, expected), name


class Recorder(TrainerCallback):
    """The arguments of a run, and the numbers of its checkpoints."""

    def __init__(self):
        self.saved = []

    def on_train_begin(self, args, *_, **__):
        self.args = args

    def on_save(self, args, state, *_, **__):
        self.saved.append(state.global_step)


def test_args_alone_decide(start, data, tmp_path):
    args = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=0.1,
        optim="sgd",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        disable_tqdm=True,
    )
    given = args.to_dict()
    recorder = Recorder()
    model = copy.deepcopy(start)
    result = finetune(model, tiny_tokenizer(), data, args=args, callbacks=[recorder])
    assert result.steps == 3
    assert recorder.saved == [2, 3]  # Trainer saves after the last step too
    assert recorder.args.optim == "sgd"
    assert recorder.args.learning_rate == 0.1
    assert recorder.args.per_device_eval_batch_size == 8  # the default of the class
    assert result.train_s > 0
    assert math.isfinite(result.test_loss_before)
    assert args.to_dict() == given  # left as it was
    assert (tmp_path / "out" / "README.md").is_file()


def test_the_best_checkpoint_is_loaded_at_the_end(train, tmp_path):
    """The learning rate is far too high, so the first evaluation is the best."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 4}
    model, result = train(
        "best", learning_rate=3.0, warmup_steps=0, load_best_model_at_end=True, **settings
    )
    checkpoint = last_checkpoint(tmp_path / "best")
    assert checkpoint.name == "checkpoint-4"
    best = load_file(tmp_path / "best" / "checkpoint-1" / "model.safetensors")
    worst = load_file(checkpoint / "model.safetensors")
    head = model.state_dict()["classifier.weight"]
    assert torch.equal(head, best["classifier.weight"])
    assert not torch.equal(head, worst["classifier.weight"])
    state = (checkpoint / "trainer_state.json").read_text()
    assert f'"best_model_checkpoint": "{tmp_path / "best" / "checkpoint-1"}"' in state
    assert result.steps == 4


def test_gradient_checkpointing_gives_no_warning_of_a_deprecation(start, data, tmp_path):
    """tests/test_distributed.py says the same of processes without pytest."""
    model = copy.deepcopy(start)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        finetune(
            model,
            tiny_tokenizer(),
            data,
            tmp_path,
            max_steps=1,
            gradient_checkpointing=True,
            progress=False,
        )
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    categories = (DeprecationWarning, FutureWarning)
    messages = [str(row.message) for row in caught if issubclass(row.category, categories)]
    assert messages == []


def test_model_and_data_that_do_not_fit_are_refused(folder, start, data, tmp_path):
    tokenizer = tiny_tokenizer()
    dense = load_classifier(str(folder), ["a", "b", "c"], seed=0)
    three = qrefta.prepare(dense, rank=8, refine=0)
    with pytest.raises(ValueError, match="3 labels and the data 2 classes"):
        finetune(three, tokenizer, data, tmp_path)
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        finetune(start, tokenizer, data, tmp_path, resume=True)
    (tmp_path / "before" / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "before" / "checkpoint-7" / "trainer_state.json").touch()
    with pytest.raises(ValueError, match="before holds checkpoint-7 of an earlier run"):
        finetune(start, tokenizer, data, tmp_path / "before")
    raw = copy.copy(data)
    raw["train"] = raw["train"].cast_column("label", raw["train"].features["text"])
    with pytest.raises(ValueError, match="not a ClassLabel"):
        text_classes(start, tokenizer, raw, 16)
    with pytest.raises(ValueError, match=r"\['red', 'blue'\] that are no class of training"):
        finetune(start, tokenizer, raw, tmp_path)
    several = copy.deepcopy(start)
    several.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match=r"has problem_type 'multi_label_classification', and a"):
        finetune(several, tokenizer, data, tmp_path)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_checkpoints_of_other_problems_are_loaded_as_classifiers(kind, tmp_path):
    folder = tiny_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"problem_type": kind}))
    model = load_classifier(str(folder), ["red", "blue"], seed=0)
    batch = {"input_ids": torch.tensor([[2, 3]] * 3), "labels": torch.tensor([0, 1, 1])}
    loss = model(**batch).loss
    expected = torch.nn.functional.cross_entropy(model(batch["input_ids"]).logits, batch["labels"])
    assert_close(loss, expected)


def test_a_tokenizer_is_saved_as_it_came(start, data, tmp_path):
    """Also with the truncation that it had before tokenizing."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(50)
    tokenizer.save_pretrained(tmp_path / "before")
    model = copy.deepcopy(start)
    out = tmp_path / "out"
    finetune(model, tokenizer, data, out, max_length=5, max_steps=1, progress=False)
    before, after = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path / "before", out)
    )
    assert before == after


@pytest.mark.slow
def test_a_classifier_without_a_pad_token_pads_with_the_end_of_text_token(data, tmp_path):
    """Rows of different lengths are scored as each alone, also by the saved model."""
    config = LlamaConfig(**decoder_sizes(32) | {"num_labels": 2, "pad_token_id": None})
    model = qrefta.prepare(build(LlamaForSequenceClassification, config), rank=8, progress=False)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.add_special_tokens({"eos_token": "[END]"})
    data = data.map(lambda row: {"text": row["text"] + " word1" * len(row["text"])})
    finetune(model, tokenizer, data, tmp_path, max_steps=2, batch_size=8, progress=False)
    loaded = qrefta.load(tmp_path)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    texts = ["red word1", "blue word2 word3 word4"]
    with torch.no_grad():
        together = loaded(**saved(texts, padding=True, return_tensors="pt")).logits
        alone = [loaded(**saved(text, return_tensors="pt")).logits[0] for text in texts]
    assert_close(together, torch.stack(alone))
    del model.config.pad_token_id  # as a custom config that never had one
    finetune(model, tokenizer, data, tmp_path / "none", max_steps=1, progress=False)
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no pad token and no end-of-text token"):
        finetune(model, tokenizer, data, tmp_path / "again", max_steps=1)
