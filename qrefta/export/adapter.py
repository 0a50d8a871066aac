"""The adapter of a LoRA in PEFT's format: its config, its tensors, and loading it with PEFT."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qrefta.export.updates import Update
from qrefta.files.shards import write_shard
from qrefta.hf_config import QReftaConfig
from qrefta.nn.linear import AdaptedLinear

_ADAPTER = "adapter_model.safetensors"
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class Written(NamedTuple):
    """The contents of an adapter.

    Attributes:
        ranks: of its updates, ascending.
        error: the share of the updates' squared norm that is missing.
    """

    ranks: list[int]
    error: float


def write_adapter(
    model: PreTrainedModel,
    config: QReftaConfig,
    folder: Path,
    updates: Iterable[tuple[str, Update]],
    source: str,
    dtype: torch.dtype,
) -> Written:
    """Write adapter_config.json and the adapter's tensors, and modules that trained in full."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    missing = 0.0
    norm = 0.0
    for path, update in updates:
        ranks[path] = len(update.right)
        missing += update.missing
        norm += update.norm
        stem = f"base_model.model.{path}"
        tensors[f"{stem}.lora_A.weight"] = update.right.to("cpu", dtype).contiguous()
        tensors[f"{stem}.lora_B.weight"] = update.left.to("cpu", dtype).contiguous()
    modules = dict(model.named_modules())
    saved = [
        path
        for path in config.settings.modules_to_save
        if path in modules and list(modules[path].parameters())
    ]
    for path in _taken_by_peft(modules, saved):
        for name, tensor in modules[path].state_dict().items():
            tensors[f"base_model.model.{path}.{name}"] = tensor.detach().cpu().contiguous()
    write_shard(folder / _ADAPTER, tensors)
    _lora_config(model, config, ranks, saved, source).save_pretrained(folder)
    return Written(sorted(set(ranks.values())), missing / norm if norm else 0.0)


def _taken_by_peft(modules: Mapping[str, nn.Module], saved: list[str]) -> list[str]:
    """Paths of the modules that PEFT reads from an adapter for `modules_to_save`.

    It takes every module whose path ends in one of the names: for SwiftFormer's final `norm` those
    of the blocks too.

    Raises:
        ValueError: if one of them holds packed weights.
    """
    paths = [
        path
        for path, module in modules.items()
        if any(path.endswith(name) for name in saved) and list(module.parameters())
    ]
    for path in paths:
        if any(isinstance(module, AdaptedLinear) for module in modules[path].modules()):
            raise ValueError(
                f"PEFT takes modules to train in full by the ends of their paths; {saved} are ends "
                f"of {path}, which holds packed weights. Merge the model instead."
            )
    return paths


def _lora_config(
    model: PreTrainedModel,
    config: QReftaConfig,
    ranks: dict[str, int],
    saved: list[str],
    source: str,
) -> Any:
    """PEFT's config; alpha is the rank everywhere, so that nothing scales the product."""
    peft = import_peft()
    most_common = max(ranks.values(), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != most_common}
    name = type(model).__name__
    tasks = [task for suffix, task in _TASKS.items() if name.endswith(suffix)]
    if tasks == ["SEQ_2_SEQ_LM"] and not model.config.is_encoder_decoder:
        tasks = ["CAUSAL_LM"]  # images and text in, text out (Llava)
    if model.main_input_name != "input_ids":
        tasks = []  # PEFT's wrapper of a task passes input_ids to the model
    return peft.LoraConfig(
        task_type=tasks[0] if tasks else None,
        r=most_common,
        lora_alpha=most_common,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=_names(model, set(ranks)),
        modules_to_save=saved or None,
        fan_in_fan_out=any(row.stack.transposed for row in config.stacks),
        base_model_name_or_path=source,
        inference_mode=True,
    )


def _names(model: PreTrainedModel, paths: set[str]) -> list[str]:
    """The last parts of the paths if these name no other module; else the paths."""
    names = {path.rpartition(".")[2] for path in paths}
    named = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in names}
    return sorted(names if named == paths else paths)


def with_adapter(bare: PreTrainedModel, folder: Path) -> nn.Module:
    """The base with the adapter, as PEFT loads them.

    Raises:
        ValueError: if PEFT takes no model of this class.
    """
    try:
        with torch.random.fork_rng():  # PEFT draws a start, which the file then replaces
            return import_peft().PeftModel.from_pretrained(bare, folder)
    except NotImplementedError as error:
        raise ValueError(
            f"PEFT takes no {type(bare).__name__} ({error}); merge the model instead."
        ) from None


def import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "A LoRA is written and checked with PEFT, which is not installed: pip install peft"
        ) from error
    return peft
