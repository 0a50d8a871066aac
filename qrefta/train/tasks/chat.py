"""Conversations, and prompts with completions."""

from pathlib import Path
from typing import Any

from datasets import DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from qrefta.train.data import read_splits, with_test
from qrefta.train.tasks.recipe import TEST_SHARE, Recipe

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}


def load_chat(source: str | Path, seed: int) -> DatasetDict:
    """Prompts and completions with the splits train and test.

    The columns are prompt and completion (text or messages); messages or conversations (turns with
    role and content, or from and value; the last turn is the assistant's); or instruction, output
    and, optionally, input.

    Raises:
        ValueError: for other columns, or a conversation that does not end with an answer.
    """
    pairs = DatasetDict()
    for name, part in read_splits(source).items():
        pairs[name] = part.map(_pair, remove_columns=part.column_names, desc="Reading")
    return with_test(pairs, TEST_SHARE, seed)


def chat_recipe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: DatasetDict, max_length: int
) -> Recipe:
    """Supervised fine-tuning by TRL, with the loss on the last answer.

    TRL reads `max_length` from its SFTConfig.

    Raises:
        ValueError: for conversations and a tokenizer without a chat template.
        ImportError: if TRL is not installed.
    """
    trainer, _ = load_trl()
    _check_template(data["train"][0], tokenizer)
    return Recipe(data["train"], data["test"], trainer)


def chat_ids(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a prompt and its completion, as TRL makes them.

    Raises:
        ValueError: for conversations and a tokenizer without a chat template.
    """
    _check_template(row, tokenizer)
    both = row["prompt"] + row["completion"]
    if isinstance(both, str):
        encoded: Any = tokenizer(f"{both}{tokenizer.eos_token or ''}")
    else:
        encoded = tokenizer.apply_chat_template(both, return_dict=True)
    return encoded["input_ids"]


def _check_template(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a conversation and a tokenizer without a chat template."""
    if not isinstance(row["prompt"], str) and tokenizer.chat_template is None:
        raise ValueError(
            "The data are conversations and the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give columns prompt and completion of plain text."
        )


def load_trl() -> tuple[type[Trainer], type[TrainingArguments]]:
    """TRL's SFTTrainer and SFTConfig.

    Raises:
        ImportError: if TRL is not installed.
    """
    try:
        # heavy, and optional
        from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]
    except ImportError as error:
        raise ImportError("The task sft needs TRL: pip install trl") from error
    return SFTTrainer, SFTConfig


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    """One row as prompt and completion."""
    if "prompt" in row and "completion" in row:
        return {"prompt": row["prompt"], "completion": row["completion"]}
    turns = _turns(row)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError(
            f"A row has the columns {list(row)} and {len(turns)} turns; needed are prompt and "
            "completion, instruction and output, or messages of which the last is the "
            "assistant's."
        )
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def _turns(row: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation of a row, or its instruction and output as two turns."""
    if "instruction" in row and "output" in row:
        question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["output"]},
        ]
    return [_turn(turn) for turn in row.get("messages") or row.get("conversations") or []]


def _turn(turn: dict[str, str]) -> dict[str, str]:
    """A turn with role and content, also from a turn with from and value."""
    role = turn.get("role") or turn.get("from")
    content = turn.get("content") or turn.get("value")
    if role not in _ROLES or not isinstance(content, str):
        raise ValueError(
            f"A turn is {turn!r}; needed are a role ({', '.join(_ROLES)}) and its content."
        )
    return {"role": _ROLES[role], "content": content}
