"""Any task of lm-evaluation-harness on a folder: prepared, merged or plain."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | str = 8,
    device: str | None = None,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` finds for a causal language model; needs lm-evaluation-harness.

    The harness loads the model through transformers, which knows prepared folders once qrefta is imported; its own
    command line does not import it.

    Args:
        model: folder or hub name, with its tokenizer.
        tasks: names of the harness' tasks.
        include_path: folder of further task files; then only these are known.
        num_fewshot: examples before each question; default: the task's.
        limit: questions of each task; default: all.
        batch_size: rows at a time, or "auto".
        device: such as "cuda:1"; default: the GPU if there is one.

    Raises:
        ValueError: for a task that the harness does not know.
        ImportError: if lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval import simple_evaluate  # heavy
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "Evaluating needs lm-evaluation-harness: pip install 'lm-eval[hf]'"
        ) from error
    # The harness' own 13,000 task files take seconds to list
    manager = TaskManager(
        include_path=None if include_path is None else str(include_path),
        include_defaults=include_path is None,
    )
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown or not tasks:
        given = f"tasks {', '.join(unknown)} are unknown" if unknown else "no task is given"
        known = (
            "; `lm_eval ls tasks` lists them"
            if include_path is None
            else f": {', '.join(manager.all_tasks)}"
        )
        raise ValueError(f"{given}; give names of tasks of lm-evaluation-harness{known}")
    return simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model), "dtype": "auto"},
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        task_manager=manager,
        verbosity="ERROR",
    )
