"""Stacks that do not learn are named once, and a model without trainable parameters is refused."""

import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

import qrefta
from qrefta.config.stack import BANK
from qrefta.train.finetune import finetune
from qrefta.train.gradients import GradientWatch, silent_stacks
from tests.models import inputs, prepared, tiny_bert, tiny_clip, tiny_mixtral
from tests.tiny import color_data, tiny_folder, tiny_tokenizer

STACKS = 6  # of BERT
OUTPUT = "bert.encoder.layer.*.output.dense"


def classifier(folder):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder(folder))
    return qrefta.prepare(model, rank=4, refine=0, progress=False)


def freeze_stack(model, name):
    names = [row["stack"] for row in qrefta.quant_report(model)]
    getattr(model, BANK)[f"stack{names.index(name)}"].requires_grad_(False)


def messages(caught):
    return [str(one.message) for one in caught]


class Detached(nn.Module):
    """Cuts the gradient of what the wrapped module puts out."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs).detach()


def plain_run(model, folder):
    """A plain Trainer with the callback, three steps."""
    rows = [
        {name: tensor[0] for name, tensor in inputs(model).items()} | {"labels": torch.tensor(1)}
    ] * 4
    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[GradientWatch()]).train()


def test_every_stack_of_a_usual_model_has_a_gradient():
    for make in (tiny_bert, tiny_mixtral):
        model = prepared(make, rank=4)
        batch = inputs(model)
        model(**batch).logits.square().sum().backward()
        assert silent_stacks(model) == []


def test_a_frozen_stack_is_named_once(tmp_path):
    model = prepared(tiny_bert, rank=4)
    freeze_stack(model, OUTPUT)
    with pytest.warns(UserWarning, match=r"1 of 6 stacks are frozen and do not train") as caught:
        plain_run(model, tmp_path)
    [message] = [text for text in messages(caught) if "factors" in text]
    assert f"do not train: {OUTPUT}. If" in message


def test_stacks_behind_a_cut_are_named_once(tmp_path):
    """The last block's output is detached, so only the head learns."""
    model = prepared(tiny_bert, rank=4)
    last = model.bert.encoder.layer[-1]
    last.output = Detached(last.output)
    with pytest.warns(UserWarning, match="got no gradient and did not learn") as caught:
        plain_run(model, tmp_path)
    [message] = [text for text in messages(caught) if "did not learn" in text]
    assert message.count("bert.encoder.layer.*") == STACKS


def test_a_tower_that_the_loss_leaves_out_is_named():
    model = prepared(tiny_clip, rank=4)
    model(**inputs(model)).text_embeds.square().sum().backward()
    silent = silent_stacks(model)
    assert silent
    assert all(name.startswith("vision_model") for name in silent)


@pytest.mark.slow
def test_finetuning_names_stacks_that_do_not_learn_and_says_nothing_of_others(tmp_path):
    model = classifier(tmp_path / "model")
    data = color_data(16, 8)
    options = {"max_steps": 2, "batch_size": 4, "progress": False, "learning_rate": 1e-3}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        finetune(model, tiny_tokenizer(), data, tmp_path / "first", **options)
    assert not [text for text in messages(caught) if "factors" in text]
    last = model.bert.encoder.layer[-1]
    last.output = Detached(last.output)
    with pytest.warns(UserWarning, match=r"In step 1 the factors of bert\.encoder"):
        finetune(model, tiny_tokenizer(), data, tmp_path / "second", **options)


def test_a_model_without_trainable_parameters_is_refused_before_anything_is_read(tmp_path):
    model = prepared(tiny_bert, rank=4).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter: all parameters are frozen"):
        finetune(model, tiny_tokenizer(), "missing.csv", tmp_path / "run")
    model = prepared(tiny_bert, rank=0).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter: it was prepared with rank=0"):
        finetune(model, tiny_tokenizer(), "missing.csv", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_frozen_factors_warn_in_training_mode_only_and_once():
    model = prepared(tiny_bert, rank=4).requires_grad_(False)
    batch = inputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(**batch)
        with torch.no_grad():
            model.train()(**batch)
    with pytest.warns(UserWarning, match="6 of 6 stacks are frozen"):
        model(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)
