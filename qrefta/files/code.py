"""Models whose classes are code in their folder (`auto_map`): it runs only if the user trusts it.

transformers asks on the terminal where `trust_remote_code` is left out, so here it is always given.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qrefta._compat.transformers import registered_class, with_generate

_LOADED = "transformers_modules."  # the package that transformers loads such code into


def is_trusted(model: Any) -> bool:
    """Whether a model, or a config, is of a class that came with it: the user has trusted it."""
    return type(model).__module__.startswith(_LOADED)


def check_trusted(settings: Mapping[str, Any], source: str | Path, trust_remote_code: bool) -> None:
    """Refuse a model that needs code of its folder, unless that is trusted.

    Args:
        settings: the content of its config.json.
        source: its folder or hub name.
        trust_remote_code: whether the user trusts the code.

    Raises:
        ValueError: if it needs such code.
    """
    if trust_remote_code:
        return
    auto_map = settings.get("auto_map") or {}
    name = (settings.get("architectures") or [""])[0]
    known = hasattr(transformers, str(name)) or registered_class(str(name)) is not None
    known = known and str(settings.get("model_type")) in CONFIG_MAPPING
    if auto_map and not known:
        raise ValueError(
            f"{source} needs code that comes with it ({', '.join(map(str, auto_map.values()))}). "
            "Read this code; if you trust it, give trust_remote_code=True (on the command line "
            "--trust-remote-code)."
        )


def class_with_model(
    settings: Mapping[str, Any], source: str | Path
) -> type[PreTrainedModel] | None:
    """The class in a model's folder that its config names as its architecture; it runs the code.

    Args:
        settings: the content of the model's config.json.
        source: its folder or hub name.

    Returns:
        The class, or None if the folder has none of that name. A class from before transformers
        4.50 gets the method generate, as AutoModel gives it.
    """
    name = (settings.get("architectures") or [""])[0]
    for auto_class, reference in (settings.get("auto_map") or {}).items():
        is_model = auto_class.startswith("AutoModel")
        if is_model and isinstance(reference, str) and reference.rpartition(".")[2] == name:
            kind = get_class_from_dynamic_module(reference, str(source))
            kind.register_for_auto_class(auto_class)  # `save_pretrained` then writes the code too
            return with_generate(kind)
    return None
