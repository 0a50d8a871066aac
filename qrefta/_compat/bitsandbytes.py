"""Functions and fields of bitsandbytes that are not documented, all in release 0.50 or earlier."""

import bitsandbytes.functional as bnb
from torch import Tensor

from qrefta._compat.torch import cpu_float32_defaults

__all__ = ["levels_4bit", "levels_8bit", "nest_scales"]


def levels_8bit() -> Tensor:
    """The 256 values that 8-bit codes of scales stand for, (256,), float32, on the CPU.

    If it goes: keep the table here; it is a constant of the file format.
    """
    with cpu_float32_defaults():
        return bnb.create_dynamic_map()


def levels_4bit(quant_type: str) -> Tensor:
    """The 16 values of the codes of "nf4" or "fp4", in order, (16,), float32, on the CPU.

    If it goes: keep the two tables here; they are constants of the file format.
    """
    with cpu_float32_defaults():
        return bnb.get_4bit_type(quant_type, device="cpu")


def nest_scales(state: bnb.QuantState, offset: Tensor, second: bnb.QuantState) -> None:
    """Tell `state` that its scales are 8-bit codes (double quantization).

    bitsandbytes sets these fields in `quantize_4bit` alone, and qrefta has the scales already. If
    it goes: dequantize the scales first, at four times their bytes while a layer computes.

    Args:
        state: of the matrix.
        offset: mean of the scales, a scalar.
        second: of the scales.
    """
    state.offset = offset
    state.nested = True
    state.state2 = second
