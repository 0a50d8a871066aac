"""How the residuals of a stack are rounded: by the settings, and by the moments of its inputs.

- Scales are searched (`scales="searched"`), weighted by the second moments of the inputs, or the
  largest magnitude (`"absmax"`). Without moments only NF4's are searched.
- Codes take the error of earlier columns in (`rounding="feedback"`), where the full second moment
  of a layer's inputs is known, or are the nearest levels (`"nearest"`). With `"sequential"` a layer
  takes in the error of the quantized blocks before it too (`qrefta.split.sequential`).

Error feedback needs the covariance of the inputs, so it has a rule for few tokens. With fewer
tokens than inputs the moment has no full rank, and the damping rises by inputs / tokens. With fewer
than an eighth of the inputs a layer is rounded to nearest levels. Experts of a block share their
moments; the rule counts the tokens of the block.
"""

import warnings
from functools import cached_property

import torch
from torch import Tensor

from qrefta.config.settings import Settings
from qrefta.config.stack import LayerStack
from qrefta.linalg.feedback import Feedback, feedback_of
from qrefta.nn.quantize import PLAIN, Rounding
from qrefta.split.moments import Moments

# Share of the mean second moment that is added to all of them, as in GPTQ.
DAMPING = 0.01
# Fewer tokens than this share of the inputs say too little of their covariance.
LEAST_TOKENS = 1 / 8
_MORE_DAMPING = 10.0


class StackRounding:
    """How every layer of a stack is rounded.

    Args:
        settings: scales and rounding.
        stack, moments: the layers and the second moments of their inputs; None without calibration.
        device: where the stack is worked on; None: the CPU.
    """

    def __init__(
        self,
        settings: Settings,
        stack: LayerStack | None = None,
        moments: Moments | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.settings = settings
        self.stack = stack
        self.moments = moments
        self.device = device

    @cached_property
    def feeds_back(self) -> bool:
        """Whether some layer is rounded with error feedback; reads the moments of all layers."""
        if not self.settings.may_feed_back or self.stack is None:
            return False
        return any(map(self._has_feedback, self.stack.modules))

    def nearest(self, layer: int) -> Rounding:
        """The rounding of a layer between the rounds of refinement.

        If feedback follows, scales are not searched: on SmolLM2 the search changes the KL
        divergence of the result by less than its standard error, and takes most of the time.
        """
        if self.feeds_back or not self._searches(layer):
            return PLAIN
        moment = self._moment(layer)
        return Rounding(True, None if moment is None else _column_weights(moment))

    def stored(self, layer: int) -> Rounding:
        """The rounding of a layer as it is stored."""
        moment = self._moment(layer)
        search = self._searches(layer)
        if moment is None:
            return Rounding(search)
        weights = _column_weights(moment) if search else None
        if not self.settings.may_feed_back or not self._suffices(moment, self._path(layer)):
            return Rounding(search, weights)
        return Rounding(search, weights, self._feedback(layer, moment))

    def _searches(self, layer: int) -> bool:
        return self.settings.searches_scales(calibrated=self._reached(layer))

    def _reached(self, layer: int) -> bool:
        """Whether a token of a calibration reached a layer."""
        return self.moments is not None and self.moments.reached(self._path(layer))

    def _has_feedback(self, path: str) -> bool:
        """Whether a linear layer can be rounded with feedback."""
        return self.moments is not None and self._suffices(self.moments.of(path), path)

    def _suffices(self, moment: Tensor, path: str) -> bool:
        """Whether a moment is full and has tokens enough for feedback."""
        assert self.moments is not None, "a moment comes from moments"
        enough = LEAST_TOKENS * moment.shape[0]
        return moment.dim() == 2 and _tokens(self.moments, path) >= enough

    def _path(self, layer: int) -> str:
        assert self.stack is not None, "moments come with their stack"
        path, _ = self.stack.module_and_expert(layer)
        return path

    def _moment(self, layer: int) -> Tensor | None:
        """The moment of a layer; None if no token of a calibration reached it."""
        if self.moments is None or not self._reached(layer):
            return None
        return self.moments.of(self._path(layer)).to(self.device)

    def _feedback(self, layer: int, moment: Tensor) -> Feedback:
        """The feedback of a layer's damped moment; the damping rises until it is found."""
        assert self.moments is not None, "a moment comes from moments"
        damping = DAMPING * max(1.0, len(moment) / _tokens(self.moments, self._path(layer)))
        while True:
            try:
                return feedback_of(moment, damping)
            except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
                damping *= _MORE_DAMPING


def warn_of_tokens(moments: Moments, stacks: list[LayerStack], settings: Settings) -> None:
    """Warn once of linear layers that no token reached, and once of layers with wider inputs than
    tokens, if they would be rounded with error feedback.
    """
    paths = [path for stack in stacks for path in stack.modules]
    idle = [path for path in paths if not moments.reached(path)]
    if idle:
        warnings.warn(
            f"No token of the calibration reached {len(idle)} linear layers "
            f"({', '.join(idle[:3])}): they are treated as without calibration. Give batches that "
            "reach them, such as images with their text, or more text.",
            stacklevel=2,
        )
    short = [
        (_tokens(moments, path), stack.in_features, path)
        for stack in stacks
        for path in stack.modules
        if 0 < _tokens(moments, path) < stack.in_features
    ]
    if short and settings.may_feed_back:
        tokens, width, path = min(short)
        warnings.warn(
            f"Calibration saw {tokens:,} tokens at {path}, whose inputs are {width:,} wide, and "
            f"fewer tokens than inputs at {len(short)} linear layers in all; error feedback is "
            "damped more there, and left out below an eighth. Give more text for a better result.",
            stacklevel=2,
        )


def _column_weights(moment: Tensor) -> Tensor:
    """The second moments of a layer's inputs, damped, (in,)."""
    diagonal = moment.diagonal() if moment.dim() == 2 else moment
    mean = diagonal.mean()
    if mean <= 0:
        return torch.ones_like(diagonal)
    return diagonal / mean + DAMPING


def _tokens(moments: Moments, path: str) -> int:
    return moments.tokens[moments.owner(path)]
