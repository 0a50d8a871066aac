"""Tasks of causal language models: running text, and multiple-choice questions.

Running text is scored by perplexity. Questions are scored by lm-evaluation-harness on the model in
memory, from a task file (multiple_choice.yaml) and the given rows, without a hub.
"""

import json
import re
from functools import partial
from math import ceil
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import yaml
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eval.tasks.task import NAMED, Named, Sizes, Task, by_length, load_task

TASK_FILE = Path(__file__).parent / "multiple_choice.yaml"
TEST_SHARE = 0.1  # of a single text file, at its end
IGNORED = -100  # the loss ignores this label
LEAD = "the correct answer is"


def text_lm_task(
    name: str, source: str, model: str | None, header: list[str] | None, sizes: Sizes, seed: int
) -> Task:
    """Running text in blocks of `sizes.length` tokens; the metric is perplexity.

    The source is a folder with train.txt and test.txt, or one .txt file, whose last tenth is for
    test.

    Raises:
        ValueError: if the model or the file is missing, or the text is too short.
    """
    tokenizer = AutoTokenizer.from_pretrained(_named(model, name))
    train, test = (_blocks(text, tokenizer, sizes.length) for text in _texts(Path(source)))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    if len(train) <= sizes.validation or len(test) == 0:
        raise ValueError(
            f"{source} holds {len(train)} training and {len(test)} test blocks of {sizes.length} "
            f"tokens, and "
            f"{sizes.validation} are put aside to choose a learning rate; give more text or "
            f"smaller numbers."
        )
    train = train.select(order[: sizes.train + sizes.validation])
    return Task(
        train=train.select(range(sizes.validation, len(train))),
        validation=train.select(range(sizes.validation)),
        test=test.select(range(min(sizes.test, len(test)))),
        collate=_stack,
        model=lambda seed: causal_model(model),
        heads=[],
        metric="perplexity",
    )


def choice_task(
    name: str, source: str, model: str | None, header: list[str] | None, sizes: Sizes, seed: int
) -> Task:
    """Multiple-choice questions: lists of {instruction, answer} in train.json and
    test.json.

    A folder of folders with both files is one task with equally many rows of each. Trains on the
    answer only; the metric is the accuracy of lm-evaluation-harness. Options that the instruction
    lists (Answer1: ... Answer2: ...) are not shown to the model: it answers in the option's words.

    Raises:
        ValueError: if the model, a file or a column is missing.
    """
    folder = Path(source)
    parts = [folder]
    if not (folder / "train.json").is_file():
        parts = sorted(file.parent for file in folder.glob("*/train.json")) or [folder]
    train = _shares(parts, "train", sizes.train + sizes.validation, seed)
    test = _shares(parts, "test", sizes.test, None)
    return _answered(train, test, _named(model, name), source, sizes)


def prompt_task(
    name: str, source: str, model: str | None, header: list[str] | None, sizes: Sizes, seed: int
) -> Task:
    """A text classification whose classes are answers in words, as a multiple-choice task.

    Raises:
        ValueError: if the model or the data are missing, or the task has no answers.
    """
    known = NAMED.get(name, Named())
    rows = load_task(
        source, header or known.header, seed, sizes.train + sizes.validation, sizes.test
    )
    if len(known.answers) != rows["train"].features["label"].num_classes:
        raise ValueError(
            f"{name} has {rows['train'].features['label'].num_classes} classes and "
            f"{len(known.answers)} answers in words; a prompt needs one answer a class."
        )
    train, test = (_prompts(rows[part], known.answers) for part in ("train", "test"))
    return _answered(train, test, _named(model, name), source, sizes)


def _answered(train: Dataset, test: Dataset, model: str, source: str, sizes: Sizes) -> Task:
    """The task of answering questions: columns question, lead, choices and target.

    The model is in bfloat16, as a language model is used; scoring takes half the time of float32.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    if len(train) <= sizes.validation:
        raise ValueError(
            f"{source} has {len(train)} training rows and {sizes.validation} are put aside to "
            f"choose a learning rate; "
            "give more rows or a smaller --validation-rows."
        )
    encode = partial(_encode, tokenizer=tokenizer, length=sizes.length)
    train, test = train.map(encode), test.map(encode)
    padding = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    return Task(
        train=train.select(range(sizes.validation, len(train))),
        validation=by_length(train.select(range(sizes.validation))),
        test=by_length(test),
        collate=partial(_pad, padding=padding),
        model=lambda seed: causal_model(model, torch.bfloat16),
        heads=[],
        metric="accuracy",
        judge=partial(judge_choices, tokenizer=tokenizer),
    )


def _shares(folders: list[Path], split: str, count: int, seed: int | None) -> Dataset:
    """About `count` rows, equally many of each folder, shuffled with `seed` if there is one."""
    share = ceil(count / len(folders))
    parts = []
    for folder in folders:
        rows = _questions(folder / f"{split}.json")
        rows = rows if seed is None else rows.shuffle(seed)
        parts.append(rows.select(range(min(share, len(rows)))))
    rows = concatenate_datasets(parts)
    return rows if seed is None else rows.shuffle(seed)


def _prompts(rows: Dataset, answers: tuple[str, ...]) -> Dataset:
    """Labelled text as questions, in LLM-Adapters' wording."""
    choices = "/".join(answers)
    return Dataset.from_list(
        [
            {
                "question": f"Please choose the sentiment of the review: {row['text'].strip()}"
                f"\n\nAnswer format: {choices}",
                "lead": LEAD,
                "choices": list(answers),
                "target": row["label"],
            }
            for row in rows
        ]
    )


def causal_model(model: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, use_safetensors=True)


class Judged(NamedTuple):
    """The score of answers in words.

    Attributes:
        accuracy: share of questions whose correct answer is the most likely per byte (acc_norm).
        loss: mean negative log-likelihood, in nats, of the correct answer.
    """

    accuracy: float
    loss: float


def judge_choices(
    model: nn.Module, rows: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 16
) -> Judged:
    """Accuracy and loss of answers, by lm-evaluation-harness.

    Args:
        model: a causal language model, with adapters or without.
        rows: columns question, lead, choices and target.
    """
    from lm_eval import simple_evaluate  # slow import
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = yaml.safe_load(TASK_FILE.read_text(encoding="utf-8"))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with TemporaryDirectory() as folder:
        file = Path(folder) / "test.json"
        file.write_text(json.dumps([_choices(row) for row in rows]), encoding="utf-8")
        task["dataset_kwargs"] = {"data_files": {"test": str(file)}}
        judge = HFLM(pretrained=base.eval(), tokenizer=tokenizer, batch_size=batch_size)
        # Listing the harness's 13,000 task files would take seconds.
        manager = TaskManager(include_defaults=False)
        found = simple_evaluate(
            judge, tasks=[task], task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
        )
    samples = found["samples"][task["task"]]
    return Judged(
        found["results"][task["task"]]["acc_norm,none"],
        -fmean(sample["filtered_resps"][sample["target"]][0] for sample in samples),
    )


def _choices(row: dict[str, Any]) -> dict[str, Any]:
    """A question as the task file names its parts."""
    return {
        "prompt": f"{row['question']}\n\n{row['lead']}",
        "choices": [f" {choice}" for choice in row["choices"]],
        "target": row["target"],
    }


def _named(model: str | None, name: str) -> str:
    if model is None:
        raise ValueError(
            f"{name} needs a causal language model; give its folder or hub name as --model."
        )
    return model


def _texts(source: Path) -> tuple[str, str]:
    """Text to train and to test on."""
    files = (
        sorted(source.glob("*.txt")) if source.is_dir() else [source] if source.is_file() else []
    )
    files = [file for file in files if file.name != "SOURCE.txt"]
    named = {file.stem: file for file in files}
    if {"train", "test"} <= named.keys():
        return named["train"].read_text(encoding="utf-8"), named["test"].read_text(encoding="utf-8")
    if len(files) != 1:
        raise ValueError(
            f"{source} must be a text file, or a folder with train.txt and test.txt or one .txt "
            f"file."
        )
    text = files[0].read_text(encoding="utf-8")
    cut = int(len(text) * (1 - TEST_SHARE))
    return text[:cut], text[cut:]


def _blocks(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Dataset.from_dict(
        {"input_ids": [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]}
    )


def _stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids.clone()}


def _questions(file: Path) -> Dataset:
    if not file.is_file():
        raise ValueError(f"{file} is missing; it must be a JSON list of {{instruction, answer}}.")
    rows = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{file} must be a JSON list of {{instruction, answer}} with at least one row."
        )
    for number, row in enumerate(rows):
        missing = {"instruction", "answer"} - row.keys()
        if missing or "Answer format: " not in row["instruction"]:
            raise ValueError(
                f"{file}, row {number}: instruction (ending with 'Answer format: a/b/c') "
                f"and answer are required; "
                f"missing: {', '.join(sorted(missing)) or 'Answer format'}."
            )
    return Dataset.from_list([_question(row, f"{file}, row {at}") for at, row in enumerate(rows)])


def _question(row: dict[str, str], place: str) -> dict[str, Any]:
    """Question, words before the answer, choices, and the place of the correct one."""
    text, names = row["instruction"].split("Answer format: ")
    labels = names.strip().split("/")
    if row["answer"] not in labels:
        raise ValueError(f"{place}: answer is {row['answer']!r}; allowed are {', '.join(labels)}")
    target = labels.index(row["answer"])
    listed = r"\s+(.*?)\s+".join(f"{label.capitalize()}:" for label in labels)
    match = re.fullmatch(rf"[^:]*: (.*?)\s+{listed}\s+(.*?)\s*", text, re.DOTALL)
    if match is None:
        return {
            "question": row["instruction"],
            "lead": LEAD,
            "choices": labels,
            "target": target,
        }
    question, *choices = match.groups()
    return {
        "question": f"Question: {question}",
        "lead": "Answer:",
        "choices": choices,
        "target": target,
    }


def _encode(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, length: int
) -> dict[str, list[int]]:
    """The last `length` tokens of question and answer; only the answer has labels."""
    question = tokenizer(f"{row['question']}\n\n")["input_ids"]
    answer = tokenizer(f"{row['lead']} {row['choices'][row['target']]}", add_special_tokens=False)
    ids = question + answer["input_ids"]
    labels = [IGNORED] * len(question) + answer["input_ids"]
    return {"input_ids": ids[-length:], "labels": labels[-length:]}


def _pad(rows: list[dict[str, Any]], padding: int) -> dict[str, torch.Tensor]:
    """A batch, padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([value + [fill] * (width - len(value)) for value in values])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], padding),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], IGNORED),
    }
