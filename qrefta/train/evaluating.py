"""Evaluations during a run: how often, by which metric, and when they stop it."""

from collections.abc import Sized
from typing import Any

from transformers import IntervalStrategy, TrainerCallback, TrainingArguments

from qrefta.train.tasks import Recipe, TaskName
from qrefta.train.trl import TRL_TASKS

_PART_OF_RUN = 0.1  # between two evaluations of early stopping


class EvaluationTime(TrainerCallback):
    """Sums the seconds that evaluation takes."""

    runtime_s = 0.0

    def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
        self.runtime_s += metrics["eval_runtime"]


def check_metric(arguments: TrainingArguments, recipe: Recipe, task: TaskName) -> None:
    """Refuse a metric to find the best model by that the task does not have."""
    metric = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    metrics = ["loss", *recipe.scores.values()]
    if task not in TRL_TASKS and metric not in metrics:
        raise ValueError(
            f"metric_for_best_model is {arguments.metric_for_best_model!r}; this task measures "
            f"{' and '.join(metrics)}"
        )


def check_full_batches(arguments: TrainingArguments, recipe: Recipe) -> None:
    """Refuse to drop the last batch of a split that has no other."""
    if not arguments.dataloader_drop_last:
        return
    splits = {
        "train": (recipe.train, arguments.train_batch_size),
        "test": (recipe.test, arguments.eval_batch_size),
    }
    for name, (part, of_process) in splits.items():
        batch = of_process * arguments.world_size
        if isinstance(part, Sized) and len(part) < batch:
            raise ValueError(
                f"dataloader_drop_last is True, and the {name} split has {len(part)} rows, fewer "
                f"than a batch of {batch}, so that none is left; leave it out, or take a smaller "
                "batch size"
            )


def patience(early_stopping: Any) -> int:
    """The evaluations without improvement after which a run stops."""
    if type(early_stopping) is not int or early_stopping < 1:
        raise ValueError(
            f"early_stopping is {early_stopping!r}; it must be a number of evaluations, 1 or more"
        )
    return early_stopping


def check_early_stopping(args: TrainingArguments) -> None:
    """Refuse arguments with which Trainer's EarlyStoppingCallback fails."""
    if args.eval_strategy == "no" or not args.metric_for_best_model:
        raise ValueError(
            "EarlyStoppingCallback compares evaluations during the run, and args ask for none "
            f"(eval_strategy={IntervalStrategy(args.eval_strategy).value!r}, metric_for_best_model="
            f"{args.metric_for_best_model!r}). Give finetune(early_stopping=3) instead of the "
            'callback, or set eval_strategy="steps", eval_steps, save_steps, '
            'metric_for_best_model="eval_loss" and load_best_model_at_end=True.'
        )


def evaluation_settings(eval_steps: float | None, stops: bool) -> dict[str, Any]:
    """Settings for evaluations during the run; the model that is kept has to be saved as often."""
    if eval_steps is None and not stops:
        return {}
    every = _PART_OF_RUN if eval_steps is None else eval_steps
    if isinstance(every, bool) or not every > 0:
        raise ValueError(
            f"eval_steps is {eval_steps!r}; it must be a number of steps, or a share of the run "
            "between 0 and 1"
        )
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": every}
    if stops:
        settings |= {
            "save_steps": every,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    return settings
