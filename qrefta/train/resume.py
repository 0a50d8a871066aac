"""A run that resumes goes on as if it had not stopped: from a whole checkpoint of the same run, at
its own intervals, with the rows in the order of the epoch.
"""

from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from qrefta.distributed import processes
from qrefta.files.json_file import read_json
from qrefta.model.prepared import is_prepared
from qrefta.model.whole_folder import check_weights
from qrefta.train.checkpoints import STATE, last_checkpoint, remove_unfinished_folder
from qrefta.train.same_run import check_same_run


def checkpoint_of(
    run: Path, resume: bool, model: PreTrainedModel, marks: dict[str, Any]
) -> Path | None:
    """The checkpoint to resume from; None for a new run.

    Raises:
        ValueError: if there is none to resume from, one of another run, one of the model alone, or
            a damaged one; for a new run if there is one.
    """
    if processes().is_main_process:
        remove_unfinished_folder(run)
    checkpoint = last_checkpoint(run)
    if resume and checkpoint is None:
        raise ValueError(f"There is no checkpoint to resume from in {run}.")
    if checkpoint is None:
        return None
    if not resume:
        raise ValueError(
            f"{run} holds {checkpoint.name} of an earlier run, which could be taken for one of "
            "this run. Continue that run with resume=True, give another output_dir, or remove it."
        )
    check_same_run(checkpoint, marks)
    _check_optimizer(checkpoint)
    if is_prepared(model):  # Trainer does not load weights through the plug-in
        check_weights(checkpoint)
    return checkpoint


def _check_optimizer(checkpoint: Path) -> None:
    """Refuse a checkpoint of the model alone: Trainer would go on with a new optimizer."""
    files = {path.name for path in checkpoint.iterdir()}
    has_optimizer = any(name.startswith("optimizer") for name in files)  # FSDP2: a folder
    if not has_optimizer or "scheduler.pt" not in files:
        raise ValueError(
            f"{checkpoint} holds the model without the state of its optimizer and schedule "
            "(optimizer.pt, scheduler.pt), so the run cannot go on as if it had not stopped. "
            "Checkpoints have them unless save_only_model=True. Load the model of this folder and "
            "train it as a new run."
        )


class NoStepAfterTheEnd(Trainer):
    """A Trainer that takes no step if it resumes from a checkpoint of a run's end; put it before
    another in the bases of a class.

    Trainer checks only after a step whether the run has ended.

    Attributes:
        resumed: the checkpoint that it resumes from, if it does.
    """

    resumed: Path | None = None

    def set_initial_training_values(self, *args: Any, **options: Any) -> tuple[Any, ...]:
        epochs, *others, max_steps = super().set_initial_training_values(*args, **options)
        if self.resumed is not None and has_ended(self.resumed, max_steps, self._patience()):
            epochs = 0
        return epochs, *others, max_steps

    def _load_callback_state(self) -> None:
        """Restore counters, with the patience of this run: the checkpoint's may be shorter."""
        patience = self._patience()
        super()._load_callback_state()
        for callback, given in zip(self._early_stopping(), patience):
            callback.early_stopping_patience = given

    def _patience(self) -> list[int]:
        return [callback.early_stopping_patience for callback in self._early_stopping()]

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        callbacks = self.callback_handler.callbacks
        return [one for one in callbacks if isinstance(one, EarlyStoppingCallback)]


def has_ended(checkpoint: Path, max_steps: int, patience: list[int]) -> bool:
    """Whether a run has no step left at a checkpoint: by their number, or by early stopping.

    Args:
        checkpoint: of the run.
        max_steps: of the run that resumes.
        patience: of its callback for early stopping, if it has one.
    """
    state = read_json(checkpoint / STATE)
    if state["global_step"] >= max_steps:
        return True
    found = state.get("stateful_callbacks", {}).get(EarlyStoppingCallback.__name__, [])
    counters = [
        early["attributes"]["early_stopping_patience_counter"]
        for early in (found if isinstance(found, list) else [found])
    ]
    return bool(patience and counters) and max(counters) >= min(patience)


class OwnIntervals(TrainerCallback):
    """Logs, evaluates and saves at the intervals of this run.

    A Trainer that resumes takes the checkpoint's intervals. They fit the number of steps of that
    run, and in a longer run they may be far too short.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


class OrderOfEpoch(TrainerCallback):
    """Tells the sampler which epoch begins, through all that wraps it.

    `DataLoaderShard.set_epoch` of accelerate 1.15 looks for the sampler below one wrapper. In
    several processes that skip the batches before a checkpoint there are two, and a sampler of
    ours would give the first epoch's order (https://github.com/huggingface/accelerate/issues/3242).
    """

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader[Any],
        **_: Any,
    ) -> None:
        batches: Any = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        sampler: Any = getattr(batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(int(state.epoch or 0))
