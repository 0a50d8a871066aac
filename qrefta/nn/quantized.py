"""A frozen matrix in 4, 3 or 2 bits, and its product with tokens.

Dequantizing and multiplying are done by the kernels of bitsandbytes.

Storage. A matrix is flattened row by row, padded with zeros to whole blocks, and every block of
`block_size` values has one float32 scale. With `double_quant` the scales are stored in 8 bits too,
in blocks of 256 (QLoRA, section 3). NF4 and FP4 are bitsandbytes' formats, with two codes of
neighbouring values in a byte; the other formats are ours, and their codes are packed by
`qrefta.nn.packing`. The levels and the choice of scales are in `qrefta.nn.grid`.

Products. `matmul` computes x W^T in the dtype of x, in one of two ways:
- bitsandbytes' `matmul_4bit`: on accelerators, NF4 and FP4 whose rows are whole blocks. On CUDA its
  kernels for few tokens read the 4 bits themselves, so decoding moves a quarter of the bytes; for
  more tokens it dequantizes W and multiplies.
- dequantize, then multiply: on CPUs, where `matmul_4bit` does the same; our formats, float64, and
  rows that are not whole blocks. On a CPU a large W goes through the cache, some rows at a time.
`plus_product` adds a low-rank update to the dequantized W in place; with many tokens that is the
cheaper way to add the update (see `qrefta.nn.product`).

Workarounds for bitsandbytes 0.50:
- Its CPU 4-bit kernel is wrong for a matrix of several rows that are not whole blocks, for example
  when in_features % 64 == 32. Here every row that it sees is one block, or whole blocks.
- A row of odd length takes a slow path that compiles code. Blocks have even lengths.
- `Linear4bit` repacks its weight in place on some CPUs. Only the functional API is used.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import bitsandbytes.functional as bnb
import torch
from bitsandbytes import matmul_4bit  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from torch.nn.functional import linear, pad

from qrefta._compat.bitsandbytes import levels_8bit, nest_scales
from qrefta.choices import BITSANDBYTES_TYPES, BLOCK_SIZES, QUANT_TYPES, QuantType, bits_of
from qrefta.config.settings import Settings
from qrefta.linalg.feedback import Feedback, round_columns
from qrefta.nn.grid import (
    CHUNK,
    Grid,
    absmax_scales,
    grid_of,
    inverse,
    level_table,
    nearest,
    searched_scales,
)
from qrefta.nn.packing import packed, unpacked

# The C library gives a larger tensor fresh pages of memory each time, and the system clears them:
# that takes longer than to dequantize a matrix into them.
_FRESH_BYTES = 1 << 25
_TILE_BYTES = 1 << 23  # of the rows of such a matrix that are dequantized at once
_FEEDBACK_VALUES = 1 << 25  # of a matrix, worked on at once with error feedback on a CPU
_FEEDBACK_VALUES_OF_ACCELERATOR = 1 << 26  # many rows, since every column takes several launches
_SCALE_BLOCK = 256  # scales that share one second-level scale, as in QLoRA
_SCALE_VALUES = levels_8bit()  # of the 8-bit codes of scales; torch.compile cannot trace the call


@dataclass(frozen=True)
class QuantFormat:
    """How a matrix is stored in few bits.

    Attributes:
        quant_type: one of `QUANT_TYPES`, whose digit is the bits of a code.
        block_size: weights that share a scale, one of `BLOCK_SIZES`.
        double_quant: store the scales in 8 bits too. It hurts near an extreme outlier, because 256
            scales share a grid.
    """

    quant_type: QuantType = "nf4"
    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            allowed = ", ".join(QUANT_TYPES)
            raise ValueError(f"quant_type is {self.quant_type!r}; it must be one of {allowed}")
        if not isinstance(self.block_size, int) or self.block_size not in BLOCK_SIZES:
            allowed = ", ".join(map(str, BLOCK_SIZES))
            raise ValueError(f"block_size is {self.block_size!r}; it must be one of {allowed}")

    @classmethod
    def of(cls, settings: Settings) -> "QuantFormat | None":
        """The format of some settings; None with 16 bits."""
        if settings.bits == 16:
            return None
        assert settings.quant_type is not None, "settings choose a format for fewer bits"
        return cls(settings.quant_type, settings.block_size, bool(settings.double_quant))

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return bits_of(self.quant_type)

    def packed_sizes(self, values: int) -> dict[str, int]:
        """Bytes of every tensor of a quantized matrix with `values` entries, by saved name."""
        blocks = -(-values // self.block_size)
        code_bytes = blocks * self.block_size * self.bits // 8
        if not self.double_quant:
            return {"weight": code_bytes, "absmax": 4 * blocks}
        second_level = -(-blocks // _SCALE_BLOCK)
        return {
            "weight": code_bytes,
            "absmax": blocks + -blocks % 4,
            "absmax_state": 4 * (1 + second_level),
        }


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix W in few bits.

    Codes and scales are stored as bytes, so that no dtype conversion of a model can round them.

    Attributes:
        codes: int8, packed. Not uint8: T5's feed-forward casts its input to any other
            dtype.
        scales: uint8. One float32 a block, viewed as bytes; or with double quantization its 8-bit
            code, padded to a multiple of 4 bytes so that the next tensor in a file stays aligned.
        scale_state: uint8; the offset and the second-level scales of double quantization, float32
            viewed as bytes.
        format: how the matrix is stored.
        shape: of the matrix.
    """

    codes: Tensor
    scales: Tensor
    scale_state: Tensor | None
    format: QuantFormat
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W as a new tensor of a floating dtype.

        Peak memory: the padded matrix in `dtype`; for our formats one byte a value more.
        """
        kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
        if self.format.quant_type not in BITSANDBYTES_TYPES:
            flat = self._looked_up(kernel_dtype)
        else:
            # One block a row: the CPU kernel reads these right, and divides rows among threads.
            scales = self.block_scales()
            rows = (len(scales), self.format.block_size)
            state = _state(scales, self.format, rows, kernel_dtype)
            flat = bnb.dequantize_4bit(self._bytes().view(-1, 1), state)
        values = math.prod(self.shape)
        if flat.numel() > values:  # whole blocks
            flat = flat.view(-1)[:values]
        return flat.view(self.shape).to(dtype)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product x W^T + bias, (tokens, out), in the dtype of x.

        Args:
            x: (tokens, in), contiguous or not.
            bias: (out,), in the dtype of x.
        """
        rows, width = self.shape
        on_cpu = x.device.type == "cpu"
        if on_cpu and self.format.bits == 4 and rows * width * x.itemsize > _FRESH_BYTES:
            return self._tiled_product(x, bias)
        ours = self.format.quant_type not in BITSANDBYTES_TYPES
        if on_cpu or ours or x.dtype == torch.float64 or width % self.format.block_size:
            return linear(x, self.dequantize(x.dtype), bias)
        codes = self._bytes().view(1, -1)
        state = self.bnb_state(x.dtype)
        return matmul_4bit(x, codes, state, bias=bias)

    def _tiled_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`matmul` with some rows of W at a time, for 4 bits."""
        rows, width = self.shape
        size = self.format.block_size
        period = size // math.gcd(width, size)  # rows that are whole blocks
        count = max(_TILE_BYTES // (width * x.itemsize * period), 1) * period
        scales = self.block_scales()
        y = x.new_empty(len(x), rows)
        for start in range(0, rows, count):
            tile = slice(start, min(start + count, rows))
            blocks = slice(start * width // size, -(-tile.stop * width // size))
            part = QuantizedWeight(
                self.codes[blocks.start * size // 2 : blocks.stop * size // 2],
                scales[blocks].view(torch.uint8),
                None,
                self.format,
                (tile.stop - start, width),
            )
            offset = None if bias is None else bias[tile]
            y[:, tile] = linear(x, part.dequantize(x.dtype), offset)
        return y

    def plus_product(self, left: Tensor, right: Tensor) -> Tensor:
        """W + left @ right, (out, in), in the dtype of the factors; it takes one dense buffer."""
        return self.dequantize(left.dtype).addmm_(left, right)

    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales by the names that they have in a checkpoint."""
        tensors = {"weight": self.codes, "absmax": self.scales}
        if self.scale_state is not None:
            tensors["absmax_state"] = self.scale_state
        return tensors

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "QuantizedWeight":
        """The same weight on a device. The bytes stay as they are; `dtype` is for dense weights."""
        state = None if self.scale_state is None else self.scale_state.to(device)
        codes = self.codes.to(device)
        scales = self.scales.to(device)
        return QuantizedWeight(codes, scales, state, self.format, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def block_scales(self) -> Tensor:
        """The scale of every block, (blocks,), float32."""
        blocks = 8 * self.codes.numel() // (self.format.bits * self.format.block_size)
        return _load_scales(self.scales, self.scale_state)[:blocks]  # without padding

    def bnb_state(self, dtype: torch.dtype) -> bnb.QuantState:
        """The quantization state that bitsandbytes keeps for an NF4 or FP4 matrix.

        Args:
            dtype: that bitsandbytes dequantizes to.
        """
        if self.scale_state is None:
            return _state(self.scales.view(torch.float32), self.format, self.shape, dtype)
        blocks = -(-torch.Size(self.shape).numel() // self.format.block_size)
        offset, second_level = _second_level(self.scale_state)
        state = _state(self.scales[:blocks], self.format, self.shape, dtype)
        code = _scale_table(self.scales.device)
        second_state = bnb.QuantState(
            second_level, code=code, blocksize=_SCALE_BLOCK, dtype=torch.float32
        )
        nest_scales(state, offset.squeeze(0), second_state)
        return state

    def _bytes(self) -> Tensor:
        return self.codes.view(torch.uint8)

    def _looked_up(self, dtype: torch.dtype) -> Tensor:
        """The padded values of a matrix in one of our formats, by bitsandbytes' blockwise look-up
        of 8-bit codes.
        """
        codes = unpacked(self._bytes(), self.format.bits)
        state = bnb.QuantState(
            self.block_scales(),
            code=_level_table_8bit(self.format.quant_type, codes.device),
            blocksize=self.format.block_size,
            dtype=dtype,
        )
        return bnb.dequantize_blockwise(codes, state)


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A matrix W in a floating dtype, with the methods of `QuantizedWeight`.

    Attributes:
        weight: (out, in).
        format: None.
    """

    weight: Tensor
    format: ClassVar[None] = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return tuple(self.weight.shape)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """W in a floating dtype; the stored tensor itself if it has that dtype."""
        return self.weight.to(dtype)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product x W^T + bias, (tokens, out), see `QuantizedWeight.matmul`."""
        return linear(x, self.weight.to(x.dtype), bias)

    def plus_product(self, left: Tensor, right: Tensor) -> Tensor:
        """W + left @ right, (out, in), in the dtype of the factors."""
        return torch.addmm(self.weight.to(left.dtype), left, right)

    def tensors(self) -> dict[str, Tensor]:
        """The matrix by the name that it has in a checkpoint."""
        return {"weight": self.weight}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "DenseWeight":
        """The same weight on a device and in a dtype."""
        return DenseWeight(self.weight.to(device, dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self.weight.nbytes


FrozenWeight = QuantizedWeight | DenseWeight


def frozen_weight(
    fmt: QuantFormat | None,
    shape: tuple[int, ...],
    weight: Tensor,
    absmax: Tensor | None = None,
    absmax_state: Tensor | None = None,
) -> FrozenWeight:
    """The weight with these tensors, the inverse of `tensors()`.

    Args:
        fmt: None for a dense weight.
        shape: of the matrix.
        weight, absmax, absmax_state: by the names of `tensors()`.
    """
    if fmt is None:
        return DenseWeight(weight)
    assert absmax is not None, "a quantized weight has scales"
    return QuantizedWeight(weight, absmax, absmax_state, fmt, shape)


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
    scales, scale_state = _store_scales(chosen, fmt)
    stored = _load_scales(scales, scale_state)[: len(blocks)]
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
    stored = _load_scales(*_store_scales(chosen, fmt))[: len(blocks)]
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


def _store_scales(scales: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor | None]:
    """The fields `scales` and `scale_state` of a `QuantizedWeight` for float32 scales."""
    if not fmt.double_quant:
        return scales.contiguous().view(torch.uint8), None
    offset = scales.mean()
    codes, state = bnb.quantize_blockwise(scales - offset, blocksize=_SCALE_BLOCK)
    codes = pad(codes, (0, -codes.numel() % 4))
    return codes, torch.cat([offset.view(1), state.absmax]).view(torch.uint8)


def _load_scales(scales: Tensor, scale_state: Tensor | None) -> Tensor:
    """Float32 scales, with the padding of 8-bit codes, from the fields of a `QuantizedWeight`."""
    if scale_state is None:
        return scales.view(torch.float32)
    offset, second_level = _second_level(scale_state)
    code = _scale_table(scales.device)
    values = bnb.dequantize_blockwise(
        scales, absmax=second_level, code=code, blocksize=_SCALE_BLOCK
    )
    return values + offset


def _second_level(scale_state: Tensor) -> tuple[Tensor, Tensor]:
    """Offset, (1,), and second-level scales."""
    values = scale_state.view(torch.float32)
    return values[:1], values[1:]


def _state(
    scales: Tensor, fmt: QuantFormat, shape: tuple[int, ...], dtype: torch.dtype
) -> bnb.QuantState:
    return bnb.QuantState(
        scales,
        shape=torch.Size(shape),
        blocksize=fmt.block_size,
        quant_type=fmt.quant_type,
        dtype=dtype,
    )


@functools.cache
def _level_table_8bit(quant_type: QuantType, device: torch.device) -> Tensor:
    """The levels of a format, padded to the 256 entries that the blockwise kernel reads."""
    levels = level_table(quant_type)
    return pad(levels, (0, 256 - len(levels))).to(device)


@functools.cache
def _scale_table(device: torch.device) -> Tensor:
    return _SCALE_VALUES.to(device)
