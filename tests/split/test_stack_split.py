import pytest
import torch
from torch.testing import assert_close

from qrefta.config.settings import Settings
from qrefta.config.stack import LayerStack
from qrefta.model.weights import Weights
from qrefta.split.moments import Moments
from qrefta.split.stack_split import StackSplit

STACK = LayerStack("layers.*.linear", tuple(f"layers.{i}.linear" for i in range(3)), 24, 64)


@pytest.fixture
def weights():
    return Weights.of(torch.randn(STACK.shape, generator=torch.Generator().manual_seed(0)))


def split(weights, rank, moments=None, **options):
    """The row of a stack, and the layers that its residuals and factors give back."""
    config = Settings(method="refta", rank=rank, **options)
    done = StackSplit(STACK, weights, config, rank, moments)
    restored = []
    for index, residual in enumerate(done.residuals()):
        dense = residual.dequantize(torch.float32)
        restored.append(dense + (done.factors.delta(index) if rank else 0))
    return done.report(), torch.stack(restored)


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize(
    "options", [{}, {"quant_type": "int4", "refine": 0}, {"double_quant": True}], ids=str
)
def test_the_row_states_the_error_of_the_stored_weights(weights, rank, options):
    dense = weights.rows(0, 24)
    row, restored = split(weights, rank, **options)
    whole, whole_restored = split(weights, 0, scales="absmax", **options)
    assert row.residual_error == pytest.approx(
        (dense - restored).double().square().sum().item(), rel=1e-5
    )
    assert row.baseline_error == pytest.approx(
        (dense - whole_restored).double().square().sum().item(), rel=1e-5
    )
    assert row.ratio == pytest.approx(row.residual_error / whole.residual_error)
    plain = rank == 0 and options.get("quant_type") == "int4"  # without data its scales are plain
    assert row.ratio == 1 if plain else row.ratio < 1
    assert (row.rank, row.stack.shape, sum(row.slice_ranks)) == (rank, (3, 24, 64), rank)
    assert row.output_error is row.output_ratio is None


def test_16_bits_have_no_error(weights):
    row, restored = split(weights, 6, bits=16)
    assert (row.residual_error, row.baseline_error, row.ratio, row.quant_type) == (0, 0, 1, None)
    assert_close(restored, weights.rows(0, 24), atol=1e-6, rtol=0)


def test_the_bytes_are_those_of_the_tensors(weights):
    row, _ = split(weights, 6)
    packed = 3 * (24 * 64 // 2 + 4 * 24 * 64 // 64)  # codes, and a scale for each block of 64
    factors = 2 * 6 * (24 + 64) + 4 * 3 * 6  # up and down in bf16, the cores in float32
    assert row.bytes == packed + factors
    assert row.bits_per_weight == pytest.approx(8 * row.bytes / (3 * 24 * 64))


def test_with_moments_the_row_states_the_error_of_the_outputs(weights):
    inputs = torch.randn(500, 64, generator=torch.Generator().manual_seed(1)) * torch.linspace(
        0.1, 3, 64
    )
    second = inputs.T @ inputs / len(inputs)
    moments = Moments(
        dict.fromkeys(STACK.modules, "shared"), {"shared": len(inputs)}, lambda _: second
    )
    dense = weights.rows(0, 24)
    row, restored = split(weights, 6, moments, rounding="nearest")
    plain, plain_restored = split(weights, 6)
    outputs = ((dense - restored) @ inputs.T).double().square().sum().item() / len(inputs)
    plain_outputs = ((dense - plain_restored) @ inputs.T).double().square().sum().item() / len(
        inputs
    )
    assert row.output_error == pytest.approx(outputs, rel=1e-4)
    assert row.output_error < plain_outputs
    assert row.residual_error > plain.residual_error
    assert row.output_ratio < 1
