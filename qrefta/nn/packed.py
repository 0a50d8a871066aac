"""Bytes in a model that stand for numbers and are none: 4-bit codes, their scales, raw floats.

Much code walks over the parameters or the state dict of a model and computes with every tensor:
moving averages, model soups, task arithmetic, a reference that follows the model, weight decay or
clipping by hand. On bytes that gives garbage: the average of two codes is a third code.

`PackedBytes` is a tensor on which such code is right or fails. The bytes of a model never change
after `prepare`, so models that were trained from one prepared folder have equal bytes, and a
weighted sum of equal bytes is these bytes times the sum of the weights. So a sum keeps the bytes
and counts their share: 0.9 * p + 0.1 * q has the bytes of p and the share 1. Before bytes are used
or saved, their share must be 1. A difference of equal bytes has the share 0 and is zero. Sums of
different bytes, and all other arithmetic, are refused.

Copying, moving, comparing and saving work as on any tensor. Parts (of chunk, split, narrow and
unbind) and views in another dtype are plain tensors; so FSDP2 shards plain bytes, and code that
writes into a part is not stopped.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from qrefta._compat.peft import prepares_for_kbit_training
from qrefta._compat.torch import plain_functions, tree_leaves

_TOLERANCE = 1e-6  # of a share that should be 1: weights may be float32

# Functions whose result has the same bytes, by whether it has its own memory.
_ALIASES = {"__getitem__", "alias", "detach", "flatten", "ravel", "reshape", "view", "view_as"}
_COPIES = {"clone", "contiguous", "cpu", "cuda", "pin_memory"}
_SETTERS = {"detach_", "resize_", "set_", "share_memory_"}
_READERS = {"__index__", "__int__", "__invert__", "__iter__"}
_FLOATS = {"bfloat16", "double", "float", "half"}
_RAW = {"data_ptr", "numpy", "storage", "tolist", "untyped_storage"}  # used to save a tensor
# Beginnings of the names of functions whose results are parts, or do not depend on the bytes.
_PARTS = ("chunk", "empty_like", "full_like", "narrow", "new_", "split", "unbind")


class PackedBytes(Tensor):
    """Bytes, int8 or uint8, of which only weighted sums of equal bytes can be made.

    Attributes:
        shares: the sum of the weights, 1 for the bytes themselves; a list with one number, which
            all aliases of a tensor have in common, such as `parameter.data`.
        when_frozen: called by `requires_grad_(False)` and `requires_grad = False`.
    """

    shares: list[float]
    when_frozen: Callable[[], None] | None = None

    def __new__(
        cls,
        data: Tensor,
        requires_grad: bool = False,
        shares: list[float] | None = None,
        when_frozen: Callable[[], None] | None = None,
        **_marks: Any,
    ) -> Self:
        """A parameter, as accelerate makes one of a parameter's class when it moves it: with the
        parameter's attributes, among them marks of torch and transformers.
        """
        moved = cast(Self, nn.Parameter(cls.of(data, shares), requires_grad=requires_grad))
        moved.when_frozen = when_frozen
        return moved

    @classmethod
    def of(cls, tensor: Tensor, shares: list[float] | None = None) -> Self:
        """The same memory as packed bytes."""
        with plain_functions():
            packed = tensor.as_subclass(cls)
        packed.shares = [1.0] if shares is None else shares
        return packed

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func.__name__
        handler = _HANDLERS.get(name)
        if handler is not None:
            return handler(func, *args, **kwargs)
        if name.startswith("_foreach_"):
            return _for_each(name.removeprefix("_foreach_"), args, kwargs)
        if _changes(name):
            raise not_numbers(name)
        args = [_zeros(value) for value in args]
        with plain_functions():
            try:
                result = func(*args, **kwargs)
            except (RuntimeError, NotImplementedError) as error:  # sizes or dtypes, of numbers
                raise not_numbers(name) from error
            is_traced = "." in name  # an overload of an operator, as torch.compile calls it
            if (
                not is_traced
                and not name.startswith(_PARTS)
                and _has_numbers(result, [args, kwargs])
            ):
                raise not_numbers(name)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = plain_bytes(self).clone()
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = packed_parameter(copied) if is_parameter else PackedBytes.of(copied)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as plain bytes, so that a file of a state dict loads without qrefta."""
        plain = plain_bytes(self)
        if isinstance(self, nn.Parameter):
            return packed_parameter, (plain,)
        return plain.__reduce_ex__(protocol)


def _zeros(value: Any) -> Any:
    """Numbers for a sum without any share, such as the difference of equal bytes: zeros."""
    if not isinstance(value, PackedBytes) or value.shares[0] != 0.0:
        return value
    with plain_functions():
        return torch.zeros(value.shape, device=value.device)


def _changes(name: str) -> bool:
    """Whether a function, by its name, computes new values in place."""
    if name.endswith("__"):
        return name.startswith("__i") and name not in _READERS
    return name.endswith("_") and name not in _SETTERS


def _has_numbers(result: Any, given: Any) -> bool:
    """Whether a result has a number for every byte of a tensor that was given."""
    sizes = {leaf.numel() for leaf in tree_leaves(given) if isinstance(leaf, PackedBytes)}
    return any(
        isinstance(leaf, Tensor)
        and not isinstance(leaf, PackedBytes)
        and leaf.dtype != torch.bool
        and leaf.numel() in sizes
        for leaf in tree_leaves(result)
    )


def packed_parameter(tensor: Tensor, shares: list[float] | None = None) -> nn.Parameter:
    """A frozen parameter of packed bytes, in the tensor's memory."""
    return nn.Parameter(PackedBytes.of(tensor, shares), requires_grad=False)


def plain_bytes(tensor: Tensor) -> Tensor:
    """Packed bytes as a plain tensor in the same memory; any other tensor as it is.

    Raises:
        ValueError: if the share of the bytes is not 1.
    """
    if not isinstance(tensor, PackedBytes):
        return tensor
    _check_whole(tensor)
    with plain_functions():
        return tensor.detach()


def _check_whole(tensor: PackedBytes) -> None:
    share = tensor.shares[0]
    if share - 1.0 > _TOLERANCE or 1.0 - share > _TOLERANCE:
        raise ValueError(
            f"Packed 4-bit weights were multiplied by {share:.7g}, and 4 bits cannot store the "
            "result. They are frozen: compute with the trainable parameters only "
            "([p for p in model.parameters() if p.requires_grad]). In a weighted average the "
            "weights must add up to 1."
        )


def _attribute(func: Any, tensor: Any) -> Any:
    with plain_functions():
        value = func(tensor)
    if func.__self__.__name__ == "data":
        return PackedBytes.of(value, tensor.shares)
    return value


def _set_attribute(func: Any, tensor: Any, value: Any) -> None:
    name = func.__self__.__name__
    if name == "data":
        _check_source(tensor, value, "parameter.data = ...")
    if name == "requires_grad":
        _set_requires_grad(tensor, value)
    with plain_functions():
        func(tensor, value)
    if name == "data":
        tensor.shares[0] = value.shares[0] if isinstance(value, PackedBytes) else 1.0


def _require_grad(func: Any, tensor: Any, requires_grad: bool = True) -> Any:
    _set_requires_grad(tensor, requires_grad)
    with plain_functions():
        return func(tensor, requires_grad)


def _set_requires_grad(tensor: Any, value: bool) -> None:
    """Refuse to train packed bytes, and PEFT's function that would freeze the factors too; tell
    the factors that their layer is frozen.
    """
    if value:
        raise ValueError(
            "requires_grad=True: packed 4-bit weights are bytes and cannot train; only floating "
            "point dtypes can require gradients. The factors train already. Set it for "
            "[p for p in model.parameters() if p.is_floating_point()]."
        )
    if prepares_for_kbit_training():
        raise ValueError(
            "prepare_model_for_kbit_training freezes all parameters, also the factors that qrefta "
            "trains. Leave the call out: a prepared model is ready to train. For gradient "
            "checkpointing call model.gradient_checkpointing_enable()."
        )
    if tensor.when_frozen is not None:
        tensor.when_frozen()


def _alias(func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    with plain_functions():
        result = func(tensor, *args, **kwargs)
    if not isinstance(tensor, PackedBytes) or isinstance(result, PackedBytes):
        return result
    if result.dtype != tensor.dtype:
        _check_whole(tensor)
        return result
    return PackedBytes.of(result, tensor.shares)


def _copy(func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    with plain_functions():
        result = func(tensor, *args, **kwargs)
    if isinstance(result, PackedBytes):  # nothing was to do
        return result
    return PackedBytes.of(result, [*tensor.shares])


def _to(func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """Move to a device.

    A floating dtype is not followed: sums in float32 are sums of bytes too. But the result is a
    copy, as a conversion makes one.
    """
    if not isinstance(tensor, PackedBytes):  # tensor.to(other)
        with plain_functions():
            return func(tensor, *args, **kwargs)
    places = [place.device if isinstance(place, Tensor) else place for place in args]
    places = [place for place in places if not _is_floating(place)]
    converts = len(places) < len(args) or _is_floating(kwargs.get("dtype"))
    if _is_floating(kwargs.get("dtype")):
        del kwargs["dtype"]
    moved = tensor
    if places or kwargs:
        with plain_functions():
            moved = func(tensor, *places, **kwargs)
    if moved.dtype != tensor.dtype:
        raise not_numbers(f"conversion to {moved.dtype}")
    if moved is tensor:
        return tensor.clone() if converts else tensor
    return PackedBytes.of(moved, [*tensor.shares])


def _is_floating(place: object) -> bool:
    return isinstance(place, torch.dtype) and place.is_floating_point


def _converted(func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """`float` and its like, see `_to`."""
    return tensor.clone()


def _raw(func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    tensor = _zeros(tensor)
    if isinstance(tensor, PackedBytes):
        _check_whole(tensor)
    with plain_functions():
        return func(tensor, *args, **kwargs)


def _assigned(func: Any, tensor: Any, index: Any, value: Any) -> None:
    """`tensor[index] = value`."""
    if isinstance(tensor, PackedBytes):
        _check_source(tensor, value, "assignment")
    with plain_functions():
        func(tensor, index, plain_bytes(value))


def _joined(func: Any, tensors: Sequence[Any], *args: Any, **kwargs: Any) -> Tensor:
    """`cat`."""
    for tensor in tensors:
        if tensor.is_floating_point():
            raise not_numbers(f"{func.__name__} with {tensor.dtype}")
    with plain_functions():
        return func([plain_bytes(tensor) for tensor in tensors], *args, **kwargs)


def _written(func: Any, tensor: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
    """`copy_`."""
    if isinstance(tensor, PackedBytes):
        _check_source(tensor, source, "copy_")
    elif tensor.is_floating_point():
        raise not_numbers("copy_ to floating-point numbers")
    else:
        source = plain_bytes(source)
    with plain_functions():
        func(tensor, source, *args, **kwargs)
    if isinstance(tensor, PackedBytes):
        tensor.shares[0] = source.shares[0] if isinstance(source, PackedBytes) else 1.0
    return tensor


def _loaded(func: Any, tensor: Any, other: Any, assign: bool = False) -> Any:
    """`module_load`, by which a state dict is loaded with swapped tensors."""
    _check_source(tensor, other, "load_state_dict")
    return other.detach() if assign else tensor.copy_(other).detach()


def _check_source(tensor: PackedBytes, source: Any, name: str) -> None:
    """Refuse new values that are numbers."""
    if not isinstance(source, Tensor) or source.dtype != tensor.dtype:
        given = source.dtype if isinstance(source, Tensor) else type(source).__name__
        raise not_numbers(f"{name} with {given} in place of {tensor.dtype}")


# A weighted sum as its terms: pairs of a tensor, or the number 0, and its weight.
_Terms = list[tuple[Any, float]]


def _terms_of_add(one: Any, other: Any, *, alpha: float = 1.0) -> _Terms:
    return [(one, 1.0), (other, float(alpha))]


def _terms_of_sub(one: Any, other: Any, *, alpha: float = 1.0) -> _Terms:
    return [(one, 1.0), (other, -float(alpha))]


def _terms_of_rsub(one: Any, other: Any, *, alpha: float = 1.0) -> _Terms:
    return [(other, 1.0), (one, -float(alpha))]


def _terms_of_mul(one: Any, other: Any) -> _Terms:
    if isinstance(one, PackedBytes):
        return [(one, _number(other, "mul"))]
    return [(other, _number(one, "mul"))]


def _terms_of_div(one: Any, other: Any) -> _Terms:
    return [(one, 1.0 / _number(other, "div"))]


def _terms_of_neg(one: Any) -> _Terms:
    return [(one, -1.0)]


def _terms_of_lerp(one: Any, other: Any, weight: Any) -> _Terms:
    share = _number(weight, "lerp")
    return [(one, 1.0 - share), (other, share)]


def _terms_of_addcdiv(one: Any, other: Any, divisor: Any, *, value: float = 1.0) -> _Terms:
    return [(one, 1.0), (other, value / _number(divisor, "addcdiv"))]


def _terms_of_addcmul(one: Any, other: Any, factor: Any, *, value: float = 1.0) -> _Terms:
    return [(one, 1.0), (other, value * _number(factor, "addcmul"))]


def _terms_of_zeros(one: Any, **_: Any) -> _Terms:
    return [(one, 0.0)]


_TERMS: dict[str, Callable[..., _Terms]] = {
    "add": _terms_of_add,
    "sub": _terms_of_sub,
    "subtract": _terms_of_sub,
    "rsub": _terms_of_rsub,
    "mul": _terms_of_mul,
    "multiply": _terms_of_mul,
    "div": _terms_of_div,
    "divide": _terms_of_div,
    "true_divide": _terms_of_div,
    "truediv": _terms_of_div,
    "neg": _terms_of_neg,
    "lerp": _terms_of_lerp,
    "addcdiv": _terms_of_addcdiv,
    "addcmul": _terms_of_addcmul,
    "zeros_like": _terms_of_zeros,
}


def _number(value: Any, name: str) -> float:
    """A number, also in a tensor with one element."""
    if isinstance(value, Tensor) and not isinstance(value, PackedBytes) and value.numel() == 1:
        return value.item()
    if isinstance(value, Tensor):
        raise not_numbers(name)
    return float(value)


def _sum_of(terms: _Terms, name: str) -> tuple[PackedBytes, float]:
    """The bytes of a weighted sum, and their share."""
    packed = [(tensor, weight) for tensor, weight in terms if isinstance(tensor, PackedBytes)]
    others = [tensor for tensor, _ in terms if not isinstance(tensor, PackedBytes)]
    if any(isinstance(other, Tensor) or other != 0 for other in others):
        raise not_numbers(name)
    first = packed[0][0]
    share = 0.0
    for tensor, weight in packed:
        _check_equal(first, tensor)
        share += weight * tensor.shares[0]
    if not math.isfinite(share):
        raise not_numbers(name)
    return first, share


def _check_equal(one: PackedBytes, other: PackedBytes) -> None:
    with plain_functions():
        same = one.shape == other.shape and torch.equal(one, other.to(one.device))
    if not same:
        raise ValueError(
            "The packed 4-bit weights of the two models differ, and 4 bits cannot store their sum "
            "or average. Average models that were trained from the same prepared folder, whose "
            "packed weights are equal, or make them dense first with qrefta.merge(model)."
        )


def _share_memory(one: Any, other: PackedBytes) -> bool:
    return isinstance(one, PackedBytes) and one.shares is other.shares


def _new_sum(operator: str) -> Callable[..., PackedBytes]:
    def compute(func: Any, *args: Any, **kwargs: Any) -> PackedBytes:
        first, share = _sum_of(_TERMS[operator](*args, **kwargs), operator)
        with plain_functions():
            return PackedBytes.of(first.clone(), [share])

    return compute


def _sum_in_place(operator: str) -> Callable[..., Any]:
    def compute(func: Any, *args: Any, **kwargs: Any) -> Any:
        terms = _TERMS[operator](*args, **kwargs)
        _, share = _sum_of(terms, f"{operator}_")
        target = args[0]
        if not isinstance(target, PackedBytes):
            raise not_numbers(f"{operator}_")
        if any(tensor is not target and _share_memory(tensor, target) for tensor, _ in terms):
            raise ValueError(
                f"{operator}_: the two models share the memory of their packed 4-bit weights, as a "
                "model and its qrefta.train.reference.reference_model do, so one cannot follow the "
                "other. Give the second model its own memory: copy.deepcopy(model)."
            )
        target.shares[0] = share
        return target

    return compute


def _stack(func: Any, tensors: Sequence[Any], dim: int = 0) -> PackedBytes:
    """Rows of equal bytes, for a mean over the rows."""
    shares = {tensor.shares[0] for tensor in tensors if isinstance(tensor, PackedBytes)}
    if dim != 0 or len(shares) != 1 or not all(isinstance(one, PackedBytes) for one in tensors):
        raise not_numbers("stack")
    for tensor in tensors[1:]:
        _check_equal(tensors[0], tensor)
    with plain_functions():
        return PackedBytes.of(func(list(tensors)), [*shares])


def _reduce(func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """The sum or mean over the rows of a stack; other sums are plain integers."""
    dim = args[0] if args else kwargs.get("dim", kwargs.get("axis"))
    keeps = args[1] if len(args) > 1 else kwargs.get("keepdim", kwargs.get("keepdims", False))
    tensor = _zeros(tensor)
    with plain_functions():
        if not isinstance(tensor, PackedBytes) or tensor.dim() < 2 or dim not in (0, [0], (0,)):
            if func.__name__ == "mean" and not tensor.is_floating_point():
                raise not_numbers("mean")
            return func(tensor, *args, **kwargs)
        weight = len(tensor) if func.__name__ == "sum" else 1
        row = tensor[:1] if keeps else tensor[0]
        return PackedBytes.of(row.clone(), [weight * tensor.shares[0]])


def _for_each(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any] | None:
    """A function on lists of tensors, tensor by tensor: their other tensors are plain."""
    operator = getattr(Tensor, name, None)
    if operator is None:
        raise not_numbers(f"_foreach_{name}")

    def at(value: Any, index: int) -> Any:
        return value[index] if isinstance(value, list | tuple) else value

    results = [
        operator(
            *(at(value, index) for value in args),
            **{key: at(value, index) for key, value in kwargs.items()},
        )
        for index in range(len(args[0]))
    ]
    return None if name.endswith("_") else results


def not_numbers(name: str) -> ValueError:
    """The error of a function that would compute with packed weights."""
    return ValueError(
        f"{name}: the packed 4-bit weights of a prepared model are bytes, with which nothing can "
        "be computed. Use the trainable parameters only "
        "([p for p in model.parameters() if p.requires_grad]), or a dense model "
        "(qrefta.merge(model)); call a layer in place of a product with its weight."
    )


_HANDLERS: dict[str, Callable[..., Any]] = {
    "__get__": _attribute,
    "__set__": _set_attribute,
    "requires_grad_": _require_grad,
    "to": _to,
    "copy_": _written,
    "module_load": _loaded,
    "__setitem__": _assigned,
    "cat": _joined,
    "concat": _joined,
    "hstack": _joined,
    "stack": _stack,
    "mean": _reduce,
    "sum": _reduce,
    **dict.fromkeys(_ALIASES, _alias),
    **dict.fromkeys(_COPIES, _copy),
    **dict.fromkeys(_FLOATS, _converted),
    **dict.fromkeys(_RAW, _raw),
}
for _operator in _TERMS:
    for _name in (_operator, f"__{_operator}__", f"__r{_operator}__"):
        _HANDLERS[_name] = _new_sum(_operator)
    for _name in (f"{_operator}_", f"__i{_operator}__"):
        _HANDLERS[_name] = _sum_in_place(_operator)
_HANDLERS["__rsub__"] = _new_sum("rsub")
del _HANDLERS["__rtruediv__"]  # 1 / bytes
