"""The tables of the README and of docs/ are the committed rows."""

import pytest

from eval.report.readme_table import PAGES, insert


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_made_from_the_committed_rows(page):
    text = page.read_text(encoding="utf-8")
    assert insert(text) == text


def test_there_are_tables():
    marks = [page.read_text(encoding="utf-8").count("<!-- table: ") for page in PAGES]
    assert marks[0] == 2
    assert sum(marks) >= 6
