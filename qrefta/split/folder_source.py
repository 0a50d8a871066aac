"""A dense checkpoint folder as source of `split_stacks`: no model and no whole stack is held.

The linear layers are found on a copy of the model without storage. Their weights are read from the
safetensors files a few rows at a time, again in every pass. The folder is only read.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qrefta.config.settings import Settings
from qrefta.config.sizes import parse_bytes
from qrefta.config.stack import LayerStack
from qrefta.files.json_file import read_json
from qrefta.files.safetensors import Checkpoint
from qrefta.model.build import with_trained_modules
from qrefta.model.check import FRESH_BYTES, FRESH_SHARE
from qrefta.model.config_file import check_config
from qrefta.model.empty import class_near, config_of, empty_model, model_class
from qrefta.model.names import weight_parts
from qrefta.model.stacks import find_stacks, select_stacks
from qrefta.model.unquantized import warn_of_unquantized
from qrefta.model.weights import BLOCK_BYTES, Weights, check_values
from qrefta.split.moment_sums import FULL_WIDTH

# For `max_memory`: as much as it needs, six times the largest linear layer in float32.
UNLIMITED = 1 << 62
_BLOCKS = 8  # blocks in float32 that exist at once, temporaries of the kernels included
_LAYERS = 6  # layers in float32 that exist at once
_BASIS = 50  # columns of the basis of a slice in the tensor SVD, about, besides those for the rank
_LEAST_BLOCK_BYTES = 4 << 20
_OVERHEAD_BYTES = 256 << 20
_MOMENTS = 2  # second moments of the inputs of a layer that exist at once, with error feedback


class FolderSource:
    """The stacks of a dense checkpoint folder, read a few rows at a time.

    Args:
        folder: with config.json and safetensors files.
        settings: what to prepare.
        device: where a stack is worked on.
        max_memory: bytes that preparing may take.
        calibrated: whether residuals may be rounded with error feedback.
        trust_remote_code: whether to run code that comes with the model.
        kind: a class in whose module the model's class is looked for first.

    Attributes:
        settings: with the paths of all modules that train in full.

    Raises:
        ValueError: if the folder holds no dense model, a weight is missing, or `max_memory` is too
            small.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        device: torch.device,
        max_memory: int | str,
        calibrated: bool,
        trust_remote_code: bool = False,
        kind: type[PreTrainedModel] | None = None,
    ) -> None:
        self.folder = folder
        self.device = device
        self.checkpoint = Checkpoint(folder)
        model = _model_without_storage(folder, self.checkpoint, trust_remote_code, kind)
        self.model_config = model.config
        self.stacks = find_stacks(model)
        targets = select_stacks(self.stacks, settings.target_modules)
        self.settings = with_trained_modules(model, settings, self.stacks)
        _check_bytes(folder, self.checkpoint, model)
        self.parts = weight_parts(model, self.checkpoint, self.stacks)
        warn_of_unquantized(model, self.stacks)
        limit = parse_bytes("max_memory", max_memory)
        feedback = calibrated and settings.may_feed_back
        self._block_bytes = _block_bytes(self.stacks, targets, limit, feedback)

    def weights(self, stack: LayerStack) -> Weights:
        adapted = stack.adapted

        def read(layer: int, start: int, stop: int) -> Tensor:
            parts = self.parts[adapted[layer]]
            rows = self.checkpoint.read_parts(parts, start, stop, columns=stack.transposed)
            check_values(parts[0].name, rows)
            return rows

        return Weights(stack.shape, read, self.device, self._block_bytes, keep=False)


def _model_without_storage(
    folder: Path,
    checkpoint: Checkpoint,
    trust_remote_code: bool,
    kind: type[PreTrainedModel] | None,
) -> PreTrainedModel:
    """The model that config.json describes, without storage, in the dtype of its weights."""
    settings = _read_settings(folder)
    near = None if kind is None else class_near(kind, settings)
    kind = near or model_class(settings, folder, trust_remote_code)
    config = config_of(kind, folder, trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{folder} is already quantized; prepare quantizes a dense checkpoint itself."
        )
    if config.dtype is None:
        dtypes = map(checkpoint.dtype, checkpoint.names)
        config.dtype = next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
    return empty_model(kind, config, folder)


def _read_settings(folder: Path) -> dict[str, Any]:
    """The content of config.json; a number out of range is refused, since building would not
    end.
    """
    settings = read_json(folder / "config.json")
    if not isinstance(settings, dict):
        raise ValueError(
            f"{folder / 'config.json'} is damaged: it holds no settings by name; copy it again."
        )
    check_config(settings)
    return settings


def _check_bytes(folder: Path, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Refuse files that hold far more than the model: a sparse file of terabytes would be copied,
    zero by zero.
    """
    held = sum(map(checkpoint.nbytes, checkpoint.names))
    wanted = sum(tensor.numel() * tensor.itemsize for tensor in model.state_dict().values())
    if held > max(FRESH_BYTES, FRESH_SHARE * wanted):
        raise ValueError(
            f"The files of {folder} hold {held / 1e9:.1f} GB, and the model of its config.json "
            f"{wanted / 1e9:.3f} GB; they do not belong together: copy the folder again."
        )


def _block_bytes(
    stacks: list[LayerStack], targets: list[LayerStack], max_memory: int, feedback: bool
) -> int:
    """Bytes of a block of rows that keep within `max_memory`."""
    layer = 4 * max(stack.out_features * stack.in_features for stack in stacks)
    row = 4 * max(stack.layers * stack.in_features for stack in stacks)  # large with many experts
    basis = 4 * _BASIS * max(stack.layers * stack.in_features for stack in targets)
    fixed = _OVERHEAD_BYTES + basis
    if feedback:
        widest = max(min(stack.in_features, FULL_WIDTH) for stack in stacks)
        fixed += 4 * _MOMENTS * widest**2
    needed = fixed + max(_LAYERS * layer, _BLOCKS * max(_LEAST_BLOCK_BYTES, row))
    if max_memory < needed:
        most_layers = max(stack.layers for stack in stacks)
        raise ValueError(
            f"max_memory is {max_memory / 1e9:.2f} GB, but this model needs {needed / 1e9:.2f} GB: "
            f"its largest linear layer has {layer / 4e6:.1f} million weights, its largest stack "
            f"{most_layers} linear layers"
        )
    return min(BLOCK_BYTES, (max_memory - fixed) // _BLOCKS)
