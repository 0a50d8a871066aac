"""Command line: qrefta prepare | finetune | inspect | merge | export-lora | plan | evaluate, one function a verb."""

import logging
import shutil
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
import transformers
import typer
from datasets import DatasetDict
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from qrefta._prepare import prepare as prepare_model
from qrefta.config import QReftaConfig
from qrefta.distributed import check_sharding, processes
from qrefta.export.lora import BASES
from qrefta.export.lora import export_lora as export_lora_model
from qrefta.export.merge import ROUNDING_TOLERANCE, Export, check_new
from qrefta.export.merge import merge as merge_model
from qrefta.files.safetensors import resolve_folder
from qrefta.hf_quantizer import is_prepared, load, quant_report, read_config
from qrefta.linalg.tsvd import TRANSFORMS
from qrefta.memory.plan import OPTIMIZERS, Plan
from qrefta.memory.plan import plan as plan_memory
from qrefta.methods import METHODS
from qrefta.model.build import model_class
from qrefta.model.stacks import find_stacks
from qrefta.nn.quantized import BLOCK_SIZES, QUANT_TYPES
from qrefta.split.calibrate import Moments, gather_moments, load_moments
from qrefta.train._finetune import FinetuneResult
from qrefta.train._finetune import finetune as finetune_model
from qrefta.train.arguments import training_arguments
from qrefta.train.data import read_calibration
from qrefta.train.evaluate import evaluate as evaluate_model
from qrefta.train.tasks import TASKS

app = typer.Typer(
    help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)
console = Console()

MethodName = StrEnum("MethodName", list(METHODS))
TransformName = StrEnum("TransformName", list(TRANSFORMS))
QuantTypeName = StrEnum("QuantTypeName", list(QUANT_TYPES))
TaskName = StrEnum("TaskName", list(TASKS))
OptimizerName = StrEnum("OptimizerName", list(OPTIMIZERS))
BaseName = StrEnum("BaseName", {name: name for name in BASES})
DtypeName = StrEnum("DtypeName", ["bfloat16", "float16", "float32"])

Bits = Annotated[int, typer.Option(help="4, or 16 to leave the residual unquantized (ablation).")]
Rank = Annotated[
    str,
    typer.Option(
        help="R: components kept of every stack, over all its layers; auto: see --budget-mb, --error-ratio."
    ),
]
MethodOption = Annotated[MethodName, typer.Option("--method", help="Tensor method.")]
Ranks = Annotated[
    str | None,
    typer.Option(
        help="Instead of --rank, for craft: layers, outputs and inputs, such as 24,100,100."
    ),
]
TrainedParams = Annotated[
    int | None,
    typer.Option(help="Instead of --rank: the largest that trains at most so many numbers."),
]
Budget = Annotated[float | None, typer.Option(help="With --rank auto: megabytes for all factors.")]
ErrorRatio = Annotated[
    float | None, typer.Option(help="With --rank auto: squared error to reach, of whole weights'.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="File of text (txt, csv, tsv, jsonl, parquet): keep the outputs on it, not the weights."
    ),
]
TransformOption = Annotated[TransformName, typer.Option("--transform", help="Mode-3 transform.")]
QuantTypeOption = Annotated[QuantTypeName, typer.Option("--quant-type", help="4-bit format.")]
BlockSize = Annotated[
    int, typer.Option(help=f"Weights that share a scale: {', '.join(map(str, BLOCK_SIZES))}.")
]
DoubleQuant = Annotated[bool, typer.Option(help="Store the scales in 8 bits too.")]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="End of the path of modules that get factors; repeat for more."),
]
TargetRegex = Annotated[
    str | None, typer.Option(help="Regular expression for whole paths, instead of --target.")
]
Saved = Annotated[
    list[str] | None,
    typer.Option(help="End of the path of a module to train whole; repeat for more."),
]
Refine = Annotated[
    int, typer.Option(help="Rounds of refitting factors and residual to each other.")
]
DEFAULTS = QReftaConfig()
Seed = Annotated[int, typer.Option(help="Of everything random.")]


@app.command()
def prepare(
    model: Annotated[str, typer.Argument(help="Hub name or local folder of a dense model.")],
    out: Annotated[
        Path, typer.Argument(help="Folder to write; new, empty, or left by an interrupted run.")
    ],
    bits: Bits = 4,
    rank: Rank = "16",
    method: MethodOption = MethodName.refta,
    ranks: Ranks = None,
    trained_params: TrainedParams = None,
    budget_mb: Budget = None,
    error_ratio: ErrorRatio = None,
    transform: TransformOption = TransformName.lsm3,
    quant_type: QuantTypeOption = QuantTypeName.nf4,
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = False,
    target: Targets = None,
    target_regex: TargetRegex = None,
    modules_to_save: Saved = None,
    refine: Refine = DEFAULTS.refine,
    calibration: Calibration = None,
    moments: Annotated[
        Path | None, typer.Option(help="Moments file: written with --calibration, else read.")
    ] = None,
    seed: Seed = 0,
    device: Annotated[
        str | None, typer.Option(help="Where stacks are worked on, such as cuda.")
    ] = None,
    max_memory: Annotated[
        str, typer.Option(help="What preparing may take beside the libraries.")
    ] = "2GB",
) -> None:
    """Split a checkpoint into a 4-bit residual and trainable factors, a few rows at a time; goes on if interrupted."""
    if calibration is not None:
        gathered = _gather(model, calibration, seed)
        if moments is not None:
            gathered.save(moments)
    else:
        gathered = None if moments is None else load_moments(moments)
    prepare_model(
        model, bits, _rank(rank), out=out, method=method, ranks=_ranks(ranks), trained_params=trained_params,
        transform=transform, quant_type=quant_type, block_size=block_size,
        double_quant=double_quant, target_modules=target_regex or target, modules_to_save=modules_to_save,
        refine=refine, moments=gathered, budget_mb=budget_mb, error_ratio=error_ratio, seed=seed, device=device,
        max_memory=max_memory,
    )  # fmt: skip
    config = QReftaConfig.from_dict(read_config(out)["quantization_config"])
    console.print(report_table([row.report() for row in config.stacks]))
    console.print(
        f"{weights_bytes(resolve_folder(model)) / 1e6:.1f} MB -> {weights_bytes(out) / 1e6:.1f} MB in {out}"
    )


@app.command()
def finetune(
    model: Annotated[
        str, typer.Argument(help="Hub name or folder: dense (is prepared first), or prepared.")
    ],
    dataset: Annotated[
        str, typer.Argument(help="Hub name, folder or file (csv, tsv, json, jsonl, parquet).")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for checkpoints and the trained model.")],
    bits: Bits = 4,
    rank: Rank = "16",
    method: MethodOption = MethodName.refta,
    ranks: Ranks = None,
    trained_params: TrainedParams = None,
    budget_mb: Budget = None,
    error_ratio: ErrorRatio = None,
    transform: TransformOption = TransformName.lsm3,
    quant_type: QuantTypeOption = QuantTypeName.nf4,
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = False,
    target: Targets = None,
    target_regex: TargetRegex = None,
    modules_to_save: Saved = None,
    refine: Refine = DEFAULTS.refine,
    calibration: Calibration = None,
    seed: Seed = 0,
    task: Annotated[
        TaskName, typer.Option(help="What the data are, and the model is to learn.")
    ] = TaskName.classify,
    text_column: Annotated[
        list[str] | None, typer.Option(help="Column with text; give two for pairs.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with classes.")] = None,
    header: Annotated[
        list[str] | None, typer.Option(help="Column names, in order, of a file without header.")
    ] = None,
    learning_rate: float = 1e-3,
    epochs: float = 3.0,
    max_steps: Annotated[int, typer.Option(help="Steps; if positive it wins over --epochs.")] = -1,
    batch_size: int = 32,
    max_length: Annotated[int, typer.Option(help="Tokens a row is cut to.")] = 128,
    packing: Annotated[
        bool, typer.Option(help="For sft: several conversations a sequence.")
    ] = False,
    optimizer: Annotated[
        str, typer.Option(help="One of Trainer's, such as adamw_8bit.")
    ] = "adamw_torch",
    gradient_accumulation: Annotated[int, typer.Option(help="Passes a step.")] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option(help="Recompute activations: less memory, more time.")
    ] = False,
    bf16: Annotated[bool, typer.Option(help="Compute in bf16 under autocast.")] = False,
    fsdp: Annotated[
        bool, typer.Option(help="Shard the model over torchrun's processes, by FSDP2.")
    ] = False,
    report_to: Annotated[
        list[str] | None, typer.Option(help="Trainer's logging integrations.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.")] = False,
) -> None:
    """Train: prepare the model if it is dense, train its factors and head, save everything."""
    check_sharding()
    state, start = processes(), out / "start"
    settings = {"max_length": max_length, "packing": packing} if task == "sft" else {}
    args = training_arguments(
        task,
        out,
        learning_rate=learning_rate,
        num_train_epochs=epochs,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        optim=optimizer,
        gradient_accumulation_steps=gradient_accumulation,
        gradient_checkpointing=gradient_checkpointing,
        bf16=bf16,
        fsdp=fsdp or None,
        seed=seed,
        report_to=report_to or "none",
        **settings,
    )
    console.quiet = not state.is_main_process
    with state.main_process_first():
        if state.is_main_process and not resume:
            check_new(out)
        columns = {"text_columns": text_column, "label_column": label_column, "header": header}
        data = TASKS[task].load(dataset, seed=seed, **(columns if task == "classify" else {}))
        processor = TASKS[task].processor.from_pretrained(model)
        loaded = load_model(str(start) if start.is_dir() else model, task, data, seed)
        if not is_prepared(loaded):
            if not state.is_main_process:
                raise ValueError(
                    f"{start} is not seen here; OUT must be a folder that all nodes share."
                )
            batches = (
                None if calibration is None else read_calibration(calibration, processor, seed=seed)
            )
            prepare_model(
                loaded, bits, _rank(rank), method=method, ranks=_ranks(ranks), trained_params=trained_params,
                transform=transform, quant_type=quant_type, block_size=block_size,
                double_quant=double_quant, target_modules=target_regex or target, modules_to_save=modules_to_save,
                refine=refine, calibration=batches, budget_mb=budget_mb, error_ratio=error_ratio, seed=seed,
            )  # fmt: skip
            if state.num_processes > 1:  # what the others load, whole or not at all
                loaded.save_pretrained(f"{start}.partial")
                Path(f"{start}.partial").rename(start)
    console.print(report_table(quant_report(loaded)))
    result = finetune_model(
        loaded,
        processor,
        data,
        task=task,
        args=args,
        max_length=max_length,
        packing=packing,
        resume=resume,
    )
    if state.is_main_process:
        shutil.rmtree(start, ignore_errors=True)
    console.print(results_table({"qrefta": result}))
    console.print(f"Saved in {out} ({weights_bytes(out) / 1e6:.1f} MB)")


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="Folder of a prepared model.")]) -> None:
    """Show what was done to a prepared model, from its config alone."""
    config = QReftaConfig.from_dict(read_config(folder)["quantization_config"])
    console.print(report_table([row.report() for row in config.stacks]))
    shown = {key: value for key, value in config.to_dict().items() if key != "stacks"}
    console.print(", ".join(f"{key}={value}" for key, value in shown.items()))


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="Folder of a prepared model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    dtype: Annotated[DtypeName, typer.Option(help="Of the merged model.")] = DtypeName.bfloat16,
    tolerance: Annotated[
        float, typer.Option(help="Relative difference of logits that is allowed.")
    ] = ROUNDING_TOLERANCE,
) -> None:
    """Write a plain dense transformers model that loads without qrefta."""
    check_new(out)
    written = merge_model(load(folder), getattr(torch, dtype), out=out, tolerance=tolerance)
    console.print(
        f"{weights_bytes(folder) / 1e6:.1f} MB -> {weights_bytes(out) / 1e6:.1f} MB {dtype} in {out}"
    )
    _print_differences(written)


@app.command(name="export-lora")
def export_lora(
    folder: Annotated[Path, typer.Argument(help="Folder of a prepared model.")],
    out: Annotated[
        Path,
        typer.Argument(help="Folder to write, new or empty: adapter, and base for a residual one."),
    ],
    base: Annotated[BaseName, typer.Option(help="What the LoRA goes on.")] = BaseName.residual,
    original: Annotated[
        str | None,
        typer.Option(help="With --base original: folder or hub name; default: what was prepared."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of the LoRA; default: the factors', twice on the original.")
    ] = None,
    dtype: Annotated[DtypeName, typer.Option(help="Of LoRA and base.")] = DtypeName.bfloat16,
    tolerance: Annotated[
        float | None, typer.Option(help="Relative difference of logits that is allowed.")
    ] = None,
) -> None:
    """Write the factors as a LoRA that PEFT and servers load, with the base that it goes on."""
    check_new(out)
    written = export_lora_model(
        load(folder),
        out,
        base,
        original=original,
        rank=rank,
        dtype=getattr(torch, dtype),
        tolerance=tolerance,
    )
    console.print(f"LoRA on the {base} in {out} ({weights_bytes(out) / 1e6:.1f} MB)")
    _print_differences(written)


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="Hub name or folder of a dense model; its config.json is enough.")
    ],
    batch: Annotated[int, typer.Option(help="Sequences, or images, of one pass.")] = 1,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence; none for images.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Its memory, such as 24GB.")] = None,
    reserve: Annotated[
        str, typer.Option(help="Of it, for what is not counted: CUDA itself, fragments.")
    ] = "1GB",
    rank: Annotated[int, typer.Option(help="R of every stack.")] = 16,
    method: MethodOption = MethodName.refta,
    ranks: Ranks = None,
    trained_params: TrainedParams = None,
    bits: Bits = 4,
    quant_type: QuantTypeOption = QuantTypeName.nf4,
    block_size: BlockSize = 64,
    double_quant: DoubleQuant = False,
    target: Targets = None,
    modules_to_save: Saved = None,
    dtype: Annotated[
        DtypeName | None, typer.Option(help="Of what stays dense; default: the model's own.")
    ] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations.")] = False,
    optimizer: Annotated[
        OptimizerName, typer.Option(help="AdamW in 32 or 8 bits.")
    ] = OptimizerName.adamw,
) -> None:
    """Count the memory of a training step from the config alone, what fits on a GPU, and what to change."""
    found = plan_memory(
        model, batch=batch, seq=seq, gpu=gpu, reserve=reserve, dtype=dtype, optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing, bits=bits, rank=rank, method=method, ranks=_ranks(ranks),
        trained_params=trained_params, quant_type=quant_type, block_size=block_size, double_quant=double_quant,
        target_modules=target, modules_to_save=modules_to_save,
    )  # fmt: skip
    console.print(plan_table(found))
    if found.available_bytes is None:
        return
    largest = f"largest batch {found.largest_batch:,}"
    if found.largest_rank is not None:
        largest += f", largest rank {found.largest_rank:,}"
    verdict = "It fits" if found.fits else "It does not fit"
    console.print(
        f"{verdict} in {found.available_bytes / 1e9:.2f} GB; all else as it is: {largest}."
    )
    for saving in found.savings:
        console.print(f"  {saving.change} would save {saving.saved_bytes / 1e9:.2f} GB")


def plan_table(found: Plan) -> Table:
    """The parts of a plan, in gigabytes."""
    table = Table(title="Memory of a training step", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("part")
    table.add_column("GB", justify="right")
    for name in ("linears", "rest", "factors", "optimizer", "activations", "temporary"):
        table.add_row(name, f"{getattr(found, f'{name}_bytes') / 1e9:.3f}")
    table.add_section()
    table.add_row("peak", f"{found.total_bytes / 1e9:.3f}")
    return table


@app.command()
def evaluate(
    folder: Annotated[
        str,
        typer.Argument(help="Folder or hub name of a language model: prepared, merged or plain."),
    ],
    tasks: Annotated[list[str], typer.Argument(help="Tasks of lm-evaluation-harness.")],
    include_path: Annotated[
        Path | None, typer.Option(help="Folder of your own task files.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(help="Questions of each task.")] = None,
    batch_size: Annotated[str, typer.Option(help="Rows at a time, or auto.")] = "8",
    device: Annotated[str | None, typer.Option(help="Such as cuda.")] = None,
) -> None:
    """Score a language model with lm-evaluation-harness."""
    found = evaluate_model(
        folder, tasks, include_path=include_path, num_fewshot=num_fewshot, limit=limit, batch_size=batch_size,
        device=device,
    )  # fmt: skip
    table = Table(title="lm-evaluation-harness", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("task", "metric", "value", "standard error"):
        table.add_column(name, justify="right" if name in ("value", "standard error") else "left")
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            error = metrics.get(f"{metric}_stderr,{filtered}")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                table.add_row(
                    task, metric, f"{value:.4g}", f"{error:.2g}" if isinstance(error, float) else ""
                )
    console.print(table)


def _print_differences(written: Export) -> None:
    """What is left out of an export, and what to know of it."""
    console.print(
        f"Logits differ from the prepared model's by {written.difference:.2g} of their size."
    )
    if written.weight_error:
        console.print(
            f"The LoRA lacks {written.weight_error:.2g} of the squared norm of what it stands for."
        )
    for note in written.notes:
        console.print(f"Note: {note}.")


def report_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of `quant_report` as a table, with a line for the whole model."""
    prefix = _common_prefix([row["stack"] for row in rows])
    where = f" in {prefix.removesuffix('.')}" if prefix else ""
    title = f"Squared quantization error{where}: whole weight W, residual Wr"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    measured = rows[0]["output_ratio"] is not None
    for name in (
        "stack",
        "shape",
        "R",
        "W-Q(W)",
        "Wr-Q(Wr)",
        "ratio",
        *["output"][: int(measured)],
        "bits",
    ):
        table.add_column(name, justify="left" if name == "stack" else "right", overflow="fold")
    for row in rows:
        out_features, in_features = row["shape"]
        table.add_row(
            row["stack"].removeprefix(prefix), f"{row['layers']}x{out_features}x{in_features}", str(row["rank"]),
            f"{row['baseline_error']:.4g}", f"{row['residual_error']:.4g}", f"{row['ratio']:.3f}",
            *([f"{row['output_ratio']:.3f}"] if measured else []), f"{row['bits_per_weight']:.2f}",
        )  # fmt: skip
    baseline, residual = (
        sum(row[key] for row in rows) for key in ("baseline_error", "residual_error")
    )
    weights = sum(row["layers"] * row["shape"][0] * row["shape"][1] for row in rows)
    bits = 8 * sum(row["bytes"] for row in rows) / weights
    ratio = f"{residual / baseline:.3f}" if baseline else "1.000"
    table.add_section()
    table.add_row("all", f"{weights:,}", "", f"{baseline:.4g}", f"{residual:.4g}", ratio, *[""][: int(measured)],
                  f"{bits:.2f}")  # fmt: skip
    return table


def results_table(results: dict[str, FinetuneResult]) -> Table:
    """Training runs side by side."""
    table = Table(title="Test accuracy", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("method", "trained", "before", "after", "test loss", "steps", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name, result in results.items():
        table.add_row(
            name, f"{result.trained_parameters:,}", *map(_percent, (result.accuracy_before, result.accuracy_after)),
            f"{result.test_loss:.3f}", str(result.steps), f"{result.train_s:.0f}",
        )  # fmt: skip
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def load_model(source: str, task: str, data: DatasetDict, seed: int) -> PreTrainedModel:
    """A model of the task's class, with a head for the data's classes where it has them."""
    if task in ("lm", "sft"):
        return TASKS[task].model.from_pretrained(source, dtype="auto", use_safetensors=True)
    return load_classifier(source, data["train"].features["label"].names, seed, TASKS[task].model)


def load_classifier(
    model: str, classes: list[str], seed: int, auto: type = AutoModelForSequenceClassification
) -> PreTrainedModel:
    """A classifier for these classes, of the class `auto`.

    Its head is drawn from `seed` if the checkpoint has none that fits.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto.from_pretrained(
            model,
            dtype=torch.float32,  # a head in bf16 would lose most of AdamW's updates
            use_safetensors=True,
            num_labels=len(classes),
            id2label=dict(enumerate(classes)),
            label2id={name: index for index, name in enumerate(classes)},
            ignore_mismatched_sizes=AutoConfig.from_pretrained(model).num_labels != len(classes),
        )


def weights_bytes(folder: Path) -> int:
    """Bytes of the safetensors files directly in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def quiet_libraries() -> None:
    """Keep the libraries' loading bars and notices out of the output; Trainer's own bar stays."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate.big_modeling").setLevel(
        logging.ERROR
    )  # parts read from disk as the model runs


def guarded(command: Callable[[], object]) -> None:
    """Run a command; an expected failure is one line on stderr and exit code 2, not a traceback."""
    quiet_libraries()
    try:
        command()
    except (ValueError, OSError, FloatingPointError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        raise SystemExit(2) from error


def main() -> None:
    """Entry point."""
    guarded(app)


def _rank(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"rank is {text!r}; it must be a whole number, or auto") from None


def _ranks(text: str | None) -> list[int] | None:
    return None if text is None else [_rank(part) for part in text.split(",")]


def _gather(model: str, calibration: str, seed: int) -> Moments:
    """Moments of a dense model's inputs on a file of text; the model is in memory while they are gathered."""
    batches = read_calibration(calibration, AutoTokenizer.from_pretrained(model), seed=seed)
    names = AutoConfig.from_pretrained(model).architectures or [""]
    dense = model_class(names[0], model).from_pretrained(model, dtype="auto", use_safetensors=True)
    return gather_moments(dense, find_stacks(dense), batches)


def _common_prefix(names: list[str]) -> str:
    """The module path that all names start with, with its dot, or nothing."""
    split = [name.split(".")[:-1] for name in names]
    shared = [parts[0] for parts in zip(*split) if len(set(parts)) == 1]
    return (
        ".".join(shared) + "."
        if shared and all(parts[: len(shared)] == shared for parts in split)
        else ""
    )
