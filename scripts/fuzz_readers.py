"""Drive the readers of files with a coverage-guided fuzzer: any bytes are refused by a ValueError
or OSError, or read.

    pip install atheris                                    # no dependency of the project
    python scripts/fuzz_readers.py -max_total_time=600     # further arguments are libFuzzer's
    python scripts/fuzz_readers.py --rows eval/rows/fuzz.jsonl -max_total_time=600

The first byte chooses a reader: a safetensors file, an index, checksums in a header, settings, or
config.json. safetensors itself must take every file that our reader takes, with the same bytes in
every tensor.
"""

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(
    include=["qrefta.files", "qrefta.config", "qrefta.hf_config", "qrefta.model.config_file"]
):
    from qrefta.files.checksums import KEY, Checksums
    from qrefta.files.layout import INDEX, SINGLE
    from qrefta.files.safetensors import Checkpoint
    from qrefta.files.shards import write_shard
    from qrefta.files.verify import check_saved, write_checksums
    from qrefta.hf_config import QReftaConfig
    from qrefta.model.config_file import read_config

import safetensors.torch
import torch

REFUSED = (ValueError, OSError)


def weights(folder: Path, data: bytes) -> None:
    """A safetensors file, of any bytes, or with any bytes as its header."""
    if data[:1] == b"h":
        data = struct.pack("<Q", len(data) - 1) + data[1:] + b"\0" * 24
    (folder / SINGLE).write_bytes(data)
    checkpoint = Checkpoint(folder)
    found = {name: checkpoint.read(name) for name in checkpoint.names}
    says = safetensors.torch.load(data)
    assert found.keys() == says.keys()
    for name, tensor in found.items():
        assert tensor.dtype == says[name].dtype
        assert tensor.shape == says[name].shape
        own, other = (one.reshape(-1).view(torch.uint8) for one in (tensor, says[name]))
        assert torch.equal(own, other)


def index(folder: Path, data: bytes) -> None:
    safetensors.torch.save_file(
        {"a": torch.zeros(3), "b": torch.ones(2, 2)}, folder / "part.safetensors"
    )
    (folder / INDEX).write_bytes(data)
    checkpoint = Checkpoint(folder)
    assert {checkpoint.file(name) for name in checkpoint.names} <= {folder / "part.safetensors"}


def checksums(folder: Path, data: bytes) -> None:
    """Checksums of any text do not make another tensor pass."""
    (folder / "config.json").write_text("{}")
    write_shard(folder / SINGLE, {"a": torch.zeros(3)})
    write_checksums(folder)
    text = data.decode(errors="replace")
    safetensors.torch.save_file(
        {"a": torch.ones(3)}, folder / SINGLE, metadata={"format": "pt", KEY: text}
    )
    check_saved([folder / SINGLE], 2)
    assert Checksums.parse(text).tensors["a"] in (None, Checkpoint(folder).checksum("a"))


def settings(folder: Path, data: bytes) -> None:
    content = json.loads(data)
    if isinstance(content, dict) and all(isinstance(name, str) for name in content):
        json.dumps(QReftaConfig.from_dict(content).to_dict())


def config(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_bytes(data)
    read_config(folder)


READERS = [weights, index, checksums, settings, config]


def one_input(data: bytes) -> None:
    if not data:
        return
    with tempfile.TemporaryDirectory(dir=HOME) as folder:
        try:
            READERS[data[0] % len(READERS)](Path(folder), data[1:])
        except REFUSED:
            pass
        except RecursionError:  # of json.loads in here, not of a reader
            if data[0] % len(READERS) != READERS.index(settings):
                raise


def seeds() -> list[bytes]:
    """A good input for every reader."""
    row = {
        "stack": "layer.*.query",
        "modules": ["layer.0.query"],
        "transposed": False,
        "layers": 1,
        "shape": [4, 4],
        "rank": 2,
        "slice_ranks": [2],
        "transform": "lsm3",
        "quant_type": "nf4",
        "baseline_error": 1.0,
        "residual_error": 0.5,
        "ratio": 0.5,
        "principal_energy": 0.5,
        "bytes": 100,
        "bits_per_weight": 5.0,
    }
    good = QReftaConfig(rank=2, stacks=[row]).to_dict()
    file = safetensors.torch.save(
        {"a": torch.zeros(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, {"format": "pt"}
    )
    length = struct.unpack("<Q", file[:8])[0]
    entry = {
        "bytes": 2,
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    }
    return [
        b"\0" + file,
        b"\0h" + file[8 : 8 + length],
        b"\1" + json.dumps({"metadata": {}, "weight_map": {"a": "part.safetensors"}}).encode(),
        b"\2" + json.dumps({"format": 1, "files": {"config.json": entry, SINGLE: entry}}).encode(),
        b"\3" + json.dumps(good).encode(),
        b"\4"
        + json.dumps(
            {"architectures": ["X"], "num_hidden_layers": 2, "quantization_config": good}
        ).encode(),
    ]


def fuzz(arguments: list[str]) -> None:
    """The fuzzer ends the process."""
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(seeds()):
            Path(corpus, str(number)).write_bytes(seed)
        atheris.Setup([sys.argv[0], corpus, *arguments], one_input)
        atheris.Fuzz()


def counted(arguments: list[str]) -> dict[str, Any]:
    """The row that a process writes when it stops fuzzing."""
    command = [sys.executable, __file__, *arguments, "-print_final_stats=1"]
    start = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as child:
        lines = []
        for line in child.stderr:
            sys.stderr.write(line)
            lines.append(line)
    said = "".join(lines)
    found = {
        "runs": r"stat::number_of_executed_units:\s+(\d+)",
        "covered_edges": r"cov: (\d+)",
        "peak_mb": r"stat::peak_rss_mb:\s+(\d+)",
    }
    numbers = {name: int((re.findall(pattern, said) or [0])[-1]) for name, pattern in found.items()}
    findings = len(re.findall("^SUMMARY: ", said, re.MULTILINE))
    return {
        "study": "fuzz",
        **numbers,
        "seconds": round(time.monotonic() - start),
        "findings": findings,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    HOME = "/dev/shm" if os.path.isdir("/dev/shm") else None  # files in memory: many a second
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, help="file to add a row to")
    own, further = parser.parse_known_args()
    if own.rows is None:
        fuzz(further)
    else:
        sys.path.insert(
            0, str(Path(__file__).parents[1])
        )  # eval/ is not part of the installed package
        from eval.rows import append

        append(own.rows, [counted(further)], seed=0)
