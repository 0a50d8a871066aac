"""A matrix <-> 4 bit, through bitsandbytes' kernels: NF4, FP4 and INT4.

A matrix is flattened row by row, padded with zeros to whole blocks, and every block of `block_size` values gets one
float32 scale. Two codes share a byte. With `double_quant` the scales are themselves stored in 8 bits (QLoRA, section
3), in blocks of 256.

NF4 and FP4 are bitsandbytes' own formats. INT4 is not in bitsandbytes: codes -8..7 stand for code / 8 times a signed
scale, dequantized by its blockwise look-up kernel. The sign lets the level -8 carry the block's largest entry, and a
search over 12 scales near it keeps the smallest squared error: 0.090 relative root error on Gaussian weights at block
64, where scaling by the largest magnitude alone gives 0.108 and NF4 has 0.092.

bitsandbytes traps that this file works around:
- The CPU 4-bit kernel (0.50) is wrong when a row of several is not a whole number of blocks, at widths with
  in_features % 64 == 32 for instance: a row is one block here, or a row of whole blocks.
- A row of odd length falls back to a slow path that compiles: blocks have even lengths.
- `Linear4bit` repacks its weight in place on some CPUs: only the functional API is used.
"""

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from qrefta._compat.bitsandbytes import levels_4bit, levels_8bit, nest_scales

QuantType = Literal["nf4", "fp4", "int4"]
QUANT_TYPES: tuple[QuantType, ...] = get_args(QuantType)
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)

_CELLS = 1024  # of the look-up table that `rounded` finds a level with; finer than the levels' least distance
_LOOKUP_CHUNK = 1 << 17  # values whose temporaries stay in a core's cache
_SCALE_BLOCK = 256  # scales that share one second-level scale, as in QLoRA
_SCALE_VALUES = (
    levels_8bit()
)  # what the 8-bit codes of scales stand for; torch.compile cannot trace this
_INT4_CLIPS = [
    percent / 100 for percent in range(79, 113, 3)
]  # 1 is among them: a lone outlier is kept exactly


@dataclass(frozen=True)
class QuantFormat:
    """How a matrix is stored in 4 bits.

    Attributes:
        quant_type: nf4, fp4 or int4.
        block_size: weights that share a scale, one of `BLOCK_SIZES`.
        double_quant: store the scales in 8 bits too. Next to an extreme outlier it hurts: 256 scales share a grid.
    """

    quant_type: QuantType = "nf4"
    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ValueError(
                f"quant_type is {self.quant_type!r}; it must be one of {', '.join(QUANT_TYPES)}"
            )
        if not isinstance(self.block_size, int) or self.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"block_size is {self.block_size!r}; it must be one of {', '.join(map(str, BLOCK_SIZES))}"
            )

    def packed_sizes(self, values: int) -> dict[str, int]:
        """Bytes of every tensor that `quantize` makes for a matrix of `values` entries, by field of `Packed`."""
        blocks = -(-values // self.block_size)
        sizes = {"weight": blocks * self.block_size // 2}
        if not self.double_quant:
            return sizes | {"absmax": 4 * blocks}
        return sizes | {
            "absmax": blocks + -blocks % 4,
            "absmax_state": 4 * (1 + -(-blocks // _SCALE_BLOCK)),
        }


class Packed(NamedTuple):
    """A matrix in 4 bits, as raw bytes that no dtype conversion of a model can round.

    Attributes:
        weight: int8, two codes a byte. Not uint8: T5's feed-forward casts its input to any other dtype.
        absmax: uint8, one float32 (viewed as bytes) a block, or its 8-bit code with double quantization, padded to a
            multiple of 4 so that what follows it in a file stays aligned.
        absmax_state: uint8 or None; double quantization's offset and second-level scales, float32 viewed as bytes.
    """

    weight: Tensor
    absmax: Tensor
    absmax_state: Tensor | None = None


def quantize(matrix: Tensor, fmt: QuantFormat) -> Packed:
    """A matrix in 4 bits.

    Args:
        matrix: any shape, finite. Computed in float32.
        fmt: the format.
    """
    flat = matrix.detach().to(torch.float32).reshape(1, -1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % fmt.block_size))
    if fmt.quant_type == "int4":
        scales = _int4_scales(flat.view(-1, fmt.block_size))
    else:
        codes, state = bnb.quantize_4bit(flat, blocksize=fmt.block_size, quant_type=fmt.quant_type)
        scales = state.absmax
    absmax, absmax_state = _store_scales(scales, fmt)
    if fmt.quant_type == "int4":  # codes are chosen for the scales as stored
        blocks = flat.view(-1, fmt.block_size)
        codes = _int4_codes(blocks, _load_scales(absmax, absmax_state, fmt)[: len(blocks)])
    return Packed(codes.view(-1).view(torch.int8), absmax, absmax_state)


def dequantize(
    packed: Packed, fmt: QuantFormat, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The matrix that `packed` stands for, of the given shape and floating dtype.

    Peak memory: the padded matrix in `dtype` (INT4: plus one byte a value).
    """
    values = torch.Size(shape).numel()
    kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
    codes = packed.weight.view(torch.uint8)
    blocks = 2 * codes.numel() // fmt.block_size
    scales = _load_scales(packed.absmax, packed.absmax_state, fmt)[
        :blocks
    ]  # without those that pad the bytes
    if fmt.quant_type == "int4":
        nibbles = torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)
        state = bnb.QuantState(
            scales, code=_int4_table(codes.device), blocksize=fmt.block_size, dtype=kernel_dtype
        )
        flat = bnb.dequantize_blockwise(nibbles, state)
    else:
        state = _state(
            scales, fmt, (blocks, fmt.block_size), kernel_dtype
        )  # the CPU kernel gives threads rows
        flat = bnb.dequantize_4bit(codes.view(-1, 1), state)
    return flat.view(-1)[:values].view(shape).to(dtype)


def linear(
    x: Tensor, packed: Packed, fmt: QuantFormat, shape: tuple[int, int], bias: Tensor | None = None
) -> Tensor:
    """The product x W^T + bias, for the matrix W of the given shape that `packed` stands for.

    bitsandbytes multiplies: on CUDA its kernels for few tokens read the 4 bits themselves, and no dense W is made.
    What they do not take (INT4, float64, rows that are no whole number of blocks) is dequantized first.

    Args:
        x: (tokens, in), contiguous or not.
        bias: (out,), in the dtype of `x`.
    """
    if fmt.quant_type == "int4" or x.dtype == torch.float64 or shape[1] % fmt.block_size:
        return torch.nn.functional.linear(x, dequantize(packed, fmt, shape, x.dtype), bias)
    state = bnb_state(packed, fmt, shape, x.dtype)
    return bitsandbytes.matmul_4bit(
        x, packed.weight.view(torch.uint8).view(1, -1), state, bias=bias
    )


def bnb_state(
    packed: Packed, fmt: QuantFormat, shape: tuple[int, int], dtype: torch.dtype
) -> bnb.QuantState:
    """What bitsandbytes calls the quantization state of a matrix in NF4 or FP4, whose codes are `packed.weight`.

    Args:
        shape: of the matrix.
        dtype: that bitsandbytes dequantizes to.
    """
    blocks = -(-shape[0] * shape[1] // fmt.block_size)
    if not fmt.double_quant:
        return _state(packed.absmax.view(torch.float32), fmt, shape, dtype)
    offset, second = _second_level(packed.absmax_state)
    state = _state(packed.absmax[:blocks], fmt, shape, dtype)
    code = _scale_table(packed.absmax.device)
    second_state = bnb.QuantState(second, code=code, blocksize=_SCALE_BLOCK, dtype=torch.float32)
    nest_scales(state, offset.squeeze(0), second_state)
    return state


def bnb_code(fmt: QuantFormat) -> Tensor:
    """The 16 levels of NF4 or FP4 in bitsandbytes' order, (16,), float32, on the CPU."""
    return levels_4bit(fmt.quant_type)


def rounded(matrix: Tensor, fmt: QuantFormat) -> Tensor:
    """dequantize(quantize(matrix)), float32, without packing: on a CPU a few times as fast.

    For NF4 and FP4 the range is cut into cells that hold at most one boundary between two levels. A value's level is
    that of its cell, or of the next if the value lies beyond the boundary: two look-ups, where bitsandbytes searches
    all levels. The result is the same to the bit, which a test holds.
    """
    if fmt.double_quant or matrix.device.type != "cpu":
        return dequantize(quantize(matrix, fmt), fmt, tuple(matrix.shape), torch.float32)
    flat = matrix.detach().to(torch.float32).reshape(-1)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % fmt.block_size)).view(
        -1, fmt.block_size
    )
    values = torch.empty_like(flat)
    chunk, middle = max(_LOOKUP_CHUNK // fmt.block_size, 1), torch.tensor(_CELLS / 2)
    boundary, level = (
        (torch.empty(0), torch.empty(0))
        if fmt.quant_type == "int4"
        else _cell_tables(fmt.quant_type)
    )
    for blocks, out in zip(flat.split(chunk), values.split(chunk), strict=True):
        if fmt.quant_type == "int4":
            scales = _best_int4_scales(blocks)
            torch.mul(_int4_levels(blocks, scales).div_(8), scales.unsqueeze(1), out=out)
            continue
        absmax = blocks.abs().amax(1, keepdim=True)
        scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))).clamp_(-1, 1)
        cells = torch.add(middle, scaled, alpha=_CELLS / 2).long()
        cells += scaled > torch.take(
            boundary, cells
        )  # beyond its boundary a cell's level is that of the next
        torch.mul(torch.take(level, cells), absmax, out=out)
    return values.view(-1)[: matrix.numel()].view(matrix.shape)


def _store_scales(scales: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor | None]:
    if not fmt.double_quant:
        return scales.contiguous().view(torch.uint8), None
    offset = scales.mean()
    codes, state = bnb.quantize_blockwise(scales - offset, blocksize=_SCALE_BLOCK)
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % 4))
    return codes, torch.cat([offset.view(1), state.absmax]).view(torch.uint8)


def _state(
    scales: Tensor, fmt: QuantFormat, shape: tuple[int, int], dtype: torch.dtype
) -> bnb.QuantState:
    return bnb.QuantState(
        scales,
        shape=torch.Size(shape),
        blocksize=fmt.block_size,
        quant_type=fmt.quant_type,
        dtype=dtype,
    )


def _load_scales(absmax: Tensor, absmax_state: Tensor | None, fmt: QuantFormat) -> Tensor:
    if not fmt.double_quant:
        return absmax.view(torch.float32)
    offset, second = _second_level(absmax_state)
    table = _scale_table(absmax.device)
    return (
        bnb.dequantize_blockwise(absmax, absmax=second, code=table, blocksize=_SCALE_BLOCK) + offset
    )


def _second_level(absmax_state: Tensor) -> tuple[Tensor, Tensor]:
    """Offset, (1,), and second-level scales."""
    values = absmax_state.view(torch.float32)
    return values[:1], values[1:]


@functools.cache
def _scale_table(device: torch.device) -> Tensor:
    return _SCALE_VALUES.to(device)


@functools.cache
def _cell_tables(quant_type: str) -> tuple[Tensor, Tensor]:
    """For every cell of [-1, 1]: the boundary in it, if any (else one above), and the level at its start."""
    levels = levels_4bit(quant_type).float().sort().values
    bounds = (levels[1:] + levels[:-1]) / 2
    first = torch.bucketize(torch.linspace(-1, 1, _CELLS + 1), bounds)
    return torch.cat([bounds, torch.full((1,), torch.inf)])[first], levels[first]


def _int4_table(device: torch.device) -> Tensor:
    """Look-up table of the 16 INT4 levels, padded to the 256 entries that the blockwise kernel reads."""
    return torch.nn.functional.pad(
        torch.arange(-8, 8, dtype=torch.float32, device=device) / 8, (0, 240)
    )


def _int4_levels(blocks: Tensor, scales: Tensor) -> Tensor:
    """Nearest level -8 .. 7 of every value; an all-zero block (scale 0) takes level 0."""
    steps = (scales / 8).unsqueeze(1)
    return torch.div(blocks, torch.where(steps == 0, torch.inf, steps)).round_().clamp_(-8, 7)


def _int4_scales(blocks: Tensor) -> Tensor:
    """Signed scale of every block, (blocks,): near minus its largest entry, where the squared error is smallest."""
    chunk = max(_LOOKUP_CHUNK // blocks.shape[1], 1) if blocks.device.type == "cpu" else len(blocks)
    return torch.cat([_best_int4_scales(part) for part in blocks.split(chunk)])


def _best_int4_scales(blocks: Tensor) -> Tensor:
    """Signed scales by trying every clip: blocks are scaled to [-1, 1] once, so that a clip costs two products."""
    peak = -blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scaled = blocks / torch.where(peak == 0, torch.inf, peak)
    best = torch.ones_like(peak.squeeze(1))
    best_error = torch.full_like(best, torch.inf)
    error = torch.empty_like(scaled)
    for clip in _INT4_CLIPS:
        torch.mul(scaled, 8 / clip, out=error).round_().clamp_(-8, 7).mul_(-clip / 8).add_(scaled)
        norm = torch.linalg.vector_norm(error, dim=1)
        best = torch.where(norm < best_error, clip, best)
        best_error = torch.minimum(norm, best_error)
    return best * peak.squeeze(1)


def _int4_codes(blocks: Tensor, scales: Tensor) -> Tensor:
    """Two codes a byte, first value in the high nibble, as bitsandbytes packs its own formats."""
    codes = (_int4_levels(blocks, scales) + 8).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1]
