"""A folder of images -> the splits train and test, with the names of folders as classes."""

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from datasets.exceptions import DatasetGenerationError

from qrefta.train.data import (
    TEST_NAMES,
    TRAIN_NAMES,
    has_name,
    pick_splits,
    splits_by_name,
)

LAYOUT = "CLASS/IMAGE, or train/CLASS/IMAGE and validation/CLASS/IMAGE"
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of datasets' imagefolder


def image_files(files: Sequence[Path]) -> list[Path]:
    """The images among some files, by the endings of their names."""
    from PIL.Image import OPEN, registered_extensions  # the other tasks need no Pillow

    endings = registered_extensions()
    return [file for file in files if endings.get(file.suffix.lower()) in OPEN]


def read_image_folder(folder: Path, images: Sequence[Path]) -> DatasetDict:
    """The columns image and label of each split; images are read when they are needed.

    Splits are the folders in `folder`, where they have the names of splits. Else they are files and
    folders with such names anywhere below it. A class is the first folder below the split, or else
    the first folder.

    Args:
        folder: with one folder a class, or one a split.
        images: below it.

    Raises:
        ValueError: if an image is in no folder of a class, there is one class only, or some images
            are to test on and none to train on.
    """
    paths = {file: file.relative_to(folder).parts for file in images}
    depth = int(_has_split_folders(folder, list(paths.values())))
    words = {
        file: parts[:1] if depth else (*parts[:-1], file.stem) for file, parts in paths.items()
    }
    train, test = splits_by_name(words)
    if not train:
        raise ValueError(
            f"{folder} has images to test on and none to train on, by the names of files and "
            f"folders, such as {_first_held_out(words)}; needed are images as {LAYOUT}."
        )
    parts = DatasetDict()
    for name, files in {"train": train, "test": test}.items():
        if files:
            parts[name] = _labelled(files, [_class_of(paths[file], depth, file) for file in files])
    classes = parts["train"].features["label"].names
    if len(classes) < 2:
        raise ValueError(
            f"{folder} has images of one class, {classes}; needed are two or more, as {LAYOUT}. "
            "Give the folder that holds the folders of the classes or splits."
        )
    return parts


def has_metadata(files: Sequence[Path]) -> bool:
    """Whether there are files with the labels of images: metadata.csv with file_name."""
    return any(file.name in _METADATA for file in files)


def read_with_metadata(folder: Path) -> DatasetDict:
    """The splits of a folder of images, with the columns of its metadata files.

    Raises:
        ValueError: if a folder of a split has capital letters in its name, or a file is not read.
    """
    capitals = [
        child.name
        for child in folder.iterdir()
        if child.name != child.name.lower() and has_name(child.name, TRAIN_NAMES + TEST_NAMES)
    ]
    if capitals:  # datasets looks at case, and would train on all of them
        raise ValueError(
            f"{folder / capitals[0]} has capital letters, and images with metadata files are read "
            f"by datasets, which does not know it as a split. Name it {capitals[0].lower()!r}."
        )
    try:  # datasets reads [, * and ? in a name as a pattern
        splits = load_dataset("imagefolder", data_dir=glob.escape(str(folder)))
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(
            f"The metadata files in {folder} are not read: {error.__cause__ or error}. They need "
            "the column file_name, with paths of images from their own folder."
        ) from error
    return pick_splits(splits, folder)


def _has_split_folders(folder: Path, paths: list[tuple[str, ...]]) -> bool:
    """Whether the first folders of the images are splits.

    Raises:
        ValueError: if some are and some are not, so that a class may have the name of a split.
    """
    firsts = sorted({parts[0] for parts in paths if len(parts) > 1})
    splits = [name for name in firsts if has_name(name, TRAIN_NAMES + TEST_NAMES)]
    others = [name for name in firsts if name not in splits]
    if splits and others:
        raise ValueError(
            f"In {folder} the folder {splits[0]!r} has the name of a split, and {others[0]!r} "
            f"beside it has not. If they are classes, put all of them into {folder / 'train'}; "
            f"else put the images as {LAYOUT}."
        )
    return bool(splits)


def _first_held_out(words: Mapping[Path, Sequence[str]]) -> Path:
    """A file with the name of a test split in its path."""
    return next(file for file in words if any(has_name(word, TEST_NAMES) for word in words[file]))


def _class_of(parts: tuple[str, ...], depth: int, file: Path) -> str:
    if len(parts) < depth + 2:
        raise ValueError(f"{file} is in no folder of a class; needed are images as {LAYOUT}.")
    return parts[depth]


def _labelled(files: list[Path], names: list[str]) -> Dataset:
    """Rows of images with their classes, which are in alphabetical order."""
    classes = sorted(set(names))
    numbers = {name: number for number, name in enumerate(classes)}
    return Dataset.from_dict(
        {"image": [str(file) for file in files], "label": [numbers[name] for name in names]},
        Features({"image": Image(), "label": ClassLabel(names=classes)}),
    )
