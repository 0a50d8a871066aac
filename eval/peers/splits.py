"""Splits of a weight by other papers, and smaller quantization blocks for the same bytes."""

from typing import NamedTuple

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from qrefta.linalg.metric import Metric
from qrefta.nn.quantize import rounded
from qrefta.nn.quantized import QuantFormat

NF4 = QuantFormat("nf4")
SCALE_BLOCK = 256  # scales that share a second-level scale, as in QLoRA


class LowRank(NamedTuple):
    """W ~ quantized(rest) + up @ down, for one linear layer.

    Attributes:
        up, down: (out, r), (r, in).
        rest: the part to quantize, (out, in).
    """

    up: Tensor
    down: Tensor
    rest: Tensor


def pissa(weight: Tensor, rank: int) -> LowRank:
    """PiSSA: the `rank` largest singular triples and the rest (Meng et al. 2024, section 3)."""
    up, down = top(weight, rank)
    return LowRank(up, down, weight - up @ down)


def loftq(weight: Tensor, rank: int, rounds: int = 5, fmt: QuantFormat = NF4) -> LowRank:
    """LoftQ: alternate Q = quantize(W - AB) and AB = top-r of W - dequant(Q), from AB = 0.

    Li et al. 2023, algorithm 1.

    Raises:
        ValueError: if `rounds` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; LoftQ needs at least 1")
    rest = weight
    for _ in range(rounds):
        quantized = rest
        up, down = top(weight - rounded(quantized, fmt), rank)
        rest = weight - up @ down
    return LowRank(up, down, quantized)


def top(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` approximation as up (out, rank) and down (rank, in).

    Both carry the roots of the singular values. The eigenvectors of the smaller Gram matrix in
    float64 are a few times as fast as an SVD, and the leading triples are the same.
    """
    if matrix.shape[0] < matrix.shape[1]:
        up, down = top(matrix.mT, rank)
        return down.mT, up.mT
    right = (
        torch.linalg.eigh(matrix.double().mT @ matrix.double())
        .eigenvectors.flip(1)[:, :rank]
        .to(matrix)
    )
    scaled = matrix @ right
    roots = scaled.norm(dim=0).sqrt()
    return scaled / roots.clamp(min=1e-30), (right * roots).mT


def qera(error: Tensor, rank: int, metric: Metric) -> tuple[Tensor, Tensor]:
    """The best low-rank correction of a quantization error (QERA-exact, Zhang et al. 2024).

    Args:
        error: W - dequant(quantize(W)), (out, in).
        rank: rank of the correction.
        metric: metric of the layer's inputs; the correction is optimal for the outputs.

    Returns:
        up (out, rank) and down (rank, in); their product corrects the weight.
    """
    up, down = top(metric.apply(error.mT).mT, rank)
    return up, metric.apply_inverse(down.mT).mT


def small_block(weight: Tensor, block: int, scale_bits: int) -> Tensor:
    """A matrix rounded to NF4 with any block size and 32-bit or, as in QLoRA, 8-bit scales."""
    flat = torch.nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % block)).view(-1, block)
    levels = bnb.get_4bit_type("nf4", device="cpu").float().sort().values
    scales = flat.abs().amax(1)
    nearest = torch.bucketize(
        flat / scales.clamp(min=1e-38)[:, None], (levels[1:] + levels[:-1]) / 2
    )
    if scale_bits == 8:
        codes, state = bnb.quantize_blockwise(scales - scales.mean(), blocksize=SCALE_BLOCK)
        scales = bnb.dequantize_blockwise(codes, state) + scales.mean()
    return (levels[nearest] * scales[:, None]).view(-1)[: weight.numel()].view(weight.shape)


def small_block_bits(block: int, scale_bits: int) -> float:
    """Bits per weight of `small_block`."""
    return 4 + (scale_bits if scale_bits == 32 else scale_bits + 32 / SCALE_BLOCK) / block
