"""The notebook under docs runs from top to bottom, and its committed output is whole and small."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM

import qrefta
from tests.language import language_model

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
LARGEST_BYTES = 40_000


def printed(notebook):
    """The output of the cells."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


@pytest.mark.slow
def test_the_chat_notebook_runs_from_top_to_bottom(tmp_path):
    for part in language_model("llama"):
        part.save_pretrained(tmp_path / "model")
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source = "name, folder, steps = 'model', 'out', 2"
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": tmp_path}}).execute()
    text = printed(notebook)
    assert "2 steps" in text
    assert "largest difference of the logits: 0.0" in text
    assert text.count("  before: ") == 3
    assert qrefta.quant_report(qrefta.load(tmp_path / "out" / "tuned"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_output_is_whole_and_small(path):
    """Every cell ran, in order, on the model that the parameters name."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {(output.output_type, output.get("name")) for cell in code for output in cell.outputs}
    assert kinds == {("stream", "stdout")}
    assert path.stat().st_size < LARGEST_BYTES
    assert not re.search(r"/(home|root|tmp|usr)/", printed(notebook))
