"""Modes for a while: of a model, and of torch."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def without_autocast_and_compile() -> Iterator[None]:
    """Within this context torch computes as the code says: in the dtypes of its tensors, without
    the caller's autocast, and without compiling.
    """
    with ExitStack() as stack:
        accelerator = torch.accelerator.current_accelerator()
        for device in {"cpu", *([] if accelerator is None else [accelerator.type])}:
            stack.enter_context(torch.autocast(device, enabled=False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled; importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode within this context; afterwards each module has its mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
