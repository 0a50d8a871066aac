"""load_classification: every format, found columns, and refused input."""

import json

import pytest
from datasets import Dataset, DatasetDict

from qrefta.train.data import (
    load_classification,
    pick_splits,
    read_splits,
    split_files,
    with_test,
)

ROWS = [{"sentence": f'"quoted sentence number {i}', "label": i % 3} for i in range(30)]


def write(path, rows):
    names = list(rows[0])
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".tsv":  # as GLUE writes it: tabs and no quoting
        path.write_text(
            "\n".join("\t".join(map(str, row)) for row in [names, *(r.values() for r in rows)])
            + "\n"
        )
    else:
        Dataset.from_list(rows).to_csv(path)
    return path


def texts_and_labels(data):
    return sorted(zip(data["text"], data["label"]))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    data = load_classification(write(tmp_path / f"rows{suffix}", ROWS))
    found = texts_and_labels(data["train"]) + texts_and_labels(data["test"])
    assert sorted(found) == sorted((row["sentence"], row["label"]) for row in ROWS)
    assert data["train"].features["label"].names == ["0", "1", "2"]
    assert len(data["test"]) == 3


def test_single_split_is_divided_by_the_seed_and_never_overlaps(tmp_path):
    file = write(tmp_path / "rows.csv", ROWS)
    first, same, other = (load_classification(file, seed=seed) for seed in (0, 0, 1))
    assert (
        texts_and_labels(first["test"])
        == texts_and_labels(same["test"])
        != texts_and_labels(other["test"])
    )
    assert not set(first["train"]["text"]) & set(first["test"]["text"])


def test_folder_reads_one_file_a_split_and_prefers_the_development_set(tmp_path):
    for name, rows in {"train": ROWS[:20], "dev": ROWS[20:25], "test": ROWS[25:]}.items():
        write(tmp_path / f"{name}.tsv", rows)
    data = load_classification(tmp_path)
    assert len(data["train"]) == 20
    assert texts_and_labels(data["test"]) == [
        (row["sentence"], row["label"]) for row in ROWS[20:25]
    ]


def splits_of(**rows):
    return DatasetDict({name: Dataset.from_dict({"text": texts}) for name, texts in rows.items()})


@pytest.mark.parametrize(
    ("splits", "told", "train", "test"),
    [
        ({"test": "abcd"}, "'test' is trained on, and rows of it are held out", None, None),
        ({"validation": "ab", "extra": "cd"}, "'extra' .*'validation' is used", "cd", "ab"),
        ({"validation": "ab", "test": "cd"}, "'validation' .*'test' is used", "ab", "cd"),
    ],
)
def test_a_split_that_is_trained_on_is_never_tested_on(splits, told, train, test):
    with pytest.warns(UserWarning, match=f"data has no split train, but .*{told} for testing"):
        picked = pick_splits(splits_of(**{name: [*rows] for name, rows in splits.items()}), "data")
    parts = {
        name: list(part["text"]) for name, part in with_test(picked, "classify", 0, 0.25).items()
    }
    assert not set(parts["train"]) & set(parts["test"])
    if train is None:
        assert sorted(parts["train"] + parts["test"]) == [*"abcd"]
    else:
        assert parts == {"train": [*train], "test": [*test]}


def test_an_empty_train_split_is_not_replaced():
    with pytest.raises(ValueError, match="data has a split without rows"):
        pick_splits(splits_of(extra=["a"], train=[]), "data")


@pytest.mark.parametrize(("folder", "shards"), [(".", False), (".", True), ("data", True)])
def test_the_hub_s_names_of_files_are_splits(folder, shards, tmp_path):
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, rows in {
        "train-00000-of-00002": ROWS[:10],
        "train-00001-of-00002": ROWS[10:20],
        "test-00000-of-00001-a09b74b3ef9c3b56": ROWS[20:],
    }.items():
        write(tmp_path / folder / f"{name}.parquet", rows)
    parts = read_splits(tmp_path, shards=shards)
    assert list(parts["train"]) == ROWS[:20]
    assert list(parts["test"]) == ROWS[20:]


def test_folders_with_the_names_of_splits_are_splits(tmp_path):
    for name, rows in {"train": ROWS[:20], "test": ROWS[20:25], "validation": ROWS[25:]}.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "0000.parquet", rows)
    parts = read_splits(tmp_path, shards=True)
    assert {name: list(part) for name, part in parts.items()} == {
        "train": ROWS[:20],
        "test": ROWS[25:],
    }


@pytest.mark.parametrize("name", ["test", "validation-00000-of-00001", "dev"])
def test_a_test_file_is_never_trained_on(name, tmp_path):
    write(tmp_path / "data.jsonl", ROWS)
    write(tmp_path / f"{name}.jsonl", ROWS)
    message = rf"has no train file; it holds \['data\.jsonl', '{name}\.jsonl'\]"
    for shards in (False, True):
        with pytest.raises(ValueError, match=message):
            read_splits(tmp_path, shards=shards)


def test_files_without_the_name_of_a_split_are_trained_on(tmp_path):
    """Such as test-plan or development, which are words."""
    for name, rows in {"test-plan": ROWS[:9], "development": ROWS[9:20], "a": ROWS[20:]}.items():
        write(tmp_path / f"{name}.jsonl", rows)
    parts = read_splits(tmp_path, shards=True)
    assert {name: len(part) for name, part in parts.items()} == {"train": len(ROWS)}


def test_sentence_pairs_and_named_labels(tmp_path):
    rows = [
        {"sentence1": "a", "sentence2": "b", "label": "yes"},
        {"sentence1": "c", "sentence2": "d", "label": "no"},
    ]
    data = load_classification(write(tmp_path / "rows.jsonl", rows * 5))
    assert data["train"].features["label"].names == ["no", "yes"]
    assert set(zip(data["train"]["text"], data["train"]["text_pair"])) <= {("a", "b"), ("c", "d")}


def test_file_without_header_takes_its_names_from_the_caller(tmp_path):
    file = tmp_path / "cola.tsv"
    file.write_text("".join(f"src\t{i % 2}\t\tSentence {i}.\n" for i in range(20)))
    data = load_classification(file, header=["source", "label", "mark", "sentence"])
    assert len(data["train"]) + len(data["test"]) == 20
    assert data["train"][0]["text"].startswith("Sentence")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a", "kind": 1}], {}, "No label column among"),
        ([{"first": "a", "second": "b", "label": 1}], {}, "Which of the columns"),
        ([{"text": "a", "label": 1}] * 9, {}, "2 to 1000 classes"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}], {}, "2 to 1000 classes"),
        ([{"text": "a", "label": None}, {"text": "b", "label": 1}], {}, "2 to 1000 classes"),
        ([{"text": None, "label": 0}, {"text": "b", "label": 1}], {}, "rows without text"),
        ([{"text": 3, "label": 0}, {"text": 4, "label": 1}], {}, "not text"),
        (ROWS, {"label_column": "nosuch"}, "There are no columns"),
        (ROWS, {"text_columns": ["sentence"] * 3}, "one column, or two"),
    ],
)
def test_unusable_columns_are_refused_with_the_columns_found(tmp_path, rows, options, message):
    with pytest.raises(ValueError, match=message):
        load_classification(write(tmp_path / "rows.jsonl", rows), **options)


def test_test_labels_must_be_classes_of_training(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", [{"sentence": "x", "label": -1}])
    with pytest.raises(ValueError, match=r"labels \[-1\] that are no class of training"):
        load_classification(tmp_path)


def test_missing_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "rows.xlsx").write_text("x")
    for source, message in [
        (tmp_path / "nosuch.csv", "no file or folder"),
        (tmp_path / "rows.xlsx", "must be one of"),
        (tmp_path, "no train file"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_classification(source)


@pytest.mark.parametrize("label", ["Label", "LABELS", " Target "])
def test_capital_letters_and_spaces_in_names_do_not_count(label, tmp_path):
    """Of files, splits and columns."""
    for name, rows in {"TRAIN.CSV": 6, "Dev.csv": 4}.items():
        lines = [f"id,Text,{label}", *(f"{row},word {row},{'xy'[row % 2]}" for row in range(rows))]
        (tmp_path / name).write_text("\n".join(lines))
    data = load_classification(tmp_path)
    assert {name: len(part) for name, part in data.items()} == {"train": 6, "test": 4}
    assert data["train"][1] == {"text": "word 1", "label": 1}
    given = load_classification(tmp_path, text_columns=["TEXT"], label_column=label.lower())
    assert given["train"][1] == data["train"][1]


@pytest.mark.parametrize("cell", ["", "   "])
def test_rows_without_text_are_named_and_counted(cell, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(f"Sentence,label\na,x\n{cell},y\nb,x\n{cell},y\n")
    message = r"rows without text: .*rows\.csv \(train\), column Sentence, row 2 \(2 of 4 rows\)"
    with pytest.raises(ValueError, match=message):
        load_classification(file)


def test_the_label_column_is_found_in_other_letters_and_is_not_the_text(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("Body,Sentiment\nhello,a\nworld,b\nfoo,a\nbar,b\n")
    data = load_classification(file, label_column="sentiment")
    assert data["train"].column_names == ["text", "label"]
    assert data["train"].features["label"].names == ["a", "b"]


def test_texts_that_look_like_numbers_are_texts(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"00{row},{'xy'[row % 2]}\n" for row in range(6)))
    data = load_classification(file)
    assert sorted([*data["train"]["text"], *data["test"]["text"]]) == [
        f"00{row}" for row in range(6)
    ]


def test_an_index_is_not_taken_for_the_text(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(",review,label\n" + "".join(f"{row},word,{row % 2}\n" for row in range(6)))
    assert load_classification(file)["train"][0]["text"] == "word"


def test_one_value_that_is_no_text_is_named(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"text": "a", "label": 0}, {"text": 3, "label": 1}])
    with pytest.raises(ValueError, match=r"column text, row 2, is 3; write it as text"):
        load_classification(file)


def test_two_files_of_a_split_and_a_mistyped_name_are_refused(tmp_path):
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "Train.jsonl", ROWS)
    with pytest.raises(ValueError, match="are files of the same split"):
        load_classification(tmp_path)
    with pytest.raises(ValueError, match="There is no file or folder no/such, and as a data set"):
        load_classification("no/such")


@pytest.mark.parametrize(
    "copy", [".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", "b/._c.jsonl"]
)
def test_hidden_files_and_folders_are_no_data(copy, tmp_path):
    """As notebooks and macOS leave them."""
    folder = tmp_path / ".data"  # the folder that is given may be hidden
    (folder / copy).parent.mkdir(parents=True, exist_ok=True)
    write(folder / copy, ROWS)
    write(folder / "a.jsonl", ROWS[:10])
    assert split_files(folder, shards=True) == {"train": [folder / "a.jsonl"]}
    with pytest.raises(ValueError, match=r"it holds \['a\.jsonl'\]"):
        split_files(folder)
