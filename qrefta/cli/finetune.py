"""qrefta finetune."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import typer

from qrefta.choices import AUTO_RATE
from qrefta.cli import training_options as given
from qrefta.cli.console import console, megabytes, quiet_libraries
from qrefta.cli.data_options import columns_of, further_sources, load_data
from qrefta.cli.options import (
    TrustRemoteCode,
    parse_checkpointing,
    with_settings,
)
from qrefta.cli.run_options import options_of_run
from qrefta.cli.start_model import ROWS, START_FOLDERS, StartModel
from qrefta.recipe import NAME as RECIPE
from qrefta.recipe import write_recipe


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
    start = StartModel(model, out, task, settings, trust_remote_code)
    with state.main_process_first():
        if state.is_main_process and not resume:
            _check_run(out)
        data = load_data(task, dataset, further, settings["seed"], columns)
        processor = start.processor()
        loaded = start.load(data, dtype, args.device.type)
        if task != "image":  # too long a length is refused before the model is prepared
            max_length = row_length(loaded, processor, max_length)
        if not is_prepared(loaded):
            if not state.is_main_process:
                raise start.not_seen()
            start.prepare(loaded, processor, data, max_length, calibration)
            if state.num_processes > 1:
                start.keep(loaded)
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
        start.remove()
    console.print(results_table({"qrefta": result}))
    console.print(f"Saved in {out} ({megabytes(weights_bytes(out))})")


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
    left = (UNFINISHED, *START_FOLDERS)  # by a run before its first checkpoint
    if out.is_dir() and {file.name for file in out.iterdir()} <= {RECIPE, *left}:
        for name in left:
            shutil.rmtree(out / name, ignore_errors=True)
        return
    check_new(out)
