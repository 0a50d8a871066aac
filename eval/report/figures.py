"""Pictures of findings as SVG text: equal numbers give equal bytes; colours suit colour blindness.

A picture is one panel, narrow enough for a phone. Text stays text, laid out for DejaVu Sans.
"""

import re
from html import escape
from io import StringIO
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from eval.report.findings import (
    BLOCKS,
    DRAWN_LORA,
    DRAWN_SHARED,
    Row,
    Series,
    curves,
    distinct,
    layers_table,
    pick,
    ranked,
    series,
    stack_label,
    trainable_parameters,
)
from eval.report.kept import Points, front
from eval.report.scores import RANK_WORDS, Score, kind
from eval.tasks.task import METRICS

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
STARTS = {"one shot": (SKY, "o"), "refined": (BLUE, "s"), "calibrated": (GREEN, "D")}
CRAFT = {"one shot": (BROWN, "<"), "refined": (BROWN, ">")}
METHODS = {
    "pissa": (ORANGE, "^"),
    "loftq": (RED, "v"),
    "qera": (PINK, "P"),
    "smaller block": (BLACK, "X"),
    "smaller block, 8-bit scales": (GREY, "*"),
}
TRANSFORMS = {"lsm3": (BLUE, "o"), "dct": (ORANGE, "^"), "identity": (BLACK, "s")}
PEERS = {
    "lora": (BLUE, "o"),
    "pissa": (SKY, "^"),
    "vera": (GREY, "d"),
    "loretta": (GREY, "h"),
    "qlora": (RED, "s"),
    "qpissa": (ORANGE, "v"),
    "loftq": (PINK, "D"),
}
KEPT = {
    "bitsandbytes": (GREY, "s"),
    "GPTQ": (BLACK, "X"),
    "PiSSA": (ORANGE, "^"),
    "LoftQ": (RED, "v"),
    "QERA": (PINK, "P"),
    "qrefta without text": (SKY, "o"),
    "qrefta, calibrated": (BLUE, "D"),
    "qrefta, error feedback": (GREEN, "*"),
    "qrefta, layer after layer": (BROWN, "h"),
}
TENSOR_COLORS = {"refta": GREEN, "craft": BROWN, "tera": BLACK}  # others: grey
TENSOR_MARKERS = "P*X<>hp8"


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


def look(one: Series) -> dict[str, Any]:
    """Colour and marker of a series."""
    color, marker = (
        STARTS[one.start] if one.method == "refta" else METHODS.get(one.method) or CRAFT[one.start]
    )
    return {"color": color, "marker": marker}


def whole(axes: Axes) -> None:
    """Draw the line at 1, the error of quantizing whole weights."""
    axes.axhline(1, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    axes.annotate(
        "whole weights",
        (0.995, 1),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color="#555",
        fontsize=8,
    )


def error_curves(rows: list[Row], value: str, error: str, name: str, alt: str) -> Picture:
    """Error over R, one curve per method, from rows of kind model and one format."""
    figure, axes = canvas(3.9, "R, components per stack", f"{error}, relative to Q(W){LOWER}")
    whole(axes)
    for one, points in curves(ranked(rows), value).items():
        axes.plot(*zip(*points), label=one.label, **look(one))
    axes.set_ylim(bottom=0)
    add_legend(figure, axes)
    return render(figure, name, alt)


def transform_curves(rows: list[Row], start: str, name: str, alt: str) -> Picture:
    """Error over R relative to identity, one curve per transform, of one start and format."""
    found = {
        one.transform: dict(points)
        for one, points in curves(pick(rows, start=start), "ratio").items()
    }
    figure, axes = canvas(
        3.4, "R, components per stack", f"weight error, relative to identity{LOWER}"
    )
    for transform, points in found.items():
        shared = [rank for rank in points if rank and rank in found.get("identity", {})]
        color, marker = TRANSFORMS[transform]
        axes.plot(
            shared,
            [points[rank] / found["identity"][rank] for rank in shared],
            label=transform,
            color=color,
            marker=marker,
        )
    axes.set_title(start, fontsize=9.5)
    axes.ticklabel_format(useOffset=False)
    add_legend(figure, axes, columns=3)
    return render(figure, name, alt)


def bytes_curves(rows: list[Row], name: str, alt: str) -> Picture:
    """Error over bits per weight, one curve per method, from rows of kind model and one format."""
    figure, axes = canvas(
        4.2,
        "bits per weight, factors and scales included",
        f"weight error, relative to Q(W){LOWER}",
    )
    whole(axes)
    for one, points in curves(
        [*ranked(rows), *pick(rows, method=BLOCKS)], "ratio", x="bits_per_weight"
    ).items():
        axes.plot(
            *zip(*points),
            label=one.label,
            linestyle=":" if one.method in BLOCKS else "-",
            **look(one),
        )
    axes.set_ylim(bottom=0)
    add_legend(figure, axes)
    return render(figure, name, alt)


def stack_dots(rows: list[Row], rank: int, name: str, alt: str) -> Picture:
    """Error of every stack at one R, one dot per method."""
    found = pick(ranked(rows), rank=rank)
    stacks = distinct(found, "stack")
    figure, axes = canvas(
        1.5 + 0.42 * len(stacks), f"error at R = {rank}, relative to Q(W){LOWER}", ""
    )
    axes.axvline(1, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    for one in dict.fromkeys(map(series, found)):
        points = [(row["ratio"], stacks.index(row["stack"])) for row in found if series(row) == one]
        axes.plot(*zip(*points), label=one.label, linestyle="", alpha=0.9, **look(one))
    axes.set_yticks(range(len(stacks)), [stack_label(stack) for stack in stacks])
    axes.invert_yaxis()
    add_legend(figure, axes)
    return render(figure, name, alt)


def layer_map(rows: list[Row], rank: int, name: str, alt: str) -> Picture:
    """Error of the refined split by stack and layer at one R, as a heat map with numbers."""
    table = layers_table(rows, rank)
    ratios = [
        [float(cell) if cell != "-" else float("nan") for cell in line[1:]] for line in table.rows
    ]
    figure, axes = canvas(1.4 + 0.36 * len(ratios), "layer", "")
    image = axes.imshow(
        ratios, cmap="cividis", vmin=0, vmax=max(1.0, *map(max, ratios)), aspect="auto"
    )
    axes.grid(visible=False)
    columns = len(ratios[0])
    axes.set_xticks(
        range(0, columns, max(1, columns // 12)), range(1, columns + 1, max(1, columns // 12))
    )
    axes.set_yticks(range(len(ratios)), [line[0] for line in table.rows])
    for row, line in enumerate(ratios):
        for column, ratio in enumerate(line if columns <= 12 else []):
            color = "white" if ratio < 0.5 else "black"
            axes.text(
                column, row, f"{ratio:.2f}", ha="center", va="center", fontsize=7.5, color=color
            )
    with matplotlib.rc_context(STYLE):
        figure.colorbar(image, label=f"error, relative to Q(W){LOWER}")
    return render(figure, name, alt)


def spectrum_lines(rows: list[Row], name: str, alt: str) -> Picture:
    """Tensor singular values of one stack by transform: about 100, evenly on the log axis."""
    figure, axes = canvas(3.5, "component, largest first", "tensor singular value")
    for row in rows:
        count = len(row["values"])
        drawn = sorted({min(count, round(count ** (step / 100))) for step in range(101)})
        color, marker = TRANSFORMS[row["transform"]]
        axes.plot(
            drawn,
            [row["values"][at - 1] for at in drawn],
            label=row["transform"],
            color=color,
            marker=marker,
            markevery=0.12,
            markersize=4.5,
            linewidth=1.3,
        )
    plain_ticks(
        axes,
        [10**power for power in range(5) if 10**power <= max(len(row["values"]) for row in rows)],
    )
    axes.set_ylim(bottom=0)
    axes.set_title(stack_label(rows[0]["stack"]), fontsize=9.5)
    add_legend(figure, axes, columns=3)
    return render(figure, name, alt)


def score_scatter(methods: dict[str, Score], name: str, alt: str) -> Picture:
    """Scores with standard errors over adapter parameters; head-only and full are lines."""
    scale = 100 if next(iter(methods.values())).metric == "accuracy" else 1
    measured = next(iter(methods.values())).metric
    direction = HIGHER if METRICS[measured].more_is_better else LOWER
    metric = f"{measured}{', %' if scale == 100 else ''}{direction}"
    figure, axes = canvas(5.9, "adapter parameters (similar counts side by side)", metric)
    axes.set_xscale("log")
    lines = [score for score in methods.values() if score.adapter == 0 or score.method == "full"]
    points = [score for score in methods.values() if score not in lines]
    low, high = value_range(points or lines)
    for score, style in zip(lines, ((0, (1, 2)), (0, (5, 3)), "-.")):
        inside = low <= score.mean <= high
        away = "" if inside else f", {scale * score.mean:.3g} (off the scale)"
        axes.axhline(
            scale * score.mean,
            color="#444",
            linestyle=style,
            linewidth=1.2,
            label=f"{score.method}{away}",
        )
        error = score.standard_error or 0
        axes.axhspan(
            scale * (score.mean - error),
            scale * (score.mean + error),
            color="#444",
            alpha=0.08,
            linewidth=0,
        )
    tensor = list(
        dict.fromkeys(kind(score.method) for score in points if kind(score.method) not in PEERS)
    )
    for cluster in near(points):
        center = cluster[len(cluster) // 2].adapter
        for place, score in enumerate(cluster):
            label = kind(score.method)
            color, marker = PEERS.get(label) or (
                TENSOR_COLORS.get(label.split()[0], GREY),
                TENSOR_MARKERS[tensor.index(label) % len(TENSOR_MARKERS)],
            )
            hollow = label in tensor and "bits=16" not in label
            axes.errorbar(
                center * 1.14 ** (place - (len(cluster) - 1) / 2),
                scale * score.mean,
                scale * (score.standard_error or 0),
                color=color,
                marker=marker,
                linestyle="",
                capsize=2.5,
                markersize=6.5,
                elinewidth=1.1,
                label=label,
                mfc="white" if hollow else color,
            )
        ranks = "\n".join(
            dict.fromkeys(
                word
                for score in cluster
                for word in score.method.split()
                if word.startswith(RANK_WORDS)
            )
        )
        axes.annotate(
            ranks,
            (center, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color="#333",
        )
    centers = [cluster[len(cluster) // 2].adapter for cluster in near(points)]
    axes.set_xticks(centers, [f"{center:,}" for center in centers])
    axes.margins(x=0.12)
    axes.set_ylim(scale * low, scale * high)
    axes.xaxis.set_minor_locator(NullLocator())
    add_legend(figure, axes, columns=1)
    return render(figure, name, alt)


def value_range(points: list[Score]) -> tuple[float, float]:
    """The range of the scores with standard errors, extended by a third on both sides."""
    ends = [point.mean + sign * (point.standard_error or 0) for point in points for sign in (-1, 1)]
    margin = (max(ends) - min(ends)) / 3 or 0.01
    return min(ends) - margin, max(ends) + margin


def near(points: list[Score]) -> list[list[Score]]:
    """Scores in groups whose largest parameter count is at most 1.3 times the smallest."""
    groups: list[list[Score]] = []
    for score in sorted(points, key=lambda score: score.adapter):
        if groups and score.adapter <= 1.3 * groups[-1][0].adapter:
            groups[-1].append(score)
        else:
            groups.append([score])
    return groups


def kept_points(points: dict[str, Points], value: str, text: str, name: str, alt: str) -> Picture:
    """A distance to the 16-bit model over bits a weight, one point a base, and the best of them.

    Args:
        points: (bits, value) by series.
        value: name of the distance.
        text: that it was measured on.
        name, alt: of the picture.
    """
    figure, axes = canvas(4.4, "bits a weight, scales and factors included", f"{value}{LOWER}")
    best = front(point for found in points.values() for point in found)
    axes.plot(*zip(*best), color=GREY, linewidth=1, zorder=1)
    for maker, (color, marker) in KEPT.items():
        if maker in points:
            axes.plot(
                *zip(*points[maker]),
                color=color,
                marker=marker,
                markersize=8 if marker == "*" else 5.5,
                linestyle="",
                alpha=0.85,
                label=maker,
            )
    axes.set_title(text, fontsize=9.5)
    axes.set_ylim(bottom=0)
    add_legend(figure, axes)
    return render(figure, name, alt)


def depth_lines(
    stacks: list[tuple[int, int, int]], layers: list[int], name: str, alt: str
) -> Picture:
    """Trainable parameters over the number of layers, the crossings, and the model's depth."""
    figure, axes = canvas(3.8, "layers of the model", f"trainable parameters{LOWER}")
    for R, color, style in zip(DRAWN_SHARED, (GREEN, GREEN), ("-", "--")):
        axes.plot(
            layers,
            [trainable_parameters(stacks, depth, R=R) for depth in layers],
            color=color,
            linestyle=style,
            label=f"ReFTA R = {R}",
        )
    for r, color, style in zip(DRAWN_LORA, (BLUE, BLUE), ("-", "--")):
        axes.plot(
            layers,
            [trainable_parameters(stacks, depth, r=r) for depth in layers],
            color=color,
            linestyle=style,
            label=f"LoRA r = {r}",
        )
    crossings = [
        (R / r, trainable_parameters(stacks, R=R)) for R in DRAWN_SHARED for r in DRAWN_LORA
    ]
    inside = [point for point in crossings if layers[0] <= point[0] <= layers[-1]]
    axes.plot(*zip(*inside), linestyle="", marker="o", color=BLACK, markersize=5, label="equal")
    here = max(depth for depth, _, _ in stacks)
    axes.axvline(here, color=GREY, linewidth=1, linestyle=":", label=f"this model, {here} layers")
    axes.set_yscale("log")
    plain_ticks(axes, layers)
    add_legend(figure, axes)
    return render(figure, name, alt)


def cost_dots(rows: list[Row], name: str, alt: str) -> Picture:
    """Time and peak memory of a step relative to the floor, one line per method."""
    figure, axes = canvas(1.3 + 0.29 * len(rows), f"relative to the floor{LOWER}", "")
    axes.axvline(1, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    places = range(len(rows))
    axes.plot(
        [row["of_floor"] for row in rows],
        places,
        linestyle="",
        marker="o",
        color=BLUE,
        label="time",
    )
    axes.plot(
        [row["peak_of_floor"] for row in rows],
        places,
        linestyle="",
        marker="s",
        color=RED,
        mfc="none",
        label="peak memory",
    )
    axes.set_yticks(places, [row["method"] for row in rows])
    axes.invert_yaxis()
    add_legend(figure, axes)
    return render(figure, name, alt)
