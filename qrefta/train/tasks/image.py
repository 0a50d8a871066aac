"""Classes of images."""

import glob
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, DatasetDict, load_dataset
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from qrefta.train.data import pick_splits, with_test
from qrefta.train.tasks.classify import accuracy, check_labels, name_labels
from qrefta.train.tasks.recipe import TEST_SHARE, Recipe

_IMAGE_COLUMNS = {"img": "image", "labels": "label", "fine_label": "label"}


def load_images(source: str | Path, seed: int) -> DatasetDict:
    """Images with the splits train and test, columns image and label.

    The source is a folder with one folder a class, or a hub name.

    Raises:
        ValueError: if the columns image and label are missing.
    """
    if Path(source).is_dir():
        # datasets reads [, * and ? in a name as a pattern
        splits = load_dataset("imagefolder", data_dir=glob.escape(str(source)))
    else:
        name, _, config = str(source).partition(":")
        splits = load_dataset(name, config or None)
    parts = pick_splits(splits, source)
    columns = parts["train"].column_names
    renamed = {old: new for old, new in _IMAGE_COLUMNS.items() if old in columns}
    parts = parts.rename_columns(renamed)
    features = parts["train"].features
    if "image" not in features or not isinstance(features.get("label"), ClassLabel):
        raise ValueError(
            f"{source} has the columns {list(features)}; needed are image, and label with classes."
        )
    return with_test(parts.select_columns(["image", "label"]), TEST_SHARE, seed)


def image_classes(
    model: PreTrainedModel, processor: BaseImageProcessor, data: DatasetDict, max_length: int = 0
) -> Recipe:
    """Image classification; the metric is accuracy.

    Images are read when they are needed; `max_length` is not used.

    Raises:
        ValueError: if the classes of the data are not the labels of the model, or a row has none.
    """
    check_labels(model, data)
    data = name_labels(model, data)

    def pixels(rows: dict[str, list[Any]]) -> dict[str, Any]:
        colored = [image.convert("RGB") for image in rows["image"]]
        values = processor(colored, return_tensors="pt")["pixel_values"]
        return {"pixel_values": values, "label": rows["label"]}

    return Recipe(
        data["train"].with_transform(pixels),
        data["test"].with_transform(pixels),
        collate=_stack,
        metrics=accuracy,
        scores={"accuracy": "accuracy"},
        mean_loss=True,
    )


def _stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of images."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }
