"""qrefta finetune."""

import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qrefta.choices import AUTO_RATE, AUTO_ROUNDING, LoadDtype, Task
from qrefta.cli import training_options as given
from qrefta.cli.calibrating import NONE, prepare_calibrated
from qrefta.cli.console import console, megabytes, quiet_libraries
from qrefta.cli.dtype import chosen_dtype
from qrefta.cli.options import (
    TrustRemoteCode,
    parse_checkpointing,
    rounding_of,
    setting_of,
    with_settings,
)
from qrefta.recipe import NAME as RECIPE
from qrefta.recipe import write_recipe

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedModel

    from qrefta.config.settings import Settings
    from qrefta.train.tasks.mixture import Mixture

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
    further = _weights(dataset, mix or [])
    columns = _columns(task, text_column, label_column, header)
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
    options = _options_of_run(ctx, settings, trust_remote_code)
    start = out / _START
    with state.main_process_first():
        if state.is_main_process and not resume:
            _check_run(out)
        data = _load_data(task, dataset, further, settings["seed"], columns)
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


def _weights(dataset: str, mix: list[str]) -> dict[str | Path, float]:
    """The further data sets of --mix and their weights."""
    from qrefta.train.tasks.mixture import parse_weight

    further: dict[str | Path, float] = {}
    for source, weight in map(parse_weight, mix):
        if source in (dataset, *further):
            raise ValueError(
                f"{source} is given twice; give it once, with a larger weight in --mix."
            )
        further[source] = weight
    return further


def _columns(
    task: Task, text_column: list[str] | None, label_column: str | None, header: list[str] | None
) -> dict[str, Any]:
    """The options of columns, by their names in the task's loader."""
    if task == "classify":
        return {"text_columns": text_column, "label_column": label_column, "header": header}
    given = {"--label-column": label_column, "--header": header}
    if task != "lm":
        given["--text-column"] = text_column
    name = next((name for name, value in given.items() if value), None)
    if name is not None:
        also = " and lm" if name == "--text-column" else ""
        raise ValueError(f"{name} is for the task classify{also}; the task is {task}")
    if not text_column:
        return {}
    if len(text_column) > 1:
        raise ValueError(f"--text-column is {text_column}; the task lm reads one column")
    return {"column": text_column[0]}


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


def _load_data(
    task: Task, dataset: str, mix: dict[str | Path, float], seed: int, columns: dict[str, Any]
) -> "DatasetDict | Mixture":
    """The data of the run: of one source, or of several with weights."""
    from qrefta.train.tasks import TASKS
    from qrefta.train.tasks.mixture import Mixture, load_mixture

    load = partial(TASKS[task].load, **columns)
    data = load(dataset, seed=seed)
    if not mix:
        return data
    others = load_mixture(task, load, mix, seed)
    return Mixture([data, *others.parts], [1.0, *others.weights])


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


def _options_of_run(
    ctx: typer.Context, settings: dict[str, Any], trust_remote_code: bool
) -> dict[str, Any]:
    """The values of the options that hold for the run; for a prepared model without the options of
    preparing.

    Raises:
        ValueError: if an option was given that would prepare a prepared model in another way.
    """
    from qrefta.config.settings import Settings

    kept = dict(ctx.params)
    model = kept["model"]
    prepared = _prepared_settings(model, trust_remote_code)
    if prepared is None:
        return kept
    asked = Settings(**settings)
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
            f"{max(parameter.opts, key=len)} {value} belongs to preparing, and {model} is prepared "
            f"already{has}; leave the option out, or give the dense model"
        )
    return kept


def _prepared_settings(model: str, trust_remote_code: bool) -> "Settings | None":
    """How a model was prepared, from its config.json; None for a dense model."""
    from transformers import AutoConfig

    from qrefta.files.sources import is_gguf, pretrained_source
    from qrefta.hf_config import QReftaConfig

    if is_gguf(model):
        return None
    config = AutoConfig.from_pretrained(**pretrained_source(model, trust_remote_code)).to_dict()
    if (config.get("quantization_config") or {}).get("quant_method") != "qrefta":
        return None
    return QReftaConfig.of(config).settings


def _agrees(setting: str, asked: "Settings", prepared: "Settings") -> bool:
    """Whether a prepared model has what an option asks for."""
    if setting == "rounding" and asked.rounding == AUTO_ROUNDING:
        return True
    if setting == "modules_to_save":  # the list of the model has its task head too
        return set(asked.modules_to_save) <= set(prepared.modules_to_save)
    return getattr(asked, setting) == getattr(prepared, setting)


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
