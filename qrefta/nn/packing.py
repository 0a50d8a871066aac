"""Codes of 4, 3 or 2 bits, packed into bytes.

- 4 bits: the codes of two neighbouring values share a byte, the first in the upper half, as
  bitsandbytes has them.
- 2 bits: the codes are cut into four equal parts; a byte holds one code of each part, the first
  part in the lowest bits. So unpacking is a few operations on contiguous bytes.
- 3 bits: the two lower bits of all codes, packed as codes of 2 bits; then their upper bits, cut
  into eight parts, of which a byte holds one bit each.
"""

import torch
from torch import Tensor


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes in bytes, (n bits / 8,), uint8.

    Args:
        codes: (n,), uint8, each below 2^bits; n is a multiple of 8.
        bits: 4, 3 or 2.
    """
    if bits == 4:
        pairs = codes.view(-1, 2)
        return pairs[:, 0] << 4 | pairs[:, 1]
    low = _interleaved(codes & 3, 2)
    return low if bits == 2 else torch.cat([low, _interleaved(codes >> 2, 1)])


def unpacked(packed_codes: Tensor, bits: int) -> Tensor:
    """The codes that were packed, (n,), uint8.

    Args:
        packed_codes: (n bits / 8,), uint8.
        bits: 4, 3 or 2.
    """
    if bits == 4:
        return torch.stack([packed_codes >> 4, packed_codes & 15], dim=-1).view(-1)
    if bits == 2:
        return _separated(packed_codes, 2)
    low, high = packed_codes.split([len(packed_codes) // 3 * 2, len(packed_codes) // 3])
    return _separated(low, 2) | _separated(high, 1) << 2


def _interleaved(codes: Tensor, bits: int) -> Tensor:
    """One code of each of 8 / bits equal parts in every byte."""
    parts = codes.view(8 // bits, -1)
    result = parts[0].clone()
    for index, part in enumerate(parts[1:], 1):
        result |= part << bits * index
    return result


def _separated(packed_codes: Tensor, bits: int) -> Tensor:
    """The inverse of `_interleaved`."""
    parts = packed_codes.new_empty(8 // bits, len(packed_codes))
    for index, part in enumerate(parts):
        torch.bitwise_right_shift(packed_codes, bits * index, out=part)
        part &= (1 << bits) - 1
    return parts.view(-1)
