"""The dense model in memory as source and sink of `split_stacks`: its linear layers are replaced in
place.
"""

from collections.abc import Iterable

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from qrefta._compat.torch import cpu_float32_defaults
from qrefta.choices import QuantType
from qrefta.config.rank import Rank
from qrefta.config.report import StackReport
from qrefta.config.settings import Settings
from qrefta.config.stack import BANK, LayerStack
from qrefta.model.build import adapt, attach_bank, bank_key
from qrefta.model.stacks import find_stacks
from qrefta.model.weights import Weights, model_weights, read_slice
from qrefta.nn.quantized import QuantFormat
from qrefta.split.batches import Batch, copied
from qrefta.split.loop import split_stacks
from qrefta.split.moments import Moments
from qrefta.split.recording import NoOrderError
from qrefta.split.rounding import warn_of_tokens
from qrefta.split.sequential import MOST_BYTES, LayerSequence, check_steps
from qrefta.split.stack_split import StackSplit


class ModelSource:
    """The stacks of a dense model in memory."""

    def __init__(self, model: PreTrainedModel, device: torch.device | None) -> None:
        self.stacks = find_stacks(model)
        self.model = model
        self._device = device

    def weights(self, stack: LayerStack) -> Weights:
        return model_weights(self.model, stack, self._device)


def split_model(
    source: ModelSource,
    sequence: LayerSequence | None,
    settings: Settings,
    moments: Moments | None,
    progress: bool,
) -> list[StackReport]:
    """Replace the linear layers of a model's stacks.

    Args:
        source: of the model.
        sequence: the layers in the order in which they are rounded; None: stack by stack.
        settings: of the split.
        moments: second moments of the inputs, for the split, and without a sequence for rounding.
        progress: show progress bars.

    Returns:
        a report for every stack.

    Raises:
        ValueError: as `split_stacks`; and if a block fails with quantized layers before it.
    """
    if sequence is None:
        sink = _ModelSink(source.model)
        split_stacks(source, sink, settings, moments, progress)
        return sink.reports
    sink = _SequentialSink(source.model, sequence)
    if moments is None:
        warn_of_tokens(sink.moments, source.stacks, settings)
    split_stacks(source, sink, settings, moments, progress)
    try:
        sink.replace_layers()
    except Exception as error:  # of any model's code, or of inputs that overflow
        raise ValueError(
            "Some layers are quantized already, and rounding the others in their order failed "
            f'({error}). Load the model again, and give rounding="feedback".'
        ) from error
    return sink.reports


def layers_in_order(
    source: ModelSource, batches: Iterable[Batch], settings: Settings, progress: bool
) -> tuple[LayerSequence | None, Iterable[Batch]]:
    """The layers in the order in which they run, and the batches for a second reading.

    The layers are None if the settings leave the choice, and their order is not known, or it would
    take long or much memory.

    Raises:
        NoOrderError: if the settings leave no choice.
    """
    model, stacks = source.model, source.stacks
    must = settings.must_round_in_order
    try:
        if not must:
            check_steps(model, stacks)
        batches = [copied(batch) for batch in batches]
        most_bytes = None if must else MOST_BYTES
        sequence = LayerSequence(model, stacks, batches, most_bytes=most_bytes, progress=progress)
        return sequence, batches
    except NoOrderError as error:
        if must:
            raise
        if progress:
            tqdm.write(f"The layers are not rounded in their order: {error.reason}.")
        return None, batches


class _ModelSink:
    """A model in memory, whose linear layers are replaced a stack at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.ranks: list[Rank] | None = None
        self.quant_types: list[QuantType | None] | None = None
        self.reports: list[StackReport] = []
        self._model = model

    def begin(self, ranks: list[Rank], quant_types: list[QuantType | None]) -> None:
        self.ranks = ranks
        self.quant_types = quant_types
        attach_bank(self._model)

    def write(self, split: StackSplit) -> None:
        number = len(self.reports)
        home = self._share(number, split)
        for layer in range(split.stack.layers):
            self._replace(number, split, layer)
        self._finish(split, home)
        self.reports.append(split.report())

    def _share(self, number: int, split: StackSplit) -> torch.device:
        """Put the factors of stack `number` into the bank; returns the device of its weights."""
        if split.factors is not None:
            getattr(self._model, BANK)[bank_key(number)] = split.factors
        return read_slice(self._model, split.stack, 0).device

    def _replace(self, number: int, split: StackSplit, layer: int) -> None:
        """Replace one linear layer of stack `number`."""
        residual = split.residual(layer)
        dense = read_slice(self._model, split.stack, layer)
        key = None if split.factors is None else bank_key(number)
        adapted = adapt(self._model, split.stack, layer, QuantFormat.of(split.settings), key)
        adapted.store(residual.to(dense.device, dense.dtype), adapted.bias)

    def _finish(self, split: StackSplit, home: torch.device) -> None:
        """Move the factors of a stack, all of whose layers are replaced, to their device."""
        if split.factors is not None:
            split.factors.to(home)


class _SequentialSink(_ModelSink):
    """A model in memory, whose linear layers are replaced in the order in which they run, once the
    factors of all stacks are chosen.
    """

    def __init__(self, model: PreTrainedModel, sequence: LayerSequence) -> None:
        super().__init__(model)
        self._sequence = sequence
        self.moments = sequence.moments()
        self._splits: list[StackSplit] = []

    def write(self, split: StackSplit) -> None:
        targets = self._sequence.targets(split.stack, split.weights)
        self._splits.append(split.with_weights(targets, self.moments))

    def replace_layers(self) -> None:
        """Replace all linear layers, and add the reports."""
        homes = [self._share(number, split) for number, split in enumerate(self._splits)]
        places = {
            path: (number, split, layer)
            for number, split in enumerate(self._splits)
            for layer, path in enumerate(split.stack.modules)
        }
        for paths in self._sequence.steps():
            with (
                cpu_float32_defaults()
            ):  # blocks run between the steps, and may want other defaults
                for path in paths:
                    self._replace(*places.pop(path))
        with cpu_float32_defaults():
            for place in places.values():  # of layers that no token reached
                self._replace(*place)
        for split, home in zip(self._splits, homes, strict=True):
            self._finish(split, home)
        self.reports = [split.report() for split in self._splits]
