"""The transformers plug-in: from_pretrained, save_pretrained and Trainer work on a prepared model as on any other.

Importing this file registers quant_method "qrefta". On load, the linears that config.json lists become `AdaptedLinear`
and the factor bank is put at the root, before transformers fills in the weights; everything that was frozen is
frozen again (the loader makes every float parameter require grad).
"""

import copy
import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer

from qrefta._compat.transformers import cached_hub_file, passed_state_dict
from qrefta.config import QReftaConfig
from qrefta.distributed import check_sharding, whole_state
from qrefta.files.checksums import DIGESTS, check_digests, save_with_digests
from qrefta.files.safetensors import read_json
from qrefta.model.build import build, freeze, model_class, task_head
from qrefta.model.check import (
    check_config,
    check_counts,
    check_files,
    check_filled,
    check_form,
    check_headers,
    check_rows,
    check_scales,
    own_parameters,
)
from qrefta.nn.factors import BANK, stored
from qrefta.split.checkpoint import UNLIMITED, convert

OFFLOADS = ("cpu", "disk", torch.device("cpu"))  # in a device map


def is_prepared(model: nn.Module) -> bool:
    return isinstance(getattr(model, "hf_quantizer", None), QReftaQuantizer)


save_with_digests(is_prepared)


def _check_configs() -> None:
    """Let transformers make nothing of a prepared folder's config.json before it was checked.

    Its numbers decide how long a model is built, and its quant_method whether this plug-in is asked at all.
    transformers has no place for it, so the method of its base class that reads the file is wrapped, once.
    """
    read = PreTrainedConfig.get_config_dict.__func__

    @functools.wraps(read)
    def get_config_dict(
        cls: type[PreTrainedConfig], pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        if (folder / DIGESTS).is_file():
            check_digests(folder, [])
        config, rest = read(cls, pretrained_model_name_or_path, **kwargs)
        settings = config.get("quantization_config")
        if isinstance(settings, dict) and settings.get("quant_method") == "qrefta":
            check_config(config)
        return config, rest

    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)


_check_configs()


def prepared_config(model: nn.Module) -> QReftaConfig:
    """The config of a prepared model.

    Raises:
        ValueError: if the model is not prepared.
    """
    if not is_prepared(model):
        raise ValueError(
            f"This {type(model).__name__} is not prepared; call qrefta.prepare(model) or qrefta.load(dir)."
        )
    return model.hf_quantizer.quantization_config


def quant_report(model: nn.Module) -> list[dict[str, Any]]:
    """One row a stack: what preparing removed of the quantization error, and what it costs in bytes.

    Keys: see `qrefta.config.StackRow`. Errors are squared Frobenius norms over all layers of the stack.

    Raises:
        ValueError: if the model is not prepared.
    """
    return [row.report() for row in prepared_config(model).stacks]


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A prepared model from a local folder, of the class that saved it.

    Short for `AutoModelFor...from_pretrained(folder, **kwargs)` with the class looked up in config.json.

    Raises:
        ValueError: if the folder has no config.json, holds no prepared model, or is damaged.
    """
    config = read_config(folder)
    kind = model_class((config.get("architectures") or [""])[0], folder)
    try:
        return kind.from_pretrained(folder, **kwargs)
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever transformers raises over a config that makes no model
        raise ValueError(
            f"{folder} cannot be loaded as {kind.__name__}: {type(error).__name__}: {error}. If no argument of yours "
            "is behind it, config.json is damaged or of another version: copy or save the folder again."
        ) from error


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a prepared model's folder.

    Raises:
        ValueError: if there is none, it is damaged, or it is another model's.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has no config.json; give the folder that model.save_pretrained wrote."
        )
    config = read_json(path)
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(settings, dict | None):
        raise ValueError(
            f"{path} is damaged: it holds no settings by name; restore it from where it was saved."
        )
    method = (settings or {}).get("quant_method")
    if method != "qrefta":
        raise ValueError(
            f"{folder} holds no qrefta model (quant_method is {method!r}); load it with transformers."
        )
    if not isinstance(config.get("architectures") or [""], list):
        raise ValueError(
            f"{path} is damaged: architectures is {config['architectures']!r}; restore it."
        )
    return config


@register_quantizer("qrefta")
class QReftaQuantizer(HfQuantizer):
    """Builds the empty modules of a prepared checkpoint, checks them once filled, and saves factors compactly."""

    quantization_config: QReftaConfig
    _made: tempfile.TemporaryDirectory[str] | None = (
        None  # a prepared checkpoint that is gone once it is loaded
    )
    _inferring = False  # a device map that comes from here on is transformers' own

    @property
    def is_trainable(self) -> bool:
        """True; Trainer asks once it knows how the processes share the model.

        Raises:
            ValueError: if they do so in a way that cannot work.
        """
        check_sharding()
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        self._inferring = True
        return (
            {**device_map, **place_bank(device_map)} if isinstance(device_map, dict) else device_map
        )

    def validate_environment(
        self, *args: Any, device_map: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Correct a device map that transformers inferred; no other hook lies between inferring and loading.

        It is called with a user's own map before, which `update_device_map` corrects in a copy.
        """
        check_sharding()
        if isinstance(device_map, dict) and self._inferring:
            device_map |= place_bank(device_map)

    def dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """Refuse what `model.dequantize()` asks for: another function does it.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "A prepared model becomes dense by qrefta.merge(model), or merge(model, out=...) to a folder."
        )

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """State dict with masters that are bf16 values stored as bf16, which loses nothing."""
        # Under FSDP2 all processes gather the model and the first saves it alone: it must not gather again.
        passed = passed_state_dict()
        state = dict(whole_state(model) if passed is None else passed)
        for key, factors in getattr(model, BANK).items():
            own = {
                name: tensor for name, tensor in state.items() if name.startswith(f"{BANK}.{key}.")
            }
            state |= {name: stored(tensor, factors.dtype) for name, tensor in own.items()}
        return state, {}

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The config as it is; the only hook that sees one that is given as an object before the model is built."""
        if self.pre_quantized:
            check_counts(config.to_dict())
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self._prepare(model, kwargs["checkpoint_files"], kwargs.get("device_map"))
        files = kwargs.get("checkpoint_files")
        if files:
            check_files(files, model.name_or_path if self._made is None else None)
            if self._made is None:
                _check_digests(model, files)
        build(model, self.quantization_config)
        check_rows(self.quantization_config)
        if files:
            check_headers(model, files)
        self._expected = {
            path: (tensor.shape, tensor.dtype) for path, tensor in own_parameters(model).items()
        }

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        check_filled(model)
        check_form(model, self._expected)
        check_scales(model)
        if self._made is not None:
            self._made.cleanup()
        config = self.quantization_config
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save + task_head(model)))
        freeze(model, config.modules_to_save)
        return model

    def _prepare(
        self, model: PreTrainedModel, files: list[str] | None, device_map: dict[str, Any] | None
    ) -> None:
        """Prepare a dense checkpoint on its way into memory, out of core, and put its files in the place of `files`."""
        if not files:
            raise ValueError(
                "There is no checkpoint to prepare; with a state_dict load the model and call prepare."
            )
        config = copy.deepcopy(self.quantization_config)
        self._made = tempfile.TemporaryDirectory(prefix="qrefta-")
        accelerators = [
            torch.device(place) for place in (device_map or {}).values() if place not in OFFLOADS
        ]
        device = accelerators[0] if accelerators else torch.device("cpu")
        out = Path(self._made.name) / "prepared"
        with _plain_tensors():
            convert(Path(files[0]).parent, out, config, None, device, UNLIMITED, progress=False)
        files[:] = [str(file) for file in sorted(out.glob("*.safetensors"))]
        config.base_model = model.name_or_path
        self.quantization_config = model.config.quantization_config = config
        self.pre_quantized = True  # from here on it is a prepared checkpoint like any


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Tensors are made on the CPU in float32 again, where transformers builds a model on meta in its dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def place_bank(device_map: dict[str, Any]) -> dict[str, Any]:
    """The entry that a device map needs for the factors, if its own does not serve.

    Layers on every device read them, so they must have a device of their own: the first accelerator in the map.
    Offloaded, they would be on meta when a layer reads them, since only a module's own forward pass brings it back.
    """
    accelerators = [device for device in device_map.values() if device not in OFFLOADS]
    own = {
        name: place
        for name, place in device_map.items()
        if name == BANK or name.startswith(f"{BANK}.")
    }
    places = list(own.values()) or [device_map.get("")]
    if None in places or (accelerators and any(place in OFFLOADS for place in places)):
        return dict.fromkeys([BANK, *own], (accelerators or ["cpu"])[0])
    return {}


def _check_digests(model: PreTrainedModel, files: list[str]) -> None:
    """Refuse damaged files of a prepared folder, or of a hub's; see `qrefta.files.checksums.check_digests`."""
    folder, listed = Path(files[0]).parent, None
    if not (folder / DIGESTS).is_file() and not Path(model.name_or_path).is_dir():
        with suppress(OSError):  # the hub's answer, if it cannot be had
            listed = cached_hub_file(model.name_or_path, DIGESTS, model.config)
    check_digests(folder, files, None if listed is None else Path(listed))
