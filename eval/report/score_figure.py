"""The picture of scores over trainable parameters."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from eval.report.canvas import (
    BLACK,
    BLUE,
    BROWN,
    GREEN,
    GREY,
    HIGHER,
    LOWER,
    ORANGE,
    PINK,
    RED,
    SKY,
    Picture,
    add_legend,
    canvas,
    render,
)
from eval.report.scores import RANK_WORDS, Score, kind
from eval.tasks.task import METRICS

PEERS = {
    "lora": (BLUE, "o"),
    "pissa": (SKY, "^"),
    "vera": (GREY, "d"),
    "loretta": (GREY, "h"),
    "qlora": (RED, "s"),
    "qpissa": (ORANGE, "v"),
    "loftq": (PINK, "D"),
}
TENSOR_COLORS = {"refta": GREEN, "craft": BROWN, "tera": BLACK}  # others: grey
TENSOR_MARKERS = "P*X<>hp8"


def score_scatter(methods: dict[str, Score], name: str, alt: str) -> Picture:
    """Scores with standard errors over adapter parameters; head-only and full are lines."""
    measured = next(iter(methods.values())).metric
    scale = 100 if measured == "accuracy" else 1
    direction = HIGHER if METRICS[measured].more_is_better else LOWER
    metric = f"{measured}{', %' if scale == 100 else ''}{direction}"
    figure, axes = canvas(5.9, "adapter parameters (similar counts side by side)", metric)
    axes.set_xscale("log")
    lines = [score for score in methods.values() if score.adapter == 0 or score.method == "full"]
    points = [score for score in methods.values() if score not in lines]
    low, high = value_range(points or lines)
    for score, style in zip(lines, ((0, (1, 2)), (0, (5, 3)), "-.")):
        add_score_line(axes, score, scale, style, low <= score.mean <= high)
    labels = dict.fromkeys(kind(score.method) for score in points)
    looks = point_looks(list(labels))
    clusters = near(points)
    for cluster in clusters:
        add_cluster(axes, cluster, scale, looks)
    centers = [center_of(cluster) for cluster in clusters]
    axes.set_xticks(centers, [f"{center:,}" for center in centers])
    axes.margins(x=0.12)
    axes.set_ylim(scale * low, scale * high)
    axes.xaxis.set_minor_locator(NullLocator())
    add_legend(figure, axes, columns=1)
    return render(figure, name, alt)


def add_score_line(axes: Axes, score: Score, scale: int, style: Any, inside: bool) -> None:
    """A horizontal line with a band of one standard error; the label tells a line off the scale."""
    away = "" if inside else f", {scale * score.mean:.3g} (off the scale)"
    error = score.standard_error or 0
    axes.axhline(
        scale * score.mean,
        color="#444",
        linestyle=style,
        linewidth=1.2,
        label=f"{score.method}{away}",
    )
    axes.axhspan(
        scale * (score.mean - error),
        scale * (score.mean + error),
        color="#444",
        alpha=0.08,
        linewidth=0,
    )


class Look(NamedTuple):
    """A point's color, marker and filling."""

    color: str
    marker: str
    hollow: bool


def point_looks(labels: list[str]) -> dict[str, Look]:
    """The look of every method; tensor methods in 4 bits are hollow, peers and 16 bits filled."""
    looks = {}
    tensor = [label for label in labels if label not in PEERS]
    for label in labels:
        if label in PEERS:
            looks[label] = Look(*PEERS[label], hollow=False)
            continue
        color = TENSOR_COLORS.get(label.split()[0], GREY)
        marker = TENSOR_MARKERS[tensor.index(label) % len(TENSOR_MARKERS)]
        looks[label] = Look(color, marker, hollow="bits=16" not in label)
    return looks


def add_cluster(axes: Axes, cluster: list[Score], scale: int, looks: Mapping[str, Look]) -> None:
    """Scores of similar size side by side, with their ranks above."""
    center = center_of(cluster)
    for place, score in enumerate(cluster):
        label = kind(score.method)
        look = looks[label]
        axes.errorbar(
            center * 1.14 ** (place - (len(cluster) - 1) / 2),
            scale * score.mean,
            scale * (score.standard_error or 0),
            color=look.color,
            marker=look.marker,
            linestyle="",
            capsize=2.5,
            markersize=6.5,
            elinewidth=1.1,
            label=label,
            mfc="white" if look.hollow else look.color,
        )
    words = (word for score in cluster for word in score.method.split())
    ranks = dict.fromkeys(word for word in words if word.startswith(RANK_WORDS))
    axes.annotate(
        "\n".join(ranks),
        (center, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color="#333",
    )


def center_of(cluster: list[Score]) -> int:
    """The median parameter count of a cluster."""
    return cluster[len(cluster) // 2].adapter


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
