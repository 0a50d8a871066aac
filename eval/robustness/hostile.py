"""python -m eval.robustness.hostile: damaged and hostile checkpoints, thousands of them, read in
processes with limits.

Each mutant is a copy of a tiny checkpoint with one thing wrong (`eval.robustness.damage`). A
prepared folder is read by `qrefta.load` and by `from_pretrained`, with its checksums kept as they
were (damage), removed (an older folder) or written again (malice); a dense folder by
`qrefta.prepare_checkpoint`. The outcomes:

- refused: a ValueError or OSError of ours;
- by_transformers: an error of transformers', before the plug-in is asked;
- identical: the model that was saved, bit for bit;
- as_written: other tensors or settings, and the files say so (safetensors' reader is the witness).
  Nothing can tell such a file from a good one without checksums; with them it must not happen;
- unclear: another exception; a fault except in `from_pretrained`, where transformers reads
  config.json before the plug-in is asked;
- differs (from what the files say, or from what was saved although the checksums were kept),
  crashed, hung, memory (over 2 GB), wrote (outside of its folder): faults.
"""

import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
)

import qrefta
from eval.memory import peak, resident, restart_peak
from eval.robustness.damage import MUTATIONS, PREPARED_ONLY
from eval.robustness.file_edits import edit_json, join, split, weights_of
from eval.rows import append, find, read
from qrefta.cli import guarded, quiet_libraries
from qrefta.files.checksums import KEY
from qrefta.files.layout import SINGLE
from qrefta.files.safetensors import Checkpoint
from qrefta.files.verify import write_checksums

READERS = ("load", "from_pretrained", "prepare")
STATES = ("kept", "removed", "rewritten")  # of the checksums
FAULTS = ("unclear", "differs", "crashed", "hung", "memory", "wrote")
GOOD: dict[Path, tuple[dict[str, Tensor], str]] = {}  # what each prepared folder holds
OUTCOMES = ("refused", "by_transformers", "identical", "as_written", *FAULTS)
# Limits of one mutant, beyond what the process held before.
LIMIT_S = 20
LIMIT_BYTES = 2 << 30
ADDRESS_BYTES = 8 << 30
_LINE = 32  # bytes that a mutant's process reports
console = Console()


def make_bases(root: Path) -> None:
    """The good folders, in `root`/bases: prepared ones, one file and shards, and dense ones."""
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=3,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = BertForSequenceClassification(config)
        other = BertForSequenceClassification(config)
    for name, options in {"one file": {}, "shards": {"max_shard_size": "15KB"}}.items():
        dense.save_pretrained(root / "bases" / f"dense, {name}", **options)
        model = BertForSequenceClassification.from_pretrained(
            root / "bases" / f"dense, {name}", dtype=torch.float32
        )
        qrefta.prepare(model, rank=3, refine=0, double_quant=name == "shards", progress=False)
        model.save_pretrained(root / "bases" / f"prepared, {name}", **options)
    qrefta.prepare(other, rank=3, refine=0, progress=False).save_pretrained(
        root / "bases" / "other"
    )
    for base in (root / "bases").glob("prepared*"):
        model = qrefta.load(base)
        GOOD[base] = model.state_dict(), _settings_of(model)
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy every page


def _settings_of(model: PreTrainedModel) -> str:
    """Without `auto_map`, which checksums leave out: it only names code, and no code has run."""
    left_out = ("_name_or_path", "auto_map")
    return json.dumps(
        {key: value for key, value in model.config.to_dict().items() if key not in left_out}
    )


def mutate(root: Path, reader: str, kind: str, state: str, seed: int) -> tuple[Path, Path]:
    """A mutant's folder and the good one that it is made of."""
    rng = random.Random(f"{kind} {seed}")
    layout = rng.choice(["one file", "shards"])
    base = root / "bases" / f"{'dense' if reader == 'prepare' else 'prepared'}, {layout}"
    home = root / "mutant"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    folder = Path(shutil.copytree(base, home / "model"))
    MUTATIONS[kind](folder, rng)
    if state == "removed":
        _strip(folder)
    elif state == "rewritten":
        _rewrite(folder)
    return folder, base


def _rewrite(folder: Path) -> None:
    """As one would who means harm; not over files that cannot be read, or only in hours."""
    files = [folder / "config.json", *weights_of(folder)]
    if all(path.is_file() and path.stat().st_size < 1 << 30 for path in files):
        with suppress(ValueError, OSError, AttributeError, RecursionError):
            write_checksums(folder)


def _strip(folder: Path) -> None:
    """Make of it a folder of format version 1 without a list, as far as its files can be read."""
    for path in weights_of(folder):
        with suppress(
            ValueError, OSError, AttributeError, TypeError, KeyError, RecursionError, struct.error
        ):
            if path.is_file() and path.stat().st_size < 1 << 30:
                header, data = split(path)
                del header["__metadata__"][KEY]
                join(path, header, data)
    with suppress(ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError):
        if (folder / "config.json").is_file():
            edit_json(folder / "config.json", _older)


def _older(config: Any) -> None:
    config["quantization_config"]["format_version"] = 1


def outcome(folder: Path, base: Path, reader: str, state: str) -> str:
    """Read a mutant; one of `OUTCOMES`."""
    try:
        if reader == "prepare":
            out = folder.parent / "out"
            qrefta.prepare_checkpoint(
                folder, out, rank=1, refine=0, transform="dct", progress=False
            )
            return _compared_source(folder, base, out)
        load = (
            qrefta.load if reader == "load" else AutoModelForSequenceClassification.from_pretrained
        )
        return _compared(load(folder), folder, base, state)
    except (MemoryError, torch.OutOfMemoryError):
        return "memory"
    except Exception as error:
        if "allocate memory" in str(error):
            return "memory"
        if not isinstance(error, ValueError | OSError):
            print(f"unclear: {type(error).__name__}: {error}"[:300], file=sys.stderr)
            return "unclear"
        trace = error.__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        ours = Path(trace.tb_frame.f_code.co_filename).is_relative_to(Path(qrefta.__file__).parent)
        return "refused" if ours else "by_transformers"


def _compared(model: PreTrainedModel, folder: Path, base: Path, state: str) -> str:
    """A loaded model beside the good folder's, and beside what the files say."""
    state_dict, settings = GOOD[base]
    if _same(model.state_dict(), state_dict) and _settings_of(model) == settings:
        return "identical"
    files = weights_of(folder)
    files = [folder / SINGLE] if folder / SINGLE in files else files
    written = {
        name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()
    }
    read_in = {name: tensor for name, tensor in model.state_dict().items() if name in written}
    says = {name: written[name].to(tensor.dtype) for name, tensor in read_in.items()}
    return "as_written" if state != "kept" and _same(read_in, says) else "differs"


def _compared_source(folder: Path, base: Path, out: Path) -> str:
    """Compare the tensors read from a dense folder with safetensors' reader and the good folder."""
    checkpoint = Checkpoint(folder)
    written = Checkpoint(out)
    files = {checkpoint.file(name) for name in checkpoint.names}
    says = {
        name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()
    }
    found = {name: checkpoint.read(name) for name in checkpoint.names}
    copied = {
        name: written.read(name)
        for name in found
        if name in written.names and name.endswith("norm.weight")
    }
    if not _same(found, {name: says[name] for name in found}) or not _same(
        copied, {n: says[n] for n in copied}
    ):
        return "differs"
    good = Checkpoint(base)
    return (
        "identical"
        if _same(found, {name: good.read(name) for name in good.names})
        else "as_written"
    )


def _same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Names, dtypes and bits."""
    return state.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype
        and tensor.shape == other[name].shape
        and _bytes(tensor) == _bytes(other[name])
        for name, tensor in state.items()
    )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def run_mutants(
    root: Path, reader: str, kind: str, state: str, seeds: range
) -> Iterator[tuple[int, str, int]]:
    """Seed, outcome and memory taken, bytes, of mutants that a forked process reads one after the
    other.

    A process that dies or stands still is answered for by its last mutant, and the next one goes on
    after that.
    """
    left = list(seeds)
    while left:
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(receiver)
            _read_and_exit(sender, root, reader, kind, state, left)
        os.close(sender)
        try:
            with os.fdopen(receiver, "rb", buffering=0) as lines:
                while left:
                    ready = select.select([lines], [], [], LIMIT_S)[0]
                    line = lines.read(_LINE) if ready else b""
                    seed = left.pop(0)
                    if line:
                        code, peak = map(int, line.split())
                        yield seed, OUTCOMES[code], peak
                    else:
                        yield seed, "crashed" if ready else "hung", 0
                        break
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _read_and_exit(
    sender: int, root: Path, reader: str, kind: str, state: str, seeds: list[int]
) -> None:
    """In the forked process: without a terminal, in a separate folder, with limits; a line a
    mutant.
    """
    try:
        home = root / "tmp"
        home.mkdir(exist_ok=True)
        tempfile.tempdir = str(home)
        os.chdir(home)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + ADDRESS_BYTES, held + ADDRESS_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warnings.simplefilter("ignore")
        torch.set_num_threads(
            1
        )  # else several threads at once find torch's pool gone after the fork, and it fails
        for seed in seeds:
            folder, base = mutate(root, reader, kind, state, seed)
            before = _listing(root)
            resident_before = resident()
            restart_peak()
            found = outcome(folder, base, reader, state)
            taken = max(0, peak() - resident_before)
            found = (
                "wrote" if _listing(root) != before else "memory" if taken > LIMIT_BYTES else found
            )
            os.write(sender, f"{OUTCOMES.index(found)} {taken}".ljust(_LINE).encode())
    finally:
        os._exit(1)


def _listing(root: Path) -> list[tuple[Any, ...]]:
    """Everything under `root` but what the reader may write: the output and its temporary files."""
    found = []
    for path, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in ("out", "tmp")]
        states = [(name, os.lstat(os.path.join(path, name))) for name in [*folders, *files]]
        found += sorted(
            (path, name, s.st_mode, s.st_size, s.st_mtime_ns * (name in files))
            for name, s in states
        )
    return found


def combinations(reader: str) -> list[tuple[str, str]]:
    """Kinds and states of the digests that a reader meets."""
    if reader == "prepare":
        return [(kind, "removed") for kind in MUTATIONS if kind not in PREPARED_ONLY]
    return [
        (kind, state) for kind in MUTATIONS for state in STATES if kind != "list" or state == "kept"
    ]


def is_fault(reader: str, state: str, result: str) -> bool:
    allowed = reader == "from_pretrained" and result == "unclear"
    return result in FAULTS and not allowed


def run_kind(root: Path, reader: str, kind: str, state: str, seeds: range) -> dict[str, Any]:
    """A row: how many mutants came to what, and the most memory."""
    start, found, most = time.monotonic(), Counter(), 0
    for seed, result, held in run_mutants(root, reader, kind, state, seeds):
        if is_fault(reader, state, result):
            console.print(f"{reader}, {kind}, digests {state}, seed {seed}: {result}")
        found[result] += 1
        most = max(most, held)
    counts = {name: found[name] for name in OUTCOMES}
    return {
        "n": len(seeds),
        **counts,
        "peak_mb": round(most / 1e6, 1),
        "seconds": round(time.monotonic() - start, 1),
    }


def run(
    count: Annotated[
        int,
        typer.Option(help="Mutants of a kind, for a prepared folder and one state of its list."),
    ] = 60,
    dense: Annotated[int, typer.Option(help="Likewise, of a dense folder.")] = 60,
    only: Annotated[str, typer.Option(help="Kinds whose name holds this text.")] = "",
    readers: Annotated[str, typer.Option(help="With commas.")] = ",".join(READERS),
    seed: Annotated[int, typer.Option(help="Of the first mutant.")] = 0,
    rows: Annotated[
        Path | None, typer.Option(help="File to add rows to; what it has is left out.")
    ] = None,
) -> None:
    """Every kind of mutant through every reader."""
    quiet_libraries()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        root = Path(home)
        make_bases(root)
        for reader in (reader for reader in READERS if reader in readers.split(",")):
            for kind, state in combinations(reader):
                n = dense if reader == "prepare" else count
                key = {"study": "hostile", "reader": reader, "kind": kind, "digests": state, "n": n}
                if only not in kind or (
                    rows is not None and rows.exists() and find(read(rows), key)
                ):
                    continue
                row = key | run_kind(root, reader, kind, state, range(seed, seed + n))
                console.print({name: value for name, value in row.items() if value})
                if rows is not None:
                    append(rows, [row], seed=seed)


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
