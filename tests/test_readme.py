"""The README is true: its code runs, its numbers have rows, its file tree is the tree on disk."""

import re
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

from tests.minilm import FOLDER, needs_minilm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"


@needs_minilm
def test_all_python_blocks_run_in_order(tmp_path, monkeypatch):
    """One namespace, as a reader types them; the hub name stands for a local folder with two of the model's layers."""
    short = AutoModel.from_pretrained(FOLDER, num_hidden_layers=2)
    for saved in (short, AutoTokenizer.from_pretrained(FOLDER)):
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


def test_documented_arguments_are_those_of_prepare():
    import inspect

    import qrefta

    table = README.split("| argument | default | |")[1].split("\n\n")[0]
    parameters = inspect.signature(qrefta.prepare).parameters
    for name, default in re.findall(r"^\| `(\w+)` \| `?([^`|]+)`? \|", table, flags=re.MULTILINE):
        assert repr(parameters[name].default).replace("'", '"') == default.strip(), name
