"""The blocks of a model as they ran on some batches, so that each of them can run by itself.

A pass of the whole model shows the order of the blocks, the hidden states that the first block of a
list gets, and the other arguments of every block (masks, positions). A block then runs on other
hidden states with the same arguments.

This is right only if the output of a block is the input of the next one as it is, and the other
arguments hold nothing that a block changes. Both are checked, and every block is run by itself once
and compared.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Cache

from qrefta._compat.torch import version_counter
from qrefta.model.modes import eval_mode
from qrefta.split.batches import Batch, accepted_inputs, batch_inputs, no_batches, without_cache

_HIDDEN = "hidden_states"  # the keyword of a block's input in transformers
# Largest difference of a block that runs by itself, relative to its output; GPU kernels may differ
# from run to run.
_TOLERANCE = 1e-2


class NoOrderError(ValueError):
    """A model whose layers cannot be rounded in the order in which they run.

    Attributes:
        reason: without the advice of the message.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f'{reason}. Give rounding="feedback", which works for any model.')
        self.reason = reason


class Call(NamedTuple):
    """The arguments of a block for one batch, without its hidden states.

    Attributes:
        by_name: whether the hidden states are a keyword.
    """

    args: tuple[Any, ...]
    keywords: dict[str, Any]
    by_name: bool


@dataclass
class Chain:
    """A list of blocks that run one after the other.

    Attributes:
        first: hidden states that the first block got, one tensor a batch.
        calls: path of a block -> its other arguments, one entry a batch; in order.
    """

    first: list[Tensor] = field(default_factory=list)
    calls: dict[str, list[Call]] = field(default_factory=dict)


class Recording(NamedTuple):
    """The blocks of a model as they ran on some batches.

    Attributes:
        chains: the lists of blocks that the batches use.
        masks: attention mask of every batch, (rows, length), or None.
    """

    chains: list[Chain]
    masks: list[Tensor | None]


def record(
    model: nn.Module,
    layers: Mapping[str, Sequence[str]],
    batches: Iterable[Batch],
    see: Callable[[str, Tensor, Tensor | None], None],
    *,
    progress: bool = True,
) -> Recording:
    """Run a model on batches and record its blocks.

    Memory: the hidden states of one block for all tokens, and of all blocks for the first batch.

    Args:
        model: dense.
        layers: path of a block -> paths of its linear layers; blocks are in the order of the
            model's modules.
        batches: as for `gather_moments`.
        see: called with the path, the input and the attention mask of every such layer that runs.
        progress: show a progress bar.

    Raises:
        ValueError: if there are no batches.
        NoOrderError: if a block does not run once for every batch and after the block before it,
            gets other hidden states than that block's output, shares changing state with other
            blocks, or gives another output when it runs by itself.
    """
    chains: dict[str, Chain] = defaultdict(Chain)
    for path in layers:
        chains[path.rpartition(".")[0]].calls[path] = []
    watches = [_Watch(chain) for chain in chains.values()]
    block_of = {path: block for block, paths in layers.items() for path in paths}
    masks: list[Tensor | None] = []

    def before(path: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        if all(watch.running != block_of[path] for watch in watches):
            raise NoOrderError(f"{path} runs outside of its block")
        see(path, args[0], masks[-1])

    with ExitStack() as stack:
        stack.enter_context(_watched(model, watches))
        stack.enter_context(without_cache(model))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.no_grad())
        for path in block_of:
            hook = model.get_submodule(path).register_forward_pre_hook(partial(before, path))
            stack.callback(hook.remove)
        for batch in tqdm(batches, desc="Calibrating", unit="batch", disable=not progress):
            inputs = batch_inputs(model, batch)
            masks.append(inputs.get("attention_mask"))
            for watch in watches:
                watch.begin()
            model(**accepted_inputs(model, inputs))
    if not masks:
        raise no_batches()
    used = [watch for watch in watches if watch.chain.first]  # without images, no image encoder
    for watch in used:
        for path, calls in watch.chain.calls.items():
            if len(calls) != len(masks):
                raise NoOrderError(
                    f"{path} ran {len(calls)} times for {len(masks)} batches, and "
                    'rounding="sequential" needs one time a batch'
                )
    for watch in used:
        watch.check(model)
    return Recording([watch.chain for watch in used], masks)


def run_block(model: nn.Module, path: str, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states that a block makes of others, with recorded arguments."""
    block = model.get_submodule(path)
    hidden = hidden.clone()  # the block may write to it
    with eval_mode(block), torch.no_grad():
        if call.by_name:
            output = block(*call.args, **{_HIDDEN: hidden}, **call.keywords)
        else:
            output = block(hidden, *call.args, **call.keywords)
    return _hidden_of(output)


class _Watch:
    """Checks and records the calls of one list of blocks while the model runs.

    Attributes:
        running: the block that runs now.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.running: str | None = None
        self._order = list(chain.calls)
        self._outputs: dict[str, Tensor] = {}  # of the first batch
        self._ran = 0  # blocks in this batch
        self._last: Tensor | None = None
        self._version = 0

    def begin(self) -> None:
        """Begin a batch."""
        self.running = None
        self._ran = 0
        self._last = None

    def before(
        self, path: str, _: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        """Check and record the arguments of a block."""
        if self._ran == len(self._order) or path != self._order[self._ran]:
            raise NoOrderError(
                f"{path} runs again, or before a block that stands before it in its list"
            )
        by_name = _HIDDEN in keywords
        hidden = keywords[_HIDDEN] if by_name else next(iter(args), None)
        if not isinstance(hidden, Tensor):
            raise NoOrderError(f"{path} is called without hidden states")
        self.running = path
        if self._last is None:
            self.chain.first.append(hidden.clone())  # the model may write to it later
        elif hidden is not self._last or version_counter(hidden) != self._version:
            raise NoOrderError(
                f"The input of {path} is not the output of {self._order[self._ran - 1]} as it is"
            )
        others = {name: value for name, value in keywords.items() if name != _HIDDEN}
        rest = args if by_name else args[1:]
        shared = next((value for value in (*rest, *others.values()) if _may_change(value)), None)
        if shared is not None:
            raise NoOrderError(
                f"{path} gets a {type(shared).__name__}, in which blocks may share what they "
                "compute"
            )
        self.chain.calls[path].append(Call(rest, others, by_name))

    def after(self, path: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Remember the output of a block."""
        self.running = None
        self._last = _hidden_of(output)
        self._version = version_counter(self._last)
        self._ran += 1
        self._outputs.setdefault(path, self._last.clone())

    def check(self, model: nn.Module) -> None:
        """Run every block by itself on the first batch, and compare."""
        hidden = self.chain.first[0]
        for path, calls in self.chain.calls.items():
            expected = self._outputs.pop(path)
            try:
                found = run_block(model, path, hidden, calls[0])
            except Exception as error:  # of any model's code
                raise NoOrderError(f"{path} does not run by itself ({error})") from error
            difference = (found.float() - expected.float()).norm()
            if not difference <= _TOLERANCE * expected.float().norm():
                raise NoOrderError(f"{path} gives another output when it runs by itself")
            hidden = expected


def _may_change(value: Any) -> bool:
    return isinstance(value, dict | list | Cache) or type(value).__name__.endswith("Cache")


def _hidden_of(output: Any) -> Tensor:
    """The hidden states that a block returned, alone or as the first of several."""
    hidden = next(iter(output), None) if isinstance(output, tuple | list) else output
    if not isinstance(hidden, Tensor):
        raise NoOrderError(f"A block returns {type(hidden).__name__} in place of hidden states")
    if hidden.is_inference():
        raise NoOrderError("The blocks run under torch.inference_mode()")
    return hidden


@contextmanager
def _watched(model: nn.Module, watches: list[_Watch]) -> Iterator[None]:
    """Show the calls of all blocks to the watches of their lists."""
    handles = []
    for watch in watches:
        for path in watch.chain.calls:
            block = model.get_submodule(path)
            # First of all hooks: hooks of others run again when the block runs by itself.
            before = partial(watch.before, path)
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            handles.append(block.register_forward_hook(partial(watch.after, path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
