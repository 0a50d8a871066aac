"""Several processes, one a GPU: who goes first, what their shards add up to, and which ways of sharding cannot work.

DDP and FSDP2 can. Under FSDP2 the packed weights of a block are gathered, 4 bits a weight, while the block runs; the
factors belong to the group of the model's root and are there from the first block's forward to its backward pass.
FSDP1 has one flat tensor for the parameters of a block, which packed bytes cannot be part of. DeepSpeed ZeRO-3 gathers
a module's parameters for this module's own forward pass, and the layers read the factors outside of theirs.
"""

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers.integrations import is_deepspeed_zero3_enabled

from qrefta._compat.accelerate import accelerator_state

_PATIENCE = timedelta(hours=6)  # the others wait while the first process prepares a model


def processes() -> PartialState:
    """The processes that torchrun started and this one's place among them; without torchrun it is the only one."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)


def check_sharding() -> None:
    """Refuse what accelerate is set up for, by its launcher's variables or by an `Accelerator`, if it cannot work.

    Raises:
        ValueError: for FSDP1, for FSDP2 before torch 2.12, and for DeepSpeed ZeRO-3.
    """
    fsdp = os.environ.get("FSDP_VERSION") if _is_set("ACCELERATE_USE_FSDP") else None
    zero = (
        os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        if _is_set("ACCELERATE_USE_DEEPSPEED")
        else None
    )
    state = accelerator_state()
    if state is not None and state.distributed_type == DistributedType.FSDP:
        fsdp = str(state.fsdp_plugin.fsdp_version)
    if state is not None and state.distributed_type == DistributedType.DEEPSPEED:
        zero = str(state.deepspeed_plugin.zero_stage)
    if fsdp == "2" and torch.__version__ < (
        2,
        12,
    ):  # https://github.com/pytorch/pytorch/pull/177948
        raise ValueError(
            f"FSDP2 shards packed weights from torch 2.12 on, and this is {torch.__version__}; use DDP."
        )
    if fsdp == "1":
        raise ValueError(
            "accelerate is set up for FSDP1, whose flat tensors cannot hold packed 4-bit weights; use DDP, or FSDP2: "
            'fsdp_config={"version": 2} in TrainingArguments, FSDP_VERSION=2 or fsdp_version: 2 for accelerate.'
        )
    if zero == "3" or is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed ZeRO-3 gathers parameters for their own module's forward pass only, and every layer reads the "
            "shared factors; use DDP, or FSDP2 to shard the weights: fsdp=True with torchrun."
        )


def check_gathered(parameter: Tensor, name: str) -> None:
    """Refuse to compute with a shard.

    Raises:
        ValueError: if FSDP2 sharded the parameter and has not gathered it.
    """
    if isinstance(parameter, DTensor):
        raise ValueError(
            f"The {name} are sharded by FSDP2 and not gathered. The model's own forward pass gathers them, if its "
            'blocks are sharded one by one (auto_wrap_policy "TRANSFORMER_BASED_WRAP") and the root last: call the '
            "model, not a layer of it. To merge or export, save it and load it in one process."
        )


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict; if FSDP2 sharded the model, of whole tensors in CPU memory, and empty in all processes but one.

    All processes must call it, or those that do wait for ever.
    """
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return state
    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
