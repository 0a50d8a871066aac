"""Scores of lm-evaluation-harness for a prepared, merged or plain model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from qrefta.files.sources import pretrained_source


def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | str = 8,
    device: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | Literal["auto"] = "auto",
) -> dict[str, Any]:
    """The results of `lm_eval.simple_evaluate` for a causal language model.

    The harness loads the model through transformers, which reads prepared folders after `import
    qrefta`. The command `lm_eval` does not import qrefta, so it cannot read them.

    Args:
        model: folder or hub name, with its tokenizer.
        tasks: names of the harness' tasks.
        include_path: folder of task files; then the harness' tasks are not read.
        num_fewshot: examples before each question; default: the task's.
        limit: questions of each task; default: all.
        batch_size: rows at a time, or "auto".
        device: such as "cuda:1"; default: the GPU, on a machine without one the CPU.
        trust_remote_code: whether to run code that comes with the model.
        dtype: of the model; "auto": as it is stored.

    Raises:
        ValueError: for a task that the harness does not know.
        ImportError: if lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.evaluator import simple_evaluate  # heavy
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "Evaluating needs lm-evaluation-harness: pip install 'lm-eval[hf]'"
        ) from error
    from qrefta._compat.lm_eval import ModelOfFolder, without_git

    manager = TaskManager(
        include_path=None if include_path is None else str(include_path),
        include_defaults=include_path is None,  # the harness' 13,000 files take seconds to list
    )
    pretrained_source(model, trust_remote_code)  # refuses code that is not trusted
    _check_tasks(tasks, manager.all_tasks, include_path)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with without_git():
        results = simple_evaluate(
            model=ModelOfFolder(
                pretrained=str(model),
                dtype=dtype,
                batch_size=batch_size,
                device=place,
                trust_remote_code=trust_remote_code,
            ),
            model_args={"pretrained": str(model), "dtype": str(dtype).removeprefix("torch.")},
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            device=place,
            task_manager=manager,
            verbosity="ERROR",
        )
    return dict(results or {})  # None in all processes but the first


def _check_tasks(
    tasks: Sequence[str], known: Sequence[str], include_path: str | Path | None
) -> None:
    unknown = sorted(set(tasks) - set(known))
    if tasks and not unknown:
        return
    problem = f"tasks {', '.join(unknown)} are unknown" if unknown else "no task is given"
    names = "; `lm_eval ls tasks` lists them"
    if include_path is not None:
        names = f": {', '.join(known)}"
    raise ValueError(f"{problem}; give names of tasks of lm-evaluation-harness{names}")
