"""A line for people every few steps: loss, learning rate, tokens a second, time left."""

import time
from typing import Any

from transformers import (
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

EVERY = 10  # steps between two lines; of long runs 1 %
_PARTS = 100
# scores in Trainer's log, and their words; of the test rows they begin with eval_
_SCORES = {
    "accuracy": "accuracy {:.1%}",
    "rewards/accuracies": "accuracy {:.1%}",
    "reward": "reward {:.3g}",
}


class Lines(TrainerCallback):
    """Lines instead of the dictionaries that Trainer prints without a progress bar.

    A run that logs every EVERY steps, as by default, has a line every hundredth part if that is
    longer. Seconds are of training alone: evaluating and saving do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._train_s = 0.0
        self._steps = 0
        self._began = 0.0
        self._logged = (0.0, 0)  # seconds and tokens at the last line

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        super().on_train_begin(args, state, control, **others)
        self._logged = (0.0, int(state.num_input_tokens_seen))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        super().on_step_end(args, state, control, **others)
        self._train_s += time.perf_counter() - self._began
        self._steps += 1

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        line = self._line(args, state, logs)
        if line:
            self._write(line)

    def _write(self, line: str) -> None:
        print(line, flush=True)

    def _line(self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any]) -> str:
        """Words for a row of Trainer's log; none for its summary at the end."""
        where = f"step {state.global_step:,} of {state.max_steps:,}"
        if "eval_loss" in logs:
            return ", ".join(
                [f"{where}: test loss {logs['eval_loss']:.4g}", *_scores(logs, "eval_")]
            )
        if "loss" not in logs or not self._is_due(args, state):
            return ""
        parts = [f"{where}: loss {logs['loss']:.4g}", *_scores(logs)]
        if "learning_rate" in logs:
            parts.append(f"learning rate {logs['learning_rate']:.2g}")
        seconds, tokens = self._logged
        self._logged = (self._train_s, int(state.num_input_tokens_seen))
        if self._logged[1] > tokens and self._logged[0] > seconds:
            parts.append(
                f"{(self._logged[1] - tokens) / (self._logged[0] - seconds):,.0f} tokens/s"
            )
        if self._steps:
            left = (state.max_steps - state.global_step) * self._train_s / self._steps
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)

    @staticmethod
    def _is_due(args: TrainingArguments, state: TrainerState) -> bool:
        """Whether there is a line at this step."""
        every = max(EVERY, state.max_steps // _PARTS)
        before = state.global_step - EVERY
        return args.logging_steps != EVERY or state.global_step // every > before // every


def _scores(logs: dict[str, Any], prefix: str = "") -> list[str]:
    """Words for the scores in a row of Trainer's log."""
    found = {name: logs.get(prefix + name) for name in _SCORES}
    return [_SCORES[name].format(score) for name, score in found.items() if score is not None]


class Progress(Lines, ProgressCallback):
    """Trainer's progress bar, with lines above it."""

    def _write(self, line: str) -> None:
        if self.training_bar is not None:
            self.training_bar.write(line)


def duration(seconds: float) -> str:
    """For example: 45 s, 12 min, 3 h 05 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(whole / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
