"""All factors of a model, in one place at its root."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from qrefta.config.stack import BANK
from qrefta.nn.factors import Factors


class FactorBank(nn.ModuleDict):
    """All factors of a model, by stack key; registered once, at the model's root, as `BANK`.

    Layers look their factors up in the bank and do not register them: save_pretrained would refuse
    shared parameters with K names, and FSDP2 would shard them K times.
    """

    # transformers hands its checkpointing function to every module that has this attribute
    gradient_checkpointing = False
    _is_checked = False  # after the first forward pass that could train

    def __init__(self, factors: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__(factors)
        self.names = {key: key for key in self}  # of the stacks; `build` sets them

    def frozen(self) -> list[str]:
        """Names of the stacks whose factors are frozen."""
        return [
            self.names[key] for key, factors in self.items() if not cast(Factors, factors).trains()
        ]

    def warn_if_frozen(self) -> None:
        """Tell once of factors that are frozen while the model is in training mode."""
        if self._is_checked or torch.compiler.is_compiling():
            return
        self._is_checked = True
        names = self.frozen()
        partly = [
            f"{self.names[key]} ({len(factors.frozen_layers)} of {factors.layers})"
            for key, factors in cast(Iterable[tuple[str, Factors]], self.items())
            if 0 < len(factors.frozen_layers) < factors.layers and factors.trains()
        ]
        if partly:
            warnings.warn(
                f"Some layers of {', '.join(partly)} are frozen, and their factors train: the "
                "layers of a stack share them, so the frozen layers change too. Only whole stacks "
                f"can be frozen: requires_grad_(False) of a factors in model.{BANK}.values().",
                stacklevel=3,
            )
        if names:
            warnings.warn(
                f"The factors of {len(names)} of {len(self)} stacks are frozen and do not train: "
                f"{', '.join(names)}. If that is not intended, leave out "
                "the code that froze them (requires_grad = False; PEFT's get_peft_model and "
                "prepare_model_for_kbit_training freeze all parameters), or set requires_grad of "
                "the parameters in factors.trained() for every factors in "
                f"model.{BANK}.values(). To evaluate, call model.eval() or use torch.no_grad().",
                stacklevel=3,
            )

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        raise AttributeError("A factor bank checkpoints nothing.")

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable[..., Any]) -> None:
        options = getattr(function, "keywords", None)  # None when checkpointing is switched off
        if options is None or options.get("use_reentrant") is False:
            return
        # torch's default is True.
        raise ValueError(
            "Gradient checkpointing with use_reentrant=True silently gives the shared factors "
            "wrong gradients when several processes train. Use the default, or "
            'gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )
