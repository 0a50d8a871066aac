import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from qrefta.choices import QUANT_TYPES, bits_of
from qrefta.nn.bank import FactorBank
from qrefta.nn.linear import AdaptedLinear
from qrefta.nn.quantize import quantize
from qrefta.nn.quantized import QuantFormat
from tests.stacks import fit_refta, stored_in

LAYERS = 3
OUT = 24
IN = 40
RANK = 5
FORMATS = [
    None,
    *(
        QuantFormat(kind, 64, double)
        for kind in QUANT_TYPES
        for double in (False, True)
        if double or bits_of(kind) == 4
    ),
]
all_formats = pytest.mark.parametrize(
    "fmt", FORMATS, ids=lambda fmt: repr(fmt and (fmt.quant_type, fmt.double_quant))
)
biased = pytest.mark.parametrize("bias", [True, False])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Adapted(nn.Module):
    """Three linear layers of one stack and their bank, as `prepare` makes them.

    The products of the layers are added.
    """

    def __init__(self, fmt=None, bias=True, factor_dtype=torch.bfloat16, dtype=torch.float32):
        super().__init__()
        stack = randn(LAYERS, OUT, IN, dtype=dtype)
        factors = fit_refta(stack, RANK, "dct", factor_dtype)
        self.bank = FactorBank({"stack": factors})
        self.layers = nn.ModuleList()
        for layer in range(LAYERS):
            linear = AdaptedLinear(IN, OUT, bias, fmt, dtype)
            residual = stack[layer] - factors.delta(layer)
            offset = randn(OUT, seed=layer, dtype=dtype) if bias else None
            linear.store(stored_in(residual, fmt), offset)
            linear.attach(self.bank, "stack", layer)
            self.layers.append(linear)

    def forward(self, x):
        return sum(layer(x) * (place + 1) for place, layer in enumerate(self.layers))

    def moved(self):
        """Self after some training: masters that are no bf16 values."""
        with torch.no_grad():
            for seed, parameter in enumerate(self.bank["stack"].trained()):
                parameter += 0.01 * randn(*parameter.shape, seed=seed, dtype=parameter.dtype)
        return self


def plain_layer(fmt, bias=True):
    """Quantized only."""
    layer = AdaptedLinear(IN, OUT, bias, fmt, torch.float32)
    weight = randn(OUT, IN)
    layer.store(stored_in(weight, fmt), randn(OUT) if bias else None)
    return layer


def dense(layer, x):
    """The definition, through a dense differentiable weight: residual + up . core . down.

    Rounding the masters has the derivative 1: the gradients reach them without being rounded
    themselves.
    """
    factors = layer.factors
    weight = layer.residual(x.dtype)
    if factors is not None:
        up, down = (
            f + (f.to(factors.dtype).to(x.dtype) - f).detach()
            for f in (factors.up(), factors.down())
        )
        weight = weight + up @ torch.diag(factors.core(layer._adapter[2]).to(x.dtype)) @ down
    return nn.functional.linear(x, weight, layer.bias)


def gradients(model, x, y):
    """Gradients of x, A and B for a fixed random gradient of y."""
    return torch.autograd.grad(
        y, [x, *model.bank["stack"].trained()], randn(*y.shape, seed=9, dtype=y.dtype)
    )


@biased
def test_forward_is_the_dense_definition_in_float64(bias):
    model = Adapted(bias=bias, factor_dtype=torch.float64, dtype=torch.float64)
    x = randn(7, IN, dtype=torch.float64)
    for layer in model.layers:
        assert_close(layer(x), dense(layer, x))


def test_bits_16_layers_equal_the_original_weights():
    """The exact start: residual and factors of all layers add up to the stack."""
    stack = randn(LAYERS, OUT, IN)
    for weight, layer in zip(stack, Adapted().layers, strict=True):
        assert_close(layer.dense_weight(), weight)


@all_formats
@biased
def test_forward_is_a_linear_with_the_dense_weight(fmt, bias):
    """Float32, sums of 40 in two orders: measured up to 8e-6 apart over 7 formats and 5 seeds."""
    x = randn(7, IN)
    for layer in (*Adapted(fmt, bias).moved().layers, plain_layer(fmt, bias)):
        assert_close(
            layer(x),
            nn.functional.linear(x, layer.dense_weight(), layer.bias),
            rtol=1e-5,
            atol=2e-5,
        )


@all_formats
def test_leading_dimensions_pass_through(fmt):
    layer = Adapted(fmt).layers[1]
    for shape in [(), (7,), (1,), (2, 5), (2, 3, 4), (0,), (2, 0)]:
        x = randn(*shape, IN)
        y = layer(x)
        assert y.shape == (*shape, OUT)
        assert_close(y.reshape(-1, OUT), layer(x.reshape(-1, IN)))


@all_formats
def test_layout_of_the_input_does_not_matter(fmt):
    """Forward and gradients on a transposed view, an expanded and a strided input."""
    model = Adapted(fmt)
    views = [
        randn(IN, 6).T,
        randn(1, 1, IN).expand(4, 3, IN),
        randn(5, 2 * IN)[:, ::2],
        randn(3, 4, IN).transpose(0, 1),
    ]
    for x in views:
        strided = x.detach().requires_grad_()
        packed = x.contiguous().requires_grad_()
        assert_close(model(strided), model(packed))
        for a, b in zip(
            gradients(model, strided, model(strided)),
            gradients(model, packed, model(packed)),
            strict=True,
        ):
            assert_close(a, b)


def test_layout_of_the_gradient_does_not_matter():
    model = Adapted()
    x = randn(2, 3, IN).requires_grad_()
    grad = randn(3, 2, OUT).transpose(0, 1)
    y = model.layers[0](x)
    leaves = [x, *model.bank["stack"].trained()]
    strided = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    for a, b in zip(strided, torch.autograd.grad(y, leaves, grad.contiguous()), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("fmt", FORMATS[1:], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_is_dequantized_straight_to_the_dtype(fmt, dtype):
    weight = randn(OUT, IN)
    assert torch.equal(plain_layer(fmt).residual(dtype), quantize(weight, fmt).dequantize(dtype))


@all_formats
def test_gradients_equal_the_dense_definition(fmt):
    """The gradients of three layers add up in the shared factors.

    Float32, measured up to 9e-6 apart (7 formats, 5 seeds).
    """
    model = Adapted(fmt).moved()
    x = randn(2, 4, IN).requires_grad_()
    reference = sum(dense(layer, x) * (place + 1) for place, layer in enumerate(model.layers))
    for found, expected in zip(
        gradients(model, x, model(x)), gradients(model, x, reference), strict=True
    ):
        assert_close(found, expected, rtol=1e-5, atol=5e-5)


def test_gradients_are_exact_in_float64():
    model = Adapted(factor_dtype=torch.float64, dtype=torch.float64)
    x = randn(2, 4, IN, dtype=torch.float64).requires_grad_()
    reference = sum(dense(layer, x) * (place + 1) for place, layer in enumerate(model.layers))
    for found, expected in zip(
        gradients(model, x, model(x)), gradients(model, x, reference), strict=True
    ):
        assert_close(found, expected)


@all_formats
def test_gradients_after_backward_are_sums_over_the_layers(fmt):
    model = Adapted(fmt)
    x = randn(6, IN)
    expected = [
        torch.autograd.grad(layer(x).sum(), model.bank["stack"].trained()) for layer in model.layers
    ]
    sum(layer(x).sum() for layer in model.layers).backward()
    for place, parameter in enumerate(model.bank["stack"].trained()):
        assert_close(parameter.grad, sum(layer[place] for layer in expected))


@all_formats
def test_nothing_but_the_factors_gets_a_gradient(fmt):
    model = Adapted(fmt)
    model(randn(6, IN)).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "bank.stack.A",
        "bank.stack.B",
    }
    assert not any(p.requires_grad for p in model.layers.parameters())


@all_formats
def test_layers_do_not_register_the_factors(fmt):
    model = Adapted(fmt)
    assert not any("bank" in name or "factors" in name for name in model.layers.state_dict())


def test_frozen_layer_passes_the_gradient_on():
    layer = plain_layer(QuantFormat())
    x = randn(6, IN).requires_grad_()
    grad = randn(6, OUT, seed=9)
    layer(x).backward(grad)
    assert_close(x.grad, grad @ layer.dense_weight(), rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is layer.bias.grad is None


def kept_activations(model, function):
    """Tensors that autograd keeps for the backward pass, without parameters and views of them."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    return kept, y


@pytest.mark.parametrize("fmt", [None, QuantFormat()])
def test_adapted_layer_keeps_its_input_and_a_rank_wide_product_only(fmt):
    model = Adapted(fmt)
    x = randn(2, 9, IN).requires_grad_()
    kept, y = kept_activations(model, lambda: model.layers[0](x))
    assert sorted(tuple(t.shape) for t in kept) == [(18, RANK), (18, IN)]
    assert sum(t.nbytes for t in kept) == 4 * 18 * (RANK + IN)
    assert kept[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    y.sum().backward()


@pytest.mark.parametrize("fmt", [None, QuantFormat()])
def test_layer_without_factors_keeps_no_activations(fmt):
    layer = plain_layer(fmt)
    x = randn(2, 9, IN).requires_grad_()
    assert kept_activations(layer, lambda: layer(x))[0] == []


@all_formats
def test_backward_after_a_no_grad_forward_is_the_same(fmt):
    """In a forward pass like this bitsandbytes' Linear4bit repacks its weight in place.

    Its later gradients are wrong.
    """
    model = Adapted(fmt)
    untouched = Adapted(fmt)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            model.eval()(randn(1, IN).to(dtype))
            model(randn(9, IN).to(dtype))
    x = randn(6, IN).requires_grad_()
    assert torch.equal(model(x), untouched(x))
    for a, b in zip(
        gradients(model, x, model(x)), gradients(untouched, x, untouched(x)), strict=True
    ):
        assert torch.equal(a, b)


@all_formats
def test_autocast_computes_in_its_dtype_and_gives_master_gradients(fmt):
    """Relative root difference to the float32 gradient of A.

    Measured over 7 formats and 20 seeds: mean 0.0039, sigma 0.0004.
    """
    model = Adapted(fmt)
    layer = model.layers[0]
    x = randn(50, IN).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, layer(x.bfloat16()))
    found = gradients(model, x, y.float())
    expected = gradients(model, x, layer(x))
    assert {gradient.dtype for gradient in found} == {torch.float32}
    assert (found[1] - expected[1]).norm() < (0.0039 + 5 * 0.0004) * expected[1].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@all_formats
def test_half_inputs_give_half_outputs_near_the_dense_ones(fmt, dtype):
    """Relative root difference, measured over 7 formats and 20 seeds.

    bf16: mean 0.00285, sigma 0.0001; fp16: mean 0.00037, sigma 0.000014.
    """
    mean, sigma = (0.00285, 0.0001) if dtype == torch.bfloat16 else (0.00037, 0.000014)
    layer = Adapted(fmt).layers[0]
    x = randn(50, IN).to(dtype)
    y = layer(x)
    expected = dense(layer, x.float())
    assert y.dtype == dtype
    assert (y.float() - expected).norm() < (mean + 5 * sigma) * expected.norm()


@all_formats
def test_residual_survives_a_dtype_conversion_of_the_model(fmt):
    layer = Adapted(fmt).layers[0]
    before = layer.residual(torch.float32)
    after = layer.to(torch.bfloat16).residual(torch.float32)
    assert torch.equal(after, before.bfloat16().float() if fmt is None else before)


@all_formats
def test_copies_share_factors_inside_the_copy_and_not_with_the_original(fmt):
    model = Adapted(fmt)
    x = randn(3, IN)
    before = model(x)
    clone = copy.deepcopy(model)
    assert torch.equal(clone(x), before)
    assert all(layer.factors is clone.bank["stack"] for layer in clone.layers)
    with torch.no_grad():
        clone.bank["stack"].A.zero_()
    assert torch.equal(model(x), before)
    assert not torch.equal(clone(x), before)


@all_formats
def test_state_dict_fills_an_empty_layer(fmt):
    layer = plain_layer(fmt)
    empty = AdaptedLinear(IN, OUT, True, fmt, torch.float32)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(randn(3, IN)), layer(randn(3, IN)))


def test_a_layer_prints_its_format_and_rank():
    assert repr(Adapted(QuantFormat("int4")).layers[0]).endswith(
        "40, out_features=24, int4, block 64, rank=5)"
    )
    assert repr(plain_layer(None)).endswith("16 bits, rank=0)")


def test_the_input_has_its_name_in_nn_linear():
    layer = Adapted().layers[0]
    x = randn(3, IN)
    assert torch.equal(layer(input=x), layer(x))


# Rounded factors that are kept in decoding


def evaluated(model, x):
    """With the factors' rounded values as layers keep them in decoding."""
    with torch.no_grad():
        return model.eval()(x)


@all_formats
def test_evaluation_equals_a_pass_with_gradients(fmt):
    model = Adapted(fmt).moved()
    x = randn(3, 1, IN)
    assert_close(evaluated(model, x), model.train()(x).detach(), rtol=1e-5, atol=1e-5)
    assert_close(evaluated(model, x.bfloat16()), model.train()(x.bfloat16()).detach())


def test_rounded_factors_are_made_once_for_all_layers_and_tokens(monkeypatch):
    model = Adapted().eval()
    made = []
    up = type(model.bank["stack"]).up
    monkeypatch.setattr(type(model.bank["stack"]), "up", lambda self: made.append(1) or up(self))
    for _ in range(4):
        evaluated_once = torch.no_grad()(model)(randn(3, 1, IN))
    assert len(made) == 1
    model(randn(3, 1, IN))
    assert len(made) == 1 + LAYERS
    assert evaluated_once.shape == (3, 1, OUT)


CHANGES = {
    "in place": lambda model: model.bank["stack"].A.mul_(2),
    "loaded": lambda model: model.bank.load_state_dict(
        {"stack.A": 2 * model.bank["stack"].A}, strict=False
    ),
    "replaced": lambda model: setattr(
        model.bank["stack"], "B", nn.Parameter(3 * model.bank["stack"].B)
    ),
    "past autograd": lambda model: model.bank["stack"].A.data.mul_(2),
    "past autograd, in training": lambda model: model.train().bank["stack"].A.data.mul_(2),
    "data replaced": lambda model: setattr(
        model.bank["stack"].A, "data", 2 * model.bank["stack"].A.data
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_rounded_factors_follow_a_change(change):
    model = Adapted(QuantFormat())
    x = randn(3, 1, IN)
    before = evaluated(model, x)
    with torch.no_grad():
        change(model)
        found = model(x)
    assert not torch.allclose(found, before)
    assert_close(found, model.train()(x).detach(), rtol=1e-5, atol=1e-5)


def test_rounded_factors_follow_an_optimizer_that_writes_past_autograd():
    """The model stays in eval mode: a pass that records gradients drops the kept factors."""
    model = Adapted().eval()
    x = randn(3, 1, IN)
    evaluated(model, x)
    model(x).sum().backward()
    for parameter in model.bank["stack"].trained():
        parameter.data.add_(parameter.grad, alpha=0.1)
    with torch.no_grad():
        found = model(x)
    assert_close(found, model.train()(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_update_without_gradients_takes_effect_in_the_next_batch(mode, tokens):
    """As in MeZO: the model stays in eval mode, and no pass records gradients."""
    model = Adapted().eval()
    x = randn(3, tokens, IN)
    with mode():
        losses = []
        for scale in (1, 3, 1 / 3):
            for parameter in model.bank["stack"].trained():
                parameter.data.mul_(scale)
            losses.append(model(x).square().sum().item())
            model(x[:, :1])  # decoding keeps the rounded factors
    assert losses[1] != losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-2)


def test_kept_factors_move_and_copy_with_the_model():
    model = Adapted()
    x = randn(3, 1, IN)
    evaluated(model, x)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.bank["stack"].A.zero_()
        assert not torch.allclose(clone(x), model(x))
    model.to(torch.bfloat16)
    # Factors kept for the old device or dtype are dropped.
    assert not model.bank["stack"]._kept
    assert evaluated(model, x.bfloat16()).dtype == torch.bfloat16
    assert "_kept" not in str(model.state_dict().keys())
