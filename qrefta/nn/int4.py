"""INT4, a 4-bit format that bitsandbytes does not have: scales of blocks and codes of values.

A code -8 .. 7 stands for code / 8 times the scale of its block. Scales are signed, so that the
level -8 can carry the entry of largest magnitude. A search over 12 scales near this entry keeps the
one with the smallest squared error: 0.090 relative root error on Gaussian weights at block 64.
Scaling by the largest magnitude gives 0.108; NF4 has 0.092.

Blocks are (blocks, block_size), float32; scales are (blocks,).
"""

import torch
from torch import Tensor

CHUNK = 1 << 17  # values whose temporaries stay in the cache of a CPU core

# Scales that are tried, relative to the largest entry. 1 is one of them: it keeps a single outlier
# exactly.
_CLIPS = [percent / 100 for percent in range(79, 113, 3)]


def best_scales(blocks: Tensor) -> Tensor:
    """Signed scale of every block, (blocks,), that leaves the smallest squared error."""
    if blocks.device.type != "cpu":
        return _searched_scales(blocks)
    rows = max(CHUNK // blocks.shape[1], 1)
    return torch.cat([_searched_scales(part) for part in blocks.split(rows)])


def levels(blocks: Tensor, scales: Tensor) -> Tensor:
    """Nearest level -8 .. 7 of every value, float32. A block of zeros (scale 0) takes level 0."""
    steps = (scales / 8).unsqueeze(1)
    steps = torch.where(steps == 0, torch.inf, steps)
    return torch.div(blocks, steps).round_().clamp_(-8, 7)


def codes(blocks: Tensor, scales: Tensor) -> Tensor:
    """Two codes a byte, (values / 2,), uint8.

    The first value is in the high bits, as bitsandbytes packs its formats.
    """
    nibbles = (levels(blocks, scales) + 8).to(torch.uint8).view(-1, 2)
    return nibbles[:, 0] << 4 | nibbles[:, 1]


def table(device: torch.device) -> Tensor:
    """The 16 levels, padded to the 256 entries that bitsandbytes' blockwise kernel reads."""
    values = torch.arange(-8, 8, dtype=torch.float32, device=device) / 8
    return torch.nn.functional.pad(values, (0, 240))


def _searched_scales(blocks: Tensor) -> Tensor:
    """`best_scales` by trying every clip.

    Blocks are scaled to [-1, 1] once, so that a clip costs two products.
    """
    peak = -blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scaled = blocks / torch.where(peak == 0, torch.inf, peak)
    best = torch.ones_like(peak.squeeze(1))
    best_error = torch.full_like(best, torch.inf)
    error = torch.empty_like(scaled)
    for clip in _CLIPS:
        torch.mul(scaled, 8 / clip, out=error)
        error.round_().clamp_(-8, 7)
        error.mul_(-clip / 8).add_(scaled)
        norm = torch.linalg.vector_norm(error, dim=1)
        best = torch.where(norm < best_error, clip, best)
        best_error = torch.minimum(norm, best_error)
    return best * peak.squeeze(1)
