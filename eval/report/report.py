"""python -m eval.report.report: the committed rows -> one HTML page and a Markdown file, with pictures.

Titles, tables and verdicts are computed from the rows: other rows, other findings. The same rows give the same bytes.
"""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from eval.report import figures, findings, scores
from eval.report.findings import FORMATS, Row, distinct, pick
from eval.report.pages import Report, Section, html_page, markdown
from eval.report.verdicts import verdicts
from eval.rows import read
from eval.studies.quant_error import Cell
from qrefta.cli import guarded
from qrefta.methods import METHODS

ROWS = Path(__file__).parents[1] / "rows"
MAKES = {
    "quant_error": "python -m eval quant_error --rows eval/rows/quant_error.jsonl",
    "accuracy": "python -m eval accuracy --task sst2 --task cola --rows eval/rows/accuracy.jsonl",
    "cost": "python -m eval cost --rows eval/rows/cost.jsonl",
}
NEEDED = {
    "stack": ("model", "method", "start", "text"),
    "model": ("model", "method", "start", "text"),
    "score": ("task", "metric", "test_rows"),
    "step": ("setting", "of_floor"),
}  # fields that older rows of a kind lack
SETTING = ("text", "samples", "max_length")  # of errors that may be compared
LAYERS = [1, 2, 4, 6, 12, 24, 48, 96]


def run(
    rows: Annotated[Path, typer.Option(help="Folder of rows.")] = ROWS,
    out: Annotated[Path, typer.Option(help="Markdown file.")] = ROWS.parent / "REPORT.md",
    page: Annotated[
        Path | None,
        typer.Option(help="Folder for index.html and pictures; default: page/ next to OUT."),
    ] = None,
) -> None:
    """Write the report."""
    files = read_all(rows)
    report = Report(
        verdicts=verdicts(files),
        sections=sections(files),
        missing=[command for name, command in MAKES.items() if name not in files],
        measured=findings.measured_table(files),
    )
    folder = page or out.parent / "page"
    folder.mkdir(parents=True, exist_ok=True)
    for section in report.sections:
        for picture in section.pictures:
            (folder / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
    link = Path(os.path.relpath(folder, out.parent)).as_posix()
    out.write_text(markdown(report, link), encoding="utf-8")
    (folder / "index.html").write_text(html_page(report), encoding="utf-8")


def read_all(folder: Path) -> dict[str, list[Row]]:
    """The rows of every file of `folder` that the report knows and that has any.

    Raises:
        ValueError: if there is none, or rows were written by another version of their study.
    """
    files = {
        name: read(folder / f"{name}.jsonl")
        for name in MAKES
        if (folder / f"{name}.jsonl").exists()
    }
    files = {name: rows for name, rows in files.items() if rows}
    if not files:
        raise ValueError(
            f"{folder} has no rows to report; it may have {', '.join(f'{name}.jsonl' for name in MAKES)}. "
            f"Measure first: {'; '.join(MAKES.values())}."
        )
    for name, rows in files.items():
        for line, row in enumerate(rows, start=1):
            needed = NEEDED.get(row["kind"], ())
            if not set(needed) <= set(row):
                raise ValueError(
                    f"{folder / name}.jsonl, line {line}: a row of kind {row['kind']} without "
                    f"{', '.join(field for field in needed if field not in row)}, written by an older version; it "
                    f"needs {', '.join(needed)}. Measure again: {MAKES[name]}."
                )
    if "quant_error" in files:
        files["quant_error"] = one_setting(files["quant_error"], folder / "quant_error.jsonl")
    return files


def one_setting(rows: list[Row], path: Path) -> list[Row]:
    """Rows of errors, of a cell that was measured again the last.

    Raises:
        ValueError: if a model was measured on several texts, or several samples of one.
    """
    for model in distinct(pick(rows, kind=("stack", "model")), "model"):
        settings = {
            tuple(row[name] for name in SETTING)
            for row in pick(rows, kind=("stack", "model"), model=model)
        }
        if len(settings) > 1:
            raise ValueError(
                f"{path}: {model} was measured with several settings: {sorted(settings)} ({', '.join(SETTING)}); keep "
                "the rows of one in this file."
            )
    fields = ("kind", *Cell._fields)
    return list({tuple(row.get(name) for name in fields): row for row in rows}.values())


def sections(files: dict[str, list[Row]]) -> list[Section]:
    """All that the rows allow."""
    errors, cost = files.get("quant_error", []), files.get("cost", [])
    found = []
    for model in distinct(pick(errors, kind=("stack", "model", "spectrum")), "model"):
        found += error_sections(pick(errors, model=model), slug(model))
    for study, methods in scores.scores(files.get("accuracy", [])).items():
        found.append(score_section(study, methods))
    for model in distinct(pick(errors, kind="stack"), "model"):
        scored = distinct(pick(files.get("accuracy", []), kind="score"), "model")
        found.append(depth_section(findings.shapes(pick(errors, model=model)), model, scored))
    for setting, device in dict.fromkeys((row["setting"], row["device"]) for row in cost):
        found.append(cost_section(pick(cost, setting=setting, device=device)))
    return found


def error_sections(rows: list[Row], name: str) -> list[Section]:
    """What was measured of one model's weights and outputs."""
    whole, stacks, spectra = (pick(rows, kind=kind) for kind in ("model", "stack", "spectrum"))
    found = []
    if pick(whole, method="refta") and any(row["rank"] for row in pick(whole, method="refta")):
        found += [
            curve_section(whole, "ratio", "weight error", f"weight-error-{name}"),
            curve_section(whole, "output_ratio", "output error", f"output-error-{name}"),
            transform_section(whole, name),
            bytes_section(whole, name),
        ]
    if any(row["rank"] for row in pick(stacks, method="refta", transform=findings.PAPER)):
        found += [stacks_section(stacks, name), layers_section(stacks, name)]
    if spectra:
        found.append(spectrum_section(spectra, name))
    return [section for section in found if section.pictures]


def curve_section(rows: list[Row], value: str, what: str, name: str) -> Section:
    """Error over R of the whole model; title of the first format, a picture a format."""
    measured = [row for row in rows if row[value] is not None]
    formats = [quant_type for quant_type in FORMATS if pick(measured, quant_type=quant_type)]
    titles = {
        one: findings.error_title(pick(measured, quant_type=one), value, what) for one in formats
    }
    meaning = {
        "ratio": "Squared error ||W - Ŵ||^2 of all stacks together, over that of quantizing whole weights: below 1 "
        "is better than 4 bits alone. R counts components of a stack; PiSSA, LoftQ and QERA have as many in all its "
        "layers together, and CRAFT's Tucker part takes no more bytes.",
        "output_ratio": "Squared error of the linears' outputs on text, E||x (W - Ŵ)^T||^2, over that of quantizing "
        "whole weights. The text was not used to calibrate.",
    }
    others = "".join(f" {titles[one]}." for one in formats[1:])
    return Section(
        titles[formats[0]] if formats else "",
        meaning[value] + others,
        [
            figures.error_curves(
                pick(measured, quant_type=one), value, f"{FORMATS[one]} {what}", f"{name}-{one}",
                f"{what.capitalize()} over R. {titles[one]}",
            ) for one in formats
        ],
        {
            f"{FORMATS[one]}, by method and R": findings.curve_table(pick(measured, quant_type=one), value)
            for one in formats
        },
    )  # fmt: skip


def transform_section(rows: list[Row], name: str) -> Section:
    """The transforms relative to identity; a picture a start, of the first format."""
    splits = pick(rows, method="refta", quant_type=rows[0]["quant_type"])
    title = findings.transform_title(rows)
    both = {row["start"] for row in pick(splits, transform="identity")}
    pictures = [
        figures.transform_curves(
            splits, start, f"transforms-{slug(start)}-{name}", f"Transforms, {start}: {title}"
        )
        for start in distinct(splits, "start")
        if start in both
    ]
    text = (
        f"Weight error over that of the same split without mixing layers, {FORMATS[rows[0]['quant_type']]} in the "
        "pictures and every format in the title: below 1 the transform pays."
    )
    return Section(
        title, text, pictures, {"Over identity's error": findings.transform_table(splits)}
    )


def bytes_section(rows: list[Row], name: str) -> Section:
    """Error by size; the table of everything that was measured of the whole model."""
    formats = [
        quant_type
        for quant_type in FORMATS
        if pick(rows, quant_type=quant_type, method=findings.BLOCKS)
    ]
    title = findings.bytes_title(rows)
    text = (
        "Bits a weight count the 4-bit codes, scales, and factors or corrections in 16 bit. A smaller block spends "
        "as many bytes on scales as the split of an R does on factors; what the split spends trains as well."
    )
    pictures = [
        figures.bytes_curves(
            pick(rows, quant_type=one),
            f"bytes-{one}-{name}",
            f"{FORMATS[one]}, error by size: {title}",
        )
        for one in formats or [rows[0]["quant_type"]]
    ]
    return Section(
        title,
        text,
        pictures,
        {"Everything measured of the whole model": findings.bytes_table(rows)},
    )


def stacks_section(rows: list[Row], name: str) -> Section:
    """Error by stack at one R."""
    rows = pick(rows, quant_type=rows[0]["quant_type"])
    rank, title = findings.shown_rank(rows), findings.stacks_title(rows)
    text = f"{FORMATS[rows[0]['quant_type']]}. A stack is the weights of one role in all layers."
    picture = figures.stack_dots(
        rows, rank, f"stacks-{name}", f"Weight error by stack at R = {rank}. {title}"
    )
    return Section(title, text, [picture], {f"R = {rank}": findings.stacks_table(rows, rank)})


def layers_section(rows: list[Row], name: str) -> Section:
    """Error by stack and layer at one R."""
    rows = pick(rows, quant_type=rows[0]["quant_type"])
    rank = findings.shown_rank(rows)
    if not findings.layer_rows(rows, rank):
        return Section("", "", [], {})
    title = findings.layers_title(rows, rank)
    text = f"{FORMATS[rows[0]['quant_type']]}, {findings.PAPER}, refined; each cell is one linear."
    picture = figures.layer_map(
        rows, rank, f"layers-{name}", f"Weight error by stack and layer. {title}"
    )
    return Section(title, text, [picture], {f"R = {rank}": findings.layers_table(rows, rank)})


def spectrum_section(rows: list[Row], name: str) -> Section:
    """Spectra, a picture a stack."""
    by_stack = {stack: pick(rows, stack=stack) for stack in distinct(rows, "stack")}
    titles = [findings.spectrum_title(one) for one in by_stack.values()]
    text = (
        "Singular values of a stack's transformed slices, all together, largest first. The transforms are orthogonal, "
        "so the energy of all components is the same; the more of it the largest hold, the better."
    )
    pictures = [
        figures.spectrum_lines(
            one, f"spectrum-{slug(findings.stack_label(stack))}-{name}", f"Spectrum: {title}"
        )
        for (stack, one), title in zip(by_stack.items(), titles)
    ]
    return Section(titles[0], " ".join([text, *(f"{title}." for title in titles[1:])]), pictures,
                   {"Energy, the sum of squared values": findings.spectrum_table(rows)})  # fmt: skip


def score_section(study: scores.Study, methods: dict[str, scores.Score]) -> Section:
    """Scores of one task, and the paired differences."""
    title = scores.score_title(study.task, methods)
    pairs = [
        pair
        for ours in METHODS
        for words, theirs in ((f"{ours} bits=16", "lora"), (ours, "qlora"))
        for pair in scores.differences(methods, words, theirs)
    ]
    text = (
        f"{study.model}, {study.steps} steps of {study.batch_size} rows, {study.train_rows:,} training rows; mean over "
        f"seeds with its standard error. Adapter parameters leave out the head, which every method trains. "
        f"{scores.noise(methods)}"
    )
    name = f"score-{slug(study.task)}-{slug(study.model)}-{study.steps}"
    tables = {"Scores": scores.score_table(methods)}
    if pairs:
        tables["Differences, paired over seeds"] = scores.difference_table(pairs)
    return Section(
        title,
        text,
        [figures.score_scatter(methods, name, f"Scores by trained numbers. {title}")],
        tables,
    )


def depth_section(stacks: list[tuple[int, int, int]], model: str, scored: list[str]) -> Section:
    """Trained numbers by depth; a formula, with the shapes of the rows, and the models that scores are of."""
    title = findings.depth_title(stacks)
    text = (
        f"Counted for the stack shapes of {model}: a stack trains R (in + out) numbers however many layers share "
        "them, LoRA r (in + out) in every layer. This is a count: "
        + (
            f"scores were measured on {', '.join(scored)} and on no deeper model."
            if scored
            else "no score was measured."
        )
    )
    picture = figures.depth_lines(
        stacks, LAYERS, f"depth-{slug(model)}", f"Trained numbers by depth. {title}"
    )
    return Section(
        title, text, [picture], {"Trained numbers": findings.depth_table(stacks, LAYERS)}
    )


def cost_section(rows: list[Row]) -> Section:
    """Time and memory of a step in one setting on one device, without and with checkpointing."""
    parts = {on: pick(rows, checkpointing=on) for on in (False, True)}
    titles = {on: findings.cost_title(part) for on, part in parts.items() if part}
    words = {False: "without checkpointing", True: "with gradient checkpointing"}
    first = rows[0]
    sequences, length = first["batch"]
    text = (
        f"Setting {first['setting']}: {sequences} x {length} tokens, {first['dtype']}, {first['device']}, medians of "
        f"{first['n']} alternated steps. The floor is the frozen 4-bit model alone, forward and backward to its inputs."
    )
    others = "".join(f" {words[on].capitalize()}: {titles[on]}." for on in list(titles)[1:])
    return Section(
        next(iter(titles.values())),
        text + others,
        [
            figures.cost_dots(parts[on], f"cost-{slug(first['setting'])}-{slug(first['device'])}-{slug(words[on])}",
                              f"A training step {words[on]}: {title}") for on, title in titles.items()
        ],
        {words[on].capitalize(): findings.cost_table(parts[on]) for on in titles},
    )  # fmt: skip


def slug(text: str) -> str:
    """Letters and digits with hyphens, for names of files."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
