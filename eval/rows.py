"""Rows of measurements: one JSON object per line, with the context to measure it again."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import qrefta

SCHEMA = 1
PACKAGES = ("torch", "transformers", "bitsandbytes", "accelerate", "datasets", "peft")


def context(seed: int, device: str | None = None) -> dict[str, Any]:
    """Command, commit, versions, device, threads and seed of a measurement.

    Packages that are not installed have no version. In a copy without a git repository the commit
    is the environment's QREFTA_COMMIT.

    Args:
        seed: of random numbers.
        device: cpu or cuda; default: cuda, on a machine without it cpu.
    """
    cuda = (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    versions = {name: _version(name) for name in PACKAGES}
    shared = {
        "schema": SCHEMA,
        "command": _command(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {"qrefta": qrefta.__version__}
        | {name: found for name, found in versions.items() if found is not None},
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "seed": seed,
    }
    if cuda:
        shared |= {"cuda": torch.version.cuda, "driver": _driver()}
    return shared


def append(
    path: Path, rows: Iterable[dict[str, Any]], seed: int, device: str | None = None
) -> None:
    """Add rows with their context to a file; an unfinished last line is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shared = context(seed, device)
    lines = "".join(json.dumps(shared | row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("ab+") as file:
        file.seek(0)
        data = file.read()
        if len(data) > _whole(data):
            file.truncate(_whole(data))
        elif data and not data.endswith(b"\n"):
            lines = "\n" + lines
        file.write(lines.encode())


def read(path: Path) -> list[dict[str, Any]]:
    """All rows of a file, without an unfinished last line of a killed run.

    Raises:
        ValueError: if a line is not a row of this schema.
    """
    rows = []
    data = path.read_bytes()
    for number, line in enumerate(
        data[: _whole(data)].removesuffix(b"\n").split(b"\n") if data else [], start=1
    ):
        try:
            row = json.loads(line)
        except ValueError as error:  # includes bytes that are not UTF-8
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}); correct or delete it."
            ) from error
        if not isinstance(row, dict) or row.get("schema") != SCHEMA:
            version_found = row.get("schema") if isinstance(row, dict) else row
            raise ValueError(
                f"{path}, line {number}: schema {version_found!r}; this version reads {SCHEMA}."
            )
        rows.append(row)
    return rows


def _whole(data: bytes) -> int:
    """Bytes of the complete lines; a last line without a line break counts if it is valid JSON."""
    end = data.rfind(b"\n") + 1
    try:
        json.loads(data[end:])
    except ValueError:
        return end
    return len(data)


def find(rows: list[dict[str, Any]], key: dict[str, Any]) -> dict[str, Any] | None:
    """The last row with these values, or None."""
    return next((row for row in reversed(rows) if key.items() <= row.items()), None)


def _command() -> str:
    """The command line of this process, as it is typed in the repository's folder."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        program = ["python", os.path.relpath(sys.argv[0], Path(__file__).parents[1])]
    else:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    return shlex.join([*program, *sys.argv[1:]])


def _commit() -> str:
    """Short hash of HEAD, with + if tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("QREFTA_COMMIT", "unknown")
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _version(name: str) -> str | None:
    """The version of a package, if it is installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver() -> str:
    """The version of the driver of the first GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told.split("\n")[0].strip()


def _processor() -> str:
    """The name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
