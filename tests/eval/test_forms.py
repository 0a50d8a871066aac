"""The forms that were tried: each equals its definition at the start and after training."""

import copy

import pytest
import torch
from torch.testing import assert_close

import qrefta
from eval.peers.forms import FORMS, SLOW
from qrefta.config.stack import BANK
from qrefta.methods import METHODS
from tests import models
from tests.models import inputs, logits

every = pytest.mark.parametrize("name", FORMS)
FROM_ZERO = ("lorta-signs", "lorta-slow")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, form in FORMS.items():
        monkeypatch.setitem(METHODS, name, form)


def prepared(name, **options):
    return models.prepared(models.tiny_llama, method=name, rank=6, **options)


@every
def test_16_bits_start_at_the_model(name):
    dense = models.tiny_llama()
    expected = logits(copy.deepcopy(dense))
    model = qrefta.prepare(dense, method=name, rank=6, bits=16, factor_dtype="float32")
    assert_close(logits(model), expected, atol=2e-5, rtol=0)
    for factors in getattr(model, BANK).values():
        if name in FROM_ZERO:
            assert not factors.delta(0).any()
        else:
            assert factors.delta(0).any()


@every
def test_the_update_is_a_product_with_a_mix_a_layer(name):
    factors = next(iter(getattr(prepared(name), BANK).values()))
    with torch.no_grad():
        for parameter in factors.trained():
            parameter += 0.1 * torch.randn(parameter.shape)
    for layer in range(factors.layers):
        mix = factors.mix[layer].view(torch.float32) + factors.C[layer].bfloat16().float()
        rate = SLOW if name == "lorta-slow" else 1
        down = (factors.B * rate).bfloat16().float()
        expected = factors.A.bfloat16().float() * mix @ down
        if name == "refta-half":
            kept = factors.kept_mix[layer].view(torch.float32)
            expected += factors.left * kept @ factors.right
        assert_close(factors.delta(layer), expected, atol=1e-5, rtol=1e-5)


@every
def test_all_of_a_mix_trains_in_every_layer(name):
    model = prepared(name)
    with torch.no_grad():
        for factors in getattr(model, BANK).values():
            factors.A += 0.01
    logits_of = model(**inputs(model)).logits
    logits_of.square().mean().backward()
    for factors in getattr(model, BANK).values():
        for parameter in factors.trained():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
        assert factors.C.grad.abs().sum(1).min() > 0


def test_starts_of_the_mix():
    signs = next(iter(getattr(prepared("lorta-signs"), BANK).values()))
    assert set(signs.mix.view(torch.float32).unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("calibrated", [False, True])
def test_rows_of_length_one_leave_the_update_as_it_is(calibrated):
    """Under the metric of a calibration the rows of B do not start at length one."""
    options = {"calibration": [inputs(models.tiny_llama())]} if calibrated else {"refine": 0}
    unit, plain = (
        qrefta.prepare(models.tiny_llama(), method=name, rank=6, progress=False, **options)
        for name in ("refta-unit", "refta-mix")
    )
    for key, factors in getattr(unit, BANK).items():
        assert_close(factors.B.norm(dim=1), torch.ones(6), atol=1e-2, rtol=0)
        other = getattr(plain, BANK)[key].delta(0)
        assert (factors.delta(0) - other).norm() < 0.01 * other.norm()


def test_half_of_the_components_are_frozen():
    half, whole = prepared("refta-half"), prepared("refta-mix")
    for key, factors in getattr(half, BANK).items():
        assert factors.A.shape[1] == factors.left.shape[1] == 3
        assert 2 * factors.trained_count == getattr(whole, BANK)[key].trained_count
        assert not factors.left.requires_grad
