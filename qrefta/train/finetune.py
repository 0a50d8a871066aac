"""Fine-tuning on transformers' Trainer, of a prepared model or any other, for all tasks."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import (
    BaseImageProcessor,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from qrefta._deprecations import deprecated_keywords
from qrefta.choices import Loss, Selective
from qrefta.distributed import check_sharding, processes
from qrefta.files.folders import held
from qrefta.model.dtype import warn_of_slow_dtype
from qrefta.train.arguments import LENGTH_FIELDS, run_arguments, task_settings
from qrefta.train.checkpointing import checkpointing_settings
from qrefta.train.data import Loaded, pick_splits
from qrefta.train.evaluating import (
    check_early_stopping,
    evaluation_settings,
    patience,
)
from qrefta.train.gradients import check_trainable
from qrefta.train.lengths import check_tokens, row_length
from qrefta.train.packing import join_by_default
from qrefta.train.rates import chosen_rate, warn_of_rate
from qrefta.train.rewards import Reward, load_rewards
from qrefta.train.run import FinetuneResult, train
from qrefta.train.task_class import check_class
from qrefta.train.tasks import TASKS, Recipe, TaskName
from qrefta.train.tasks.chat import check_loss
from qrefta.train.tasks.mixture import Mixture, is_mix, load_mixture, mixed_recipe

Data = DatasetDict | Dataset | Mixture | Mapping[str | Path, float] | str | Path
_OLD_KEYWORDS = {
    "warmup_steps": "args=TrainingArguments(..., warmup_steps=...)",
    "weight_decay": "args=TrainingArguments(..., weight_decay=...)",
    "save_steps": "args=TrainingArguments(..., save_steps=...)",
    "optimizer": "args=TrainingArguments(..., optim=...)",
    "fsdp": "args=TrainingArguments(..., fsdp=True)",
    "report_to": "args=TrainingArguments(..., report_to=...)",
}


def finetune(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    dataset: Data,
    output_dir: str | Path | None = None,
    *,
    task: TaskName = "classify",
    args: TrainingArguments | None = None,
    learning_rate: float | None = None,
    epochs: float | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    packing: bool | None = None,
    padding_free: bool | None = None,
    loss: Loss = "all",
    reward: str | Path | Reward | Sequence[str | Path | Reward] = (),
    beta: float | None = None,
    num_generations: int | None = None,
    gradient_accumulation: int | None = None,
    gradient_checkpointing: bool | Selective | None = None,
    bf16: bool | None = None,
    seed: int | None = None,
    eval_steps: float | None = None,
    early_stopping: int | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool | None = None,
    **deprecated: Any,
) -> FinetuneResult:
    """Train a model in place; write it, its tokenizer and a model card to `output_dir`.

    The run is transformers' Trainer (TRL's SFTTrainer for sft): its optimizers, schedules, logging
    and progress bar. It works alike for a prepared model, a PEFT model and a plain one, so they can
    be compared on the same data, order and steps. At the end the factors' float32 masters are
    rounded to the values that the forward pass used.

    Settings come from the keywords, from `args`, or from both. Without `args` the defaults are
    qrefta's (`qrefta.train.arguments.DEFAULTS`). With `args` every field of `args` holds, and a
    keyword may only set a field that `args` leaves at the default of its class. Every run has whole
    checkpoints, stops before a step that is not finite, evaluates at the start and the end, and
    uses non-reentrant gradient checkpointing, whatever `args` say.

    In several processes that torchrun started, all with the same arguments, a step takes
    `batch_size` rows a process, in the order of one process with all rows (joined rows of sft: in
    another). The first process writes the files.

    Args:
        model: of the task's class; a classifier with as many labels as the data have classes.
        processor: the model's tokenizer; for images its image processor.
        dataset: a file, folder or hub name for the task's loader
            (`qrefta.train.data.load_classification`, `qrefta.train.tasks.load_text`, `load_chat`,
            `load_preferences`, `load_prompts`, `load_images`), the `DatasetDict` that it returns,
            or a `DatasetDict` or `Dataset` with such columns; without a split test or validation,
            a tenth of the rows is held out. For lm, sft, dpo and grpo also a dict of several
            sources and their weights: training rows are drawn in this proportion, until one source
            is used up.
        output_dir: for checkpoints and the trained model, without checkpoints of another run.
            Default: the folder of `args`.
        task: classify (text), lm (running text), sft (conversations), dpo (pairs of a better and a
            worse answer), grpo (prompts and a reward) or image (classes of images). TRL runs sft,
            dpo and grpo.
        args: transformers' TrainingArguments, for TRL's tasks SFTConfig, DPOConfig or GRPOConfig:
            all settings that are no keyword here, such as warmup_steps, weight_decay, save_steps,
            optim, fsdp and report_to.
            `fsdp=True` shards the model over the processes, one a GPU, by FSDP2; else every process
            holds the whole model (DDP). `qrefta.train.arguments.training_arguments` makes one with
            qrefta's defaults.
        learning_rate: peak, of all trainable parameters; default: the best measured one for the
            model's method (`qrefta.train.rates`), which is printed. A warning tells of a rate ten
            times above it.
        epochs, max_steps: length of the run, 3 epochs; a positive `max_steps` wins.
        batch_size: rows of a forward and backward pass in every process; 32.
        max_length: tokens of a row, longer rows are cut and counted in a warning; for lm the tokens
            of a window, for grpo of an answer; 128, or the model's positions if it has fewer.
        packing: for sft, fill sequences of `max_length` tokens with several conversations; False.
        padding_free: for sft, put the conversations of a batch behind each other in place of
            padding them; default, unless `args` have a value: where the model's attention keeps
            them apart, and on a GPU only with flash attention. The batches then have similar
            numbers of tokens.
        loss: for sft, on all turns of the assistant, or on the last.
        reward: for grpo, a function that takes prompts, completions and every further column of the
            data by name, and returns a number for each completion; also "file.py:function", or
            several of both, which are added.
        beta: for dpo and grpo, weight of staying near the reference, which is the model that is
            given here; TRL's default, 0.1 for dpo and 0 for grpo.
        num_generations: for grpo, answers to each prompt; 8. A step's rows must be a multiple.
        gradient_accumulation: passes of a step, of `batch_size` rows each; 1.
        gradient_checkpointing: recompute the activations of the blocks in the backward pass; False.
            "selective" keeps the results of attention, which are one more hidden state a block:
            for sequences longer than the model is wide. In `args`:
            gradient_checkpointing_kwargs={"selective": True}.
        bf16: compute in bf16 under autocast; False. For a model that is loaded in float32: in a
            model loaded in bf16 the head trains in bf16 and loses small updates.
        seed: of the batch order and dropout; 0.
        eval_steps: evaluate on the test split every so many steps, or share of the run below 1, and
            not only at the start and the end.
        early_stopping: stop after so many evaluations without a lower test loss, and keep the
            model with the lowest; evaluates ten times in the run unless `eval_steps` is given.
        resume: continue from the last checkpoint in `output_dir`; the result is the same, bit for
            bit, as without the interruption.
        callbacks: transformers' TrainerCallbacks.
        progress: show the progress bar and a line every ten steps; True. `args` with
            `disable_tqdm=True` keep the lines without the bar.
        deprecated: keywords of older releases: warmup_steps, weight_decay, save_steps, optimizer,
            fsdp, report_to.

    Raises:
        ValueError: for an unknown task, a model of another task's class or without trainable
            parameters, unusable data, labels of the model that do not fit the data, a `max_length`
            above the model's positions, a keyword that contradicts `args`, settings of generation
            that cannot be saved, a missing, incomplete or damaged checkpoint to resume from,
            checkpoints of an earlier run without `resume`, or processes that cannot share the model
            as asked (see `qrefta.distributed`).
        FloatingPointError: if a loss or a gradient is not finite; earlier checkpoints are whole.
        OSError: if a checkpoint or the model cannot be written; earlier files are whole.
    """
    check_sharding()
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    check_trainable(model)
    rewards = load_rewards(task, reward)
    check_loss(task, loss)
    settings = {
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "max_steps": max_steps,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation,
        "bf16": bf16,
        "seed": seed,
        "disable_tqdm": None if progress is None else not progress,
    }
    settings |= checkpointing_settings(gradient_checkpointing)
    settings |= task_settings(
        task,
        max_length=max_length,
        packing=packing,
        padding_free=padding_free,
        beta=beta,
        num_generations=num_generations,
    )
    settings = {name: value for name, value in settings.items() if value is not None}
    callbacks, stops = _early_stopping(_callbacks(callbacks), early_stopping, args)
    settings |= evaluation_settings(eval_steps, stops)
    if deprecated:
        settings |= _old_settings(deprecated, args)
    together = processes()  # before TrainingArguments, whose processes wait less long for the first
    if learning_rate is not None or args is None or args.learning_rate is None:
        show = together.is_main_process and progress is not False
        settings["learning_rate"] = chosen_rate(model, learning_rate, show, task)
    arguments = run_arguments(model, task, args, output_dir, settings)
    check_class(model, task)
    warn_of_rate(model, arguments.learning_rate, task)
    warn_of_slow_dtype(model, arguments.device.type, arguments.bf16)
    length = _length(model, processor, task, arguments, max_length, is_default=args is None)
    if task == "sft":
        join_by_default(model, arguments)
    with together.main_process_first():  # the other processes find its cache
        recipe = _recipe(model, processor, dataset, task, arguments.seed, length, loss, rewards)
    quiet = progress is False
    alone = held(Path(str(arguments.output_dir))) if together.is_main_process else nullcontext()
    with alone:
        return train(model, processor, recipe, arguments, task, resume, callbacks, quiet)


def _callbacks(callbacks: Any) -> list[TrainerCallback]:
    """Callbacks as objects; Trainer takes classes too."""
    several = callbacks if isinstance(callbacks, Sequence) else [callbacks]
    found = [callback() if isinstance(callback, type) else callback for callback in several]
    strange = [callback for callback in found if not isinstance(callback, TrainerCallback)]
    if strange:
        raise ValueError(
            f"callbacks holds {strange[0]!r}; give transformers' TrainerCallbacks, in a list"
        )
    return found


def _early_stopping(
    callbacks: list[TrainerCallback], early_stopping: int | None, args: TrainingArguments | None
) -> tuple[list[TrainerCallback], bool]:
    """The callbacks with the one that stops early, and whether the run needs settings for it."""
    if early_stopping is not None:
        return [*callbacks, EarlyStoppingCallback(patience(early_stopping))], True
    given = any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)
    if given and args is not None:
        check_early_stopping(args)
    return callbacks, given and args is None


def _old_settings(deprecated: dict[str, Any], args: TrainingArguments | None) -> dict[str, Any]:
    """Keywords of older releases by their names in TrainingArguments."""
    given = deprecated_keywords("finetune", deprecated, _OLD_KEYWORDS)
    if args is not None:
        raise ValueError(f"args and {', '.join(given)} are both given; set these fields in args.")
    if "optimizer" in given:
        given["optim"] = given.pop("optimizer")
    return given


def _length(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    task: TaskName,
    arguments: TrainingArguments,
    max_length: int | None,
    is_default: bool,
) -> int | None:
    """Tokens of a row, for grpo of an answer; None for images and for rows that are not cut.

    Args:
        model: to be trained.
        processor: of the model.
        task: of the run.
        arguments: of the run; a default length that the model has no positions for is lowered.
        max_length: the caller's keyword.
        is_default: whether the length in `arguments` is qrefta's default or this keyword.
    """
    if not isinstance(processor, PreTrainedTokenizerBase):
        return None
    field = LENGTH_FIELDS.get(task)
    if field is None:
        return row_length(model, processor, max_length)
    given = getattr(arguments, field)
    if given is not None:
        given = row_length(model, processor, max_length if is_default else given)
        setattr(arguments, field, given)
    return given


def _read(data: Data, task: TaskName, seed: int) -> DatasetDict | Mixture:
    """The rows of a task, of a source in any form."""
    if isinstance(data, Mixture) or (isinstance(data, Loaded) and data.fits(task)):
        return data
    if isinstance(data, str | Path):
        return TASKS[task].load(data, seed=seed)
    if isinstance(data, Dataset):
        data = DatasetDict({"train": data})
    if isinstance(data, DatasetDict):
        return TASKS[task].rows(pick_splits(data, "dataset"), "dataset", seed)
    if data and is_mix(data):
        return load_mixture(task, TASKS[task].load, data, seed)
    raise ValueError(
        f"dataset is a {type(data).__name__}; give a file, a folder, a hub name, a Dataset (rows "
        "of it are held out to test on), or a DatasetDict with the splits train and test. "
        "datasets.Dataset has from_list, from_pandas and from_generator for other forms. Several "
        "data sets are a dict of names and weights."
    )


def _recipe(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    dataset: Data,
    task: TaskName,
    seed: int,
    max_length: int | None,
    loss: Loss,
    rewards: list[Reward],
) -> Recipe:
    data = _read(dataset, task, seed)
    options: dict[str, Any] = {"loss": loss} if task == "sft" else {}
    if task == "grpo":
        options = {"rewards": rewards}

    def make(one: DatasetDict) -> Recipe:
        return TASKS[task].recipe(model, processor, one, max_length, **options)

    recipe = mixed_recipe(make, data, seed) if isinstance(data, Mixture) else make(data)
    if isinstance(processor, PreTrainedTokenizerBase):
        for split, rows in (("train", recipe.train), ("test", recipe.test)):
            if "input_ids" in rows.column_names:  # TRL's trainers for dpo and grpo make them later
                check_tokens(model, processor, rows["input_ids"], split)
    return recipe
