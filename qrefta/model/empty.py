"""The model of a folder's config.json: its class, its config, and the model without storage.

A model without storage has its parameters and buffers on the meta device: names, shapes and dtypes.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from accelerate import init_empty_weights
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from qrefta._compat.transformers import registered_class
from qrefta.files.code import check_trusted, class_with_model


def model_class(
    settings: Mapping[str, Any], source: str | Path, trust_remote_code: bool = False
) -> type[PreTrainedModel]:
    """The class that a config names as its architecture: of transformers, or with the model.

    Args:
        settings: the content of the model's config.json.
        source: its folder or hub name.
        trust_remote_code: whether to run code that comes with the model.

    Raises:
        ValueError: if there is no such model class, or its code is not trusted.
    """
    check_trusted(settings, source, trust_remote_code)
    kind = class_with_model(settings, source) if trust_remote_code else None
    if kind is not None:
        return kind
    name = (settings.get("architectures") or [""])[0]
    kind = getattr(transformers, str(name), None) or registered_class(str(name))
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(
            f"transformers has no model class {name!r}; load {source} with the class that saved "
            "it, or register this class: AutoModelForCausalLM.register (or of its task), and "
            "AutoConfig.register."
        )
    return kind


def class_near(
    kind: type[PreTrainedModel], settings: Mapping[str, Any]
) -> type[PreTrainedModel] | None:
    """The class that a config names, if it is in the module of `kind`; no code is run for it."""
    name = (settings.get("architectures") or [""])[0]
    module = sys.modules.get(kind.__module__)
    found = getattr(module, str(name), None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def config_of(
    kind: type[PreTrainedModel], folder: Path, trust_remote_code: bool
) -> PreTrainedConfig:
    """config.json as transformers reads it for a model class.

    Raises:
        ValueError: if transformers cannot read it.
    """
    try:
        if not kind.__module__.startswith("transformers.") and kind.config_class is not None:
            return kind.config_class.from_pretrained(folder)
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _no_model(folder, error) from error


def empty_model(
    kind: type[PreTrainedModel], config: PreTrainedConfig, folder: Path
) -> PreTrainedModel:
    """The model of a config without storage.

    Raises:
        ValueError: if the class makes none of the config, which is from `folder`.
    """
    try:
        with init_empty_weights(include_buffers=True):
            return kind(config)
    except Exception as error:
        raise _no_model(folder, error) from error


def _no_model(folder: Path, error: Exception) -> ValueError:
    """The error for a folder whose config.json gives no model."""
    return ValueError(
        f"The config.json of {folder} makes no model ({type(error).__name__}: {error}); it is "
        "damaged, or of another version of transformers: copy it again."
    )
