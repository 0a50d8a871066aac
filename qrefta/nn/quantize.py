"""Rounding of a matrix to few bits: its scales, then its codes.

Plain rounding is bitsandbytes': the scale of a block is its largest magnitude, and every value
takes its nearest level. Scales can be searched (see `qrefta.nn.grid`), and codes chosen column by
column with error feedback (see `qrefta.linalg.feedback`).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from qrefta.linalg.feedback import Feedback, round_columns
from qrefta.nn.grid import (
    CHUNK,
    Grid,
    absmax_scales,
    grid_of,
    inverse,
    nearest,
    searched_scales,
)
from qrefta.nn.packing import packed
from qrefta.nn.quantized import QuantFormat, QuantizedWeight
from qrefta.nn.scales import load_scales, store_scales

_FEEDBACK_VALUES = 1 << 25  # of a matrix, worked on at once with error feedback on a CPU
_FEEDBACK_VALUES_OF_ACCELERATOR = 1 << 26  # many rows, since every column takes several launches


class Rounding(NamedTuple):
    """How the values of a matrix are rounded to a format; the default is bitsandbytes' way.

    Attributes:
        search: choose the scale of a block by search, and not by its largest magnitude.
        weights: importance of every column in that search, (in,), positive; None: all equal.
        feedback: for codes with error feedback; None: every value takes its nearest level.
    """

    search: bool = False
    weights: Tensor | None = None
    feedback: Feedback | None = None


PLAIN = Rounding()


def quantize(matrix: Tensor, fmt: QuantFormat, rounding: Rounding = PLAIN) -> QuantizedWeight:
    """A matrix in few bits.

    Args:
        matrix: any shape, finite; (out, in) if the rounding has weights or feedback. Computed in
            float32.
        fmt: the format.
        rounding: the choice of scales and codes.
    """
    blocks = _blocks(matrix, fmt.block_size)
    grid = grid_of(fmt.quant_type, blocks.device)
    chosen = _choose_scales(blocks, grid, rounding)
    scales, scale_state = store_scales(chosen, fmt.double_quant)
    stored = load_scales(scales, scale_state)[: len(blocks)]
    whole = torch.empty(blocks.shape, dtype=torch.uint8, device=blocks.device)
    if rounding.feedback is None:
        inverse_scales = inverse(_code_scales(chosen, stored, rounding))
        for part, inverse_scale, out in _chunks(blocks, inverse_scales, whole):
            out.copy_(grid.codes[nearest(part, inverse_scale.unsqueeze(1), grid)])
    else:
        zero = nearest(blocks.new_zeros(()), blocks.new_ones(()), grid)
        whole.fill_(grid.codes[zero])  # the padding
        values = whole.view(-1)[: matrix.numel()].view(matrix.shape)
        _feed_back(matrix.detach().float(), stored, fmt.block_size, grid, rounding.feedback, values)
    codes = packed(whole.view(-1), fmt.bits).view(torch.int8)
    return QuantizedWeight(codes, scales, scale_state, fmt, tuple(matrix.shape))


def rounded(matrix: Tensor, fmt: QuantFormat, rounding: Rounding = PLAIN) -> Tensor:
    """The bits of quantize(matrix, fmt, rounding).dequantize(torch.float32), without feedback.

    No codes are packed. That is faster, and some rows of a matrix give the same values as the whole
    matrix does, if they are whole blocks and scales have 32 bits.
    """
    assert rounding.feedback is None, "error feedback needs whole codes; call quantize"
    blocks = _blocks(matrix, fmt.block_size)
    grid = grid_of(fmt.quant_type, blocks.device)
    chosen = _choose_scales(blocks, grid, rounding)
    stored = load_scales(*store_scales(chosen, fmt.double_quant))[: len(blocks)]
    values = torch.empty_like(blocks)
    inverse_scales = inverse(_code_scales(chosen, stored, rounding))
    for part, scale, inverse_scale, out in _chunks(blocks, stored, inverse_scales, values):
        levels = torch.take(grid.levels, nearest(part, inverse_scale.unsqueeze(1), grid))
        torch.mul(levels, scale.unsqueeze(1), out=out)
    return values.view(-1)[: matrix.numel()].view(matrix.shape)


def _choose_scales(blocks: Tensor, grid: Grid, rounding: Rounding) -> Tensor:
    """The scale of every block, (blocks,), float32, before it is stored."""
    if not rounding.search:
        return absmax_scales(blocks, grid)
    scales = blocks.new_empty(len(blocks))
    if rounding.weights is None:
        for part, out in _chunks(blocks, scales):
            out.copy_(searched_scales(part, grid))
        return scales
    # Columns repeat with every row, and blocks may span rows: chunks of rows that are whole blocks.
    block_size = blocks.shape[1]
    width = len(rounding.weights)
    period = block_size // math.gcd(width, block_size)
    rows = max(CHUNK // (width * period), 1) * period
    weights = rounding.weights.to(blocks).repeat(rows).view(-1, block_size)
    count = len(weights)
    for part, out in zip(blocks.split(count), scales.split(count), strict=True):
        out.copy_(searched_scales(part, grid, weights[: len(part)]))
    return scales


def _code_scales(chosen: Tensor, stored: Tensor, rounding: Rounding) -> Tensor:
    """The scales that nearest levels are chosen for: as stored, which may be in 8 bits.

    bitsandbytes chooses them before it stores the scales, so plain rounding does too.
    """
    return stored if rounding.search else chosen


def _feed_back(
    matrix: Tensor, scales: Tensor, block_size: int, grid: Grid, feedback: Feedback, codes: Tensor
) -> None:
    """Write codes that are chosen with error feedback, for given scales.

    Rows are independent; a fixed number of values is worked on at once, so the result does not
    depend on the memory at hand.

    Args:
        matrix: (out, in), float32.
        scales: of every block of the flat matrix, as stored.
        block_size: weights that share a scale.
        grid: the levels.
        feedback: see `Rounding`.
        codes: (out, in), uint8, written to.
    """
    width = matrix.shape[1]
    on_cpu = matrix.device.type == "cpu"
    rows = max((_FEEDBACK_VALUES if on_cpu else _FEEDBACK_VALUES_OF_ACCELERATOR) // width, 1)
    for start in range(0, len(matrix), rows):
        part = matrix[start : start + rows]
        chosen = torch.empty(width, len(part), dtype=torch.uint8, device=matrix.device)
        known, shared = _scales_by_column(scales, block_size, start, part)
        inverse_scales = inverse(known)

        def round_column(
            k: int,
            target: Tensor,
            known: Tensor = known,
            inverse_scales: Tensor = inverse_scales,
            shared: int = shared,
            out: Tensor = chosen,
        ) -> Tensor:
            index = nearest(target, inverse_scales[k // shared], grid)
            out[k] = index
            return torch.take(grid.levels, index).mul_(known[k // shared])

        round_columns(part, feedback, round_column)
        codes[start : start + rows] = grid.codes[chosen.int()].T


def _scales_by_column(
    scales: Tensor, block_size: int, start: int, part: Tensor
) -> tuple[Tensor, int]:
    """Scales of some rows of a matrix, and the number of columns that share them.

    Args:
        scales: of every block of the flat matrix.
        block_size: weights that share a scale.
        start: first row of `part` in the matrix.
        part: the rows, (rows, in).

    Returns:
        (in / columns, rows), a row for every so many columns; and columns.
    """
    rows, width = part.shape
    if width % block_size == 0:
        blocks = width // block_size
        own = scales[start * blocks : (start + rows) * blocks]
        return own.view(rows, blocks).T.contiguous(), block_size
    starts = torch.arange(start, start + rows, device=part.device) * width
    places = torch.arange(width, device=part.device).unsqueeze(1) + starts
    return scales[places // block_size], 1


def _chunks(blocks: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks and other tensors with one row a block, so few at a time that they stay in a cache."""
    rows = max(CHUNK // blocks.shape[1], 1) if blocks.device.type == "cpu" else len(blocks)
    return zip(*(tensor.split(rows) for tensor in (blocks, *tensors)), strict=True)


def _blocks(matrix: Tensor, block_size: int) -> Tensor:
    """The values of a matrix row by row, padded with zeros: (blocks, block_size), float32."""
    flat = matrix.detach().to(torch.float32).reshape(-1)
    padding = -flat.numel() % block_size
    if padding:  # `pad` copies without padding, too
        flat = pad(flat, (0, padding))
    return flat.view(-1, block_size)
