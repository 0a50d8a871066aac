"""A prepared model sharded by FSDP2, for training loops without Trainer and accelerate."""

from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from qrefta.distributed import check_fsdp2, is_sharded
from qrefta.hf_quantizer import prepared_config
from qrefta.nn.linear import AdaptedLinear


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
        mp_policy: dtypes of computation and reduction; default: those of the parameters.

    Raises:
        ValueError: if the model is not prepared or already sharded, there is no process group, or
            torch is older than 2.12.
    """
    prepared_config(model)
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
    for part in [*_blocks(model), *_embeddings(model)]:
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks: the outermost modules in lists that hold adapted linear layers."""
    paths: dict[str, None] = {}
    for path, module in model.named_modules():
        parts = path.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdigit()]
        if isinstance(module, AdaptedLinear) and numbers:
            paths[".".join(parts[: numbers[0] + 1])] = None
    return [model.get_submodule(path) for path in paths]


def _embeddings(model: PreTrainedModel) -> list[nn.Module]:
    """The input embeddings, unless the output is tied to them: tied weights belong to the root."""
    embeddings = model.get_input_embeddings()
    output = model.get_output_embeddings()
    weight = getattr(embeddings, "weight", None)
    is_tied = output is not None and getattr(output, "weight", None) is weight
    return [] if embeddings is None or is_tied else [embeddings]
