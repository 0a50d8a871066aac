"""Rounding block by block: every block takes in the error of the quantized blocks before it.

A linear layer of the quantized model reads x^, which comes from quantized blocks, and not the x of
the 16-bit model. The layer V that still gives the outputs of the 16-bit layer W is at the minimum
of

    E||x W^T - x^ V^T||^2 + lambda ||V - W||^2        lambda = RIDGE mean(diag H)

    V = W + W (C - H) (H + lambda I)^-1               H = E[x^^T x^], C = E[x^T x^]

It is rounded in place of W, with error feedback under H. This is QEP (Arai and Ichikawa, arXiv
2504.09629) with its damping, and the asymmetric calibration of GPTAQ (Li et al., arXiv 2504.02692)
written as a target for any rounding. H and C depend on the codes of all layers before, so layers
are rounded in the order in which they run, within a block too. If all layers of a block were
corrected at once, each would correct the same error: on SmolLM2 in 3 bits the KL divergence is then
four times as large as without correction.

Errors pass from block to block in one list of blocks. The first block of a list reads the inputs of
the 16-bit model.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qrefta.config.stack import LayerStack
from qrefta.model.modes import eval_mode
from qrefta.model.stacks import Weights, block_of
from qrefta.split.calibrate import (
    DOUBLE_WIDTH,
    FULL_WIDTH,
    Batch,
    Moments,
    accepted_inputs,
    batch_inputs,
    kept_tokens,
)

# Share of the mean of the diagonal of H that holds a target near its weight.
RIDGE = 0.1
_HIDDEN = "hidden_states"  # the keyword of a block's input in transformers
_ADVICE = 'Give rounding="feedback", which needs no order of blocks.'


Inputs = dict[str, list[Tensor]]  # of linear layers, by path, one tensor a call


class _Reached(Exception):  # noqa: N818 -- no error
    """Ends a pass through a block."""


class _Call(NamedTuple):
    """The arguments of a block for one batch, without its hidden states.

    Attributes:
        by_name: whether the hidden states are a keyword.
    """

    args: tuple[Any, ...]
    keywords: dict[str, Any]
    by_name: bool


@dataclass
class _Run:
    """What the blocks of one list got in a pass of the 16-bit model.

    Attributes:
        first: hidden states that the first block got, one tensor a batch.
        calls: path of a block -> its other arguments, one entry a batch.
        last: path and output of the block that ran last.
    """

    first: list[Tensor] = field(default_factory=list)
    calls: dict[str, list[_Call]] = field(default_factory=dict)
    last: tuple[str, Tensor] | None = None


class _Pair:
    """Sums over tokens of x^^T x^, and of (x - x^)^T x^ where both have the same tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self.moment: Tensor | None = None
        self.shift: Tensor | None = None

    def add(self, given: Tensor, dense: Tensor | None) -> None:
        """Add rows of the quantized model, and of the 16-bit model, each (tokens, in)."""
        given = given.float()
        self.tokens += len(given)
        if given.shape[1] > FULL_WIDTH:
            self.moment = _added(self.moment, given.double().square().sum(0))
            return
        self.moment = _added(self.moment, given.T @ given)
        if dense is not None and dense.shape == given.shape:
            self.shift = _added(self.shift, (dense.float() - given).T @ given)


def _added(total: Tensor | None, product: Tensor) -> Tensor:
    if total is None:
        return product.to(torch.float64 if len(product) <= DOUBLE_WIDTH else torch.float32)
    return total.add_(product)


class BlockSequence:
    """The blocks of a dense model in the order in which they run, each with its inputs from the
    quantized blocks before it.

    Memory: for all calibration tokens the hidden states twice, and the inputs of the linear layers
    of one block; and H and C of one layer.

    Args:
        model: dense; its linear layers are replaced between the steps.
        stacks: all stacks of the model.
        batches: as for `gather_moments`.
        moments: of the 16-bit model, for the layers that no step has reached.
        progress: show a progress bar over the blocks.

    Raises:
        ValueError: if the model is an encoder-decoder or has fused experts, a block runs several
            times, or the model changes the hidden states between two blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        stacks: list[LayerStack],
        batches: Iterable[Batch],
        moments: Moments,
        progress: bool,
    ) -> None:
        self._model = model
        self._dense_moments = moments
        self._progress = progress
        self._layers = _layers_by_block(model, stacks)
        # Of the layers of this step:
        self._group: frozenset[str] = frozenset()
        self._pair = _Pair()
        self._correction: Tensor | None = None
        self._masks: list[Tensor | None] = []
        self._runs = self._record(batches)

    @property
    def moments(self) -> Moments:
        """H of the layers of this step; of other layers the 16-bit model's."""
        dense = self._dense_moments
        paths = [path for layers in self._layers.values() for path in layers]
        tokens = {path: dense.tokens[dense.owner(path)] for path in paths}
        return Moments({path: path for path in paths}, tokens, self._moment)

    def targets(self, stack: LayerStack, weights: Weights) -> Weights:
        """The weights V of a stack; each can be read in its step."""

        def read(layer: int, start: int, stop: int) -> Tensor:
            rows = weights.read(layer, start, stop)
            correction = self._correction
            assert stack.modules[layer] in self._group, "layers are read in their step"
            if correction is None:
                return rows
            rows = rows.to(weights.device, torch.float32)
            return rows + rows @ correction.to(weights.device)

        return replace(weights, read=read)

    def steps(self) -> Iterator[list[str]]:
        """The paths of linear layers that read the same inputs, in the order in which they run.

        The caller replaces these layers of the model before it asks for the next step.
        """
        bar = tqdm(
            total=len(self._layers), desc="Rounding", unit="block", disable=not self._progress
        )
        with bar:
            for run in self._runs.values():
                dense = run.first
                given = run.first
                for path, calls in run.calls.items():
                    dense, inputs = self._dense(path, dense, calls)
                    for group in self._groups(path, inputs[0]):
                        self._gather(path, group, given, calls, inputs)
                        yield group
                    given = [self._output(path, x, call) for x, call in zip(given, calls)]
                    bar.update()

    def _record(self, batches: Iterable[Batch]) -> dict[str, _Run]:
        """The arguments of every block, by the list that holds the blocks."""
        runs: dict[str, _Run] = defaultdict(_Run)
        handles = []
        for path in self._layers:
            run = runs[path.rpartition(".")[0]]
            run.calls[path] = []
            block = self._model.get_submodule(path)
            handles += [
                block.register_forward_pre_hook(partial(_before, run, path), with_kwargs=True),
                block.register_forward_hook(partial(_after, run, path)),
            ]
        names = inspect.signature(self._model.forward).parameters
        without_cache = {"use_cache": False} if "use_cache" in names else {}
        try:
            with eval_mode(self._model), torch.no_grad():
                for batch in batches:
                    inputs = batch_inputs(self._model, batch)
                    self._masks.append(inputs.get("attention_mask"))
                    for run in runs.values():
                        run.last = None
                    self._model(**accepted_inputs(self._model, inputs), **without_cache)
        finally:
            for handle in handles:
                handle.remove()
        for run in runs.values():
            for path, calls in run.calls.items():
                if len(calls) != len(self._masks):
                    raise ValueError(
                        f"{path} ran {len(calls)} times for {len(self._masks)} batches, and "
                        f'rounding="sequential" needs one time a batch. {_ADVICE}'
                    )
        return dict(runs)

    def _dense(
        self, path: str, hidden: list[Tensor], calls: list[_Call]
    ) -> tuple[list[Tensor], list[Inputs]]:
        """The outputs of a block that is not replaced yet, and the inputs of its layers."""
        outputs = []
        inputs = []
        for x, call in zip(hidden, calls, strict=True):
            with self._collected(self._layers[path]) as found:
                outputs.append(self._output(path, x, call))
            inputs.append(found)
        return outputs, inputs

    def _groups(self, path: str, inputs: Inputs) -> list[list[str]]:
        """The layers of a block in the order in which they run; layers with the same inputs are one
        group, and layers that do not run are the last.
        """
        groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name, tensors in inputs.items():
            groups[tuple(map(id, tensors))].append(name)
        idle = [name for name in self._layers[path] if name not in inputs]
        return [*groups.values(), *([idle] if idle else [])]

    def _gather(
        self,
        path: str,
        group: list[str],
        given: list[Tensor],
        calls: list[_Call],
        dense: list[Inputs],
    ) -> None:
        """Gather H and C of a group of layers."""
        first = group[0]
        pair = _Pair()
        for index, (x, call) in enumerate(zip(given, calls, strict=True)):
            expected = dense[index].get(first, [])
            with self._collected([first], stop_after=len(expected)) as found:
                self._output(path, x, call)
            mask = self._masks[index]
            pairs = zip_longest(found[first], expected)
            for tensor, other in pairs:
                if tensor is not None:
                    rows = None if other is None else kept_tokens(other, mask)
                    pair.add(kept_tokens(tensor, mask), rows)
        self._group = frozenset(group)
        self._pair = pair
        self._correction = _correction(pair)

    def _output(self, path: str, hidden: Tensor, call: _Call) -> Tensor:
        block = self._model.get_submodule(path)
        with eval_mode(block), torch.no_grad():
            hidden = hidden.clone()  # the block may write to it
            if call.by_name:
                found = block(*call.args, **{_HIDDEN: hidden}, **call.keywords)
            else:
                found = block(hidden, *call.args, **call.keywords)
        return _hidden_of(found)

    @contextmanager
    def _collected(self, layers: list[str], stop_after: int | None = None) -> Iterator[Inputs]:
        """Collect the inputs of linear layers, one tensor a call.

        With `stop_after` the pass ends once a layer was called so many times.
        """
        found: Inputs = defaultdict(list)

        def before(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name].append(args[0])
            if len(found[name]) == stop_after:
                raise _Reached

        handles = [
            self._model.get_submodule(name).register_forward_pre_hook(partial(before, name))
            for name in layers
        ]
        try:
            yield found
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def _moment(self, path: str) -> Tensor:
        pair = self._pair
        if path not in self._group or pair.moment is None:
            return self._dense_moments.of(path)
        return (pair.moment / pair.tokens).float()


def _correction(pair: _Pair) -> Tensor | None:
    """(C - H) (H + lambda I)^-1, (in, in), float32; None if it is zero or not known."""
    if pair.shift is None or pair.moment is None or not pair.shift.any():
        return None
    moment = pair.moment / pair.tokens
    shift = pair.shift / pair.tokens
    width = len(moment)
    # With fewer tokens than inputs H has no full rank, and the target stays nearer.
    ridge = RIDGE * max(1.0, width / pair.tokens)
    moment.diagonal().add_(ridge * moment.diagonal().mean())
    factor = torch.linalg.cholesky(moment)
    return torch.cholesky_solve(shift.T, factor).T.float()


def _layers_by_block(model: nn.Module, stacks: list[LayerStack]) -> dict[str, list[str]]:
    """Paths of the linear layers of every block, in the order of the model's modules.

    Raises:
        ValueError: for a model whose blocks are not run one after the other.
    """
    if bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)):
        raise ValueError(
            f'rounding="sequential" is for models with one list of blocks, and '
            f"{type(model).__name__} has an encoder and a decoder. {_ADVICE}"
        )
    fused = next((stack.name for stack in stacks if stack.experts), None)
    if fused is not None:
        raise ValueError(
            f'rounding="sequential" is for linear layers, and {fused} holds fused experts. '
            f"{_ADVICE}"
        )
    found: dict[str, list[str]] = {}
    for stack in stacks:
        for path in stack.modules:
            found.setdefault(block_of(model, path), []).append(path)
    places = {path: place for place, (path, _) in enumerate(model.named_modules())}
    return dict(sorted(found.items(), key=lambda entry: places[entry[0]]))


def _before(
    run: _Run, path: str, _: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Keep the arguments of a block, and check that its input is the output of the block before."""
    by_name = _HIDDEN in keywords
    hidden = keywords[_HIDDEN] if by_name else next(iter(args), None)
    if not isinstance(hidden, Tensor):
        raise ValueError(f"{path} is called without hidden states. {_ADVICE}")
    if run.last is None:
        if path != next(iter(run.calls)):
            raise ValueError(f"{path} runs before the first block of its list. {_ADVICE}")
        run.first.append(hidden.clone())  # the model may write to it later
    elif hidden is not run.last[1]:
        raise ValueError(
            f"The input of {path} is not the output of {run.last[0]}: the model changes the hidden "
            f"states between blocks. {_ADVICE}"
        )
    others = {name: value for name, value in keywords.items() if name != _HIDDEN}
    run.calls[path].append(_Call(args if by_name else args[1:], others, by_name))


def _after(run: _Run, path: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    run.last = (path, _hidden_of(output))


def _hidden_of(output: Any) -> Tensor:
    """The hidden states that a block returned, alone or as the first of several."""
    return output[0] if isinstance(output, tuple | list) else output
