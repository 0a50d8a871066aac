"""The README is true: its code runs. tests/eval checks that its numbers come from committed
rows.
"""

from tests.pages import ROOT, run_blocks, small_models, write_data

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_all_python_blocks_run_in_order(tmp_path, monkeypatch):
    """In one namespace, as a reader types them."""
    folders = small_models(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    assert run_blocks(README, folders) == 2
    for folder in ("prepared", "tuned", "merged"):
        assert (tmp_path / folder / "model.safetensors").is_file()


def test_the_page_is_short():
    assert len(README.splitlines()) <= 200
