"""qrefta finetune."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qrefta.choices import AUTO_RATE, Loss, Task
from qrefta.cli.calibrating import KINDS, NONE, calibrated
from qrefta.cli.console import console, megabytes, quiet_libraries
from qrefta.cli.options import TrustRemoteCode, setting_of, with_settings
from qrefta.recipe import NAME as RECIPE
from qrefta.recipe import write_recipe

if TYPE_CHECKING:
    from qrefta.config import Settings

DATA, TRAINING, MEMORY, RUN = "Data", "Training", "Memory", "While it runs"  # groups of options
ROWS = "data"  # rows of the training data


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
        typer.Option(help=f"Keep the outputs on rows of the training data (data), {KINDS}."),
    ] = ROWS,
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
        int | None,
        typer.Option(
            help="Rows are cut to this many tokens; default: 128, or the model's positions if it "
            "has fewer.",
            rich_help_panel=DATA,
        ),
    ] = None,
    packing: Annotated[
        bool,
        typer.Option(
            help="For sft: put several conversations into a sequence.", rich_help_panel=DATA
        ),
    ] = False,
    padding_free: Annotated[
        bool | None,
        typer.Option(
            help="For sft: join the conversations of a batch instead of padding; default: where "
            "it is right and faster.",
            rich_help_panel=DATA,
        ),
    ] = None,
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
    from qrefta.hf_quantizer import is_prepared, prepared_config, quant_report
    from qrefta.split.sources import calibration_batches
    from qrefta.tables import report_table, results_table
    from qrefta.train._finetune import finetune as finetune_model
    from qrefta.train.arguments import LENGTH_FIELDS, task_settings, training_arguments
    from qrefta.train.calibration import task_batches
    from qrefta.train.interrupt import TrainingInterrupted
    from qrefta.train.lengths import row_length
    from qrefta.train.models import load_model
    from qrefta.train.rates import chosen_rate, parse_rate
    from qrefta.train.tasks import TASKS
    from qrefta.train.tasks.mixture import Mixture, load_mixture, parse_weight

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
        if task != "image":
            max_length = row_length(loaded, processor, max_length)
        if task in LENGTH_FIELDS:
            setattr(args, LENGTH_FIELDS[task], max_length)
        options = dict(ctx.params)
        if is_prepared(loaded) and not start.is_dir():
            options = _without_settings(ctx, prepared_config(loaded).settings, settings)
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
                gathered = calibrated(loaded, batches, "the training data")
            elif calibration != NONE:
                batches = calibration_batches(loaded, calibration, processor, seed=seed)
                gathered = calibrated(loaded, list(batches), calibration)
            prepare_model(loaded, moments=gathered, **settings)
            if state.num_processes > 1:  # the others load it, whole or not at all
                loaded.save_pretrained(f"{start}.partial")
                Path(f"{start}.partial").rename(start)
    console.print(report_table(quant_report(loaded)))
    args.learning_rate = chosen_rate(loaded, rate, state.is_main_process, task)
    if state.is_main_process and not resume:
        write_recipe(out, ctx.command, options)
    try:
        result = finetune_model(
            loaded,
            processor,
            data,
            task=task,
            args=args,
            max_length=None if task in LENGTH_FIELDS else max_length,
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
    console.print(f"Saved in {out} ({megabytes(weights_bytes(out))})")


def _without_settings(
    ctx: typer.Context, prepared: "Settings", settings: dict[str, Any]
) -> dict[str, Any]:
    """The values of the options that hold for a prepared model: all but those of preparing.

    Args:
        ctx: of the command.
        prepared: settings of the model.
        settings: from the options.

    Raises:
        ValueError: if an option was given that would prepare the model in another way.
    """
    from qrefta.config import Settings

    asked = Settings(**settings)
    kept = dict(ctx.params)
    for parameter in ctx.command.params:
        name = str(parameter.name)
        setting = setting_of(name)
        if setting in (None, "seed") and name != "calibration":
            continue
        value = kept.pop(name)
        source = ctx.get_parameter_source(name)
        if source is None or source.name not in ("COMMANDLINE", "DEFAULT_MAP"):
            continue
        if setting is not None and _agrees(setting, asked, prepared):
            continue
        has = "" if setting is None else f" with {setting} {getattr(prepared, setting)}"
        raise ValueError(
            f"{max(parameter.opts, key=len)} {value} belongs to preparing, and "
            f"{ctx.params['model']} is prepared already{has}; leave the option out, or give the "
            "dense model"
        )
    return kept


def _agrees(setting: str, asked: "Settings", prepared: "Settings") -> bool:
    """Whether a prepared model has what an option asks for."""
    if setting == "modules_to_save":  # the model's list has its task head too
        return set(asked.modules_to_save) <= set(prepared.modules_to_save)
    return getattr(asked, setting) == getattr(prepared, setting)


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
