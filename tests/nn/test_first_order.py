"""Second derivatives of a prepared model: refused, never silently zero along a path."""

import pytest
import torch

import qrefta
from qrefta.config.stack import BANK
from tests.models import tiny_llama

TOKENS = torch.arange(1, 9)[None]


def loss_of(model):
    return model(input_ids=TOKENS, labels=TOKENS).loss


def trained(model):
    return [p for p in getattr(model, BANK).parameters() if p.requires_grad]


def twice_by_grad(model):
    gradients = torch.autograd.grad(
        loss_of(model), trained(model), create_graph=True, allow_unused=True
    )
    torch.autograd.grad(sum(g.square().sum() for g in gradients if g is not None), trained(model))


def penalty_of_inputs(model):
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    loss = model(inputs_embeds=embedded, labels=TOKENS).loss
    torch.autograd.grad(loss, embedded, create_graph=True)


def hessian_vector_product(model):
    embedded = model.get_input_embeddings()(TOKENS).detach()

    def loss(inputs):
        return model(inputs_embeds=inputs, labels=TOKENS).loss

    torch.autograd.functional.hvp(loss, embedded, torch.ones_like(embedded))


def adahessian(model):
    loss_of(model).backward(create_graph=True)


WAYS = [twice_by_grad, penalty_of_inputs, hessian_vector_product, adahessian]


@pytest.mark.parametrize("method", ["windows", "refta", "craft", "tera"])
@pytest.mark.parametrize("bits", [4, 16])
def test_second_derivatives_are_refused(method, bits):
    """Hessian-vector products left out the paths through the layers."""
    model = qrefta.prepare(tiny_llama(), method=method, bits=bits, rank=4, refine=0, progress=False)
    for way in WAYS:
        with pytest.raises(ValueError, match=r"create_graph=True: .* no second derivatives"):
            way(model)


def test_a_merged_model_has_them():
    model = qrefta.merge(qrefta.prepare(tiny_llama(), rank=4, refine=0), torch.float32)
    model.set_attn_implementation("eager")
    penalty_of_inputs(model)
    adahessian(model)
    gradients = [parameter.grad for parameter in model.parameters()]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
