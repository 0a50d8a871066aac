"""Calibration text -> second moments E[x^T x] of the inputs of linear layers, and the metric of a
stack.

A user notices the output error E||x W^T - x What^T||^2 = tr(E S E^T) with E = W - What and
S = E[x^T x], and not the weight error ||E||_F^2. One pass over a few hundred sentences gives S for
every linear layer. The layers of a stack share one metric (`shared_metric`), so that they can share
their factors.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from qrefta._compat.torch import version_counter
from qrefta.config.stack import LayerStack
from qrefta.linalg.metric import Metric, normalized, roots
from qrefta.model.modes import eval_mode
from qrefta.model.stacks import ends_with
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
)

# Wider inputs keep only the diagonal: a full matrix of this width has 1.1 GB.
FULL_WIDTH = 16384
# Stacks with wider inputs share a diagonal metric: the roots of a full one would take hours.
METRIC_WIDTH = 4096
DOUBLE_WIDTH = 1024  # sums up to this width are float64; wider sums are float32, in half the memory
PANEL = 128  # columns of x^T x that are computed at once; narrower products are slower
FORMAT = "qrefta-moments-1"


@dataclass(frozen=True)
class Moments:
    """E[x^T x] of the inputs of linear layers, by module path.

    Linear layers that receive the same tensors share one moment.

    Attributes:
        owners: module path -> the path that its moment is stored under.
        tokens: stored path -> tokens that the mean was taken over; 0 if no token reached it.
        read: stored path -> (in, in), or its diagonal (in,); float32, on the CPU. From a file, one
            at a time. Zeros (in,) if no token reached it.
    """

    owners: dict[str, str]
    tokens: dict[str, int]
    read: Callable[[str], Tensor]
    _latest: dict[tuple[object, ...], Metric] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def of(self, path: str) -> Tensor:
        """Moment of one linear layer, (in, in) or (in,).

        Raises:
            ValueError: if no linear layer, or more than one, has that path, or its moment holds NaN
                or infinity.
        """
        moment = self.read(self.owner(path))
        if not moment.isfinite().all():
            raise ValueError(
                f"The moment of the inputs of {path} holds NaN or infinity; gather the moments "
                "again, with the model in float32 or bfloat16."
            )
        return moment

    def reached(self, path: str) -> bool:
        """Whether a token reached a linear layer."""
        return self.tokens[self.owner(path)] > 0

    def check(self, stacks: list[LayerStack]) -> None:
        """Read the moment of every linear layer of `stacks` once.

        Raises:
            ValueError: if one is missing, has another width than its weight, or holds NaN or
                infinity.
        """
        seen = set()
        for stack in stacks:
            for path in stack.modules:
                owner = self.owner(path)
                if (owner, stack.in_features) not in seen:
                    _check_width(path, self.of(path), stack)
                    seen.add((owner, stack.in_features))

    def owner(self, path: str) -> str:
        """The path that stores the moment of a linear layer.

        The prefix of a base model may be missing on either side.
        """
        if path in self.owners:
            return self.owners[path]
        matches = [known for known in self.owners if _same_module(known, path)]
        if len(matches) != 1:
            known = ", ".join(matches or [*list(self.owners)[:4], "..."])
            problem = "fits several" if matches else "has none"
            raise ValueError(
                f"{path} {problem} of the gathered moments ({known}); gather them on the model to "
                "prepare"
            )
        return self.owners[matches[0]]

    def fingerprint(self) -> str:
        """A checksum of the second moments of all inputs, without their covariances."""
        found = sha256(json.dumps([self.owners, self.tokens], sort_keys=True).encode())
        for key in sorted(self.tokens):
            moment = self.read(key)
            diagonal = moment.diagonal() if moment.dim() == 2 else moment
            found.update(diagonal.contiguous().numpy().tobytes())
        return found.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the whole file appears or none."""
        path = Path(path)
        metadata = {
            "format": FORMAT,
            "owners": json.dumps(self.owners),
            "tokens": json.dumps(self.tokens),
        }
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            save_file(
                {key: self.read(key).contiguous() for key in self.tokens}, temporary, metadata
            )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def load_moments(path: str | Path) -> Moments:
    """Moments that `Moments.save` wrote; each is read when it is asked for.

    Raises:
        ValueError: if there is no such file, it is damaged, or it holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}; write one with Moments.save.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = set(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}); gather the moments again."
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} has the format {metadata.get('format')!r}; it must be {FORMAT!r}: give a file "
            "that Moments.save wrote"
        )
    owners = json.loads(metadata["owners"])
    tokens = json.loads(metadata["tokens"])
    if not keys == set(tokens) == set(owners.values()):
        raise ValueError(
            f"The moments in {path} are not the moments that it lists; gather them again."
        )
    return Moments(owners, tokens, partial(_read_tensor, path))


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
    sums = _Sums()
    rows = 0
    bar = tqdm(batches, desc="Calibrating", unit="batch", disable=not progress)
    with _hooked(model, stacks, sums) as masks, torch.no_grad(), bar:
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

    def __init__(self) -> None:
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
            rows = kept_tokens(x, mask).float()
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
            self.sums[group] = added(self.sums.get(group), product)
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
            tensors[owner] = mirrored((total / tokens[owner]).float())
            uses.subtract(key)
            for group in key:
                if uses[group] == 0:
                    del self.sums[group]
        owners = {path: first[key] if counts[path] else path for path, key in groups.items()}
        return Moments(owners, tokens, tensors.__getitem__)


def moment_sum(rows: Tensor) -> Tensor:
    """The sum of x^T x over rows (tokens, in), by panels of PANEL columns.

    Returns:
        (in, in), zero below the panels on the diagonal: `mirrored` completes it. For inputs wider
        than FULL_WIDTH the diagonal (in,).
    """
    width = rows.shape[1]
    if width > FULL_WIDTH:
        return rows.double().square().sum(0)
    upper = rows.new_zeros(width, width)
    for start in range(0, width, PANEL):
        stop = min(start + PANEL, width)
        torch.mm(rows[:, :stop].T, rows[:, start:stop], out=upper[:stop, start:stop])
    return upper


def no_moment(width: int) -> Tensor:
    """The moment of a linear layer that no token reached, zeros (in,)."""
    return torch.zeros(width, dtype=torch.float32, device="cpu")


def added(total: Tensor | None, product: Tensor) -> Tensor:
    """A sum of products over batches, in place: full ones wider than DOUBLE_WIDTH are float32."""
    if total is not None:
        return total.add_(product)
    wide = DOUBLE_WIDTH < len(product) <= FULL_WIDTH
    return product.to(torch.float32 if wide else torch.float64)


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper half, in place; a diagonal (in,) as it is."""
    if upper.dim() == 1:
        return upper
    for start in range(0, len(upper), PANEL):
        stop = start + PANEL
        block = upper[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
        upper[stop:, start:stop] = upper[start:stop, stop:].T
    return upper


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


def _same_module(known: str, path: str) -> bool:
    return ends_with(known, path) or ends_with(path, known)


def _read_tensor(file_path: str | Path, key: str) -> Tensor:
    with safe_open(file_path, framework="pt") as file:
        return file.get_tensor(key)


def _check_width(path: str, moment: Tensor, stack: LayerStack) -> None:
    """Raise ValueError unless a moment has the width of the stack's inputs."""
    if moment.shape[0] != stack.in_features:
        raise ValueError(
            f"The moment of {path} is {moment.shape[0]} wide and its weight "
            f"{stack.in_features}; gather the moments on the model to prepare"
        )


def shared_metric(
    moments: Moments, stack: LayerStack, device: torch.device | None = None
) -> Metric:
    """The metric of a stack's inputs: S = mean over its layers of S_l / mean(diag S_l), over the
    layers that some token reached.

    S_l = E[x^T x] + RIDGE mean(diag) I, in float64. A layer whose inputs are all zero counts as the
    identity. Every eigenvalue is RIDGE / (1 + RIDGE) or more, so that S^(-1/2), about 100 at most,
    amplifies no rounding. Inputs wider than METRIC_WIDTH share the diagonal of S. The latest metric
    is kept with the moments, because neighbouring stacks (query, key, value) have the same inputs.

    Args:
        moments: of every layer of `stack`; a token reached one of them.
        stack: the layers that share the metric.
        device: where the eigenvectors are computed and the metric is kept; None: the CPU.

    Raises:
        ValueError: if a layer has no moment, or a moment of another width.
    """
    latest = moments._latest
    key = (device, stack.in_features, *map(moments.owner, stack.modules))
    if key in latest:
        return latest[key]
    total = torch.zeros((), dtype=torch.float64, device=device)
    paths = [path for path in stack.modules if moments.reached(path)]
    for path in paths:
        moment = moments.of(path)
        _check_width(path, moment, stack)
        if moment.dim() == 2 and stack.in_features > METRIC_WIDTH:
            moment = moment.diagonal()
        total = total + normalized(moment.to(total)) / len(paths)
    latest.clear()
    latest[key] = Metric(*(root.float() for root in roots(total)))
    return latest[key]
