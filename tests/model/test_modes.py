"""Eval mode for a while, and the checks of a model that use it."""

from contextlib import suppress

import pytest
from torch import nn

from qrefta.model.modes import eval_mode
from qrefta.train.head_loss import has_plain_head
from qrefta.train.packing import keeps_rows_apart
from tests.models import tiny_llama


@pytest.fixture
def model():
    """In training, with a dropout that is frozen in eval mode."""
    model = tiny_llama().train()
    model.model.dropout = nn.Dropout().eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def test_each_module_has_its_mode_again_also_after_an_error(model):
    before = modes(model)
    assert not all(before)
    with suppress(KeyError), eval_mode(model):
        assert not any(modes(model))
        raise KeyError
    assert modes(model) == before


@pytest.mark.parametrize("check", [has_plain_head, keeps_rows_apart])
def test_a_frozen_dropout_is_still_in_eval_mode_after_a_check(check, model):
    before = modes(model)
    assert check(model)
    assert modes(model) == before


def refuse(**inputs):
    raise TypeError


def test_a_frozen_dropout_is_still_in_eval_mode_after_a_check_that_fails(model):
    before = modes(model)
    model.forward = refuse
    assert not has_plain_head(model)
    with pytest.raises(TypeError):
        keeps_rows_apart(model)
    assert modes(model) == before
