"""A module of a model in place of another, wherever the model holds it."""

from typing import Any

from torch import nn

from qrefta._compat.torch import direct_children, move_hooks


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` wherever `model` holds the module at `path`.

    A shared module has several parents, and code may hold it in a plain list beside. Hooks on the
    old module move to the new one.
    """
    old = model.get_submodule(path)
    move_hooks(old, new)
    for parent in list(model.modules()):
        for name, child in list(direct_children(parent)):
            if child is old:
                setattr(parent, name, new)
        for name, value in vars(parent).items():
            if _holds(value, old):
                vars(parent)[name] = _exchanged(value, old, new)  # setattr would register it


def _holds(value: object, module: nn.Module) -> bool:
    """Whether a value is a module, or a list, tuple or dict of modules that holds it."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(item is module for item in value)
    return value is module


def _exchanged(value: Any, old: nn.Module, new: nn.Module) -> Any:
    """A value that `_holds` found, with `new` for `old`; a list and a dict are changed in place."""
    if value is old:
        return new
    if isinstance(value, tuple):
        return tuple(new if item is old else item for item in value)
    places = list(value) if isinstance(value, dict) else range(len(value))
    for place in places:
        if value[place] is old:
            value[place] = new
    return value
