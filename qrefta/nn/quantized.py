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
from typing import ClassVar

import bitsandbytes
import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from qrefta.choices import BLOCK_SIZES, QUANT_TYPES, QuantType
from qrefta.config import Settings

_CELLS = 1024  # of the look-up table that `rounded` finds a level with; finer than the levels' least distance
_LOOKUP_CHUNK = 1 << 17  # values whose temporaries stay in a core's cache
_SCALE_BLOCK = 256  # scales that share one second-level scale, as in QLoRA
_SCALE_VALUES = (
    bnb.create_dynamic_map()
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

    @classmethod
    def of(cls, settings: Settings) -> "QuantFormat | None":
        """The 4-bit format of some settings; None with 16 bits."""
        if settings.bits == 16:
            return None
        return cls(settings.quant_type, settings.block_size, settings.double_quant)

    def packed_sizes(self, values: int) -> dict[str, int]:
        """Bytes of every tensor that `quantize` makes for a matrix of `values` entries, by saved name."""
        blocks = -(-values // self.block_size)
        sizes = {"weight": blocks * self.block_size // 2}
        if not self.double_quant:
            return sizes | {"absmax": 4 * blocks}
        return sizes | {
            "absmax": blocks + -blocks % 4,
            "absmax_state": 4 * (1 + -(-blocks // _SCALE_BLOCK)),
        }


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix in 4 bits. Codes and scales are raw bytes, which no dtype conversion of a model can round.

    Attributes:
        codes: int8, two codes a byte. Not uint8: T5's feed-forward casts its input to any other dtype.
        scales: uint8, one float32 (viewed as bytes) a block, or its 8-bit code with double quantization, padded to a
            multiple of 4 bytes so that the next tensor in a file stays aligned.
        scale_state: uint8 or None; double quantization's offset and second-level scales, float32 viewed as bytes.
        format: how the matrix is stored.
        shape: of the matrix.
    """

    codes: Tensor
    scales: Tensor
    scale_state: Tensor | None
    format: QuantFormat
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix as a new tensor of a floating dtype.

        Peak memory: the padded matrix in `dtype` (INT4: plus one byte a value).
        """
        fmt = self.format
        kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
        codes = self.codes.view(torch.uint8)
        blocks = 2 * codes.numel() // fmt.block_size
        scales = self.block_scales()
        if fmt.quant_type == "int4":
            nibbles = torch.stack([codes >> 4, codes & 15], dim=-1).view(-1)
            table = _int4_table(codes.device)
            state = bnb.QuantState(scales, code=table, blocksize=fmt.block_size, dtype=kernel_dtype)
            flat = bnb.dequantize_blockwise(nibbles, state)
        else:
            # One block a row: the CPU kernel is right for it, and divides rows among threads.
            state = _state(scales, fmt, (blocks, fmt.block_size), kernel_dtype)
            flat = bnb.dequantize_4bit(codes.view(-1, 1), state)
        values = torch.Size(self.shape).numel()
        return flat.view(-1)[:values].view(self.shape).to(dtype)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product x W^T + bias, without a gradient.

        bitsandbytes multiplies: on CUDA its kernels for few tokens read the 4 bits themselves, and no dense W is made.
        INT4, float64 and rows that are not a whole number of blocks are dequantized first.

        Args:
            x: (tokens, in), contiguous or not.
            bias: (out,), in the dtype of `x`.
        """
        whole_blocks = self.shape[1] % self.format.block_size == 0
        if self.format.quant_type == "int4" or x.dtype == torch.float64 or not whole_blocks:
            return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)
        codes = self.codes.view(torch.uint8).view(1, -1)
        return bitsandbytes.matmul_4bit(x, codes, self.bnb_state(x.dtype), bias=bias)

    def plus_product(self, left: Tensor, right: Tensor) -> Tensor:
        """W + left @ right, (out, in), in the dtype of the two, with one dense buffer."""
        return self.dequantize(left.dtype).addmm_(left, right)

    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales by the names under which a checkpoint holds them."""
        tensors = {"weight": self.codes, "absmax": self.scales}
        if self.scale_state is not None:
            tensors["absmax_state"] = self.scale_state
        return tensors

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "QuantizedWeight":
        """The same weight on a device. Raw bytes have no dtype to convert."""
        tensors = [tensor.to(device) for tensor in self.tensors().values()]
        return frozen_weight(self.format, self.shape, *tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def block_scales(self) -> Tensor:
        """Scale of every block, (blocks,), float32."""
        blocks = 2 * self.codes.numel() // self.format.block_size
        # The 8-bit codes of scales are padded.
        return _load_scales(self.scales, self.scale_state)[:blocks]

    def bnb_state(self, dtype: torch.dtype) -> bnb.QuantState:
        """The quantization state that bitsandbytes takes for an NF4 or FP4 weight.

        Args:
            dtype: that bitsandbytes dequantizes to.
        """
        fmt = self.format
        if self.scale_state is None:
            return _state(self.scales.view(torch.float32), fmt, self.shape, dtype)
        blocks = -(-torch.Size(self.shape).numel() // fmt.block_size)
        offset, second = _second_level(self.scale_state)
        state = _state(self.scales[:blocks], fmt, self.shape, dtype)
        state.offset = offset.squeeze(0)
        state.nested = True
        code = _scale_table(self.scales.device)
        state.state2 = bnb.QuantState(
            second, code=code, blocksize=_SCALE_BLOCK, dtype=torch.float32
        )
        return state


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A matrix in a floating dtype, with the methods of `QuantizedWeight`.

    Attributes:
        weight: (out, in).
        format: None.
    """

    weight: Tensor
    format: ClassVar[None] = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix in a floating dtype; the stored tensor itself if it has that dtype."""
        return self.weight.to(dtype)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product x W^T + bias, for x (tokens, in) and a bias (out,) in the dtype of `x`."""
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)

    def plus_product(self, left: Tensor, right: Tensor) -> Tensor:
        """W + left @ right, (out, in), in the dtype of the two."""
        return torch.addmm(self.weight.to(left.dtype), left, right)

    def tensors(self) -> dict[str, Tensor]:
        """The matrix by the name under which a checkpoint holds it."""
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
    """The weight that `tensors()` gave the tensors of.

    Args:
        fmt: None for a dense weight.
        shape: of the matrix.
        weight, absmax, absmax_state: by the names of `tensors()`.
    """
    if fmt is None:
        return DenseWeight(weight)
    assert absmax is not None, "a 4-bit weight has scales"
    return QuantizedWeight(weight, absmax, absmax_state, fmt, shape)


def quantize(matrix: Tensor, fmt: QuantFormat) -> QuantizedWeight:
    """A matrix in 4 bits.

    Args:
        matrix: any shape, finite. Computed in float32.
        fmt: the format.
    """
    blocks = _blocks(matrix, fmt.block_size)
    if fmt.quant_type == "int4":
        absmax, absmax_state = _store_scales(_int4_scales(blocks), fmt)
        # Codes are chosen for the scales as stored.
        stored = _load_scales(absmax, absmax_state)[: len(blocks)]
        codes = _int4_codes(blocks, stored)
    else:
        flat = blocks.view(1, -1)
        codes, state = bnb.quantize_4bit(flat, blocksize=fmt.block_size, quant_type=fmt.quant_type)
        absmax, absmax_state = _store_scales(state.absmax, fmt)
    codes = codes.view(-1).view(torch.int8)
    return QuantizedWeight(codes, absmax, absmax_state, fmt, tuple(matrix.shape))


def bnb_code(fmt: QuantFormat) -> Tensor:
    """The 16 levels of NF4 or FP4 in bitsandbytes' order, (16,), float32, on the CPU."""
    return bnb.get_4bit_type(fmt.quant_type, device="cpu")


def rounded(matrix: Tensor, fmt: QuantFormat) -> Tensor:
    """dequantize(quantize(matrix)), float32, without packing: on a CPU a few times as fast.

    For NF4 and FP4 the range is cut into cells that hold at most one boundary between two levels. A value's level is
    that of its cell, or of the next if the value lies beyond the boundary: two look-ups, where bitsandbytes searches
    all levels. The result is the same to the bit, which a test holds.
    """
    if fmt.double_quant or matrix.device.type != "cpu":
        return quantize(matrix, fmt).dequantize(torch.float32)
    flat = _blocks(matrix, fmt.block_size)
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


def _blocks(matrix: Tensor, block_size: int) -> Tensor:
    """The values of a matrix row by row, padded with zeros to whole blocks: (blocks, block_size), float32."""
    flat = matrix.detach().to(torch.float32).reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)


def _store_scales(scales: Tensor, fmt: QuantFormat) -> tuple[Tensor, Tensor | None]:
    if not fmt.double_quant:
        return scales.contiguous().view(torch.uint8), None
    offset = scales.mean()
    codes, state = bnb.quantize_blockwise(scales - offset, blocksize=_SCALE_BLOCK)
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % 4))
    return codes, torch.cat([offset.view(1), state.absmax]).view(torch.uint8)


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


def _load_scales(absmax: Tensor, absmax_state: Tensor | None) -> Tensor:
    if absmax_state is None:
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
    levels = bnb.get_4bit_type(quant_type, device="cpu").float().sort().values
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
