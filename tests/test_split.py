import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from qrefta.config import QReftaConfig
from qrefta.quantize import QUANT_TYPES, dequantize, quantize
from qrefta.split import _refit, _requantize, quantize_stack, split_stack
from qrefta.tensor import TRANSFORMS, transform_matrix

all_transforms = pytest.mark.parametrize("transform", TRANSFORMS)
grid = [
    pytest.mark.parametrize("quant_type", QUANT_TYPES),
    pytest.mark.parametrize("double_quant", [False, True]),
    all_transforms,
]


def on_grid(test):
    for mark in grid:
        test = mark(test)
    return test


def random_stack(layers=4, out=48, inner=64, seed=0):
    """Layers with something in common and a falling spectrum, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    common, own = torch.randn(out, inner, generator=generator), torch.randn(layers, out, inner, generator=generator)
    return (common + own) * torch.logspace(0, -1, inner)


def dense_residuals(split, stack, config):
    if config.format is None:
        return torch.stack(split.residuals)
    shape = tuple(stack.shape[1:])
    return torch.stack([dequantize(packed, config.format, shape, torch.float32) for packed in split.residuals])


def deltas(split, stack):
    return torch.stack([split.factors.delta(layer) for layer in range(len(stack))])


def error(split, stack, config):
    """sum_l ||W_l - Delta_l - dequant(Q_l)||_F^2 from what the split holds."""
    return (
        (stack.double() - deltas(split, stack).double() - dense_residuals(split, stack, config).double()).square().sum()
    )


@all_transforms
@pytest.mark.parametrize("factor_dtype", ["bfloat16", "float32"])
def test_16_bits_sum_back_to_the_stack(transform, factor_dtype):
    """The rounding of the factors is in the residual: the exact start."""
    stack = random_stack()
    config = QReftaConfig(rank=9, bits=16, transform=transform, factor_dtype=factor_dtype)
    split = split_stack(stack, config)
    assert_close(deltas(split, stack) + dense_residuals(split, stack, config), stack)
    assert split.error == 0
    assert split.factors.delta(0).any()


@on_grid
@pytest.mark.parametrize("refine", [0, 2])
def test_error_is_that_of_the_factors_and_residuals_returned(quant_type, double_quant, transform, refine):
    stack = random_stack()
    config = QReftaConfig(rank=9, quant_type=quant_type, double_quant=double_quant, transform=transform, refine=refine)
    split = split_stack(stack, config)
    assert split.error == pytest.approx(error(split, stack, config).item(), rel=1e-5)


def numpy_delta(stack, rank):
    """The tensor rank-R part of a stack under the orthonormal DCT, by a loop of numpy SVDs, rounded to bf16."""
    W, layers = stack.double().numpy(), len(stack)
    U = np.array([[np.cos(np.pi * k * (2 * i + 1) / (2 * layers)) for k in range(layers)] for i in range(layers)])
    U /= np.linalg.norm(U, axis=0)
    parts = []
    for k in range(layers):
        left, values, right = np.linalg.svd(sum(U[i, k] * W[i] for i in range(layers)), full_matrices=False)
        parts += [(s, k, u * s**0.5, v * s**0.5) for s, u, v in zip(values, left.T, right, strict=True)]
    parts = sorted(parts, key=lambda part: -part[0])[:rank]
    delta = np.zeros_like(W)
    for _, k, a, b in parts:
        a, b = (torch.from_numpy(factor).bfloat16().double().numpy() for factor in (a, b))
        delta += U[:, k, None, None] * np.outer(a, b)
    return torch.from_numpy(delta).float()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_one_shot_error_equals_an_independent_loop(quant_type):
    """numpy's SVD, bitsandbytes' quantizer. An entry near the middle of two bf16 values may round the other way."""
    stack = random_stack()
    expected = 0.0
    for rest in stack - numpy_delta(stack, rank=9):
        codes, state = bnb.quantize_4bit(rest, blocksize=64, quant_type=quant_type)
        expected += (rest - bnb.dequantize_4bit(codes, state)).square().sum().item()
    split = split_stack(stack, QReftaConfig(rank=9, quant_type=quant_type, transform="dct"))
    assert split.error == pytest.approx(expected, rel=2e-3)


@on_grid
def test_refined_is_never_worse_than_one_shot_and_one_shot_than_no_factors(quant_type, double_quant, transform):
    stack = random_stack()
    settings = {"rank": 9, "quant_type": quant_type, "double_quant": double_quant, "transform": transform}
    errors = [split_stack(stack, QReftaConfig(**settings, refine=rounds)).error for rounds in (0, 1, 3)]
    assert errors[2] <= errors[1] < errors[0] < quantize_stack(stack, QReftaConfig(**settings)).error


@pytest.mark.parametrize("rank", [9, 192])
def test_refining_by_hand_gives_the_same_error(rank):
    """One round: refit, requantize, refit; the best of the four pairs.

    At full rank a refit is worse (nothing but the factors' rounding is left, and it quantizes that well), at a low
    rank it is better: the best pair is another one.
    """
    stack = random_stack()
    config = QReftaConfig(rank=rank, refine=1)
    U = transform_matrix(stack, "lsm3")
    pairs = [split_stack(stack, QReftaConfig(rank=rank))]
    pairs.append(_refit(stack, pairs[-1].residuals, U, config))
    pairs.append(_requantize(stack, pairs[-1].factors, config))
    pairs.append(_refit(stack, pairs[-1].residuals, U, config))
    errors = [pair.error for pair in pairs]
    assert split_stack(stack, config).error == min(errors)
    assert (min(errors) == errors[-1]) == (rank == 9)


@on_grid
def test_a_refit_under_the_same_transform_does_not_raise_the_error(quant_type, double_quant, transform):
    """The refit is the best rank-R answer for its target; float32 factors, as bf16's rounding may add to the error."""
    stack = random_stack()
    config = QReftaConfig(
        rank=9, quant_type=quant_type, double_quant=double_quant, transform=transform, factor_dtype="float32"
    )
    U = transform_matrix(stack, transform)
    split = split_stack(stack, config)
    for _ in range(3):
        refitted = _refit(stack, split.residuals, U, config)
        assert refitted.error <= split.error * (1 + 1e-6)
        core = torch.stack([refitted.factors.core(layer) for layer in range(len(stack))])
        assert (core.unsqueeze(1) == U.float().unsqueeze(2)).all(0).any(0).all()  # columns of U, not of a new one
        split = _requantize(stack, refitted.factors, config)


@all_transforms
def test_more_rank_leaves_less_error(transform):
    stack = random_stack()
    errors = [split_stack(stack, QReftaConfig(rank=rank, transform=transform)).error for rank in (1, 10, 40, 120)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_quantize_stack_quantizes_whole_weights():
    stack = random_stack()
    config = QReftaConfig()
    split = quantize_stack(stack, config)
    assert split.factors is None
    for weight, packed in zip(stack, split.residuals, strict=True):
        assert torch.equal(packed.weight, quantize(weight, config.format).weight)
    assert split.error == pytest.approx((stack - dense_residuals(split, stack, config)).square().sum().item(), rel=1e-5)


def test_16_bit_residuals_do_not_share_one_storage():
    """safetensors refuses, or saves K times, views of one tensor."""
    stack = random_stack()
    for split in (quantize_stack(stack, QReftaConfig(bits=16)), split_stack(stack, QReftaConfig(bits=16, rank=2))):
        assert len({residual.untyped_storage().data_ptr() for residual in split.residuals}) == len(stack)
        assert split.error == 0


def test_a_zero_stack_splits_without_nan():
    stack = torch.zeros(3, 8, 64)
    split = split_stack(stack, QReftaConfig(rank=2, refine=1))
    assert split.error == 0
    assert not deltas(split, stack).any()


def test_the_stack_is_left_as_it_was():
    stack = random_stack()
    before = stack.clone()
    for config in (QReftaConfig(rank=4, refine=1), QReftaConfig(rank=4, bits=16)):
        split_stack(stack, config)
        quantize_stack(stack, config)
    assert torch.equal(stack, before)
