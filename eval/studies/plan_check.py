"""Planned against measured peak memory of a training step.

The measured peaks of the Llama-shaped decoder come from the rows of `eval.studies.cost` or
`eval.studies.gpu`; the others are measured here, in float32 on the CPU. plan()
does not cover the frozen floor and PEFT's QLoRA; they are counted with plan's functions. Other
architectures and methods are measured without dropout, because dropout keeps more memory on a CPU
than on a GPU. Plans assume the same number of tokens for every expert; an untrained router
distributes them unevenly.
"""

import copy
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import qrefta
from eval.memory import tensor_peak
from eval.peers.baselines import lora
from eval.rows import append, read
from eval.studies.cost import Run, outline
from qrefta._compat.transformers import enable_checkpointing
from qrefta.choices import SELECTIVE, Selective
from qrefta.cli import guarded
from qrefta.memory.footprint import count_step, counted_checkpointing, fake
from qrefta.memory.plan import plan
from qrefta.methods import METHODS
from qrefta.model.replace import replace_module
from qrefta.model.stacks import find_stacks
from qrefta.nn.checkpointing import selective_contexts
from qrefta.nn.linear import AdaptedLinear
from qrefta.nn.quantized import QuantFormat

RANK = 16
CHECKPOINTINGS: tuple[bool | Selective, ...] = (False, SELECTIVE, True)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
MODELS: dict[
    str, tuple[type, PreTrainedConfig, int, int | None]
] = {  # class, config, batch, tokens
    "bert": (BertForSequenceClassification, BertConfig(**SIZES, **NO_DROPOUT), 8, 128),
    "vit": (ViTForImageClassification, ViTConfig(**SIZES, **NO_DROPOUT), 4, None),
    "swin": (SwinForImageClassification, SwinConfig(drop_path_rate=0, **NO_DROPOUT), 2, None),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            n_embd=384,
            n_layer=6,
            n_head=12,
            vocab_size=8192,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=0,
            eos_token_id=0,
        ),
        4,
        128,
    ),
    "llama, 4 queries a key": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, num_key_value_heads=3, vocab_size=8192),
        4,
        128,
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(
            d_model=384,
            d_ff=1536,
            num_heads=6,
            vocab_size=8192,
            dropout_rate=0,
            decoder_start_token_id=0,
        ),
        4,
        128,
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(
            **SIZES,
            num_key_value_heads=3,
            num_local_experts=8,
            num_experts_per_tok=2,
            vocab_size=8192,
        ),
        4,
        128,
    ),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SIZES,
            num_key_value_heads=3,
            head_dim=32,
            moe_intermediate_size=192,
            num_experts=32,
            num_experts_per_tok=4,
            vocab_size=8192,
        ),
        4,
        128,
    ),
}
console = Console()


def run(
    measured: Annotated[Path, typer.Option(help="Rows of the studies `cost` or `gpu`.")] = Path(
        "eval/rows/cost.jsonl"
    ),
    only: Annotated[
        str,
        typer.Option(
            help="Parts of the printed 'model, method' ('bert, tera'), separated by semicolons."
        ),
    ] = "",
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    rows: Annotated[Path | None, typer.Option(help="JSON lines file; rows are added.")] = None,
) -> None:
    """Compare every configuration."""
    torch.set_num_threads(threads)
    steps = [row for row in read(measured) if row["kind"] == "step"]
    decoders = [row for row in steps if _chosen(only, row["setting"], row["method"])]
    for row in chain(_decoders(decoders), _others(only)):
        row["planned_of_measured"] = row["planned_bytes"] / row["measured_bytes"]
        console.print(
            f"{row['setting']}, {row['method']}"
            f"{_words(row['checkpointing'])}: planned "
            f"{row['planned_bytes'] / 1e6:.1f} MB, measured {row['measured_bytes'] / 1e6:.1f} MB, "
            f"{row['planned_of_measured']:.4f}"
        )
        if rows is not None:
            append(rows, [{"study": "plan"} | row], seed=0)


def _words(checkpointing: bool | Selective) -> str:
    if checkpointing == SELECTIVE:
        return ", selective checkpointing"
    return ", checkpointing" if checkpointing else ""


def _chosen(only: str, setting: str, method: str) -> bool:
    return any(text in f"{setting}, {method}" for text in only.split(";"))


def _decoders(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of training steps whose methods can be counted, with the planned bytes."""
    for row in rows:
        kind, *options = row["method"].split()
        if "peak_bytes" not in row or len(options) > 1:
            continue
        settings = Run(
            row["setting"],
            "cpu",
            getattr(torch, row["dtype"]),
            row["checkpointing"],
            row.get("layers", 0),
        )
        if kind in ("floor", "qlora") and options != ["bitsandbytes"]:
            planned = _counted(settings, int(options[0][2:]) if options else 0)
        elif kind in METHODS:
            batch, seq = settings.batch
            planned = plan(
                LlamaConfig(**settings.config, architectures=["LlamaForCausalLM"]),
                batch=batch,
                seq=seq,
                dtype=row["dtype"],
                gradient_checkpointing=row["checkpointing"],
                whole_logits=True,
                rank=int(options[0][2:]),
                method=kind,
                double_quant=True,
            ).total_bytes
        else:
            continue
        names = ("setting", "layers", "method", "checkpointing", "dtype", "batch")
        yield {key: row[key] for key in names if key in row} | {
            "measured_commit": row["commit"],
            "planned_bytes": planned,
            "measured_bytes": row["peak_bytes"],
        }


def _counted(settings: Run, lora_rank: int) -> int:
    """Bytes of a step of the frozen 4-bit model, with PEFT's LoRA if a rank is given."""
    batch, seq = settings.batch
    model: nn.Module = outline(settings)
    with torch.device("meta"):
        if settings.checkpointing:
            enable_checkpointing(model, counted_checkpointing(selective=False))
        paths = [path for stack in find_stacks(model) for path in stack.modules]
        if lora_rank:
            lora(model, lora_rank, alpha=lora_rank)
        for path in paths:
            inner = f"{path}.base_layer" if lora_rank else path
            old = model.get_submodule(inner)
            fmt = QuantFormat(double_quant=True)
            replace_module(
                model,
                inner,
                AdaptedLinear(old.in_features, old.out_features, False, fmt, old.weight.dtype),
            )
    fake(model.train())
    embeddings = model.get_input_embeddings().weight
    inputs = {
        "inputs_embeds": embeddings.new_empty(batch, seq, embeddings.shape[1]).requires_grad_()
    }
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return held + count_step(model, inputs, torch.optim.AdamW, {}).peak


def _others(only: str) -> Iterator[dict[str, Any]]:
    for name, (kind, config, batch, seq) in MODELS.items():
        for method in METHODS if name == "bert" else ["refta"]:
            if not _chosen(only, name, f"{method} R={RANK}"):
                continue
            settings: dict[str, Any] = {"rank": RANK, "method": method}
            dense = _dense(kind, config)
            planned = {
                checkpointing: plan(
                    dense,
                    batch=batch,
                    seq=seq,
                    gradient_checkpointing=checkpointing,
                    whole_logits=True,
                    **settings,
                ).total_bytes
                for checkpointing in CHECKPOINTINGS
            }
            model = qrefta.prepare(dense, refine=0, progress=False, **settings)
            for checkpointing in CHECKPOINTINGS:
                yield {
                    "setting": name,
                    "method": f"{method} R={RANK}",
                    "checkpointing": checkpointing,
                    "dtype": "float32",
                    "batch": [batch] if seq is None else [batch, seq],
                    "planned_bytes": planned[checkpointing],
                    "measured_bytes": _measured(model, batch, seq, checkpointing),
                }


def _dense(kind: type, config: PreTrainedConfig) -> nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.use_cache = False
    return kind(config)


def _measured(
    model: nn.Module, batch: int, seq: int | None, checkpointing: bool | Selective
) -> int:
    """Peak bytes of torch's tensors in the second step."""
    options: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == SELECTIVE:
        options["context_fn"] = selective_contexts
    if checkpointing:
        enable_checkpointing(model, options)
    if seq is None:
        size = model.config.image_size
        inputs: Tensor = torch.zeros(batch, model.config.num_channels, size, size)
    else:
        inputs = torch.randint(8192, (batch, seq), generator=torch.Generator().manual_seed(0))
    classes = isinstance(model, BertForSequenceClassification) or seq is None
    labels = torch.zeros(batch, dtype=torch.long) if classes else inputs
    optimizer = torch.optim.AdamW(
        parameter for parameter in model.train().parameters() if parameter.requires_grad
    )

    def step() -> None:
        model(**{model.main_input_name: inputs}, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return tensor_peak(step, "cpu")


if __name__ == "__main__":
    guarded(lambda: typer.run(run))
