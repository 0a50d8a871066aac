"""A model sharded by FSDP2, block by block: by Trainer, or in a training loop without it."""

from typing import Any

from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from qrefta.distributed import check_fsdp2, is_sharded
from qrefta.model.prepared import is_prepared, prepared_config


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh | None = None,
    *,
    reshard_after_forward: bool = True,
    mp_policy: MixedPrecisionPolicy | None = None,
) -> PreTrainedModel:
    """The same model, of which every process holds its share (`torch.distributed.fsdp`).

    Blocks are sharded one by one, then embeddings that are not tied, then the root with the rest,
    the factors among it. `from_pretrained` maps the files of a prepared folder and reads them as
    they are used, so a process never holds more than its share and one block. Make the optimizer
    after this call.

    Args:
        model: prepared, and equal in all processes, which must all call this.
        mesh: of the processes; default: all of them.
        reshard_after_forward: whether a block is freed after its forward pass and gathered again
            for its backward pass.
        mp_policy: dtypes of computation and reduction; default: the dtypes of the parameters.

    Raises:
        ValueError: if the model is not prepared or already sharded, there is no process group, or
            torch is older than 2.12.
    """
    blocks = repeated_blocks(model)
    check_fsdp2()
    if not dist.is_initialized():
        raise ValueError(
            "There is no process group. Start the script with torchrun and call "
            'torch.distributed.init_process_group("nccl") before qrefta.shard(model); on CPUs '
            'the backend is "gloo".'
        )
    if is_sharded(model):
        raise ValueError("The model is sharded already; call qrefta.shard(model) once.")
    policy = mp_policy or MixedPrecisionPolicy()
    for part in [*blocks, *_embeddings(model)]:
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a prepared model, each once: what the layer number in a stack's name counts.

    Raises:
        ValueError: if the model is not prepared.
    """
    paths: dict[str, None] = {}
    for row in prepared_config(model).stacks:
        depth = row.stack.name.split(".").index("*") + 1
        for path in row.stack.modules:
            paths[".".join(path.split(".")[:depth])] = None
    return [model.get_submodule(path) for path in paths]


def fsdp2_config(model: PreTrainedModel) -> dict[str, Any]:
    """Trainer's `fsdp_config` to shard a model block by block.

    Every process writes its part of a checkpoint.
    The blocks of a prepared model are named here. The blocks that BERT's class names contain its
    embeddings, on which accelerate 1.15 fails.
    """
    config: dict[str, Any] = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
    if not is_prepared(model):
        return config
    classes = {type(block).__name__ for block in repeated_blocks(model)}
    return config | {"transformer_layer_cls_to_wrap": sorted(classes)}


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The input embeddings, unless the output is tied to them: tied weights belong to the root."""
    embeddings = model.get_input_embeddings()
    output = model.get_output_embeddings()
    weight = getattr(embeddings, "weight", None)
    is_tied = output is not None and getattr(output, "weight", None) is weight
    return [] if embeddings is None or is_tied else [embeddings]
