"""A prepared model of random bytes, and the work of several processes on it for test_sharding.py.

Memory is the anonymous part of a process's resident memory (RssAnon), sampled. Pages of mapped
files are not in it: the system drops them when others need the memory.
"""

import ctypes
import gc
import os
import re
import threading
import time
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import LlamaConfig

import qrefta
from qrefta.config.report import StackReport
from qrefta.config.settings import Settings
from qrefta.distributed import is_sharded
from qrefta.hf_config import QReftaConfig
from qrefta.hf_quantizer import register
from qrefta.memory.meta_model import Outline
from tests.processes import message, shard_on_cpu

LAYERS = 12
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}
LARGE = TINY | {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": LAYERS}
_M_MMAP_THRESHOLD = -3  # of mallopt


def random_folder(folder, **sizes):
    """A prepared Llama in bfloat16, with random codes: preparing a large one takes a minute."""
    settings = Settings(method="refta", rank=4)
    outline = Outline.of(LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]), cut=False)
    model, _ = outline.prepared(settings, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values = 0.02 * torch.randn(tensor.shape, generator=generator)
            state[name] = values.to(tensor.dtype)
        elif tensor.dtype == torch.uint8:  # scales, or the transform: float32 as bytes
            *rows, width = tensor.shape
            state[name] = torch.rand(*rows, width // 4, generator=generator).view(torch.uint8)
        else:
            state[name] = torch.randint(
                -128, 128, tensor.shape, dtype=tensor.dtype, generator=generator
            )
    model.load_state_dict(state, assign=True)
    reports = [
        StackReport(stack, 4, (4,), "lsm3", "nf4", 1.0, 1.0, 0.0, 0) for stack in outline.stacks
    ]
    register(model, QReftaConfig(settings, stacks=reports))
    model.save_pretrained(folder)


class Memory:
    """Anonymous memory of this process, in bytes, beyond that at the start."""

    def __init__(self):
        # Freed buffers return to the system at once, so they are not counted.
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
        self.restart()
        threading.Thread(target=self._sample, daemon=True).start()

    def restart(self):
        gc.collect()
        self._start = _anonymous()
        self._peak = self._start

    def peak(self):
        return max(self._peak, _anonymous()) - self._start

    def _sample(self):
        while True:
            self._peak = max(self._peak, _anonymous())
            time.sleep(0.002)


def _anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


def by_hand(folder):
    """Load, shard and save, without Trainer and accelerate."""
    results = {"too early": message(qrefta.shard, qrefta.load(folder / "tiny"))}
    dist.init_process_group("gloo")
    _by_hand(folder, "tiny")  # what is imported on first use does not count
    memory = Memory()
    model = _by_hand(folder, "large", memory, results)
    results["twice"] = message(qrefta.shard, model)
    size = dist.get_world_size()
    torch.save(results, folder / f"by-hand-{size}-{os.environ['RANK']}.pt")
    dist.destroy_process_group()


def _by_hand(folder, name, memory=None, results=None):
    model = qrefta.shard(qrefta.load(folder / name))
    if memory is not None:
        results["loaded"] = memory.peak()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "tiny":
        batch = torch.arange(8).unsqueeze(0)
        model(input_ids=batch, labels=batch).loss.backward()
    else:  # the passes of the large model take seconds
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.1).step()
    out = folder / f"{name}-{dist.get_world_size()}"
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=out / "parts")
    if memory is not None:
        memory.restart()
    model.save_pretrained(out / "whole")
    if memory is not None:
        results["saved"] = memory.peak()
    return model


def consolidated(folder):
    """A sharded checkpoint as one folder, in one process."""
    _consolidated(folder, "tiny")
    memory = Memory()
    _consolidated(folder, "large")
    torch.save([memory.peak()], folder / "consolidated.pt")


def _consolidated(folder, name):
    qrefta.consolidate(folder / f"{name}-4" / "parts", folder / name, folder / f"{name}-4" / "out")


def by_accelerate(folder):
    """Load and shard as Trainer does."""
    shard_on_cpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    _by_accelerate(accelerator, folder / "tiny")
    memory = Memory()
    model = _by_accelerate(accelerator, folder / "large")
    results = {"loaded": memory.peak(), "sharded": is_sharded(model)}
    torch.save(results, folder / f"accelerate-{os.environ['RANK']}.pt")


def _by_accelerate(accelerator, folder):
    model = qrefta.load(folder)
    parameters = [p for p in model.parameters() if p.requires_grad]
    model, _ = accelerator.prepare(model, torch.optim.SGD(parameters, lr=0.1))
    return model
