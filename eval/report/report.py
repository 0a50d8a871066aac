"""Write eval/REPORT.md and eval/page/ from the committed rows.

Titles, tables and verdicts are computed from the rows. The same rows give the same bytes.
"""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from eval.peers.bases import Base
from eval.report import figures, findings, gpu, kept, over_tasks, scores
from eval.report.findings import FORMATS, Row, distinct, pick
from eval.report.pages import Report, Section, html_page, markdown
from eval.report.score_figure import score_scatter
from eval.report.summary import summary
from eval.report.verdicts import verdicts
from eval.rows import read
from eval.studies.quant_error import Cell
from qrefta.cli import guarded

ROWS = Path(__file__).parents[1] / "rows"
MAKES = {
    "quant_error": "python -m eval quant_error --rows eval/rows/quant_error.jsonl",
    "accuracy": "python -m eval accuracy --task sst2 --task cola --rows eval/rows/accuracy.jsonl",
    "cost": "python -m eval cost --rows eval/rows/cost.jsonl",
    "kld": "python -m eval kld --rows eval/rows/kld.jsonl",
}
_OF_BASE = tuple(name for name in Base._fields if name != "target_bits")  # which came later
NEEDED = {
    "stack": ("model", "method", "start", "text"),
    "model": ("model", "method", "start", "text"),
    "score": ("task", "metric", "test_rows"),
    "step": ("setting", "of_floor"),
    "language": ("model", "measured", "tokens", "window", "texts", *_OF_BASE),
    "encoder": ("model", "measured", "cosine_mean", *_OF_BASE),
}  # fields that older rows of a kind do not have
SETTING = ("text", "samples", "max_length")  # must be equal in all rows of a model
LAYERS = [1, 2, 4, 6, 12, 24, 48, 96]


def run(
    rows: Annotated[Path, typer.Option(help="Folder with the rows.")] = ROWS,
    out: Annotated[Path, typer.Option(help="Markdown file.")] = ROWS.parent / "REPORT.md",
    page: Annotated[
        Path | None,
        typer.Option(help="Folder for index.html and pictures; default: page/ next to OUT."),
    ] = None,
) -> None:
    """Write the report."""
    files = read_all(rows)
    report = Report(
        first=first_sections(files),
        verdicts=verdicts(files),
        sections=sections(files),
        missing=[command for name, command in MAKES.items() if name not in files],
        measured=findings.measured_table(files),
    )
    folder = page or out.parent / "page"
    folder.mkdir(parents=True, exist_ok=True)
    link = Path(os.path.relpath(folder, out.parent)).as_posix()
    for name in earlier_pictures(out, link):
        (folder / name).unlink(missing_ok=True)
    for section in [*report.first, *report.sections]:
        for picture in section.pictures:
            (folder / f"{picture.name}.svg").write_text(picture.svg, encoding="utf-8")
    out.write_text(markdown(report, link), encoding="utf-8")
    (folder / "index.html").write_text(html_page(report), encoding="utf-8")


def earlier_pictures(report: Path, link: str) -> list[str]:
    """Files of the pictures that an earlier report shows, in its folder of pictures.

    Args:
        report: Markdown file, if there is one.
        link: to the folder, from the report.
    """
    if not report.exists():
        return []
    return re.findall(
        rf"\]\({re.escape(link)}/([\w.-]+\.svg)\)", report.read_text(encoding="utf-8")
    )


def read_all(folder: Path) -> dict[str, list[Row]]:
    """The rows of each file in `folder` that the report uses.

    Raises:
        ValueError: if there are no rows, or another version of a study wrote them.
    """
    files = {
        name: read(folder / f"{name}.jsonl")
        for name in MAKES
        if (folder / f"{name}.jsonl").exists()
    }
    files = {name: rows for name, rows in files.items() if rows}
    if not files:
        raise ValueError(
            f"{folder} has no rows to report; expected files are "
            f"{', '.join(f'{name}.jsonl' for name in MAKES)}. "
            f"Measure first: {'; '.join(MAKES.values())}."
        )
    for name, rows in files.items():
        for line, row in enumerate(rows, start=1):
            needed = NEEDED.get(row["kind"], ())
            if not set(needed) <= set(row):
                raise ValueError(
                    f"{folder / name}.jsonl, line {line}: a row of kind {row['kind']} without "
                    f"{', '.join(field for field in needed if field not in row)}, written by an "
                    f"older version; it "
                    f"needs {', '.join(needed)}. Measure again: {MAKES[name]}."
                )
    for row in (row for rows in files.values() for row in rows if row.get("model")):
        row["model"] = Path(row["model"]).name  # the row keeps the folder on its machine
    if "quant_error" in files:
        files["quant_error"] = one_setting(files["quant_error"], folder / "quant_error.jsonl")
    on_gpu = folder / "gpu.jsonl"  # of a machine that few have, so the report does not ask for it
    return files | ({"gpu": read(on_gpu)} if on_gpu.exists() else {})


def one_setting(rows: list[Row], path: Path) -> list[Row]:
    """Rows of errors; the last row of a cell counts.

    Raises:
        ValueError: if a model was measured on several texts or samples.
    """
    for model in distinct(pick(rows, kind=("stack", "model")), "model"):
        settings = {
            tuple(row[name] for name in SETTING)
            for row in pick(rows, kind=("stack", "model"), model=model)
        }
        if len(settings) > 1:
            raise ValueError(
                f"{path}: {model} was measured with several settings: {sorted(settings)} "
                f"({', '.join(SETTING)}); keep "
                "the rows of one in this file."
            )
    fields = ("kind", *Cell._fields)
    return list({tuple(row.get(name) for name in fields): row for row in rows}.values())


def sections(files: dict[str, list[Row]]) -> list[Section]:
    """Every section that the rows allow, but the first on the page."""
    errors = files.get("quant_error", [])
    cost = files.get("cost", [])
    found = [*language_sections(files)[1:], *encoder_sections(files)]
    for model in distinct(pick(errors, kind=("stack", "model", "spectrum")), "model"):
        found += error_sections(pick(errors, model=model), slug(model))
    studies = scores.scores(files.get("accuracy", []))
    found += over_tasks_sections(studies)
    found += [score_section(study, methods) for study, methods in studies.items()]
    for model in distinct(pick(errors, kind="stack"), "model"):
        scored = distinct(pick(files.get("accuracy", []), kind="score"), "model")
        found.append(depth_section(findings.shapes(pick(errors, model=model)), model, scored))
    for setting, device in dict.fromkeys((row["setting"], row["device"]) for row in cost):
        found.append(cost_section(pick(cost, setting=setting, device=device)))
    return [*found, *gpu.sections(files.get("gpu", []))]


def first_sections(files: dict[str, list[Row]]) -> list[Section]:
    """The answer in short, with the picture of the bases if they were measured."""
    points = summary(files)
    sections = language_sections(files)[:1]
    if not points:
        return sections
    if not sections:
        return [Section("In short", "", [], {}, points)]
    (bases,) = sections
    return [bases._replace(title="In short", text=f"{bases.title}. {bases.text}", points=points)]


def language_sections(files: dict[str, list[Row]]) -> list[Section]:
    """How much of language models is kept; the study with the most bases first."""
    return [language_section(group) for group in kept.groups(files.get("kld", []), "language")]


def language_section(group: kept.Group) -> Section:
    """KL divergence of every base of a language model, one picture a text."""
    title = kept.title(group)
    name = f"kld-{slug(group.model)}-{group.tokens}-{group.window}"
    pictures = []
    for text in group.measured:
        values = [kept.divergence(row, text) for row in group.rows]
        pictures.append(
            figures.kept_points(
                kept.series_points(group.rows, values),
                "mean KL divergence to the 16-bit model, nats",
                text,
                f"{name}-{slug(text)}",
                f"KL divergence by bits a weight, {text}. {title}",
            )
        )
    return Section(
        title, kept.reading_aid(group), pictures, {"All bases": kept.language_table(group)}
    )


def encoder_sections(files: dict[str, list[Row]]) -> list[Section]:
    """How much of sentence encoders is kept."""
    found = []
    for group in kept.groups(files.get("kld", []), "encoder"):
        title = kept.encoder_title(group)
        values = [1 - row["cosine_mean"] for row in group.rows]
        picture = figures.kept_points(
            kept.series_points(group.rows, values),
            "1 - mean cosine to the 16-bit model",
            group.measured[0],
            f"cosine-{slug(group.model)}",
            f"Cosine of embeddings by bits a weight. {title}",
        )
        table = kept.encoder_table(group)
        found.append(Section(title, kept.encoder_aid(group), [picture], {"All bases": table}))
    return found


def error_sections(rows: list[Row], name: str) -> list[Section]:
    """Errors of one model's weights and outputs."""
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
    """Error of the whole model by R, one picture per format."""
    measured = [row for row in rows if row[value] is not None]
    formats = [quant_type for quant_type in FORMATS if pick(measured, quant_type=quant_type)]
    titles = {
        one: findings.error_title(pick(measured, quant_type=one), value, what) for one in formats
    }
    meaning = {
        "ratio": "Squared error ||W - Ŵ||^2 of all stacks together, relative to quantizing whole "
        "weights: below 1 "
        "is better than 4 bits alone. R counts the components of a stack. PiSSA, LoftQ and QERA "
        "have the same "
        "number over all its layers, and CRAFT's Tucker part takes at most the same bytes.",
        "output_ratio": "Squared error of the linear layers' outputs on text, "
        "E||x (W - Ŵ)^T||^2, relative to quantizing "
        "whole weights. The text was not used for calibration.",
    }
    others = "".join(f" {titles[one]}." for one in formats[1:])
    return Section(
        titles[formats[0]] if formats else "",
        meaning[value] + others,
        [
            figures.error_curves(
                pick(measured, quant_type=one),
                value,
                f"{FORMATS[one]} {what}",
                f"{name}-{one}",
                f"{what.capitalize()} over R. {titles[one]}",
            )
            for one in formats
        ],
        {
            f"{FORMATS[one]}, by method and R": findings.curve_table(
                pick(measured, quant_type=one), value
            )
            for one in formats
        },
    )


def transform_section(rows: list[Row], name: str) -> Section:
    """The transforms relative to identity, one picture per start in the first format."""
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
        f"Weight error relative to the same split without mixing layers. The pictures show "
        f"{FORMATS[rows[0]['quant_type']]}, "
        "the title covers all formats. Below 1 the transform helps."
    )
    return Section(
        title, text, pictures, {"Over identity's error": findings.transform_table(splits)}
    )


def bytes_section(rows: list[Row], name: str) -> Section:
    """Error by size, and the table of all measurements of the whole model."""
    formats = [
        quant_type
        for quant_type in FORMATS
        if pick(rows, quant_type=quant_type, method=findings.BLOCKS)
    ]
    title = findings.bytes_title(rows)
    text = (
        "Bits per weight count the 4-bit codes, the scales, and factors or corrections in 16 "
        "bits. A smaller block spends "
        "on scales the bytes that a split spends on factors. The factors are also trainable."
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
        {"All measurements of the whole model": findings.bytes_table(rows)},
    )


def stacks_section(rows: list[Row], name: str) -> Section:
    """Error by stack at one R."""
    rows = pick(rows, quant_type=rows[0]["quant_type"])
    rank = findings.shown_rank(rows)
    title = findings.stacks_title(rows)
    text = f"{FORMATS[rows[0]['quant_type']]}. A stack holds the weights of one role in all layers."
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
    quant_format = FORMATS[rows[0]["quant_type"]]
    text = f"{quant_format}, {findings.PAPER}, refined; each cell is one linear layer."
    picture = figures.layer_map(
        rows, rank, f"layers-{name}", f"Weight error by stack and layer. {title}"
    )
    return Section(title, text, [picture], {f"R = {rank}": findings.layers_table(rows, rank)})


def spectrum_section(rows: list[Row], name: str) -> Section:
    """Spectra, one picture per stack."""
    by_stack = {stack: pick(rows, stack=stack) for stack in distinct(rows, "stack")}
    titles = [findings.spectrum_title(one) for one in by_stack.values()]
    text = (
        "Singular values of all transformed slices of a stack, largest first. The transforms are "
        "orthogonal, so "
        "the total energy is the same; a transform is better if the largest components hold more "
        "of it."
    )
    pictures = [
        figures.spectrum_lines(
            one, f"spectrum-{slug(findings.stack_label(stack))}-{name}", f"Spectrum: {title}"
        )
        for (stack, one), title in zip(by_stack.items(), titles)
    ]
    return Section(
        titles[0],
        " ".join([text, *(f"{title}." for title in titles[1:])]),
        pictures,
        {"Energy, the sum of squared values": findings.spectrum_table(rows)},
    )


def over_tasks_sections(studies: dict[scores.Study, dict[str, scores.Score]]) -> list[Section]:
    """Every method beside QLoRA, over the tasks where both were scored."""
    groups = over_tasks.over_tasks(studies)
    if not groups:
        return []
    best = groups[0]
    title = (
        f"Over {len(best.by_task)} tasks, {best.ours} minus {best.theirs} with {best.size} "
        f"trainable parameters: {over_tasks.shown(best)} points"
    )
    text = (
        "Each method at its best learning rate, differences paired over seeds, every task counts "
        "alike. A point is a hundredth of an accuracy or correlation, or one per cent of a "
        "perplexity (a hundredth of a nat). The interval is for these tasks, over seeds."
    )
    return [Section(title, text, [], {"Over tasks": over_tasks.over_tasks_table(groups)})]


def score_section(study: scores.Study, methods: dict[str, scores.Score]) -> Section:
    """Scores of one task, and differences paired over seeds."""
    title = scores.score_title(study.task, methods)
    pairs = [
        pair
        for ours in dict.fromkeys(map(scores.kind, methods))
        if (rival := scores.rival_of(ours)) is not None
        for pair in scores.differences(methods, ours, rival)
    ]
    text = (
        f"{study.model}, {study.steps} steps of {study.batch_size} rows, {study.train_rows:,} "
        f"training rows; mean over "
        f"seeds with its standard error. Adapter parameters exclude the head, which every method "
        f"trains. "
        f"{scores.noise(methods)}"
    )
    name = f"score-{slug(study.task)}-{slug(study.model)}-{study.steps}-{study.test_rows}"
    tables = {"Scores": scores.score_table(methods)}
    if pairs:
        tables["Differences, paired over seeds"] = scores.difference_table(pairs)
    return Section(
        title,
        text,
        [score_scatter(methods, name, f"Scores by trainable parameters. {title}")],
        tables,
    )


def depth_section(stacks: list[tuple[int, int, int]], model: str, scored: list[str]) -> Section:
    """Trainable parameters by depth, computed from the shapes in the rows."""
    title = findings.depth_title(stacks)
    text = (
        f"Counted for the stack shapes of {model}: ReFTA trains R (in + out) parameters per stack "
        f"for any number of "
        "layers, LoRA r (in + out) per layer. "
        + (
            f"Scores were measured on {', '.join(scored)} and on no deeper model."
            if scored
            else "No score was measured."
        )
    )
    picture = figures.depth_lines(
        stacks, LAYERS, f"depth-{slug(model)}", f"Trainable parameters by depth. {title}"
    )
    return Section(
        title, text, [picture], {"Trainable parameters": findings.depth_table(stacks, LAYERS)}
    )


def cost_section(rows: list[Row]) -> Section:
    """Time and memory of a step in one setting, without and with checkpointing."""
    parts = {on: pick(rows, checkpointing=on) for on in (False, True)}
    titles = {on: findings.cost_title(part) for on, part in parts.items() if part}
    words = {False: "without checkpointing", True: "with gradient checkpointing"}
    first = rows[0]
    sequences, length = first["batch"]
    text = (
        f"Setting {first['setting']}: {sequences} x {length} tokens, {first['dtype']}, "
        f"{first['device']}, medians of "
        f"{first['n']} alternated steps. The floor is the frozen 4-bit model: forward, and "
        f"backward to its inputs."
    )
    others = "".join(f" {words[on].capitalize()}: {titles[on]}." for on in list(titles)[1:])
    return Section(
        next(iter(titles.values())),
        text + others,
        [
            figures.cost_dots(
                parts[on],
                f"cost-{slug(first['setting'])}-{slug(first['device'])}-{slug(words[on])}",
                f"A training step {words[on]}: {title}",
            )
            for on, title in titles.items()
        ],
        {words[on].capitalize(): findings.cost_table(parts[on]) for on in titles},
    )


def slug(text: str) -> str:
    """Lower-case letters and digits with hyphens, for file names."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
