"""Prompts and a reward, by TRL's GRPO."""

import inspect
import reprlib
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Value
from pyarrow import ArrowInvalid
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qrefta.files.tables import BUILDERS, is_number, is_text, kind_of, with_names
from qrefta.train.data import Loaded, read_splits, split_files, with_test
from qrefta.train.lengths import check_rows, check_tokens
from qrefta.train.reference import StartsAsReference
from qrefta.train.rewards import Reward
from qrefta.train.tasks.chat import check_template
from qrefta.train.tasks.prompts import token_ids
from qrefta.train.tasks.recipe import Recipe, combined
from qrefta.train.tasks.rows import read_rows, turn_features
from qrefta.train.tasks.turns import COLUMNS, is_empty, question_of
from qrefta.train.trl import load_trl

_OF_TRL = ("prompt", "completion", "completion_ids")  # columns that a reward does not get
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_READ_TURNS = turn_features(["prompt"])["prompt"]


def load_prompts(source: str | Path, seed: int) -> Loaded:
    """Prompts with the splits train and test; other columns stay, for the reward.

    A prompt is text if the source has it as text in the column prompt, and no system message,
    history or tools. Else it is turns.

    Args:
        source: a file, a folder or a hub name with one of the columns prompt, question, instruction
            (with input), messages or conversations (turns up to the assistant's last answer).
        seed: of the choice of rows to test on, in a source without a test split.

    Raises:
        ValueError: for other columns or a broken row; it names source, row and column.
    """
    parts = read_splits(source, shards=True)
    files = split_files(source, shards=True)
    from_cells = any(BUILDERS[kind_of(file)] == "csv" for part in files.values() for file in part)
    for name, part in parts.items():
        part = _with_numbers(with_names(part, COLUMNS)) if from_cells else part
        parts[name] = _with_prompts(part, f"{source} ({name})")
    return with_test(parts, "grpo", seed)


def prompts(parts: DatasetDict, source: str, seed: int) -> Loaded:
    """The splits of `load_prompts`, from splits with other columns.

    Args:
        parts: the split train and maybe test.
        source: name of the data, for errors.
        seed: of the choice of rows to test on.

    Raises:
        ValueError: as `load_prompts`.
    """
    for name, part in parts.items():
        if part.features.get("prompt") != _READ_TURNS:  # else `load_prompts` has read this split
            parts[name] = _with_prompts(part, f"{source} ({name})")
    return with_test(parts, "grpo", seed)


def _with_prompts(part: Dataset, place: str) -> Dataset:
    """A split with the column prompt, and its other columns."""
    return read_rows(part, place, _prompt, ["prompt"], ["prompt"], keeps_others=True)


def grpo_recipe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    max_length: int | None = None,
    *,
    rewards: Sequence[Reward],
) -> Recipe:
    """Group relative policy optimization by TRL (Shao et al., 2024).

    The reference, for a beta above 0, is the model as it is.

    Args:
        model: whose positions limit prompts with their answers.
        tokenizer: of the model, with a chat template for conversations.
        data: from `load_prompts`.
        max_length: of answers, in tokens; TRL reads it from its GRPOConfig.
        rewards: called with prompts, completions and every further column by name; they return one
            number for each completion, and None where they do not apply.

    Raises:
        ValueError: for conversations and a tokenizer without a chat template, if a prompt has a
            token that the model has no embedding for, if a prompt and an answer have more tokens
            than the model has positions, or if a reward does not take the columns by name. A reward
            that returns no number for each completion raises ValueError in the run.
        ImportError: if TRL is not installed.
    """
    trainer, _ = load_trl("grpo")
    check_template({"prompt": data["train"][0]["prompt"]}, tokenizer)
    for name, part in data.items():
        prompts = [
            token_ids(dict(row), tokenizer, False, f"The {name} split, row {number}")
            for number, row in enumerate(part, 1)
        ]
        check_tokens(model, tokenizer, prompts, str(name))
        lengths = [len(prompt) + (max_length or 0) for prompt in prompts]
        check_rows(model, tokenizer, lengths, f"prompts of the {name} split with an answer")
    columns = [name for name in data["train"].column_names if name not in _OF_TRL]
    return Recipe(
        data["train"],
        data["test"],
        combined(StartsAsReference, trainer),
        options={"reward_funcs": [_checked(reward, columns) for reward in rewards]},
        scores={"reward": "reward"},
    )


def _checked(reward: Reward, columns: list[str]) -> Reward:
    """A reward that refuses to return anything but one number, or None, for each completion.

    Args:
        reward: a function; a model and an asynchronous function are returned as they are.
        columns: further ones of the data, which TRL gives to it by name.

    Raises:
        ValueError: if the reward does not take them.
    """
    if isinstance(reward, nn.Module) or inspect.iscoroutinefunction(reward):
        return reward  # type: ignore[return-value]
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        inspect.signature(reward).bind(**dict.fromkeys((*_GIVEN, *columns)))
    except TypeError as error:
        raise ValueError(
            f"The reward {name} does not take the columns that it is called with: {error}. It gets "
            f"{', '.join((*_GIVEN, *columns))} by name; let it take those that it does not use: "
            f"def {name}(completions, **columns)"
        ) from error

    @wraps(reward)
    def checked(**given: Any) -> list[float | None]:
        values = reward(**given)
        try:
            found = [None if value is None else float(value) for value in values]
        except (TypeError, ValueError):
            found = []
        if len(found) != len(given["completions"]):
            raise ValueError(
                f"The reward {name} returned {reprlib.repr(values)}; it must return a list of "
                f"{len(given['completions'])} numbers, one for each completion, or None where it "
                "does not apply."
            )
        return found

    return checked


def _prompt(row: dict[str, Any], where: str, plain: bool) -> dict[str, Any]:
    if plain:
        if not isinstance(row["prompt"], str) or is_empty(row["prompt"]):
            raise ValueError(
                f"{where}, column prompt is {row['prompt']!r}; text is needed. Fill the row, or "
                "remove it."
            )
        return {"prompt": row["prompt"]}
    return {"prompt": question_of(row, where)}


def _with_numbers(part: Dataset) -> Dataset:
    """The rows of a csv file with numbers, for the reward, in columns whose cells are numbers."""
    for name in part.column_names:
        if name not in COLUMNS and is_text(part, name) and is_number(part, name):
            try:
                part = part.cast_column(name, Value("int64"))
            except ArrowInvalid:
                part = part.cast_column(name, Value("float64"))
    return part
