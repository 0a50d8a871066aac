"""python -m eval.robustness.kills: training, preparing and merging that are killed at random moments, and go on.

Every attempt is a process of its own, forked from this one, and ends by signal 9 at a random moment, half of them while
files are being written, until one gets to the end, or they have been killed often enough. After each kill everything in
the folder that would be taken for whole is compared with what an undisturbed run had there, byte for byte; so is what
the chain of attempts ends with.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM

import qrefta
from eval.robustness.small_model import numbers, tokenizer, write_decoder
from eval.rows import append
from qrefta.cli import guarded, quiet_libraries
from qrefta.split.checkpoint import JOURNAL
from qrefta.train.checkpoints import UNFINISHED, last_checkpoint
from qrefta.train.finetune import finetune

STEPS = 12
PATIENCE_S = 600  # for any process
CHAIN = 20  # kills of one job, at most, before it may get to its end
_SAID = Path(tempfile.gettempdir()) / f"qrefta-kills-{os.getpid()}.txt"  # by the last process
Digests = dict[str, str]  # file, within the job's folder -> sha256
console = Console()


@dataclass
class Tally:
    """What came of a job's kills.

    Attributes:
        kills: attempts that were killed; `writing` of them while a file was being written.
        runs: chains of attempts, each to its end.
        unreadable: kills after which what would be taken for whole could not be loaded.
        half_written: kills after which it lacked a file, or had other bytes than the undisturbed run's.
        unequal: chains that ended with other bytes than the undisturbed run.
    """

    kills: int = 0
    writing: int = 0
    runs: int = 0
    unreadable: int = 0
    half_written: int = 0
    unequal: int = 0


@dataclass(frozen=True)
class Job:
    """What is killed.

    Attributes:
        work: does it, or goes on with it, in a folder.
        whole: the paths in the folder that would be taken for whole.
        load: loads one of them.
        busy: whether files are being written in the folder.
        volatile: files that differ from run to run (times), by name.
    """

    work: Callable[[Path], None]
    whole: Callable[[Path], list[Path]]
    load: Callable[[Path], Any]
    busy: Callable[[Path], bool]
    volatile: tuple[str, ...] = ()


def run(
    kills: Annotated[
        int, typer.Option(help="Of training; preparing and merging get a quarter as many each.")
    ] = 200,
    only: Annotated[str, typer.Option(help="Those to kill, with commas.")] = "train,prepare,merge",
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    rows: Annotated[
        Path | None, typer.Option(help="File to add the counts to, as JSON lines.")
    ] = None,
) -> None:
    """Kill and count."""
    quiet_libraries()
    place = Path(tempfile.mkdtemp(prefix="qrefta-kills-"))
    try:
        for name, job in (
            (name, job) for name, job in jobs(place).items() if name in only.split(",")
        ):
            wanted = kills if name == "train" else max(kills // 4, 1)
            tally = kill(job, place / name, wanted, random.Random(seed))
            console.print(f"{name}: {tally}")
            if rows is not None:
                append(rows, [{"study": "kills", "job": name, **vars(tally)}], seed)
    finally:
        shutil.rmtree(place)
        _SAID.unlink(missing_ok=True)


def jobs(place: Path) -> dict[str, Job]:
    """Training with a checkpoint every step, preparing out of core, merging; what they start from lies in `place`."""
    dense, prepared = place / "dense", place / "prepared"
    _done(
        _fork(lambda: write_decoder(dense))
    )  # not here: what torch has set up for threads survives no fork
    text = numbers()
    settings = {"rank": 8, "refine": 1, "progress": False}
    _done(_fork(lambda: qrefta.prepare(dense, out=prepared, **settings)))

    def train(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(prepared, dtype=torch.float32)
        resume = last_checkpoint(folder) is not None
        finetune(model, tokenizer(), text, folder, task="lm", max_steps=STEPS, batch_size=4, max_length=16,
                 save_steps=1, resume=resume, progress=False)  # fmt: skip

    def model_in(folder: Path) -> list[Path]:
        return [folder] if (folder / "config.json").exists() else []

    def prepare(folder: Path) -> None:
        if (
            not model_in(folder) or (folder / JOURNAL).exists()
        ):  # else it was killed when all was done
            qrefta.prepare(dense, out=folder, **settings)

    def merge(folder: Path) -> None:
        if not model_in(folder):
            qrefta.merge(qrefta.load(prepared), out=folder)

    return {
        "train": Job(
            train,
            lambda folder: [path for path in [last_checkpoint(folder), *model_in(folder)] if path],
            lambda path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            lambda folder: (folder / UNFINISHED).exists(),
            ("training_args.bin", "trainer_state.json", "README.md"),
        ),
        "prepare": Job(
            prepare,
            model_in,
            qrefta.load,
            lambda folder: any(folder.glob("*.safetensors*")) and not model_in(folder),
        ),
        "merge": Job(
            merge,
            model_in,
            AutoModelForCausalLM.from_pretrained,
            lambda folder: any(folder.parent.glob(f".{folder.name}-*")),
        ),
    }


def kill(job: Job, place: Path, kills: int, chance: random.Random) -> Tally:
    """Kill a job so many times, chain after chain of attempts."""
    place.mkdir()
    expected, seconds = undisturbed(job, place / "undisturbed")
    tally = Tally()
    while tally.kills < kills:
        folder = place / str(tally.runs)
        before, start = tally.kills, time.monotonic()
        for _ in range(CHAIN):
            if attempt(job, folder, chance, seconds, tally):
                break
            check(job, folder, expected, tally)
        else:  # what begins anew each time would never end
            _done(_fork(lambda folder=folder: job.work(folder)))
        if tally.kills == before:  # too late, where the undisturbed run was held up
            seconds = min(seconds, time.monotonic() - start)
        tally.runs += 1
        final = digests(folder, job.volatile)
        tally.unequal += any(final.get(name) != digest for name, digest in expected["."].items())
        shutil.rmtree(folder)
    return tally


def undisturbed(job: Job, folder: Path) -> tuple[dict[str, Digests], float]:
    """Of a run that nothing ends: the files of all that was whole at any time, by its path; and seconds of another."""
    start = time.monotonic()
    _done(_fork(lambda: job.work(folder)))
    seconds = time.monotonic() - start
    shutil.rmtree(folder)
    seen: dict[str, Digests] = {}
    child = _fork(lambda: job.work(folder))
    while not _ended(child):
        os.kill(child, signal.SIGSTOP)
        for path in job.whole(folder):
            name = str(path.relative_to(folder))
            if name != ".":
                seen.setdefault(name, digests(path, job.volatile))
        os.kill(child, signal.SIGCONT)
        time.sleep(0.002)
    seen["."] = digests(folder, job.volatile)
    return seen, seconds


def attempt(job: Job, folder: Path, chance: random.Random, seconds: float, tally: Tally) -> bool:
    """One attempt; whether it got to its end."""
    child = _fork(lambda: job.work(folder))
    until = time.monotonic() + chance.uniform(0.05, 0.6) * seconds
    while_writing = chance.random() < 0.5
    while not (ended := _ended(child)) and (
        time.monotonic() < until or (while_writing and not job.busy(folder))
    ):
        time.sleep(0.001)
    if ended:
        return True
    if while_writing:
        time.sleep(chance.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:  # too late
        return True
    tally.kills += 1
    tally.writing += job.busy(folder)
    return False


def check(job: Job, folder: Path, expected: dict[str, Digests], tally: Tally) -> None:
    """Load what would be taken for whole, and compare it with the undisturbed run's."""
    for path in job.whole(folder):
        found, wanted = digests(path, job.volatile), expected.get(str(path.relative_to(folder)))
        tally.half_written += wanted is not None and any(
            found.get(name) != one for name, one in wanted.items()
        )
        tally.unreadable += os.waitpid(_fork(lambda path=path: job.load(path)), 0)[1] != 0


def digests(folder: Path, volatile: tuple[str, ...]) -> Digests:
    """sha256 of every file in a folder, but of checkpoints below it."""
    return {
        path.name: hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in volatile
    }


def _content(path: Path) -> bytes:
    """A file's bytes; of safetensors with the header's entries in order, since metadata is written in any."""
    data = path.read_bytes()
    if path.suffix != ".safetensors" or len(data) < 8:
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8:end])
    except ValueError:
        return data
    return json.dumps(header, sort_keys=True).encode() + data[end:]


def _ended(child: int) -> bool:
    """Whether a process has ended; it must have ended well."""
    pid, status = os.waitpid(child, os.WNOHANG)
    if status:
        raise RuntimeError(f"An attempt failed that was not killed: {_SAID.read_text()}")
    return pid == child


def _done(child: int) -> None:
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"A process failed: {_SAID.read_text()}")


def _fork(work: Callable[[], Any]) -> int:
    """The process that does it; it ends with 0 if that went well."""
    child = os.fork()
    if child == 0:
        code = 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE_S)  # so that nothing waits for ever for one that stands still
        try:
            said = os.open(_SAID, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:  # nothing of this process's own may run on
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    return child


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
