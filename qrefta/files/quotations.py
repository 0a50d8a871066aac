"""Quotations in a table that end where a cell goes on, or that do not end. Torch-free.

In a quoted cell of a csv file a quotation mark is written twice. Some programs write it behind a
backslash instead (pandas with `escapechar`, MySQL), and pyarrow reads such a cell wrong without an
error: the mark ends the quotation, and the rest of the cell is appended.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_SHOWN = 80  # characters of a cell, in an error
_INSIDE = re.compile(r'[^"]*(?:""[^"]*)*')  # of a quotation, up to the mark that ends it


def check_quotations(
    path: Path, lines: Iterable[str], delimiter: str, columns: Sequence[str]
) -> None:
    """Raise ValueError for a quotation that ends inside its cell, or not at all.

    Args:
        path: of the file, for the error.
        lines: of the rows, with the characters that end them.
        delimiter: between two cells.
        columns: their names.
    """
    ends = f"{delimiter}\r\n"
    next_cell = re.compile(f"[^{re.escape(delimiter)}]*")
    row = 0
    column = 0
    quotation: list[str] | None = None  # parts of the quotation that is open
    for line in lines:
        position = 0
        if quotation is None:
            if not line.strip("\r\n"):
                continue
            row += 1
            column = 0
            if '"' not in line:
                continue
        while position < len(line):
            if quotation is None and line[position] == '"':
                quotation = []
                position += 1
            if quotation is not None:
                end = _end(line, position)
                quotation.append(line[position:end])
                position = end + 1
                if end == len(line):
                    break
                rest = line[position:].lstrip(" ")
                if rest and rest[0] not in ends:
                    raise _broken(path, row, columns, column, quotation, rest)
                quotation = None
            found = next_cell.match(line, position)
            assert found is not None, "the expression matches an empty cell"
            position = found.end() + 1
            column += 1
    if quotation is not None:
        raise ValueError(
            f"{path}, {_place(row, columns, column)}: the quotation that begins with "
            f"{''.join(quotation)[:_SHOWN]!r} does not end; close it, or remove the quotation mark."
        )


def _end(line: str, position: int) -> int:
    found = _INSIDE.match(line, position)
    assert found is not None, "the expression matches an empty quotation"
    return found.end()


def _broken(
    path: Path, row: int, columns: Sequence[str], column: int, quotation: list[str], rest: str
) -> ValueError:
    return ValueError(
        f"{path}, {_place(row, columns, column)}: the quotation {''.join(quotation)[:_SHOWN]!r} "
        f"ends before {rest.rstrip()[:_SHOWN]!r}, inside the cell. Close every quotation, and "
        'write a quotation mark in a quoted cell twice (""), not behind a backslash. pandas '
        "rewrites a file with backslashes: "
        'pandas.read_csv(old, escapechar="\\\\").to_csv(new, index=False).'
    )


def _place(row: int, columns: Sequence[str], column: int) -> str:
    name = columns[column] if column < len(columns) else str(column + 1)
    return f"row {row}, column {name}"
