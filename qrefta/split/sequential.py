"""Rounding layer after layer: every layer takes in the error of the quantized layers before it.

A linear layer of the quantized model reads x^, which comes from quantized layers, and not the x of
the 16-bit model. The layer V that still gives the outputs of the 16-bit layer W is at the minimum
of

    E||x W^T - x^ V^T||^2 + lambda ||V - W||^2        lambda = ridge mean(diag H)

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

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qrefta._compat.torch import version_counter
from qrefta._compat.transformers import FrameMask, frame_masks
from qrefta.config.stack import LayerStack
from qrefta.model.stacks import block_of
from qrefta.model.weights import Weights
from qrefta.split.batches import Batch, is_seq2seq, kept_tokens, not_finite
from qrefta.split.calibrate import check_reached
from qrefta.split.moment_sums import no_moment
from qrefta.split.moments import Moments
from qrefta.split.paired_sums import PairedSums
from qrefta.split.recording import Call, NoOrderError, record, run_block

# Linear layers of a block that rounding="auto" takes in their order; dense blocks have up to ten.
MOST_STEPS = 16
# Bytes of the inputs of a block's layers that rounding="auto" holds. 16,384 tokens of a Llama of 8B
# parameters take 0.9 GB in bfloat16.
MOST_BYTES = 4 << 30


# Inputs of linear layers in a pass, by path: each tensor with its version when it was read.
_Seen = dict[str, list[tuple[Tensor, int]]]


class Step(NamedTuple):
    """Linear layers that read the same inputs, and are rounded together.

    Attributes:
        paths: of the layers.
        moment: H, (in, in) or its diagonal (in,), float32.
        correction: (C - H) (H + lambda I)^-1, (in, in), float32; None if it is zero or not known.
    """

    paths: list[str]
    moment: Tensor
    correction: Tensor | None


class _Inputs(NamedTuple):
    """The inputs of the linear layers of a block in the 16-bit model.

    Attributes:
        groups: paths of layers that read the same inputs, in the order in which they run.
        by_layer: path of the first layer of a group -> batch -> one tensor a call.
    """

    groups: list[list[str]]
    by_layer: dict[str, list[list[Tensor]]]


class LayerSequence:
    """The linear layers of a dense model in the order in which they run.

    Memory: for all calibration tokens the hidden states twice, and the inputs of the linear layers
    of one block; and H and C of one layer.

    Args:
        model: dense; its linear layers are replaced between the steps.
        stacks: all stacks of the model.
        batches: as for `gather_moments`.
        most_bytes: of the inputs of a block's linear layers, for all tokens; None: any number.
        progress: show progress bars.

    Raises:
        ValueError: as `gather_moments`.
        NoOrderError: if the inputs take more than `most_bytes`, the model is an encoder-decoder or
            has fused experts, its blocks cannot run by themselves (see `record`), or a block writes
            to the input of a linear layer.
    """

    def __init__(
        self,
        model: nn.Module,
        stacks: list[LayerStack],
        batches: Iterable[Batch],
        *,
        most_bytes: int | None = None,
        progress: bool = True,
    ) -> None:
        self._model = model
        self._frames = frame_masks(model)
        self._progress = progress
        self._layers = _layers_by_block(model, stacks)
        self._widths = {path: stack.in_features for stack in stacks for path in stack.modules}
        count = _InputCount(self._layers, self._frames, most_bytes)
        self._chains, self._masks = record(
            model, self._layers, batches, count.add, progress=progress
        )
        self._tokens = count.tokens
        check_reached(self._tokens)
        self._step: Step | None = None
        for blocks in self._chains:  # refuse before anything is replaced
            hidden = blocks.first[:1]
            for path, calls in blocks.calls.items():
                self._run_dense(path, hidden, calls[:1])

    def moments(self) -> Moments:
        """H of the layers of the present step, and the tokens of all layers."""

        def read(path: str) -> Tensor:
            if not self._tokens[path]:
                return no_moment(self._widths[path])
            return self._step_of(path).moment

        return Moments({path: path for path in self._tokens}, self._tokens, read)

    def targets(self, stack: LayerStack, weights: Weights) -> Weights:
        """The weights V of a stack. Read a layer between the step that names it and the next."""

        def read(layer: int, start: int, stop: int) -> Tensor:
            rows = weights.read(layer, start, stop)
            path = stack.modules[layer]
            correction = self._step_of(path).correction if self._tokens[path] else None
            if correction is None:
                return rows
            rows = rows.to(weights.device, torch.float32)
            return rows + rows @ correction.to(weights.device)

        return replace(weights, read=read)

    def steps(self) -> Iterator[list[str]]:
        """The paths of the layers of every step.

        The caller replaces these layers of the model before it asks for the next step.
        """
        count = sum(len(blocks.calls) for blocks in self._chains)
        bar = tqdm(total=count, desc="Rounding", unit="block", disable=not self._progress)
        with bar:
            for blocks in self._chains:
                dense = list(blocks.first)
                quantized = list(blocks.first)
                blocks.first.clear()
                for path, calls in blocks.calls.items():
                    inputs = self._run_dense(path, dense, calls)
                    for group in inputs.groups:
                        self._step = self._gather(path, group, quantized, calls, inputs)
                        yield group
                    self._step = None
                    del inputs  # before the next ones are collected
                    for index, call in enumerate(calls):
                        quantized[index] = run_block(self._model, path, quantized[index], call)
                    bar.update()

    def _step_of(self, path: str) -> Step:
        step = self._step
        if step is None or path not in step.paths:
            raise RuntimeError(f"{path} is read outside of its step")
        return step

    def _run_dense(self, path: str, hidden: list[Tensor], calls: list[Call]) -> _Inputs:
        """The inputs of the layers of a block that is still dense; its outputs take the place of
        the hidden states.
        """
        seen: list[_Seen] = []
        for index, call in enumerate(calls):
            with self._collected(self._layers[path]) as found:
                hidden[index] = run_block(self._model, path, hidden[index], call)
            for tensor, version in chain.from_iterable(found.values()):
                if version_counter(tensor) != version:
                    raise NoOrderError(
                        f"{path} writes to the input of a linear layer after it was read"
                    )
            seen.append(found)
        groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for layer in dict.fromkeys(chain.from_iterable(seen)):
            marks = [[(id(tensor), version) for tensor, version in found[layer]] for found in seen]
            groups[tuple(map(tuple, marks))].append(layer)
        by_layer = {
            first: [[tensor for tensor, _ in found[first]] for found in seen]
            for first, *_ in groups.values()
        }
        return _Inputs(list(groups.values()), by_layer)

    def _gather(
        self,
        path: str,
        group: list[str],
        hidden: list[Tensor],
        calls: list[Call],
        dense: _Inputs,
    ) -> Step:
        """H and C of the layers of a group, whose block is quantized up to them."""
        sums = PairedSums(next(chain.from_iterable(dense.by_layer[group[0]])))
        for index, (x, call) in enumerate(zip(hidden, calls, strict=True)):
            expected = dense.by_layer[group[0]][index]
            with self._collected(group[:1], stop_after=len(expected)) as found:
                run_block(self._model, path, x, call)
            mask = self._masks[index]
            sums.add(
                [kept_tokens(tensor, mask, self._frames) for tensor, _ in found[group[0]]],
                [kept_tokens(tensor, mask, self._frames) for tensor in expected],
            )
        return Step(group, sums.moment(), sums.correction())

    @contextmanager
    def _collected(self, layers: list[str], stop_after: int | None = None) -> Iterator[_Seen]:
        """Collect the inputs of linear layers in a pass through their block.

        The pass ends once a layer was called `stop_after` times.
        """
        found: _Seen = defaultdict(list)

        def before(layer: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[layer].append((args[0], version_counter(args[0])))
            if len(found[layer]) == stop_after:
                raise _Reached

        handles = [
            self._model.get_submodule(layer).register_forward_pre_hook(partial(before, layer))
            for layer in layers
        ]
        try:
            with suppress(_Reached):
                yield found
        finally:
            for handle in handles:
                handle.remove()


class _InputCount:
    """Counts the inputs of the linear layers in the passes of the 16-bit model.

    Args:
        layers: paths of the linear layers of every block.
        frames: as for `kept_tokens`.
        most_bytes: of the inputs of a block; None: any number.

    Attributes:
        tokens: that every layer got, without padding.
    """

    def __init__(
        self, layers: dict[str, list[str]], frames: FrameMask | None, most_bytes: int | None
    ) -> None:
        self._block = {path: block for block, paths in layers.items() for path in paths}
        self._frames = frames
        self._most_bytes = most_bytes
        self.tokens = dict.fromkeys(self._block, 0)
        self._bytes = dict.fromkeys(layers, 0)
        self._last: weakref.ref[Tensor] | None = None
        self._last_tokens = 0

    def add(self, path: str, x: Tensor, mask: Tensor | None) -> None:
        """Count the input of a layer; several layers may read the same one.

        Raises:
            ValueError: if it is not finite.
            NoOrderError: if the inputs of the block take too many bytes.
        """
        if self._last is None or self._last() is not x:
            kept = kept_tokens(x, mask, self._frames)
            if not kept.isfinite().all():
                raise not_finite(path)
            self._last, self._last_tokens = weakref.ref(x), len(kept)
            self._add_bytes(self._block[path], x.nbytes)
        self.tokens[path] += self._last_tokens

    def _add_bytes(self, block: str, nbytes: int) -> None:
        self._bytes[block] += nbytes
        if self._most_bytes is not None and self._bytes[block] > self._most_bytes:
            raise NoOrderError(
                f"the inputs of the linear layers of {block} take more than "
                f"{self._most_bytes / 1e9:.1f} GB for all calibration tokens"
            )


class _Reached(Exception):  # noqa: N818 -- no error
    """Ends a pass through a block at the last input that is needed."""


def check_steps(model: nn.Module, stacks: list[LayerStack]) -> None:
    """Refuse blocks of so many linear layers, such as experts, that rounding them takes long: a
    block runs once for every one that reads other inputs.

    Raises:
        NoOrderError: naming the block.
    """
    for path, layers in _layers_by_block(model, stacks).items():
        if len(layers) > MOST_STEPS:
            raise NoOrderError(f"{path} has {len(layers)} linear layers")


def _layers_by_block(model: nn.Module, stacks: list[LayerStack]) -> dict[str, list[str]]:
    """Paths of the linear layers of every block, in the order of the model's modules.

    Raises:
        NoOrderError: for a model whose blocks are not run one after the other.
    """
    if is_seq2seq(model):
        raise NoOrderError(
            f'rounding="sequential" is for models with one list of blocks, and '
            f"{type(model).__name__} has an encoder and a decoder"
        )
    fused = next((stack.name for stack in stacks if stack.experts), None)
    if fused is not None:
        raise NoOrderError(
            f'rounding="sequential" is for linear layers, and {fused} holds fused experts'
        )
    found: dict[str, list[str]] = {}
    for stack in stacks:
        for path in stack.modules:
            try:
                block = block_of(model, path)
            except ValueError as error:
                raise NoOrderError(str(error).removesuffix(".")) from error
            found.setdefault(block, []).append(path)
    places = {path: place for place, (path, _) in enumerate(model.named_modules())}
    return dict(sorted(found.items(), key=lambda entry: places[entry[0]]))
