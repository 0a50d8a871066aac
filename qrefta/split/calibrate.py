"""Calibration: second moments of the inputs of every linear layer, in one pass over batches."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from qrefta._compat.torch import version_counter
from qrefta._compat.transformers import FrameMask, frame_masks
from qrefta.config.stack import LayerStack
from qrefta.model.modes import eval_mode
from qrefta.nn.experts import fused_inputs
from qrefta.split.batches import (
    Batch,
    accepted_inputs,
    batch_inputs,
    is_seq2seq,
    kept_tokens,
    no_batches,
    not_finite,
    row_count,
    without_cache,
)
from qrefta.split.moment_sums import accumulate, mirror_, moment_sum, no_moment
from qrefta.split.moments import Moments


def gather_moments(
    model: nn.Module, stacks: list[LayerStack], batches: Iterable[Batch], *, progress: bool = True
) -> Moments:
    """Second moments of the inputs of every linear layer of `stacks`, in one pass over the batches.

    Tokens that a mask leaves out do not count. The experts of a block share their moments: each
    token counts once for the first weights of the block, and once for each chosen expert for the
    second weights. For that, the products with the first weights are computed twice.

    Products are float32, and only their upper half is computed. Sums are float64 for inputs up to
    DOUBLE_WIDTH wide, and float32 for wider inputs. They are on the CPU, also for a model on an
    accelerator: 8 in^2 bytes for each distinct input up to DOUBLE_WIDTH wide, 4 in^2 bytes up to
    FULL_WIDTH (22 GB for a Llama of 7B parameters), and 4 in^2 bytes for one product on the device
    of the model. Wider inputs keep only the diagonal.

    Args:
        model: any model; each of its modules keeps its mode.
        stacks: from `find_stacks`.
        batches: inputs of the model's forward pass (other names are dropped), tensors of its main
            input, or the rows of a tokenized data set. An encoder-decoder without decoder inputs
            gets the inputs of its encoder.
        progress: show a progress bar, with the rows and tokens so far.

    Raises:
        ValueError: if there are no batches, a batch has no tensors for the model, an input holds
            NaN or infinity, or no token reached any linear layer.
    """
    sums = _Sums(frame_masks(model))
    rows = 0
    bar = tqdm(batches, desc="Calibrating", unit="batch", disable=not progress)
    with _hooked(model, stacks, sums) as masks, without_cache(model), torch.no_grad(), bar:
        for batch in bar:
            inputs = batch_inputs(model, batch)
            masks.update(
                {name: inputs.get(name) for name in ("attention_mask", "decoder_attention_mask")}
            )
            accepted = accepted_inputs(model, inputs)
            model(**accepted)
            sums.flush()
            rows += row_count(accepted)
            bar.set_postfix_str(f"{rows:,} rows, {sums.most_tokens:,} tokens")
    if rows == 0:
        raise no_batches()
    return sums.moments({path: stack.in_features for stack in stacks for path in stack.modules})


def check_reached(tokens: Mapping[str, int]) -> None:
    """Refuse a calibration that reaches no linear layer.

    Args:
        tokens: by path of the linear layer.
    """
    if not any(tokens.values()):
        raise ValueError(
            f"No token of the calibration reached any linear layer ({', '.join(list(tokens)[:3])} "
            "...); give batches of the model's own inputs, whose mask keeps some tokens."
        )


class _Sums:
    """Sums of x^T x, one for each group of linear layers that received the same tensors."""

    def __init__(self, frames: FrameMask | None) -> None:
        self._frames = frames
        self.sums: dict[tuple[str, ...], Tensor] = {}
        self.tokens: Counter[tuple[str, ...]] = Counter()
        # Linear layers that received the last input; the product waits until the group is complete.
        self._group: list[str] = []
        # Kept alive, so that no other tensor can take its place in memory.
        self._last: Tensor | None = None
        self._version: int | None = None
        self._product: Tensor | None = None
        self._rows = 0

    def add(self, path: str, x: Tensor, mask: Tensor | None) -> None:
        # A tensor that was written to since is another input.
        version = None if x.is_inference() else version_counter(x)
        if x is not self._last or version != self._version or path in self._group:
            self.flush()
            rows = kept_tokens(x, mask, self._frames).float()
            self._product = moment_sum(rows)  # the upper half, if it is a matrix
            self._last = x
            self._version = version
            self._rows = len(rows)
            diagonal = self._product.diagonal() if self._product.dim() == 2 else self._product
            if not diagonal.isfinite().all():
                raise not_finite(path)
        self._group.append(path)

    def flush(self) -> None:
        """Add the last product to the sum of the group that received it."""
        if self._product is not None:
            group = tuple(self._group)
            product = self._product.cpu()
            self.sums[group] = accumulate(self.sums.get(group), product)
            self.tokens[group] += self._rows
        self._group = []
        self._last = None
        self._product = None

    @property
    def most_tokens(self) -> int:
        """Tokens of the linear layer that saw most."""
        return max(self.tokens.values(), default=0)

    def moments(self, widths: Mapping[str, int]) -> Moments:
        """Means on the CPU; empties the sums.

        A linear layer may be in several groups; its sum adds up the sums of these groups.

        Args:
            widths: path -> inputs of the linear layer.
        """
        groups = {path: tuple(group for group in self.sums if path in group) for path in widths}
        counts = {path: sum(self.tokens[group] for group in groups[path]) for path in widths}
        check_reached(counts)
        idle = [path for path, count in counts.items() if count == 0]
        tokens: dict[str, int] = dict.fromkeys(idle, 0)
        tensors = {path: no_moment(widths[path]) for path in idle}
        first: dict[tuple[tuple[str, ...], ...], str] = {}
        for path, key in groups.items():
            if counts[path]:
                first.setdefault(key, path)
        uses = Counter(group for key in first for group in key)
        for key, owner in first.items():
            tokens[owner] = counts[owner]
            total = self.sums[key[0]]
            for group in key[1:]:
                total = total + self.sums[group]
            tensors[owner] = mirror_((total / tokens[owner]).float())
            uses.subtract(key)
            for group in key:
                if uses[group] == 0:
                    del self.sums[group]
        owners = {path: first[key] if counts[path] else path for path, key in groups.items()}
        return Moments(owners, tokens, tensors.__getitem__)


@contextmanager
def _hooked(
    model: nn.Module, stacks: list[LayerStack], sums: _Sums
) -> Iterator[dict[str, Tensor | None]]:
    """Put the model in eval mode and add every input of its linear layers to `sums`.

    It yields the masks, which the caller sets for each batch. Inside the encoder of an
    encoder-decoder, and for its output (keys and values of cross-attention), attention_mask
    applies; elsewhere in an encoder-decoder, decoder_attention_mask.
    """
    seq2seq = is_seq2seq(model)
    encoder = cast(Any, model).get_encoder() if seq2seq else model
    masks: dict[str, Tensor | None] = {}
    encoded: list[Tensor] = []

    def mask_of(inside: bool, x: Tensor) -> Tensor | None:
        by_encoder = inside or (bool(encoded) and x is encoded[0])
        return masks.get("attention_mask" if by_encoder else "decoder_attention_mask")

    def before(path: str, inside: bool, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums.add(path, args[0], mask_of(inside, args[0]))

    def before_experts(
        path: str, inside: bool, module: nn.Module, args: tuple[Tensor, ...]
    ) -> None:
        mask = mask_of(inside, args[0])
        hidden_states = kept_tokens(args[0], mask)
        top_k_index = kept_tokens(args[1], mask)
        for name, x in fused_inputs(module, hidden_states, top_k_index):
            sums.add(f"{path}.{name}", x, None)

    def after_encoder(_: nn.Module, __: tuple[Tensor, ...], output: Any) -> None:
        encoded[:] = [output[0]]

    inner = set(encoder.modules())
    handles = []
    try:
        if seq2seq:
            handles.append(encoder.register_forward_hook(after_encoder))
        hooks: dict[str, Callable[..., None]] = {}
        for stack in stacks:
            for path in stack.modules:
                if stack.experts:
                    hooks[path.rpartition(".")[0]] = before_experts
                else:
                    hooks[path] = before
        for path, hook in hooks.items():
            module = model.get_submodule(path)
            handles.append(module.register_forward_pre_hook(partial(hook, path, module in inner)))
        with eval_mode(model):
            yield masks
    finally:
        for handle in handles:
            handle.remove()
