"""The reference of preference training: the model as it was when the run started.

DPO and GRPO compare the model that trains with a reference. Without one, TRL loads it from the name
in the model's config: a second model in memory, and the dense checkpoint if the model was prepared
in memory. Here the reference is a copy that shares every frozen tensor with the model, so it takes
the bytes of the trainable parameters.
"""

import copy
import inspect
from contextlib import nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from qrefta._compat.trl import loads_instead
from qrefta.nn.packed import PackedBytes, packed_parameter


def reference_model(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy of a model as it is now, in eval mode; it shares the model's frozen parameters.

    Its factors keep their present values while the model's train. Pass it to TRL's
    `DPOTrainer(model, ref_model=...)`.
    """
    shared: dict[int, Any] = {
        id(parameter): _without_link(parameter)
        for parameter in model.parameters()
        if not parameter.requires_grad
    }
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def _without_link(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter in the same memory, which does not freeze the model's factors with itself."""
    if not isinstance(parameter, PackedBytes):
        return parameter
    return packed_parameter(parameter.data, parameter.shares)


class StartsAsReference(Trainer):
    """A DPOTrainer or GRPOTrainer of TRL whose reference is its model at the start; put it before
    one of them in the bases of a class.

    PEFT models keep TRL's reference, a copy of the adapter.

    Raises:
        ValueError: when it is made, if its arguments ask for fsdp, or for a reference that follows
            the model.
    """

    def __init__(self, *, model: PreTrainedModel, args: Any, **options: Any) -> None:
        for name in ("fsdp", "sync_ref_model"):
            if getattr(args, name):
                raise ValueError(
                    f"{name} is set, and the reference shares its frozen weights with the "
                    f"model; leave {name} out."
                )
        loads: Any = nullcontext()
        is_needed = not hasattr(model, "peft_config") and not getattr(
            args, "precompute_ref_log_probs", False
        )
        if is_needed and "beta" in vars(args) and args.beta != 0:
            reference = reference_model(model)
            if "ref_model" in inspect.signature(super().__init__).parameters:  # DPOTrainer
                options["ref_model"] = reference
            else:
                loads = loads_instead(reference)
        with loads:
            super().__init__(model=model, args=args, **options)
