"""The data and batches of every task, and a training run of each."""

import pytest
import torch
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


def test_a_folder_without_classes_is_refused(tmp_path):
    for index in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{index}.png")
    with pytest.raises(ValueError, match="needed are image, and label with classes"):
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
