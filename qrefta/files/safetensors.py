"""The tensors of safetensors files, read a few rows at a time.

Files are read by position, not through a memory map: mapped pages count as resident, and opening a
file with the safetensors library maps it whole (a loop over rows of a 0.7 GB file then peaks at 0.7
GB; by position it peaks at the rows, and runs twice as fast). The exception is a model that runs
from its files (`Checkpoint.mapped`), any of whose modules may read any tensor.
"""

from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from qrefta.files.checksums import byte_view, tensor_checksum
from qrefta.files.header import TensorLocation, read_header
from qrefta.files.layout import INDEX, shards_of

_COPY_BYTES = 16 << 20


class Part(NamedTuple):
    """A matrix in a checkpoint: a whole tensor, the matrix of one expert in a fused tensor, or some
    rows of a tensor (start, stop).
    """

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


class Checkpoint:
    """The tensors of a folder with `model.safetensors`, or with shards and an index. Nothing is
    kept in memory.

    Raises:
        ValueError: if there are no safetensors files, or the index or a shard is damaged or
            missing.
    """

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, TensorLocation] = {}
        for file, names in shards_of(folder).items():
            stored = read_header(folder / file).tensors
            missing = [name for name in names or [] if name not in stored]
            if missing:
                raise ValueError(
                    f"{folder / file} has no tensor {missing[0]}, but {INDEX} lists it there; "
                    "copy the file again."
                )
            self._tensors |= stored if names is None else {name: stored[name] for name in names}

    @classmethod
    def of_files(cls, files: Iterable[str | Path]) -> Self:
        """All tensors of some safetensors files; where two share a name, the later."""
        checkpoint = cls.__new__(cls)
        checkpoint._tensors = {}
        for file in files:
            checkpoint._tensors |= read_header(Path(file)).tensors
        return checkpoint

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def file(self, name: str) -> Path:
        return self._tensors[name].file

    def nbytes(self, name: str) -> int:
        return self._tensors[name].nbytes

    def fingerprint(self) -> list[list[Any]]:
        """Names, sizes and times of the files: they change if a file is replaced."""
        files = sorted({stored.file for stored in self._tensors.values()})
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def matrix_shape(self, part: Part) -> tuple[int, ...]:
        """Rows and columns as stored."""
        shape = self.shape(part.name)[-2:]
        if part.rows is None:
            return shape
        start, stop = part.rows
        return (stop - start, *shape[1:])

    def read_parts(self, parts: list[Part], start: int, stop: int, columns: bool = False) -> Tensor:
        """Rows `start` .. `stop` of matrices that follow one another; with `columns`, of their
        transposes.
        """
        pieces = []
        first = 0
        for part in parts:
            height = self.matrix_shape(part)[columns]
            low = max(start - first, 0)
            high = min(stop - first, height)
            if low < high:
                above = 0 if part.rows is None else part.rows[0]
                piece = self.read(part.name, low + above, high + above, columns, part.expert)
                pieces.append(piece)
            first += height
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        columns: bool = False,
        expert: int | None = None,
    ) -> Tensor:
        """Rows `start` .. `stop` of a tensor as stored; with `columns`, of its transpose (matrices
        only).

        Columns are strided in the file, so they are picked from chunks of whole rows. With
        `expert`, the rows are counted in that expert's matrix of a fused tensor.
        """
        stored = self._tensors[name] if expert is None else self._tensors[name].at(expert)
        if columns:
            chunks = [rows[:, start:stop] for rows in self._chunks(stored)]
            return torch.cat(chunks).T.contiguous()
        if not stored.shape:
            return self._rows(stored, 0, 1).view(())
        return self._rows(stored, start, stored.shape[0] if stop is None else stop)

    def mapped(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name whose pages are read from their files as they are used.

        The system may drop the pages again, so the tensors take no memory that others need. A
        change of a tensor stays in memory and does not reach its file.
        """
        tensors: dict[str, Tensor] = {}
        maps: dict[Path, np.memmap] = {}
        for name in names:
            stored = self._tensors[name]
            if stored.offset % stored.dtype.itemsize or not stored.nbytes:
                tensors[name] = self.read(name)  # torch has no views of unaligned bytes
                continue
            if stored.file not in maps:
                maps[stored.file] = np.memmap(stored.file, mode="c")  # a change copies its page
            data = maps[stored.file][stored.offset : stored.offset + stored.nbytes]
            tensors[name] = torch.from_numpy(data).view(stored.dtype).view(stored.shape)
        return tensors

    def bytes_of(self, name: str) -> Iterator[memoryview]:
        """A tensor's bytes, a chunk at a time."""
        stored = self._tensors[name]
        if stored.nbytes:
            for rows in self._chunks(stored):
                yield byte_view(rows)

    def checksum(self, name: str) -> str:
        """The checksum of a tensor's dtype, shape and bytes, in one pass over them."""
        return tensor_checksum(self.dtype(name), self.shape(name), self.bytes_of(name))

    def _chunks(self, stored: TensorLocation) -> Iterator[Tensor]:
        rows = stored.shape[0] if stored.shape else 1
        step = max(1, _COPY_BYTES * rows // max(stored.nbytes, 1))
        for first in range(0, rows, step):
            yield self._rows(stored, first, min(first + step, rows))

    def _rows(self, stored: TensorLocation, start: int, stop: int) -> Tensor:
        rest = stored.shape[1:]
        row_bytes = prod(rest) * stored.dtype.itemsize
        buffer = torch.empty(stop - start, *rest, dtype=stored.dtype)
        if buffer.nbytes:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(stored.offset + start * row_bytes)
                left = byte_view(buffer)
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise ValueError(f"{stored.file} is truncated; copy it again.")
                    left = left[count:]
        return buffer
