"""The config.json of a prepared folder, read and checked before transformers builds a model.

Nothing here imports torch.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrefta.files.json_file import read_json

_LARGEST_COUNTS = 100_000  # classes; transformers makes a list of them before it reads a file
_MOST_BLOCKS = 2_000
_COUNTED = re.compile(r"(^|_)(layers?|blocks?|stages?|depths?)$|^num_labels$")
_WINDOW = re.compile(r"window|mtp|nextn")  # numbers of layers that no loop runs over


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a prepared model's folder, with settings that are safe to build a model
    from.

    Raises:
        ValueError: if there is none, it is damaged, out of range, or belongs to another kind of
            model.
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
            f"{path} is damaged: it is not a JSON object of settings; copy it again from the "
            "folder that was saved."
        )
    method = (settings or {}).get("quant_method")
    if method != "qrefta":
        raise ValueError(
            f"{folder} holds no qrefta model (quant_method is {method!r}); load it with "
            "transformers."
        )
    if not isinstance(config.get("architectures") or [""], list):
        raise ValueError(
            f"{path} is damaged: architectures is {config['architectures']!r}; restore it."
        )
    check_config(config)
    return config


def check_config(config: dict[str, Any]) -> None:
    """Refuse a config.json whose model would be built for hours, or from code that transformers
    fetches from a hub.

    A flipped digit turns twelve blocks into a million. An attention or experts implementation with
    a slash in its name is a hub's kernel; to use one, pass `attn_implementation`.

    Raises:
        ValueError: naming the setting.
    """
    check_counts(config)
    for name, value in _settings(config):
        if name.endswith("_implementation") and "/" in str(value):
            raise ValueError(
                f"config.json has {name} {value!r}, which is code from a hub; remove it, and pass "
                "attn_implementation=... to use a kernel from a hub."
            )


def check_counts(config: dict[str, Any]) -> None:
    """Refuse a config whose model would be built for hours.

    Raises:
        ValueError: naming the setting.
    """
    for name, count in counts(config):
        limit = _LARGEST_COUNTS if name == "num_labels" else _MOST_BLOCKS
        if count > limit:
            raise ValueError(
                f"config.json has {name} {count:,}, and {limit:,} is the largest that is built; "
                "it is damaged: copy or save it again."
            )


def counts(config: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Names and values of the settings that count modules or classes."""
    for name, value in _settings(config):
        if not _COUNTED.search(name) or _WINDOW.search(name):
            continue
        for count in value if isinstance(value, list) else [value]:
            if type(count) in (int, float):
                yield name, count


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of all settings, including nested configs."""
    for name, value in config.items():
        if isinstance(value, dict) and name != "quantization_config":
            yield from _settings(value)
        else:
            yield str(name), value
