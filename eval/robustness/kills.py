"""Training, preparing and merging that are killed at random moments and resumed.

Every attempt is a forked process that is killed by signal 9 at a random moment, in half of the
cases while it writes files. Attempts continue until one finishes, or after `CHAIN` kills. After
each kill, every checkpoint that looks complete is loaded and compared byte for byte with an
undisturbed run. The final files are compared in the same way.
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
from qrefta.files.folders import JOURNAL
from qrefta.train.arguments import training_arguments
from qrefta.train.checkpoints import UNFINISHED, last_checkpoint
from qrefta.train.finetune import finetune

STEPS = 12
PATIENCE_S = 600  # limit of a process
CHAIN = 20  # most kills before a job may finish
_SAID = (
    Path(tempfile.gettempdir()) / f"qrefta-kills-{os.getpid()}.txt"
)  # output of the last process
Digests = dict[str, str]  # file in the job's folder -> sha256
console = Console()


@dataclass
class Tally:
    """Counts of a job's kills and their results.

    Attributes:
        kills: killed attempts; `writing` counts those that were writing a file.
        runs: finished chains of attempts.
        unreadable: kills after which a complete-looking checkpoint could not be loaded.
        half_written: kills after which it missed a file or differed from the undisturbed run.
        unequal: chains whose final files differ from the undisturbed run.
    """

    kills: int = 0
    writing: int = 0
    runs: int = 0
    unreadable: int = 0
    half_written: int = 0
    unequal: int = 0


@dataclass(frozen=True)
class Job:
    """A job to kill.

    Attributes:
        work: starts or resumes the job in a folder.
        whole: the complete-looking checkpoints in the folder.
        load: loads one of these checkpoints.
        busy: whether files are being written in the folder.
        volatile: names of files that differ between runs, such as times.
    """

    work: Callable[[Path], None]
    whole: Callable[[Path], list[Path]]
    load: Callable[[Path], Any]
    busy: Callable[[Path], bool]
    volatile: tuple[str, ...] = ()


def run(
    kills: Annotated[
        int, typer.Option(help="Kills of training; preparing and merging get a quarter each.")
    ] = 200,
    only: Annotated[
        str, typer.Option(help="Jobs to kill, separated by commas.")
    ] = "train,prepare,merge",
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Kill jobs and count the results."""
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
    """Training with a checkpoint every step, preparing out of core, and merging."""
    dense = place / "dense"
    prepared = place / "prepared"
    # In a fork, because torch's threads in this process would not survive later forks.
    _done(_fork(lambda: write_decoder(dense)))
    text = numbers()
    settings = {"rank": 8, "refine": 1, "progress": False}
    _done(_fork(lambda: qrefta.prepare_checkpoint(dense, prepared, **settings)))

    def train(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(prepared, dtype=torch.float32)
        resume = last_checkpoint(folder) is not None
        args = training_arguments(
            "lm",
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            save_steps=1,
            disable_tqdm=True,
        )
        finetune(model, tokenizer(), text, task="lm", args=args, max_length=16, resume=resume)

    def model_in(folder: Path) -> list[Path]:
        return [folder] if (folder / "config.json").exists() else []

    def prepare(folder: Path) -> None:
        # A finished folder without a journal was killed after all work was done.
        if not model_in(folder) or (folder / JOURNAL).exists():
            qrefta.prepare_checkpoint(dense, folder, **settings)

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
    """Kill a job `kills` times, in chains of attempts."""
    place.mkdir()
    expected, seconds = undisturbed(job, place / "undisturbed")
    tally = Tally()
    while tally.kills < kills:
        folder = place / str(tally.runs)
        before = tally.kills
        start = time.monotonic()
        for _ in range(CHAIN):
            if attempt(job, folder, chance, seconds, tally):
                break
            check(job, folder, expected, tally)
        else:  # a job that restarts each time would never finish
            _done(_fork(lambda folder=folder: job.work(folder)))
        if tally.kills == before:  # the undisturbed run was held up, so every kill was too late
            seconds = min(seconds, time.monotonic() - start)
        tally.runs += 1
        final = digests(folder, job.volatile)
        tally.unequal += any(final.get(name) != digest for name, digest in expected["."].items())
        shutil.rmtree(folder)
    return tally


def undisturbed(job: Job, folder: Path) -> tuple[dict[str, Digests], float]:
    """Digests of every complete checkpoint of an undisturbed run, by path, and seconds of a run."""
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
    """Run one attempt; whether it finished."""
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
    """Load complete-looking checkpoints and compare them with the undisturbed run."""
    for path in job.whole(folder):
        found = digests(path, job.volatile)
        wanted = expected.get(str(path.relative_to(folder)))
        tally.half_written += wanted is not None and any(
            found.get(name) != one for name, one in wanted.items()
        )
        tally.unreadable += os.waitpid(_fork(lambda path=path: job.load(path)), 0)[1] != 0


def digests(folder: Path, volatile: tuple[str, ...]) -> Digests:
    """sha256 of every file directly in a folder."""
    return {
        path.name: hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in volatile
    }


def _content(path: Path) -> bytes:
    """A file's bytes; of safetensors with the header's entries in order, since metadata is written
    in any.
    """
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
    """Whether a process has ended; it must have ended without an error."""
    pid, status = os.waitpid(child, os.WNOHANG)
    if status:
        raise RuntimeError(f"An attempt failed without being killed: {_SAID.read_text()}")
    return pid == child


def _done(child: int) -> None:
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"A process failed: {_SAID.read_text()}")


def _fork(work: Callable[[], Any]) -> int:
    """Process id of a fork that runs `work`; it exits with 0 if there was no error."""
    child = os.fork()
    if child == 0:
        code = 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE_S)  # a hanging process ends
        try:
            said = os.open(_SAID, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:  # the parent's code must not continue here
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    return child


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
