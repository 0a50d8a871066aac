"""Changes of the files of a checkpoint, byte by byte or value by value."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any


def weights_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(folder.glob("*.safetensors"))


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    """Write a safetensors file of a header, in any form, and data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def flip(path: Path, rng: random.Random, start: int = 0, stop: int | None = None) -> None:
    """One to three bits of a part of a file."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(start, len(data) if stop is None else stop)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    """Change the content of a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def replace_inside(content: Any, rng: random.Random, values: list[Any]) -> None:
    """One value somewhere in nested dicts and lists, or one key."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = rng.choice(keys)
        if isinstance(content[key], dict | list) and content[key] and rng.random() < 0.8:
            content = content[key]
        elif isinstance(content, dict) and rng.random() < 0.1:
            content[rng.choice(["", "zzz", "a" * 5000])] = content.pop(key)
            return
        else:
            content[key] = rng.choice(values)
            return


def edit_entry(
    folder: Path, rng: random.Random, change: Callable[[dict[str, Any], list[Any]], None]
) -> None:
    """Change the header's entry of one tensor, given all entries."""
    path = rng.choice(weights_of(folder))
    header, data = split(path)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    change(entry, list(header.values()))
    join(path, header, data)


def write_inside(
    folder: Path,
    rng: random.Random,
    fits: Callable[[str], bool],
    make: Callable[[int], tuple[int, bytes]],
) -> None:
    """Write bytes into the data of a tensor whose name fits; `make`: size -> place and bytes."""
    paths = [path for path in weights_of(folder) if any(map(fits, split(path)[0]))]
    path = rng.choice(paths)
    header, data = split(path)
    name = rng.choice([name for name in header if fits(name)])
    start, end = header[name]["data_offsets"]
    place, new = make(end - start)
    join(path, header, data[: start + place] + new + data[start + place + len(new) :])
