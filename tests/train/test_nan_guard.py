"""A run stops before a step that is not finite, and names the step and the layer."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, TrainingArguments

import qrefta
from qrefta.config.stack import BANK
from qrefta.train.arguments import training_arguments
from qrefta.train.finetune import finetune
from qrefta.train.models import load_classifier
from qrefta.train.nan_guard import (
    SCALED_STEPS,
    FiniteSteps,
    _all_finite,
    _BeforeStep,
    _finite,
    find_origin,
)
from tests.models import pixels, tiny_bert, tiny_vit
from tests.processes import Broken
from tests.tiny import color_data, tiny_folder

LAYER = "bert.encoder.layer.1.intermediate.dense"


def rows(model, poisoned=None):
    """Eight pictures, one of which may hold a NaN."""
    pictures = []
    for index in range(8):
        values = pixels(model.config, torch.Generator().manual_seed(index))[0]
        if index == poisoned:
            values[0, 3, 3] = torch.nan
        pictures.append({"pixel_values": values, "labels": torch.tensor(index % 2)})
    return pictures


def trainer(model, folder, data, **settings):
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=1,
        max_steps=8,
        save_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
        train_sampling_strategy="sequential",
        **settings,
    )
    return FiniteSteps(model, arguments, train_dataset=data)


@pytest.fixture
def vit():
    return qrefta.prepare(tiny_vit(), rank=4, refine=0, progress=False)


def test_a_batch_with_nan_is_named_and_the_model_stays(vit, tmp_path):
    run = trainer(vit, tmp_path, rows(vit, poisoned=3))
    message = r"In step 4 the loss is nan; the batch's pixel_values holds NaN.*is .*checkpoint-3"
    with pytest.raises(FloatingPointError, match=message):
        run.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
    ]
    kept = qrefta.load(tmp_path / "checkpoint-3").state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in vit.state_dict().items())


def test_clean_pictures_train_to_the_end(vit, tmp_path):
    run = trainer(vit, tmp_path, rows(vit), save_strategy="no")
    outcome = run.train()
    assert outcome.global_step == run.state.max_steps
    assert math.isfinite(outcome.training_loss)


def overflow(layer, at_call):
    """Let a layer's output be infinite from a call on."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        return output * torch.inf if len(calls) > at_call else output

    return layer.register_forward_hook(hook, prepend=True)


def test_the_layer_where_it_began_is_named(tmp_path):
    folder = tiny_folder(tmp_path / "dense")
    model = qrefta.prepare(
        load_classifier(str(folder), ["red", "blue"], seed=0), rank=4, refine=0, progress=False
    )
    evaluated = 1  # before the first step, in one batch
    overflow(model.get_submodule(LAYER), evaluated + 5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = training_arguments(
        "classify", tmp_path / "out", max_steps=8, save_steps=2, disable_tqdm=True
    )
    with pytest.raises(
        FloatingPointError, match=rf"In step 6 the loss is nan; the output of {LAYER} is not finite"
    ):
        finetune(model, tokenizer, color_data(), args=args)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "checkpoint-2",
        "checkpoint-4",
    ]


def test_a_gradient_that_is_not_finite_is_not_taken_either(vit, tmp_path):
    """The loss is finite; the layer is the one whose output gets the first such gradient."""
    vit.vit.layers[1].register_forward_hook(lambda module, args, output: Broken.apply(output, 1.0))
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    run = trainer(vit, tmp_path, rows(vit))
    with pytest.raises(
        FloatingPointError,
        match=r"In step 1 gradients are not finite; the gradient of vit\.layers\.1\.\S*'s out",
    ):
        run.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())


def test_a_scaler_may_skip_some_steps_but_not_all():
    """In fp16 it begins with a factor that is too large for most losses."""
    layer = nn.Linear(2, 2)
    accelerator = SimpleNamespace(gather=lambda flags: flags, device="cpu", scaler=object())
    refused = []
    guard = _BeforeStep(
        SimpleNamespace(accelerator=accelerator, refuse=lambda *problem: refused.append(problem))
    )

    def steps(count, value):
        layer.weight.grad = torch.full_like(layer.weight, value)
        for _ in range(count):
            guard.on_pre_optimizer_step(model=layer)

    steps(SCALED_STEPS, torch.inf)
    steps(1, 1.0)
    steps(SCALED_STEPS, torch.nan)
    assert not refused
    steps(1, torch.inf)
    assert refused == [(layer, "gradients are not finite")]
    accelerator.scaler = None
    steps(1, 1.0)
    steps(1, torch.inf)
    assert len(refused) == 2


def test_the_origin_of_a_broken_parameter_is_the_parameter():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    x = torch.ones(2, 4)
    assert find_origin(model, lambda: model(x).sum()) is None
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    assert find_origin(model, lambda: model(x).sum()) == "1.weight holds NaN or infinity"
    assert not any(module._forward_hooks for module in model)


def test_factors_that_are_nan_are_found_in_the_bank():
    model = qrefta.prepare(tiny_bert(), rank=4, refine=0, progress=False)
    factors = next(iter(getattr(model, BANK).values()))
    with torch.no_grad():
        next(factors.parameters())[0, 0] = torch.nan
    ids = {"input_ids": torch.tensor([[2, 3]])}
    assert "is not finite" in find_origin(model, lambda: model(**ids).logits.sum())


def test_an_infinite_loss_is_told_before_its_gradients(vit, tmp_path):
    run = trainer(vit, tmp_path, rows(vit))
    run.compute_loss_func = lambda outputs, labels, **_: outputs.logits.square().sum() * torch.inf
    with pytest.raises(FloatingPointError, match="In step 1 the loss is inf"):
        run.train()


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


def test_the_origin_of_a_broken_gradient_is_found_backwards_and_no_hook_stays():
    """The root's derivative at 0 is infinite, its value is not."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), Root())
    nn.init.zeros_(model[0].weight)
    assert (
        find_origin(model, lambda: model(torch.ones(2, 3)).sum())
        == "the gradient of 0's output is not finite"
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_one_tensor_that_is_not_finite_is_enough():
    good, bad = torch.ones(3), torch.tensor([1.0, torch.inf])
    assert _finite([good, "text", torch.ones(2, dtype=torch.long)])
    assert not _finite([good, bad])


def test_tensors_on_several_devices_are_judged_together():
    """With the meta device for a second one, which has no values to judge."""
    assert _all_finite([torch.ones(3, device="meta"), torch.ones(3)]).device.type == "meta"
