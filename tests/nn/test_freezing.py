"""Code that freezes a part of a model freezes the factors of the stacks in it."""

import copy
import pickle
import warnings

import pytest
import torch

import qrefta
from qrefta.config.stack import BANK
from qrefta.train.reference import reference_model
from tests.models import inputs, logits, tiny_bert, tiny_clip, tiny_whisper


def prepared_again(model, tmp_path):
    model.save_pretrained(tmp_path)
    return qrefta.load(tmp_path)


WAYS = {
    "prepared": lambda model, _: model,
    "loaded": prepared_again,
    "copied": lambda model, _: copy.deepcopy(model),
    "pickled": lambda model, _: pickle.loads(pickle.dumps(model)),
    "from a state dict": lambda model, _: (
        model.load_state_dict(model.state_dict(), assign=True),
        model,
    )[1],
}


def trained_stacks(model):
    """Names of the stacks whose factors train."""
    bank = getattr(model, BANK)
    return {bank.names[key] for key in bank} - set(bank.frozen())


def prepare(model):
    return qrefta.prepare(model, rank=4, progress=False)


@pytest.mark.parametrize("way", WAYS)
def test_freeze_encoder_freezes_the_factors_of_the_encoder(way, tmp_path):
    model = WAYS[way](prepare(tiny_whisper()), tmp_path)
    everything = trained_stacks(model)
    model.freeze_encoder()
    assert trained_stacks(model) == {name for name in everything if ".decoder." in name}
    assert 0 < len(trained_stacks(model)) < len(everything)


def test_a_frozen_tower_gets_no_gradient():
    model = prepare(tiny_clip()).train()
    model.vision_model.requires_grad_(False)
    with pytest.warns(UserWarning, match="stacks are frozen and do not train: vision_model"):
        output = model(**inputs(model))
    output.logits_per_text.square().mean().backward()
    bank = getattr(model, BANK)
    for key, factors in bank.items():
        has_gradient = any(parameter.grad is not None for parameter in factors.parameters())
        assert has_gradient == bank.names[key].startswith("text_model")


def test_freezing_some_layers_of_a_stack_warns():
    model = prepare(tiny_bert()).train()
    for name, parameter in model.named_parameters():
        if ".layer.0." in name:
            parameter.requires_grad = False
    with pytest.warns(UserWarning, match=r"Some layers of .*query \(1 of 3\).* the frozen layers"):
        model(**inputs(model))
    assert len(trained_stacks(model)) == 6


def test_factors_that_are_set_to_train_after_everything_was_frozen_train():
    model = prepare(tiny_bert()).train()
    model.requires_grad_(False)
    assert trained_stacks(model) == set()
    getattr(model, BANK).requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        output = model(**inputs(model))
    output.logits.square().mean().backward()
    factors = [parameter for name, parameter in model.named_parameters() if name.startswith(BANK)]
    assert all(parameter.grad is not None for parameter in factors if parameter.requires_grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, reference_model])
def test_freezing_a_copy_leaves_the_model_as_it_is(copied):
    model = prepare(tiny_bert())
    everything = trained_stacks(model)
    other = copied(model)
    other.requires_grad_(False)
    assert trained_stacks(other) == set()
    assert trained_stacks(model) == everything
    torch.testing.assert_close(logits(other.eval()), logits(model.eval()), rtol=0, atol=0)


def test_freezing_a_layer_after_the_factors_were_set_to_train_leaves_them_training():
    model = prepare(tiny_bert()).train()
    model.requires_grad_(False)
    getattr(model, BANK).requires_grad_(True)
    everything = trained_stacks(model)
    model.bert.encoder.layer[0].requires_grad_(False)
    assert trained_stacks(model) == everything


def test_frozen_factors_of_partly_frozen_stacks_are_not_said_to_train():
    model = prepare(tiny_bert()).train()
    model.bert.encoder.layer[0].requires_grad_(False)
    getattr(model, BANK).requires_grad_(False)
    with pytest.warns(UserWarning, match="6 of 6 stacks are frozen") as caught:
        model(**inputs(model))
    assert not any("Some layers" in str(one.message) for one in caught)
