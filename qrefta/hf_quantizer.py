"""The transformers plug-in: from_pretrained, save_pretrained and Trainer work on a prepared model
as on any other.

Importing this module registers quant_method "qrefta" with transformers, and changes nothing else in
it. On load, the linear layers that config.json lists become `AdaptedLinear` and the factor bank is
put at the root, before transformers fills in the weights. After that, everything that was frozen is
frozen again, because the loader makes every float parameter require grad.

This module is imported while transformers imports its models (see `qrefta._plugin`). So nothing at
module level may import `transformers.modeling_utils`, nor bitsandbytes, which takes seconds: the
functions import the rest.
"""

import tempfile
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer

from qrefta._compat.hub import cached_hub_file, commit_hash
from qrefta._compat.saving import being_saved, owner_being_saved, set_upload, upload
from qrefta._compat.torch import cpu_float32_defaults
from qrefta.config.stack import BANK
from qrefta.files.json_file import read_json
from qrefta.files.layout import weight_files
from qrefta.files.verify import LIST, check_layout, check_saved, check_settings, is_switched_off
from qrefta.files.whole_file import remove_temporary_files
from qrefta.hf_config import QReftaConfig
from qrefta.model.adapters import check_no_peft
from qrefta.model.config_file import check_config, check_counts, read_config
from qrefta.model.device_map import first_accelerator, place_bank

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def register(model: "PreTrainedModel", config: QReftaConfig) -> None:
    """Mark a model that was prepared in memory as quantized, as transformers does for a model that
    it loads.
    """
    quantizer = QReftaQuantizer(config)
    marks = {
        "hf_quantizer": quantizer,
        "is_quantized": True,
        "quantization_method": config.quant_method,
    }
    for name, value in marks.items():
        setattr(model, name, value)
    _watch(model, quantizer)
    model.config.quantization_config = config


class QReftaQuantizer(HfQuantizer):
    """Builds the empty modules of a prepared checkpoint, checks them once filled, and saves factors
    compactly.
    """

    quantization_config: QReftaConfig
    _made: tempfile.TemporaryDirectory[str] | None = None  # prepared while loading, gone after it
    _reshaped: set[str]  # paths; see `check_headers`
    _inferring = False  # a device map that comes from here on was inferred by transformers

    @property
    def is_trainable(self) -> bool:
        """True; Trainer asks once it knows how the processes share the model.

        Raises:
            ValueError: if they share it in a way that cannot work.
        """
        from qrefta.distributed import check_sharding

        check_sharding()
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        self._inferring = True
        if not isinstance(device_map, dict):
            return device_map
        return device_map | place_bank(device_map)

    def validate_environment(
        self, *args: Any, device_map: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Correct a device map that transformers inferred; no other hook lies between inferring and
        loading.

        Before that, it is called with the user's map, which `update_device_map` corrects in a
        copy.
        """
        from qrefta.distributed import check_sharding

        check_sharding()
        if isinstance(device_map, dict) and self._inferring:
            device_map |= place_bank(device_map)

    def dequantize(
        self, model: "PreTrainedModel", dtype: torch.dtype | None = None
    ) -> "PreTrainedModel":
        """Refuse `model.dequantize()`: another function does it.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "A prepared model becomes dense by qrefta.merge(model), or merge(model, out=...) to "
            "a folder."
        )

    def get_state_dict_and_metadata(
        self, model: "PreTrainedModel"
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state dict, and the checksums that transformers writes into the header of each file.

        The folder gets a model card, unless it has a README.md. A process that was killed while it
        wrote one has left it under a temporary name; it is removed.

        Masters that are bf16 values are stored as bf16, which loses nothing. Under FSDP2 the state
        dict is empty in all processes but the first.

        Raises:
            ValueError: if FSDP2 sharded the model and the other processes do not save it too,
                packed weights were multiplied, or a block was removed that the config still has.
        """
        from torch import distributed as dist

        from qrefta._compat.transformers import saves_adapters_alone
        from qrefta.distributed import is_sharded, wait_for_all, whole_state
        from qrefta.model.depth import check_present
        from qrefta.model.prepared import prepared_config
        from qrefta.model.saving import saved_checksums
        from qrefta.model_card import write_card
        from qrefta.nn.factors import stored
        from qrefta.nn.packed import plain_bytes

        if not saves_adapters_alone(model):
            check_no_peft(model)
            check_present(model, prepared_config(model).stacks)
        folder, given = being_saved()
        if given is not None:  # under FSDP2 all processes have gathered it
            state = dict(given)
        else:
            if is_sharded(model):
                wait_for_all()
            state = whole_state(model, folder)
        if not _gathered_again(model):
            for key, factors in getattr(model, BANK).items():
                for name in list(state):
                    if name.startswith(f"{BANK}.{key}.") and not state[name].is_meta:
                        state[name] = stored(state[name], factors.dtype)
        state = {name: plain_bytes(tensor) for name, tensor in state.items()}
        if not state:
            return state, {}
        if folder is not None:
            if not dist.is_initialized():  # other processes may be writing to the same folder
                remove_temporary_files(folder)
            write_card(folder, self.quantization_config)
        return state, saved_checksums(model, state).metadata()

    def upload(self, folder: str, *args: Any, **kwargs: Any) -> Any:
        """Upload a folder that transformers has saved, with our card if the hub has none.

        transformers replaces the card in the folder by the hub's, or else by one of its template.
        """
        from qrefta.model_card import replace_template

        replace_template(Path(folder), self.quantization_config)
        return upload(folder, *args, **kwargs)

    def remove_quantization_config(self, model: "PreTrainedModel") -> None:
        """Remove the marks of a prepared model, which has become dense."""
        super().remove_quantization_config(model)
        set_upload(model, None)

    def update_attn_implementation(self, config: "PreTrainedConfig") -> "PreTrainedConfig":
        """The config as it is, checked: the only hook that runs before transformers builds the
        model.

        The file is checked too where it can be found (a local folder, or the hub's cache), because
        a kernel's name in the object may be the user's argument.

        Raises:
            ValueError: for settings out of range, code from a hub, or a file that differs from the
                one saved.
        """
        if self.pre_quantized:
            check_counts(config.to_dict())
            file = _config_file(config)
            if file is not None:
                settings = read_json(file)
                check_config(settings)
                if not is_switched_off():
                    check_settings(file.parent, settings)
        return config

    def _process_model_before_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        from qrefta.model.build import Placement, build, located
        from qrefta.model.check import adapted_parameters, check_files, check_headers

        files = kwargs.get("checkpoint_files")
        if not self.pre_quantized:
            self._prepare(model, files, kwargs.get("device_map"))
        if files:
            check_files(files, model.name_or_path if self._made is None else None)
            if self._made is None:
                self._check_saved(model, files)
        config = self.quantization_config
        config.stacks = [
            replace(report, stack=located(model, report.stack)) for report in config.stacks
        ]
        build(model, config.settings, [Placement.of(report) for report in config.stacks])
        self._reshaped = check_headers(model, files) if files else set()
        self._expected = {
            path: (tensor.shape, tensor.dtype) for path, tensor in adapted_parameters(model).items()
        }

    def _process_model_after_weight_loading(
        self, model: "PreTrainedModel", **kwargs: Any
    ) -> "PreTrainedModel":
        from qrefta.model.build import freeze, task_head
        from qrefta.model.check import check_filled, check_form, check_scales

        if all(parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                "The model was loaded to the meta device, which holds no values, as within "
                'accelerate\'s init_empty_weights or device_map="meta". Load it outside of that.'
            )
        check_filled(model, self._reshaped)
        check_form(model, self._expected)
        check_scales(model)
        if self._made is not None:
            self._made.cleanup()
        config = self.quantization_config
        trained = dict.fromkeys([*config.settings.modules_to_save, *task_head(model)])
        config.settings = replace(config.settings, modules_to_save=tuple(trained))
        freeze(model, config.settings.modules_to_save)
        _watch(model, self)
        return model

    def _check_saved(self, model: "PreTrainedModel", files: list[str]) -> None:
        from qrefta.model.check import check_whole_model

        if any(report.rank for report in self.quantization_config.stacks):
            check_whole_model(files)
        folder = Path(files[0]).parent
        local = bool(model.name_or_path) and Path(str(model.name_or_path)).is_dir()
        if local:
            check_layout(folder)
        if is_switched_off():
            return
        version = self.quantization_config.format_version
        listed = _hub_list(model) if version == 1 and not local else None
        check_saved(files, version, listed)

    def _prepare(
        self,
        model: "PreTrainedModel",
        files: list[str] | None,
        device_map: dict[str, Any] | str | None,
    ) -> None:
        """Prepare a dense checkpoint on its way into memory, out of core, and replace `files` by
        the new files.
        """
        from qrefta.split.checkpoint import convert
        from qrefta.split.folder_source import UNLIMITED

        if not files:
            raise ValueError(
                "There is no checkpoint to prepare; with a state_dict load the model and call "
                "prepare."
            )
        folder = Path(files[0]).parent
        names = sorted(Path(file).name for file in files)
        if names != sorted(file.name for file in weight_files(folder)):
            raise ValueError(
                "Preparing while loading reads a folder's usual weight files, not "
                f"{', '.join(names)}, which another variant names. Load the model with it, and "
                "call qrefta.prepare."
            )
        self._made = tempfile.TemporaryDirectory(prefix="qrefta-")
        if isinstance(device_map, str):  # "auto": the map is inferred from the prepared model
            # a CUDA build of torch names its accelerator on a machine without one, too
            here = torch.accelerator.is_available()
            device = (torch.accelerator.current_accelerator() if here else None) or "cpu"
        else:
            device = first_accelerator(device_map or {}) or "cpu"
        out = Path(self._made.name) / "prepared"
        with cpu_float32_defaults():
            convert(
                folder,
                out,
                self.quantization_config.settings,
                None,
                torch.device(device),
                UNLIMITED,
                progress=False,
                base_model=model.name_or_path,
                kind=type(model),
            )
        files[:] = [str(file) for file in sorted(out.glob("*.safetensors"))]
        config = QReftaConfig.of(read_config(out))
        self.quantization_config = config
        model.config.quantization_config = config
        self.pre_quantized = True  # from here on it is a prepared checkpoint like any other


register_quantization_config("qrefta")(QReftaConfig)
register_quantizer("qrefta")(QReftaQuantizer)


def _watch(model: "PreTrainedModel", quantizer: QReftaQuantizer) -> None:
    """Let a prepared model be uploaded with its card, and warn if it is saved as a part."""
    set_upload(model, quantizer.upload)
    getattr(model, BANK).register_state_dict_post_hook(_warn_of_part)  # merging removes the bank


def _warn_of_part(_: torch.nn.Module, __: Any, prefix: str, ___: Any) -> None:
    """Warn if a transformers model is saved of which only the part with this bank was prepared."""
    part = prefix.removesuffix(f"{BANK}.").removesuffix(".")
    if not part:
        return
    owner = owner_being_saved()
    if hasattr(owner, "base_model_prefix") and getattr(owner, "hf_quantizer", None) is None:
        warnings.warn(
            f"A {type(owner).__name__} is saved of which only a part, {part}, "
            "was prepared. from_pretrained cannot load this folder: make the model again, prepare "
            "the part, and call load_state_dict. To be able to load it, prepare the whole model; "
            "target_modules names the linear layers to quantize.",
            stacklevel=2,
        )


def _gathered_again(model: "PreTrainedModel") -> bool:
    """Whether transformers gathers the model again after it asked for the state."""
    shared = getattr(model.config, "distributed_config", None)
    return shared is not None and shared.dp_size > 1


def _config_file(config: "PreTrainedConfig") -> Path | None:
    """The config.json that a config was read from."""
    name = config.name_or_path
    if not name:
        return None
    if Path(name).is_dir():
        file: Any = Path(name, "config.json")
    else:
        file = None
        with suppress(HFValidationError):  # the name of a folder that was moved
            file = try_to_load_from_cache(name, "config.json", revision=commit_hash(config))
    return Path(file) if isinstance(file, str | Path) and Path(file).is_file() else None


def _hub_list(model: "PreTrainedModel") -> Path | None:
    """The list of checksums of a hub's folder of version 1; None if it cannot be had."""
    try:
        listed = cached_hub_file(str(model.name_or_path), LIST, model.config)
    except OSError:
        return None
    return None if listed is None else Path(listed)
