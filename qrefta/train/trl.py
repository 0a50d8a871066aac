"""TRL's trainers and their settings, by task. TRL is optional, and takes seconds to import."""

from transformers import Trainer, TrainingArguments

from qrefta.choices import Task

TRL_TASKS: dict[Task, str] = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}


def load_trl(task: Task) -> tuple[type[Trainer], type[TrainingArguments]]:
    """TRL's Trainer of a task of `TRL_TASKS`, and the class of its settings.

    Raises:
        ImportError: if TRL is not installed.
    """
    try:
        import trl
    except ImportError as error:
        raise ImportError(f"The task {task} needs TRL: pip install trl") from error
    name = TRL_TASKS[task]
    return getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
