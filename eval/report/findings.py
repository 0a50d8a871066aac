"""Curves, tables and titles of the report, computed from rows of errors, spectra and costs."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

from qrefta.config.settings import Settings

Row = dict[str, Any]

TIE = 0.01  # relative; errors that differ by less are level
TIMING = 0.1  # relative; times that differ by less are equal
PAPER = "lsm3"  # the paper's transform, and the default
SHOWN_RANK = 48  # the R of pictures that show one R, if it was measured
DRAWN_SHARED = (15, 48)  # R and r in the picture of trainable parameters
DRAWN_LORA = (1, 8)
COMPONENTS = (15, 48, 96, 192)  # of a spectrum's table
NAMES = {
    "refta": "ReFTA",
    "craft": "CRAFT",
    "tera": "TeRA",
    "pissa": "PiSSA",
    "loftq": "LoftQ",
    "qera": "QERA",
}
RIVALS = ("craft", "pissa", "loftq", "qera")  # the rivals with a rank
BLOCKS = ("smaller block", "smaller block, 8-bit scales")
FORMATS = {"nf4": "NF4", "fp4": "FP4", "int4": "INT4"}


class Table(NamedTuple):
    """A table of text; the first column names the row."""

    header: list[str]
    rows: list[list[str]]


class Series(NamedTuple):
    """The settings that are constant along a curve over R."""

    method: str
    start: str | None
    transform: str | None

    @property
    def label(self) -> str:
        """The name in legends and tables, for example ReFTA lsm3, refined."""
        name = NAMES.get(self.method, self.method) + (
            f" {self.transform}" if self.transform else ""
        )
        return f"{name}, {self.start}" if self.start else name


class Duel(NamedTuple):
    """Errors of one side divided by errors of the other, cell by cell."""

    quotients: list[float]

    @property
    def wins(self) -> int:
        """Cells where the first side has less error, by more than TIE."""
        return sum(quotient < 1 - TIE for quotient in self.quotients)

    @property
    def losses(self) -> int:
        """Cells where the first side has more error, by more than TIE."""
        return sum(quotient > 1 + TIE for quotient in self.quotients)

    def __str__(self) -> str:
        """For example: lower in 3 of 4 cells, level in 1, higher in 0 (0.800 to 1.000 times)."""
        if not self.quotients:
            return "not measured"
        cells = len(self.quotients)
        span = f"{min(self.quotients):.3f} to {max(self.quotients):.3f} times"
        level = cells - self.wins - self.losses
        wins = f"lower in {self.wins} of {cells} cells"
        return f"{wins}, level in {level}, higher in {self.losses} ({span})"


def pick(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """The rows with these values; a tuple allows several values."""
    allowed = {
        key: value if isinstance(value, tuple) else (value,) for key, value in fields.items()
    }
    return [row for row in rows if all(row.get(key) in values for key, values in allowed.items())]


def distinct(rows: Iterable[Row], field: str) -> list[Any]:
    """The values of a field, in the order of their first rows."""
    return list(dict.fromkeys(row[field] for row in rows))


def number(value: float | None, spec: str = ".3f") -> str:
    """A table cell; a dash if there is no measurement."""
    return "-" if value is None else format(value, spec)


def stack_label(stack: str) -> str:
    """A stack's name without its path: encoder.layer.*.output.dense -> output.dense."""
    return stack.rpartition(".*.")[2]


def series(row: Row) -> Series:
    """The curve that a row of `eval.studies.quant_error` belongs to."""
    return Series(row["method"], row["start"], row["transform"])


def duel(ours: list[Row], theirs: list[Row], match: tuple[str, ...], value: str = "ratio") -> Duel:
    """Compare the cells of both sides; the fields in `match` identify a cell."""
    cells = {tuple(row[key] for key in match): row[value] for row in theirs if row[value]}
    measured = [
        (tuple(row[key] for key in match), row[value]) for row in ours if row[value] is not None
    ]
    return Duel([error / cells[cell] for cell, error in measured if cell in cells])


def duel_for_bytes(rows: list[Row], start: str = "refined", value: str = "ratio") -> Duel:
    """A split against smaller blocks of the same size in bytes, from rows of kind model.

    The row of a smaller block has the R of the split that it matches.
    """
    match = ("model", "quant_type", "rank")
    ours = {
        tuple(row[key] for key in match): row
        for row in pick(rows, method="refta", start=start, transform=PAPER)
    }
    blocks = [
        (row, ours[tuple(row[key] for key in match)])
        for row in pick(rows, method=BLOCKS)
        if tuple(row[key] for key in match) in ours
    ]
    return Duel([split[value] / block[value] for block, split in blocks])


def curves(rows: list[Row], value: str, x: str = "rank") -> dict[Series, list[tuple[float, float]]]:
    """Points (x, value) by series, sorted by R; the last row of a cell counts."""
    found: dict[Series, dict[int, tuple[float, float]]] = defaultdict(dict)
    for row in rows:
        if row[value] is not None:
            found[series(row)][row["rank"]] = (row[x], row[value])
    return {key: [points[rank] for rank in sorted(points)] for key, points in found.items()}


def ranked(rows: list[Row], transform: str = PAPER) -> list[Row]:
    """Rows of the splits under one transform, and of the rivals with a rank."""
    return [*pick(rows, method="refta", transform=transform), *pick(rows, method=RIVALS)]


def shown_rank(rows: list[Row]) -> int:
    """SHOWN_RANK if it was measured, else the middle of the measured ranks."""
    ranks = sorted({row["rank"] for row in pick(rows, method="refta") if row["rank"] > 0})
    return SHOWN_RANK if SHOWN_RANK in ranks else ranks[len(ranks) // 2]


def error_title(rows: list[Row], value: str, error: str) -> str:
    """The method with the least error at the largest common R, and the best of the other side.

    Args:
        rows: of kind model, one format, one model.
        value: "ratio" or "output_ratio".
        error: the name of the error.
    """
    measured = [row for row in rows if row[value] is not None and row["rank"] > 0]
    sides = [pick(measured, method="refta"), pick(measured, method=RIVALS)]
    common = set.intersection(*({row["rank"] for row in side} for side in sides if side))
    if not common:
        return f"No R was measured on both sides: {error} by method"
    rank = max(common)
    where = f"{FORMATS[rows[0]['quant_type']]}, R = {rank}"
    best = [min(pick(side, rank=rank), key=lambda row: row[value]) for side in sides if side]
    (name, least), *others = sorted(
        ((series(row).label, row[value]) for row in best), key=lambda pair: pair[1]
    )
    if least >= 1:
        return f"{where}: no method lowers {error}; the best, {name}, has {least:.2f} times Q(W)'s"
    if others and others[0][1] <= least * (1 + TIE):
        return f"{where}: {name} and {others[0][0]} are level in {error}: {least:.2f} times Q(W)'s"
    rest = "".join(f"; the best of the other side, {other}, {ratio:.2f}" for other, ratio in others)
    return f"{where}: {name} leaves the least {error}, {least:.2f} times Q(W)'s{rest}"


def curve_table(rows: list[Row], value: str) -> Table:
    """Error by series and R, from rows of kind model of one format and model."""
    found = {
        key: dict(points)
        for key, points in curves(pick(rows, method=("refta", *RIVALS)), value).items()
    }
    ranks = sorted({rank for points in found.values() for rank in points})
    lines = [
        [key.label, *(number(points.get(rank)) for rank in ranks)] for key, points in found.items()
    ]
    return Table(["method", *(f"R = {rank}" for rank in ranks)], lines)


def transform_title(rows: list[Row]) -> str:
    """Whether the paper's transform leaves less error than not mixing the layers."""
    found = transforms_duel(rows)
    cells = len(found.quotients)
    if not cells:
        return f"{PAPER} and identity were not measured side by side"
    low = min(found.quotients)
    high = max(found.quotients)
    span = f"{PAPER} leaves {low:.3f} to {high:.3f} times identity's error"
    if found.wins == cells:
        return f"{PAPER} beats identity in all {cells} cells: {span}"
    if found.wins == 0:
        word = {0: "as good as", cells: "better than"}.get(
            found.losses, "as good as or better than"
        )
        return f"identity is {word} {PAPER} in all {cells} cells: {span}"
    wins = f"{PAPER} beats identity in {found.wins} of {cells} cells"
    return f"{wins} and loses in {found.losses}: {span}"


def transform_table(rows: list[Row]) -> Table:
    """Error relative to the same split without mixing, by series and R."""
    found = {key: dict(points) for key, points in curves(rows, "ratio").items()}
    ranks = sorted({rank for points in found.values() for rank in points if rank})
    lines = []
    for key, points in found.items():
        plain = found.get(key._replace(transform="identity"), {})
        shares = [
            points[rank] / plain[rank] if rank in points and rank in plain else None
            for rank in ranks
        ]
        lines += [[key.label, *map(number, shares)]] if plain else []
    return Table(["method", *(f"R = {rank}" for rank in ranks)], lines)


def transforms_duel(rows: list[Row]) -> Duel:
    """The paper's transform against identity with equal other settings."""
    splits = pick(rows, method="refta", kind="model")
    match = ("model", "quant_type", "start", "rank")
    ours, theirs = (pick(splits, transform=name) for name in (PAPER, "identity"))
    return duel([row for row in ours if row["rank"]], theirs, match)


def bytes_title(rows: list[Row]) -> str:
    """Whether factors or smaller blocks are the better use of bytes."""
    found = duel_for_bytes(rows)
    cells = len(found.quotients)
    if not cells:
        return "Error by bits per weight (no smaller block of the size of a split was measured)"
    span = f"{min(found.quotients):.2f} to {max(found.quotients):.2f} times the block's error"
    if found.wins == cells:
        return (
            f"For the same bytes a refined split beats a smaller block in all {cells} cells: {span}"
        )
    if found.losses == cells:
        return (
            f"For the same bytes a smaller block beats a refined split in all {cells} cells: {span}"
        )
    return (
        f"For the same bytes a refined split beats a smaller block in {found.wins} of {cells} "
        f"cells and loses in "
        f"{found.losses}: {span}"
    )


def bytes_table(rows: list[Row]) -> Table:
    """Bits per weight, both errors and the nuclear norm's reduction, from rows of kind model."""
    lines = [
        [
            FORMATS[row["quant_type"]],
            series(row).label,
            str(row["rank"] or "-"),
            number(row["bits_per_weight"], ".2f"),
            number(row["ratio"]),
            number(row["output_ratio"]),
            number(row["nuclear_reduction"]),
        ]
        for row in rows
    ]
    header = [
        "format",
        "method",
        "R",
        "bits per weight",
        "weight error",
        "output error",
        "nuclear norm, less by",
    ]
    return Table(header, lines)


def stacks_title(rows: list[Row]) -> str:
    """Stacks with less error split than whole at one R, and the two extremes."""
    rank = shown_rank(rows)
    start = "refined" if pick(rows, start="refined") else "one shot"
    splits = pick(rows, method="refta", transform=PAPER, start=start, rank=rank)
    better = [row for row in splits if row["ratio"] < 1]
    low, *_, high = sorted([*splits, *splits], key=lambda row: row["ratio"])
    least = f"{low['ratio']:.2f} ({stack_label(low['stack'])})"
    most = f"{high['ratio']:.2f} ({stack_label(high['stack'])})"
    span = f"{least} to {most}"
    count = (
        f"{len(better)} of {len(splits)} stacks"
        if len(better) < len(splits)
        else f"All {len(splits)} stacks"
    )
    return f"{count} quantize better split than whole (R = {rank}, {start}): {span} of Q(W)'s error"


def stacks_table(rows: list[Row], rank: int) -> Table:
    """Weight error by stack and series at one R."""
    found = pick(ranked(rows), rank=rank)
    columns = list(dict.fromkeys(map(series, found)))
    cells = {(row["stack"], series(row)): row["ratio"] for row in found}
    lines = [
        [stack_label(stack), *(number(cells.get((stack, key))) for key in columns)]
        for stack in distinct(found, "stack")
    ]
    return Table(["stack", *(key.label for key in columns)], lines)


def layers_title(rows: list[Row], rank: int) -> str:
    """The layers where the refined split at one R removes the most and the least error."""
    cells = {
        (stack_label(row["stack"]), layer): ratio
        for row in layer_rows(rows, rank)
        for layer, ratio in enumerate(row["layer_ratios"], start=1)
    }
    low = min(cells, key=cells.__getitem__)
    high = max(cells, key=cells.__getitem__)
    above = sum(ratio >= 1 for ratio in cells.values())
    words = (
        f"{above} of {len(cells)} linear layers have no less error than whole"
        if above
        else "every linear layer has less error than whole"
    )
    return (
        f"At R = {rank} {words}: {cells[low]:.2f} of Q(W)'s error ({low[0]}, layer {low[1]}) to "
        f"{cells[high]:.2f} "
        f"({high[0]}, layer {high[1]})"
    )


def layers_table(rows: list[Row], rank: int) -> Table:
    """Weight error of the refined split by stack and layer, relative to Q(W)."""
    found = layer_rows(rows, rank)
    layers = max(len(row["layer_ratios"]) for row in found)
    lines = [[stack_label(row["stack"]), *map(number, row["layer_ratios"])] for row in found]
    padded = [[*line, *["-"] * (layers + 1 - len(line))] for line in lines]
    return Table(["stack", *(f"layer {layer}" for layer in range(1, layers + 1))], padded)


def layer_rows(rows: list[Row], rank: int) -> list[Row]:
    """One row per stack: the refined split under the paper's transform, else the one-shot split."""
    start = "refined" if pick(rows, start="refined") else "one shot"
    splits = pick(rows, method="refta", transform=PAPER, start=start, rank=rank)
    return list({row["stack"]: row for row in splits if "layer_ratios" in row}.values())


def monotone(rows: list[Row]) -> tuple[int, dict[str, list[str]]]:
    """The number of series over R, and by series the steps where the error does not fall."""
    found: dict[tuple, list[Row]] = defaultdict(list)
    for row in pick(rows, method="refta"):
        found[row["model"], row["stack"], row["quant_type"], series(row)].append(row)
    several = {
        key: sorted(points, key=lambda row: row["rank"])
        for key, points in found.items()
        if len(points) > 1
    }
    exceptions = defaultdict(list)
    for (model, stack, quant_type, one), points in several.items():
        for before, after in pairwise(points):
            if after["ratio"] >= before["ratio"]:
                exceptions[
                    f"{model}, {stack_label(stack)}, {FORMATS[quant_type]}, {one.label}"
                ].append(
                    f"R = {before['rank']} to {after['rank']}: {before['ratio']:.4f} to "
                    f"{after['ratio']:.4f}"
                )
    return len(several), dict(exceptions)


def energies(rows: list[Row], components: int) -> dict[str, float]:
    """Energy of the `components` largest singular values, by transform, largest first."""
    found = {
        row["transform"]: sum(value * value for value in row["values"][:components]) for row in rows
    }
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def spectrum_title(rows: list[Row]) -> str:
    """The transform under which the largest singular values hold the most energy."""
    count = min(len(row["values"]) for row in rows)
    (first, most), *others = energies(rows, count).items()
    energy = f"energy in the {count:,} largest components of {stack_label(rows[0]['stack'])}"
    if not others:
        return f"{first}: {most:.4g} of {energy}"
    if all(other > most * (1 - TIE) for _, other in others):
        return f"No transform gathers more {energy} than another (within {TIE:.0%})"
    rest = ", ".join(f"{most / other - 1:+.1%} relative to {name}" for name, other in others)
    return f"{first} gathers the most {energy}: {rest}"


def spectrum_table(rows: list[Row]) -> Table:
    """Energy of the largest components, by stack and transform."""
    counts = [
        count for count in (1, *COMPONENTS) if count <= min(len(row["values"]) for row in rows)
    ]
    lines = [
        [
            stack_label(row["stack"]),
            row["transform"],
            *(f"{energies([row], n)[row['transform']]:.4g}" for n in counts),
        ]
        for row in rows
    ]
    return Table(["stack", "transform", *(f"energy of {count}" for count in counts)], lines)


def shapes(rows: list[Row]) -> list[tuple[int, int, int]]:
    """(layers, out, in) of every stack of a model."""
    return list({row["stack"]: tuple(row["shape"]) for row in pick(rows, kind="stack")}.values())


def trainable_parameters(
    stacks: list[tuple[int, int, int]], layers: int | None = None, R: int = 0, r: int = 0
) -> int:
    """R (in + out) per stack for ReFTA, r (in + out) per layer for LoRA.

    `layers` replaces the depth of the stacks.
    """
    return sum((R + r * (layers or depth)) * (out + inputs) for depth, out, inputs in stacks)


def depth_title(stacks: list[tuple[int, int, int]]) -> str:
    """ReFTA against LoRA at the model's depth, and the depth where both are equal."""
    R = min(DRAWN_SHARED)
    r = min(DRAWN_LORA)
    layers = max(depth for depth, _, _ in stacks)
    ours = trainable_parameters(stacks, R=R)
    theirs = trainable_parameters(stacks, r=r)
    word = (
        "more parameters than"
        if ours > theirs
        else "fewer parameters than"
        if ours < theirs
        else "as many parameters as"
    )
    return (
        f"At {layers} layers ReFTA R = {R} trains {word} LoRA r = {r} ({ours:,} and {theirs:,}); "
        f"they are equal at {R / r:g} layers"
    )


def depth_table(stacks: list[tuple[int, int, int]], layers: list[int]) -> Table:
    """Trainable parameters by method and depth."""
    lines = [
        [f"ReFTA R = {R}", *(f"{trainable_parameters(stacks, depth, R=R):,}" for depth in layers)]
        for R in DRAWN_SHARED
    ] + [
        [f"LoRA r = {r}", *(f"{trainable_parameters(stacks, depth, r=r):,}" for depth in layers)]
        for r in DRAWN_LORA
    ]
    return Table(["method", *(f"{depth} layers" for depth in layers)], lines)


def cost_title(rows: list[Row]) -> str:
    """Time and memory of the default method, or else ReFTA, against QLoRA with as many parameters,
    or else QLoRA r=16.
    """
    groups = (
        [row for row in rows if row["method"].startswith(f"{method} ")]
        for method in (Settings().method, "refta")
    )
    ours = next(filter(None, groups))
    peers = [
        row for row in rows if row["method"].startswith("qlora ") and "dropout" not in row["method"]
    ]
    for row in ours:
        for peer in pick(peers, trained_parameters=row["trained_parameters"]):
            time = row["step_s"] / peer["step_s"]
            peak = row["peak_bytes"] / peer["peak_bytes"]
            word = (
                "slower than"
                if time > 1 + TIMING
                else "faster than"
                if time < 1 - TIMING
                else "as fast as"
            )
            return (
                f"{row['method']} is {word} {peer['method']} with as many trainable parameters: "
                f"{time:.2f} times its time, {peak:.2f} times its memory"
            )
    spans = [[row[key] for row in ours] for key in ("of_qlora", "peak_of_qlora")]
    time, peak = (f"{min(span):.2f} to {max(span):.2f}" for span in spans)
    name, _ = ours[0]["method"].split()
    return f"{name} takes {time} times QLoRA r=16's time and {peak} times its memory"


def cost_table(rows: list[Row]) -> Table:
    """Trainable parameters, time and peak memory of a step, also relative to floor and QLoRA."""
    lines = [
        [
            row["method"],
            f"{row['trained_parameters']:,}",
            f"{row['step_s']:.2f} s",
            f"{row['of_floor']:.2f}",
            f"{row['of_qlora']:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f} MB",
            f"{row['peak_of_floor']:.2f}",
            f"{row['peak_of_qlora']:.2f}",
        ]
        for row in rows
    ]
    header = [
        "method",
        "trainable parameters",
        "step",
        "/ floor",
        "/ QLoRA r=16",
        "peak memory",
        "/ floor",
        "/ QLoRA r=16",
    ]
    return Table(header, lines)


def measured_table(files: dict[str, list[Row]]) -> Table:
    """One line per command, commit and machine: rows, seeds and threads."""
    found: dict[tuple, list[Row]] = defaultdict(list)
    for name, rows in files.items():
        for row in rows:
            versions = ", ".join(
                f"{package} {version}" for package, version in row["versions"].items()
            )
            found[
                name,
                row["command"],
                row["commit"],
                row["device"],
                row["threads"],
                f"Python {row['python']}, {versions}",
            ].append(row)
    lines = [
        [
            f"{name}.jsonl",
            str(len(rows)),
            typed(command),
            commit,
            device,
            str(threads),
            ", ".join(map(str, sorted({row["seed"] for row in rows}))),
            versions,
        ]
        for (name, command, commit, device, threads, versions), rows in found.items()
    ]
    return Table(
        ["rows", "number", "command", "commit", "device", "threads", "seeds", "versions"], lines
    )


def typed(command: str) -> str:
    """A row's command as it is typed today; older rows name only the file of the study."""
    if command.startswith("python"):
        return command
    return f"python -m eval {command.replace('.py', '', 1)}"
