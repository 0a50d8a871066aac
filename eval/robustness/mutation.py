"""Mutation test of one module with mutmut: which small faults pass its tests.

mutmut changes one operator, number, name or string of a function at a time and runs the tests that
reach that function. A mutant is killed if a test fails. Each surviving mutant is listed with its
diff: it shows code that no test checks, or a change that makes no difference.

The module is mutated in a temporary copy of the repository, never in the working tree.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eval.rows import append
from qrefta.cli import guarded

ROOT = Path(__file__).parents[2]
COPIED = ("qrefta", "tests", "docs", "pyproject.toml", "README.md")
SECTION = "[tool.mutmut]"
COUNTS = ("killed", "survived", "no_tests", "timeout", "suspicious", "segfault", "skipped", "total")
console = Console()


def run(
    module: Annotated[
        Path, typer.Argument(help="Module to mutate, such as qrefta/model/names.py.")
    ],
    tests: Annotated[
        list[str], typer.Argument(help="Test files or folders that must find faults.")
    ],
    processes: Annotated[int, typer.Option(min=1, help="Mutants tested at once.")] = 1,
    diffs: Annotated[bool, typer.Option(help="Print the diff of each surviving mutant.")] = True,
    rows: Annotated[Path | None, typer.Option(help="File to add the counts to.")] = None,
) -> None:
    """Mutate a module and count the mutants that its tests kill."""
    if not (ROOT / module).is_file():
        raise ValueError(f"There is no module {module}; give a path such as qrefta/model/names.py.")
    for path in tests:
        if not (ROOT / path).exists():
            raise ValueError(f"There are no tests in {path}; give a path such as tests/model.")
    with tempfile.TemporaryDirectory(prefix="qrefta-mutation-") as folder:
        place = Path(folder)
        copy_tree(place)
        configure(place / "pyproject.toml", module, tests)
        start = time.monotonic()
        mutmut(place, "run", "--max-children", str(processes))
        seconds = time.monotonic() - start
        mutmut(place, "export-cicd-stats")
        stats = json.loads((place / "mutants" / "mutmut-cicd-stats.json").read_text())
        survivors = surviving(place)
        for name in survivors:
            console.print(name, style="bold")
            if diffs:
                console.print(mutmut(place, "show", name), markup=False, highlight=False)
    row = summary(module, tests, stats, survivors) | {"seconds": round(seconds)}
    console.print(f"{row['killed']} of {row['total']} mutants killed in {row['seconds']} s")
    if rows is not None:
        append(rows, [row], seed=0)


def copy_tree(place: Path) -> None:
    """Copy the working tree's tracked and new files that a test of the library needs."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *COPIED]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)


def configure(project: Path, module: Path, tests: list[str]) -> None:
    """Name the module and its tests in the copied pyproject.toml, because mutmut has no options."""
    text = project.read_text(encoding="utf-8")
    if SECTION not in text:
        raise ValueError(f"pyproject.toml has no section {SECTION}; mutmut needs it.")
    chosen = f"only_mutate = {json.dumps([module.as_posix()])}\n"
    chosen += f"pytest_add_cli_args_test_selection = {json.dumps(tests)}\n"
    head, tail = text.split(SECTION)
    _, body = tail.split("\n", 1)
    project.write_text(f"{head}{SECTION}\n{chosen}{body}", encoding="utf-8")


def mutmut(place: Path, *arguments: str) -> str:
    """Output of a mutmut command.

    Raises:
        ValueError: if it fails, which it does if a test fails without any mutant.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)  # for the same reason as -P below
    # -P: with this folder on its path, Python would import the module without mutants.
    command = [sys.executable, "-P", "-m", "mutmut", *arguments]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode:
        output = (done.stdout + done.stderr).replace("\r", "\n")
        raise ValueError(f"mutmut {arguments[0]} failed:\n{output[-2000:]}")
    return done.stdout


def surviving(place: Path) -> list[str]:
    """Names of the mutants that no test killed."""
    lines = (line.strip() for line in mutmut(place, "results").splitlines())
    return [line.partition(":")[0] for line in lines if line.endswith(("survived", "no tests"))]


def summary(
    module: Path, tests: list[str], stats: dict[str, int], survivors: list[str]
) -> dict[str, Any]:
    """The row of a run."""
    counts = {name: stats.get(name, 0) for name in COUNTS}
    named = {"study": "mutation", "module": module.as_posix(), "tests": tests}
    return named | counts | {"survivors": survivors}


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
