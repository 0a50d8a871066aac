"""Preferences, by TRL's DPO: pairs of a better and a worse answer."""

import warnings
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qrefta.train.data import Loaded, read_splits, with_test
from qrefta.train.lengths import check_answers_remain, check_rows, check_tokens, warn_of_cut
from qrefta.train.reference import StartsAsReference
from qrefta.train.tasks.chat import check_template
from qrefta.train.tasks.prompts import token_ids
from qrefta.train.tasks.recipe import Recipe, combined
from qrefta.train.tasks.rows import read_rows
from qrefta.train.tasks.turns import (
    QUESTIONS,
    answer_turns,
    is_empty,
    question_of,
    turns_of,
    up_to_answer,
    with_system,
)
from qrefta.train.trl import load_trl

_ANSWERS = ("chosen", "rejected")
_PAIR = ("prompt", *_ANSWERS)


def load_preferences(source: str | Path, seed: int) -> Loaded:
    """Preferences with the splits train and test: columns prompt, chosen, rejected, maybe tools.

    They are text if the source has the first three as text, and no system message, history or
    tools. Else they are turns, and the answers are turns of the assistant.

    Args:
        source: a file, a folder or a hub name with the columns chosen and rejected (text, turns, or
            whole conversations) and, unless these are whole conversations, prompt, question,
            instruction (with input), messages or conversations.
        seed: of the choice of rows to test on, in a source without a test split.

    Raises:
        ValueError: for other columns or a broken row; it names source, row and column.
    """
    return preferences(read_splits(source, shards=True), str(source), seed)


def preferences(parts: DatasetDict, source: str, seed: int) -> Loaded:
    """The splits of `load_preferences`, from splits with other columns.

    Args:
        parts: the split train and maybe test.
        source: name of the data, for errors.
        seed: of the choice of rows to test on.

    Raises:
        ValueError: as `load_preferences`.
    """
    for name, part in parts.items():
        place = f"{source} ({name})"
        parts[name] = _different(read_rows(part, place, _pair, _PAIR, _PAIR), place)
    return with_test(parts, "dpo", seed)


def dpo_recipe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    max_length: int | None = None,
) -> Recipe:
    """Direct preference optimization by TRL (Rafailov et al., 2023).

    The reference is the model as it is. TRL reads `max_length` from its DPOConfig, cuts rows to it
    and leaves out rows without an answer before the cut; warnings count both.

    Raises:
        ValueError: for conversations and a tokenizer without a chat template, a split without an
            answer in its first `max_length` tokens, a token that the model has no embedding for, or
            rows that are not cut and have more tokens than the model has positions.
        ImportError: if TRL is not installed.
    """
    trainer, _ = load_trl("dpo")
    check_template(data["train"][0], tokenizer)
    for name, part in data.items():
        _check_pairs(model, tokenizer, part, str(name), max_length)
    return Recipe(
        data["train"],
        data["test"],
        combined(StartsAsReference, trainer),
        scores={"accuracy": "rewards/accuracies"},
    )


def _check_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    part: Dataset,
    split: str,
    max_length: int | None,
) -> None:
    """Check the tokens, and count the pairs that TRL cuts, and the pairs that it leaves out."""
    prompts = []
    lengths = []
    tokens = []
    for number, row in enumerate(map(dict, part), 1):
        where = f"The {split} split, row {number}"
        prompts.append(len(token_ids(row, tokenizer, False, where)))
        both = (row, row | {"chosen": row["rejected"]})
        answers = [token_ids(one, tokenizer, True, where) for one in both]
        lengths.append(max(map(len, answers)))
        tokens.append([*{*answers[0], *answers[1]}])
    check_tokens(model, tokenizer, tokens, split)
    if max_length is None:
        check_rows(model, tokenizer, lengths, f"of the {split} split")
        return
    left_out = sum(prompt >= max_length for prompt in prompts)
    check_answers_remain(left_out, len(part), split, max_length)
    warn_of_cut(
        sum(length > max_length for length in lengths) - left_out, len(part), split, max_length
    )


def _pair(row: dict[str, Any], where: str, plain: bool) -> dict[str, Any]:
    for name in _ANSWERS:
        if name not in row:
            raise ValueError(
                f"{where}: there is no column {name}; the columns are {[*row]}. A pair is a better "
                "answer in the column chosen and a worse one in rejected."
            )
        if is_empty(row[name]):
            raise ValueError(
                f"{where}, column {name}: there is no answer but {row[name]!r}; fill the row, "
                "or remove it."
            )
    if plain:
        wrong = next((name for name in _PAIR if not isinstance(row[name], str)), None)
        if wrong is not None:
            raise ValueError(f"{where}, column {wrong} is {row[wrong]!r}, and text in other rows.")
        return {name: row[name] for name in _PAIR}
    answers = {}
    for name in _ANSWERS:
        place = f"{where}, column {name}"
        answers[name] = up_to_answer(turns_of(answer_turns(row[name], place), place))
    common = _common_turns(*answers.values())
    answers = {name: turns[len(common) :] for name, turns in answers.items()}
    asks = any(not is_empty(row.get(name)) for name in QUESTIONS)
    if common and not (asks and common[0]["role"] == "assistant"):
        prompt = with_system(common, row)
    elif _ask_differently(**answers):
        first, other = (turns[0] for turns in answers.values())
        raise ValueError(
            f"{where}: the answer is not the assistant's. The conversations in chosen and rejected "
            f"begin with different turns, {first!r} and {other!r}; they need the same question."
        )
    else:
        prompt = [*question_of(row, where), *common]
    for name, turns in answers.items():
        if not turns or turns[0]["role"] != "assistant":
            raise ValueError(
                f"{where}, column {name}: the answer is {turns!r}, not the assistant's."
            )
    return {"prompt": prompt} | answers


def _common_turns(one: list[Any], other: list[Any]) -> list[Any]:
    """The turns that both conversations begin with."""
    same = 0
    while same < min(len(one), len(other)) - 1 and one[same] == other[same]:
        same += 1
    return one[:same]


def _ask_differently(chosen: list[Any], rejected: list[Any]) -> bool:
    """Whether both are conversations, and begin with different turns."""
    begin = (chosen[:1], rejected[:1])
    return begin[0] != begin[1] and all(
        turns and turns[0]["role"] != "assistant" for turns in begin
    )


def _different(part: Dataset, source: str) -> Dataset:
    """The pairs of two different answers; a warning counts the others."""
    kept = part.filter(_is_pair, input_columns=[*_ANSWERS], desc="Comparing answers")
    if len(kept) == 0:
        raise ValueError(f"{source}: chosen and rejected are equal in every row.")
    if len(kept) < len(part):
        warnings.warn(
            f"{source}: in {len(part) - len(kept)} of {len(part)} rows chosen and rejected are "
            "equal. They are left out, since they teach nothing.",
            stacklevel=3,
        )
    return kept


def _is_pair(chosen: Any, rejected: Any) -> bool:
    return chosen != rejected
