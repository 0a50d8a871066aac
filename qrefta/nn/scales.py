"""Scales of blocks as they are stored: 32 bits, or 8 bits on a second level (QLoRA, section 3).

On the second level the mean of all scales is taken off, and blocks of 256 scales share a float32
scale.
"""

import functools

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from torch.nn.functional import pad

from qrefta._compat.bitsandbytes import levels_8bit

SCALE_BLOCK = 256  # scales that share one second-level scale, as in QLoRA
_SCALE_VALUES = levels_8bit()  # of the 8-bit codes of scales; torch.compile cannot trace the call


def store_scales(scales: Tensor, double_quant: bool) -> tuple[Tensor, Tensor | None]:
    """The fields `scales` and `scale_state` of a `QuantizedWeight` for float32 scales."""
    if not double_quant:
        return scales.contiguous().view(torch.uint8), None
    offset = scales.mean()
    codes, state = bnb.quantize_blockwise(scales - offset, blocksize=SCALE_BLOCK)
    codes = pad(codes, (0, -codes.numel() % 4))
    return codes, torch.cat([offset.view(1), state.absmax]).view(torch.uint8)


def load_scales(scales: Tensor, scale_state: Tensor | None) -> Tensor:
    """Float32 scales, with the padding of 8-bit codes, from the fields of a `QuantizedWeight`."""
    if scale_state is None:
        return scales.view(torch.float32)
    offset, absmax = second_level(scale_state)
    code = scale_table(scales.device)
    values = bnb.dequantize_blockwise(scales, absmax=absmax, code=code, blocksize=SCALE_BLOCK)
    return values + offset


def second_level(scale_state: Tensor) -> tuple[Tensor, Tensor]:
    """Offset, (1,), and second-level scales."""
    values = scale_state.view(torch.float32)
    return values[:1], values[1:]


@functools.cache
def scale_table(device: torch.device) -> Tensor:
    """The values of the 8-bit codes, (256,), float32."""
    return _SCALE_VALUES.to(device)
