"""GPTQ as a peer: its definition by least squares, and its use."""

import pytest
import torch
from torch.testing import assert_close

from eval.peers.gptq import DAMPING, gptq
from eval.peers.splits import NF4
from qrefta.linalg.metric import output_error
from qrefta.nn.grid import grid_of, inverse, nearest
from qrefta.nn.quantize import rounded
from qrefta.nn.quantized import QuantFormat


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment_of(width, seed=1):
    """Of inputs whose columns depend on each other."""
    inputs = weight(4 * width, width, seed=seed) @ weight(width, width, seed=seed + 1)
    return inputs.T @ inputs / len(inputs)


def by_least_squares(matrix, moment, block):
    """After each column the later ones are the best for the outputs, given those rounded so far."""
    width = matrix.shape[1]
    damped = moment.double()
    damped = damped + DAMPING * damped.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    grid = grid_of("nf4", matrix.device)
    found = torch.zeros_like(matrix).double()
    for k in range(width):
        done = (matrix.double() - found)[:, :k]
        # argmin over the later columns' errors F of tr([done F] S [done F]^T)
        later = -done @ damped[:k, k:] @ torch.linalg.inv(damped[k:, k:])
        rest = (matrix[:, k:].double() - later).float()
        if k % block == 0:
            scales = rest[:, :block].abs().amax(1)
        levels = grid.levels[nearest(rest[:, 0], inverse(scales), grid)]
        found[:, k] = levels * scales
    return found.float()


def test_gptq_is_repeated_least_squares():
    matrix = weight(12, 32)
    moment = moment_of(32)
    assert_close(
        gptq(matrix, moment, block=16), by_least_squares(matrix, moment, 16), atol=1e-4, rtol=1e-4
    )


def test_in_order_the_columns_with_larger_inputs_come_first():
    """As the columns permuted, with the scales of the blocks as they were."""
    matrix = weight(12, 64)
    growth = torch.linspace(1, 4, 64)
    moment = moment_of(64) * growth.outer(growth)
    first = moment.diagonal().argmax()
    grid = grid_of("nf4", matrix.device)
    scales = matrix.view(12, 2, 32).abs().amax(2).repeat_interleave(32, dim=1)
    found = gptq(matrix, moment, block=32, ordered=True)
    levels = (found / scales).unsqueeze(-1)
    assert_close((levels - grid.levels).abs().amin(-1), torch.zeros(12, 64), atol=1e-5, rtol=0)
    assert_close(found[:, first], rounded(matrix, QuantFormat("nf4", 32))[:, first])
    natural = output_error(matrix - gptq(matrix, moment, block=32), moment)
    assert output_error(matrix - found, moment) < natural


def test_gptq_without_correlations_is_plain_rounding():
    matrix = weight(8, 128)
    assert_close(gptq(matrix, torch.eye(128)), rounded(matrix, NF4))


def test_gptq_lowers_the_output_error_and_raises_the_weight_error():
    matrix = weight(64, 128)
    moment = moment_of(128)
    plain = matrix - rounded(matrix, NF4)
    ours = matrix - gptq(matrix, moment)
    assert output_error(ours, moment) < 0.7 * output_error(plain, moment)
    assert ours.norm() > plain.norm()


def test_rows_that_are_no_whole_blocks_are_refused():
    with pytest.raises(ValueError, match=r"rows have 96 weights; .* whole blocks of 64"):
        gptq(weight(4, 96), torch.eye(96))
