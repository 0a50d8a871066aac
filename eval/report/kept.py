"""How much of a model its bases in few bits keep: titles and tables, from the rows of kld.jsonl."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from scipy.stats import spearmanr

from eval.peers.bases import HALF_TEXT, MUCH_TEXT, TEXT, UNCALIBRATED, Base, R
from eval.report.findings import Row, Table, number, pick
from eval.tasks.smollm2 import NAME

Points = list[tuple[float, float]]

NAMES = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "gptq-ordered": "ordered GPTQ",
    "pissa": "PiSSA",
    "loftq": "LoftQ",
    "qera": "QERA",
}
CALIBRATED_SERIES = {
    "nearest": "qrefta, calibrated",
    "feedback": "qrefta, error feedback",
    "sequential": "qrefta, layer after layer",
}
SLACK = 0.005  # bits a weight that count as equal: offsets of double quantization, layers' mixing
PLAIN_BITS = 4.5  # of NF4 in blocks of 64
NOTES = {
    NAME: "The weights of this 16-bit model were read from a GGUF file that holds them in 4 bits "
    "(Q4_1); the model that was trained may behave otherwise."
}


class Target(NamedTuple):
    """The largest mean KL divergence that a base of SmolLM2 should have, by text."""

    base: Base
    limits: dict[str, float]


WIKITEXT = "wikitext2/test.txt"
SHAKESPEARE = "tinyshakespeare/input.txt"
ROUNDED = Base(calibration=TEXT, scales="searched", rounding="feedback")
ORDERED = ROUNDED._replace(rounding="sequential")
THREE_BITS = ROUNDED._replace(quant_type="nf3", double_quant=True)
MIXED_BITS = ORDERED._replace(quant_type=None, target_bits=3.3, double_quant=True)
MORE_TEXT = MIXED_BITS._replace(target_bits=3.6, block_size=32, calibration=max(MUCH_TEXT))
TARGETS = (
    Target(ORDERED, {WIKITEXT: 0.115, SHAKESPEARE: 0.175}),
    Target(ROUNDED._replace(rank=R, refine=1), {WIKITEXT: 0.090, SHAKESPEARE: 0.135}),
    Target(ROUNDED._replace(double_quant=True), {WIKITEXT: 0.13}),
    Target(THREE_BITS._replace(rounding="sequential"), {WIKITEXT: 0.36, SHAKESPEARE: 0.55}),
    Target(MORE_TEXT, {WIKITEXT: 0.267, SHAKESPEARE: 0.294}),
)


# Names of the bases in the short table.
SELECTED = {
    "bitsandbytes NF4": Base("bitsandbytes"),
    "bitsandbytes NF4, double quantization": Base("bitsandbytes", double_quant=True),
    f"PiSSA, R = {R}": Base("pissa", R),
    f"LoftQ, R = {R}": Base("loftq", R),
    f"QERA, R = {R}": Base("qera", R, TEXT),
    "GPTQ on NF4 (absmax scales, larger inputs first)": Base("gptq-ordered", calibration=TEXT),
    "qrefta, without calibration": UNCALIBRATED(),
    "qrefta, calibrated on generic text": ROUNDED._replace(calibration=HALF_TEXT, generic=True),
    "qrefta": ROUNDED,
    f'qrefta, `method="refta"`, R = {R}': ROUNDED._replace(rank=R, refine=1),
    'qrefta, `rounding="sequential"`, generic text': ORDERED._replace(
        calibration=HALF_TEXT, generic=True
    ),
    'qrefta, `rounding="sequential"`': ORDERED,
    'qrefta, `rounding="sequential"`, double quantization': ORDERED._replace(double_quant=True),
    "GPTQ on NF3 (absmax scales, larger inputs first)": Base(
        "gptq-ordered", 0, TEXT, quant_type="nf3", double_quant=True
    ),
    "qrefta, `bits=3`, `block_size=64`": THREE_BITS._replace(rounding="sequential"),
    "qrefta, `bits=3`": THREE_BITS._replace(rounding="sequential", block_size=32),
    'qrefta, `bits="auto"`, `target_bits=3.5`': MIXED_BITS._replace(target_bits=3.5, block_size=32),
    f'qrefta, `bits="auto"`, `target_bits=3.6`, {MORE_TEXT.calibration:,} tokens': MORE_TEXT,
    "GPTQ on INT2 (absmax scales, larger inputs first)": Base(
        "gptq-ordered", 0, TEXT, quant_type="int2", double_quant=True
    ),
    "qrefta, `bits=2`, `block_size=64`": ORDERED._replace(quant_type="nf2", double_quant=True),
    "qrefta, `bits=2`": ORDERED._replace(quant_type="nf2", double_quant=True, block_size=32),
}


class Group(NamedTuple):
    """Rows of one model that were measured alike.

    Attributes:
        model: name of the folder.
        measured: texts.
        tokens, window: of each text; None for a sentence encoder.
        rows: one a base; the last row of a base counts.
    """

    model: str
    measured: list[str]
    tokens: int | None
    window: int | None
    rows: list[Row]


def groups(rows: Iterable[Row], kind: str) -> list[Group]:
    """The groups of a kind of model, language or encoder; the group with most bases first."""
    found: dict[tuple, dict[Base, Row]] = defaultdict(dict)
    for row in pick(rows, kind=kind):
        key = (row["model"], tuple(row["measured"]), row.get("tokens"), row.get("window"))
        found[key][Base.of(row)] = row
    made = [
        Group(model, list(measured), tokens, window, list(bases.values()))
        for (model, measured, tokens, window), bases in found.items()
    ]
    return sorted(made, key=lambda group: -len(group.rows))


def label(row: Row) -> str:
    """The base's label, with the name of its maker as papers write it."""
    base = Base.of(row)
    return base._replace(maker=NAMES.get(base.maker, base.maker)).label


def divergence(row: Row, text: str) -> float:
    """Mean KL divergence on a text."""
    return next(found["kl_mean"] for found in row["texts"] if found["text"] == text)


def series_points(rows: list[Row], values: list[float]) -> dict[str, Points]:
    """(bits a weight, value) of every row, by series of the picture."""
    found: dict[str, Points] = defaultdict(list)
    for row, value in zip(rows, values, strict=True):
        found[series_of(row)].append((row["bits_per_weight"], value))
    return dict(found)


def series_of(row: Row) -> str:
    """The series of the picture that a base belongs to."""
    if row["maker"] != "qrefta":
        return NAMES[row["maker"]]
    if not row["calibration"]:
        return "qrefta without text"
    return CALIBRATED_SERIES[row["settings"]["rounding"]]


def front(points: Iterable[tuple[float, float]]) -> Points:
    """The points that no other point beats in both bits and value, by bits."""
    found: Points = []
    for bits, value in sorted(points):
        if not found or value < found[-1][1]:
            found.append((bits, value))
    return found


def title(group: Group) -> str:
    """The base that keeps most at the bits of plain NF4, and the best of the other side."""
    text = group.measured[0]
    small = [row for row in group.rows if row["bits_per_weight"] <= PLAIN_BITS + SLACK]
    if not small:
        return f"{group.model}: KL divergence to the 16-bit model by bits a weight"
    best = min(small, key=lambda row: divergence(row, text))
    others = [row for row in small if (row["maker"] == "qrefta") != (best["maker"] == "qrefta")]
    told = (
        f"With at most {PLAIN_BITS} bits a weight {label(best)} keeps most of {group.model}: "
        f"KL divergence {divergence(best, text):.3f}"
    )
    if others:
        other = min(others, key=lambda row: divergence(row, text))
        told += f", the best of the other side, {label(other)}, {divergence(other, text):.3f}"
    plain = pick(small, maker="bitsandbytes", quant_type="nf4", double_quant=False)
    if plain:
        told += f", bitsandbytes NF4 {divergence(plain[0], text):.3f}"
    return f"{told} ({text})"


def reading_aid(group: Group) -> str:
    """How the numbers of a language model were measured, and what they mean."""
    texts = " and ".join(group.measured)
    return (
        f"Mean KL divergence KL(16 bit || base) of the next-token distributions, in nats, over "
        f"{group.tokens:,} tokens of {texts}, in windows of {group.window}. Bits a weight count "
        f"codes, scales and factors of the linear layers of the blocks. The grey line joins the "
        f"bases that no other base beats in both. {correlation(group)} {NOTES.get(group.model, '')}"
    ).rstrip()


def correlation(group: Group) -> str:
    """Whether weight error tells how much of a model is kept, in one sentence."""
    text = group.measured[0]
    weight = rank_correlation(group.rows, "weight_error", text)
    output = rank_correlation(group.rows, "output_error", text)
    if weight is None or output is None:
        return ""
    return (
        f"Rank correlation with the KL divergence on {text} over {len(group.rows)} bases: squared "
        f"weight error {weight:.2f}, squared output error {output:.2f}."
    )


def rank_correlation(rows: list[Row], error: str, text: str) -> float | None:
    """Spearman's rank correlation of an error and the KL divergence; None for less than 3 rows."""
    if len(rows) < 3:
        return None
    found = spearmanr([row[error] for row in rows], [divergence(row, text) for row in rows])
    return float(found.statistic)


def language_table(group: Group) -> Table:
    """One line a base, the least divergence on the first text first."""
    rows = sorted(group.rows, key=lambda row: divergence(row, group.measured[0]))
    header = ["base", "bits a weight"]
    for text in group.measured:
        name = text.split("/")[0]
        header += [f"{name}: KL divergence", "KL, 99 %", "same top-1", "flips", "perplexity"]
    header += ["weight error", "output error", "seconds to make"]
    lines = []
    for row in rows:
        cells = [cell for found in row["texts"] for cell in _text_cells(found)]
        lines.append([label(row), number(row["bits_per_weight"]), *cells, *_cost_cells(row)])
    return Table(header, lines)


def short_table(rows: list[Row]) -> tuple[Table, str]:
    """The selected bases of SmolLM2 that were measured, and the caption."""
    group = next(group for group in groups(rows, "language") if group.model == NAME)
    by_base = {Base.of(row): row for row in group.rows}
    names = [text.split("/")[0] for text in group.measured]
    header = ["base", "bits a weight"]
    header += [f"{name}: KL divergence" for name in names]
    header += [f"{name}: perplexity" for name in names]
    lines = []
    for name, base in SELECTED.items():
        if base not in by_base:
            continue
        row = by_base[base]
        texts = row["texts"]
        cells = [f"{text['kl_mean']:.3f} ± {text['kl_stderr']:.3f}" for text in texts]
        cells += [f"{text['perplexity']:.1f}" for text in texts]
        lines.append([name, f"{row['bits_per_weight']:.2f}", *cells])
    exact = " and ".join(f"{text['reference_perplexity']:.1f}" for text in group.rows[0]["texts"])
    caption = (
        f"{group.model}, all linear layers of the blocks, before any training. Mean KL "
        f"divergence to the 16-bit model in nats (± standard error) and perplexity (16 bits: "
        f"{exact}) over {group.tokens:,} tokens of {' and '.join(group.measured)}, in windows of "
        f"{group.window}. Calibrated bases, GPTQ and QERA read {TEXT:,} tokens of "
        "wikitext2/valid.txt, or as many as their line says; generic text is "
        f"{HALF_TEXT:,} tokens of the docstrings of Python's standard library."
    )
    return Table(header, lines), caption


def _text_cells(found: Row) -> list[str]:
    stderr = "" if found["kl_stderr"] is None else f" ± {found['kl_stderr']:.4f}"
    return [
        f"{found['kl_mean']:.4f}{stderr}",
        number(found["kl_99"], ".2f"),
        f"{found['agreement']:.1%}",
        f"{found['flips']:.1%}",
        number(found["perplexity"], ".2f"),
    ]


def _cost_cells(row: Row) -> list[str]:
    return [
        number(row["weight_error"]),
        number(row["output_error"]),
        number(row["seconds"], ".0f"),
    ]


def encoder_title(group: Group) -> str:
    """The encoder's base with the highest cosine at the bits of plain NF4."""
    small = [row for row in group.rows if row["bits_per_weight"] <= PLAIN_BITS + SLACK]
    if not small:
        return f"{group.model}: cosine to the 16-bit model's embeddings by bits a weight"
    best = max(small, key=lambda row: row["cosine_mean"])
    told = (
        f"With at most {PLAIN_BITS} bits a weight {label(best)} keeps most of {group.model}: "
        f"mean cosine {best['cosine_mean']:.4f} to the 16-bit embeddings"
    )
    plain = pick(small, maker="bitsandbytes", quant_type="nf4", double_quant=False)
    return told + (f", bitsandbytes NF4 {plain[0]['cosine_mean']:.4f}" if plain else "")


def encoder_aid(group: Group) -> str:
    """How the numbers of an encoder were measured."""
    count = group.rows[0]["sentences"]
    return (
        f"Cosine between the embeddings of a sentence by the base and by the 16-bit model, over "
        f"{count:,} sentences of {group.measured[0]}. The embedding of a sentence is the "
        "mean over its tokens."
    )


def encoder_table(group: Group) -> Table:
    """One line a base, the highest cosine first."""
    rows = sorted(group.rows, key=lambda row: -row["cosine_mean"])
    lines = [
        [
            label(row),
            number(row["bits_per_weight"]),
            f"{row['cosine_mean']:.5f} ± {row['cosine_stderr']:.5f}",
            number(row["cosine_1"], ".4f"),
            number(row["cosine_least"], ".4f"),
            *_cost_cells(row),
        ]
        for row in rows
    ]
    header = [
        "base",
        "bits a weight",
        "mean cosine",
        "1 % are below",
        "least",
        "weight error",
        "output error",
        "seconds to make",
    ]
    return Table(header, lines)
