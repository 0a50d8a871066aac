"""Second moments E[x^T x] of the inputs of linear layers, and the metric of a stack.

A user notices the output error E||x W^T - x What^T||^2 = tr(E S E^T) with E = W - What and
S = E[x^T x], and not the weight error ||E||_F^2. The layers of a stack share one metric
(`shared_metric`), so that they can share their factors.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qrefta.config.stack import LayerStack
from qrefta.files.whole_file import replacing
from qrefta.linalg.metric import Metric, normalized, roots
from qrefta.model.stacks import ends_with

# Stacks with wider inputs share a diagonal metric: the roots of a full one would take hours.
METRIC_WIDTH = 4096
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
        moments = {key: self.read(key).contiguous() for key in self.tokens}
        with replacing(path, sum(moment.nbytes for moment in moments.values())) as file:
            save_file(moments, file.name, metadata)


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
