"""qrefta finetune."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qrefta.choices import AUTO_RATE, LoadDtype, Task
from qrefta.cli import training_options as given
from qrefta.cli.calibrating import NONE, prepare_calibrated
from qrefta.cli.console import console, megabytes, quiet_libraries
from qrefta.cli.data_options import columns_of, further_sources, load_data
from qrefta.cli.dtype import chosen_dtype
from qrefta.cli.options import (
    TrustRemoteCode,
    parse_checkpointing,
    rounding_of,
    with_settings,
)
from qrefta.cli.run_options import options_of_run
from qrefta.recipe import NAME as RECIPE
from qrefta.recipe import write_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_START = "start"  # folder in OUT: the prepared model, for the other processes
ROWS = "data"  # rows of the training data


@with_settings
def finetune(
    ctx: typer.Context,
    model: given.Model,
    dataset: given.Dataset,
    out: given.Out,
    settings: dict[str, Any],
    calibration: given.Calibration = ROWS,
    task: given.Task = "classify",
    mix: given.Mix = None,
    text_column: given.TextColumn = None,
    label_column: given.LabelColumn = None,
    header: given.Header = None,
    learning_rate: given.LearningRate = AUTO_RATE,
    epochs: given.Epochs = 3.0,
    max_steps: given.MaxSteps = -1,
    batch_size: given.BatchSize = 32,
    max_length: given.MaxLength = None,
    packing: given.Packing = False,
    padding_free: given.PaddingFree = None,
    loss: given.Loss = "all",
    reward: given.Reward = None,
    beta: given.Beta = None,
    num_generations: given.NumGenerations = None,
    optimizer: given.Optimizer = "adamw_torch",
    gradient_accumulation: given.GradientAccumulation = 1,
    gradient_checkpointing: given.GradientCheckpointing = "off",
    dtype: given.Dtype = "auto",
    bf16: given.Bf16 = False,
    fsdp: given.Fsdp = False,
    report_to: given.ReportTo = None,
    eval_steps: given.EvalSteps = None,
    early_stopping: given.EarlyStopping = None,
    resume: given.Resume = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train a model: prepare it if it is dense, train its factors and head, save everything.

    `qrefta finetune recipe.yaml` takes arguments and options from a file; a run writes its recipe
    into OUT.
    """
    from qrefta.distributed import check_sharding, processes

    check_sharding()
    quiet_libraries()
    from qrefta.files.layout import weights_bytes
    from qrefta.files.sources import check_source
    from qrefta.model.prepared import is_prepared, quant_report
    from qrefta.tables import report_table, results_table
    from qrefta.train.arguments import task_settings, training_arguments
    from qrefta.train.checkpointing import checkpointing_settings
    from qrefta.train.finetune import finetune as finetune_model
    from qrefta.train.interrupt import TrainingInterrupted
    from qrefta.train.lengths import row_length
    from qrefta.train.models import load_model
    from qrefta.train.rates import parse_rate
    from qrefta.train.rewards import load_rewards
    from qrefta.train.tasks.chat import check_loss

    check_source(model)
    further = further_sources(dataset, mix or [])
    columns = columns_of(task, text_column, label_column, header)
    rate = parse_rate(learning_rate)
    checkpointing = parse_checkpointing(gradient_checkpointing)
    rewards = load_rewards(task, reward or ())
    check_loss(task, loss)
    state = processes()  # before TrainingArguments, whose processes wait less long for the first
    console.quiet = not state.is_main_process
    args = training_arguments(
        task,
        out,
        num_train_epochs=epochs,
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        optim=optimizer,
        gradient_accumulation_steps=gradient_accumulation,
        bf16=bf16,
        fsdp=fsdp or None,
        seed=settings["seed"],
        report_to=report_to or "none",
        **checkpointing_settings(checkpointing),
        **task_settings(
            task,
            packing=packing,
            padding_free=padding_free,
            beta=beta,
            num_generations=num_generations,
        ),
    )
    options = options_of_run(ctx, settings, trust_remote_code)
    start = out / _START
    with state.main_process_first():
        if state.is_main_process and not resume:
            _check_run(out)
        data = load_data(task, dataset, further, settings["seed"], columns)
        processor = _processor(model, task, trust_remote_code)
        begun = str(start) if start.is_dir() else model
        chosen = _dtype(begun, dtype, task, args.device.type, trust_remote_code)
        loaded = load_model(begun, task, data, settings["seed"], trust_remote_code, chosen)
        if task != "image":  # too long a length is refused before the model is prepared
            max_length = row_length(loaded, processor, max_length)
        if not is_prepared(loaded):
            if not state.is_main_process:
                raise ValueError(
                    f"{start} is not seen here; OUT must be a folder that all nodes share."
                )
            _prepare(loaded, processor, task, data, max_length, calibration, settings)
            if state.num_processes > 1:  # the others load it, whole or not at all
                loaded.save_pretrained(f"{start}.partial")
                Path(f"{start}.partial").rename(start)
    console.print(report_table(quant_report(loaded)))
    if state.is_main_process and not resume:
        write_recipe(out, ctx.command, options)
    try:
        result = finetune_model(
            loaded,
            processor,
            data,
            task=task,
            args=args,
            learning_rate=rate,
            max_length=max_length,
            loss=loss,
            reward=rewards,
            eval_steps=eval_steps,
            early_stopping=early_stopping,
            resume=resume,
        )
    except TrainingInterrupted as stop:
        again = [word for word in sys.argv[1:] if word != "--resume"]
        told = f"{stop.told}\nResume with:\n{shlex.join(['qrefta', *again, '--resume'])}"
        console.print(told, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from stop
    if state.is_main_process:
        shutil.rmtree(start, ignore_errors=True)
    console.print(results_table({"qrefta": result}))
    console.print(f"Saved in {out} ({megabytes(weights_bytes(out))})")


def _processor(model: str, task: Task, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder, hub name or GGUF file; for images the image processor.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoImageProcessor

    from qrefta.files.sources import load_tokenizer, pretrained_source

    if task == "image":
        return AutoImageProcessor.from_pretrained(**pretrained_source(model, trust_remote_code))
    tokenizer = load_tokenizer(model, trust_remote_code)
    if tokenizer is None:
        raise ValueError(
            f"{model} has no tokenizer files. Save the tokenizer of this model into the folder: "
            "tokenizer.save_pretrained(...)"
        )
    return tokenizer


def _dtype(source: str, dtype: LoadDtype, task: Task, device: str, trust_remote_code: bool) -> Any:
    """The dtype to load the model in, which is said if the files have another one.

    Raises:
        ValueError: if a dtype is given that the model of a task does not train in.
    """
    if task in ("classify", "image"):
        if dtype not in ("auto", "float32"):
            raise ValueError(
                f"--dtype is {dtype}, and the task {task} trains a head, in float32; leave it out, "
                "or give --bf16, which computes in bfloat16"
            )
        return "auto"

    def note() -> None:
        console.print(
            "In float32, in memory and in OUT: this processor computes bfloat16 many times slower. "
            "--dtype bfloat16 keeps the files' dtype."
        )

    return chosen_dtype([source], dtype, device, trust_remote_code, note)


def _prepare(
    model: "PreTrainedModel",
    processor: Any,
    task: Task,
    data: Any,
    max_length: int | None,
    calibration: str,
    settings: dict[str, Any],
) -> None:
    """Prepare a dense model in place, calibrated as --calibration says."""
    from qrefta._prepare import prepare
    from qrefta.split.sources import calibration_batches
    from qrefta.train.calibration import task_batches

    seed = settings["seed"]
    if calibration == NONE:
        if rounding_of(settings).must_round_in_order:
            raise ValueError(
                "--rounding sequential needs text to calibrate on: leave --calibration none out"
            )
        prepare(model, **settings)
        return
    if calibration == ROWS:
        batches = task_batches(task, model, processor, data, max_length=max_length, seed=seed)
        source = "the training data"
    else:
        batches = list(calibration_batches(model, calibration, processor, seed=seed))
        source = calibration
    prepare_calibrated(model, batches, source, settings)


def _check_run(out: Path) -> None:
    """Refuse a folder that holds files, and say how a run in it resumes."""
    from qrefta.files.folders import check_new
    from qrefta.train.checkpoints import UNFINISHED, last_checkpoint

    checkpoint = last_checkpoint(out)
    if checkpoint is not None:
        raise ValueError(
            f"{out} holds {checkpoint.name} of an earlier run. Add --resume to go on with it, or "
            "choose another folder."
        )
    left = (UNFINISHED, _START, f"{_START}.partial")  # by a run before its first checkpoint
    if out.is_dir() and {file.name for file in out.iterdir()} <= {RECIPE, *left}:
        for name in left:
            shutil.rmtree(out / name, ignore_errors=True)
        return
    check_new(out)
