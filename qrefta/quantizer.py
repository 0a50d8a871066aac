"""The transformers plug-in: from_pretrained, save_pretrained and Trainer work on a prepared model as on any other.

Importing this file registers quant_method "qrefta". On load, the linears that config.json lists become `AdaptedLinear`
and the factor bank is put at the root, before transformers fills in the weights; everything that was frozen is
frozen again (the loader makes every float parameter require grad).
"""

import copy
import inspect
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from qrefta.build import build, freeze, model_class, task_head
from qrefta.config import QReftaConfig
from qrefta.convert import UNLIMITED, convert
from qrefta.distributed import check_sharding, whole_state
from qrefta.experts import is_adapted
from qrefta.factors import BANK, Factors, frozen, stored
from qrefta.linear import AdaptedLinear

OFFLOADS = ("cpu", "disk", torch.device("cpu"))  # in a device map


def is_prepared(model: nn.Module) -> bool:
    return isinstance(getattr(model, "hf_quantizer", None), QReftaQuantizer)


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
    name = (read_config(folder).get("architectures") or [""])[0]
    return model_class(name, folder).from_pretrained(folder, **kwargs)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a prepared model's folder.

    Raises:
        ValueError: if there is none, it is damaged, or it is another model's.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder that model.save_pretrained wrote.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        method = (config.get("quantization_config") or {}).get("quant_method")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from where it was saved.") from error
    if method != "qrefta":
        raise ValueError(f"{folder} holds no qrefta model (quant_method is {method!r}); load it with transformers.")
    return config


@register_quantizer("qrefta")
class QReftaQuantizer(HfQuantizer):
    """Builds the empty modules of a prepared checkpoint, checks them once filled, and saves factors compactly."""

    quantization_config: QReftaConfig
    _made: tempfile.TemporaryDirectory[str] | None = None  # a prepared checkpoint that is gone once it is loaded
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
        return {**device_map, **place_bank(device_map)} if isinstance(device_map, dict) else device_map

    def validate_environment(self, *args: Any, device_map: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Correct a device map that transformers inferred; no other hook lies between inferring and loading.

        It is called with a user's own map before, which `update_device_map` corrects in a copy.
        """
        check_sharding()
        if isinstance(device_map, dict) and self._inferring:
            device_map |= place_bank(device_map)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """State dict with masters that are bf16 values stored as bf16, which loses nothing."""
        passed = _passed_state()
        state = dict(whole_state(model) if passed is None else passed)
        for key, factors in getattr(model, BANK).items():
            own = {name: tensor for name, tensor in state.items() if name.startswith(f"{BANK}.{key}.")}
            state |= {name: stored(tensor, factors.dtype) for name, tensor in own.items()}
        return state, {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self._prepare(model, kwargs["checkpoint_files"], kwargs.get("device_map"))
        for file in kwargs.get("checkpoint_files") or []:
            _check_readable(file)
        build(model, self.quantization_config)
        self._expected = {path: (tensor.shape, tensor.dtype) for path, tensor in _own_parameters(model).items()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        _check_filled(model)
        _check_form(model, self._expected)
        if self._made is not None:
            self._made.cleanup()
        config = self.quantization_config
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save + task_head(model)))
        freeze(model, config.modules_to_save)
        return model

    def _prepare(self, model: PreTrainedModel, files: list[str] | None, device_map: dict[str, Any] | None) -> None:
        """Prepare a dense checkpoint on its way into memory, out of core, and put its files in the place of `files`."""
        if not files:
            raise ValueError("There is no checkpoint to prepare; with a state_dict load the model and call prepare.")
        config = copy.deepcopy(self.quantization_config)
        self._made = tempfile.TemporaryDirectory(prefix="qrefta-")
        accelerators = [torch.device(place) for place in (device_map or {}).values() if place not in OFFLOADS]
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


def _passed_state() -> dict[str, Tensor] | None:
    """The `state_dict` that `save_pretrained` was called with; transformers 5 puts the plug-in's answer in its place.

    Under FSDP2 Trainer has all processes gather the model and lets the first save it alone: it must not wait for the
    others to gather again.
    """
    return inspect.currentframe().f_back.f_back.f_locals.get("state_dict")


def place_bank(device_map: dict[str, Any]) -> dict[str, Any]:
    """The entry that a device map needs for the factors, if its own does not serve.

    Layers on every device read them, so they must have a device of their own: the first accelerator in the map.
    Offloaded, they would be on meta when a layer reads them, since only a module's own forward pass brings it back.
    """
    accelerators = [device for device in device_map.values() if device not in OFFLOADS]
    own = {name: place for name, place in device_map.items() if name == BANK or name.startswith(f"{BANK}.")}
    places = list(own.values()) or [device_map.get("")]
    if None in places or (accelerators and any(place in OFFLOADS for place in places)):
        return dict.fromkeys([BANK, *own], (accelerators or ["cpu"])[0])
    return {}


def _check_readable(file: str) -> None:
    """Refuse anything but whole safetensors files, before a byte of a tensor is read."""
    if not str(file).endswith(".safetensors"):
        raise ValueError(f"{file} is not a safetensors file; qrefta reads no other format (pickle can run code).")
    try:
        with safetensors.safe_open(file, framework="pt"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); copy or save it again.") from error


def _own_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Parameters of adapted layers and factors, by path; biases are the model's."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, AdaptedLinear | Factors)
        for name, parameter in module.named_parameters(recurse=False)
        if name != "bias"
    }


def _check_form(model: PreTrainedModel, expected: dict[str, tuple[torch.Size, torch.dtype]]) -> None:
    """Raise if a tensor was loaded in another shape, and undo casts of packed bytes.

    transformers 5.0 neither compares shapes in quantized models nor leaves integers alone in modules that it
    keeps in float32 (T5's `wo`); bytes survive that cast.
    """
    for path, parameter in _own_parameters(model).items():
        shape, dtype = expected[path]
        if parameter.shape != shape:
            raise ValueError(
                f"{path} has the shape {list(parameter.shape)} in the checkpoint and {list(shape)} by its config; they "
                "do not belong together: copy or save it again."
            )
        if parameter.dtype != dtype and not dtype.is_floating_point:
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, frozen(parameter.to(dtype)))


def _check_filled(model: PreTrainedModel) -> None:
    """Raise if the checkpoint lacked one of our tensors; transformers only warns and leaves it random.

    In the class that saved the checkpoint no other tensor may lack either; another class may have a fresh head.
    transformers marks each tensor that it filled with `_is_hf_initialized` (the only trace left after loading).
    """
    same_class = type(model).__name__ in (model.config.architectures or [])
    missing, offloaded = [], []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            ours = isinstance(module, AdaptedLinear | Factors) or is_adapted(module)
            if (ours or same_class) and not getattr(parameter, "_is_hf_initialized", False):
                (offloaded if parameter.is_meta else missing).append(f"{path}.{name}")
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} tensors were offloaded to disk ({offloaded[0]}, ...), which a prepared model does not "
            "support; use a device_map without disk."
        )
    if missing:
        raise ValueError(
            f"The checkpoint lacks {len(missing)} tensors that its config lists: {', '.join(missing[:5])}. "
            "It is damaged or incomplete: copy or save it again."
        )
