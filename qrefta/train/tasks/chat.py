"""Conversations, and prompts with completions: rows, token ids with labels, TRL's SFTTrainer."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qrefta.choices import LOSSES, Loss, Task
from qrefta.nn.head_loss import IGNORED
from qrefta.train.balance import BalancedBatches
from qrefta.train.data import Loaded, read_splits, with_test
from qrefta.train.head_loss import WithoutLogits
from qrefta.train.lengths import check_answers_remain, check_rows, warn_of_cut
from qrefta.train.mean_loss import LossByTokens
from qrefta.train.tasks.answers import learned_ids, left_out
from qrefta.train.tasks.recipe import Recipe, combined
from qrefta.train.tasks.rows import read_rows
from qrefta.train.tasks.template import template_errors
from qrefta.train.tasks.turns import conversation, is_empty, is_plain
from qrefta.train.trl import load_trl

_TEXT = ("prompt", "completion")
_TURNS = ("messages",)
_IDS = Features(
    {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "cut": Value("bool")}
)


def load_chat(source: str | Path, seed: int) -> Loaded:
    """Conversations with the splits train and test.

    The columns are messages and, if the source has it, tools; or, if the source has them as text,
    without a system message, history or tools, prompt and completion.

    Args:
        source: a file, a folder (one file a split, or files of one kind, which are one split), or a
            hub name, with the columns of `qrefta.train.tasks.turns`.
        seed: of the choice of rows to test on, in a source without a test split.

    Raises:
        ValueError: for other columns, or a row without an answer; it names source, row and column.
    """
    return conversations(read_splits(source, shards=True), str(source), seed)


def conversations(parts: DatasetDict, source: str, seed: int) -> Loaded:
    """The splits of `load_chat`, from splits with other columns.

    Args:
        parts: the split train and maybe test, with the columns of `qrefta.train.tasks.turns`.
        source: name of the data, for errors.
        seed: of the choice of rows to test on.

    Raises:
        ValueError: as `load_chat`.
    """
    for name, part in parts.items():
        parts[name] = read_rows(part, f"{source} ({name})", _row, _TEXT, _TURNS)
    return with_test(parts, "sft", seed)


def check_loss(task: Task, loss: Loss) -> None:
    """Refuse a loss that there is not, or that the task does not have.

    Raises:
        ValueError: for a loss other than all and last, and for last in another task than sft.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; it must be one of {', '.join(LOSSES)}")
    if loss != "all" and task != "sft":
        raise ValueError(
            f"loss={loss!r} (--loss) is for the task sft; the task is {task!r}. Leave it out."
        )


def _row(row: dict[str, Any], where: str, plain: bool) -> dict[str, Any]:
    if not plain:
        return {"messages": conversation(row, where)}
    if not is_plain(row, _TEXT) or is_empty(row["completion"]):
        raise ValueError(
            f"{where}, columns prompt and completion: text is missing. They are "
            f"{row['prompt']!r} and {row['completion']!r}; fill the row, or remove it."
        )
    return {name: row[name] for name in _TEXT}


def chat_recipe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    max_length: int | None,
    loss: Loss = "all",
) -> Recipe:
    """Supervised fine-tuning by TRL, with the loss on the assistant's turns.

    Rows are cut to `max_length` tokens; a row with no answer before the cut is left out.

    Args:
        model: whose positions limit rows that are not cut.
        tokenizer: of the model, with a chat template for conversations.
        data: from `load_chat`.
        max_length: tokens of a row; None: all.
        loss: on all of the assistant's turns, or on the last.

    Raises:
        ValueError: for conversations and a tokenizer without a chat template, a row that the
            template does not take, or a split without an answer in its first `max_length` tokens.
        ImportError: if TRL is not installed.
    """
    trainer, _ = load_trl("sft")
    trainer = combined(BalancedBatches, LossByTokens, WithoutLogits, trainer)
    first = data["train"][0]
    check_template(first, tokenizer)
    with template_errors("The train split, row 1", first):
        unmarked = left_out(first, tokenizer) if "messages" in first else ""
    if unmarked:
        warnings.warn(
            "The chat template marks what is learned of a conversation (generation), and leaves "
            f"parts of the assistant's turns out. In the first conversation: {unmarked!r}.",
            stacklevel=2,
        )
    parts = DatasetDict(
        {name: _tokens(part, name, tokenizer, max_length, loss) for name, part in data.items()}
    )
    for name, part in parts.items():
        rows = len(data[name])
        check_answers_remain(rows - len(part), rows, str(name), max_length)
        if max_length is None:
            check_rows(model, tokenizer, [*map(len, part["input_ids"])], f"of the {name} split")
        else:
            warn_of_cut(sum(part["cut"]), rows, str(name), max_length)
    parts = parts.remove_columns("cut")
    return Recipe(parts["train"], parts["test"], trainer)


def _tokens(
    part: Dataset,
    split: Any,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    loss: Loss,
) -> Dataset:
    """Token ids and labels of the rows that have labels."""
    encoded = part.map(
        partial(_cut_ids, split=split, tokenizer=tokenizer, max_length=max_length, loss=loss),
        with_indices=True,
        remove_columns=part.column_names,
        features=_IDS,
        desc="Tokenizing",
    )
    return encoded.filter(_has_labels, input_columns="labels", desc="Looking for answers")


def _cut_ids(
    row: dict[str, Any],
    index: int,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    loss: Loss,
) -> dict[str, Any]:
    with template_errors(f"The {split} split, row {index + 1}", row):
        ids = learned_ids(row, tokenizer, loss, max_length)
    cut = max_length is not None and len(ids["input_ids"]) > max_length
    return {name: values[:max_length] for name, values in ids.items()} | {"cut": cut}


def _has_labels(labels: list[int]) -> bool:
    return any(label != IGNORED for label in labels)


def check_template(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a conversation and a tokenizer without a chat template."""
    if any(isinstance(value, list) for value in row.values()) and tokenizer.chat_template is None:
        raise ValueError(
            "The data are conversations and the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give columns prompt and completion of plain text, without "
            "system, history and tools."
        )
