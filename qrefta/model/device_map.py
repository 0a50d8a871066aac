"""Places of the factors in a device map, which says where each part of a model goes."""

from typing import Any

import torch

from qrefta.config.stack import BANK

_OFFLOADED = ("cpu", "disk", torch.device("cpu"))  # places in a device map


def place_bank(device_map: dict[str, Any]) -> dict[str, Any]:
    """The entry that a device map needs for the factors; empty if the map has one that serves.

    Layers on every device read the factors, so these go to one device: the first
    accelerator in the map. Offloaded, they would be on meta when a layer reads them, since only a
    module's forward pass brings its tensors back.
    """
    accelerator = first_accelerator(device_map)
    entries = {
        name: place
        for name, place in device_map.items()
        if name == BANK or name.startswith(f"{BANK}.")
    }
    places = list(entries.values()) or [device_map.get("")]
    offloaded = accelerator is not None and any(place in _OFFLOADED for place in places)
    if None in places or offloaded:
        return dict.fromkeys([BANK, *entries], "cpu" if accelerator is None else accelerator)
    return {}


def first_accelerator(device_map: dict[str, Any]) -> Any:
    """The first accelerator in a device map."""
    return next((place for place in device_map.values() if place not in _OFFLOADED), None)
