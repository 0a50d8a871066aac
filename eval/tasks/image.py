"""Pre-train a small ViT on some classes of CIFAR-10; the image task fine-tunes it on the others.

Fine-tuning needs pre-trained weights and a new task. The classes that pre-training leaves out
(CIFAR-10, Krizhevsky 2009: ten classes, colour images of 32 x 32) are a new task without a download
of weights. The model's config names its classes, and `image_task` takes the rest.
"""

import time
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from datasets import Dataset, Image, load_dataset
from PIL import Image as Pillow
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    get_cosine_schedule_with_warmup,
)

from eval.rows import append
from eval.tasks.task import Sizes, Task, find_data
from qrefta.cli import guarded, quiet_libraries

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
COLUMNS = ("jpeg", "img")  # encoded images: in packed JPEG files, in uoft-cs/cifar10 on the hub
MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10's training images: red, green, blue in 0 .. 1
STD = (0.2470, 0.2435, 0.2616)
SHIFT = 4
WEIGHT_DECAY = 0.05
HOW = "`python -m eval image --data FOLDER --out runs/vit` pre-trains one"
console = Console()


class Images(NamedTuple):
    """Decoded images: pixels uint8 (images, 3, 32, 32); labels int64 (images)."""

    pixels: Tensor
    labels: Tensor


def run(
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of data, with cifar10/; default: $QREFTA_DATA.")
    ] = None,
    classes: Annotated[
        str, typer.Option(help="Classes to train on: numbers 0 .. 9, separated by commas.")
    ] = "0,1,2,3,4,5",
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 1200,
    batch_size: Annotated[int, typer.Option(help="Images per step.", min=1)] = 64,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    hidden: Annotated[
        int, typer.Option(help="Width; one attention head per 32, MLPs of four times the width.")
    ] = 128,
    layers: Annotated[int, typer.Option(help="Blocks.")] = 6,
    patch: Annotated[int, typer.Option(help="Side of a patch in pixels.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and augmentation.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Pre-train a ViT, score it on the test images of the same classes, and save it."""
    quiet_libraries()
    torch.set_num_threads(threads)
    chosen = parse_classes(classes)
    source = find_data("cifar10", data)
    train, test = (decode(read_split(source, split, chosen)) for split in ("train", "test"))
    model = new_vit([NAMES[index] for index in chosen], hidden, layers, patch, seed)
    start = time.perf_counter()
    pretrain(model, train, steps, batch_size, learning_rate, seed)
    train_s = time.perf_counter() - start
    value = score(model, test)
    model.save_pretrained(out)
    console.print(
        f"{', '.join(model.config.id2label.values())}: test accuracy {value:.4f}, {train_s:.0f} "
        f"s, in {out}"
    )
    if rows is not None:
        row = {
            "study": "pretraining",
            "kind": "vit",
            "classes": list(model.config.id2label.values()),
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "images": len(train.labels),
            "parameters": model.num_parameters(),
            "metric": "accuracy",
            "value": value,
            "n": len(test.labels),
            "train_s": train_s,
        }
        append(rows, [row], seed=seed)


def parse_classes(text: str) -> list[int]:
    """Class numbers in rising order.

    Raises:
        ValueError: if they are not at least two different numbers in 0 .. 9.
    """
    words = [word.strip() for word in text.split(",")]
    if not set(words) <= set(map(str, range(len(NAMES)))) or not len(words) == len(set(words)) >= 2:
        raise ValueError(
            f"classes is {text!r}; give at least two different numbers in 0 .. {len(NAMES) - 1}, "
            f"separated by commas"
        )
    return sorted(map(int, words))


def read_split(source: str, split: str, classes: Sequence[int]) -> Dataset:
    """The rows of some classes: column image (encoded bytes), and labels numbered like `classes`.

    Args:
        source: a folder with train.parquet and test.parquet (columns label, and jpeg or img) or hub
            name.
        split: train or test.
        classes: class numbers in rising order.

    Raises:
        ValueError: if the data, columns or classes are missing.
    """
    rows = _load(source, split)
    column = next((name for name in COLUMNS if name in rows.column_names), None)
    if column is None or "label" not in rows.column_names:
        raise ValueError(
            f"{source}, {split}: the columns are {rows.column_names}; label and "
            f"{' or '.join(COLUMNS)} are required."
        )
    labels = np.asarray(rows["label"][:])
    if not set(labels.tolist()) <= set(range(len(NAMES))):
        raise ValueError(
            f"{source}, {split}: labels are {labels.min()} .. {labels.max()}; CIFAR-10 has 0 .. 9."
        )
    kept = np.flatnonzero(np.isin(labels, classes))
    if not len(kept):
        raise ValueError(
            f"{source}, {split}: there is no image of "
            f"{', '.join(NAMES[index] for index in classes)}."
        )
    encoded = (
        rows.select_columns([column])
        .rename_column(column, "image")
        .cast_column("image", Image(decode=False))
    )
    return encoded.select(kept).add_column("labels", np.searchsorted(classes, labels[kept]))


def decode(rows: Dataset) -> Images:
    """The decoded images of rows of `read_split`.

    Raises:
        ValueError: if an image is not 32 x 32.
    """
    decoded = [
        np.asarray(Pillow.open(BytesIO(image["bytes"])).convert("RGB"))
        for image in rows["image"][:]
    ]
    others = {image.shape[:2] for image in decoded} - {(SIDE, SIDE)}
    if others:
        raise ValueError(
            f"There are images of (height, width) {sorted(others)[:3]}; all must be {SIDE} x "
            f"{SIDE}."
        )
    pixels = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(rows["labels"][:]))


def normalise(pixels: Tensor) -> Tensor:
    """uint8 images (images, 3, height, width) as float32 with mean 0 and deviation 1."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Images (uint8) shifted by up to 4 pixels over black and randomly flipped."""
    images = len(pixels)
    padded = nn.functional.pad(pixels, [SHIFT] * 4)
    down, right = torch.randint(2 * SHIFT + 1, (2, images, 1), generator=generator)
    flipped = torch.rand(images, 1, generator=generator) < 0.5
    places = torch.arange(SIDE)
    y = down + places
    x = right + torch.where(flipped, places.flip(0), places)
    return padded[
        torch.arange(images)[:, None, None, None],
        torch.arange(3)[:, None, None],
        y[:, None, :, None],
        x[:, None, None],
    ]


def new_vit(
    names: Sequence[str], hidden: int, layers: int, patch: int, seed: int
) -> ViTForImageClassification:
    """A ViT with random weights from `seed` and class names in its config.

    Raises:
        ValueError: if the patch size does not divide the image size.
    """
    if patch < 1 or SIDE % patch:
        raise ValueError(f"patch is {patch}; it must divide {SIDE}")
    config = ViTConfig(
        image_size=SIDE,
        patch_size=patch,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 32),
        intermediate_size=4 * hidden,
        **_labels(names),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViTForImageClassification(config)


def pretrain(
    model: PreTrainedModel,
    images: Images,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train in place with AdamW: a tenth of the steps warms up, then a cosine to 0."""
    generator = torch.Generator().manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = get_cosine_schedule_with_warmup(optimizer, ceil(steps / 10), steps)
    count = len(images.labels)
    epochs = [
        torch.randperm(count, generator=generator) for _ in range(ceil(steps * batch_size / count))
    ]
    losses = []
    for step, batch in enumerate(
        torch.cat(epochs)[: steps * batch_size].view(steps, batch_size), start=1
    ):
        pixels = normalise(augment(images.pixels[batch], generator).to(device))
        loss = model(pixel_values=pixels, labels=images.labels[batch].to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % ceil(steps / 10) == 0:
            console.print(f"step {step}: loss {np.mean(losses[-ceil(steps / 10) :]):.4f}")


@torch.no_grad()
def score(model: PreTrainedModel, images: Images) -> float:
    """Accuracy on images."""
    model.eval()
    found = [
        model(pixel_values=normalise(pixels.to(model.device))).logits.argmax(-1).cpu()
        for pixels in images.pixels.split(256)
    ]
    return float((torch.cat(found) == images.labels).double().mean())


def image_task(
    name: str, source: str, model: str | None, header: list[str] | None, sizes: Sizes, seed: int
) -> Task:
    """Image classification on the classes that a model was not pre-trained on.

    Training and validation rows are drawn with `seed` from the training split. All seeds share the
    test rows. Only drawn images are decoded. A row holds its pixels as 3,072 bytes, so `collate`
    makes a batch of 32 in under a millisecond; nested lists would take 15.

    Args:
        name: name of the task, for messages.
        source: see `read_split`.
        model: folder or hub name of a classifier of 32 x 32 images; its config names its classes.
        header: not used, because parquet files name their columns.
        sizes: most rows of each part; the length is not used.
        seed: seed of training and validation rows.

    Raises:
        ValueError: if the model or data are missing, or the model does not fit.
    """
    if model is None:
        raise ValueError(f"{name} needs --model, a classifier of {SIDE} x {SIDE} images; {HOW}.")
    config = AutoConfig.from_pretrained(model)
    if getattr(config, "image_size", None) != SIDE:
        size = getattr(config, "image_size", "no images")
        raise ValueError(f"{model} takes image_size {size}; {name} needs {SIDE}; {HOW}.")
    classes = [index for index, known in enumerate(NAMES) if known not in config.id2label.values()]
    if len(classes) < 2:
        raise ValueError(
            f"{model} knows {', '.join(config.id2label.values())}; leave out at least two with "
            f"--classes."
        )
    train = _draw(read_split(source, "train", classes), sizes.train + sizes.validation, seed)
    test = _draw(read_split(source, "test", classes), sizes.test, 0)
    if len(train) <= sizes.validation:
        raise ValueError(
            f"{source} has {len(train)} training rows of these classes and {sizes.validation} are "
            f"put aside to choose "
            "a learning rate; give more rows or a smaller --validation-rows."
        )
    return Task(
        train=train.select(range(sizes.validation, len(train))),
        validation=train.select(range(sizes.validation)),
        test=test,
        collate=collate,
        model=partial(load_vit, model, [NAMES[index] for index in classes]),
        heads=[],
        metric="accuracy",
    )


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """pixel_values, float32 (rows, 3, 32, 32), normalised; labels, int64 (rows)."""
    pixels = bytearray(b"".join(row["pixel_values"] for row in rows))
    return {
        "pixel_values": normalise(
            torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 3, SIDE, SIDE)
        ),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def load_vit(model: str, names: Sequence[str], seed: int) -> PreTrainedModel:
    """A pre-trained image classifier with a fresh head for these classes, from `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = AutoModelForImageClassification.from_pretrained(
            model,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            **_labels(names),
        )
        # With as many new classes as old ones, the old head would fit and be loaded.
        nn.init.normal_(found.classifier.weight, std=found.config.initializer_range)
        nn.init.zeros_(found.classifier.bias)
    return found


def _labels(names: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def _load(source: str, split: str) -> Dataset:
    file = Path(source) / f"{split}.parquet"
    try:
        if file.is_file():
            return load_dataset("parquet", data_files=str(file), split="train")
        return load_dataset(source, split=split)
    except OSError as error:  # a folder without data, an unknown name, or no connection to the hub
        raise ValueError(
            f"There are no images in {source} ({split}): {error} Give a folder with train.parquet "
            f"and "
            "test.parquet, or uoft-cs/cifar10 on the hub."
        ) from error


def _draw(rows: Dataset, count: int, seed: int) -> Dataset:
    """At most `count` decoded rows, drawn with `seed`: pixel_values (uint8 bytes) and labels."""
    images = decode(rows.shuffle(seed).select(range(min(count, len(rows)))))
    return Dataset.from_dict(
        {
            "pixel_values": [image.tobytes() for image in images.pixels.numpy()],
            "labels": images.labels.tolist(),
        }
    )


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
