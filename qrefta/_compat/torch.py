"""Private names of torch, all in release 2.8, the oldest that qrefta admits, or earlier."""

import platform
from collections.abc import ItemsView, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

# A mode whose tensors have shape, dtype and device, and no values: it counts the memory of a
# training step. If it goes: tensors on the meta device, with the device checks of the
# model's code patched.
from torch._subclasses.fake_tensor import FakeTensorMode

# Sees each operation after autograd. torch documents it as a way to extend torch, underscore or
# not.
from torch.utils._python_dispatch import TorchDispatchMode

# The tensors in nested tuples, lists, dicts and model outputs. If it goes: `optree.tree_leaves`, or
# a loop.
from torch.utils._pytree import tree_leaves

__all__ = [
    "FakeTensorMode",
    "TorchDispatchMode",
    "cpu_float32_defaults",
    "default_store",
    "direct_children",
    "direct_parameters",
    "has_bf16_instructions",
    "is_replica",
    "move_hooks",
    "operator_schema",
    "plain_functions",
    "storage_id",
    "tree_leaves",
    "version_counter",
    "with_shape",
]


@contextmanager
def cpu_float32_defaults() -> Iterator[None]:
    """Within this context tensors are made on the CPU and in float32, whatever the defaults are.

    transformers builds a model on meta in its dtype, and `torch.set_default_dtype` is for models;
    neither is for tables of numbers.
    """
    cpu = torch.device("cpu")
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # With a default device, every small operation passes through Python first.
        with nullcontext() if torch.get_default_device() == cpu else cpu:
            yield
    finally:
        torch.set_default_dtype(dtype)


def version_counter(tensor: Tensor) -> int:
    """How often autograd saw the tensor change in place.

    Kept results that were made from a tensor are valid as long as this number is the same. torch's
    notes on autograd describe it. If it goes: keep nothing.
    """
    return tensor._version


def with_shape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor in another shape, which autograd does not take for a view.

    `torch.matmul` returns its results this way: they can be changed or detached in place. The given
    tensor must not be used afterwards. If it goes: `view`, whose result cannot be detached in
    place.
    """
    return torch.ops.aten._unsafe_view(tensor, shape)


def storage_id(storage: torch.UntypedStorage) -> int:
    """A number that two Python objects share if, and only if, they are the same storage.

    `data_ptr` is not enough, since storages without values have none. If it goes: the storage's
    `untyped_storage()` object itself as key, once torch returns the same object each time.
    """
    return storage._cdata


def direct_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of the module itself, by name.

    A look-up in it takes a fraction of the time of attribute access, which shows in decoding. If it
    goes: `dict(module.named_parameters(recurse=False))`.
    """
    return module._parameters


def direct_children(module: nn.Module) -> ItemsView[str, nn.Module | None]:
    """Names and modules of the direct children; a module under two names comes twice.

    `named_children` gives it once. If it goes: `named_modules(remove_duplicate=False)`.
    """
    return module._modules.items()


def has_bf16_instructions() -> bool:
    """Whether the processor multiplies bfloat16 in hardware; true for other processors than x86,
    whose instructions torch chooses itself.

    `torch.cpu.get_capabilities` is public; torch 2.8 has private functions in its place. If they
    go: require a release with the public one.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let a module have the hooks of the one that it replaces; their handles still remove them.

    If it goes: refuse modules with hooks.
    """
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))


def is_replica(module: nn.Module) -> bool:
    """Whether `nn.DataParallel` made this copy of a module for another device.

    If it goes: compare the devices of the weights and of the factors.
    """
    return "_is_replica" in module.__dict__


def operator_schema(operator: Any) -> torch.FunctionSchema | None:
    """Names of an operator's arguments, and whether it writes to any; None for operators of higher
    order.

    If it goes: keep the results of torch's attention operators alone, by their names.
    """
    return getattr(operator, "_schema", None)


def plain_functions() -> AbstractContextManager[None]:
    """A context in which a subclass of Tensor is treated as a plain tensor.

    torch's own `Tensor.__torch_function__` computes in it, and torch.compile knows it. If it goes:
    compute on `tensor.as_subclass(Tensor)`, which torch.compile does not trace.
    """
    return torch._C.DisableTorchFunctionSubclass()


def default_store() -> Any:
    """The key-value store of the default process group, which waits for no other process.

    If it goes: `torch.distributed.TCPStore` on another port.
    """
    return dist.distributed_c10d._get_default_store()
