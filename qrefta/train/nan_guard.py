"""Training stops before a step with a loss or gradients that are not finite, and says where they came from.

One such step would make every factor NaN, in all layers at once, and every checkpoint after it. Of several processes
all stop in the same step, whichever of them saw it, and say the same: they look for its origin together, since the
forward pass of a sharded model is one of all processes.
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


def finite_steps(kind: type[Trainer]) -> type[Trainer]:
    """The Trainer that raises FloatingPointError where it would take a step that is not finite."""

    class FiniteSteps(kind):
        """Looks at the loss of every pass, as Trainer does for its log, and at the gradients before every step."""

        _passed: Mapping[str, Any]

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.add_callback(_BeforeStep(self))

        def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
            self._passed = dict(inputs)
            loss = super().training_step(model, inputs, *args)
            losses = self.accelerator.gather(loss.reshape(1))  # of all processes
            if not losses.isfinite().all():
                self.refuse(model, f"the loss is {losses[~losses.isfinite()][0].item()}")
            return loss

        def refuse(self, model: nn.Module, what: str) -> None:
            """Raise, with the step, where it began, and what to go back to."""
            origin = self._origin(self.accelerator.unwrap_model(model))
            before = last_checkpoint(self.args.output_dir)
            where = f"; {origin}" if origin else ""
            back = f"the last checkpoint is {before}" if before else "there is no checkpoint yet"
            raise FloatingPointError(
                f"In step {self.state.global_step + 1} {what}{where}. The step was not taken; {back}. Look at the "
                "batch, lower the learning rate, or compute in float32 or bfloat16 where it is float16."
            )

        def _origin(self, model: nn.Module) -> str | None:
            model.zero_grad()
            inputs = prepare_inputs(self, dict(self._passed))
            broken = next((name for name, value in inputs.items() if not _finite([value])), None)
            if found := _first(broken and f"the batch's {broken} holds NaN or infinity"):
                return found
            with self.compute_loss_context_manager():
                return find_origin(model, lambda: self.compute_loss(model, inputs))

    return FiniteSteps


class _BeforeStep(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        finite = _all_finite(
            parameter.grad for parameter in model.parameters() if parameter.grad is not None
        )
        accelerator = self._trainer.accelerator
        if not accelerator.gather(finite.reshape(1).to(accelerator.device)).all():
            self._trainer.refuse(model, "gradients are not finite")


def find_origin(model: nn.Module, compute_loss: Callable[[], Tensor]) -> str | None:
    """Where the first value that is not finite arises, forwards or backwards, in words; None if all are finite.

    All processes call it together, and get what the first of them found that found something.

    Args:
        model: whose parameters' gradients are added to.
        compute_loss: () -> the loss, by the model's forward pass.
    """
    found: list[str] = []

    def after_forward(path: str, module: nn.Module, _: Any, output: Any) -> None:
        if not found and not _finite(tree_leaves(output)):
            broken = next(
                (name for name, p in module.named_parameters(recurse=False) if not _finite([p])),
                None,
            )
            found.append(
                f"{path}.{broken} holds NaN or infinity"
                if broken
                else f"the output of {path} is not finite"
            )
        for tensor in filter(_differentiable, tree_leaves(output)):
            tensor.register_hook(partial(after_backward, path))

    def after_backward(path: str, grad: Tensor) -> None:
        if not found and not _finite([grad]):
            found.append(f"the gradient of {path}'s output is not finite")

    handles = [
        module.register_forward_hook(partial(after_forward, path))
        for path, module in model.named_modules()
        if path
    ]
    try:
        loss = compute_loss()
        origin = _first(*found[:1])
        if origin is None:
            loss.backward()
            origin = _first(*found[:1])
    finally:
        for handle in handles:
            handle.remove()
    return origin


def _first(found: str | None = None) -> str | None:
    """What the first of all processes found that found something."""
    return next(filter(None, gather_object([found])), None)


def _differentiable(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _finite(values: Iterable[object]) -> bool:
    """Whether all that are floating tensors hold finite numbers; waits for the device once."""
    return bool(_all_finite(values))


def _all_finite(values: Iterable[object]) -> Tensor:
    """The same as a tensor on the first one's device, without waiting; a model may lie on several."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    if not tensors:
        return torch.tensor(True)
    flags = [tensor.isfinite().all() for tensor in tensors]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).all()
