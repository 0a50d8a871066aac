"""Training stops before a step whose loss or gradients are not finite, and names their origin.

One step with a NaN would make every factor NaN, in all layers at once, and every later checkpoint
too. All processes stop in the same step with the same message. They search the origin together,
because the forward pass of a sharded model needs all of them.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from qrefta._compat.torch import tree_leaves
from qrefta._compat.transformers import prepare_inputs
from qrefta.train.checkpoints import last_checkpoint

SCALED_STEPS = 20  # the scaler starts at 2^16 and halves: after these it is below one


class FiniteSteps(Trainer):
    """A Trainer that raises FloatingPointError before a step that is not finite; put it before
    another in the bases of a class.

    It checks the loss of every pass, and the gradients before every step.
    """

    _inputs: Any  # of the last pass: a batch, or for GRPO rows

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_BeforeStep(self))

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        self._inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        loss = super().training_step(model, inputs, num_items_in_batch)
        losses = self.accelerator.gather(loss.reshape(1))  # of all processes
        assert isinstance(losses, Tensor)
        if not losses.isfinite().all():
            broken = losses[~losses.isfinite()][0].item()
            self.refuse(model, f"the loss is {broken}")
        return loss

    def refuse(self, model: nn.Module, problem: str) -> None:
        """Raise, with the step, the origin of the problem and the last checkpoint."""
        origin = self._origin(self.accelerator.unwrap_model(model))
        if origin:
            problem = f"{problem}; {origin}"
        checkpoint = last_checkpoint(str(self.args.output_dir))
        if checkpoint:
            saved = f"the last checkpoint is {checkpoint}"
        else:
            saved = "there is no checkpoint yet"
        raise FloatingPointError(
            f"In step {self.state.global_step + 1} {problem}. The step was not taken; "
            f"{saved}. Check the batch, lower the learning rate, or compute in float32 or "
            "bfloat16 instead of float16."
        )

    def _origin(self, model: nn.Module) -> str | None:
        model.zero_grad()
        inputs = prepare_inputs(self, self._inputs)
        column = _first_broken(inputs.items())
        problem = None if column is None else f"the batch's {column} holds NaN or infinity"
        problem = _of_first_process(problem)
        if problem:
            return problem

        def compute_loss() -> Tensor:
            loss = self.compute_loss(model, inputs)
            assert isinstance(loss, Tensor)  # a tuple only if outputs are asked for
            return loss

        with self.compute_loss_context_manager():
            return find_origin(model, compute_loss)


class _BeforeStep(TrainerCallback):
    """Refuses gradients that are not finite.

    In fp16 a scaler tries factors of the loss, and skips the steps in which one is too large: so
    many steps in a row mean that the factor is not the cause.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._skipped = 0

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        finite = _all_finite(parameter.grad for parameter in model.parameters())
        accelerator = self._trainer.accelerator
        if accelerator.gather(finite.reshape(1).to(accelerator.device)).all():
            self._skipped = 0
            return
        self._skipped += 1
        if getattr(accelerator, "scaler", None) is None or self._skipped > SCALED_STEPS:
            self._trainer.refuse(model, "gradients are not finite")


def find_origin(model: nn.Module, compute_loss: Callable[[], Tensor]) -> str | None:
    """The place of the first value that is not finite, in words; None if all are finite.

    Values are checked forwards, then backwards.

    All processes call it together and get the same answer, from the first process that found a
    place.

    Args:
        model: the gradients of its parameters are added to.
        compute_loss: () -> the loss, by the model's forward pass.
    """
    places: list[str] = []

    def after_forward(path: str, module: nn.Module, _: Any, output: Any) -> None:
        tensors = tree_leaves(output)
        if not places and not _finite(tensors):
            broken = _first_broken(module.named_parameters(recurse=False))
            if broken is None:
                places.append(f"the output of {path} is not finite")
            else:
                places.append(f"{path}.{broken} holds NaN or infinity")
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(after_backward, path))

    def after_backward(path: str, grad: Tensor) -> None:
        if not places and not _finite([grad]):
            places.append(f"the gradient of {path}'s output is not finite")

    handles = [
        module.register_forward_hook(partial(after_forward, path))
        for path, module in model.named_modules()
        if path
    ]
    try:
        loss = compute_loss()
        origin = _of_first_process(places[0] if places else None)
        if origin is None:
            loss.backward()
            origin = _of_first_process(places[0] if places else None)
    finally:
        for handle in handles:
            handle.remove()
    return origin


def _of_first_process(text: str | None) -> str | None:
    """The text of the first process that has one, in all processes."""
    return next((text for text in gather_object([text]) if text), None)


def _first_broken(named: Iterable[tuple[str, object]]) -> str | None:
    """The first name whose value is a tensor that is not finite."""
    return next((name for name, value in named if not _finite([value])), None)


def _finite(values: Iterable[object]) -> bool:
    """Whether all floating tensors among the values are finite; waits for the device once."""
    return bool(_all_finite(values))


def _all_finite(values: Iterable[object]) -> Tensor:
    """The same as a tensor, without waiting; the values may be on several devices."""
    flags = []
    for value in values:
        if isinstance(value, DTensor):
            value = value.to_local()
        if isinstance(value, Tensor) and value.is_floating_point():
            flags.append(value.isfinite().all())
    if not flags:
        return torch.tensor(True)
    return torch.stack([flag.to(flags[0].device) for flag in flags]).all()
