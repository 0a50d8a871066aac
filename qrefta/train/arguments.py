"""TrainingArguments: qrefta's defaults, the caller's settings, and values that every run needs."""

import copy
from dataclasses import fields
from math import inf
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from qrefta.config.checks import seed_value, whole
from qrefta.distributed import processes
from qrefta.model.prepared import is_prepared
from qrefta.train.lengths import MAX_LENGTH
from qrefta.train.progress import EVERY
from qrefta.train.sharding import fsdp2_config
from qrefta.train.tasks import TaskName
from qrefta.train.trl import TRL_TASKS, load_trl

DEFAULTS: dict[str, Any] = {
    "learning_rate": None,  # by finetune: the best measured one for the model and task
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "warmup_steps": 0.1,  # share of the run; the first step of a warm-up changes nothing
    "weight_decay": 0.0,  # decay would pull the factors to zero, away from the original weights
    "save_steps": 0.25,
    "save_total_limit": 2,
    "logging_steps": EVERY,
    "include_num_input_tokens_seen": "non_padding",  # for the tokens a second
    "optim": "adamw_torch",
    "bf16": False,
    "seed": 0,
    "report_to": "none",
    "disable_tqdm": False,
}
TASK_DEFAULTS: dict[TaskName, dict[str, Any]] = {
    "lm": {"include_num_input_tokens_seen": "all"},  # windows have no padding
    # padding_free by finetune: whether the model keeps joined rows apart
    "sft": {"max_length": MAX_LENGTH, "packing": False, "padding_free": None},
    "dpo": {"max_length": MAX_LENGTH, "include_num_input_tokens_seen": "no"},
    "grpo": {"max_completion_length": MAX_LENGTH, "include_num_input_tokens_seen": "no"},
    "image": {"include_num_input_tokens_seen": "no"},
}
TASK_FIELDS: dict[str, tuple[TaskName, ...]] = {
    "packing": ("sft",),
    "padding_free": ("sft",),
    "beta": ("dpo", "grpo"),
    "num_generations": ("grpo",),
}
LENGTH_FIELDS: dict[TaskName, str] = {
    "sft": "max_length",
    "dpo": "max_length",
    "grpo": "max_completion_length",
}
TASK_VALUES: dict[TaskName, dict[str, Any]] = {
    "sft": {"assistant_only_loss": False},  # the rows come with labels
    "image": {"remove_unused_columns": False},  # the model takes no column named image
}
UNSUPPORTED = {
    "push_to_hub": "push the folder after the run, with model.push_to_hub or `hf upload`",
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"),
        "Trainer would round the trained model; bf16=True computes in bfloat16",
    ),
    "resume_from_checkpoint": "use finetune(..., resume=True), which takes the last checkpoint",
}
GENERATIONS = 8  # of grpo: answers to a prompt, by default of TRL
_OF_TOKENIZER = "set it on the tokenizer before finetune, which makes the rows with it"
TASK_UNSUPPORTED: dict[TaskName, dict[str, str]] = {
    "sft": dict.fromkeys(("chat_template_path", "eos_token", "pad_token"), _OF_TOKENIZER),
}
KEYWORDS = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
}
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # new and old name


def training_arguments(
    task: TaskName, output_dir: str | Path, **settings: Any
) -> TrainingArguments:
    """TrainingArguments with qrefta's defaults, for `finetune(args=...)`.

    For sft, dpo and grpo they are TRL's SFTConfig, DPOConfig and GRPOConfig.

    Args:
        task: one of `qrefta.choices.TASK_NAMES`.
        output_dir: folder of the run.
        settings: any field of the class; each replaces a default.

    Raises:
        ValueError: for a size of a step below 1, or a run without a length.
        ImportError: for sft, dpo and grpo, if TRL is not installed.
    """
    values = _default_values(task, settings) | {"output_dir": str(output_dir)}
    return _made(arguments_class(task), values)


def task_settings(task: TaskName, **given: Any) -> dict[str, Any]:
    """Settings that only some tasks have, by their names in the task's class; without None.

    Args:
        task: one of `qrefta.choices.TASK_NAMES`.
        given: max_length (for tasks without it, it is left out) and fields of `TASK_FIELDS`.

    Raises:
        ValueError: if a setting is given that the task does not have.
    """
    given = {name: value for name, value in given.items() if value is not None}
    length = given.pop("max_length", None)
    for name, value in [*given.items()]:
        if task not in TASK_FIELDS[name]:
            if value:
                allowed = " or ".join(TASK_FIELDS[name])
                raise ValueError(f"{name} is for the task {allowed}; the task is {task!r}")
            given.pop(name)
    if task in LENGTH_FIELDS and length is not None:
        given[LENGTH_FIELDS[task]] = length
    return given


def run_arguments(
    model: PreTrainedModel,
    task: TaskName,
    args: TrainingArguments | None,
    output_dir: str | Path | None,
    settings: dict[str, Any],
) -> TrainingArguments:
    """The arguments of one run; `args` itself is left as it is.

    Args:
        model: to be trained.
        task: one of `qrefta.choices.TASK_NAMES`.
        args: the caller's arguments, or None for qrefta's defaults.
        output_dir: the caller's keyword, or None.
        settings: the caller's other keywords, by their names in TrainingArguments.

    Raises:
        ValueError: if `args` is of another class than the task needs, contradicts a keyword, or
            asks for something that a run cannot do; for a size of a step below 1, or a run without
            a length.
    """
    if args is None:
        kind = arguments_class(task)
        values = _default_values(task, settings)
    else:
        kind = type(args)
        _check_supported(args, task)
        values = _given_values(args, task, settings)
    values["output_dir"] = str(_output_dir(args, output_dir))
    values |= TASK_VALUES.get(task, {})
    values["eval_on_start"] = True  # for the result's accuracy and loss before training
    if values.get("ddp_find_unused_parameters") is None and _uses_all_factors(model):
        values["ddp_find_unused_parameters"] = False
    if values.get("fsdp"):
        values["fsdp_config"] = fsdp2_config(model) | (values.get("fsdp_config") or {})
    return _made(kind, values)


def _made(kind: type[TrainingArguments], values: dict[str, Any]) -> TrainingArguments:
    """The arguments with these values, checked, for the devices that are here."""
    _check_size(values)
    if "num_generations" in kind.__dataclass_fields__:
        _check_groups(values)
    return kind(**values | _device_values(values) | _checkpointing_values(kind, values))


def _check_size(values: dict[str, Any]) -> None:
    """Refuse a step without rows and a run without steps."""
    for field in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        whole(_named(field), values.get(field, 1), 1)
    seed_value(_named("seed"), values.get("seed", 0))
    steps = values.get("max_steps", -1)
    wrong = isinstance(steps, bool) or not isinstance(steps, Integral)
    if wrong or (steps != -1 and steps < 1):
        raise ValueError(
            f"{_named('max_steps')} is {steps!r}; it must be a whole number of steps, or "
            "-1 for the length in epochs"
        )
    epochs = values["num_train_epochs"]
    is_number = isinstance(epochs, int | float)
    if not is_number or (steps < 1 and not 0 < epochs < inf):
        raise ValueError(
            f"{_named('num_train_epochs')} is {epochs!r}; it must be a number above 0, or give the "
            f"steps of the run by {_named('max_steps')}"
        )


def _check_groups(values: dict[str, Any]) -> None:
    """Refuse a step of grpo whose rows are not whole groups of answers to a prompt."""
    if values.get("generation_batch_size") or values.get("steps_per_generation"):
        return  # TRL checks these
    size = values.get("num_generations") or GENERATIONS
    batch = values.get("per_device_train_batch_size", 8)
    accumulation = values.get("gradient_accumulation_steps", 1)
    count = processes().num_processes
    rows = batch * accumulation * count
    if size > 1 and rows % size:
        raise ValueError(
            f"A step has {rows} rows: {_named('per_device_train_batch_size')} {batch} x "
            f"{_named('gradient_accumulation_steps')} {accumulation}, in {count} processes. "
            f"They must be a multiple of {_named('num_generations')} {size}, the answers to a "
            "prompt. Give other values of these."
        )


def _named(field: str) -> str:
    """A field by the keyword of `finetune`, and its option."""
    keyword = KEYWORDS.get(field, field)
    return f"{keyword} (--{keyword.replace('_', '-')})"


def _uses_all_factors(model: PreTrainedModel) -> bool:
    """Whether every pass of a prepared model uses all factors: it has no second tower, say for
    images, that a batch of text leaves out.
    """
    return is_prepared(model) and len(model.config.sub_configs) < 2


def arguments_class(task: TaskName) -> type[TrainingArguments]:
    """TRL's class of settings for TRL's tasks, such as SFTConfig, else TrainingArguments."""
    return load_trl(task)[1] if task in TRL_TASKS else TrainingArguments


def _default_values(task: TaskName, settings: dict[str, Any]) -> dict[str, Any]:
    values = DEFAULTS | TASK_DEFAULTS.get(task, {}) | settings
    values.setdefault("per_device_eval_batch_size", 2 * values["per_device_train_batch_size"])
    return values


def _check_supported(args: TrainingArguments, task: TaskName) -> None:
    """Refuse arguments of another class than the task's, and fields that a run does not follow."""
    kind = arguments_class(task)
    if not isinstance(args, kind):
        raise ValueError(f"args is a {type(args).__name__}; this task needs a {kind.__name__}")
    for name, instead in (UNSUPPORTED | TASK_UNSUPPORTED.get(task, {})).items():
        if getattr(args, name, None):
            raise ValueError(f"args.{name} is not supported; {instead}.")


def _given_values(
    args: TrainingArguments, task: TaskName, settings: dict[str, Any]
) -> dict[str, Any]:
    """The fields of `args`; a keyword replaces a field that still has a default: of its class, or
    qrefta's.
    """
    ours = DEFAULTS | TASK_DEFAULTS.get(task, {})
    values: dict[str, Any] = {}
    for field in fields(args):
        if not field.init:
            continue
        given = copy.deepcopy(getattr(args, field.name))
        value = settings.get(field.name, given)
        # TrainingArguments turns a default of None into False
        is_default = given == field.default or (not given and field.default is None)
        if value != given and not is_default and given != ours.get(field.name, field.default):
            raise _contradiction(field.name, value, given)
        values[field.name] = value
    for name in ("activation_checkpointing", "activation_checkpointing_kwargs"):
        # They copy the fields with the old name, which a keyword may have changed.
        values.pop(name, None)
    if values.get("steps_per_generation"):
        values.pop("generation_batch_size", None)  # GRPOConfig has made it of the other
    return values


def _contradiction(name: str, value: object, given: object) -> ValueError:
    if name == "disable_tqdm":
        keyword = f"progress={not value}"
    else:
        keyword = f"{KEYWORDS.get(name, name)}={value!r}"
    shown = getattr(given, "value", given)  # of transformers' enumerations
    return ValueError(f"{keyword} contradicts args, where {name}={shown!r}; give one of them.")


def _output_dir(args: TrainingArguments | None, output_dir: str | Path | None) -> Path:
    if args is None:
        if output_dir is None:
            raise ValueError("output_dir is missing; give it, or args with an output_dir.")
        return Path(output_dir)
    default = "trainer_output"  # by TrainingArguments, where none is given
    given = Path(args.output_dir or default)
    if output_dir is None or Path(output_dir) == given:
        return given
    if args.output_dir != default:
        raise _contradiction("output_dir", str(output_dir), args.output_dir)
    return Path(output_dir)


def _device_values(values: dict[str, Any]) -> dict[str, Any]:
    has_device = torch.accelerator.is_available()
    return {
        # without it accelerate ignores torchrun's other processes on a CPU
        "use_cpu": values.get("use_cpu") or not has_device,
        "dataloader_pin_memory": values.get("dataloader_pin_memory", True) and has_device,
    }


def _checkpointing_values(kind: type[TrainingArguments], values: dict[str, Any]) -> dict[str, Any]:
    """Gradient checkpointing under the names that a class has; never reentrant.

    Reentrant checkpointing gives shared factors wrong gradients when several processes train.
    """
    enabled = any(values.get(name) for name in CHECKPOINTING)
    options: dict[str, Any] = {"use_reentrant": False}
    for name in CHECKPOINTING:
        options |= values.get(f"{name}_kwargs") or {}
    if options["use_reentrant"]:
        raise ValueError(
            "args asks for gradient checkpointing with use_reentrant=True, which gives shared "
            "factors wrong gradients in several processes; leave use_reentrant out, or set it to "
            "False."
        )
    names = {field.name for field in fields(kind)}
    changed: dict[str, Any] = {}
    for name in CHECKPOINTING:
        if name in names:
            changed[name] = enabled
            changed[f"{name}_kwargs"] = options if enabled else None
    return changed
