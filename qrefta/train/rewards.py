"""Rewards of generated answers: functions, or names of functions in a file."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qrefta.choices import Task

Reward = Callable[..., list[float | None]]


def load_rewards(
    task: Task, reward: str | Path | Reward | Sequence[str | Path | Reward]
) -> list[Reward]:
    """The functions that are given as a reward for a task, one or several; none for most tasks.

    Raises:
        ValueError: if the task grpo has none, or another task has one, and as `load_reward`.
    """
    several = [reward] if isinstance(reward, str | Path) or callable(reward) else list(reward)
    if several and task != "grpo":
        raise ValueError(f"reward is for the task grpo; the task is {task!r}")
    if task == "grpo" and not several:
        raise ValueError(
            "The task grpo needs a reward; give a function, or a file and the name of a function "
            "in it: reward.py:score"
        )
    return [load_reward(one) for one in several]


def load_reward(reward: str | Path | Reward) -> Reward:
    """The function that "file.py:function" names; a function is returned as it is.

    Raises:
        ValueError: if there is no such file, or no such function in it.
    """
    if not isinstance(reward, str | Path):
        return reward
    file, _, name = str(reward).rpartition(":")
    path = Path(file)
    if not name or path.suffix != ".py" or not path.is_file():
        raise ValueError(
            f"The reward is {str(reward)!r}; give a Python file that exists and the name of a "
            "function in it: reward.py:score"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None, "the file ends in .py"
    assert spec.loader is not None, "the file ends in .py"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Any = getattr(module, name, None)
    if not callable(function):
        found = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(f"{file} has no function {name!r}; it has {', '.join(found) or 'none'}.")
    return function  # type: ignore[return-value]
