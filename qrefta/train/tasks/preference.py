"""Preferences: pairs of a better and a worse answer (DPO), or prompts and a reward (GRPO)."""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Json, List, Value
from pyarrow import ArrowInvalid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qrefta.choices import Task
from qrefta.files.tables import BUILDERS, as_written, is_number, is_text, kind_of, with_names
from qrefta.train.data import read_splits, split_files, with_test
from qrefta.train.lengths import check_rows, check_tokens, warn_of_cut, warn_without_answer
from qrefta.train.reference import starts_as_reference
from qrefta.train.tasks.answers import template_errors
from qrefta.train.tasks.chat import check_template
from qrefta.train.tasks.recipe import TEST_SHARE, Recipe
from qrefta.train.tasks.turns import (
    COLUMNS,
    QUESTIONS,
    answer_turns,
    are_plain,
    is_empty,
    question_of,
    tools_of,
    turns_of,
    with_system,
)
from qrefta.train.trl import load_trl

Reward = Callable[..., list[float | None]]

_PAIR = ("prompt", "chosen", "rejected")
_PLAIN = Features({name: Value("string") for name in _PAIR})
_TURNS = Features({name: List(Json()) for name in _PAIR})
_TOOLS = Features({"tools": Json()})


def load_preferences(source: str | Path, seed: int) -> DatasetDict:
    """Preferences with the splits train and test: columns prompt, chosen, rejected and, maybe,
    tools.

    They are text if the source has the first three as text, and no system message, history or
    tools. Else they are turns, and the
    answers are turns of the assistant.

    Args:
        source: a file, a folder or a hub name with the columns chosen and rejected (text, turns, or
            whole conversations) and, unless these are whole conversations, prompt, question,
            instruction (with input), messages or conversations.
        seed: of the choice of rows to test on, in a source without a test split.

    Raises:
        ValueError: for other columns or a broken row; it names source, row and column.
    """
    parts = read_splits(source, shards=True)
    for name, part in parts.items():
        part = with_names(part, COLUMNS)
        plain = are_plain(part, _PAIR)
        features = _PLAIN if plain else _TURNS
        if not plain and "tools" in part.column_names:
            features = Features(_TURNS | _TOOLS)
        parts[name] = part.map(
            _pair,
            with_indices=True,
            fn_kwargs={
                "source": f"{source} ({name})",
                "columns": list(features),
                "plain": plain,
                "given": part.features,
            },
            remove_columns=part.column_names,
            features=features,
            desc="Reading",
        )
        parts[name] = _different(parts[name], f"{source} ({name})")
    return with_test(parts, TEST_SHARE, seed)


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
        starts_as_reference(trainer),
        scores={"accuracy": "rewards/accuracies"},
    )


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


def token_ids(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    answer: bool,
    where: str = "A row of the train split",
) -> list[int]:
    """The token ids of a prompt, with the better answer or else ready for an answer.

    Raises:
        ValueError: if the chat template does not take the row; it names `where`.
    """
    if isinstance(row["prompt"], str):
        encoded: Any = tokenizer(row["prompt"] + (row["chosen"] if answer else ""))
    else:
        turns = [*row["prompt"], *(row["chosen"] if answer else [])]
        with template_errors(where, row):
            encoded = tokenizer.apply_chat_template(
                turns, tools=row.get("tools"), add_generation_prompt=not answer, return_dict=True
            )
    return encoded["input_ids"]


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
    warn_without_answer(left_out, len(part), split, max_length)
    warn_of_cut(
        sum(length > max_length for length in lengths) - left_out, len(part), split, max_length
    )


def _pair(
    row: dict[str, Any],
    index: int,
    source: str,
    columns: list[str],
    plain: bool,
    given: Features,
) -> dict[str, Any]:
    row = as_written(row, given)
    where = f"{source}, row {index + 1}"
    for name in ("chosen", "rejected"):
        if is_empty(row.get(name)):
            raise ValueError(
                f"{where}, column {name}: there is no answer but {row.get(name)!r}; fill the row, "
                "or remove it."
            )
    if plain:
        wrong = next((name for name in _PAIR if not isinstance(row[name], str)), None)
        if wrong is not None:
            raise ValueError(f"{where}, column {wrong} is {row[wrong]!r}, and text in other rows.")
        return {name: row[name] for name in columns}
    answers = {}
    for name in ("chosen", "rejected"):
        place = f"{where}, column {name}"
        answers[name] = turns_of(answer_turns(row[name], place), place)
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
    tools = {"tools": tools_of(row, where)} if "tools" in columns else {}
    return {"prompt": prompt} | answers | tools


def _ask_differently(chosen: list[Any], rejected: list[Any]) -> bool:
    """Whether both are conversations, and begin with different turns."""
    begin = (chosen[:1], rejected[:1])
    return begin[0] != begin[1] and all(
        turns and turns[0]["role"] != "assistant" for turns in begin
    )


def _different(part: Dataset, source: str) -> Dataset:
    """The pairs of two different answers; a warning counts the others."""
    kept = part.filter(_is_pair, input_columns=["chosen", "rejected"], desc="Comparing answers")
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


def _with_numbers(part: Dataset) -> Dataset:
    """The rows of a csv file with numbers, for the reward, in columns whose cells are numbers."""
    for name in part.column_names:
        if name not in COLUMNS and is_text(part, name) and is_number(part, name):
            try:
                part = part.cast_column(name, Value("int64"))
            except ArrowInvalid:
                part = part.cast_column(name, Value("float64"))
    return part


def _common_turns(one: list[Any], other: list[Any]) -> list[Any]:
    """The turns that both conversations begin with."""
    same = 0
    while same < min(len(one), len(other)) - 1 and one[same] == other[same]:
        same += 1
    return one[:same]


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
