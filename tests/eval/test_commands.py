"""python -m eval: every study is listed, found and documented."""

import ast
import tomllib
from pathlib import Path

import pytest

from eval import __main__ as commands
from eval.report.findings import typed
from eval.robustness import mutation
from eval.rows import context

ROOT = Path(commands.__file__).parents[1]


def parsed(module):
    return ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", commands.STUDIES)
def test_every_study_has_a_docstring_and_a_run_function(name):
    tree = parsed(commands.STUDIES[name].module)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert ast.get_docstring(tree)
    assert "run" in functions


def test_every_module_with_a_command_is_listed():
    listed = {entry.module for entry in commands.STUDIES.values()}
    found = set()
    for path in (ROOT / "eval").rglob("*.py"):
        if path.name != "__main__.py" and '__name__ == "__main__"' in path.read_text("utf-8"):
            found.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert found == listed


def test_the_list_names_every_study(capsys):
    commands.main([])
    output = capsys.readouterr().out
    assert all(name in output for name in commands.STUDIES)


def test_an_unknown_study_is_refused_with_the_list(capsys):
    with pytest.raises(SystemExit) as error:
        commands.main(["acuracy"])
    assert error.value.code == 2
    told = capsys.readouterr().err
    assert "There is no study 'acuracy'" in told
    assert "quant_error" in told


def test_help_shows_the_docstring_as_it_is_written(capsys):
    with pytest.raises(SystemExit):
        commands.main(["coverage", "--help"])
    output = capsys.readouterr().out
    assert "python -m eval coverage" in output
    assert "Counted from the configs of published models: both tools replace modules" in output


def test_a_rows_command_is_typed_today_as_it_was_recorded(monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "cost", "--rows", "my rows.jsonl"])
    command = context(seed=0)["command"]
    assert command.startswith("python")
    assert command.endswith("cost --rows 'my rows.jsonl'")
    assert typed(command) == command
    assert typed("cost.py --rows rows.jsonl") == "python -m eval cost --rows rows.jsonl"


def test_mutation_names_the_module_and_its_tests_in_a_copy_of_the_settings(tmp_path):
    project = tmp_path / "pyproject.toml"
    project.write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
    mutation.configure(project, Path("qrefta/model/names.py"), ["tests/model"])
    settings = tomllib.loads(project.read_text(encoding="utf-8"))["tool"]["mutmut"]
    assert settings["only_mutate"] == ["qrefta/model/names.py"]
    assert settings["pytest_add_cli_args_test_selection"] == ["tests/model"]
    assert settings["source_paths"] == ["qrefta"]


@pytest.mark.parametrize(
    ("module", "tests", "message"),
    [
        ("qrefta/nothing.py", ["tests"], "no module qrefta/nothing.py"),
        ("qrefta/choices.py", ["tests/nothing"], "no tests in tests/nothing"),
    ],
)
def test_mutation_refuses_paths_that_do_not_exist(module, tests, message):
    with pytest.raises(ValueError, match=message):
        mutation.run(Path(module), tests, processes=1, diffs=False, rows=None)
