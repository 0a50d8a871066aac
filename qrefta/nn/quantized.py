"""A frozen matrix in 4, 3 or 2 bits, and its product with tokens.

Dequantizing and multiplying are done by the kernels of bitsandbytes.

Storage. A matrix is flattened row by row, padded with zeros to whole blocks, and every block of
`block_size` values has one float32 scale. With `double_quant` the scales are stored in 8 bits too,
in blocks of 256 (QLoRA, section 3). NF4 and FP4 are bitsandbytes' formats, with two codes of
neighbouring values in a byte; the other formats are ours, and their codes are packed by
`qrefta.nn.packing`. `qrefta.nn.quantize` chooses the codes and scales.

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
from dataclasses import dataclass
from typing import ClassVar

import bitsandbytes.functional as bnb
import torch
from bitsandbytes import matmul_4bit  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from torch.nn.functional import linear, pad

from qrefta._compat.bitsandbytes import nest_scales
from qrefta.choices import BITSANDBYTES_TYPES, BLOCK_SIZES, QUANT_TYPES, QuantType, bits_of
from qrefta.config.settings import Settings
from qrefta.nn.grid import level_table
from qrefta.nn.packing import unpacked
from qrefta.nn.scales import SCALE_BLOCK, load_scales, scale_table, second_level

# The C library gives a larger tensor fresh pages of memory each time, and the system clears them:
# that takes longer than to dequantize a matrix into them.
_FRESH_BYTES = 1 << 25
_TILE_BYTES = 1 << 23  # of the rows of such a matrix that are dequantized at once


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
        assert settings.block_size is not None, "settings choose a block size"
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
        second_scales = -(-blocks // SCALE_BLOCK)
        return {
            "weight": code_bytes,
            "absmax": blocks + -blocks % 4,
            "absmax_state": 4 * (1 + second_scales),
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
        return load_scales(self.scales, self.scale_state)[:blocks]  # without padding

    def bnb_state(self, dtype: torch.dtype) -> bnb.QuantState:
        """The quantization state that bitsandbytes keeps for an NF4 or FP4 matrix.

        Args:
            dtype: that bitsandbytes dequantizes to.
        """
        if self.scale_state is None:
            return _state(self.scales.view(torch.float32), self.format, self.shape, dtype)
        blocks = -(-torch.Size(self.shape).numel() // self.format.block_size)
        offset, absmax = second_level(self.scale_state)
        state = _state(self.scales[:blocks], self.format, self.shape, dtype)
        code = scale_table(self.scales.device)
        second_state = bnb.QuantState(absmax, code=code, blocksize=SCALE_BLOCK, dtype=torch.float32)
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
