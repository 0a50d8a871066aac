"""Two models on the same inputs: how far apart their outputs are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel

from qrefta._compat.transformers import model_of_config
from qrefta.export.examples import INPUTS_OPTION, example_batches
from qrefta.files.safetensors import Checkpoint
from qrefta.model.modes import eval_mode
from qrefta.model.names import sources


class Reference(NamedTuple):
    """A batch, and a model's outputs for it."""

    inputs: Mapping[str, Any]
    outputs: Tensor

    def difference(self, other: torch.nn.Module) -> float:
        """The relative difference of another model's outputs."""
        return output_difference(outputs(other, self.inputs), self.outputs)


def reference(model: PreTrainedModel, inputs: Mapping[str, Any] | None) -> Reference:
    """The outputs of a model, to compare a written one with.

    Args:
        model: the model.
        inputs: a batch that it takes; None: the first of `example_batches` that it runs on.

    Raises:
        ValueError: if it runs on no example.
    """
    if inputs is not None:
        return Reference(inputs, outputs(model, inputs))
    errors = []
    for batch in example_batches(model):
        try:
            return Reference(batch, outputs(model, batch))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of the model's own code, which checks its inputs
            errors.append(f"{', '.join(batch)}: {type(error).__name__}: {error}")
    raise ValueError(
        f"{type(model).__name__} runs on no random batch on which two models could be compared "
        f"({'; '.join(errors)}). Give a batch that it takes as `inputs`; {INPUTS_OPTION}."
    )


def output_difference(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| over all entries; infinite if an entry is not finite, or
    the shapes differ.
    """
    if found.shape != expected.shape:
        return float("inf")
    expected = expected.float()
    difference = (found.float() - expected).norm() / expected.norm().clamp(min=1e-30)
    return difference.item() if torch.isfinite(difference) else float("inf")


def run_from_disk(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the class of `model`, whose parameters are read from files as they are used.

    They are mapped, and not kept; modules may read each other's, or change them in place.
    `from_pretrained` loads a checkpoint in which several tensors make up one parameter; then all of
    them are held.
    """
    config = type(model.config).from_pretrained(folder)
    config.dtype = dtype
    with init_empty_weights():
        written = model_of_config(type(model), config, dtype)
    checkpoint = Checkpoint(folder)
    stored_names = {
        name: parts[0][0]
        for name, parts in sources(written, checkpoint).items()
        if len(parts) == len(parts[0]) == 1
    }
    written.tie_weights()
    # A checkpoint holds one of two tied parameters; both read it.
    for tied, source in written.all_tied_weights_keys.items():
        for name, other in ((tied, source), (source, tied)):
            if other in stored_names:
                stored_names.setdefault(name, stored_names[other])
    if not {name for name, _ in written.named_parameters()} <= stored_names.keys():
        return type(model).from_pretrained(folder, dtype=dtype)
    tensors = checkpoint.mapped(set(stored_names.values()))
    state = {name: tensors[stored] for name, stored in stored_names.items()}
    written.load_state_dict(state, strict=False, assign=True)
    return written


@torch.no_grad()
def outputs(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The first output that is no loss (logits, if there are any) in eval mode, on the CPU; each
    module keeps its mode. Models that draw random numbers draw the same ones in every call on the
    same device.

    Floating-point inputs are cast to the model's dtype. They may hold labels, of which some models
    make the inputs of a decoder.

    Raises:
        ValueError: if the model gives nothing but a loss.
    """
    batch = {name: _placed(value, model) for name, value in inputs.items()}
    with torch.random.fork_rng(_gpus(model)), eval_mode(model):
        torch.manual_seed(0)
        given = model(**batch)
    named = given if isinstance(given, Mapping) else dict(enumerate(given))
    for name, output in named.items():
        if "loss" not in str(name) and isinstance(output, Tensor) and output.dim() > 0:
            return output.cpu()
    raise ValueError(
        f"{type(model).__name__} gives only a loss for inputs with {', '.join(inputs)}; two models "
        "are compared by their logits. Leave out the labels."
    )


def _gpus(model: torch.nn.Module) -> list[int]:
    """The numbers of the CUDA devices that a model lies on."""
    devices = {parameter.device for parameter in model.parameters()}
    return [device.index for device in devices if device.type == "cuda"]


def _placed(value: Any, model: Any) -> Any:
    """A tensor on the model's device, in the model's dtype if it is floating-point."""
    if not isinstance(value, Tensor):
        return value
    devices = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    device = next(devices, torch.device("cpu"))
    dtype = model.dtype if value.is_floating_point() else value.dtype
    return value.to(device, dtype)
