"""The quickstart: the main job, from a dense model to a merged one, on real data."""

from pathlib import Path
from typing import NamedTuple


class Options(NamedTuple):
    """Options of both demonstrations.

    Attributes:
        model, dataset: names, folders or files; None for the demonstration's.
        rank: R of every stack.
        steps: of each training run.
        train_rows, test_rows: at most.
        out: folder for the results.
        rows: JSON lines file that gets the figures; None for none.
        seed: of heads, rows and batch order.
    """

    model: str | None
    dataset: str | None
    rank: int
    steps: int
    train_rows: int
    test_rows: int
    out: Path
    rows: Path | None
    seed: int
