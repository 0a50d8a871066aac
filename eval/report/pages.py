"""The report as a Markdown file with linked pictures, and as one self-contained HTML page."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from eval.report.canvas import Picture
from eval.report.findings import Table
from eval.report.verdicts import THRESHOLDS, Verdict

COLUMNS = ["claim", "measured here", "verdict", "comment"]
NAME = "qrefta: measurements"
LEAD = (
    "Every number, title and verdict on this page is computed from the committed rows by "
    "python -m eval report. W is a weight, Q(W) is its 4-bit form, and Ŵ is the weight that a "
    "method uses, factors "
    "included."
)
CSS = """
:root {
  color: #1b1b1b; background: #fff;
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
body { max-width: 66rem; margin: 0 auto; padding: 1.2rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: .6em 0 .4em; }
h2 {
  font-size: 1.25rem; line-height: 1.35; margin: 0 0 .5em;
  text-wrap: balance; overflow-wrap: anywhere;
}
p, li { max-width: 46rem; overflow-wrap: anywhere; }
section { margin: 2.6rem 0; padding-top: 1.4rem; border-top: 1px solid #d8d8d8; }
.pictures {
  display: grid; gap: 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr));
}
figure { margin: 0; max-width: 33rem; }
figure svg { display: block; width: 100%; height: auto; }
@media (min-width: 56rem) {
  .two-columns { display: grid; grid-template-columns: 1fr 30rem; gap: 2rem; align-items: start; }
  .two-columns p { margin-top: .3em; }
}
details { margin-top: 1rem; }
summary { cursor: pointer; color: #0b5394; }
.scroll { overflow-x: auto; }
table {
  border-collapse: collapse; font-size: .84rem; line-height: 1.4;
  font-variant-numeric: tabular-nums;
}
th, td {
  padding: .35em .7em; text-align: right; vertical-align: top; border-bottom: 1px solid #e4e4e4;
}
th { color: #444; font-weight: 600; vertical-align: bottom; }
td:first-child, th:first-child, .text, .verdicts td, .verdicts th { text-align: left; }
td:first-child { min-width: 8.5em; }
.verdicts td:nth-child(1) { font-weight: 600; width: 22%; }
.verdicts td:nth-child(3) { white-space: nowrap; }
.word { padding: .1em .5em; border: 1.5px solid; border-radius: .3em; font-weight: 600; }
.holds { color: #00664b; } .holds-in-part { color: #7a5300; } .does-not-hold { color: #a63c00; }
.cannot-be-decided-here { color: #555; }
@media (max-width: 46rem) {
  :root { font-size: 16px; }
  .verdicts thead { display: none; }
  .verdicts, .verdicts tbody, .verdicts tr, .verdicts td { display: block; width: auto; }
  .verdicts td:nth-child(1) { width: auto; }
  .verdicts tr { padding: .8em 0; border-bottom: 1px solid #ccc; }
  .verdicts td { border: 0; padding: .15em 0; overflow-wrap: anywhere; }
}
@media print {
  :root { font-size: 10pt; }
  body { max-width: none; padding: 0; }
  section { break-inside: auto; margin: 1.2rem 0; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  .pictures { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; }
  table { font-size: 7pt; } th, td { padding: .2em .35em; overflow-wrap: anywhere; }
  details::details-content { display: block; content-visibility: visible; height: auto; }
}
"""


class Section(NamedTuple):
    """A finding: title, reading aid, pictures, tables by name, and sentences before all of them."""

    title: str
    text: str
    pictures: list[Picture]
    tables: dict[str, Table]
    points: Sequence[str] = ()


class Report(NamedTuple):
    """The content of a page.

    Attributes:
        first: sections before the claims.
        missing: commands that measure rows which are missing.
        measured: commands, commits, machines and versions of the rows.
    """

    first: list[Section]
    verdicts: list[Verdict]
    sections: list[Section]
    missing: list[str]
    measured: Table


def markdown(report: Report, folder: str) -> str:
    """The report in Markdown; `folder` holds its pictures."""
    told = [
        [one.claim, "\n".join(one.measured), f"**{one.word}**", one.why] for one in report.verdicts
    ]
    parts = [f"# {NAME}", LEAD]
    for section in report.first:
        parts += markdown_section(section, folder)
    parts += ["## The claims", markdown_table(Table(COLUMNS, told)), THRESHOLDS]
    for section in report.sections:
        parts += markdown_section(section, folder)
    parts += [f"Not measured yet: run `{command}`." for command in report.missing]
    parts += [
        "## How it was measured",
        folded("Commands, commits, machines and versions", report.measured),
    ]
    return "\n\n".join(parts) + "\n"


def markdown_section(section: Section, folder: str) -> list[str]:
    """Title, text, pictures and folded tables of a section; `folder` holds its pictures."""
    return [
        f"## {section.title}",
        *(["\n".join(f"- {point}" for point in section.points)] if section.points else []),
        section.text,
        *(f"![{picture.alt}]({folder}/{picture.name}.svg)" for picture in section.pictures),
        *(folded(name, table) for name, table in section.tables.items()),
    ]


def folded(name: str, table: Table) -> str:
    """A table in Markdown that opens on a click."""
    return f"<details><summary>{escape(name)}</summary>\n\n{markdown_table(table)}\n\n</details>"


def markdown_table(table: Table) -> str:
    """Pipes and dashes; a line break in a cell becomes <br>."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def html_page(report: Report) -> str:
    """The report as one HTML page that loads no other file."""
    parts = [
        f"<h1>{NAME}</h1>\n<p>{LEAD}</p>",
        *(html_section(section) for section in report.first),
        f"<section><h2>The claims</h2>\n{verdict_table(report.verdicts)}\n"
        f"<p>{escape(THRESHOLDS)}</p></section>",
        *(html_section(section) for section in report.sections),
        *(
            f"<section><p>Not measured yet: run <code>{escape(command)}</code>.</p></section>"
            for command in report.missing
        ),
        "<section><h2>How it was measured</h2>\n"
        f"{html_details('Commands, commits, machines and versions', report.measured)}</section>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{NAME}</title>\n<style>{CSS}</style>\n'
        "</head>\n<body>\n<main>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


def html_section(section: Section) -> str:
    """Title, text, pictures and folded tables of a section."""
    pictures = "\n".join(f"<figure>\n{picture.svg}</figure>" for picture in section.pictures)
    tables = "\n".join(html_details(name, table) for name, table in section.tables.items())
    layout = "two-columns" if len(section.pictures) == 1 else "one-column"
    points = "".join(f"<li>{escape(point)}</li>\n" for point in section.points)
    return (
        f"<section><h2>{escape(section.title)}</h2>\n"
        f"{f'<ul>{points}</ul>' if points else ''}\n"
        f'<div class="{layout}"><p>{escape(section.text)}</p>\n'
        f'<div class="pictures">\n{pictures}\n</div></div>\n{tables}</section>'
    )


def html_details(name: str, table: Table) -> str:
    """A table that opens on a click; a table wider than the page scrolls sideways."""
    words = [all(line[at][:1].isalpha() for line in table.rows) for at in range(len(table.header))]
    marks = [' class="text"' if text else "" for text in words]
    head = "".join(f"<th{mark}>{escape(cell)}</th>" for mark, cell in zip(marks, table.header))
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{mark}>{escape(cell)}</td>" for mark, cell in zip(marks, line))
        + "</tr>"
        for line in table.rows
    )
    return (
        f'<details><summary>{escape(name)}</summary>\n<div class="scroll" tabindex="0">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>\n</details>"
    )


def verdict_table(verdicts: list[Verdict]) -> str:
    """One row per claim; narrow screens stack its cells."""
    lines = [
        f"<tr><td>{escape(one.claim)}</td><td>{'<br>'.join(map(escape, one.measured))}</td>"
        f'<td><span class="word '
        f'{one.word.replace(" ", "-")}">{one.word}</span></td><td>{escape(one.why)}</td></tr>'
        for one in verdicts
    ]
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    body = "\n".join(lines)
    return (
        f'<table class="verdicts">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>"
    )
