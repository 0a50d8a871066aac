"""A prepared folder: whether it is whole and as it was saved, without loading the model."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import init_empty_weights
from transformers import PreTrainedModel

from qrefta.files.folders import JOURNAL
from qrefta.files.json_file import read_json
from qrefta.files.layout import has_weights, weight_files
from qrefta.files.safetensors import Checkpoint
from qrefta.files.verify import LIST, check_layout, check_saved, is_switched_off
from qrefta.hf_config import QReftaConfig
from qrefta.model.build import Placement, build, located
from qrefta.model.check import (
    check_files,
    check_headers,
    check_stored_scales,
    missing_error,
    missing_tensors,
)
from qrefta.model.config_file import read_config
from qrefta.model.empty import config_of, empty_model, model_class


class VerifiedFile(NamedTuple):
    """A file that was found whole.

    Attributes:
        name: in the folder.
        checked: a few words on how it was checked.
    """

    name: str
    checked: str


def verify(folder: str | Path, *, trust_remote_code: bool = False) -> list[VerifiedFile]:
    """The files of a prepared folder, each with how it was checked; all of them are whole.

    Reads every byte of the weights once, a few megabytes at a time. It checks that

    - config.json has valid settings and was saved together with the weights;
    - the index is valid, and no file is missing or left over;
    - the checksum of every tensor is right;
    - the tensors fit the model that config.json describes, and scales are finite;
    - other JSON files can be read.

    `QREFTA_VERIFY` is ignored.

    Args:
        folder: that a prepared model was saved to.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        ValueError: for the first fault; it names the file and the fix.
    """
    folder = Path(folder)
    settings = read_config(folder)
    if (folder / JOURNAL).exists():
        raise ValueError(
            f"{folder} is unfinished: it holds {JOURNAL}. Run the same prepare command again "
            "to resume it."
        )
    config = QReftaConfig(**settings["quantization_config"])
    _check_variant(folder)
    check_layout(folder)
    paths = weight_files(folder)
    files = [str(path) for path in paths]
    check_files(files, folder)
    _check_left_over(folder, paths, config.format_version)
    check_saved(files, config.format_version)
    model = _adapted_model(folder, settings, config, trust_remote_code)
    check_headers(model, files)
    missing = missing_tensors(model, files)
    if missing:
        raise missing_error(missing)
    check_stored_scales(model, files)
    verified = [VerifiedFile("config.json", "settings, checksum")]
    for path in paths:
        count = len(Checkpoint.of_files([path]).names)
        verified.append(VerifiedFile(path.name, f"{count} tensors: shapes, scales, checksums"))
    return verified + _other_json(folder)


def check_weights(folder: Path) -> None:
    """Refuse weights of a prepared folder that differ from the saved weights.

    A folder without weights is not checked, for example a checkpoint that FSDP2's processes wrote
    in parts. `QREFTA_VERIFY=0` in the environment switches this off.

    Raises:
        ValueError: naming the file.
    """
    files = list(folder.glob("model*.safetensors"))
    if is_switched_off() or not files or not (folder / "config.json").is_file():
        return
    settings = read_config(folder)["quantization_config"]
    check_layout(folder)
    check_saved(weight_files(folder), settings.get("format_version", 1))


def _check_variant(folder: Path) -> None:
    """Refuse weights with a variant in the names of their files (model.fp16.safetensors)."""
    variants = sorted(path.name for path in folder.glob("model.*.safetensors"))
    if variants and not has_weights(folder):
        raise ValueError(
            f"{folder} holds {', '.join(variants)}, weights of a variant, which verify does not "
            "read. qrefta.load(folder, variant=...) loads and checks them; to verify the folder, "
            "save the model without a variant."
        )


def _check_left_over(folder: Path, paths: list[Path], version: int) -> None:
    """Refuse weight files that no loader reads: they are left from another save."""
    expected = {path.name for path in paths}
    left = sorted(path.name for path in folder.glob("model*.safetensors"))
    left = [name for name in left if name not in expected]
    if version > 1 and (folder / LIST).exists():
        left.append(LIST)
    if left:
        raise ValueError(
            f"{folder} holds {', '.join(left)} of another save, which nothing reads; delete it."
        )


def _adapted_model(
    folder: Path, settings: dict[str, Any], config: QReftaConfig, trust_remote_code: bool
) -> PreTrainedModel:
    """The model that config.json describes, adapted, without storage."""
    kind = model_class(settings, folder, trust_remote_code)
    model = empty_model(kind, config_of(kind, folder, trust_remote_code), folder)
    placements = [
        Placement.of(replace(report, stack=located(model, report.stack)))
        for report in config.stacks
    ]
    with init_empty_weights(include_buffers=True):
        build(model, config.settings, placements)
    return model


def _other_json(folder: Path) -> list[VerifiedFile]:
    """The other JSON files, such as the tokenizer's and the index."""
    verified = []
    for path in sorted(folder.glob("*.json")):
        if path.name != "config.json":
            read_json(path)
            checked = "lists the tensors" if ".index." in path.name else "readable"
            verified.append(VerifiedFile(path.name, checked))
    return verified
