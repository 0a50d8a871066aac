"""Measurements on one GPU in a few minutes, on models with random weights.

- tests: the tests marked `cuda`
- step: a training step of a Llama of 8B parameters on 4,096 tokens in bf16, with qrefta, PEFT's
  QLoRA and the frozen 4-bit model; its blocks alone, without and with gradient checkpointing, and
  the whole step with a head of 128,256 words and the loss
- prepare: time and peak memory of qrefta.prepare with device="cuda", of the same shape in CPU
  memory
- decoding: tokens per second of generation
- memory: the peak of a training step of a Llama of 70B parameters

Each part runs in a process of its share of the time. A measurement that is too long is cut to fewer
layers or repetitions, one that needs too much memory to half the layers; its row states them. A
measurement that fails, or has no time left, says so and writes no row, and the next one goes on.
The exit status is 1 if one is missing.
"""

import gc
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, time
from typing import Annotated, Any, NamedTuple
from xml.etree import ElementTree

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import qrefta
from eval.memory import living, tensor_peak
from eval.rows import append
from eval.studies import cost, decoding
from eval.studies.cost import SETTINGS, Run
from qrefta.cli import guarded
from qrefta.model.stacks import find_stacks
from qrefta.split.moments import Moments

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "eval" / "rows" / "gpu.jsonl"
TESTS = ("tests/test_cuda.py", "tests/eval/test_splits.py")
METHODS = ("floor bitsandbytes", "floor", "qlora r=16", "windows R=64", "refta R=64")
PROBED = ("qlora r=16", "windows R=64")
RANK = 64
PROMPT = 32
BATCHES = (1, 8)
PROBES = (1, 4)  # layers whose times tell the time of more
LEAST_S = 10.0  # a measurement with less time is left out
GRACE_S = 10.0  # a measurement may end this much late
console = Console()

Row = dict[str, Any]


class Place(NamedTuple):
    """The device, and the size of what is measured on it.

    Attributes:
        device, dtype: of all measurements.
        blocks, whole, large: settings of `eval.studies.cost`.
        repetitions: of times.
        new_tokens: to generate.
    """

    device: str
    dtype: torch.dtype
    blocks: str
    whole: str
    large: str
    repetitions: int
    new_tokens: int


GPU = Place("cuda", torch.bfloat16, "8b blocks", "8b", "70b", repetitions=7, new_tokens=33)
DRY = Place("cpu", torch.float32, "tiny", "tiny", "tiny", repetitions=1, new_tokens=3)


class Measurement(NamedTuple):
    """A measurement: its name, and a function of the time of `monotonic` at which it should end."""

    label: str
    rows: Callable[[float], list[Row]]


class Part(NamedTuple):
    """Measurements that run in one process.

    Attributes:
        weight: its share of the time.
        measurements: of a place.
    """

    weight: float
    measurements: Callable[[Place], list[Measurement]]


class NothingMeasuredError(Exception):
    """A measurement cannot be made here; the message says why."""


def run(
    minutes: Annotated[
        float, typer.Option(help="Minutes that all parts may take, from the start of the process.")
    ] = 8.0,
    only: Annotated[
        str, typer.Option(help="Parts, separated by commas; default: all. One runs in place.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="The same on the CPU with a tiny model.")
    ] = False,
    rows: Annotated[
        Path | None,
        typer.Option(help="JSON lines file; default: eval/rows/gpu.jsonl, in a dry run none."),
    ] = None,
) -> None:
    """Measure the parts, one after the other."""
    age = time() - psutil.Process().create_time()
    until = monotonic() + 60 * minutes - age
    place = DRY if dry_run else GPU
    if not dry_run and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; --dry-run measures a tiny model on the CPU.")
    parts = only.split(",") if only else list(PARTS)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"only names {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    if rows is None and not dry_run:
        rows = ROWS
    if len(parts) == 1:
        complete = measure_part(parts[0], place, until, rows)
    else:
        options = ["--dry-run"] * dry_run
        options += [] if rows is None else ["--rows", str(rows.resolve())]
        complete = run_parts(parts, until, options)
    if not complete:
        raise SystemExit(1)


def run_parts(parts: list[str], until: float, options: list[str]) -> bool:
    """Run each part in a process; whether all measured everything."""
    table = Table("part", "state", "seconds")
    complete = True
    for index, part in enumerate(parts):
        start = monotonic()
        weights = [PARTS[later].weight for later in parts[index:]]
        share = (until - start) * weights[0] / sum(weights)
        console.rule(part)
        if share < LEAST_S + GRACE_S:
            state = f"left out: only {share:.0f} s are left for it"
        else:
            minutes = (share - GRACE_S) / 60
            state = run_process([part, "--minutes", f"{minutes:.3f}", *options], share)
        complete = complete and state == "measured"
        table.add_row(part, state, f"{monotonic() - start:.0f}")
    console.print(table)
    return complete


def run_process(options: list[str], limit_s: float) -> str:
    """The state of a part after its process has ended, or was stopped at the limit."""
    command = [sys.executable, "-m", "eval", "gpu", "--only", *options]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()
    return "measured" if status == 0 else f"not complete (exit status {status})"


def measure_part(part: str, place: Place, until: float, rows: Path | None) -> bool:
    """Make the measurements of a part, and add their rows to a file, each at once.

    Returns:
        Whether all were made.
    """
    measurements = PARTS[part].measurements(place)
    complete = True
    for index, (label, measure) in enumerate(measurements):
        now = monotonic()
        share = (until - now) / (len(measurements) - index)
        found: list[Row] = []
        if share < LEAST_S:
            tell(f"{label}: left out, only {share:.0f} s are left for it")
        else:
            try:
                found = measure(now + share)
            except NothingMeasuredError as error:
                tell(f"{label}: left out, {error}")
            except Exception:  # the next measurement may work
                tell(f"{label}: failed")
                traceback.print_exc()
        gc.collect()
        if place.device == "cuda":
            torch.cuda.empty_cache()
        complete = complete and bool(found)
        found = [{"study": "gpu"} | row for row in found]
        for row in found:
            values = [round(one, 4) if isinstance(one, float) else one for one in row.values()]
            tell(", ".join(f"{key} {value}" for key, value in zip(row, values, strict=True)))
        if rows is not None:
            append(rows, found, seed=0, device=place.device)
    return complete


def layers_in_time(call: Callable[[int], object], layers: int, until: float, times: float) -> int:
    """The layers, at most all of the model's, for which `call` ends in time.

    The time of a call is a + b layers, by calls with one and four layers.

    Args:
        call: takes a number of layers.
        layers: of the model.
        until: time of `monotonic`.
        times: that the measurement takes, relative to `call`.
    """
    few, more = PROBES
    if layers <= more:
        return layers
    call(few)  # loads kernels
    short = cost.timed(lambda: call(few), torch.cuda.is_available())
    long = cost.timed(lambda: call(more), torch.cuda.is_available())
    per_layer = max((long - short) / (more - few), 1e-9)
    left = (until - monotonic()) / times
    fitting = int(min(few + max(left - short, 0) / per_layer, layers))
    if fitting < layers:
        tell(f"{fitting} of {layers} layers, so that it fits the time")
    return fitting


def halved_to_fit(call: Callable[[int], list[Row]], layers: int) -> list[Row]:
    """The rows of a call with these layers, or with half, a quarter, ... if memory is too small."""
    while True:
        try:
            return call(layers)
        except torch.OutOfMemoryError:
            if layers == 1:
                raise
        layers //= 2
        gc.collect()
        torch.cuda.empty_cache()
        tell(f"out of memory; with {layers} layers")


def cuda_tests(place: Place) -> list[Measurement]:
    """The tests marked `cuda`."""
    return [Measurement("tests", partial(run_tests, place))]


def run_tests(place: Place, until: float) -> list[Row]:
    """A row with the counts of pytest.

    Raises:
        NothingMeasuredError: without pytest.
        RuntimeError: if a test fails, or all are skipped on a GPU.
    """
    if find_spec("pytest") is None:
        raise NothingMeasuredError("pytest is not installed")
    start = monotonic()
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        options = ["-m", "cuda", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *TESTS]
        status = subprocess.run(command, cwd=ROOT, timeout=until - start, check=False).returncode
        if status != 0:
            raise RuntimeError(f"pytest ended with exit status {status}; see its output above.")
        (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    skipped = int(suite.attrib["skipped"])
    passed = int(suite.attrib["tests"]) - skipped
    if place.device == "cuda" and not passed:
        raise RuntimeError("pytest skipped all tests.")
    seconds = monotonic() - start
    return [{"kind": "tests", "passed": passed, "skipped": skipped, "seconds": seconds}]


def steps(place: Place) -> list[Measurement]:
    """Training steps."""
    chosen = {
        "step of the blocks": (place.blocks, False),
        "step of the blocks with gradient checkpointing": (place.blocks, True),
        "whole step with gradient checkpointing": (place.whole, True),
    }
    return [
        Measurement(label, partial(time_steps, place, Run(setting, *place[:2], checkpointing)))
        for label, (setting, checkpointing) in chosen.items()
    ]


def time_steps(place: Place, settings: Run, until: float) -> list[Row]:
    """A row for each of METHODS."""

    def measure(names: tuple[str, ...], repetitions: int, layers: int) -> list[Row]:
        return cost.measure(list(names), settings._replace(layers=layers), repetitions, until=until)

    layers = layers_in_time(
        partial(measure, PROBED, 1),
        layers_of(settings.setting),
        until,
        len(METHODS) / len(PROBED),
    )
    return halved_to_fit(partial(measure, METHODS, place.repetitions), layers)


def preparations(place: Place) -> list[Measurement]:
    """Calls of `qrefta.prepare`."""
    return [
        Measurement("prepare", partial(prepare_once, place, "windows", False)),
        Measurement("prepare with method refta", partial(prepare_once, place, "refta", False)),
        Measurement("prepare with calibration", partial(prepare_once, place, "windows", True)),
    ]


def prepare_once(place: Place, method: str, calibrated: bool, until: float) -> list[Row]:
    """A row of time and peak memory."""
    prepare = partial(time_prepare, place, method, calibrated)
    layers = layers_in_time(prepare, layers_of(place.whole), until, 1)
    return halved_to_fit(prepare, layers)


def time_prepare(place: Place, method: str, calibrated: bool, layers: int) -> list[Row]:
    """The row of a model with this number of layers."""
    settings = Run(place.whole, place.device, place.dtype, checkpointing=False, layers=layers)
    model = cost.outline(settings)
    cost.fill(model, settings, torch.Generator(place.device).manual_seed(0))
    model.to("cpu")
    moments = random_moments(model, place.device) if calibrated else None
    before = living(place.device)
    peaks = []

    def prepare() -> None:
        qrefta.prepare(
            model,
            method=method,
            rank=RANK,
            moments=moments,
            device=place.device,
            progress=False,
        )

    seconds = cost.timed(
        lambda: peaks.append(tensor_peak(prepare, place.device) - before), place.device == "cuda"
    )
    return [
        {
            "kind": "prepare",
            "setting": place.whole,
            "layers": layers,
            "method": method,
            "rank": RANK,
            "calibrated": calibrated,
            "dtype": str(place.dtype).removeprefix("torch."),
            "n": 1,
            "prepare_s": seconds,
            "peak_bytes": peaks[0],
        }
    ]


def random_moments(model: PreTrainedModel, device: str) -> Moments:
    """Second moments of random inputs, one for each width, in CPU memory."""
    generator = torch.Generator(device).manual_seed(1)
    owners: dict[str, str] = {}
    tokens: dict[str, int] = {}
    tensors: dict[str, torch.Tensor] = {}
    for stack in find_stacks(model):
        width = stack.in_features
        name = f"inputs of width {width}"
        owners |= dict.fromkeys(stack.modules, name)
        if name not in tensors:
            tokens[name] = 2 * width
            x = torch.randn(tokens[name], width, device=device, generator=generator)
            tensors[name] = (x.T @ x / tokens[name]).cpu()
    return Moments(owners, tokens, tensors.__getitem__)


def generations(place: Place) -> list[Measurement]:
    """Generation of text."""
    return [Measurement("decoding", partial(time_decoding, place))]


def time_decoding(place: Place, until: float) -> list[Row]:
    """A row for each model and batch size."""
    settings = Run(place.whole, place.device, place.dtype, checkpointing=False)
    names = [name for name in METHODS if not name.startswith("refta")]

    def measure(
        names: list[str], batches: tuple[int, ...], repetitions: int, layers: int
    ) -> list[Row]:
        return decoding.measure(
            names,
            settings._replace(layers=layers),
            batches,
            PROMPT,
            place.new_tokens,
            repetitions,
            until,
        )

    probed = [decoding.PLAIN, "windows R=64"]
    layers = layers_in_time(
        partial(measure, probed, (1,), 1),
        layers_of(place.whole),
        until,
        len(BATCHES) * len(names) / len(probed),
    )
    return halved_to_fit(partial(measure, names, BATCHES, place.repetitions), layers)


def large_steps(place: Place) -> list[Measurement]:
    """Peak memory of the large model, one method after the other."""
    names = ("windows R=64", "qlora r=16", "floor bitsandbytes")
    return [Measurement(f"memory, {name}", partial(measure_peak, place, name)) for name in names]


def measure_peak(place: Place, name: str, until: float) -> list[Row]:
    """The row of one method, with as many layers as the card holds."""
    settings = Run(place.large, place.device, place.dtype, checkpointing=True)

    def measure(layers: int) -> list[Row]:
        return cost.measure([name], settings._replace(layers=layers), 1, time=False)

    layers = layers_in_time(measure, layers_of(place.large), until, 1)
    return halved_to_fit(measure, layers)


def layers_of(setting: str) -> int:
    """The layers of a setting's model."""
    return SETTINGS[setting].config["num_hidden_layers"]


def tell(text: str) -> None:
    """Print a line."""
    console.print(text, markup=False, highlight=False)


PARTS = {
    "tests": Part(0.25, cuda_tests),
    "step": Part(0.30, steps),
    "prepare": Part(0.22, preparations),
    "decoding": Part(0.13, generations),
    "memory": Part(0.10, large_steps),
}

if __name__ == "__main__":
    guarded(lambda: typer.run(run))
