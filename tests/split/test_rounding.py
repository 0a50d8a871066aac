import warnings

import pytest
import torch
from torch.testing import assert_close

from qrefta.choices import QUANT_TYPES, bits_of
from qrefta.config.settings import Settings
from qrefta.config.stack import LayerStack
from qrefta.linalg.metric import output_error
from qrefta.nn import packing
from qrefta.nn.quantize import Rounding, quantize
from qrefta.nn.quantized import QuantFormat
from qrefta.split import rounding as rounding_module
from qrefta.split.moments import Moments
from qrefta.split.rounding import StackRounding, warn_of_tokens

formats = pytest.mark.parametrize(
    "fmt",
    [
        QuantFormat(kind, 64, double)
        for kind in QUANT_TYPES
        for double in (False, True)
        if double or bits_of(kind) == 4
    ],
    ids=lambda fmt: fmt.quant_type + "-double" * fmt.double_quant,
)


def stack_of(out, width, layers=2):
    modules = tuple(f"layers.{index}.linear" for index in range(layers))
    return LayerStack("layers.*.linear", modules, out, width)


def moments_of(stack, tokens=1000, seed=0, full=True):
    """Moments of correlated inputs with a few outlier channels, as language models have."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in stack.modules:
        width = stack.in_features
        mixing = torch.randn(width, width, generator=generator) / width**0.5
        x = torch.randn(tokens, width, generator=generator) @ (mixing + torch.eye(width))
        x[:, :: max(width // 4, 1)] *= 10
        tensors[path] = x.T @ x / tokens if full else x.square().mean(0)
    owners = {path: path for path in stack.modules}
    return Moments(owners, dict.fromkeys(stack.modules, tokens), tensors.__getitem__)


def matrix_of(out, width, seed=7):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def rounding_of(stack, moments, **settings):
    return StackRounding(Settings(**settings), stack, moments)


@formats
@pytest.mark.parametrize("shape", [(48, 64), (33, 96), (20, 101)], ids=str)
@pytest.mark.parametrize("scales", ["searched", "absmax"])
def test_feedback_has_less_output_error_than_the_nearest_levels(fmt, shape, scales):
    """Widths of 96 and 101: blocks span rows."""
    stack = stack_of(*shape)
    moments = moments_of(stack)
    chosen = rounding_of(stack, moments, scales=scales).stored(0)
    assert chosen.feedback is not None
    for seed in range(2):
        matrix = matrix_of(*shape, seed)
        errors = [
            output_error(
                matrix - quantize(matrix, fmt, way).dequantize(torch.float32),
                moments.of(stack.modules[0]),
            )
            for way in (chosen, chosen._replace(feedback=None))
        ]
        assert errors[0] < 0.8 * errors[1]


@formats
@pytest.mark.parametrize("shape", [(16, 64), (11, 40)], ids=str)
def test_feedback_equals_a_plain_loop(fmt, shape):
    """Each value takes the level nearest to itself plus the weighted errors of its row so far.

    Columns with large moments come first.
    """
    stack = stack_of(*shape)
    rounding = rounding_of(stack, moments_of(stack)).stored(0)
    matrix = matrix_of(*shape)
    packed = quantize(matrix, fmt, rounding)
    scales = packed.block_scales().double()
    levels = quantize(torch.zeros(64), fmt)  # of the format, for its table
    table = torch.tensor(sorted(level_values(levels)), dtype=torch.float64)
    order = rounding.feedback.order.tolist()
    unit = rounding.feedback.unit.double()
    found = packed.dequantize(torch.float64)
    errors = torch.zeros(shape, dtype=torch.float64)
    for row in range(shape[0]):
        for place, k in enumerate(order):
            target = matrix[row, k].double() + errors[row, :place] @ unit[:place, place]
            scale = scales[(row * shape[1] + k) // 64]
            gaps = (target - table * scale).abs()
            assert gaps.min() >= (target - found[row, k]).abs() - 1e-5 * scale.abs()
            errors[row, place] = matrix[row, k].double() - found[row, k]


def level_values(packed):
    """The levels of a format, read through the kernel: every code at scale 1."""
    plain = QuantFormat(packed.format.quant_type, 64)
    codes = torch.arange(64).remainder(1 << plain.bits).to(torch.uint8)
    held = packing.packed(codes, plain.bits).view(torch.int8)
    one = torch.ones(1).view(torch.uint8)
    return set(type(packed)(held, one, None, plain, (64,)).dequantize(torch.float32).tolist())


@formats
def test_padding_is_level_zero_with_and_without_feedback(fmt):
    """11 x 40 values leave the last 8 of 7 blocks of 64 empty."""
    stack = stack_of(11, 40)
    chosen = rounding_of(stack, moments_of(stack)).stored(0)
    fed, nearest = (
        packing.unpacked(quantize(matrix_of(11, 40), fmt, way).codes.view(torch.uint8), fmt.bits)
        for way in (chosen, chosen._replace(feedback=None))
    )
    assert 11 * 40 % 64 == 56
    assert torch.equal(fed[-8:], nearest[-8:])
    assert len(set(fed[-8:].tolist())) == 1


@formats
def test_a_diagonal_moment_and_fixed_scales_give_the_nearest_levels(fmt):
    stack = stack_of(24, 96)
    diagonal = torch.rand(96, generator=torch.Generator().manual_seed(3)) + 0.1
    moments = Moments(dict.fromkeys(stack.modules, "x"), {"x": 1000}, lambda _: diagonal.diag())
    chosen = rounding_of(stack, moments).stored(0)
    matrix = matrix_of(24, 96)
    with_feedback = quantize(matrix, fmt, chosen).tensors()
    assert_close(with_feedback, quantize(matrix, fmt, chosen._replace(feedback=None)).tensors())


def test_settings_choose_scales_and_codes():
    stack = stack_of(24, 64)
    moments = moments_of(stack)
    diagonal = moments.of(stack.modules[1]).diagonal()
    weights = diagonal / diagonal.mean() + 0.01
    both = rounding_of(stack, moments).stored(1)
    assert both.search
    assert_close(both.weights, weights)
    assert both.feedback is not None
    scales_only = rounding_of(stack, moments, rounding="nearest")
    assert scales_only.stored(1).feedback is None
    assert_close(scales_only.stored(1).weights, weights)
    codes_only = rounding_of(stack, moments, scales="absmax").stored(1)
    assert (codes_only.search, codes_only.weights) == (False, None)
    assert codes_only.feedback is not None
    plain = rounding_of(stack, moments, scales="absmax", rounding="nearest")
    assert plain.stored(1) == Rounding()
    assert not plain.feeds_back


def test_rounds_of_refinement_search_scales_only_if_no_feedback_follows():
    stack = stack_of(24, 64)
    moments = moments_of(stack)
    assert rounding_of(stack, moments).nearest(0) == Rounding()
    way = rounding_of(stack, moments, rounding="nearest").nearest(0)
    assert way.search
    assert way.weights is not None
    assert way.feedback is None


@pytest.mark.parametrize("known", ["nothing", "diagonal", "few tokens"])
def test_without_a_full_moment_levels_are_nearest(known):
    """Of 64 inputs an eighth is 8 tokens."""
    stack = stack_of(24, 64)
    moments = {
        "nothing": None,
        "diagonal": moments_of(stack, full=False),
        "few tokens": moments_of(stack, tokens=7),
    }[known]
    rounding = rounding_of(stack, moments)
    assert not rounding.feeds_back
    assert rounding.stored(0).feedback is None
    assert (rounding.stored(0).weights is None) == (moments is None)
    if known == "few tokens":
        assert rounding_of(stack, moments_of(stack, tokens=8)).feeds_back


def test_fewer_tokens_are_damped_more(monkeypatch):
    stack = stack_of(24, 64)
    seen = []
    monkeypatch.setattr(
        rounding_module, "feedback_of", lambda moment, damping: seen.append(damping)
    )
    for tokens in (1000, 64, 16):
        rounding_of(stack, moments_of(stack, tokens=tokens)).stored(0)
    assert seen == [0.01, 0.01, 0.04]


def test_damping_rises_until_a_moment_can_be_factorized():
    """Rounding may leave a moment indefinite: here by a lot."""
    stack = stack_of(8, 64)
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    moments = Moments(dict.fromkeys(stack.modules, "x"), {"x": 64}, lambda _: indefinite)
    unit = rounding_of(stack, moments).stored(0).feedback.unit
    assert unit.isfinite().all()
    assert unit[0, 1] == pytest.approx(1.05 / 1.1, rel=1e-5)


def test_few_tokens_are_one_warning():
    stacks = [stack_of(24, 64), stack_of(24, 100)]
    moments = moments_of(stacks[1], tokens=80)
    with pytest.warns(UserWarning, match="saw 80 tokens .* 100 wide.* at 2 linear") as warned:
        warn_of_tokens(moments, stacks, Settings())
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_tokens(moments, stacks[:1], Settings())
        warn_of_tokens(moments, stacks, Settings(rounding="nearest"))  # without error feedback
        warn_of_tokens(moments, stacks, Settings(bits=16))


@pytest.mark.parametrize("kind", QUANT_TYPES)
def test_without_moments_only_the_scales_of_nf4_are_searched(kind):
    stack = stack_of(8, 64)
    kept = {"bits": bits_of(kind), "quant_type": kind}
    free = rounding_of(stack, None, **kept)
    assert free.stored(0) == free.nearest(0) == Rounding(search=kind == "nf4")
    for full in (True, False):
        known = rounding_of(stack, moments_of(stack, full=full), **kept)
        assert known.stored(0).search
    plain = rounding_of(stack, moments_of(stack), **kept, scales="absmax")
    assert not plain.stored(0).search
