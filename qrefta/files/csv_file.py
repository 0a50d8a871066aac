"""Tables with commas, semicolons, tabs or bars between the cells, read by pyarrow.

Every cell is text, as it is written: "NA", "null" and "01" stay words. An empty cell is None.
"""

import csv
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import csv as arrow

from qrefta.files.encodings import check_text, text_encoding
from qrefta.files.quotations import check_quotations

_DELIMITERS = ",;\t|"
_EXCEL = "sep="  # Excel's first line, which names the delimiter
_BLOCK_BYTES = 16_000_000  # read at a time; a row has to fit in
_SHOWN = 80  # characters of a row, in an error
_LINE_BREAK = re.compile(r"\s*[\r\n]\s*")


def csv_rows(file: str | Path, header: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file by column, read a block at a time.

    The delimiter is a comma, in a .tsv file a tab, or another one where the first line has a
    single column with these. In a .tsv file quotation marks are characters, since GLUE's files hold
    marks that open no quotation.

    Args:
        file: with a line of column names, unless `header` gives them.
        header: column names.

    Raises:
        ValueError: if the file is empty or no text, a column is there twice, a row has more or
            fewer cells than there are columns, or a quotation ends inside its cell or not at all;
            it names file and row. Row 1 is the first below the column names.
    """
    path = Path(file)
    is_tsv = path.suffix.lower() == ".tsv"
    uneven: list[arrow.InvalidRow] = []

    def note(row: arrow.InvalidRow) -> str:
        uneven.append(row)
        return "error"

    try:
        opening = _opening(path, is_tsv, header)
        named = 0 if header is not None else opening.lines  # lines that the column names take
        delimiter = opening.delimiter
        names = _names(path, opening.cells if header is None else header)
        encoding = text_encoding(path)
        if not is_tsv:
            with path.open(encoding=encoding, newline="") as lines:
                rows = islice(lines, opening.before + named, None)
                check_quotations(path, rows, delimiter, names)
        reader = arrow.open_csv(
            path,
            arrow.ReadOptions(
                use_threads=False,  # else rows have no numbers
                block_size=_BLOCK_BYTES,
                skip_rows=opening.before,
                column_names=names,
                skip_rows_after_names=int(header is None),
                encoding="utf8" if encoding == "utf-8-sig" else encoding,
            ),
            arrow.ParseOptions(
                delimiter=delimiter,
                quote_char=False if is_tsv else '"',
                newlines_in_values=not is_tsv,
                invalid_row_handler=note,
            ),
            arrow.ConvertOptions(
                column_types={name: pa.string() for name in names},
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        for batch in reader:
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, UnicodeError, csv.Error) as error:
        check_text(path)
        if not uneven:
            raise ValueError(f"{path} cannot be read: {error}") from error
        number = (uneven[0].number or 0) - named
        advice = (
            "A cell of a .tsv file holds no tab and no newline; quotation marks do not help."
            if is_tsv
            else f"Put a cell with {delimiter!r} in quotation marks, and close every quotation."
        )
        raise ValueError(
            f"{path}, row {number}, has {uneven[0].actual_columns} cells and there are "
            f"{len(names)} columns, {names}: {uneven[0].text[:_SHOWN]!r}. {advice}"
        ) from error


class _Opening(NamedTuple):
    """The first row of a table, and where it is.

    Attributes:
        before: lines before it.
        lines: that it takes; a quoted column name may hold a line break.
        cells: of it.
        delimiter: between them.
    """

    before: int
    lines: int
    cells: list[str]
    delimiter: str


def _opening(path: Path, is_tsv: bool, header: list[str] | None) -> _Opening:
    """Find the first row of a table, and its delimiter."""
    quoting = csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL
    delimiters = ("\t" if is_tsv else "") + _DELIMITERS
    needed = 2 if header is None else len(header)
    with path.open(encoding=text_encoding(path), newline="") as file:
        for before, line in enumerate(file):
            if not line.strip() or line.lower().startswith(_EXCEL):
                continue
            lines = [line]
            if not is_tsv and line.count('"') % 2:
                lines += _rest_of_quotation(file)
            found = {}
            for delimiter in delimiters:
                reader = csv.reader(lines, delimiter=delimiter, quoting=quoting)
                cells = next(reader)
                found[delimiter] = _Opening(before, reader.line_num, cells, delimiter)
            fitting = (one for one in found.values() if len(one.cells) >= needed)
            opening = next(fitting, found[delimiters[0]])
            alone = opening.lines == len(lines) and next(file, None) is None
            if header is None and alone:
                raise ValueError(f"{path} has one line, {line[:_SHOWN]!r}, and no rows.")
            return opening
    raise ValueError(f"{path} is empty; a table needs a line of column names, and rows.")


def _rest_of_quotation(lines: Iterator[str]) -> list[str]:
    """The lines up to the one that ends a quotation."""
    found = []
    for line in lines:
        found.append(line)
        if line.count('"') % 2:
            break
    return found


def _names(path: Path, cells: list[str]) -> list[str]:
    """Column names, with spaces for line breaks; columns without a name are numbered."""
    named = [_LINE_BREAK.sub(" ", cell.strip()) for cell in cells]
    names = [name or f"column {place}" for place, name in enumerate(named, 1)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{path} has two columns {twice!r}; rename or remove one of them.")
    return names
