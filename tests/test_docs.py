"""The pages under docs are true: code runs, links lead somewhere. tests/eval checks their
tables.
"""

import inspect
import re

import pytest
import yaml

import qrefta
from tests.pages import PYTHON_BLOCK, ROOT, run_blocks, small_models, write_data

DOCS = ROOT / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page for page in sorted(DOCS.rglob("*.md"))}
ELSEWHERE = {"add-a-method.md", "distributed.md"}  # run by test_methods.py and test_distributed.py
WITH_CODE = [name for name, page in PAGES.items() if PYTHON_BLOCK.search(page.read_text("utf-8"))]
LINK = re.compile(r"\]\(([\w./-]+)(?:#[\w-]+)?\)")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models under the names that the pages use."""
    return small_models(tmp_path_factory.mktemp("models"))


@pytest.mark.slow
# The pages use the name that all supported releases of transformers have; TRL's configs do too.
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", [name for name in WITH_CODE if name not in ELSEWHERE])
def test_python_blocks_run_in_order(name, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    run_blocks(PAGES[name].read_text("utf-8"), folders)


def test_links_lead_somewhere():
    pages = [*PAGES.values(), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    for page in pages:
        for target in LINK.findall(page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_and_notebook_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    notebooks = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.ipynb")]
    assert notebooks
    assert sorted(_page_names(settings["nav"])) == sorted([*PAGES, *notebooks])


def test_documented_settings_are_those_of_prepare():
    table = PAGES["settings.md"].read_text("utf-8")
    table = table.split("| argument | default | meaning |")[1].split("\n\n")[0]
    documented = re.findall(r"^\| `(\w+)` \| `?([^`|]+)`? \|", table, flags=re.MULTILINE)
    parameters = inspect.signature(qrefta.prepare).parameters
    assert len(documented) >= 16
    for name, default in documented:
        by_the_bits = ("5, calibrated 1", "64, below four bits 32")
        default = "None" if default.strip() in by_the_bits else default
        assert repr(parameters[name].default).replace("'", '"') == default.strip(), name


def _page_names(entry):
    """All file names in an entry of mkdocs' nav."""
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [name for child in children for name in _page_names(child)]
