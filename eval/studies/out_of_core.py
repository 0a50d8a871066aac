"""Preparing a checkpoint that is larger than the allowed memory.

Writes a Llama-shaped checkpoint of random bf16 weights into a temporary folder and prepares it in a
separate process. Measured are the peak memory of this process above the imported libraries, its
time, and the bytes it reads. The floor of the time is reading these bytes at the bandwidth measured
before on the same files. With `--calibrated` residuals are rounded with error feedback, by moments
of random inputs with outlier channels, which all layers of one width share. The files are deleted
afterwards.
"""

import multiprocessing
import shutil
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import LlamaConfig

import qrefta
from eval.memory import peak, resident, restart_peak
from eval.rows import append
from qrefta.cli import guarded
from qrefta.config.settings import Settings
from qrefta.files.safetensors import Checkpoint
from qrefta.files.shards import write_index, write_shard
from qrefta.model.config_file import read_config
from qrefta.split.moments import Moments

SHAPES = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
    },
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}
SHAPES["7b-4-layers"] = SHAPES["7b"] | {"num_hidden_layers": 4}  # time per weight, sooner
console = Console()


def run(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "1.1b",
    rank: Annotated[int, typer.Option(help="R.")] = 64,
    method: Annotated[str, typer.Option(help="Tensor method.")] = Settings.method,
    refine: Annotated[
        int | None, typer.Option(help="Rounds of refinement (default: as in qrefta.prepare).")
    ] = None,
    transform: Annotated[str | None, typer.Option(help="Mode-3 transform.")] = None,
    max_memory: Annotated[str, typer.Option(help="Memory limit, as in qrefta.prepare.")] = "1.5GB",
    calibrated: Annotated[bool, typer.Option(help="Give moments of the inputs.")] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Measure memory and time of preparing a checkpoint of a given shape."""
    place = Path(tempfile.mkdtemp(prefix="qrefta-out-of-core-"))
    try:
        write_checkpoint(place / "dense", LlamaConfig(**SHAPES[shape], dtype="bfloat16"))
        dense_bytes = sum(file.stat().st_size for file in (place / "dense").glob("*.safetensors"))
        bandwidth = _bandwidth(place / "dense")
        settings = {
            "rank": rank,
            "method": method,
            "refine": refine,
            "max_memory": max_memory,
        } | ({} if transform is None else {"transform": transform})
        if calibrated:
            write_moments(place / "moments.safetensors", SHAPES[shape])
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured = pool.apply(_prepare, (place, settings, threads))
        packed_bytes = sum(file.stat().st_size for file in (place / "out").glob("*.safetensors"))
    finally:
        shutil.rmtree(place)
    row = {
        "kind": "out_of_core",
        "shape": shape,
        "dense_bytes": dense_bytes,
        "packed_bytes": packed_bytes,
        **settings,
        **measured,
        "calibrated": calibrated,
        "read_bytes_per_s": bandwidth,
        "floor_s": measured["read_bytes"] / bandwidth,
        "passes": measured["read_bytes"] / dense_bytes,
    }
    console.print(
        f"{shape}: {dense_bytes / 1e9:.2f} GB -> {packed_bytes / 1e9:.2f} GB in "
        f"{row['seconds']:.0f} s (floor of "
        f"reading {row['passes']:.1f} times: {row['floor_s']:.0f} s), peak "
        f"{row['peak_bytes'] / 1e9:.2f} GB above "
        f"the libraries (allowed: {max_memory}), error ratio {row['error_ratio']:.4f}"
    )
    if rows is not None:
        append(rows, [{"study": "out_of_core"} | row], seed=0)


def write_checkpoint(folder: Path, config: LlamaConfig) -> None:
    """Write a checkpoint of random weights, one shard per layer, with one layer in memory."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def matrix(out_features: int, in_features: int) -> torch.Tensor:
        return torch.randn(out_features, in_features, generator=generator).mul_(0.02).bfloat16()

    hidden = config.hidden_size
    inner = config.intermediate_size
    kv = config.num_key_value_heads * (hidden // config.num_attention_heads)
    files = []
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        tensors = {
            f"{prefix}.{norm}.weight": torch.ones(hidden).bfloat16()
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        shapes = {
            "q": (hidden, hidden),
            "k": (kv, hidden),
            "v": (kv, hidden),
            "o": (hidden, hidden),
        }
        tensors |= {
            f"{prefix}.self_attn.{name}_proj.weight": matrix(*shape)
            for name, shape in shapes.items()
        }
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        tensors |= {
            f"{prefix}.mlp.{name}_proj.weight": matrix(*shape) for name, shape in shapes.items()
        }
        files.append(f"model-{layer:05d}.safetensors")
        write_shard(folder / files[-1], tensors)
    ends = {"model.norm.weight": torch.ones(hidden).bfloat16()}
    ends |= {
        name: matrix(config.vocab_size, hidden)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    files.append("model-ends.safetensors")
    write_shard(folder / files[-1], ends)
    write_index(folder, files)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def write_moments(file: Path, shape: dict[str, int]) -> None:
    """Write moments of 8,192 random inputs for every linear layer of a shape."""
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for width in (shape["hidden_size"], shape["intermediate_size"]):
        inputs = torch.randn(8192, width, generator=generator)
        inputs[:, ::97] *= 10
        moments[str(width)] = inputs.T @ inputs / len(inputs)
    owners = {}
    for layer in range(shape["num_hidden_layers"]):
        for name in (
            "self_attn.q",
            "self_attn.k",
            "self_attn.v",
            "self_attn.o",
            "mlp.gate",
            "mlp.up",
        ):
            owners[f"model.layers.{layer}.{name}_proj"] = str(shape["hidden_size"])
        owners[f"model.layers.{layer}.mlp.down_proj"] = str(shape["intermediate_size"])
    Moments(owners, dict.fromkeys(moments, 8192), moments.__getitem__).save(file)


def _bandwidth(folder: Path) -> float:
    """Bytes per second of one pass over the files."""
    checkpoint = Checkpoint(folder)
    start = perf_counter()
    total = 0
    for name in checkpoint.names:
        for chunk in checkpoint.bytes_of(name):
            total += len(chunk)
    return total / (perf_counter() - start)


def _prepare(place: Path, settings: dict[str, Any], threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    before = resident()
    read = _read_bytes()
    restart_peak()
    start = perf_counter()
    moments = place / "moments.safetensors"
    settings = settings | ({"moments": moments} if moments.exists() else {})
    qrefta.prepare_checkpoint(place / "dense", place / "out", progress=False, **settings)
    seconds = perf_counter() - start
    config = qrefta.QReftaConfig.from_dict(read_config(place / "out")["quantization_config"])
    baseline = sum(row.baseline_error for row in config.stacks)
    return {
        "seconds": seconds,
        "peak_bytes": peak() - before,
        "libraries_bytes": before,
        "read_bytes": _read_bytes() - read,
        "error_ratio": sum(row.residual_error for row in config.stacks) / baseline,
    }


def _read_bytes() -> int:
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
