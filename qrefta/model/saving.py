"""The checksums of a model that transformers is about to save, by the names in its files."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from qrefta._compat.transformers import revert_weight_conversion
from qrefta.files.checksums import Checksums, byte_view, settings_checksum, tensor_checksum
from qrefta.hf_config import FORMAT_VERSION

_THREADS = min(8, os.cpu_count() or 1)  # each holds a tensor of a GPU in CPU memory


def saved_checksums(model: PreTrainedModel, state: dict[str, Tensor]) -> Checksums:
    """Checksums of config.json and of every tensor in `state`.

    transformers renames tensors as it saves (old names of an architecture, a base model's prefix),
    and splits some that it merged on loading; `save_pretrained(save_original_format=False)` does
    neither. The hook does not know which, so there are checksums under both names.
    """
    converted = revert_weight_conversion(model, dict(state))
    tensors = state | {
        name: tensor for name, tensor in converted.items() if isinstance(tensor, Tensor)
    }
    distinct = {_identity(tensor): name for name, tensor in tensors.items()}
    sources = {_identity(tensor): name for name, tensor in state.items()}

    def checksum(identity: tuple[object, ...]) -> str | None:
        tensor = tensors[distinct[identity]]
        if tensor.is_meta:  # on disk
            if identity not in sources:
                return None
            tensor = load_offloaded_parameter(model, sources[identity])
        on_cpu = tensor.detach().cpu().contiguous()
        return tensor_checksum(on_cpu.dtype, on_cpu.shape, [byte_view(on_cpu)])

    with ThreadPoolExecutor(_THREADS) as pool:
        checksums = dict(zip(distinct, pool.map(checksum, distinct), strict=True))
    named = {name: checksums[_identity(tensor)] for name, tensor in sorted(tensors.items())}
    return Checksums(named, _config_checksum(model))


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """A key that is equal for two views of the same memory."""
    place = id(tensor) if tensor.is_meta else tensor.data_ptr()
    if not tensor.is_meta and tensor.numel() == 0:
        place = id(tensor)
    return place, tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _config_checksum(model: PreTrainedModel) -> str:
    """The checksum of the config.json that transformers writes next.

    dtype and architectures are set as transformers sets them.
    """
    config = model.config
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.quantization_config.format_version = FORMAT_VERSION
    settings = json.loads(config.to_json_string(use_diff=True))
    settings.pop("transformers_weights", None)  # not saved
    return settings_checksum(settings)
