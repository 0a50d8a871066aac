"""One training run: Trainer, its checkpoints, the scores before and after, the written model."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from accelerate.utils import gather_object
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from qrefta.config.stack import BANK
from qrefta.distributed import whole_state
from qrefta.model.prepared import is_prepared, prepared_config
from qrefta.model_card import write_card
from qrefta.train.checkpointing import follow_arguments
from qrefta.train.checkpoints import WholeCheckpoints, publish, writing
from qrefta.train.evaluating import (
    EvaluationTime,
    check_full_batches,
    check_metric,
)
from qrefta.train.forward import own_forward
from qrefta.train.gradients import GradientWatch
from qrefta.train.interrupt import interruptible
from qrefta.train.nan_guard import FiniteSteps
from qrefta.train.packing import check_apart, row_by_row
from qrefta.train.progress import Lines, Progress
from qrefta.train.restoring import RestoresAll
from qrefta.train.resume import NoStepAfterTheEnd, OrderOfEpoch, OwnIntervals, checkpoint_of
from qrefta.train.same_run import run_marks
from qrefta.train.tasks import Recipe, TaskName
from qrefta.train.tasks.recipe import combined


class FinetuneResult(NamedTuple):
    """Scores and size of a training run.

    Attributes:
        accuracy_before, accuracy_after: on the test split, 0 .. 1; for dpo the share of pairs whose
            better answer has gained more probability than the other; None for tasks without either.
        test_loss_before, test_loss: mean cross-entropy on the test split, before and after
            training, nats.
        train_loss: mean over the steps of this call and all processes, nats.
        steps: optimizer steps of the whole run.
        train_s: seconds in the training loop of this call, without evaluation.
        reward_before, reward_after: for grpo, the mean over answers to the test prompts; else None.
        trained_parameters: number of trainable parameters, as
            `model.num_parameters(only_trainable=True)` counts them.
    """

    accuracy_before: float | None
    accuracy_after: float | None
    test_loss_before: float
    test_loss: float
    train_loss: float
    steps: int
    train_s: float
    trained_parameters: int
    reward_before: float | None = None
    reward_after: float | None = None


def train(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    recipe: Recipe,
    arguments: TrainingArguments,
    task: TaskName,
    resume: bool,
    callbacks: Sequence[TrainerCallback],
    quiet: bool,
) -> FinetuneResult:
    """Train a model, score it before and after, and write it to the folder of `arguments`.

    Args:
        model: to be trained, in place.
        processor: of the model, written beside it.
        recipe: rows, batches and Trainer class of the task.
        arguments: of the run.
        task: of the run, for the card and for messages.
        resume: continue from the last checkpoint.
        callbacks: the user's.
        quiet: show neither bar nor lines.
    """
    run = Path(str(arguments.output_dir))
    check_metric(arguments, recipe, task)
    check_full_batches(arguments, recipe)
    _check_generation(model)
    marks = run_marks(model, recipe.train, recipe.test, arguments)
    checkpoint = checkpoint_of(run, resume, model, marks)
    if checkpoint is not None:
        arguments.eval_on_start = False  # the log has it; early stopping would count it again
        arguments.restore_callback_states_from_checkpoint = True
    evaluations = EvaluationTime()
    with own_forward(model), interruptible() as interrupts:
        follow_arguments(model, arguments)
        trainer = _trainer(
            model,
            processor,
            recipe,
            arguments,
            [
                *callbacks,
                OwnIntervals(),
                OrderOfEpoch(),
                evaluations,
                interrupts,
                GradientWatch(),
            ],
            marks,
            checkpoint,
            quiet,
        )
        with _attention(trainer):
            outcome = trainer.train(
                resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
            )
        interrupts.check(run, trainer.state)
        round_masters(model)
        with _attention(trainer):
            after = trainer.evaluate()
    train_s = outcome.metrics["train_runtime"] - evaluations.runtime_s
    # the log of a resumed run begins with the run before
    before = next(row for row in trainer.state.log_history if "eval_loss" in row)
    loss = after["eval_loss"]
    training = f"It was fine-tuned ({task}, {outcome.global_step} steps, test loss {loss:.4f})."
    _save(model, processor, run, training, write=arguments.should_save)
    return FinetuneResult(
        accuracy_before=before.get(f"eval_{recipe.scores.get('accuracy')}"),
        accuracy_after=after.get(f"eval_{recipe.scores.get('accuracy')}"),
        reward_before=before.get(f"eval_{recipe.scores.get('reward')}"),
        reward_after=after.get(f"eval_{recipe.scores.get('reward')}"),
        test_loss_before=before["eval_loss"],
        test_loss=loss,
        train_loss=fmean(gather_object([outcome.training_loss])),
        steps=outcome.global_step,
        train_s=train_s,
        trained_parameters=_count_trainable(model),
    )


def round_masters(model: nn.Module) -> None:
    """Round every factor's float32 master to the value of the forward pass, if there are any."""
    if isinstance(model, FSDPModule):
        model.reshard()  # round the shards, not their gathered copy
    for factors in getattr(model, BANK, {}).values():
        factors.round_masters()


def _check_generation(model: PreTrainedModel) -> None:
    """Refuse settings of generation that transformers does not save, before the first step."""
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        with TemporaryDirectory() as folder:
            generation.save_pretrained(folder)


def _trainer(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    recipe: Recipe,
    arguments: TrainingArguments,
    callbacks: list[TrainerCallback],
    marks: dict[str, Any],
    checkpoint: Path | None,
    quiet: bool,
) -> Trainer:
    """The recipe's Trainer, with whole checkpoints and steps that are finite."""
    if getattr(arguments, "padding_free", False):
        _join_rows(arguments)
    options = {"data_collator": recipe.collate, "compute_metrics": recipe.metrics} | recipe.options
    kind = combined(FiniteSteps, RestoresAll, WholeCheckpoints, NoStepAfterTheEnd, recipe.trainer)
    trainer: Any = kind(
        model=model,
        args=arguments,
        train_dataset=recipe.train,
        eval_dataset=recipe.test,
        processing_class=processor,
        callbacks=callbacks,
        # GRPOTrainer takes neither of them
        **{name: value for name, value in options.items() if value is not None},
    )
    trainer.marks = marks
    trainer.resumed = checkpoint
    if arguments.fsdp and not trainer.is_fsdp_enabled:
        raise ValueError("fsdp shards a model over GPUs, and there are none here; leave it out.")
    if _joins(trainer):
        check_apart(model)
    if recipe.mean_loss:
        # Trainer assumes a sum over tokens for models whose forward takes **kwargs.
        trainer.model_accepts_loss_kwargs = False
    _show_progress(trainer, quiet)
    return trainer


def _join_rows(arguments: Any) -> None:
    """Adjust the settings of a run whose batches are joined rows."""
    arguments.include_num_input_tokens_seen = "all"  # without a mask, paddings are unknown
    if not arguments.packing:
        arguments.max_length = None  # the recipe has cut the rows


def _show_progress(trainer: Trainer, quiet: bool) -> None:
    """Show qrefta's lines and bar in place of Trainer's, or nothing."""
    for callback in list(trainer.callback_handler.callbacks):
        ours = {ProgressCallback: Progress, PrinterCallback: Lines}.get(type(callback))
        if ours is not None:
            trainer.remove_callback(callback)
            if not quiet:
                trainer.add_callback(ours())


def _attention(trainer: Trainer) -> AbstractContextManager[None]:
    """The attention of a run; of joined rows, row by row."""
    assert trainer.model is not None
    return row_by_row(trainer.model) if _joins(trainer) else nullcontext()


def _joins(trainer: Trainer) -> bool:
    return getattr(trainer, "padding_free", False)  # SFTTrainer's


def _save(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | BaseImageProcessor,
    run: Path,
    training: str,
    write: bool,
) -> None:
    """Write the model, its processor and a card; all processes call it, some `write`."""
    state = whole_state(model, run)
    if not write:
        return
    with writing(run, "the model") as folder:
        if is_prepared(model):
            write_card(folder, prepared_config(model), training)  # save_pretrained keeps it
        model.save_pretrained(folder, state_dict=state)
        processor.save_pretrained(folder)
        publish(folder, run)


def _count_trainable(model: nn.Module) -> int:
    """Number of trainable parameters, also of a PEFT model, which has no `num_parameters`."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
