"""Safetensors files, written a few tensors at a time, each with checksums in its header."""

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from qrefta.files.checksums import PLACEHOLDER, Checksums, byte_view, tensor_checksum
from qrefta.files.header import DTYPES, NAMES, DtypeError, read_header
from qrefta.files.layout import INDEX
from qrefta.files.safetensors import Checkpoint
from qrefta.files.whole_file import replace_text, replacing


class _Entry(NamedTuple):
    """A tensor that is to be written."""

    dtype: torch.dtype
    shape: Sequence[int]
    nbytes: int
    chunks: Iterable[memoryview]


class ShardWriter:
    """Safetensors files, each written as soon as it is full; names are `stem` and a number.

    The tensors of a file take at most `part_bytes`; a larger tensor gets a file to itself.
    """

    def __init__(self, folder: Path, stem: str, part_bytes: int) -> None:
        self.folder = folder
        self.stem = stem
        self.part_bytes = part_bytes
        self.tensors: dict[str, Tensor] = {}
        self.nbytes = 0
        self.files: list[str] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self.tensors and self.nbytes + tensor.nbytes > self.part_bytes:
            self._flush()
        self.tensors[name] = tensor.detach().to("cpu").contiguous()
        self.nbytes += tensor.nbytes
        if self.nbytes >= self.part_bytes:
            self._flush()

    def close(self) -> list[str]:
        """Write the tensors that are left; the names of all files."""
        if self.tensors:
            self._flush()
        return self.files

    def _flush(self) -> None:
        self.files.append(f"{self.stem}{len(self.files):04d}.safetensors")
        write_shard(self.folder / self.files[-1], self.tensors)
        self.tensors = {}
        self.nbytes = 0


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors (on the CPU, contiguous) as one safetensors file: the whole file appears or
    none.

    Raises:
        OSError: if it cannot be written; the message says how much room it needs.
        DtypeError: if the format cannot hold a tensor's dtype.
    """
    entries = {
        name: _Entry(tensor.dtype, tensor.shape, tensor.nbytes, [byte_view(tensor)])
        for name, tensor in tensors.items()
    }
    _write(path, entries, Checksums({}))


def copy_shard(
    path: Path, checkpoint: Checkpoint, names: list[str], known: Checksums | None = None
) -> None:
    """Write tensors of a checkpoint, as they are and by their names, as one file, a chunk at a
    time.

    Args:
        path: file to write.
        checkpoint: read from.
        names: of the tensors, in order.
        known: further checksums that the header is to hold: of config.json, and of tensors in other
            files.
    """
    entries = {
        name: _Entry(
            checkpoint.dtype(name),
            checkpoint.shape(name),
            checkpoint.nbytes(name),
            checkpoint.bytes_of(name),
        )
        for name in names
    }
    _write(path, entries, known or Checksums({}))


def write_index(folder: Path, files: list[str]) -> None:
    """Write the index of a folder's shards, by which transformers finds them."""
    size = 0
    weight_map = {}
    for file in files:
        for name, stored in read_header(folder / file).tensors.items():
            weight_map[name] = file
            size += stored.nbytes
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    replace_text(folder / INDEX, json.dumps(index, indent=2))


def _write(path: Path, entries: dict[str, _Entry], known: Checksums) -> None:
    """Write a file in one pass; the checksums are filled in at the end, before the file gets its
    name.
    """
    nbytes = sum(entry.nbytes for entry in entries.values())
    with replacing(path, nbytes) as file:
        file.write(_header_bytes(entries, dict.fromkeys(entries, PLACEHOLDER), known))
        checksums = {}
        for name, entry in entries.items():
            chunks = _written(file, entry.chunks)
            checksums[name] = tensor_checksum(entry.dtype, entry.shape, chunks)
        file.seek(0)
        file.write(_header_bytes(entries, checksums, known))


def _written(file: BinaryIO, chunks: Iterable[memoryview]) -> Iterator[memoryview]:
    for chunk in chunks:
        file.write(chunk)
        yield chunk


def _header_bytes(entries: dict[str, _Entry], checksums: dict[str, str], known: Checksums) -> bytes:
    """The length and the header; as long for every value of the checksums."""
    tensors = {**known.tensors, **checksums}
    metadata = {"format": "pt"} | Checksums(tensors, known.config).metadata()
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, entry in entries.items():
        if entry.dtype not in NAMES:
            raise DtypeError(
                f"{name} has the dtype {entry.dtype}, which safetensors files do not hold here; "
                f"they hold {', '.join(DTYPES)}."
            )
        offsets = [end, end + entry.nbytes]
        header[name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
        end += entry.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    return struct.pack("<Q", len(text)) + text
