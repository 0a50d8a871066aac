import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from qrefta.choices import QUANT_TYPES
from qrefta.nn.cost import Cost, step_cost
from qrefta.nn.product import adapted_product, frozen_product
from qrefta.nn.quantized import QuantFormat
from tests.stacks import stored_in

OUT = 48
IN = 64
RANK = 5
TOKENS = {"fewer than outputs": 30, "between outputs and inputs": 56, "more than inputs": 90}
token_counts = pytest.mark.parametrize("tokens", TOKENS.values(), ids=list(TOKENS))
FORMATS = [
    None,
    *(QuantFormat(kind) for kind in QUANT_TYPES),
    QuantFormat("nf4", double_quant=True),
]
all_formats = pytest.mark.parametrize(
    "fmt", FORMATS, ids=lambda fmt: repr(fmt and (fmt.quant_type, fmt.double_quant))
)
biased = pytest.mark.parametrize("bias", [True, False])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def operands(tokens, bias=True, dtype=torch.float32, shape=(OUT, IN), rank=RANK):
    """x, up, core, down, bias."""
    out, width = shape
    sizes = [(tokens, width), (out, rank), (rank,), (rank, width)]
    made = [randn(*size, seed=seed, dtype=dtype) for seed, size in enumerate(sizes)]
    return [*made, randn(out, seed=9, dtype=dtype) if bias else None]


def packed_weight(fmt, dtype=torch.float32, shape=(OUT, IN)):
    return stored_in(randn(*shape, seed=7, dtype=dtype), fmt)


def product(operands, packed, rounding=torch.float32):
    return adapted_product(*operands, packed, rounding)


@token_counts
def test_no_core_is_a_core_of_ones(tokens):
    packed = packed_weight(QuantFormat())
    x, up, core, down, bias = (tensor.requires_grad_() for tensor in operands(tokens))
    found = []
    for middle in (None, torch.ones_like(core)):
        y = adapted_product(x, up, middle, down, bias, packed, torch.bfloat16)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, up, down, bias))])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def definition(operands, packed):
    """Through a dense differentiable weight."""
    x, up, core, down, bias = operands
    weight = packed.dequantize(x.dtype)
    return nn.functional.linear(x, weight + up @ torch.diag(core) @ down, bias)


@biased
@token_counts
@pytest.mark.parametrize(
    "needed", [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
)
def test_gradcheck(bias, tokens, needed):
    """Numerical derivatives in float64, in both forms.

    For x, up, core and down, all at once and each alone.
    """
    scale = 8
    shape = (OUT // 8, IN // 8)
    *made, offset = operands(tokens // scale, bias, torch.float64, shape, rank=2)
    packed = packed_weight(None, torch.float64, shape)
    made = [tensor.requires_grad_(bool(need)) for tensor, need in zip(made, needed, strict=True)]
    assert torch.autograd.gradcheck(lambda *t: product([*t, offset], packed, torch.float64), made)


@all_formats
@biased
@token_counts
def test_both_forms_are_the_dense_definition(fmt, bias, tokens):
    """Output and every gradient, in float32.

    Relative root difference over 5 formats and 20 seeds: at most 1.8e-6.
    """
    packed = packed_weight(fmt)
    ours, theirs = (
        [t if t is None else t.requires_grad_() for t in operands(tokens, bias)] for _ in range(2)
    )
    y = product(ours, packed)
    expected = definition(theirs, packed)
    grad = randn(tokens, OUT, seed=3)
    y.backward(grad)
    expected.backward(grad)
    for found, wanted in [
        (y, expected),
        *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True) if a is not None),
    ]:
        assert found.shape == wanted.shape
        assert (found - wanted).norm() <= 5e-6 * wanted.norm()


@all_formats
@biased
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)], ids=str)
def test_frozen_product_is_the_dense_definition(fmt, bias, leading):
    """Output and gradients of x and bias, for any number of leading dimensions."""
    weight = packed_weight(fmt)
    found = []
    expected = []
    for results in (found, expected):
        x = randn(*leading, IN).requires_grad_()
        leaves = [x, randn(OUT, seed=9).requires_grad_()] if bias else [x]
        offset = leaves[1] if bias else None
        if results is found:
            y = frozen_product(x, offset, weight)
        else:
            y = nn.functional.linear(x, weight.dequantize(torch.float32), offset)
        results += [y, *torch.autograd.grad(y, leaves, randn(*leading, OUT, seed=3))]
    assert_close(found, expected)
    with torch.no_grad():
        assert_close(frozen_product(x, offset, weight), y)


IN_PLACE = {
    "add": lambda y: y.add_(1.0),
    "scale": lambda y: y.div_(3.0),
    "relu": torch.relu_,
    "assign": lambda y: y.index_fill_(-1, torch.tensor([0, 2]), 0.5),
    "scale a view": lambda y: y.view(*y.shape[:-1], 4, -1).mul_(2.0),
    "reshape": lambda y: y.unsqueeze_(0),
    "detach": lambda y: y.detach_(),
}


@pytest.mark.parametrize("rank", [0, RANK])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("change", IN_PLACE.values(), ids=list(IN_PLACE))
def test_the_output_can_be_changed_in_place(change, leading, rank):
    """As a dense linear layer's: Falcon adds to it, Longformer scales it."""
    packed = packed_weight(QuantFormat())
    found = []
    for multiply in (product if rank else frozen, definition if rank else dense):
        x = randn(*leading, IN).requires_grad_()
        _, up, core, down, _ = operands(1)
        leaves = [tensor.requires_grad_() for tensor in (up, core, down)] if rank else []
        y = change(multiply([x, up, core, down, None], packed))
        if y.requires_grad:
            y.square().sum().backward()
        found.append([y, *(leaf.grad for leaf in (x, *leaves))])
    ours, theirs = found
    assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def frozen(operands, packed):
    return frozen_product(operands[0], operands[-1], packed)


def dense(operands, packed):
    x, *_, bias = operands
    return nn.functional.linear(x, packed.dequantize(x.dtype).requires_grad_(), bias)


@all_formats
@token_counts
def test_a_batch_of_any_size_gives_the_same_rows(fmt, tokens):
    """The form is chosen by the number of tokens; a token's result may not depend on it."""
    packed = packed_weight(fmt)
    x, up, core, down, bias = operands(tokens)
    alone = torch.cat([product([row, up, core, down, bias], packed) for row in x.split(7)])
    assert_close(product([x, up, core, down, bias], packed), alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "mean", "sigma"),
    [(torch.bfloat16, 0.00415, 0.00033), (torch.float16, 0.00052, 0.00003)],
)
def test_both_forms_are_equally_exact_in_half_precision(dtype, mean, sigma):
    """The merged form rounds residual + update once, the other rounds the product twice.

    Relative root difference to float32, 20 seeds, means of the worse form.
    """
    fmt = QuantFormat()
    packed = packed_weight(fmt)
    made = operands(90)
    expected = product(made, packed)
    x, *rest = (t.to(dtype) for t in made)
    for found in (
        product([x, *rest], packed),
        torch.cat([product([row, *rest], packed) for row in x.split(30)]),
    ):
        assert found.dtype == dtype
        assert (found.float() - expected).norm() < (mean + 5 * sigma) * expected.norm()


def _operations_of_addmm_(result, left, right, **_):
    """Torch counts addmm and leaves out its in-place form."""
    return 2 * left[0] * left[1] * right[1]


@token_counts
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (64, 64)], ids=str)
@pytest.mark.parametrize("rank", [0, 5])
def test_step_cost_counts_the_operations_that_run(tokens, shape, rank):
    """The same as torch's count of the matmuls of a step: the cheaper form is the one that runs."""
    made = operands(tokens, shape=shape, rank=max(rank, 1))
    packed = packed_weight(None, shape=shape)
    leaves = [t.requires_grad_() for t in (made[:4] if rank else made[:1])]
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.addmm_: _operations_of_addmm_}
    ) as counter:
        y = product(made, packed) if rank else frozen_product(made[0], None, packed)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert counter.get_total_flops() == step_cost(tokens, shape[1], shape[0], rank).operations


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (64, 64)], ids=str)
@pytest.mark.parametrize("tokens", [1, 47, 48, 49, 63, 64, 65, 200])
def test_the_form_that_runs_costs_least(shape, tokens, monkeypatch):
    """In operations and in bytes, beside both forms forced on both passes."""
    chosen = step_cost(tokens, shape[1], shape[0], 4)
    forced = []
    for forward, backward in itertools.product([False, True], repeat=2):
        answers = iter([forward, backward])
        monkeypatch.setattr(
            "qrefta.nn.cost.merging_is_cheaper", lambda *_, answers=answers, **__: next(answers)
        )
        forced.append(step_cost(tokens, shape[1], shape[0], 4))
    assert chosen.operations == min(cost.operations for cost in forced)
    assert chosen.moved_bytes == min(cost.moved_bytes for cost in forced)


@pytest.mark.parametrize("tokens", [24, 27, 28, 60])
def test_without_gradients_the_update_is_merged_from_fewer_tokens_on(tokens):
    """48 x 64: from 48 * 64 / (48 + 64) = 27.4 tokens on; the result is the same."""
    made = operands(tokens)
    packed = packed_weight(QuantFormat())
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.addmm_: _operations_of_addmm_}
    )
    with counter, torch.no_grad():
        found = product(made, packed)
    with_weight = 2 * tokens * OUT * IN
    update = RANK * OUT * IN if tokens > 27 else tokens * RANK * (OUT + IN)
    assert counter.get_total_flops() == with_weight + 2 * update
    assert_close(found, product(made, packed), rtol=1e-5, atol=1e-4)


def test_step_cost_by_hand():
    """T = 2, in = 3, out = 4, R = 1: 2 bytes a value, 4 bits a weight."""
    frozen = step_cost(2, 3, 4, 0, value_bytes=2, weight_bits=4)
    assert frozen == Cost(2 * 24 * 2, 2 * (6 + 24) + 2 * (6 + 12 + 8) * 2)
    adapted = step_cost(2, 3, 4, 1, value_bytes=2, weight_bits=4)
    narrow = 2 * ((6 + 3 + 2) + (8 + 4 + 2) + (8 + 2 + 4) + (6 + 2 + 3))
    spread = 2 * ((2 + 4 + 16) + (2 + 3 + 12))
    assert adapted == frozen + Cost(4 * 2 * 7 + 2 * (8 + 6), narrow + spread)


class Allocations(TorchDispatchMode):
    """Values in every floating-point storage that an operation makes."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs or {}))
            if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and storage.data_ptr() not in given:
                self.sizes.append(storage.nbytes() // tensor.itemsize)
        return result


@token_counts
@pytest.mark.parametrize("fmt", [QuantFormat(), QuantFormat("int4")], ids=repr)
def test_a_step_makes_one_dense_buffer_and_one_result_a_pass(fmt, tokens):
    """No dense update, no gradient of a dense weight, no second copy of x, y or their gradients."""
    packed = packed_weight(fmt)
    made = [tensor.requires_grad_() for tensor in operands(tokens, bias=False)[:4]]
    with Allocations() as forward:
        y = product([*made, None], packed)
    grad = torch.ones_like(y)
    with Allocations() as backward:
        torch.autograd.grad(y, made, grad)
    wide = (max(tokens, OUT, IN) + 1) * RANK
    assert sorted(size for size in forward.sizes if size > wide) == sorted([tokens * OUT, OUT * IN])
    assert sorted(size for size in backward.sizes if size > wide) == sorted([tokens * IN, OUT * IN])


def kept(tensors, function):
    """Shapes of the tensors that autograd keeps besides the operands, and of the kept operands."""
    known = {
        tensor.untyped_storage().data_ptr(): tuple(tensor.shape)
        for tensor in tensors
        if tensor is not None
    }
    made = []
    operands = set()

    def pack(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        operands.add(known[pointer]) if pointer in known else made.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return made, operands


@pytest.mark.parametrize("trained", ["all", "x", "up", "core", "down", "nothing"])
@token_counts
def test_a_step_keeps_no_more_than_its_gradients_need(trained, tokens):
    """It keeps x for the gradient of down.

    It keeps h for the gradients of up and core, unless the merged form computes it again from x.
    """
    fmt = QuantFormat()
    packed = packed_weight(fmt)
    made = operands(tokens)
    leaves = dict(zip(("x", "up", "core", "down"), made, strict=False))
    for name, tensor in leaves.items():
        tensor.requires_grad_(trained in ("all", name))
    kept_new, kept_operands = kept(
        [*made, *packed.tensors().values()], lambda: product(made, packed)
    )
    needs_narrow = trained in ("up", "core") or (trained == "all" and tokens <= IN)
    assert kept_new == ([(tokens, RANK)] if needs_narrow else [])
    assert ((tokens, IN) in kept_operands) == (trained in ("all", "down"))


def test_backward_is_the_same_inside_autocast():
    """The function computes in the dtype of its gradient, whatever is switched on around it."""
    fmt = QuantFormat()
    packed = packed_weight(fmt)
    found = []
    for enabled in (False, True):
        made = [tensor.requires_grad_() for tensor in operands(30)]
        y = product(made, packed)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(torch.autograd.grad(y, made, torch.ones_like(y)))
    for inside, outside in zip(*found, strict=True):
        assert torch.equal(inside, outside)


def test_gradient_of_the_core_does_not_overflow_in_half_precision():
    """Loss-scaled gradients times activations: 300 * 300 is more than float16 holds."""
    made = [tensor.to(torch.float16) for tensor in operands(30)]
    made[2] = made[2].float().requires_grad_()
    packed = packed_weight(QuantFormat())
    y = product(made, packed)
    (found,) = torch.autograd.grad(y, made[2], torch.full_like(y, 300.0))
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    assert found.abs().max() > torch.finfo(torch.float16).max
