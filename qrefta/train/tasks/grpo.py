"""Prompts and a reward, by TRL's GRPO."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Json, List, Value
from pyarrow import ArrowInvalid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qrefta.files.tables import BUILDERS, as_written, is_number, is_text, kind_of, with_names
from qrefta.train.data import read_splits, split_files, with_test
from qrefta.train.lengths import check_rows, check_tokens
from qrefta.train.reference import starts_as_reference
from qrefta.train.rewards import Reward
from qrefta.train.tasks.chat import check_template
from qrefta.train.tasks.prompts import token_ids
from qrefta.train.tasks.recipe import TEST_SHARE, Recipe
from qrefta.train.tasks.turns import COLUMNS, are_plain, is_empty, question_of
from qrefta.train.trl import load_trl


def load_prompts(source: str | Path, seed: int) -> DatasetDict:
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
        part = with_names(part, COLUMNS)
        part = _with_numbers(part) if from_cells else part
        plain = are_plain(part, ["prompt"])
        prompt = Value("string") if plain else List(Json())
        parts[name] = part.map(
            _prompt,
            with_indices=True,
            fn_kwargs={"source": f"{source} ({name})", "plain": plain, "given": part.features},
            features=Features(part.features | {"prompt": prompt}),
            desc="Reading",
        )
    return with_test(parts, TEST_SHARE, seed)


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
            token that the model has no embedding for, or if a prompt and an answer have more tokens
            than the model has positions.
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
    return Recipe(
        data["train"],
        data["test"],
        starts_as_reference(trainer),
        options={"reward_funcs": list(rewards)},
        scores={"reward": "reward"},
    )


def _prompt(
    row: dict[str, Any], index: int, source: str, plain: bool, given: Features
) -> dict[str, Any]:
    row = as_written(row, given)
    where = f"{source}, row {index + 1}"
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
