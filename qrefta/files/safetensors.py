"""A folder of safetensors shards, read a few rows and written a few tensors at a time.

Files are read by position, not through a memory map: mapped pages count as resident, and opening a shard with the
library maps it whole (a loop over rows of a 0.7 GB file then peaks at 0.7 GB; by position at the rows, and twice as
fast). The format is a length (8 bytes, little endian), a JSON header of names, dtypes, shapes and offsets, and data.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000
_LARGEST = (1 << 63) - 1  # that a size may be
_COPY_BYTES = 16 << 20
_KEPT_BACK = ("config.json", "adapter_config.json", "qrefta_sha256.json", "qrefta_unfinished.json")
_COMPANIONS = [
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
]  # of the weights: tokenizer, generation settings
_FILES = ["*.safetensors", *_COMPANIONS, "LICENSE*"]


class _Stored(NamedTuple):
    """Where a tensor lies in a shard."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def at(self, index: int) -> "_Stored":
        """One of the tensors that it holds along its first axis."""
        nbytes = self.nbytes // self.shape[0]
        return self._replace(
            shape=self.shape[1:], offset=self.offset + index * nbytes, nbytes=nbytes
        )


class Part(NamedTuple):
    """A matrix in a checkpoint: a whole tensor, or that of one expert in a fused one."""

    name: str
    expert: int | None = None


class Checkpoint:
    """The tensors of a folder with `model.safetensors`, or with shards and an index. Nothing is kept in memory.

    Raises:
        ValueError: if there are no safetensors files, the index or a shard is damaged, or one is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, _Stored] = {}
        for file, names in _shards(folder).items():
            stored = _read_header(folder / file)
            missing = [name for name in names or [] if name not in stored]
            if missing:
                raise ValueError(
                    f"{folder / file} lacks {missing[0]}, which {INDEX} says it holds; copy it again."
                )
            self._tensors |= stored if names is None else {name: stored[name] for name in names}

    @classmethod
    def of_files(cls, files: Iterable[str | Path]) -> "Checkpoint":
        """All tensors of some safetensors files; of two with one name the later."""
        self = cls.__new__(cls)
        self._tensors = {
            name: stored for file in files for name, stored in _read_header(Path(file)).items()
        }
        return self

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
        """What changes if a file of the checkpoint is replaced: names, sizes and times of its shards."""
        files = sorted({stored.file for stored in self._tensors.values()})
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def matrix_shape(self, part: Part) -> tuple[int, ...]:
        """Rows and columns as stored."""
        return self.shape(part.name)[-2:]

    def read_parts(self, parts: list[Part], start: int, stop: int, columns: bool = False) -> Tensor:
        """Rows `start` .. `stop` of matrices that follow one another; with `columns` those of their transposes."""
        found, first = [], 0
        for part in parts:
            height = self.matrix_shape(part)[columns]
            low, high = max(start - first, 0), min(stop - first, height)
            if low < high:
                found.append(self.read(part.name, low, high, columns, part.expert))
            first += height
        return found[0] if len(found) == 1 else torch.cat(found)

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        columns: bool = False,
        expert: int | None = None,
    ) -> Tensor:
        """Rows `start` .. `stop` of a tensor as stored; with `columns` those of its transpose (of a matrix).

        Columns are strided in the file: they are picked from chunks of whole rows. Of a fused tensor, with `expert`,
        those of one expert's matrix.
        """
        stored = self._tensors[name] if expert is None else self._tensors[name].at(expert)
        if columns:
            chunks = (rows[:, start:stop] for rows in self._chunks(stored))
            return torch.cat(list(chunks)).T.contiguous()
        if not stored.shape:
            return self._rows(stored, 0, 1).view(())
        return self._rows(stored, start, stored.shape[0] if stop is None else stop)

    def bytes_of(self, name: str) -> Iterator[memoryview]:
        """A tensor's bytes, a chunk at a time."""
        stored = self._tensors[name]
        if stored.nbytes:
            yield from (_view(rows) for rows in self._chunks(stored))

    def _chunks(self, stored: _Stored) -> Iterator[Tensor]:
        rows = stored.shape[0] if stored.shape else 1
        step = max(1, _COPY_BYTES * rows // max(stored.nbytes, 1))
        return (
            self._rows(stored, first, min(first + step, rows)) for first in range(0, rows, step)
        )

    def _rows(self, stored: _Stored, start: int, stop: int) -> Tensor:
        rest = stored.shape[1:]
        row_bytes = math.prod(rest) * stored.dtype.itemsize
        buffer = torch.empty(stop - start, *rest, dtype=stored.dtype)
        if buffer.nbytes:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(stored.offset + start * row_bytes)
                left = _view(buffer)
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise ValueError(f"{stored.file} is truncated; copy it again.")
                    left = left[count:]
        return buffer


def resolve_folder(source: str | Path, weights: bool = True) -> Path:
    """A local folder as it is; the snapshot of a hub name, downloaded, with or without its weights.

    Raises:
        ValueError: if it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(
            snapshot_download(str(source), allow_patterns=_FILES if weights else _COMPANIONS)
        )
    except Exception as error:
        raise ValueError(
            f"{source} is neither a local folder nor a model that the hub gave ({error})."
        ) from error


class ShardWriter:
    """Safetensors files of about `part_bytes`, each written as soon as it is full; names are `stem` and a number."""

    def __init__(self, folder: Path, stem: str, part_bytes: int) -> None:
        self.folder, self.stem, self.part_bytes = folder, stem, part_bytes
        self.tensors: dict[str, Tensor] = {}
        self.nbytes = 0
        self.files: list[str] = []

    def add(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor.detach().to("cpu").contiguous()
        self.nbytes += self.tensors[name].nbytes
        if self.nbytes >= self.part_bytes:
            self._flush()

    def close(self) -> list[str]:
        """Write what is left; the names of all files."""
        if self.tensors:
            self._flush()
        return self.files

    def _flush(self) -> None:
        self.files.append(f"{self.stem}{len(self.files):04d}.safetensors")
        write_shard(self.folder / self.files[-1], self.tensors)
        self.tensors, self.nbytes = {}, 0


def copy_companions(folder: Path, out: Path) -> None:
    """Copy what lies beside a model's weights, but for its config, index and digests: the tokenizer, for one."""
    for file in sorted(
        path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()
    ):
        if file.name not in _KEPT_BACK and ".index." not in file.name:
            shutil.copyfile(file, out / file.name)


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors (on the CPU, contiguous) as one safetensors file: the whole file appears or none.

    Raises:
        OSError: if it cannot be written; the message says what was needed.
    """
    _write(
        path,
        {name: (_NAMES[t.dtype], t.shape, t.nbytes, [_view(t)]) for name, t in tensors.items()},
    )


def copy_shard(path: Path, checkpoint: Checkpoint, names: list[str]) -> None:
    """Write tensors of a checkpoint, as they are and by their names, as one file, a chunk at a time."""
    entries = {}
    for name in names:
        dtype = _NAMES[checkpoint.dtype(name)]
        entries[name] = (
            dtype,
            checkpoint.shape(name),
            checkpoint.nbytes(name),
            checkpoint.bytes_of(name),
        )
    _write(path, entries)


def write_index(folder: Path, files: list[str]) -> None:
    """Write the index of a folder's shards, which makes transformers find them."""
    stored = {file: _read_header(folder / file) for file in files}
    size = sum(tensor.nbytes for tensors in stored.values() for tensor in tensors.values())
    names = {name: file for file, tensors in stored.items() for name in tensors}
    replace_text(
        folder / INDEX,
        json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=2),
    )


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    _replace(path, [text.encode()])


def _write(
    path: Path, entries: dict[str, tuple[str, Iterable[int], int, Iterable[memoryview]]]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, nbytes, _) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    chunks = (chunk for *_, data in entries.values() for chunk in data)
    _replace(path, [struct.pack("<Q", len(text)), text], chunks, end)


def _replace(
    path: Path, start: list[bytes], chunks: Iterable[memoryview] = (), nbytes: int = 0
) -> None:
    """Write to a temporary name, sync, rename, sync the folder."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # a link of that name would be written through
    try:
        with temporary.open("xb") as file:
            for chunk in chain(start, chunks):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"cannot write {path} ({nbytes / 1e6:.1f} MB): {error.strerror}"
        ) from error
    sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: if it is no regular file, no JSON, or nested beyond what can be read.
    """
    _check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged or unreadable ({error}); copy it again from where it was saved."
        ) from error


def _check_regular(path: Path) -> None:
    """Refuse a pipe or device, which would be read for ever; a link to a file is one (hub caches are made of them)."""
    if not os.path.isfile(path):
        raise ValueError(
            f"{path} is missing, or a pipe, device or folder; copy or save it again as a file."
        )


def sync_folder(folder: Path) -> None:
    """Wait until a folder's entries, new names among them, are on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _shards(folder: Path) -> dict[str, list[str] | None]:
    """File names, each with the tensors to take from it; None: all. One file goes before an index, as elsewhere."""
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise ValueError(
                f"{folder / INDEX} is damaged: it has no weight_map of tensors and files; copy it again."
            )
        found: dict[str, list[str] | None] = {}
        for name, file in weight_map.items():
            found.setdefault(file, []).append(name)
        for file in found:
            if Path(file).name != file:
                raise ValueError(
                    f"{folder / INDEX} names {file!r}, which is outside its folder; it is refused."
                )
            if not os.path.isfile(folder / file):
                raise ValueError(
                    f"{folder / INDEX} names {file}, which is missing; copy it into {folder}."
                )
        return found
    others = ", ".join(sorted(path.name for path in folder.glob("*.bin"))) or "none"
    raise ValueError(
        f"{folder} has neither {SINGLE} nor {INDEX} (.bin files: {others}); save the model with save_pretrained first, "
        "or load it and prepare it in memory."
    )


def _read_header(file: Path) -> dict[str, _Stored]:
    """The tensors of a shard, checked against its size: together they are all of its data, and no two overlap."""
    _check_regular(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = struct.unpack("<Q", opened.read(8))[0]
            if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(opened.read(length).decode(), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("a header that is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(text, str) for text in metadata.values()
        ):
            raise ValueError("metadata that is no text by name")
        stored = {name: _entry(file, name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for tensor in sorted(stored.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
            if tensor.offset != end:
                raise ValueError(f"a tensor at byte {tensor.offset}, where byte {end} is the next")
            end += tensor.nbytes
        if end != size:
            raise ValueError(f"{size} bytes, where its header tells of {end}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise ValueError(
            f"{file} is damaged, truncated or unreadable ({error}); copy it again."
        ) from error
    return stored


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; two of one name would leave one of them unseen."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name that is there twice")
    return found


def _entry(file: Path, name: str, entry: dict[str, Any], data: int) -> _Stored:
    (start, end), shape = entry["data_offsets"], entry["shape"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} is {entry['dtype']!r}; what is read are {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not all(
        type(n) is int and 0 <= n <= _LARGEST for n in [*shape, start, end]
    ):
        raise ValueError(f"{name} has the shape {shape!r} at {start!r} .. {end!r}")
    dtype = _DTYPES[entry["dtype"]]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - start} bytes for {shape} of {entry['dtype']}")
    return _Stored(file, dtype, tuple(shape), data + start, end - start)


def _view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
