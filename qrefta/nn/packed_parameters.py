"""Packed bytes as the parameters of a module: hold them again after loading, or as plain ones."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qrefta.nn.packed import PackedBytes, not_numbers, packed_parameter, plain_bytes


def pack(module: nn.Module, names: Iterable[str]) -> None:
    """Hold some parameters of a module as packed bytes again, where loading replaced them.

    Shards of FSDP2 stay as they are.

    Raises:
        ValueError: for a parameter of floating-point numbers.
    """
    for name in names:
        parameter = module.get_parameter(name)
        if parameter.is_floating_point():
            raise not_numbers(f"{name} was loaded as {parameter.dtype}")
        if type(parameter) is nn.Parameter:
            setattr(module, name, packed_parameter(parameter.data))


def warn_of_other_bytes(
    module: nn.Module, names: Iterable[str], state: Mapping[str, Any], prefix: str
) -> None:
    """Warn if a state dict brings other bytes than a module holds.

    It may be of another prepared model. But torch.load gives plain bytes, which nothing protects:
    sums and means of them, cast back to bytes, load like any others.
    """
    for name in names:
        held = module.get_parameter(name)
        given = state.get(f"{prefix}{name}")
        if not isinstance(held, PackedBytes) or not isinstance(given, Tensor):
            continue  # shards of FSDP2
        if held.is_meta or given.dtype != held.dtype or given.shape != held.shape:
            continue  # `load_state_dict` refuses another shape or dtype
        if not torch.equal(held, given.to(held.device)):
            warnings.warn(
                "The state dict has other packed 4-bit weights than the model. That is right for "
                "one of another prepared model as a whole, if both have the same quant_type: "
                "the bytes do not tell. In an average of files, take the packed weights from one "
                "of them: only floating-point tensors can be averaged.",
                stacklevel=2,
            )
            return


def unpack(model: nn.Module) -> None:
    """Hold packed bytes as plain parameters, in a model without values, whose tensors are fake."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, PackedBytes):
                setattr(module, name, nn.Parameter(plain_bytes(parameter), requires_grad=False))
