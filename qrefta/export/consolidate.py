"""The checkpoint that the processes of a sharded run wrote in parts, as one prepared folder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from transformers import PreTrainedModel

from qrefta.export.write import copy_tokenizer
from qrefta.files.folders import check_new, new_folder
from qrefta.files.on_disk import empty_on_disk
from qrefta.model.load import load

_METADATA = ".metadata"
_OF_ACCELERATE = "pytorch_model_fsdp_0"  # in a checkpoint of Trainer and of accelerate


def consolidate(
    checkpoint: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    trust_remote_code: bool = False,
) -> Path:
    """The folder `out`, to which the model of a sharded checkpoint was written as
    `model.save_pretrained` writes it.

    One process without a GPU is enough. It holds one part of a tensor in memory, and a file in
    `out` of the model's size until the folder is complete.

    Args:
        checkpoint: written by `torch.distributed.checkpoint.save`, with the state dict of the model
            alone or under the key "model"; or a `checkpoint-N` of Trainer with
            `"state_dict_type": "SHARDED_STATE_DICT"`. Its list of parts is a pickle: give only
            checkpoints that you trust.
        base: prepared folder that the run started from, for config.json and the tokenizer.
        out: folder to write, new or empty.
        trust_remote_code: whether to run code that comes with the base.

    Raises:
        ValueError: if the checkpoint is none, is incomplete, or belongs to another model than the
            base, or `out` is not empty.
        OSError: if the disk is full.
    """
    check_new(out)
    parts = _parts_folder(Path(checkpoint))
    model = load(base, trust_remote_code=trust_remote_code)
    with new_folder(out) as folder:
        state = _read(parts, model, folder)
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        copy_tokenizer(model, folder)
    return Path(out)


def _parts_folder(checkpoint: Path) -> Path:
    """The folder that torch.distributed.checkpoint wrote."""
    for folder in (checkpoint, checkpoint / _OF_ACCELERATE):
        if (folder / _METADATA).is_file():
            return folder
    raise ValueError(
        f"{checkpoint} is no sharded checkpoint: neither it nor {_OF_ACCELERATE} in it has a "
        f"file {_METADATA}, which torch.distributed.checkpoint writes last. Give a checkpoint-N of "
        'a run with "state_dict_type": "SHARDED_STATE_DICT", or a folder of '
        "torch.distributed.checkpoint.save."
    )


def _read(parts: Path, model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, whose tensors are on the disk of `folder`."""
    stored = FileSystemReader(parts).read_metadata().state_dict_metadata
    expected = model.state_dict()
    prefix = "" if expected.keys() <= stored.keys() else "model."
    forms: dict[str, tuple[torch.dtype, torch.Size]] = {}
    for name, tensor in expected.items():
        entry = stored.get(prefix + name)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(
                f"{parts} has no tensor {name}, which the model of the base has. Give the prepared "
                "folder that this run started from as the base."
            )
        is_float = entry.properties.dtype.is_floating_point
        if entry.size != tensor.shape or is_float != tensor.is_floating_point():
            raise ValueError(
                f"{name} is {entry.properties.dtype} {list(entry.size)} in {parts} and "
                f"{tensor.dtype} {list(tensor.shape)} in the base. Give the prepared folder that "
                "this run started from as the base."
            )
        forms[name] = (entry.properties.dtype, entry.size)
    state = empty_on_disk(folder, forms)
    wanted: dict[str, Any] = {prefix + name: tensor for name, tensor in state.items()}
    load_parts(wanted, storage_reader=FileSystemReader(parts), no_dist=True)
    return state
