"""Columns of labels as people write them: each becomes classes, or the error names the row."""

import warnings

import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import BertForSequenceClassification

from qrefta.train.data import load_classification
from qrefta.train.labels import encode_labels
from qrefta.train.models import load_classifier
from qrefta.train.tasks.classify import text_classes
from tests.models import tiny_bert
from tests.tiny import color_data, tiny_folder, tiny_tokenizer


def encoded(labels, test=None):
    parts = {"train": labels} if test is None else {"train": labels, "test": test}
    data = DatasetDict()
    for name, part in parts.items():
        data[name] = Dataset.from_dict({"text": ["a"] * len(part), "label": part})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return encode_labels(data, "rows.csv", "kind")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["yes", "no", " yes "], ["no", "yes"]),
        (["NA", "None", "null"], ["NA", "None", "null"]),  # words, next to other words
        (["10", "9", "1"], ["1", "9", "10"]),
        ([10, 9, 1], ["1", "9", "10"]),
        ([1.0, 0.0], ["0", "1"]),
        (["1.0", "0.0"], ["0", "1"]),  # a column with gaps, as pandas writes it
        (["01", "02"], ["01", "02"]),
        ([True, False], ["False", "True"]),
        (["1.0", "beta"], ["1.0", "beta"]),
    ],
)
def test_labels_become_classes(labels, names):
    data = encoded(labels, labels[::-1])
    assert data["train"].features["label"].names == names
    assert data["test"]["label"] == data["train"]["label"][::-1]


def test_words_and_numbers_are_classes_by_their_text(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": "y"}\n' * 5)
    data = load_classification(file)
    assert data["train"].features["label"].names == ["1", "y"]
    assert {row["text"]: row["label"] for row in data["train"]} == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", None, "b", " "], r"row 2, has no label but None \(2 of 4 rows\)"),
        (["1", "0", "NA"], r"row 3, has no label but 'NA' \(1 of 3 rows\)"),
        ([1.0, float("nan"), 0.0], r"row 2, has no label but nan \(1 of 3 rows\)"),
        ([0.5, 1.0], "has the number 0.5. Numbers that are not whole"),
        (["0.37", "1"], "has the number 0.37"),
        ([["x", "y"], ["y"]], r"row 1, has \['x', 'y'\]. A row has one label"),
        (["['x', 'y']", "['y']"], r'row 1, has "\[\'x\', \'y\'\]". A row has one label'),
        (['["x", "y"]', '["y"]'], r"row 1, has '\[\"x\", \"y\"\]'. A row has one label"),
        (["a", "a"], r"has 1 in 2 rows, such as \['a'\]"),
    ],
)
def test_other_labels_are_refused_with_their_row(labels, message):
    with pytest.raises(ValueError, match=rf"rows\.csv \(train\), column kind, {message}"):
        encoded(labels)


def test_unlabelled_rows_of_class_labels_are_refused():
    feature = ClassLabel(names=["x", "y"])
    part = Dataset.from_dict({"label": [0, 1, -1]}).cast_column("label", feature)
    with pytest.raises(ValueError, match=r"row 3, has no label but None \(1 of 3 rows\)"):
        encode_labels(DatasetDict(train=part), "hub", "label")


def test_labels_of_the_test_split_are_classes_of_training():
    with pytest.raises(
        ValueError, match=r"labels \['c'\] that are no class of training: \['a', 'b"
    ) as e:
        encoded(["a", "b"], ["a", "c", "c"])
    assert "(test), row 2, is the first of 2 such rows" in str(e.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1, -1], r"-1 is a class like 0 \(2 of 4 rows\)"),
        (["Yes", "yes", "no"], r"\['Yes', 'yes'\] are different classes"),
        (["a;b", "b; a", "c"], r"\['a;b', 'b; a'\] are different classes"),
        (["caf\u00e9", "cafe\u0301", "no"], "are different classes"),
    ],
)
def test_classes_that_may_be_none_are_warned_of(labels, message):
    with pytest.raises(UserWarning, match=message):
        encoded(labels)


# Names of the model's labels


def named(*names):
    model = tiny_bert()
    model.config.num_labels = len(names)
    model.config.id2label = dict(enumerate(names))
    return model


@pytest.mark.parametrize(
    ("names", "classes", "kept"),
    [
        (("Red", "Blue"), ["red", "blue"], ("Red", "Blue")),
        (("BLUE", "RED"), ["red", "blue"], ("BLUE", "RED")),
        (("spam", "ham"), ["0", "1"], ("spam", "ham")),
        (("LABEL_0", "LABEL_1"), ["0", "1"], ("0", "1")),
        (("spam", "ham"), ["red", "blue"], ("red", "blue")),
    ],
)
def test_labels_keep_the_model_s_names_where_they_fit(names, classes, kept):
    """Labels of the data follow the model's order, by their names."""
    model = named(*names)
    data = color_data(8, 8).cast_column("label", ClassLabel(names=classes))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rows = text_classes(model, tiny_tokenizer(), data, 16).train
    assert tuple(model.config.id2label.values()) == kept
    assert model.config.label2id == {name: label for label, name in enumerate(kept)}
    replaced = [row for row in caught if "they get the names of the data" in str(row.message)]
    assert len(replaced) == (kept == ("red", "blue"))
    turned = names == ("BLUE", "RED")
    expected = [1 - label if turned else label for label in data["train"]["label"]]
    assert [row["label"] for row in rows] == expected


def test_the_command_keeps_the_model_s_names_where_they_fit(tmp_path):
    model = BertForSequenceClassification.from_pretrained(tiny_folder(tmp_path))
    model.config.id2label = {0: "spam", 1: "ham"}
    model.save_pretrained(tmp_path)
    for classes, kept in (["0", "1"], "spam"), (["Ham", "Spam"], "spam"), (["a", "b"], "a"):
        assert load_classifier(str(tmp_path), classes, 0).config.id2label[0] == kept
    assert load_classifier(str(tmp_path), ["a", "b", "c"], 0).config.id2label[2] == "c"
