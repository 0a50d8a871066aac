"""The README's tables are the committed rows."""

from eval.report.readme_table import README, insert


def test_tables_are_made_from_the_committed_rows():
    text = README.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == 5
    assert insert(text) == text
