"""The data and batches of every task, and a training run of each."""

import re
from pathlib import Path

import datasets
import pytest
import torch
from datasets import DatasetDict, Value, concatenate_datasets
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor
from typer.testing import CliRunner

import qrefta
from qrefta.cli import app
from qrefta.train.arguments import training_arguments
from qrefta.train.tasks import load_images
from qrefta.train.tasks.image import image_classes
from tests.models import build, tiny_llama, tiny_vit


@pytest.fixture
def pictures(tmp_path):
    """Two classes of one-colored images, in folders."""
    for split, count in (("train", 12), ("test", 4)):
        for name in ("red", "blue"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                color = (200 + index, 0, 0) if name == "red" else name
                Image.new("RGB", (20, 24), color).save(folder / f"{index}.png")
    return tmp_path


def test_pictures_come_from_folders(pictures):
    """Grey images get three equal channels."""
    Image.new("L", (20, 24), 90).save(pictures / "train" / "blue" / "0.png")
    data = load_images(pictures, 0)
    assert {name: len(part) for name, part in data.items()} == {"train": 24, "test": 8}
    model = tiny_vit()
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match="3 labels and the data 2 classes"):
        image_classes(model, processor, data)
    model.config.num_labels = 2
    recipe = image_classes(model, processor, data)
    batch = recipe.collate([recipe.train[0], recipe.train[23]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 1]
    assert torch.isfinite(batch["pixel_values"]).all()


def test_a_folder_is_read_and_not_one_that_fits_its_name_as_a_pattern(tmp_path):
    for name, color in (("pictures1", "blue"), ("pictures[1]", "red")):
        for kind in ("a", "b"):
            folder = tmp_path / name / "train" / kind
            folder.mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (4, 4), color).save(folder / f"{index}.png")
    data = load_images(tmp_path / "pictures[1]", 0)
    assert data["train"][0]["image"].getpixel((0, 0)) == (255, 0, 0)


def paint(folder, *names):
    """One small image of each name, in folders that are made for them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(folder / name)


def names_of(part):
    """The file of each image and the name of its class."""
    classes = part.features["label"].names
    rows = part.cast_column("image", datasets.Image(decode=False))
    return {Path(row["image"]["path"]).name: classes[row["label"]] for row in rows}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("TRAIN", "TEST"),
        ("Training", "Testing"),
        ("train", "Val"),
        ("train", "Validation"),
    ],
)
def test_images_of_a_test_folder_are_tested_on_in_any_letters(train, test, tmp_path):
    paint(tmp_path, f"{train}/cat/a.png", f"{train}/dog/b.png", f"{test}/cat/c.png")
    data = load_images(tmp_path, 0)
    assert names_of(data["train"]) == {"a.png": "cat", "b.png": "dog"}
    assert names_of(data["test"]) == {"c.png": "cat"}


def test_images_of_a_test_folder_inside_a_class_are_tested_on(tmp_path):
    paint(tmp_path, "cat/train/a.png", "cat/test/b.png", "dog/train/c.png", "dog/test/d.png")
    data = load_images(tmp_path, 0)
    assert names_of(data["train"]) == {"a.png": "cat", "c.png": "dog"}
    assert names_of(data["test"]) == {"b.png": "cat", "d.png": "dog"}


def test_a_damaged_image_is_named(pictures):
    file = pictures / "train" / "blue" / "0.png"
    file.write_bytes(file.read_bytes()[:-30])
    model = tiny_vit()
    model.config.num_labels = 2
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    recipe = image_classes(model, processor, load_images(pictures, 0))
    message = (
        rf"An image of the train split cannot be read \({re.escape(str(file))}\): .*Replace it"
    )
    with pytest.raises(ValueError, match=message):
        recipe.train[:]


def test_hidden_files_are_no_images(tmp_path):
    """Such as the copies that macOS and notebooks leave."""
    paint(tmp_path, "train/cat/a.png", "train/dog/b.png", "test/dog/c.png")
    paint(tmp_path, ".cache/d.png", "train/.thumbs/e.png", "train/cat/._f.png")
    data = load_images(tmp_path, 0)
    assert names_of(data["train"]) == {"a.png": "cat", "b.png": "dog"}


def grey(mode, *levels):
    """An image of one row, in a mode of one channel."""
    image = Image.new(mode, (len(levels), 1))
    for column, level in enumerate(levels):
        image.putpixel((column, 0), level)
    return image


def two_classes(folder, image, ending):
    """Images in two classes, of which one is given."""
    paint(folder, "cat/a.png", "cat/b.png", "dog/c.png")
    image.save(folder / "dog" / f"d{ending}")
    model = tiny_vit()
    model.config.num_labels = 2
    data = load_images(folder, 0)
    part = concatenate_datasets([data["train"], data["test"]])
    processor = ViTImageProcessor(do_resize=False, do_normalize=False)
    return image_classes(model, processor, DatasetDict({"train": part, "test": part}))


@pytest.mark.parametrize(
    ("mode", "ending"), [("I;16", ".png"), ("I;16", ".tif"), ("I;16B", ".tif")]
)
def test_images_of_16_bits_are_not_white(mode, ending, tmp_path):
    recipe = two_classes(tmp_path, grey(mode, 0, 257, 32896, 65535), ending)
    wide = next(row["pixel_values"] for row in recipe.train if row["pixel_values"].shape[1] == 1)
    assert (wide * 255).round()[:, 0].tolist() == [[0, 1, 128, 255]] * 3


@pytest.mark.parametrize(("mode", "level"), [("F", 0.5), ("I", 70000)])
def test_images_of_an_unknown_range_are_refused(mode, level, tmp_path):
    recipe = two_classes(tmp_path, grey(mode, level), ".tif")
    message = rf"The train split, row \d, is an image in the mode {mode} \(.*d.tif\).* 8 or 16 bits"
    with pytest.raises(ValueError, match=message):
        list(recipe.train)


def test_a_class_is_the_first_folder_below_the_split(tmp_path):
    paint(tmp_path, "train/cat/2021/a.png", "train/cat/2022/b.png", "train/dog/2021/c.png")
    paint(tmp_path, "test/dog/2022/d.png")
    data = load_images(tmp_path, 0)
    assert names_of(data["train"]) == {"a.png": "cat", "b.png": "cat", "c.png": "dog"}
    assert names_of(data["test"]) == {"d.png": "dog"}


def test_a_class_of_test_images_alone_is_refused(tmp_path):
    paint(tmp_path, "train/cat/a.png", "train/dog/b.png", "test/cat/c.png", "test/cow/d.png")
    message = r"The test split has labels \['cow'\] that are no class of training"
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, 0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["0.png", "1.png"], "0.png is in no folder of a class"),
        (["train/cat/a.png", "train/dog/b.png", "test/c.png"], "c.png is in no folder of a class"),
        (["cat/a.png", "cat/b.png"], r"has images of one class, \['cat'\].* CLASS/IMAGE"),
        (["data/train/cat/a.png", "data/train/dog/b.png"], r"of one class, \['data'\]"),
        (
            ["car/a.png", "plane/b.png", "train/c.png"],
            r"the folder 'train' has the name of a split, and 'car' beside it has not",
        ),
        (["cat/a.png", "dog/b.png", "test/cat/c.png"], "'test' has the name of a split, and 'cat'"),
        (["test/cat/a.png", "test/dog/b.png"], "has images to test on and none to train on"),
    ],
)
def test_folders_that_are_no_classes_are_refused_with_the_fix(files, message, tmp_path):
    paint(tmp_path, *files)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, 0)


def test_a_table_of_images_is_read(pictures, tmp_path):
    """With classes, or with their names as text."""
    data = load_images(pictures, 0)
    for name, part in data.items():
        part.to_parquet(tmp_path / f"{name}.parquet")
    names = data["train"].features["label"].names
    named = (
        data["train"]
        .cast_column("label", Value("string"))
        .map(lambda row: {"label": names[int(row["label"])]})
    )
    named.to_parquet(tmp_path / "named.parquet")
    part = load_images(tmp_path / "train.parquet", 0)["train"]
    assert part.features["label"].names == ["blue", "red"]
    assert part[0]["image"].size == (20, 24)
    part = load_images(tmp_path / "named.parquet", 0)["train"]
    assert {(row["label"], row["image"].getpixel((0, 0))[2]) for row in part} == {(0, 255), (1, 0)}


def test_a_folder_of_tables_of_images_is_read(pictures, tmp_path):
    (tmp_path / "tables").mkdir()
    for name, part in load_images(pictures, 0).items():
        part.to_parquet(tmp_path / "tables" / f"{name}.parquet")
    data = load_images(tmp_path / "tables", 0)
    assert {name: len(part) for name, part in data.items()} == {"train": 24, "test": 8}


@pytest.mark.parametrize("source", ["train.csv", "."])
def test_a_table_of_file_names_is_refused_with_the_fix(source, tmp_path):
    (tmp_path / "train.csv").write_text("image,label\na.png,cat\nb.png,dog\n")
    message = "needed are image, and label.* column image holds .*, not images.* CLASS/IMAGE"
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / source, 0)


@pytest.mark.parametrize("folders", [("train", "validation"), ("", "")])
def test_labels_of_images_are_read_from_a_metadata_file(folders, tmp_path):
    for folder in folders:
        paint(tmp_path / folder, *(f"{number}.png" for number in range(8)))
        rows = "".join(f"{number}.png,{'cat' if number % 2 else 'dog'}\n" for number in range(8))
        (tmp_path / folder / "metadata.csv").write_text(f"file_name,label\n{rows}")
    data = load_images(tmp_path, 0)
    assert data["train"].features["label"].names == ["cat", "dog"]
    assert set(data["train"].column_names) == {"image", "label"}
    if folders[0]:
        assert [len(data["train"]), len(data["test"])] == [8, 8]
        assert sorted(data["test"]["label"]) == [0] * 4 + [1] * 4


def test_metadata_beside_a_split_with_capital_letters_are_refused(tmp_path):
    paint(tmp_path / "Train", "a.png", "b.png")
    (tmp_path / "Train" / "metadata.csv").write_text("file_name,label\na.png,cat\nb.png,dog\n")
    with pytest.raises(ValueError, match="Name it 'train'"):
        load_images(tmp_path, 0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name,label\na.png,cat\nb.png,dog\n", "need the column file_name"),
        ("file_name,text\na.png,cat\nb.png,dog\n", "needed are image, and label"),
    ],
)
def test_metadata_without_a_needed_column_are_refused(table, message, tmp_path):
    paint(tmp_path, "train/a.png", "train/b.png")
    (tmp_path / "train" / "metadata.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, 0)


def test_pictures_beside_tables_of_images_are_not_trained_on(tmp_path):
    """As in the clone of a data set with a picture for its page."""
    paint(tmp_path, "assets/figure.png", "docs/figure.png")
    rows = {"image": [Image.new("RGB", (4, 4))] * 4, "label": ["cat", "dog"] * 2}
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.warns(UserWarning, match="2 image files, such as .*figure.png, which are not"):
        data = load_images(tmp_path, 0)
    assert data["train"].features["label"].names == ["cat", "dog"]


def test_a_single_picture_with_the_name_of_a_split_is_named(tmp_path):
    paint(tmp_path, "a/1.png", "a/test1.png", "b/1.png")
    with pytest.raises(ValueError, match=r"such as .*test1\.png"):
        load_images(tmp_path, 0)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.doc").write_text("no image")
    with pytest.raises(ValueError, match=r"holds no images and no table of them.* CLASS/IMAGE"):
        load_images(tmp_path, 0)


@pytest.mark.parametrize("label", [-1, None])
def test_images_without_a_label_are_refused_with_their_row(label, pictures):
    """Unlabelled test splits of the hub have -1."""
    data = load_images(pictures, 0)
    model = tiny_vit()
    model.config.num_labels = 2
    labels = [0, label, 1, label]
    part = data["test"].select(range(4)).remove_columns("label").add_column("label", labels)
    data["test"] = part.cast_column("label", data["train"].features["label"])
    message = rf"The test split, row 2, has the label {label}; .* 0 to 1 \(2 of 4 rows\)"
    with pytest.raises(ValueError, match=message):
        image_classes(model, ViTImageProcessor(), data)


# Training


@pytest.mark.slow
def test_running_text_is_learned(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("what is sky ? blue\n" * 200)
    model = qrefta.prepare(tiny_llama(), rank=48, refine=0)
    args = training_arguments(
        "lm",
        tmp_path / "out",
        learning_rate=3e-2,
        max_steps=24,
        per_device_train_batch_size=8,
        save_strategy="no",
        disable_tqdm=True,
    )
    result = qrefta.finetune(model, tokenizer, file, args=args, task="lm", max_length=16)
    assert result.test_loss < 2.1 < 4 < result.test_loss_before


@pytest.mark.slow
def test_images_are_learned_by_the_command(pictures, tmp_path):
    config = tiny_vit().config
    config.num_labels = 2
    build(ViTForImageClassification, config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    paths = [str(path) for path in (tmp_path / "vit", pictures, tmp_path / "out")]
    options = "--task image --rank 12 --refine 0 --max-steps 20 --batch-size 8 --learning-rate 0.01"
    command = ["finetune", *paths, *options.split()]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert shown.exit_code == 0
    assert "100.0%" in shown.output
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_an_unknown_task_is_refused(tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match="task is 'chat'; it must be one of classify, lm, sft, dpo, grpo, image"
    ):
        qrefta.finetune(tiny_llama(), tokenizer, "x", tmp_path, task="chat")
