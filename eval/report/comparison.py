"""Tables of the README and of docs/results.md: qrefta and QLoRA on the same model, data, order and
steps.
"""

from typing import NamedTuple

from eval.report.findings import Row, Table
from eval.report.pages import markdown_table
from eval.report.scores import Difference, Score, Study, difference, kind, scores, shown, signed
from eval.tasks.task import METRICS
from qrefta.config.settings import Settings

DEFAULT = Settings().method
ROUNDINGS = ("feedback", "sequential")  # of calibrated bases, the default first


class Compared(NamedTuple):
    """A study in the tables.

    Attributes:
        task, model, steps, test_rows: of its rows.
        caption: the sentence before the numbers of steps and rows.
        rival: the method that all are compared with.
        methods: names in the table, and methods.
        main: whether it is the task's line in the README.
    """

    task: str
    model: str
    steps: int
    test_rows: int
    caption: str
    rival: str
    methods: dict[str, str]
    main: bool = True


def _both(rank: int) -> dict[str, str]:
    """The default method with both roundings of a calibrated base."""
    default, other = (f"{DEFAULT} R={rank} calibrated rounding={one}" for one in ROUNDINGS)
    return {
        f"qrefta, R = {rank}": default,
        f'qrefta, R = {rank}, `rounding="{ROUNDINGS[1]}"`': other,
    }


PROMPT = Compared(
    "sst2-prompt",
    "SmolLM2-135M-Instruct",
    120,
    1800,
    "SmolLM2-135M-Instruct on SST-2 as a prompt",
    "qlora r=2",
    {
        "QLoRA, r = 2": "qlora r=2",
        "QLoRA, r = 8": "qlora r=8",
        **_both(60),
    },
)

STUDIES = [
    Compared(
        "tinyshakespeare",
        "SmolLM2-135M-Instruct",
        60,
        128,
        "SmolLM2-135M-Instruct (30 layers) on Shakespeare's plays",
        "qlora r=2",
        {
            "QLoRA, r = 2": "qlora r=2",
            "QLoRA, r = 8": "qlora r=8",
            **_both(60),
            'qrefta, `method="refta"`, R = 60, at its default rate': (
                "refta R=60 calibrated rounding=feedback"
            ),
            "qrefta, R = 60, 3 bits": "windows R=60 bits=3 calibrated rounding=sequential",
            "qrefta, R = 60, 3 bits, `block_size=64`": (
                "windows R=60 bits=3 block_size=64 calibrated rounding=sequential"
            ),
            "qrefta, R = 60, on plain NF4": "windows R=60 scales=absmax",
            "qrefta, R = 60, on 16 bits": "windows R=60 bits=16",
        },
    ),
    Compared(
        "commonsense",
        "SmolLM2-135M-Instruct",
        60,
        900,
        "SmolLM2-135M-Instruct on questions of ARC-Easy, ARC-Challenge, OpenBookQA and BoolQ",
        "qlora r=2",
        {
            "QLoRA, r = 2": "qlora r=2",
            "QLoRA, r = 8": "qlora r=8",
            **_both(60),
        },
    ),
    PROMPT,
    PROMPT._replace(steps=60, main=False),
    Compared(
        "sst2",
        "all-MiniLM-L6-v2",
        300,
        2700,
        "all-MiniLM-L6-v2 (6 layers) on SST-2",
        "qlora r=8",
        {
            "QLoRA, r = 8": "qlora r=8",
            **_both(48),
        },
    ),
    Compared(
        "sst2",
        "all-MiniLM-L6-v2",
        64,
        2700,
        "all-MiniLM-L6-v2 (6 layers) on SST-2",
        "qlora r=8",
        {
            "QLoRA, r = 8": "qlora r=8",
            **_both(48),
            'qrefta, `method="refta"`, R = 48': "refta R=48 calibrated rounding=feedback",
            **_both(12),
            'qrefta, `method="lorta"`, R = 12': "lorta R=12 calibrated rounding=feedback",
            "qrefta, R = 48, 3 bits": "windows R=48 bits=3 calibrated rounding=sequential",
            "qrefta, R = 48, 3 bits, `block_size=64`": (
                "windows R=48 bits=3 block_size=64 calibrated rounding=sequential"
            ),
            "qrefta, R = 48, 2 bits": "windows R=48 bits=2 calibrated rounding=sequential",
            "qrefta, R = 48, 2 bits, `block_size=64`": (
                "windows R=48 bits=2 block_size=64 calibrated rounding=sequential"
            ),
            "LoftQ, r = 8, 2 bits": "loftq r=8 quant_type=nf2",
            "QERA, r = 8, 2 bits": "qera r=8 quant_type=nf2",
            "QLoRA, r = 8, 2 bits": "qlora r=8 quant_type=nf2",
            "qrefta, R = 48, on plain NF4": "windows R=48 scales=absmax",
            "qrefta, R = 48, on 16 bits": "windows R=48 bits=16",
            "QLoRA with rsLoRA, r = 8": "rslora r=8",
            "QLoRA with DoRA, r = 8": "dora r=8",
            "QLoRA with LoftQ, r = 8": "loftq r=8",
            "QLoRA with PiSSA, r = 8": "qpissa r=8",
            "VeRA, r = 256, on 16 bits": "vera r=256",
            "IA3, on plain NF4": "ia3",
        },
        main=False,
    ),
    Compared(
        "cifar10",
        "runs/vit",
        64,
        3000,
        "A ViT of 6 layers on four classes of CIFAR-10",
        "qlora r=8",
        {
            "QLoRA, r = 8": "qlora r=8",
            "QLoRA, r = 2": "qlora r=2",
            **_both(48),
            **_both(12),
        },
    ),
]


def comparison(accuracy: list[Row]) -> str:
    """In Markdown: a table and a caption for every study.

    Args:
        accuracy: rows of `eval.studies.accuracy`.
    """
    return "\n\n".join(_part(compared, accuracy) for compared in STUDIES)


def by_task(accuracy: list[Row]) -> str:
    """In Markdown: the default and QLoRA with as many trainable parameters, a line for each study.

    Args:
        accuracy: rows of `eval.studies.accuracy`.
    """
    header = ["task", "trainable parameters", "QLoRA", "qrefta", "better by (95 % interval)"]
    lines = []
    seeds = set()
    steps = set()
    for compared in STUDIES:
        if not compared.main:
            continue
        study, methods = _measured(compared, accuracy)
        rival = methods[compared.rival]
        rounding, ours = next(
            (rounding, score)
            for rounding in ROUNDINGS
            for method, score in methods.items()
            if kind(method) == f"{DEFAULT} calibrated rounding={rounding}"
            and score.adapter == rival.adapter
        )
        value = shown(ours)
        if rounding != ROUNDINGS[0]:
            value += f' (`rounding="{rounding}"`)'
        line = [compared.caption, f"{ours.adapter:,}"]
        line += [f"{rival.metric} {shown(rival)}", value, _line("", ours, rival)[3]]
        lines.append(line)
        seeds.add(len(ours.values))
        steps.add(study.steps)
    caption = (
        f"In 4 bits, {_listed(steps)} steps, {_listed(seeds)} seeds, mean ± standard error; "
        "differences are paired over seeds."
    )
    return f"{markdown_table(Table(header, lines))}\n\n{caption}"


def _listed(counts: set[int]) -> str:
    *first, last = map(str, sorted(counts))
    return f"{', '.join(first)} or {last}" if first else last


def study_of(compared: Compared, accuracy: list[Row]) -> tuple[Study, dict[str, Score]] | None:
    """The study in the rows, and its scores by method; None if it was not measured."""
    place = (compared.task, compared.model, compared.steps, compared.test_rows)
    for study, methods in scores(accuracy).items():
        found = (study.task, study.model, study.steps, study.test_rows)
        if found == place and compared.rival in methods:
            return study, methods
    return None


def _measured(compared: Compared, accuracy: list[Row]) -> tuple[Study, dict[str, Score]]:
    found = study_of(compared, accuracy)
    if found is None:
        raise ValueError(f"the rows have no study {compared.caption!r} with {compared.rival}")
    return found


def _part(compared: Compared, accuracy: list[Row]) -> str:
    study, methods = _measured(compared, accuracy)
    rival = methods[compared.rival]
    names = {name: methods[key] for name, key in compared.methods.items() if key in methods}
    header = [
        "method",
        "trainable parameters",
        rival.metric,
        f"better than {next(iter(names))} by (95 % interval)",
        "learning rate",
        "peak memory",
        "time (CPU)",
    ]
    table = Table(header, [_line(name, score, rival) for name, score in names.items()])
    seeds = {len(score.values) for score in names.values()}
    caption = (
        f"{compared.caption}: {study.steps} steps of {study.batch_size} rows, "
        f"{rival.test_rows:,} test rows, {_listed(seeds)} seeds, mean ± standard error; "
        "differences are paired over seeds."
    )
    return f"{markdown_table(table)}\n\n{caption}"


def _line(name: str, score: Score, rival: Score) -> list[str]:
    pair = difference(score, rival, None)
    compared = "-" if pair is None or score is rival else gained(pair)
    peak_bytes = score.peak_bytes
    return [
        name,
        f"{score.adapter:,}",
        shown(score),
        compared,
        f"{score.learning_rate:g}",
        "-" if peak_bytes is None else f"{peak_bytes / 1e6:.0f} MB",
        f"{score.cpu_s:.0f} s",
    ]


def gained(pair: Difference) -> str:
    """For example: +0.4 points (-0.8 to +1.6); per cent for a perplexity."""
    unit = " %" if METRICS[pair.ours.metric].relative else " points"
    scale = pair.scale
    ends = pair.interval
    interval = None if ends is None else (scale * ends[0], scale * ends[1])
    return signed(scale * pair.mean, interval, unit)
