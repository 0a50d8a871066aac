"""The peers' splits of a weight, compared with their definitions and with bitsandbytes."""

import pytest
import torch
from torch.testing import assert_close

from eval.peers.splits import SCALE_BLOCK, loftq, pissa, qera, small_block, small_block_bits, top
from qrefta.linalg.metric import Metric
from qrefta.nn.quantize import rounded
from qrefta.nn.quantized import QuantFormat

NF4 = QuantFormat("nf4")


def weight(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 96), (96, 40), (64, 64)])
def test_top_is_the_truncated_svd(shape):
    matrix = weight(*shape)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    up, down = top(matrix, 7)
    assert_close((up @ down).double(), left[:, :7] * values[:7] @ right[:7], atol=1e-5, rtol=1e-5)
    assert_close(up.norm(dim=0), down.norm(dim=1))
    assert_close(up.norm(dim=0).double() ** 2, values[:7], atol=1e-4, rtol=1e-4)
    assert [part.shape for part in top(matrix, 0)] == [(shape[0], 0), (0, shape[1])]


def test_pissa_splits_without_loss():
    matrix = weight(48, 64)
    up, down, rest = pissa(matrix, 5)
    assert_close(up @ down + rest, matrix)
    assert torch.linalg.matrix_norm(rest, 2) < torch.linalg.matrix_norm(matrix, 2)


def test_loftq_is_its_published_iteration():
    """The iteration by SVD from AB = 0; the returned pair is fitted to the returned Q."""
    matrix = weight(48, 64)
    pair = torch.zeros(48, 64)
    for _ in range(3):
        quantized = rounded(matrix - pair, NF4)
        left, values, right = torch.linalg.svd(matrix - quantized)
        pair = left[:, :4] * values[:4] @ right[:4]
    up, down, rest = loftq(matrix, 4, rounds=3)
    assert_close(up @ down, pair, atol=1e-5, rtol=1e-5)
    assert_close(rounded(rest, NF4), quantized, atol=1e-5, rtol=1e-5)
    assert (matrix - rounded(rest, NF4) - up @ down).norm() < (matrix - rounded(matrix, NF4)).norm()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PEFT's LoftQ needs a CUDA device")
@pytest.mark.parametrize("rounds", [1, 5])
def test_loftq_equals_pefts(rounds):
    """The same quantized part and the same product of the pair."""
    from peft.utils.loftq_utils import loftq_init

    matrix = weight(128, 192)
    quantized, down, up = loftq_init(matrix, num_bits=4, reduced_rank=6, num_iter=rounds)
    ours = loftq(matrix, 6, rounds)
    assert_close(ours.up @ ours.down, (up @ down).cpu(), rtol=1e-3, atol=1e-3)
    assert (rounded(ours.rest, NF4) - quantized.cpu()).norm() <= 1e-3 * quantized.norm()


def test_loftq_without_rounds_is_refused():
    with pytest.raises(ValueError, match="rounds is 0; LoftQ needs at least 1"):
        loftq(weight(8, 8), 2, rounds=0)


def test_qera_corrects_best_under_the_metric():
    """Without a metric: the truncated SVD of E; with one: of E S^(1/2), mapped back."""
    error = weight(30, 20)
    up, down = top(error, 3)
    found_up, found_down = qera(error, 3, Metric(torch.ones(20), torch.ones(20)))
    assert_close(found_up @ found_down, up @ down)
    root = torch.rand(20, generator=torch.Generator().manual_seed(1)) + 0.5
    up, down = top(error * root, 3)
    found_up, found_down = qera(error, 3, Metric(root, 1 / root))
    assert_close(found_up @ found_down * root, up @ down, atol=1e-5, rtol=1e-5)


def test_a_small_block_of_64_is_plain_nf4():
    matrix = weight(32, 64)
    assert_close(small_block(matrix, 64, 32), rounded(matrix, NF4))
    assert small_block_bits(64, 32) == 4.5


def test_smaller_blocks_err_less_and_8_bit_scales_little_more():
    matrix = weight(64, 100)  # no whole number of blocks
    errors = {
        (block, bits): (matrix - small_block(matrix, block, bits)).norm()
        for block in (64, 23, 7)
        for bits in (32, 8)
    }
    assert errors[64, 32] > errors[23, 32] > errors[7, 32]
    for block in (64, 23, 7):
        assert errors[block, 32] <= errors[block, 8] < 1.05 * errors[block, 32]
    assert small_block_bits(8, 8) == 4 + 1 + 32 / SCALE_BLOCK / 8
