"""python -m eval.mutants: one-line faults put into qrefta one at a time, to see whether fast tests find them.

Every fault is a line of `eval.faults`: a file of qrefta, what to replace, by what, and the tests to run. It is put into
a copy of the repository, where the tests run until the first that fails, in a process forked from one that has imported
the libraries and nothing of qrefta. A fault that all tests pass survives. Before, all of these tests run on the copy as
it is: what fails without a fault finds none.
"""

import contextlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from eval.faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]
PATIENCE_S = 240  # a fault may make a loop without end
_PASSED, _FAILED, _INTERRUPTED = 0, 1, 2  # pytest's exit codes; the last where a fault breaks an import


class Verdict(NamedTuple):
    """What came of a fault: found, or survived."""

    outcome: str
    seconds: float


def run(
    only: Annotated[str, typer.Option(help="Texts in a fault's file or line, with semicolons.")] = "",
    check: Annotated[bool, typer.Option(help="Run the tests without a fault first.")] = True,
    rows: Annotated[Path | None, typer.Option(help="File to add the verdicts to, as JSON lines.")] = None,
) -> None:
    """Run every fault, and count those that were found."""
    from eval.rows import append

    _import_libraries()
    chosen = [fault for fault in FAULTS if any(text in f"{fault.file} {fault.old}" for text in only.split(";"))]
    start = time.monotonic()
    found = 0
    with repository() as copy:
        for tests in together(chosen) if check else ():
            if not passes(copy, tests):
                raise ValueError(f"Without a fault {tests} fail or take beyond {PATIENCE_S} s; mend them first.")
        checked = time.monotonic()
        for fault in chosen:
            verdict = judge(fault, copy)
            found += verdict.outcome == "found"
            print(
                f"{verdict.outcome:8} {verdict.seconds:5.1f} s  {fault.file}: {fault.old}  ->  {fault.new}", flush=True
            )
            if rows is not None:
                row = {"study": "mutants", "kind": "fault", **fault._asdict(), **verdict._asdict()}
                append(rows, [row], seed=0)
    end = time.monotonic()
    print(
        f"{found} of {len(chosen)} found in {(end - checked) / 60:.1f} minutes, checked in {(checked - start) / 60:.1f}"
    )
    if rows is not None:
        row = {"faults": len(chosen), "found": found, "survived": len(chosen) - found, "share": found / len(chosen)}
        seconds = {"seconds": end - checked, "check_s": checked - start}
        append(rows, [{"study": "mutants", "kind": "all", **row, **seconds}], seed=0)


@contextlib.contextmanager
def repository() -> Iterator[Path]:
    """A copy of the repository, for as long as it is needed."""
    copy = Path(tempfile.mkdtemp(prefix="qrefta-mutants-"))
    try:
        for name in ("qrefta", "eval", "tests", "scripts", "docs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
        for name in ("README.md", "pyproject.toml"):
            shutil.copy(ROOT / name, copy / name)
        yield copy
    finally:
        shutil.rmtree(copy)


def judge(fault: Fault, copy: Path) -> Verdict:
    """Run a fault's tests with it in a copy of the repository, which is left as it was.

    Raises:
        ValueError: if the file does not have the fault's text just once, or its tests are none.
    """
    file = copy / "qrefta" / fault.file
    text, before = file.read_text(encoding="utf-8"), file.stat()
    if text.count(fault.old) != 1:
        raise ValueError(
            f"{fault.file} has {fault.old!r} {text.count(fault.old)} times; a fault's text must be there once."
        )
    file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    start = time.monotonic()
    try:
        passed = passes(copy, fault.tests)
    finally:
        file.write_text(text, encoding="utf-8")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # what Python compiled of it holds again
    return Verdict("survived" if passed else "found", time.monotonic() - start)


def together(faults: list[Fault]) -> list[str]:
    """The tests of all faults, each once, a line for each test file."""
    chosen: dict[str, list[str]] = {}
    for fault in faults:
        files, _, expression = fault.tests.partition(" -k ")
        for file in files.split():
            chosen.setdefault(file, []).append(" ".join(shlex.split(expression)))
    return [
        file if "" in parts else f"{file} -k {shlex.quote(' or '.join(f'({part})' for part in dict.fromkeys(parts)))}"
        for file, parts in chosen.items()
    ]


def passes(copy: Path, tests: str) -> bool:
    """Whether pytest ends well in a forked process; one that takes too long is killed, and has not passed.

    Raises:
        ValueError: if there are no such tests.
    """
    child = os.fork()
    if child == 0:
        code = _INTERRUPTED
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE_S + 60)  # should this process be gone by then
        with contextlib.suppress(BaseException):
            code = _pytest(copy, tests)
        os._exit(code)
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) not in (_PASSED, _FAILED, _INTERRUPTED):
                raise ValueError(f"pytest finds no tests for {tests}; name some.")
            return status == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _pytest(copy: Path, tests: str) -> int:
    """Its exit code, in this process, which sees nothing but the copy and says nothing."""
    os.setsid()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.path.insert(0, str(copy))
    for name in [name for name in sys.modules if name.split(".")[0] in ("eval", "qrefta", "tests")]:
        del sys.modules[name]
    import pytest

    return pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)])


def _import_libraries() -> None:
    """What the tests import, but for qrefta: once, for all of them."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import transformers

    for name in ("Trainer", "BertForSequenceClassification", "LlamaForCausalLM", "AutoTokenizer"):
        getattr(transformers, name)


if __name__ == "__main__":
    typer.run(run)
