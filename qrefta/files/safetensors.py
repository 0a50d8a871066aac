"""A folder of safetensors files, read a few rows and written a few tensors at a time.

Files are read by position, not through a memory map: mapped pages count as resident, and opening a
file with the safetensors library maps it whole (a loop over rows of a 0.7 GB file then peaks at 0.7
GB; by position it peaks at the rows, and runs twice as fast). The exception is a model that runs
from its files (`Checkpoint.mapped`), any of whose modules may read any tensor.

The format is a length (8 bytes, little endian), a JSON header of names, dtypes, shapes and offsets,
and data. Files written here carry the checksums of `qrefta.files.checksums` in their header.
"""

import json
import math
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from qrefta.files.checksums import (
    KEY,
    PLACEHOLDER,
    Checksums,
    byte_view,
    tensor_checksum,
)
from qrefta.files.companions import COMPANIONS, companion_files
from qrefta.files.folders import sync_folder
from qrefta.files.json_file import check_regular, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {
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
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000
_LARGEST = (1 << 63) - 1  # size of a file or tensor
_COPY_BYTES = 16 << 20
_TOKEN_BYTES = 8  # of the names of files that are being written


class _Stored(NamedTuple):
    """Where a tensor lies in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def at(self, index: int) -> "_Stored":
        """The tensor number `index` along the first axis."""
        nbytes = self.nbytes // self.shape[0]
        return self._replace(
            shape=self.shape[1:], offset=self.offset + index * nbytes, nbytes=nbytes
        )


class _Header(NamedTuple):
    """The header of a file."""

    tensors: dict[str, _Stored]
    metadata: dict[str, str]


class _Entry(NamedTuple):
    """A tensor that is to be written."""

    dtype: torch.dtype
    shape: Sequence[int]
    nbytes: int
    chunks: Iterable[memoryview]


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
        self._tensors: dict[str, _Stored] = {}
        for file, names in _shards(folder).items():
            stored = _read_header(folder / file).tensors
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
            checkpoint._tensors |= _read_header(Path(file)).tensors
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
        `expert`, the rows are those of that expert's matrix in a fused tensor.
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

    def _chunks(self, stored: _Stored) -> Iterator[Tensor]:
        rows = stored.shape[0] if stored.shape else 1
        step = max(1, _COPY_BYTES * rows // max(stored.nbytes, 1))
        for first in range(0, rows, step):
            yield self._rows(stored, first, min(first + step, rows))

    def _rows(self, stored: _Stored, start: int, stop: int) -> Tensor:
        rest = stored.shape[1:]
        row_bytes = math.prod(rest) * stored.dtype.itemsize
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


def resolve_folder(source: str | Path, weights: bool = True, revision: str | None = None) -> Path:
    """A local folder as it is; for a hub name its snapshot, downloaded with or without weights.

    Args:
        source: a folder or hub name.
        weights: whether to download the weights too: the single file, or the files of the index.
        revision: of a hub name: branch, tag or commit; default: the newest.

    Raises:
        ValueError: if `source` is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download  # takes a fifth of a second

    try:
        small = [*COMPANIONS, "config.json", INDEX, "*.py"]
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=small))
        if weights:
            # The snapshot's name is its commit, in case the branch moves in between.
            indexed = read_index(folder).values() if (folder / INDEX).is_file() else []
            files = sorted({SINGLE, *indexed})
            snapshot_download(str(source), revision=folder.name, allow_patterns=files)
    except Exception as error:
        raise ValueError(
            f"{source} is neither a local folder nor a model that the hub gave ({error})."
        ) from error
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights.

    Raises:
        ValueError: if there are none, or the index is damaged.
    """
    return [folder / file for file in _shards(folder)]


def weights_bytes(folder: Path) -> int:
    """Bytes of the safetensors files directly in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def read_checksums(file: Path) -> Checksums | None:
    """The checksums in a file's header; None if it has none.

    Raises:
        ValueError: if the header is damaged.
    """
    metadata = _read_header(file).metadata
    if KEY not in metadata:
        return None
    try:
        return Checksums.parse(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); copy it again.") from error


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


def copy_companions(folder: Path, out: Path) -> None:
    """Copy the files that accompany a model's weights, such as the tokenizer; see
    `qrefta.files.companions`.
    """
    for file in companion_files(folder):
        copy = out / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors (on the CPU, contiguous) as one safetensors file: the whole file appears or
    none.

    Raises:
        OSError: if it cannot be written; the message says how much room it needs.
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
        for name, stored in _read_header(folder / file).tensors.items():
            weight_map[name] = file
            size += stored.nbytes
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    replace_text(folder / INDEX, json.dumps(index, indent=2))


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    data = text.encode()
    with _replacing(path, len(data)) as file:
        file.write(data)


def _write(path: Path, entries: dict[str, _Entry], known: Checksums) -> None:
    """Write a file in one pass; the checksums are filled in at the end, before the file gets its
    name.
    """
    nbytes = sum(entry.nbytes for entry in entries.values())
    with _replacing(path, nbytes) as file:
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
        offsets = [end, end + entry.nbytes]
        header[name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
        end += entry.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    return struct.pack("<Q", len(text)) + text


@contextmanager
def _replacing(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    """A file under a temporary name of this call alone; at the end it is synced and renamed."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(_TOKEN_BYTES)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"cannot write {path} ({nbytes / 1e6:.1f} MB): {error.strerror}"
        ) from error
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def clear_unfinished(folder: Path) -> None:
    """Remove the files that a killed process left in a folder under their temporary names.

    No other process may be writing to the folder.
    """
    for path in folder.glob("*." + "[0-9a-f]" * 2 * _TOKEN_BYTES + ".tmp"):
        path.unlink(missing_ok=True)


def _shards(folder: Path) -> dict[str, list[str] | None]:
    """File names, each with the tensors to take from it; None: all. As in transformers, one file
    goes before an index.
    """
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    if (folder / INDEX).is_file():
        return _indexed(folder)
    others = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none"
    raise ValueError(
        f"{folder} has neither {SINGLE} nor {INDEX} (.bin files: {others}); save the model with "
        "save_pretrained first, or load it and prepare it in memory."
    )


def read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor, by the folder's index.

    Raises:
        ValueError: if the index is damaged.
    """
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise ValueError(
            f"{folder / INDEX} is damaged: it has no weight_map of tensors and files; copy it "
            "again."
        )
    return weight_map


def _indexed(folder: Path) -> dict[str, list[str] | None]:
    names: dict[str, list[str]] = {}
    for name, file in read_index(folder).items():
        names.setdefault(file, []).append(name)
    for file in names:
        if Path(file).name != file:
            raise ValueError(
                f"{folder / INDEX} names {file!r}, which is outside its folder; it is refused."
            )
        if not os.path.isfile(folder / file):
            raise ValueError(
                f"{folder / INDEX} names {file}, which is missing; copy it into {folder}."
            )
    return dict(names)


def _read_header(file: Path) -> _Header:
    """A file's header, checked against its size: the tensors are all of its data, and no two
    overlap.
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
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise ValueError(
            f"{file} is damaged, truncated or unreadable ({error}); copy it again."
        ) from error
    return _Header(tensors, metadata)


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


def _check_offsets(tensors: Iterable[_Stored], start: int, size: int) -> None:
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


def _entry(file: Path, name: str, entry: dict[str, Any], data: int) -> _Stored:
    start, end = entry["data_offsets"]
    shape = entry["shape"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} is {entry['dtype']!r}; the dtypes read are {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(_is_size(n) for n in [*shape, start, end]):
        raise ValueError(f"{name} has the shape {shape!r} at {start!r} .. {end!r}")
    dtype = _DTYPES[entry["dtype"]]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - start} bytes for {shape} of {entry['dtype']}")
    return _Stored(file, dtype, tuple(shape), data + start, end - start)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST
