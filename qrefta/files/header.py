"""The header of a safetensors file: which tensors it holds, and where.

The format is a length (8 bytes, little endian), a JSON header of names, dtypes, shapes and offsets,
and data. Files written here carry the checksums of `qrefta.files.checksums` in their header.
"""

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qrefta.files.checksums import KEY, Checksums
from qrefta.files.json_file import check_regular

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000
_LARGEST = (1 << 63) - 1  # size of a file or tensor


class TensorLocation(NamedTuple):
    """Where a tensor lies in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def at(self, index: int) -> "TensorLocation":
        """The tensor number `index` along the first axis."""
        nbytes = self.nbytes // self.shape[0]
        return self._replace(
            shape=self.shape[1:], offset=self.offset + index * nbytes, nbytes=nbytes
        )


class DtypeError(ValueError):
    """A tensor that is whole, of a dtype that is not read or written here."""


class Header(NamedTuple):
    """The header of a file."""

    tensors: dict[str, TensorLocation]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """A file's header, checked against its size: the tensors are all of its data, and no two
    overlap.

    Raises:
        DtypeError: for a tensor whose dtype is not in DTYPES.
        ValueError: if the file is damaged.
    """
    check_regular(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8))[0]
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(opened.read(length).decode(), object_pairs_hook=_unique)
        metadata = _metadata(header)
        tensors = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
        _check_offsets(tensors.values(), 8 + length, size)
    except DtypeError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise ValueError(
            f"{file} is damaged, truncated or unreadable ({error}); copy it again."
        ) from error
    return Header(tensors, metadata)


def _metadata(header: Any) -> dict[str, str]:
    """The metadata, taken out of a header."""
    if not isinstance(header, dict):
        raise ValueError("a header that is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise ValueError("metadata that is no text by name")
    if KEY in metadata and metadata.get("format") != "pt":
        raise ValueError(f"the format {metadata.get('format')!r}, not 'pt'")
    return metadata


def _check_offsets(tensors: Iterable[TensorLocation], start: int, size: int) -> None:
    end = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            raise ValueError(f"a tensor at byte {tensor.offset}, but the next free byte is {end}")
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"{size} bytes, but its header describes {end}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; if two entries shared a name, one would go unseen."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name that is there twice")
    return content


def _entry(file: Path, name: str, entry: dict[str, Any], data: int) -> TensorLocation:
    start, end = entry["data_offsets"]
    shape = entry["shape"]
    if entry["dtype"] not in DTYPES:
        raise DtypeError(
            f"{name} in {file} has the dtype {entry['dtype']!r}; qrefta reads {', '.join(DTYPES)}. "
            "Convert the tensor, or leave it out of the file."
        )
    if not isinstance(shape, list) or not all(_is_size(n) for n in [*shape, start, end]):
        raise ValueError(f"{name} has the shape {shape!r} at {start!r} .. {end!r}")
    dtype = DTYPES[entry["dtype"]]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - start} bytes for {shape} of {entry['dtype']}")
    return TensorLocation(file, dtype, tuple(shape), data + start, end - start)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def read_checksums(file: Path) -> Checksums | None:
    """The checksums in a file's header; None if it has none.

    Raises:
        ValueError: if the header is damaged.
    """
    metadata = read_header(file).metadata
    if KEY not in metadata:
        return None
    try:
        return Checksums.parse(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); copy it again.") from error
