"""The image task: a pre-trained ViT, and images of the classes that it does not know."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, ViTForImageClassification

from eval.peers.named import calibration
from eval.rows import read
from eval.studies.accuracy import Cell, measure
from eval.tasks import image
from eval.tasks.image import (
    NAMES,
    augment,
    collate,
    decode,
    image_task,
    load_vit,
    new_vit,
    normalise,
    read_split,
    score,
)
from eval.tasks.task import Sizes, in_order
from tests.models import VOCAB, build, encoder_sizes

SIZES = Sizes(train=64, validation=16, test=20)
KNOWN = NAMES[:6]
NEW = NAMES[6:]


def photos(count, seed, side=32):
    """JPEG files and labels: a colour per class with noise, all classes in turn."""
    rng = np.random.default_rng(seed)
    colors = np.indices((3, 3, 2)).reshape(3, -1).T[4:14] * (100, 100, 200)
    files = []
    labels = [index % len(NAMES) for index in range(count)]
    for label in labels:
        pixels = np.clip(colors[label] + rng.normal(0, 20, (side, side, 3)), 0, 255).astype(
            np.uint8
        )
        file = BytesIO()
        Pillow.fromarray(pixels).save(file, "jpeg", quality=90)
        files.append(file.getvalue())
    return {"jpeg": files, "label": labels}


def write(folder, train, test):
    folder.mkdir()
    for name, columns in (("train", train), ("test", test)):
        Dataset.from_dict(columns).to_parquet(folder / f"{name}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(
        tmp_path_factory.mktemp("data") / "cifar10", photos(400, seed=1), photos(100, seed=2)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained tiny ViT with six class names."""
    folder = str(tmp_path_factory.mktemp("model"))
    new_vit(KNOWN, hidden=32, layers=2, patch=16, seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def task(source, model):
    return image_task("cifar10", source, model, None, SIZES, 0)


def run(source, out, **options):
    settings = {
        "data": Path(source).parent,
        "classes": "0,1,2,3,4,5",
        "steps": 40,
        "batch_size": 32,
        "learning_rate": 3e-3,
        "hidden": 32,
        "layers": 2,
        "patch": 16,
        "seed": 0,
        "threads": 1,
        "rows": None,
    }
    image.run(out, **settings | options)


def test_pretraining_learns_saves_and_reports(source, tmp_path):
    """Guessing has accuracy 1/6; the reloaded model has the accuracy of the row."""
    file = tmp_path / "rows.jsonl"
    out = tmp_path / "vit"
    run(source, out, rows=file)
    (row,) = read(file)
    assert [row[key] for key in ("study", "kind", "steps", "images", "n", "seed", "metric")] == [
        "pretraining",
        "vit",
        40,
        240,
        60,
        0,
        "accuracy",
    ]
    assert row["classes"] == list(KNOWN)
    assert row["value"] > 0.6
    assert row["train_s"] > 0
    saved = ViTForImageClassification.from_pretrained(out, use_safetensors=True)
    assert list(saved.config.id2label.values()) == list(KNOWN)
    assert score(saved, decode(read_split(source, "test", range(6)))) == row["value"]


def test_pretraining_depends_on_its_seed_alone(source, tmp_path):
    state = torch.get_rng_state()
    weights = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        run(source, tmp_path / name, steps=2, seed=seed)
        weights.append(ViTForImageClassification.from_pretrained(tmp_path / name).vit.state_dict())
    assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert not torch.equal(*(found["embeddings.cls_token"] for found in weights[1:]))
    assert torch.equal(torch.get_rng_state(), state)


def test_augmented_images_are_shifted_over_black_and_flipped():
    """Each image is one of the 2 x 9 x 9 cuts, and many images give all cuts."""
    pixels = torch.randint(
        1, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    padded = np.pad(pixels[0].numpy(), ((0, 0), (4, 4), (4, 4)))
    cuts = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    ways = {cut[..., ::step].tobytes() for cut in cuts for step in (1, -1)}
    found = augment(pixels.expand(2000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert found.dtype == torch.uint8
    assert {one.tobytes() for one in found.numpy()} == ways
    assert len(ways) == 162


def test_images_of_a_batch_are_augmented_each_by_itself():
    pixels = torch.arange(1, 41, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    found = augment(pixels, torch.Generator().manual_seed(0))
    assert_close(found.amax((1, 2, 3)), pixels[:, 0, 0, 0])
    assert len({(one > 0).numpy().tobytes() for one in found}) > 20


def test_normalised_images_have_no_mean_and_unit_deviation():
    """Two pixels, one deviation below and above the mean of each channel."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (image.MEAN, image.STD))
    pixels = 255 * (mean + std * torch.tensor([[-1.0, 1.0]]))[None]
    assert_close(normalise(pixels), torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 2))


def test_the_task_holds_the_classes_that_the_model_does_not_know(source, model):
    """All rows of frog .. truck, numbered 0 .. 3, with the pixels that Pillow decodes."""
    task = image_task(
        "cifar10", source, model, None, Sizes(train=10**6, validation=16, test=10**6), 0
    )
    files = photos(100, seed=2)
    expected = sorted(
        (label - 6, np.asarray(Pillow.open(BytesIO(file))).transpose(2, 0, 1).tobytes())
        for file, label in zip(files["jpeg"], files["label"])
        if label >= 6
    )
    assert sorted(zip(task.test["labels"], task.test["pixel_values"])) == expected
    assert len(task.train) + len(task.validation) == 160
    assert set(task.train["labels"]) == {0, 1, 2, 3}
    assert list(task.model(0).config.id2label.values()) == list(NEW)


def test_splits_share_no_row_and_have_the_sizes_asked_for(task):
    train, validation, test = (
        set(rows["pixel_values"]) for rows in (task.train, task.validation, task.test)
    )
    assert [len(train), len(validation), len(test)] == [64, 16, 20]
    assert not train & validation
    assert not (train | validation) & test


def test_seeds_draw_training_rows_and_share_the_test_rows(source, model, task):
    other, again = (image_task("cifar10", source, model, None, SIZES, seed) for seed in (1, 0))
    assert again.train["pixel_values"][:] == task.train["pixel_values"][:]
    assert other.train["pixel_values"][:] != task.train["pixel_values"][:]
    assert other.validation["pixel_values"][:] != task.validation["pixel_values"][:]
    assert other.test["pixel_values"][:] == task.test["pixel_values"][:]


def test_a_model_that_names_no_class_is_trained_on_all(source, tmp_path):
    new_vit([f"LABEL_{index}" for index in range(4)], 32, 2, 16, seed=0).save_pretrained(tmp_path)
    task = image_task(
        "cifar10", source, str(tmp_path), None, Sizes(train=300, validation=16, test=100), 0
    )
    assert set(task.train["labels"]) == set(task.test["labels"]) == set(range(10))


def test_the_hubs_columns_give_the_same_task(source, model, task, tmp_path):
    """uoft-cs/cifar10 has an image column img, and label with names."""
    folder = tmp_path / "hub"
    folder.mkdir()
    features = Features(img=Image(), label=ClassLabel(names=list(NAMES)))
    for name in ("train", "test"):
        rows = Dataset.from_parquet(f"{source}/{name}.parquet").rename_column("jpeg", "img")
        rows.cast(features).to_parquet(folder / f"{name}.parquet")
    same = image_task("cifar10", str(folder), model, None, SIZES, 0)
    for split in ("train", "validation", "test"):
        assert getattr(same, split)[:] == getattr(task, split)[:]


def test_a_batch_is_the_images_normalised(task):
    rows = [task.test[index] for index in range(5)]
    batch = collate(rows)
    pixels = np.stack(
        [np.frombuffer(row["pixel_values"], np.uint8).reshape(3, 32, 32) for row in rows]
    )
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (image.MEAN, image.STD))
    assert_close(
        batch["pixel_values"], torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std)
    )
    assert_close(batch["labels"], torch.tensor([row["labels"] for row in rows]))


def test_batches_in_order_hold_every_row_once_an_epoch(task):
    order = in_order(task.train, 8, 8, 0)["pixel_values"][:]
    assert sorted(order) == sorted(task.train["pixel_values"])


def test_calibration_has_no_labels(task):
    batches = list(calibration(task))
    assert all(set(batch) == {"pixel_values"} for batch in batches)
    assert sum(len(batch["pixel_values"]) for batch in batches) == 64


@pytest.mark.parametrize("classes", [4, 6])
def test_the_head_is_fresh_and_the_rest_is_pretrained(model, classes):
    """This includes as many new classes as old ones, when the old head would fit."""
    old = ViTForImageClassification.from_pretrained(model)
    first, again, other = (load_vit(model, NAMES[-classes:], seed) for seed in (1, 1, 2))
    assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert_close(first.vit.state_dict(), old.vit.state_dict(), rtol=0, atol=0)
    assert first.classifier.weight.shape == (classes, 32)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert classes != 6 or not torch.equal(first.classifier.weight, old.classifier.weight)
    assert first.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_drawing_a_head_leaves_the_global_generator_alone(task):
    state = torch.get_rng_state()
    task.model(3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "method", ["head-only", "full", "lora r=2", "refta R=4", "refta R=4 calibrated"]
)
def test_methods_train_and_are_scored(task, method):
    row = measure(
        Cell(
            "score",
            "cifar10",
            "vit",
            method,
            1e-3,
            0,
            steps=3,
            batch_size=8,
            train_rows=64,
            validation_rows=16,
            test_rows=24,
            max_length=64,
        ),
        task,
    )
    assert (row["split"], row["n"], row["metric"]) == ("test", 20, "accuracy")
    assert 0 <= row["value"] <= 1
    assert row["head_parameters"] == 4 * 32 + 4
    assert (row["trained_parameters"] == row["head_parameters"]) == (method == "head-only")


def test_no_model_or_an_unfit_one_is_refused(source, tmp_path):
    with pytest.raises(
        ValueError, match=r"cifar10 needs --model.*python -m eval image --data FOLDER --out"
    ):
        image_task("cifar10", source, None, None, SIZES, 0)
    new_vit(NAMES[:9], 32, 2, 16, seed=0).save_pretrained(tmp_path / "all")
    with pytest.raises(
        ValueError, match=r"knows airplane, .*ship; leave out at least two with --classes"
    ):
        image_task("cifar10", source, str(tmp_path / "all"), None, SIZES, 0)
    text = BertConfig(
        vocab_size=VOCAB, max_position_embeddings=64, num_labels=2, **encoder_sizes(32)
    )
    build(BertForSequenceClassification, text).save_pretrained(tmp_path / "text")
    with pytest.raises(
        ValueError, match=r"takes image_size no images; cifar10 needs 32; .*eval image"
    ):
        image_task("cifar10", source, str(tmp_path / "text"), None, SIZES, 0)


def test_missing_data_are_asked_for(model, tmp_path):
    wanted = "Give a folder with train.parquet and test.parquet, or uoft-cs/cifar10"
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=f"no images in {place}.*{wanted}"):
            image_task("cifar10", str(place), model, None, SIZES, 0)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (photos(100, 0), "has 40 training rows of these classes and 64 are put aside"),
        (photos(6, 0), r"train: there is no image of frog, horse, ship, truck\."),
        (
            photos(100, 0, side=28),
            r"images of \(height, width\) \[\(28, 28\)\]; all must be 32 x 32",
        ),
        ({"jpeg": [b""], "label": [77]}, "labels are 77 .. 77; CIFAR-10 has 0 .. 9"),
        (
            {"picture": [b""], "label": [7]},
            r"the columns are \['picture', 'label'\]; label and jpeg or img are required",
        ),
        ({"img": [b""]}, r"the columns are \['img'\]; label and"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(model, tmp_path, train, message):
    source = write(tmp_path / "bad", train, photos(100, 0))
    with pytest.raises(ValueError, match=message):
        image_task("cifar10", source, model, None, Sizes(train=64, validation=64, test=20), 0)


@pytest.mark.parametrize("classes", ["0", "0,0,1", "1,10", "bird,cat", ""])
def test_classes_that_cannot_be_trained_on_are_refused(source, tmp_path, classes):
    with pytest.raises(
        ValueError, match=f"classes is '{classes}'; give at least two different numbers in 0 .. 9"
    ):
        run(source, tmp_path / "vit", classes=classes)


def test_a_patch_that_does_not_tile_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="patch is 5; it must divide 32"):
        run(source, tmp_path / "vit", patch=5)
    assert not (tmp_path / "vit").exists()
