"""The memory of a training step, counted without running it.

The model is made of fake tensors: they have shape, dtype and device but no values, and every
operation on them does the bookkeeping of a real operation, autograd included. A storage counts from
the operation that makes it until the last tensor on it is gone, which Python and autograd decide as
in a real step. So the count follows the code that will run, whatever the architecture; there is no
formula for the activations of a model. Integers such as token ids are real: code may look at their
values.

A model of many equal blocks is counted with three of them. At the border between two blocks, in the
forward and in the backward pass, a new segment of the count begins; the segments of the second
block stand for all blocks between the first and the last. This is exact, since each of those blocks
adds and releases the same bytes. For the same reason three chunks of tokens stand for all in the
loss of a head.

The count is for a GPU: attention is a fused kernel, which keeps its operands, its output and a
number a row, and sums the gradient of the queries in float32; dropout keeps one byte an element.
Memory inside other kernels is not counted: bitsandbytes' product dequantizes its weight there, but
this is below the peak, since the backward pass dequantizes it outside the kernel, together with
more tensors. For the same reason it does not matter that the product on a CPU, which is counted,
dequantizes a part of a large weight at a time.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from qrefta._compat.torch import FakeTensorMode, TorchDispatchMode, storage_id, tree_leaves
from qrefta.nn.checkpointing import selective_contexts
from qrefta.nn.head_loss import plain_head, summed_cross_entropy
from qrefta.nn.packed_parameters import unpack

COUNTED_BLOCKS = 3  # the first, one for all between, the last
# of tokens whose logits exist at a time; the second is made while the first is still there
COUNTED_CHUNKS = 3


class Footprint(NamedTuple):
    """Bytes of a training step, without the parameters and buffers of the model.

    Attributes:
        kept: tensors that the forward pass leaves for the backward pass, inputs included.
        optimizer: state of the optimizer.
        peak: the most bytes at a time, optimizer state included.
    """

    kept: int
    optimizer: int
    peak: int


def fake(model: PreTrainedModel) -> PreTrainedModel:
    """The model with fake CPU tensors instead of its (meta) parameters and buffers."""
    unpack(model)  # the mode takes no subclass of Tensor
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
    model.tie_weights()  # every name got a new tensor
    return model


def count_step(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    repeated: Mapping[str, int],
    head: nn.Linear | None = None,
) -> Footprint:
    """Footprint of a training step after the first, on the mean cross-entropy of the first output,
    in float32.

    Args:
        model: in training mode, of fake tensors.
        inputs: of its forward pass; integers are real.
        make_optimizer: makes an optimizer of the trainable parameters, if there are any.
        repeated: paths of the lists of blocks that were cut to `COUNTED_BLOCKS`, with their number
            of blocks.
        head: of a language model whose loss makes no whole logits (`qrefta.nn.head_loss`).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trainable) if trainable else None
    states = [] if optimizer is None else _states(optimizer, trainable)
    storages = {storage_id(tensor.untyped_storage()): tensor.nbytes for tensor in states}
    state_bytes = sum(storages.values())

    ledger = _Ledger()
    with _AsOnCuda(), ledger, _blocks_followed(model, repeated, ledger):
        ledger.leave_out([*model.parameters(), *model.buffers(), *states])
        ledger.enter(inputs.values())
        loss = _loss(model, inputs, head)
        kept = ledger.level()
        ledger.turned = True
        ledger.begin()
        if loss.requires_grad:  # not if the model is only quantized
            loss.backward()
        del loss
        if optimizer is not None:
            optimizer.step()
    return Footprint(kept, state_bytes, state_bytes + ledger.peak())


def _states(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The tensors of an optimizer's state, which its first step makes."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return list(filter(_is_tensor, tree_leaves(list(optimizer.state.values()))))


def _loss(model: nn.Module, inputs: Mapping[str, Tensor], head: nn.Linear | None) -> Tensor:
    """Mean cross-entropy of the first output, in float32 as transformers computes it, or of the
    head of its tokens, which all have a label.
    """
    if head is None:
        logits = model(**inputs)[0]
        rows = logits.float().flatten(0, -2)
        return nn.functional.cross_entropy(rows, torch.zeros(len(rows), dtype=torch.long))
    assert isinstance(model, PreTrainedModel)
    with plain_head(model):
        hidden = model(**inputs)[0].flatten(0, -2)
    labels = torch.zeros(len(hidden), dtype=torch.long)
    labelled = torch.arange(len(hidden))
    total = summed_cross_entropy(hidden[labelled], head.weight, head.bias, labels, COUNTED_CHUNKS)
    return total / len(hidden)


@dataclass
class _Segment:
    """A part of the step.

    Attributes:
        times: number of such parts that follow each other.
        change: bytes at its end above its start.
        highest: most bytes above its start.
    """

    times: int
    change: int = 0
    highest: int = 0


class _Ledger(TorchDispatchMode):
    """Counts the storages that operations make while it is active.

    Attributes:
        turned: whether the backward pass has begun; blocks that run from then on are recomputed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turned = False
        self._segments = [_Segment(times=1)]
        self._living: dict[int, weakref.ref[torch.UntypedStorage] | None] = {}

    def begin(self, times: int = 1) -> None:
        """Begin a segment that stands for `times` equal segments."""
        self._segments.append(_Segment(times))

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count the storages of these tensors, which live on."""
        self._living.update((storage_id(tensor.untyped_storage()), None) for tensor in tensors)

    def enter(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these tensors until they are gone, if they are not counted yet."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage_id(storage)
            if key not in self._living:
                nbytes = storage.nbytes()
                self._living[key] = weakref.ref(storage, partial(self._release, key, nbytes))
                self._add(nbytes)

    def level(self) -> int:
        """Bytes that live now."""
        return sum(segment.times * segment.change for segment in self._segments)

    def peak(self) -> int:
        """The most bytes that lived at a time."""
        level = 0
        most = 0
        for segment in self._segments:
            last = level + (segment.times - 1) * max(segment.change, 0)
            most = max(most, last + segment.highest)
            level += segment.times * segment.change
        return most

    def _release(self, key: int, nbytes: int, _: object) -> None:
        del self._living[key]
        self._add(-nbytes)

    def _add(self, nbytes: int) -> None:
        segment = self._segments[-1]
        segment.change += nbytes
        segment.highest = max(segment.highest, segment.change)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.enter(filter(_is_tensor, tree_leaves(result)))
        return result


def counted_checkpointing(selective: bool) -> dict[str, Any]:
    """`gradient_checkpointing_kwargs` of a counted model; torch leaves a mode while `backward`
    runs.
    """

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        if not selective:
            return nullcontext(), _AsOnCuda()
        keeping, recomputing = selective_contexts()
        return keeping, _on_cuda(recomputing)

    return {"use_reentrant": False, "context_fn": contexts}


@contextmanager
def _on_cuda(context: AbstractContextManager[Any]) -> Iterator[None]:
    with context, _AsOnCuda():
        yield


@contextmanager
def _blocks_followed(
    model: nn.Module, repeated: Mapping[str, int], ledger: _Ledger
) -> Iterator[None]:
    """Begin a segment wherever a block of these lists begins, in both passes."""
    handles = []
    for path, layers in repeated.items():
        between = layers - COUNTED_BLOCKS + 1
        blocks = model.get_submodule(path)
        for index, block in enumerate(blocks.children()):
            hook = partial(_enter_block, ledger, index, between)
            handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _enter_block(
    ledger: _Ledger,
    index: int,
    between: int,
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """A block begins; the backward pass of the block before begins when the gradient of this input
    is complete.
    """
    if ledger.turned:
        return
    ledger.begin(between if index == 1 else 1)
    hidden = next(value for value in (*args, *kwargs.values()) if _is_tensor(value))
    if hidden.requires_grad and index:
        hidden.register_hook(lambda _: ledger.begin(between if index == 2 else 1))


class _AsOnCuda(TorchFunctionMode):
    """Computes attention and dropout as CUDA kernels do, which keep less than the CPU kernels."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        replacements = {
            nn.functional.scaled_dot_product_attention: _attention,
            nn.functional.dropout: _dropout,
        }
        return replacements.get(func, func)(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    return _FusedAttention.apply(query, key, value, attn_mask)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


def _attention_room(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the result of a fused kernel, and for a number a row."""
    *others, heads, tokens, _ = query.shape
    # The kernels lay out their output as (..., tokens, heads, width).
    out = query.new_empty(*others, tokens, heads, value.shape[-1]).transpose(-2, -3)
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


# One operator named attention, as selective checkpointing sees the kernels.
_attention_kernel = torch.library.custom_op("qrefta::attention", _attention_room, mutates_args=())
_attention_kernel.register_fake(_attention_room)


class _FusedAttention(torch.autograd.Function):
    """The tensors that a fused attention kernel takes and keeps; a boolean mask becomes an additive
    one.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        out, rows = _attention_kernel(query, key, value)
        kept = [query, key, value, out, rows]
        if mask is not None:
            kept.append(mask.to(query.dtype))
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        summed = torch.empty_like(query, dtype=torch.float32)
        return summed.to(query.dtype), torch.empty_like(key), torch.empty_like(value), None


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)
