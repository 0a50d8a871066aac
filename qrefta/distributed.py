"""Several processes, one a GPU: who goes first, how their shards are gathered, and which ways of
sharding are refused.

DDP and FSDP2 work. Under FSDP2 the packed weights of a block are gathered, 4 bits a weight, while
the block runs; the factors belong to the root's group and are there from the first block's forward
pass to its backward pass. FSDP1 has one flat tensor for the parameters of a block, and packed bytes
cannot be part of it. DeepSpeed ZeRO-3 gathers a module's parameters for this module's forward
pass, but the layers read the factors outside of theirs.
"""

import os
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from qrefta._compat.accelerate import accelerator_state
from qrefta._compat.torch import default_store
from qrefta.files.on_disk import empty_on_disk

_PREPARING = timedelta(hours=6)  # the others wait while the first process prepares a model
_SAVING_S = 60.0


def processes() -> PartialState:
    """The processes that torchrun started and this one's place among them; without torchrun it is
    the only one.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_PREPARING)


def check_sharding() -> None:
    """Refuse a setup of accelerate, by its launcher's variables or by an `Accelerator`, that cannot
    work.

    Raises:
        ValueError: for FSDP1, for FSDP2 before torch 2.12, and for DeepSpeed ZeRO-3.
    """
    fsdp, zero = _launched()
    state = accelerator_state()
    if state is not None and state.distributed_type == DistributedType.FSDP and state.fsdp_plugin:
        fsdp = str(state.fsdp_plugin.fsdp_version)
    if (
        state is not None
        and state.distributed_type == DistributedType.DEEPSPEED
        and state.deepspeed_plugin
    ):
        zero = str(state.deepspeed_plugin.zero_stage)
    if fsdp == "2":
        check_fsdp2()
    if fsdp == "1":
        raise ValueError(
            "accelerate is set up for FSDP1, whose flat tensors cannot hold packed 4-bit "
            "weights; use DDP, or FSDP2: "
            'fsdp_config={"version": 2} in TrainingArguments, FSDP_VERSION=2 or fsdp_version: 2 '
            "for accelerate."
        )
    if zero == "3" or is_deepspeed_zero3_enabled():
        raise ValueError(
            "DeepSpeed ZeRO-3 gathers parameters for their module's forward pass only, and "
            "every layer reads the shared factors; use DDP, or FSDP2 to shard the weights: "
            "fsdp=True with torchrun."
        )


def check_fsdp2() -> None:
    """Refuse an FSDP2 that cannot shard bytes.

    Raises:
        ValueError: before torch 2.12.
    """
    # https://github.com/pytorch/pytorch/pull/177948
    if TorchVersion(torch.__version__) < "2.12":
        raise ValueError(
            f"FSDP2 shards packed weights from torch 2.12 on, and this is {torch.__version__}; "
            "use DDP."
        )


def _launched() -> tuple[str | None, str | None]:
    """The version of FSDP and the stage of ZeRO that accelerate's launcher set."""
    fsdp = None
    zero = None
    if _is_set("ACCELERATE_USE_FSDP"):
        fsdp = os.environ.get("FSDP_VERSION")
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        zero = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    return fsdp, zero


def check_gathered(parameter: Tensor, name: str) -> None:
    """Refuse to compute with a shard.

    Raises:
        ValueError: if FSDP2 sharded the parameter and has not gathered it.
    """
    if isinstance(parameter, DTensor):
        raise ValueError(
            f"The {name} are sharded by FSDP2 and not gathered. The model's forward pass gathers "
            "them, if its blocks are sharded one by one (auto_wrap_policy "
            '"TRANSFORMER_BASED_WRAP") and the root last: call the model, not a layer of it. To '
            "merge or export, save it and load it in one process."
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 sharded the model over several processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_state(model: nn.Module, folder: Path | None) -> dict[str, Tensor]:
    """The state dict; if FSDP2 sharded the model, of whole tensors on the CPU, and empty in all
    processes but the first.

    Tensors are gathered one at a time. The first process keeps them in a file without a name, so
    its memory holds one of them.

    All processes must call it, or those that do wait for ever.

    Args:
        model: sharded or not.
        folder: for the file; None: the first process keeps all tensors in memory.

    Raises:
        OSError: in the first process, if the disk is full.
    """
    if not is_sharded(model):
        return dict(model.state_dict())
    shards = {
        name: shard
        for name, shard in get_model_state_dict(model).items()
        if isinstance(shard, Tensor)
    }
    whole: dict[str, Tensor] = {}
    if dist.get_rank() == 0:
        whole = _room(shards, folder)
    for name, shard in shards.items():
        tensor = shard.full_tensor() if isinstance(shard, DTensor) else shard
        if whole:
            whole[name].copy_(tensor)
    return whole


def _room(shards: dict[str, Tensor], folder: Path | None) -> dict[str, Tensor]:
    """Tensors to gather into, in a file or in memory; tied ones are one tensor."""
    forms = {name: (shard.dtype, shard.shape) for name, shard in shards.items()}
    first_names: dict[int, str] = {}
    names = {
        name: first_names.setdefault(_local(shard).data_ptr(), name)
        for name, shard in shards.items()
    }
    forms = {name: form for name, form in forms.items() if names[name] == name}
    if folder is None:
        room = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in forms.items()}
    else:
        room = empty_on_disk(folder, forms)
    return {name: room[first] for name, first in names.items()}


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wait_for_all() -> None:
    """Wait until all processes are about to gather a sharded model, so that gathering it cannot
    hang.

    A plain Trainer under FSDP2 lets its first process save alone, while the others go on.

    Raises:
        ValueError: if another process has not come within a minute.
    """
    store = default_store()
    calls = store.add(_counter(dist.get_rank()), 1)
    deadline = time.monotonic() + _SAVING_S
    for rank in range(dist.get_world_size()):
        while store.add(_counter(rank), 0) < calls:
            if time.monotonic() > deadline:
                store.add(_counter(dist.get_rank()), -1)
                raise ValueError(
                    f"This process saves a model that FSDP2 sharded, and process {rank} does not "
                    'take part. With a plain Trainer set fsdp_config={"version": 2, '
                    '"state_dict_type": "SHARDED_STATE_DICT"}, and at the end call '
                    "model.save_pretrained in all processes; or train with qrefta.finetune."
                )
            time.sleep(0.01)


def _counter(rank: int) -> str:
    return f"qrefta/process {rank} gathers"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
