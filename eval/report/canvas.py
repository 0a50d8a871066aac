"""Panels as SVG text: equal numbers give equal bytes; colours suit colour blindness.

A picture is one panel, narrow enough for a phone. Text stays text, laid out for DejaVu Sans.
"""

import re
from html import escape
from io import StringIO
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

WIDTH = 4.2  # inches
LOWER = "\n(lower is better)"
HIGHER = "\n(higher is better)"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qrefta",
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "axes.edgecolor": "#555",
    "axes.labelcolor": "#222",
    "xtick.color": "#333",
    "ytick.color": "#333",
    "legend.frameon": False,
    "legend.fontsize": 8.2,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
}
BLACK = "#000000"
GREY = "#777777"
ORANGE = "#E69F00"
SKY = "#56B4E9"
GREEN = "#009E73"
BLUE = "#0072B2"
RED = "#D55E00"
PINK = "#CC79A7"
BROWN = "#8C564B"


class Picture(NamedTuple):
    """SVG text, the name of its file, and its alternative text."""

    name: str
    alt: str
    svg: str


def render(figure: Figure, name: str, alt: str) -> Picture:
    """The figure as inline SVG with a title; ids are unique on a page with several pictures."""
    buffer = StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(
            buffer,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = re.sub(r"(\bid=\"|href=\"#|url\(#)", rf"\g<1>{name}-", text[text.index("<svg") :])
    opening, rest = text.split(">", 1)
    title = f'<title id="{name}-title">{escape(alt)}</title>'
    head = f'{opening} role="img" aria-labelledby="{name}-title">\n {title}'
    return Picture(
        name, alt, "\n".join(line.rstrip() for line in (head + rest).splitlines()) + "\n"
    )


def canvas(height: float, x: str, y: str) -> tuple[Figure, Axes]:
    """A figure of one panel with labelled axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot(xlabel=x, ylabel=y)
    return figure, axes


def add_legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """Add a legend below the panel, one entry per name."""
    handles, labels = axes.get_legend_handles_labels()
    lines = [handle[0] if isinstance(handle, ErrorbarContainer) else handle for handle in handles]
    entries = dict(zip(labels, lines))
    with matplotlib.rc_context(STYLE):
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside lower center",
            ncols=columns,
            columnspacing=1.2,
        )


def plain_ticks(axes: Axes, ticks: list[float]) -> None:
    """Put plain numbers on a logarithmic x axis."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
