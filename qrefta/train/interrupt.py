"""Ctrl-C during training: the step is finished, a checkpoint is written, and the run ends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qrefta.distributed import processes


class TrainingInterrupted(KeyboardInterrupt):
    """A run that Ctrl-C stopped, with a checkpoint from which it resumes.

    Attributes:
        checkpoint: its folder.
        told: where the run stopped, in words.
    """

    def __init__(self, checkpoint: Path, step: int, steps: int) -> None:
        self.checkpoint = checkpoint
        self.told = f"Stopped after step {step:,} of {steps:,}; {checkpoint} is whole."
        super().__init__(f"{self.told} Resume with finetune(..., resume=True).")


class Interrupts(TrainerCallback):
    """Ends a run with a checkpoint after the step in which Ctrl-C was pressed.

    Attributes:
        asked: whether it was pressed.
    """

    asked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.asked and state.global_step < state.max_steps:
            if args.save_total_limit == 1:
                args.save_total_limit = 2  # with 1 Trainer ends with the best checkpoint alone
            control.should_save = True
            control.should_training_stop = True

    def check(self, run: Path, state: TrainerState) -> None:
        """Raise TrainingInterrupted if the run was stopped before its end."""
        if self.asked and state.global_step < state.max_steps:
            checkpoint = run / f"checkpoint-{state.global_step}"
            raise TrainingInterrupted(checkpoint, state.global_step, state.max_steps)


@contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Within this context the first Ctrl-C is left to the callback; the second stops at once.

    Only in the main thread of a single process: of several processes each would stop at a step that
    the others do not stop at, so there Ctrl-C stops at once.
    """
    interrupts = Interrupts()
    alone = processes().num_processes == 1
    if not alone or threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = signal.getsignal(signal.SIGINT)

    def note(*_: Any) -> None:
        interrupts.asked = True
        signal.signal(signal.SIGINT, before)
        tqdm.write("Stopping after this step with a checkpoint. Ctrl-C again stops at once.")

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
