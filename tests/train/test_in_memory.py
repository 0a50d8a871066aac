"""Data in memory and folders of `save_to_disk`, as `datasets` gives them: other splits and columns
than a task's loader returns.
"""

import copy
import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from transformers import ViTImageProcessor

import qrefta
from qrefta.train.data import Loaded, load_classification, pick_splits, read_splits
from qrefta.train.models import load_classifier
from qrefta.train.tasks import TASKS, load_chat, load_images, load_text
from tests.models import language_tokenizer, tiny_llama, tiny_vit
from tests.tiny import color_rows, tiny_folder, tiny_tokenizer
from tests.train.talk import chat_rows, pair_rows


def texts(names, rows):
    """Rows of text whose labels are numbers of these names."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    columns = {"text": [row["text"] for row in rows], "label": [row["label"] for row in rows]}
    columns["label"] = [names.index(["red", "blue"][label]) for label in columns["label"]]
    return Dataset.from_dict(columns, features=features)


def pictures(names, column="image"):
    """Dark and light images with labels of these names."""
    shades = {"dark": 20, "light": 230}
    rows = ["dark", "light"] * 8
    images = [np.full((8, 8, 3), shades[name], dtype=np.uint8) for name in rows]
    features = Features({column: Image(), "label": ClassLabel(names=names)})
    labels = [names.index(name) for name in rows]
    return Dataset.from_dict({column: images, "label": labels}, features=features)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("tiny"))
    return qrefta.prepare(load_classifier(str(folder), ["blue", "red"], seed=0), rank=8, refine=0)


def tuned(model, data, folder, task="classify", processor=None):
    settings = {"max_steps": 40, "learning_rate": 1e-2, "batch_size": 16, "progress": False}
    return qrefta.finetune(
        copy.deepcopy(model), processor or tiny_tokenizer(), data, folder, task=task, **settings
    )


def test_test_rows_keep_their_classes_when_their_split_numbers_them_otherwise(classifier, tmp_path):
    """The score was that of swapped classes."""
    train = texts(["blue", "red"], color_rows(64, seed=1))
    results = [
        tuned(
            classifier,
            DatasetDict(train=train, test=texts(names, color_rows(32, seed=2))),
            tmp_path / names[0],
        )
        for names in (["blue", "red"], ["red", "blue"])
    ]
    assert results[0].accuracy_after == results[1].accuracy_after > 0.9
    assert results[0].test_loss == results[1].test_loss


def test_pictures_keep_their_classes_too():
    data = DatasetDict(train=pictures(["dark", "light"]), test=pictures(["light", "dark"]))
    read = TASKS["image"].rows(data, "the data", 0)
    assert read["test"]["label"] == read["train"]["label"]
    assert read["test"].features["label"].names == ["dark", "light"]


@pytest.mark.parametrize("name", ["validation", "dev"])
def test_a_split_for_validation_is_tested_on(name):
    data = DatasetDict(
        {
            "train": Dataset.from_list(color_rows(20, seed=1)),
            name: Dataset.from_list(color_rows(7, seed=1)),
        }
    )
    read = TASKS["classify"].rows(pick_splits(data, "the data"), "the data", 0)
    assert {split: len(part) for split, part in read.items()} == {"train": 20, "test": 7}


def test_of_three_splits_the_one_for_validation_is_tested_on_as_of_a_data_set_on_the_hub():
    parts = {"train": 20, "validation": 5, "test": 7}
    data = DatasetDict(
        {name: Dataset.from_list(color_rows(n, seed=1)) for name, n in parts.items()}
    )
    counts = {name: len(part) for name, part in pick_splits(data, "the data").items()}
    assert counts == {"train": 20, "test": 5}


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_the_format_of_rows_does_not_matter(kind):
    """Labels of torch tensors were classes in the order of their text, 10 before 2."""
    rows = [{"text": f"red {n}", "label": n % 12} for n in range(24)]
    part = Dataset.from_list(rows).with_format(kind)
    data = DatasetDict(train=part, test=part)
    read = TASKS["classify"].rows(pick_splits(data, "the data"), "the data", 0)
    assert read["train"].features["label"].names == [str(n) for n in range(12)]
    assert read["train"]["label"] == [row["label"] for row in rows]


def test_rows_without_a_number_or_with_a_transform_are_refused_in_words():
    rows = Dataset.from_list(color_rows(8, seed=1))
    streamed = DatasetDict(train=rows.to_iterable_dataset())
    with pytest.raises(ValueError, match=r"the data \(train\) is a IterableDataset"):
        pick_splits(streamed, "the data")
    with pytest.raises(ValueError, match=r"the data \(train\) has a transform"):
        pick_splits(DatasetDict(train=rows.with_transform(lambda batch: batch)), "the data")


def test_read_splits_that_were_changed_are_read_again(tmp_path):
    """Their new columns were taken for read ones."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"w{n} w5 w6"}) + "\n" for n in range(8, 40)))
    data = load_text(file, 0)
    assert data.fits("lm")
    assert not data.fits("sft")
    data["test"] = Dataset.from_dict({"content": ["w5 w6 w7"] * 8})
    assert not data.fits("lm")
    model = qrefta.prepare(tiny_llama(), rank=2, refine=0, progress=False)
    settings = {"max_steps": 1, "max_length": 4, "progress": False}
    result = qrefta.finetune(
        model, language_tokenizer(), data, tmp_path / "out", task="lm", **settings
    )
    assert result.steps == 1
    with pytest.raises(ValueError, match=r"dataset \(train\)"):
        qrefta.finetune(model, language_tokenizer(), load_text(file, 0), tmp_path / "b", task="sft")


def test_a_folder_with_a_file_state_json_is_no_saved_data_set(tmp_path):
    Dataset.from_list(color_rows(20, seed=1)).to_csv(tmp_path / "train.csv")
    (tmp_path / "state.json").write_text("{}")
    assert len(load_classification(tmp_path)["train"]) == 18


@pytest.mark.parametrize(
    ("task", "rows"),
    [("classify", color_rows(40, seed=1)), ("sft", chat_rows(40)), ("dpo", pair_rows(40))],
)
def test_without_a_test_split_some_rows_are_held_out(task, rows):
    read = TASKS[task].rows(DatasetDict(train=Dataset.from_list(rows)), "the data", 0)
    assert isinstance(read, Loaded)
    assert {split: len(part) for split, part in read.items()} == {"train": 36, "test": 4}


def test_one_data_set_is_rows_to_train_on_and_to_hold_out(classifier, tmp_path):
    rows = Dataset.from_list(color_rows(64, seed=1))
    given = tuned(classifier, rows, tmp_path / "one")
    expected = tuned(classifier, DatasetDict(train=rows), tmp_path / "splits")
    assert (given.test_loss, given.train_loss) == (expected.test_loss, expected.train_loss)
    assert given.accuracy_after > 0.8


def test_columns_have_the_names_that_files_may_have(classifier, tmp_path):
    rows = [{"sentence": row["text"], "label": row["label"]} for row in color_rows(40, seed=1)]
    part = Dataset.from_list(rows)
    assert (
        tuned(classifier, DatasetDict(train=part, test=part), tmp_path / "a").accuracy_after > 0.9
    )
    images = pictures(["dark", "light"], column="img")
    read = TASKS["image"].rows(DatasetDict(train=images, test=images), "the data", 0)
    assert read["train"].column_names == ["image", "label"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": None, "label": 1}],
            r"rows without text: dataset \(test\), column text, row 1",
        ),
        ([{"text": "a", "label": 2}], r"labels \[2\] that are no class of training"),
        ([], "dataset has a split without rows"),
    ],
)
def test_unusable_rows_are_refused_with_their_place(rows, message, classifier, tmp_path):
    part = Dataset.from_list(color_rows(40, seed=1))
    test = Dataset.from_list(rows, features=part.features) if rows else part.select([])
    with pytest.raises(ValueError, match=message):
        tuned(classifier, DatasetDict(train=part, test=test), tmp_path / "out")
    with pytest.raises(ValueError, match="dataset has no splits"):
        tuned(classifier, DatasetDict(), tmp_path / "out")


@pytest.mark.parametrize("splits", [("train",), ("train", "validation")])
def test_folders_of_save_to_disk_are_read(splits, tmp_path):
    def saved(name, rows):
        parts = DatasetDict({split: Dataset.from_list(rows) for split in splits})
        (parts if len(splits) > 1 else parts["train"]).save_to_disk(tmp_path / name)
        return tmp_path / name

    rows = color_rows(40, seed=1)
    read = load_classification(saved("classes", rows))
    assert {row["text"] for row in read["train"]} <= {row["text"] for row in rows}
    assert len(load_chat(saved("chats", chat_rows(40)), 0)["train"]) == (36, 40)[len(splits) - 1]
    texts_read = load_text(saved("texts", [{"text": f"text {n}"} for n in range(40)]), 0)
    assert "text 7" in [*texts_read["train"]["text"], *texts_read["test"]["text"]]
    pictures(["dark", "light"]).save_to_disk(tmp_path / "pictures")
    assert load_images(tmp_path / "pictures", 0)["train"].features["label"].names == [
        "dark",
        "light",
    ]
    assert set(read_splits(tmp_path / "classes")) == {"train", "test"} & {
        "train",
        *(["test"] if len(splits) > 1 else []),
    }


def test_images_in_memory_train(tmp_path):
    model = qrefta.prepare(tiny_vit(), rank=4, refine=0)
    size = model.config.image_size
    processor = ViTImageProcessor(size={"height": size, "width": size})
    names = ["dark", "light", *(f"none {n}" for n in range(model.config.num_labels - 2))]
    data = DatasetDict(train=pictures(names), validation=pictures(names))
    assert tuned(model, data, tmp_path / "out", "image", processor).accuracy_after > 0.9
