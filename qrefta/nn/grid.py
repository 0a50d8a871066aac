"""The levels of a format: the nearest level of a value, and the scale of a block.

A block of values is stored as one scale and a level in [-1, 1] for every value. NF4 and FP4 have
the 16 levels of bitsandbytes. The other formats are ours. INT4 has -8/8 .. 7/8, INT3 -4/4 .. 3/4
and INT2 -2/2 .. 1/2. NF3 and NF2 have the levels of least squared error for Gaussian weights in
blocks of 64 with searched scales; one level of NF3 is zero.

Scales are signed. The levels of all formats but FP4 are not symmetric, so a block is rounded better
with one sign than with the other; the kernels of bitsandbytes multiply by the scale and take any
sign. Two ways to choose a scale:
- `absmax_scales`: the largest magnitude, as bitsandbytes does. The entry of largest magnitude is
  kept exactly. Squared error of Gaussian weights in blocks of 64, relative to their squared norm:
  NF4 0.0084, INT4 0.0090, NF3 0.032, INT3 0.037.
- `searched_scales`: the best of 12, six for each sign, which clip the largest entry by up to 30 %,
  with 2 bits by up to 50 %; without weights of the columns the best of six, which clip it by up to
  6 %.

Blocks are (blocks, block_size), float32; scales are (blocks,).
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from qrefta._compat.bitsandbytes import levels_4bit
from qrefta.choices import BITSANDBYTES_TYPES, QuantType, bits_of

CHUNK = 1 << 17  # values whose temporaries stay in the cache of a CPU core

# Scales that are tried, relative to the scale that puts the largest entry on the outermost level.
_CLIPS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.70)
_CLIPS_OF_2_BITS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
# Without weights of the columns clips are small and the largest entry counts more, because it often
# meets the largest inputs. Counted once, it raises the output error of SmolLM2's down_proj by 8 %,
# of one layer by a third; counted four times, no layer's output error rises.
_CAREFUL_CLIPS = (1.0, 0.97, 0.94)
_WEIGHT_OF_PEAK = 4.0
_CELLS = 1024  # of the look-up table in `nearest`; narrower than the least distance between levels
_FEW = 4096  # values that are searched for; look-ups take more operations, and less time for many
_FINE_CELLS = 8192  # of the look-up table in `searched_scales`, which may miss a level near a bound
_LEAST_SCALE = 1e-38  # the reciprocal of a smaller number is infinite in float32


# Found by Lloyd's iteration, levels and scales in turn. A zero among the four levels of NF2 would
# raise the squared error by 9 %; among the eight of NF3 by 2 %.
_FITTED_LEVELS: dict[QuantType, tuple[float, ...]] = {
    "nf3": (-0.7746, -0.4520, -0.2127, 0.0, 0.1788, 0.3759, 0.6200, 1.0),
    "nf2": (-0.7578, -0.1651, 0.3495, 1.0),
}


class Grid(NamedTuple):
    """The levels of a format, with tables to find them.

    Attributes:
        levels: (2^bits,), float32, ascending.
        codes: (2^bits,), uint8; the stored code of each level.
        middles: (2^bits - 1,); the midpoints between levels.
        bounds: (cells + 1,); the first midpoint between two levels after the start of a cell.
        first: (cells + 1,), int64; the index of the level at the start of a cell.
        fine: (fine cells + 1,); the level at the middle of a fine cell.
    """

    levels: Tensor
    codes: Tensor
    middles: Tensor
    bounds: Tensor
    first: Tensor
    fine: Tensor


@functools.cache
def grid_of(quant_type: QuantType, device: torch.device) -> Grid:
    """The grid of a format on a device."""
    table = level_table(quant_type)
    levels, codes = table.sort(stable=True)
    middles = (levels[1:] + levels[:-1]) / 2
    edges = torch.linspace(-1, 1, _CELLS + 1, dtype=torch.float32)
    first = torch.bucketize(edges, middles)
    bounds = torch.cat([middles, torch.full((1,), torch.inf, dtype=torch.float32)])[first]
    centres = (torch.arange(_FINE_CELLS + 1, dtype=torch.float32) + 0.5) * (2 / _FINE_CELLS) - 1
    fine = levels[torch.bucketize(centres, middles)]
    tensors = (levels, codes.to(torch.uint8), middles, bounds, first, fine)
    return Grid(*(tensor.to(device) for tensor in tensors))


def level_table(quant_type: QuantType) -> Tensor:
    """The levels in the order of their codes, (2^bits,), float32, on the CPU."""
    if quant_type in BITSANDBYTES_TYPES:
        return levels_4bit(quant_type).float()
    if quant_type in _FITTED_LEVELS:
        return torch.tensor(_FITTED_LEVELS[quant_type], dtype=torch.float32)
    half = 1 << bits_of(quant_type) - 1
    return torch.arange(-half, half, dtype=torch.float32) / half


def nearest(values: Tensor, inverse_scales: Tensor, grid: Grid) -> Tensor:
    """Index of the nearest level of every value, int64, in the shape of the values.

    [-1, 1] is cut into cells that hold at most one midpoint between two levels. The level of a
    value is the level at the start of its cell, or the next one if the value lies beyond the
    midpoint. That takes two look-ups instead of a search over all levels. Few values are searched
    for: it is one operation.

    Args:
        values: any shape, float32.
        inverse_scales: their `inverse`, in a shape that broadcasts.
        grid: the levels.
    """
    scaled = values * inverse_scales
    if scaled.numel() <= _FEW:
        return torch.bucketize(scaled, grid.middles)
    scaled.clamp_(-1, 1)
    cells = torch.add(scaled.new_tensor(_CELLS / 2), scaled, alpha=_CELLS / 2).long()
    return torch.take(grid.first, cells).add_(scaled > torch.take(grid.bounds, cells))


def inverse(scales: Tensor) -> Tensor:
    """1 / scales; large and finite for a scale of zero, whose block holds zeros."""
    return 1.0 / torch.where(scales.abs() < _LEAST_SCALE, _LEAST_SCALE, scales)


def absmax_scales(blocks: Tensor, grid: Grid) -> Tensor:
    """The scale of every block that puts the entry of largest magnitude on an outermost level.

    Where one end of the levels is farther from zero than the other, it takes that entry, and the
    scale may be negative; else the scale is positive.
    """
    low, high = grid.levels[0], grid.levels[-1]
    if low == -high:
        return blocks.abs().amax(1)
    peaks = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).squeeze(1)
    return peaks / (low if low.abs() > high else high)


def searched_scales(blocks: Tensor, grid: Grid, weights: Tensor | None = None) -> Tensor:
    """The scale of every block with the smallest weighted squared error of all candidates.

    Args:
        blocks: (blocks, block_size).
        grid: the levels.
        weights: of every value, (blocks, block_size), positive; None: equal, but for the largest
            entry, and clips are small.
    """
    places = blocks.abs().argmax(1, keepdim=True)
    peaks = blocks.gather(1, places).squeeze(1)
    clips = _CLIPS_OF_2_BITS if len(grid.levels) == 4 else _CLIPS
    if weights is None:
        clips = _CAREFUL_CLIPS
        weights = torch.ones_like(blocks).scatter_(1, places, _WEIGHT_OF_PEAK)
    scaled = blocks * inverse(peaks).unsqueeze(1)
    best = torch.ones_like(peaks)
    least = torch.full_like(peaks, torch.inf)
    for outermost in (grid.levels[-1].item(), grid.levels[0].item()):
        for clip in clips:
            scale = clip / outermost
            error = _fine_levels(scaled, 1 / scale, grid).mul_(scale).sub_(scaled).square_()
            sums = error.mul_(weights).sum(1)
            best = torch.where(sums < least, scale, best)
            least = torch.minimum(sums, least)
    return best * peaks


def _fine_levels(scaled: Tensor, factor: float, grid: Grid) -> Tensor:
    """The level of scaled * factor, which may miss the nearest within 1/8192 of a midpoint."""
    cells = torch.add(scaled.new_tensor(_FINE_CELLS / 2), scaled, alpha=factor * _FINE_CELLS / 2)
    cells = cells.clamp_(0, _FINE_CELLS).int()
    return grid.fine.index_select(0, cells.view(-1)).view(scaled.shape)
