"""Questions about Python's standard library, answered by the first sentences of its docstrings.

"What does `textwrap.dedent` do?" - "Remove any common leading whitespace from every line in text."
The data are real, need no download, and teach a manner that one can see: one sentence, in the
imperative. Questions are held out by module, so no test answer is about a module that was trained.

Sources are parsed and not imported, because an import can have side effects. Wordings, and so the
rows, differ a little between Python versions.
"""

import ast
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict

from eval.tasks.demo import CHAPTERS, TEST_SHARE, fraction, module_files, runs, sentences

MORE_MODULES = (  # with public functions, and of no chapter with enough prose
    "abc argparse ast cmd code codecs configparser contextlib csv dataclasses difflib dis "
    "functools getopt gettext hashlib hmac inspect keyword locale operator optparse pickle "
    "plistlib pstats secrets shelve shlex signal sqlite3 string struct symtable sysconfig "
    "textwrap timeit token tokenize trace traceback tracemalloc venv warnings wave"
)


class Question(NamedTuple):
    """A question about a function or class, its answer, and its top-level module."""

    text: str
    answer: str
    module: str

    @property
    def words(self) -> tuple[str, ...]:
        """The lower-cased words of the answer."""
        return tuple(self.answer.lower().strip(".").split())


def docstring_questions(train_size: int | None = None, test_size: int | None = None) -> DatasetDict:
    """Questions and answers as conversations of two turns.

    Splits `train` and `test`; column `messages`. The order is fixed by hashes, and the rows of a
    smaller size are a subset of the rows of a larger.

    Raises:
        FileNotFoundError: if this Python has no library sources, like an embedded or zipped Python.
        ValueError: if a size exceeds the number of rows.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    train, test = split(list(stdlib_questions(stdlib)))
    if not train or not test:
        raise FileNotFoundError(
            f"{stdlib} has no sources of the standard library; use a Python that contains its .py "
            f"files"
        )
    return DatasetDict(train=_rows(train, train_size), test=_rows(test, test_size))


def docstring_chats(count: int, tokens: Callable[[Any], int], bounds: tuple[int, int]) -> Dataset:
    """Conversations whose answer is a whole docstring; column `messages`, in the order of a hash.

    Args:
        count: rows.
        tokens: length of a conversation.
        bounds: least and largest length.

    Raises:
        FileNotFoundError: if this Python has no library sources.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    asked = sorted(_with_docstring(stdlib), key=lambda question: fraction(question.text))
    rows = []
    for row in _conversations(asked):
        if bounds[0] <= tokens(row["messages"]) <= bounds[1]:
            rows.append(row)
        if len(rows) == count:
            return Dataset.from_list(rows)
    raise FileNotFoundError(
        f"{stdlib} gives {len(rows)} conversations, and {count} are needed; use a Python that "
        f"contains the .py files of its library, or fewer rows"
    )


def _with_docstring(stdlib: Path) -> Iterator[Question]:
    for module, path in _library_files(stdlib):
        for name, node in _public(ast.parse(path.read_bytes()), path.stem):
            docstring = ast.get_docstring(node)
            if docstring:
                yield Question(f"What does `{name}` do?", docstring, module)


def _library_files(stdlib: Path) -> Iterator[tuple[str, Path]]:
    """The modules that are asked about, with each of their source files."""
    for module in sorted(" ".join([*CHAPTERS.values(), MORE_MODULES]).split()):
        for path in module_files(stdlib, module):
            yield module, path


def stdlib_questions(stdlib: Path) -> Iterator[Question]:
    """A question for every public function, class and method below `stdlib` that has an answer.

    An answer occurs once: a later function with the same first sentence is left out.
    """
    seen: set[tuple[str, ...]] = set()
    for _, path in _library_files(stdlib):
        for question in file_questions(path, stdlib):
            if question.words not in seen:
                seen.add(question.words)
                yield question


def file_questions(path: Path, stdlib: Path) -> Iterator[Question]:
    """Questions about the public functions, classes and methods of a source file."""
    parts = path.relative_to(stdlib).with_suffix("").parts
    names = [part.removeprefix("_py") for part in parts if part != "__init__"]
    if any(name.startswith("_") for name in names):
        return
    for name, node in _public(ast.parse(path.read_bytes()), ".".join(names)):
        found = sentences(ast.get_docstring(node) or "")
        if found and len(found[0].split()) <= 25:
            verb = "is" if isinstance(node, ast.ClassDef) else "does"
            end = "?" if verb == "is" else " do?"
            yield Question(f"What {verb} `{name}`{end}", found[0], names[0])


def split(questions: list[Question]) -> tuple[list[Question], list[Question]]:
    """Training and test questions, by module, each side in the order of a hash.

    A training answer that shares a run of words with a test answer is left out.
    """
    ordered = sorted(questions, key=lambda question: fraction(question.text))
    test = [question for question in ordered if fraction(question.module) < TEST_SHARE]
    held_out = {run for question in test for run in runs(question.words)}
    train = [
        question
        for question in ordered
        if fraction(question.module) >= TEST_SHARE and not held_out & runs(question.words)
    ]
    return train, test


def _public(
    tree: ast.Module | ast.ClassDef, owner: str
) -> Iterator[tuple[str, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{owner}.{node.name}"
        yield name, node
        if isinstance(node, ast.ClassDef):
            yield from _public(node, name)


def _rows(questions: list[Question], size: int | None) -> Dataset:
    if size is not None and size > len(questions):
        raise ValueError(
            f"{size} rows were requested, but this Python's docstrings give {len(questions)}; "
            f"request fewer rows"
        )
    return Dataset.from_list(_conversations(questions[:size]))


def _conversations(questions: list[Question]) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": question.text},
                {"role": "assistant", "content": question.answer},
            ]
        }
        for question in questions
    ]
