"""The test loss: the mean over all labelled tokens, or over all rows.

Trainer averages the means of batches, each weighted by its rows. So the loss of a language model
depends on the batch size, and of joined rows a batch counts as one. In several processes the rows
that accelerate repeats, so that the last batches are equally large, count twice.
"""

from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from qrefta.nn.head_loss import IGNORED


class _MeanLoss(Trainer):
    """Sums the losses of an evaluation, with the number of labels that each is the mean of."""

    _sums: tuple[float, int] = (0.0, 0)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        inputs = self._without_repeated_rows(inputs)
        labelled = int((self._targets(inputs["labels"]) != IGNORED).sum())
        found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if found[0] is not None and labelled:
            total, count = self._sums
            self._sums = (total + float(found[0]) * labelled, count + labelled)
        return found

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch, without the labels of the rows that accelerate repeats, so that the last
        batches of all processes are equally large.
        """
        place = self.accelerator.gradient_state
        alone = self.accelerator.num_processes == 1
        if alone or not place.end_of_dataloader or place.remainder <= 0:
            return inputs
        labels = inputs["labels"]
        if len(labels) == 1 and "position_ids" in inputs:  # joined rows
            rows = (inputs["position_ids"] == 0).cumsum(-1) - 1
        else:
            rows = torch.arange(len(labels), device=labels.device)
            rows = rows.view(-1, *[1] * (labels.dim() - 1))
        before = self.accelerator.process_index * (int(rows.max()) + 1)
        repeated = rows + before >= place.remainder
        return inputs | {"labels": labels.masked_fill(repeated, IGNORED)}

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._sums = (0.0, 0)
        averages = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False  # a loss is a mean of this process
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.args.average_tokens_across_devices = averages
        sums = torch.tensor(gather_object([self._sums]), dtype=torch.float64).sum(0)
        if sums[1] and output.metrics is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = (sums[0] / sums[1]).item()
        return output

    def _targets(self, labels: Tensor) -> Tensor:
        """The labels that a batch's loss is the mean over; ignored ones are IGNORED."""
        raise NotImplementedError


class LossByTokens(_MeanLoss):
    """A Trainer whose evaluation loss is the mean over labelled tokens; put it before another in
    the bases of a class.
    """

    def _targets(self, labels: Tensor) -> Tensor:
        return labels[..., 1:]  # the first token is predicted from nothing


class LossByRows(_MeanLoss):
    """A Trainer whose evaluation loss is the mean over rows with one label each; put it before
    another in the bases of a class.
    """

    def _targets(self, labels: Tensor) -> Tensor:
        return labels
