"""Classes of images."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from qrefta.files.tables import BUILDERS, find_column, kind_of
from qrefta.train.data import Loaded, is_saved, read_splits, visible_files, with_test
from qrefta.train.labels import encode_labels
from qrefta.train.mean_loss import LossByRows
from qrefta.train.tasks.classify import accuracy, check_labels, name_labels
from qrefta.train.tasks.image_folders import (
    LAYOUT,
    has_metadata,
    image_files,
    read_image_folder,
    read_with_metadata,
)
from qrefta.train.tasks.recipe import Recipe

if TYPE_CHECKING:
    import PIL.Image

_COLUMNS = {"image": ("image", "img"), "label": ("label", "labels", "fine_label")}


def load_images(source: str | Path, seed: int) -> Loaded:
    """Images with the splits train and test, columns image and label.

    The source is a folder with one folder a class, or with metadata files (metadata.csv with
    file_name and label), tables of images (parquet), or a hub name.

    Raises:
        ValueError: if the columns image and label are missing, or as `read_image_folder`,
            `read_with_metadata` and `qrefta.train.data.load_classification`.
    """
    path = Path(source)
    if path.is_dir() and not is_saved(path):
        parts = _folder(path)
    else:
        parts = read_splits(source, shards=True)
    return labelled_images(parts, str(source), seed)


def labelled_images(parts: DatasetDict, source: str, seed: int) -> Loaded:
    """The splits of `load_images`, from splits with other columns.

    Args:
        parts: the split train and maybe test.
        source: name of the data, for errors.
        seed: of the choice of rows to test on.

    Raises:
        ValueError: as `load_images`.
    """
    for name, part in parts.items():
        part = _with_usual_names(part)
        _check_columns(part, source)
        parts[name] = part.select_columns([*_COLUMNS])
    return with_test(encode_labels(parts, source, "label"), "image", seed)


def _folder(path: Path) -> DatasetDict:
    """The splits of a folder of images or of tables of images."""
    files = visible_files(path)
    images = image_files(files)
    kinds = {kind_of(file) for file in files}
    if images and has_metadata(files):
        return read_with_metadata(path)
    if images and ".parquet" not in kinds:
        return read_image_folder(path, images)
    if images:
        warnings.warn(
            f"{path} has tables of images, which are read, and {len(images)} image files, such as "
            f"{images[0]}, which are not.",
            stacklevel=3,
        )
    elif not kinds & BUILDERS.keys():
        raise ValueError(
            f"{path} holds no images and no table of them; needed are images as {LAYOUT}."
        )
    return read_splits(path, shards=True)


def _with_usual_names(part: Dataset) -> Dataset:
    for name, usual in _COLUMNS.items():
        found = next(filter(None, (find_column(part, one) for one in usual)), name)
        if found != name:
            part = part.rename_column(found, name)
    return part


def _check_columns(part: Dataset, source: str | Path) -> None:
    """Refuse rows without images or labels."""
    features = part.features
    needed = f"{source} has the columns {list(features)}; needed are image, and label with classes"
    if not {*_COLUMNS} <= {*features}:
        raise ValueError(f"{needed}; or a folder of images, as {LAYOUT}.")
    if not isinstance(features["image"], Image):
        raise ValueError(
            f"{needed}, and the column image holds {features['image']}, not images. Give a folder "
            f"of images, as {LAYOUT}; or read them in Python, and give finetune the splits train "
            'and test: data.cast_column("image", datasets.Image()).class_encode_column("label")'
        )


def image_classes(
    model: PreTrainedModel, processor: BaseImageProcessor, data: DatasetDict, max_length: int = 0
) -> Recipe:
    """Image classification; the metric is accuracy.

    Images are read when they are needed; `max_length` is not used. Greyscale of 16 bits is scaled
    to 8; reading a row with another wide mode raises ValueError.

    Raises:
        ValueError: if the classes of the data are not the labels of the model, or a row has none.
    """
    check_labels(model, data)
    data = name_labels(model, data)

    return Recipe(
        _with_pixels(data["train"], processor, "train"),
        _with_pixels(data["test"], processor, "test"),
        LossByRows,
        collate=_stack,
        metrics=accuracy,
        scores={"accuracy": "accuracy"},
        mean_loss=True,
    )


def _with_pixels(part: Dataset, processor: BaseImageProcessor, split: str) -> Dataset:
    """The rows of a split as inputs of the model, computed when a row is read."""

    def pixels(rows: dict[str, list[Any]]) -> dict[str, Any]:
        colored: Any = [_colored(_opened(stored, split)) for stored in rows["image"]]
        if None in colored:
            raise _unknown_range(part, split)
        values = processor(colored, return_tensors="pt")["pixel_values"]
        return {"pixel_values": values, "label": rows["label"]}

    return part.cast_column("image", Image(decode=False)).with_transform(pixels)


def _opened(stored: dict[str, Any], split: str) -> "PIL.Image.Image":
    """The image of a row.

    Raises:
        ValueError: if it is damaged; it names the file, if there is one.
    """
    try:
        return Image().decode_example(stored)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow has no class for all of them
        place = stored["path"] or "one without a file"
        raise ValueError(
            f"An image of the {split} split cannot be read ({place}): {error}. Replace it, or "
            "remove the row."
        ) from error


def _colored(image: "PIL.Image.Image") -> "PIL.Image.Image | None":
    """An image as RGB in 8 bits a channel; None if the range of its values is not known."""
    from PIL.Image import fromarray  # the other tasks need no Pillow

    # Pillow may open a PNG of 16 bits in the mode I, which holds 32 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # by hand, since `convert` makes every level above 255 white
        levels = np.asarray(image).astype(np.float32) * (255 / 65535)
        image = fromarray(levels.round().astype(np.uint8))
    return None if image.mode in ("I", "F", "LAB") else image.convert("RGB")


def _unknown_range(part: Dataset, split: str) -> ValueError:
    """The error for the first image of a split that has no known range."""
    row, image = next(pair for pair in enumerate(part["image"], 1) if _colored(pair[1]) is None)
    file = getattr(image, "filename", "")
    return ValueError(
        f"The {split} split, row {row}, is an image in the mode {image.mode}"
        f"{f' ({file})' if file else ''}, whose darkest and brightest values are not known. Save "
        "it in 8 or 16 bits a channel, as RGB or greyscale."
    )


def _stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of images."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["label"] for row in rows]),
    }
