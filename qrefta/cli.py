"""4-bit fine-tuning of transformers models with shared tensor factors (ReFTA)."""

# Only light imports here: `qrefta --help` and a mistyped command must not wait for torch. Every
# command imports what it needs; the choices of options come from `qrefta.choices`, which imports
# nothing.

import logging
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from qrefta._options import with_settings
from qrefta.choices import (
    AUTO_RATE,
    GENERIC_TEXT,
    Dtype,
    GgufType,
    LoraBase,
    Loss,
    Optimizer,
    Task,
)
from qrefta.recipe import NAME as RECIPE
from qrefta.recipe import RecipeCommand, write_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qrefta.export.merge import Export
    from qrefta.split.calibrate import Moments

app = typer.Typer(
    help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False
)
console = Console()

DATA, TRAINING, MEMORY, RUN = "Data", "Training", "Memory", "While it runs"  # groups of options
NONE = "none"
ROWS = "data"  # rows of the training data
DEFAULT_OF_FINETUNE = ROWS
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]
_KINDS = "a file (txt, csv, tsv, jsonl, parquet), text (generic text) or none"


@app.command()
@with_settings
def prepare(
    model: Annotated[
        str, typer.Argument(help="Hub name, local folder or .gguf file of a dense model.")
    ],
    out: Annotated[
        Path,
        typer.Argument(help="Folder to write: new, empty, or left by an interrupted run."),
    ],
    settings: dict[str, Any],
    calibration: Annotated[
        str | None,
        typer.Option(
            help=f"Text on which the outputs are kept: {_KINDS}; default: text, if the model has a "
            "tokenizer and its files fit in --max-memory."
        ),
    ] = None,
    moments: Annotated[
        Path | None,
        typer.Option(help="File of moments: written with --calibration, read without it."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device that splits the weights, such as cuda.")
    ] = None,
    max_memory: Annotated[
        str, typer.Option(help="Memory for preparing, on top of the imported libraries.")
    ] = "2GB",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Split a checkpoint into a 4-bit residual and trainable factors, a few rows at a time.

    An interrupted run goes on when the same command is given again. A GGUF file is prepared in
    memory.
    """
    quiet_libraries(data=False)
    from qrefta._prepare import prepare_checkpoint
    from qrefta.files.safetensors import weights_bytes
    from qrefta.files.sources import dense_bytes
    from qrefta.split.calibrate import load_moments
    from qrefta.tables import report_table

    gathered = None
    if calibration is None:
        calibration = NONE if moments is not None else _calibration_of(model, max_memory)
    if calibration != NONE:
        gathered = _gather(model, calibration, settings["seed"], trust_remote_code)
        if moments is not None:
            gathered.save(moments)
    elif moments is not None:
        gathered = load_moments(moments)
    prepare_checkpoint(
        model,
        out,
        moments=gathered,
        device=device or "cpu",
        max_memory=max_memory,
        trust_remote_code=trust_remote_code,
        **settings,
    )
    console.print(report_table(_read_rows(out)))
    console.print(f"{_megabytes(dense_bytes(model))} -> {_megabytes(weights_bytes(out))} in {out}")


@app.command(cls=RecipeCommand)
@with_settings
def finetune(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Hub name, folder or .gguf file: dense (is prepared first), or prepared."
        ),
    ],
    dataset: Annotated[
        str, typer.Argument(help="Hub name, folder or file (csv, tsv, json, jsonl, parquet).")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for checkpoints and the trained model.")],
    settings: dict[str, Any],
    calibration: Annotated[
        str,
        typer.Option(help=f"Keep the outputs on rows of the training data (data), {_KINDS}."),
    ] = DEFAULT_OF_FINETUNE,
    task: Annotated[
        Task,
        typer.Option(
            help="Classes of text, language modelling, conversations, preferences (dpo: pairs of "
            "answers; grpo: prompts and a reward), or classes of images."
        ),
    ] = "classify",
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="SOURCE:WEIGHT of one more data set, where DATASET has the weight 1; repeat the "
            "option for more.",
            rich_help_panel=DATA,
        ),
    ] = None,
    text_column: Annotated[
        list[str] | None,
        typer.Option(help="Column with text; give two for pairs.", rich_help_panel=DATA),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column with classes.", rich_help_panel=DATA)
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(
            help="Column names, in order, of a file without header.", rich_help_panel=DATA
        ),
    ] = None,
    learning_rate: Annotated[
        str,
        typer.Option(
            help="Peak learning rate; auto: the best measured one for the method.",
            rich_help_panel=TRAINING,
        ),
    ] = AUTO_RATE,
    epochs: Annotated[
        float, typer.Option(help="Passes over the training data.", rich_help_panel=TRAINING)
    ] = 3.0,
    max_steps: Annotated[
        int,
        typer.Option(
            help="Optimizer steps; if positive, used instead of --epochs.", rich_help_panel=TRAINING
        ),
    ] = -1,
    batch_size: Annotated[
        int, typer.Option(help="Rows a forward and backward pass.", rich_help_panel=TRAINING)
    ] = 32,
    max_length: Annotated[
        int, typer.Option(help="Rows are cut to this many tokens.", rich_help_panel=DATA)
    ] = 128,
    packing: Annotated[
        bool,
        typer.Option(
            help="For sft: put several conversations into a sequence.", rich_help_panel=DATA
        ),
    ] = False,
    padding_free: Annotated[
        bool,
        typer.Option(
            help="For sft: join the conversations of a batch instead of padding.",
            rich_help_panel=DATA,
        ),
    ] = False,
    loss: Annotated[
        Loss,
        typer.Option(
            help="For sft: learn all turns of the assistant, or the last.", rich_help_panel=DATA
        ),
    ] = "all",
    reward: Annotated[
        list[str] | None,
        typer.Option(
            help="For grpo: FILE.py:FUNCTION; repeat the option for a sum of rewards.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            help="For dpo and grpo: weight of staying near the model at the start.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    num_generations: Annotated[
        int | None,
        typer.Option(
            help="For grpo: answers to each prompt; default: 8.", rich_help_panel=TRAINING
        ),
    ] = None,
    optimizer: Annotated[
        str,
        typer.Option(
            help="An optimizer of transformers' Trainer, such as adamw_8bit.",
            rich_help_panel=TRAINING,
        ),
    ] = "adamw_torch",
    gradient_accumulation: Annotated[
        int,
        typer.Option(
            help="Forward and backward passes an optimizer step.", rich_help_panel=TRAINING
        ),
    ] = 1,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(help="Recompute activations: less memory, more time.", rich_help_panel=MEMORY),
    ] = False,
    bf16: Annotated[
        bool, typer.Option(help="Compute in bf16 under autocast.", rich_help_panel=MEMORY)
    ] = False,
    fsdp: Annotated[
        bool,
        typer.Option(
            help="Shard the model over torchrun's processes, by FSDP2.", rich_help_panel=MEMORY
        ),
    ] = False,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            help="Logging integration of Trainer; repeat the option for more.", rich_help_panel=RUN
        ),
    ] = None,
    eval_steps: Annotated[
        float | None,
        typer.Option(
            help="Evaluate every so many steps, or share of the run below 1.", rich_help_panel=RUN
        ),
    ] = None,
    early_stopping: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many evaluations without a lower test loss; keep the best model.",
            rich_help_panel=RUN,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on from the last checkpoint in OUT.", rich_help_panel=RUN)
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a model: prepare it if it is dense, train its factors and head, save everything.

    `qrefta finetune recipe.yaml` takes arguments and options from a file; a run writes its recipe
    into OUT.
    """
    from qrefta.distributed import check_sharding, processes

    check_sharding()
    quiet_libraries()
    from qrefta._prepare import prepare as prepare_model
    from qrefta.files.safetensors import weights_bytes
    from qrefta.files.sources import pretrained_source
    from qrefta.hf_quantizer import is_prepared, quant_report
    from qrefta.split.sources import calibration_batches
    from qrefta.tables import report_table, results_table
    from qrefta.train._finetune import finetune as finetune_model
    from qrefta.train.arguments import task_settings, training_arguments
    from qrefta.train.calibration import task_batches
    from qrefta.train.interrupt import TrainingInterrupted
    from qrefta.train.models import load_model
    from qrefta.train.rates import chosen_rate, parse_rate
    from qrefta.train.tasks import TASKS
    from qrefta.train.tasks.mixture import Mixture, load_mixture, parse_weight
    from qrefta.train.trl import TRL_TASKS

    seed = settings["seed"]
    rate = parse_rate(learning_rate)
    args = training_arguments(
        task,
        out,
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
        **task_settings(
            task,
            max_length=max_length,
            packing=packing,
            padding_free=padding_free,
            beta=beta,
            num_generations=num_generations,
        ),
    )
    state = processes()
    start = out / "start"  # the prepared model, for the other processes
    console.quiet = not state.is_main_process
    columns = {}
    if task == "classify":
        columns = {"text_columns": text_column, "label_column": label_column, "header": header}
    with state.main_process_first():
        if state.is_main_process and not resume:
            _check_run(out)
        data: Any = TASKS[task].load(dataset, seed=seed, **columns)
        if mix:
            others = load_mixture(task, TASKS[task].load, dict(map(parse_weight, mix)), seed)
            data = Mixture([data, *others.parts], [1.0, *others.weights])
        named = pretrained_source(model, trust_remote_code)
        processor = TASKS[task].processor.from_pretrained(**named)
        begun = str(start) if start.is_dir() else model
        loaded = load_model(begun, task, data, seed, trust_remote_code)
        if not is_prepared(loaded):
            if not state.is_main_process:
                raise ValueError(
                    f"{start} is not seen here; OUT must be a folder that all nodes share."
                )
            gathered = None
            if calibration == ROWS:
                batches = task_batches(
                    task, loaded, processor, data, max_length=max_length, seed=seed
                )
                gathered = _calibrated(loaded, batches, "the training data")
            elif calibration != NONE:
                batches = calibration_batches(loaded, calibration, processor, seed=seed)
                gathered = _calibrated(loaded, list(batches), calibration)
            prepare_model(loaded, moments=gathered, **settings)
            if state.num_processes > 1:  # the others load it, whole or not at all
                loaded.save_pretrained(f"{start}.partial")
                Path(f"{start}.partial").rename(start)
    console.print(report_table(quant_report(loaded)))
    args.learning_rate = chosen_rate(loaded, rate, state.is_main_process, task)
    if state.is_main_process and not resume:
        write_recipe(out, ctx.command, ctx.params)
    try:
        result = finetune_model(
            loaded,
            processor,
            data,
            task=task,
            args=args,
            max_length=None if task in TRL_TASKS else max_length,
            loss=loss,
            reward=reward or (),
            eval_steps=eval_steps,
            early_stopping=early_stopping,
            resume=resume,
        )
    except TrainingInterrupted as stop:
        again = [word for word in sys.argv[1:] if word != "--resume"]
        told = f"{stop.told}\nResume with:\n{shlex.join(['qrefta', *again, '--resume'])}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(130) from stop
    if state.is_main_process:
        shutil.rmtree(start, ignore_errors=True)
    console.print(results_table({"qrefta": result}))
    console.print(f"Saved in {out} ({_megabytes(weights_bytes(out))})")


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="Folder of a prepared model.")]) -> None:
    """Show how a model was prepared, from its config.json alone."""
    from qrefta.hf_config import QReftaConfig
    from qrefta.model.config_file import read_config
    from qrefta.tables import report_table, settings_table

    config = QReftaConfig(**read_config(folder)["quantization_config"])
    console.print(report_table([row.report() for row in config.stacks]))
    settings = {name: value for name, value in config.to_dict().items() if name != "stacks"}
    console.print(settings_table(settings))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a prepared model.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check every file of a prepared model against its checksums and its config.json."""
    quiet_libraries(data=False)
    from qrefta.model.verify import verify as verify_folder
    from qrefta.tables import files_table

    files = verify_folder(folder, trust_remote_code=trust_remote_code)
    console.print(files_table(files))
    console.print(f"{folder} is whole: {len(files)} files")


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="Folder of a prepared model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: new or empty.")],
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the merged model.")] = "bfloat16",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative difference of logits; default: room for rounding."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a plain dense transformers model that loads without qrefta."""
    quiet_libraries(data=False)
    import torch

    from qrefta.export.merge import ROUNDING_TOLERANCE
    from qrefta.export.merge import merge as merge_model
    from qrefta.files.folders import check_new
    from qrefta.files.safetensors import weights_bytes
    from qrefta.hf_quantizer import load

    check_new(out)
    allowed = ROUNDING_TOLERANCE if tolerance is None else tolerance
    model = load(folder, trust_remote_code=trust_remote_code)
    written = merge_model(model, getattr(torch, dtype), out=out, tolerance=allowed)
    before = _megabytes(weights_bytes(folder))
    console.print(f"{before} -> {_megabytes(weights_bytes(out))} {dtype} in {out}")
    _print_differences(written)


@app.command(name="export-lora")
def export_lora(
    folder: Annotated[Path, typer.Argument(help="Folder of a prepared model.")],
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder to write, new or empty: the adapter, with --base residual also the base."
        ),
    ],
    base: Annotated[LoraBase, typer.Option(help="Base model of the LoRA.")] = "residual",
    original: Annotated[
        str | None,
        typer.Option(
            help="With --base original: folder or hub name; default: the model that was prepared."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the LoRA; default: the factors' rank, on the original twice that."
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of LoRA and base.")] = "bfloat16",
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative difference of logits.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the factors as a LoRA that PEFT and servers load, with its base model."""
    quiet_libraries(data=False)
    import torch

    from qrefta.export.lora import export_lora as export_lora_model
    from qrefta.files.folders import check_new
    from qrefta.files.safetensors import weights_bytes
    from qrefta.hf_quantizer import load

    check_new(out)
    written = export_lora_model(
        load(folder, trust_remote_code=trust_remote_code),
        out,
        base,
        original=original,
        rank=rank,
        dtype=getattr(torch, dtype),
        tolerance=tolerance,
    )
    console.print(f"LoRA on the {base} in {out} ({_megabytes(weights_bytes(out))})")
    _print_differences(written)


@app.command(name="export-gguf")
def export_gguf(
    model: Annotated[
        str, typer.Argument(help="Folder of a prepared, merged or other dense model; or hub name.")
    ],
    file: Annotated[Path, typer.Argument(help="File to write; its name ends in .gguf.")],
    kind: Annotated[
        GgufType, typer.Option("--type", help="16, 8.5 or 4.5 bits a weight.")
    ] = "q8_0",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative difference of logits; default: room for rounding."),
    ] = None,
) -> None:
    """Write one file for llama.cpp and Ollama, tokenizer included, and a Modelfile next to it."""
    quiet_libraries(data=False)
    from qrefta.export.gguf import export_gguf as export_gguf_model

    written = export_gguf_model(model, file, kind, tolerance=tolerance)
    console.print(f"{kind} in {file} ({_megabytes(file.stat().st_size)})")
    _print_differences(written)


@app.command()
@with_settings
def plan(
    model: Annotated[
        str, typer.Argument(help="Hub name or folder of a dense model; its config.json is enough.")
    ],
    batch: Annotated[int, typer.Option(help="Sequences, or images, a pass.")] = 1,
    seq: Annotated[int | None, typer.Option(help="Tokens of a sequence; not for images.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Memory of the GPU, such as 24GB.")] = None,
    reserve: Annotated[
        str, typer.Option(help="Part of it that is not counted: CUDA itself, fragments.")
    ] = "1GB",
    *,
    settings: dict[str, Any],
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the parts that stay dense; default: the model's.")
    ] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations.")] = False,
    optimizer: Annotated[Optimizer, typer.Option(help="AdamW in 32 or 8 bits.")] = "adamw",
) -> None:
    """Count the memory of a training step from the config alone, and suggest changes if it does not
    fit.
    """
    quiet_libraries(data=False)
    from qrefta.memory.plan import plan as plan_memory
    from qrefta.tables import plan_table, size_text

    memory = plan_memory(
        model,
        batch=batch,
        seq=seq,
        gpu=gpu,
        reserve=reserve,
        dtype=dtype,
        optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing,
        **settings,
    )
    console.print(plan_table(memory))
    if memory.available_bytes is None:
        return
    largest = [_largest("batch", memory.largest_batch or 0)]
    if memory.largest_rank is not None:
        largest.append(_largest("rank", memory.largest_rank))
    verdict = "It fits" if memory.fits else "It does not fit"
    console.print(
        f"{verdict} in {size_text(memory.available_bytes)}; with all other settings as given: "
        f"{', '.join(largest)}."
    )
    worth = memory.total_bytes / 100
    for saving in (found for found in memory.savings if found.saved_bytes >= worth):
        console.print(f"  {saving.change} would save {size_text(saving.saved_bytes)}")


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="Language model: folder, hub name or .gguf file; prepared, merged or plain."
        ),
    ],
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Tasks of lm-evaluation-harness.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text file: measure perplexity. Repeat the option for more files."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="With --text: model to compare with, by KL divergence."),
    ] = None,
    window: Annotated[int, typer.Option(help="With --text: tokens of a window.")] = 512,
    card: Annotated[
        bool,
        typer.Option("--card", help="With --reference: write the result to MODEL's model card."),
    ] = False,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with further task files.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions of each task; windows of each text.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Rows of a task at a time, or auto.")] = "8",
    device: Annotated[str | None, typer.Option(help="Device, such as cuda.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure a language model: its distance to a reference on texts, or its scores on tasks.

    Tasks are run by lm-evaluation-harness.
    """
    if reference is not None and not text:
        raise ValueError("--reference needs a text to compare on; add --text FILE")
    if card and reference is None:
        raise ValueError("--card writes a comparison; add --reference BASE and --text FILE")
    if not tasks and not text:
        raise ValueError("nothing to measure; give tasks, or a text file by --text")
    if not tasks and (include_path is not None or num_fewshot is not None):
        raise ValueError("--include-path and --num-fewshot belong to tasks, and no task is given")
    if tasks and model.endswith(".gguf"):
        raise ValueError(f"tasks need a folder or hub name, and {model} is a file; use --text")
    quiet_libraries(data=bool(tasks))
    if text:
        options = {"window": window, "limit": limit, "device": device}
        _compare(model, reference, text, card, trust_remote_code=trust_remote_code, **options)
    if not tasks:
        return
    from qrefta.measure.harness import evaluate as evaluate_model
    from qrefta.tables import scores_table

    scores = evaluate_model(
        model,
        tasks,
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    console.print(scores_table(scores["results"]))


@app.command()
def chat(
    model: Annotated[
        str,
        typer.Argument(
            help="Language model: folder, hub name or .gguf file; prepared, merged or plain."
        ),
    ],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float, typer.Option(help="Of sampling; 0: the most likely token.")
    ] = 0.0,
    device: Annotated[str | None, typer.Option(help="Device, such as cuda.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a language model in the terminal, or answer the lines of standard input.

    /new begins a new conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer.
    """
    quiet_libraries(data=False)
    from qrefta.chat import conversation, talk

    told = conversation(
        model,
        device,
        trust_remote_code,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    if sys.stdin.isatty():
        console.print("/new begins a new conversation, /exit or Ctrl-D ends it.", style="dim")
    talk(told, _typed(), lambda part: print(part, end="", flush=True))


def _typed() -> Iterator[str]:
    """Lines of the terminal, behind a prompt, or of standard input."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield console.input("[bold]> [/]")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _compare(
    model: str, reference: str | None, texts: list[str], card: bool, **options: Any
) -> None:
    """Measure a model on texts, print the result and, if asked, write it to the model card."""
    from qrefta.measure.card import check_card, write_comparison
    from qrefta.measure.compare import compare
    from qrefta.tables import comparison_table

    if card:
        check_card(model)  # before minutes of measuring
    comparisons = compare(model, reference, texts, **options)
    console.print(comparison_table(comparisons))
    if card:
        write_comparison(model, comparisons)


def quiet_libraries(data: bool = True) -> None:
    """Keep the libraries' loading bars and notices out of the output; Trainer's bar stays.

    Args:
        data: quiet `datasets` too, which takes a second to import.
    """
    # bitsandbytes warns of an optional package when it is imported, PEFT and TRL use an old name
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if data:
        import datasets

        datasets.disable_progress_bars()


def guarded(command: Callable[[], object]) -> None:
    """Run a command; an expected failure is one line on stderr and exit code 2, not a traceback."""
    try:
        command()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False)
        raise SystemExit(2) from error


def main() -> None:
    """Entry point."""
    guarded(app)


def _check_run(out: Path) -> None:
    """Refuse a folder that holds files, and say how a run in it resumes."""
    from qrefta.files.folders import check_new
    from qrefta.train.checkpoints import last_checkpoint

    checkpoint = last_checkpoint(out)
    if checkpoint is not None:
        raise ValueError(
            f"{out} holds {checkpoint.name} of an earlier run. Add --resume to go on with it, or "
            "choose another folder."
        )
    if out.is_dir() and [file.name for file in out.iterdir()] == [RECIPE]:
        return  # of a run that failed before its first checkpoint
    check_new(out)


def _print_differences(written: "Export") -> None:
    """How far an export is from the prepared model, and its notes."""
    console.print(f"Logits differ from the model's by {written.difference:.2g} of their size.")
    if written.weight_error:
        console.print(
            f"The LoRA leaves out {written.weight_error:.2g} of the squared norm of the exact "
            "update."
        )
    for note in written.notes:
        console.print(f"Note: {note}.")


def _largest(name: str, number: int) -> str:
    return f"largest {name} {number:,}" if number else f"no {name} fits"


def _read_rows(folder: Path) -> list[dict[str, Any]]:
    from qrefta.hf_config import QReftaConfig
    from qrefta.model.config_file import read_config

    config = QReftaConfig(**read_config(folder)["quantization_config"])
    return [row.report() for row in config.stacks]


def _calibration_of(model: str, max_memory: str) -> str:
    """The text to calibrate on if none is named: the model is loaded for it, so it has to fit."""
    from qrefta.config import parse_bytes
    from qrefta.files.safetensors import resolve_folder
    from qrefta.files.sources import dense_bytes, is_gguf

    if not is_gguf(model):
        folder = resolve_folder(model)
        if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return NONE
    size = dense_bytes(model)
    if size <= parse_bytes("max_memory", max_memory):
        return GENERIC_TEXT
    if is_gguf(model):
        return NONE  # it is refused, for the same reason
    console.print(
        f"Not calibrated: the model takes {_megabytes(size)}, more than --max-memory "
        f"{max_memory}. --calibration text loads it and keeps its outputs better."
    )
    return NONE


def _gather(model: str, calibration: str, seed: int, trust_remote_code: bool) -> "Moments":
    """Moments of a dense model's inputs on text; the model is in memory while they are gathered."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from qrefta.files.safetensors import resolve_folder
    from qrefta.files.sources import is_gguf, pretrained_source
    from qrefta.model.build import model_class
    from qrefta.split.sources import calibration_batches

    source = pretrained_source(model, trust_remote_code)
    if is_gguf(model):
        kind = AutoModelForCausalLM  # the file names no class
    else:
        config = AutoConfig.from_pretrained(**source)
        kind = model_class(vars(config), resolve_folder(model), trust_remote_code)
    dense = kind.from_pretrained(**source, dtype="auto", use_safetensors=True)
    batches = calibration_batches(dense, calibration, seed=seed)
    return _calibrated(dense, list(batches), calibration)


def _calibrated(model: "PreTrainedModel", batches: list[Any], source: str) -> "Moments":
    """Moments of a dense model's inputs on batches from `source`; prints the cost."""
    from time import perf_counter

    from qrefta._prepare import calibrate

    start = perf_counter()
    gathered = calibrate(model, batches)
    seconds = perf_counter() - start
    rows = sum(len(next(iter(batch.values()))) for batch in batches)
    tokens = next(iter(gathered.tokens.values()))
    console.print(
        f"Calibrated on {rows:,} rows of {source} ({tokens:,} tokens) in {seconds:.0f} s; "
        "--calibration none turns it off."
    )
    return gathered


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
