"""Pictures of the findings on quantization error, depth, divergence and cost."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes

from eval.report.canvas import (
    BLACK,
    BLUE,
    BROWN,
    GREEN,
    GREY,
    LOWER,
    ORANGE,
    PINK,
    RED,
    SKY,
    STYLE,
    Picture,
    add_legend,
    canvas,
    plain_ticks,
    render,
)
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
