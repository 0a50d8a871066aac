"""The study for one GPU, on the CPU with a tiny model, and its section of the report."""

import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic

import pytest
import torch

from eval.report import report
from eval.report.gpu import sections
from eval.rows import read
from eval.studies import gpu, plan_check
from eval.studies.gpu import DRY, Measurement, NothingMeasuredError, Part

ROOT = Path(gpu.__file__).parents[2]


def measured(part, folder):
    """The rows of a part."""
    file = folder / "rows.jsonl"
    assert gpu.measure_part(part, DRY, monotonic() + 3600, file)
    return read(file)


@pytest.mark.slow
def test_steps_are_measured_for_every_method(tmp_path, monkeypatch):
    methods = ("floor bitsandbytes", "windows R=64")
    monkeypatch.setattr(gpu, "METHODS", methods)
    rows = measured("step", tmp_path)
    assert [row["checkpointing"] for row in rows] == [False] * 2 + [True] * 4
    for row in rows:
        assert (row["study"], row["kind"], row["layers"], row["dtype"]) == (
            "gpu",
            "step",
            2,
            "float32",
        )
        assert row["step_s"] > 0
        assert row["peak_bytes"] > 0
        assert "driver" not in row
    assert {row["method"] for row in rows} == set(methods)
    floors = [row for row in rows if row["method"] == "floor bitsandbytes"]
    assert [row["of_bitsandbytes"] for row in floors] == [1.0] * 3


@pytest.mark.slow
def test_preparing_is_measured_with_and_without_calibration(tmp_path):
    rows = measured("prepare", tmp_path)
    assert [(row["method"], row["calibrated"]) for row in rows] == [
        ("windows", False),
        ("refta", False),
        ("windows", True),
    ]
    assert all(row["prepare_s"] > 0 and row["peak_bytes"] > 0 for row in rows)


@pytest.mark.slow
def test_decoding_and_the_memory_of_a_large_model_are_measured(tmp_path):
    rows = measured("decoding", tmp_path)
    assert [row["batch"] for row in rows] == [1] * 4 + [8] * 4
    rows = measured("memory", tmp_path)[len(rows) :]
    assert len({row["method"] for row in rows}) == len(rows) == 3
    assert all(row["peak_bytes"] > 0 and "step_s" not in row for row in rows)
    for row in plan_check._decoders(rows):  # a plan of the same step
        assert row["planned_bytes"] == pytest.approx(row["measured_bytes"], rel=0.1)


def test_tests_are_counted_and_a_failing_one_is_no_row(tmp_path, monkeypatch):
    good = tmp_path / "test_good.py"
    good.write_text(
        "import pytest\n@pytest.mark.cuda\n@pytest.mark.skip\ndef test_a(): ...\n"
        "@pytest.mark.cuda\ndef test_b(): ...\ndef test_c(): assert False\n"
    )
    monkeypatch.setattr(gpu, "TESTS", (str(good), "-c", str(ROOT / "pyproject.toml")))
    (row,) = measured("tests", tmp_path)
    assert (row["passed"], row["skipped"]) == (1, 1)
    good.write_text("import pytest\n@pytest.mark.cuda\ndef test_b(): assert False\n")
    assert not gpu.measure_part("tests", DRY, monotonic() + 3600, tmp_path / "none.jsonl")
    assert read(tmp_path / "none.jsonl") == []


def test_the_tests_of_the_study_exist():
    assert all((ROOT / name).exists() for name in gpu.TESTS)


def test_without_pytest_the_tests_are_left_out(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    with pytest.raises(NothingMeasuredError, match="pytest is not installed"):
        gpu.run_tests(DRY, monotonic() + 60)


def test_a_measurement_that_fails_says_so_and_the_next_goes_on(tmp_path, monkeypatch, capfd):
    def broken(until):
        raise RuntimeError("the kernel is broken")

    def missing(until):
        raise NothingMeasuredError("there is no wheel")

    made = [
        Measurement("first", broken),
        Measurement("second", missing),
        Measurement("third", lambda until: [{"kind": "x", "value": 1.5}]),
    ]
    monkeypatch.setitem(gpu.PARTS, "step", Part(1.0, lambda place: made))
    file = tmp_path / "rows.jsonl"
    assert not gpu.measure_part("step", DRY, monotonic() + 3600, file)
    assert [row["value"] for row in read(file)] == [1.5]
    told = capfd.readouterr()
    assert "first: failed" in told.out
    assert "the kernel is broken" in told.err
    assert "second: left out, there is no wheel" in told.out


def test_a_measurement_without_time_is_left_out(tmp_path, capfd):
    assert not gpu.measure_part("memory", DRY, monotonic() + 5, tmp_path / "rows.jsonl")
    assert capfd.readouterr().out.count("left out, only") == 3
    assert read(tmp_path / "rows.jsonl") == []


def test_layers_are_cut_to_the_time(monkeypatch, capfd):
    """A call takes 1 + layers / 2 seconds; 32 layers take 17, and half of 20 seconds is left."""
    called = []

    def timed(call, cuda):
        call()
        return 1 + called[-1] / 2

    monkeypatch.setattr(gpu.cost, "timed", timed)
    monkeypatch.setattr(gpu, "monotonic", lambda: 100.0)
    assert gpu.layers_in_time(called.append, 32, 120.0, 2) == 18
    assert "18 of 32 layers" in capfd.readouterr().out
    assert gpu.layers_in_time(called.append, 32, 140.0, 2) == 32
    assert gpu.layers_in_time(called.append, 32, 100.5, 2) == 1
    assert set(called) == set(gpu.PROBES)


def test_layers_are_halved_until_memory_suffices(capfd):
    tried = []

    def call(layers):
        tried.append(layers)
        if layers > 10:
            raise torch.OutOfMemoryError("none left")
        return [{"layers": layers}]

    assert gpu.halved_to_fit(call, 80) == [{"layers": 10}]
    assert tried == [80, 40, 20, 10]
    assert "out of memory; with 10 layers" in capfd.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        gpu.halved_to_fit(lambda layers: call(layers + 10), 1)


def test_parts_share_the_time_and_a_missing_one_is_told(monkeypatch, capfd):
    """Time that a part leaves over goes to the later parts; the last part here gets too little."""
    clock = [0.0]
    given = []

    def run_process(options, limit_s):
        given.append((options[0], limit_s, float(options[2])))
        clock[0] += 30 if options[0] == "step" else limit_s
        return "measured"

    monkeypatch.setattr(gpu, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "run_process", run_process)
    for part, weight in {"step": 0.5, "prepare": 0.4, "memory": 0.1}.items():
        monkeypatch.setitem(gpu.PARTS, part, Part(weight, list))
    assert not gpu.run_parts(["step", "prepare", "memory"], 100.0, ["--dry-run"])
    assert [(part, limit) for part, limit, _ in given] == [
        ("step", 50.0),
        ("prepare", pytest.approx(56.0)),
    ]
    assert given[0][2] == pytest.approx((50 - gpu.GRACE_S) / 60, abs=1e-3)
    assert "left out: only 14 s are left for it" in " ".join(capfd.readouterr().out.split())
    clock[0] = 0.0
    assert gpu.run_parts(["step"], 100.0, [])


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A program in place of Python, which writes its arguments down."""
    file = tmp_path / "python"

    def write(line):
        file.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n{line}\n')
        file.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(file))
        return tmp_path / "arguments"

    return write


def test_a_process_measures_one_part(program):
    arguments = program("exit 0")
    assert gpu.run_process(["step", "--minutes", "2"], 60) == "measured"
    words = ["-m", "eval", "gpu", "--only", "step", "--minutes", "2"]
    assert arguments.read_text().split() == words


def test_a_process_that_fails_or_takes_too_long_is_told(program):
    program("exit 3")
    assert gpu.run_process(["step"], 60) == "not complete (exit status 3)"
    program("sleep 600")
    start = monotonic()
    assert gpu.run_process(["step"], 1.0) == "stopped after 1 s"
    assert monotonic() - start < 60


@pytest.mark.slow
def test_the_script_runs_one_part_and_its_exit_status_tells(tmp_path):
    """With no time nothing is measured."""
    command = [str(ROOT / "scripts" / "gpu"), "--dry-run", "--only", "memory", "--minutes", "0"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("left out") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="torch sees no GPU here; --dry-run measures"):
        gpu.run(8.0, "", False, None)


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="only names speed; the parts are tests, step, prepare"):
        gpu.run(8.0, "step,speed", True, None)


CONTEXT = {
    "schema": 1,
    "study": "gpu",
    "command": "python -m eval gpu",
    "commit": "0123456789ab",
    "python": "3.12.3",
    "versions": {"torch": "2.11.0"},
    "device": "A GPU",
    "cuda": "13.0",
    "driver": "580.1",
    "threads": 8,
    "seed": 0,
}


def made_up():
    """Rows as the study writes them; one step was measured twice."""
    step = {
        "kind": "step",
        "setting": "8b",
        "layers": 32,
        "checkpointing": True,
        "batch": [2, 2048],
        "method": "windows R=64",
        "step_s": 0.4,
        "of_bitsandbytes": 1.25,
        "of_qlora": 0.95,
        "peak_bytes": 30_000_000_000,
        "peak_of_qlora": 0.9,
    }
    large = {key: step[key] for key in ("kind", "checkpointing", "batch", "method")}
    large |= {"setting": "70b", "layers": 40, "peak_bytes": 60_000_000_000}
    prepare = {
        "kind": "prepare",
        "setting": "8b",
        "layers": 12,
        "method": "refta",
        "calibrated": True,
        "prepare_s": 12.25,
        "peak_bytes": 5_000_000_000,
    }
    decoding = {
        "kind": "decoding",
        "setting": "8b",
        "layers": 32,
        "method": "windows R=64",
        "batch": 1,
        "tokens_per_s": 31.5,
        "of_bitsandbytes": 0.8,
    }
    tests = {"kind": "tests", "passed": 120, "skipped": 1}
    rows = [tests, step | {"of_qlora": 2.0}, step, large, prepare, decoding]
    return [CONTEXT | row for row in rows]


def test_the_report_shows_the_rows_of_a_gpu():
    (section,) = sections(made_up())
    assert "0.95 times as long as QLoRA's, with 0.90 times the memory" in section.title
    assert "driver 580.1" in section.text
    assert "120 tests passed on the GPU, 1 were skipped" in section.text
    steps, preparing, generation = section.tables.values()
    assert steps.rows == [
        ["8b", "32", "windows R=64", "yes", "400 ms", "1.25", "0.95", "30.00 GB"],
        ["70b", "40", "windows R=64", "yes", "-", "-", "-", "60.00 GB"],
    ]
    assert preparing.rows == [["8b", "12", "refta", "yes", "12.2 s", "5.00 GB"]]
    assert generation.rows == [["8b", "32", "windows R=64", "1", "31.5", "0.80"]]
    assert all(
        len(line) == len(table.header)
        for table in (steps, preparing, generation)
        for line in table.rows
    )


def test_the_report_says_nothing_of_a_gpu_without_rows(tmp_path):
    rows = report.ROWS
    for name in ("cost", "gpu"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "cost.jsonl").write_bytes((rows / "cost.jsonl").read_bytes())
        if name == "gpu":
            text = "".join(json.dumps(row) + "\n" for row in made_up())
            (folder / "gpu.jsonl").write_text(text)
        report.run(folder, folder / "REPORT.md", None)
    assert "GPU" not in (tmp_path / "cost" / "REPORT.md").read_text()
    text = (tmp_path / "gpu" / "REPORT.md").read_text()
    assert "Training steps on a GPU" in text
    assert "gpu.jsonl" in text
