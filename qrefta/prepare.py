"""prepare(): a dense transformers model -> 4-bit residual + trained factors, in place, a stack at a time."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from qrefta.build import attach_bank, bank_key, freeze, replace_linear, task_head
from qrefta.config import QReftaConfig, StackRow
from qrefta.factors import BANK, FactorBank
from qrefta.linear import AdaptedLinear
from qrefta.quantize import Packed
from qrefta.quantizer import QReftaQuantizer, is_prepared
from qrefta.split import Split, baseline_error, quantize_stack, split_stack
from qrefta.stack import LayerStack, ends_with, find_stacks, read_stack, read_weight, select_stacks

PROGRESS_DELAY_S = 2.0


def prepare(
    model: PreTrainedModel,
    bits: int = 4,
    rank: int = 16,
    *,
    method: str = "refta",
    transform: str = "lsm3",
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    target_modules: str | Iterable[str] | None = None,
    modules_to_save: str | Iterable[str] | None = None,
    refine: int = 0,
    seed: int = 0,
    factor_dtype: str = "bfloat16",
    progress: bool = True,
) -> PreTrainedModel:
    """The same model with every linear of its blocks in 4 bits, ready to train the principal parts of the targets.

    Each stack of linears W_l (one role over all layers) becomes dequant(Q_l) + Delta_l, where Delta_l is its tensor
    rank-R principal part (trained) and Q_l the quantized rest (frozen). Works in place: a dense weight is released as
    its packed one is made; the peak is the model plus about 1.5 times its largest stack in float32 (2.5 times with
    `refine` or 16 bits). A model that is refused is left exactly as it was.

    Args:
        model: any transformers model with its weights in memory, float32, bf16 or fp16.
        bits: 4, or 16 to keep the residual as it is (ablation: no quantization error at all).
        rank: R, components kept of every target stack, over all its layers together; a stack trains R (in + out)
            numbers.
        method: the tensor method, one of `qrefta.methods.METHODS`.
        transform: the mode-3 transform: lsm3 (from the data), dct, or identity (each layer on its own).
        quant_type: nf4, fp4 or int4.
        block_size: weights that share a scale.
        double_quant: store the scales in 8 bits too, as QLoRA does.
        target_modules: which linears get factors. None: all in the repeated blocks; a list: module paths that end in
            one of the names ("q_proj", "self_attn.q_proj"); a string: a regular expression that matches whole paths.
            All others in the blocks are quantized only.
        modules_to_save: names (or path ends) of further modules to train whole, such as a fresh "pooler". The task
            head that lies outside the base model trains without being named, unless it is a language-model head.
        refine: rounds of alternating between the principal part and the quantized residual.
        seed: recorded for methods that draw random numbers; the exact t-SVD of ReFTA draws none.
        factor_dtype: bfloat16, or float32 for factors that are not rounded.
        progress: show a progress bar over the stacks, if it takes more than two seconds.

    Returns:
        `model` itself; `save_pretrained`, `from_pretrained` and `Trainer` work on it as on any model.

    Raises:
        ValueError: for a setting that is not allowed, a rank beyond a stack's, targets that match nothing, weights that
            are NaN, infinite or on the meta device, or a model that is already prepared, quantized or under PEFT.
    """
    names = target_modules if target_modules is None or isinstance(target_modules, str) else list(target_modules)
    saved = [modules_to_save] if isinstance(modules_to_save, str) else list(modules_to_save or [])
    config = QReftaConfig(
        method=method,
        transform=transform,
        rank=rank,
        bits=bits,
        quant_type=quant_type,
        block_size=block_size,
        double_quant=double_quant,
        refine=refine,
        seed=seed,
        factor_dtype=factor_dtype,
        target_modules=names,
    )
    _check_model(model)
    stacks = find_stacks(model)
    targets = select_stacks(stacks, names)
    config.modules_to_save = _trained_modules(model, saved, stacks)
    _check_ranks(targets, rank)
    _check_weights(model, stacks)

    attach_bank(model)
    for stack in tqdm(stacks, desc="Preparing", unit="stack", disable=not progress, delay=PROGRESS_DELAY_S):
        config.stacks.append(_prepare_stack(model, stack, config, stack in targets))
    freeze(model, config.modules_to_save)
    _register(model, config)
    return model


def _prepare_stack(model: PreTrainedModel, stack: LayerStack, config: QReftaConfig, targeted: bool) -> StackRow:
    """Replace the K linears of a stack; the row says what it did."""
    weights = read_stack(model, stack)
    split = split_stack(weights, config) if targeted else quantize_stack(weights, config)
    baseline = baseline_error(weights, config) if targeted else split.error
    factors = split.factors
    key = None
    if factors is not None:
        key = bank_key(len(config.stacks))
        getattr(model, BANK)[key] = factors
    stored_bytes = 0 if factors is None else factors.stored_bytes
    for layer, path in enumerate(stack.modules):
        stored_bytes += _store(model, path, split.residuals[layer], config, layer, key)
    return StackRow(
        stack=stack.name,
        modules=list(stack.modules),
        transposed=stack.transposed,
        layers=stack.layers,
        shape=[stack.out_features, stack.in_features],
        rank=0 if factors is None else config.rank,
        slice_ranks=[0] * stack.layers if factors is None else factors.slice_ranks,
        transform=None if factors is None else config.transform,
        quant_type=config.quant_type if config.bits == 4 else None,
        baseline_error=baseline,
        residual_error=split.error,
        ratio=split.error / baseline if baseline else 1.0,
        principal_energy=_principal_energy(weights, split),
        bytes=stored_bytes,
        bits_per_weight=8 * stored_bytes / weights.numel(),
    )


def _principal_energy(weights: Tensor, split: Split) -> float:
    """||principal part||_F^2 / ||W||_F^2 of a stack, 0 for a zero stack."""
    norm = sum(weight.double().square().sum().item() for weight in weights)
    if split.factors is None or norm == 0:
        return 0.0
    return sum(split.factors.delta(layer).double().square().sum().item() for layer in range(len(weights))) / norm


def _store(
    model: PreTrainedModel, path: str, residual: Packed | Tensor, config: QReftaConfig, layer: int, key: str | None
) -> int:
    """Put a residual where the dense linear was; the bytes of its weight and scales."""
    old = model.get_submodule(path)
    new = replace_linear(model, path, config, layer, key)
    if isinstance(residual, Packed):
        residual = Packed(*(None if part is None else part.to(old.weight.device) for part in residual))
    else:
        residual = residual.to(old.weight.device, old.weight.dtype)
    new.store(residual, old.bias)
    return sum(part.nbytes for part in new.packed() if part is not None)


def _register(model: PreTrainedModel, config: QReftaConfig) -> None:
    """Mark the model as quantized by the plug-in, as transformers does for a model that it loads."""
    model.hf_quantizer = QReftaQuantizer(config)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"prepare takes a transformers PreTrainedModel, not {type(model).__name__}.")
    if is_prepared(model):
        raise ValueError("The model is already prepared; call qrefta.merge(model) first to prepare it anew.")
    if any(isinstance(module, AdaptedLinear | FactorBank) for module in model.modules()):
        raise ValueError(
            "A part of the model is already prepared, or an earlier prepare was interrupted; load the model again."
        )
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("The model carries PEFT adapters; call merge_and_unload() on it first.")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            f"The model is already quantized ({getattr(model, 'quantization_method', 'unknown')}); load it without "
            "quantization_config: prepare quantizes it itself."
        )
    for path, module in model.named_modules():
        if type(module).__module__.startswith(("bitsandbytes.", "peft.")):
            raise ValueError(
                f"{path} is a {type(module).__module__}.{type(module).__name__}; prepare needs the plain dense model: "
                "load it without quantization, or merge and unload the adapters."
            )


def _check_ranks(targets: list[LayerStack], rank: int) -> None:
    smallest = min(targets, key=lambda stack: stack.max_rank)
    if rank > smallest.max_rank:
        layers, out_features, in_features = smallest.shape
        raise ValueError(
            f"rank is {rank}, but {smallest.name} ({layers} layers of {out_features} x {in_features}) has only "
            f"{smallest.max_rank} tensor singular values: the largest allowed rank is {smallest.max_rank}, or leave "
            "the stack out of target_modules"
        )


def _check_weights(model: PreTrainedModel, stacks: list[LayerStack]) -> None:
    for stack in stacks:
        for path in stack.modules:
            weight = read_weight(model.get_submodule(path))
            if weight.is_meta:
                raise ValueError(f"{path}.weight is on the meta device; load the model with its weights in memory.")
            if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{path}.weight is {weight.dtype}; prepare takes float32, bfloat16 or float16.")
            for name, parameter in model.get_submodule(path).named_parameters():
                if not torch.isfinite(parameter).all():
                    raise ValueError(f"{path}.{name} holds NaN or infinite values; the checkpoint is damaged.")


def _trained_modules(model: PreTrainedModel, names: list[str], stacks: list[LayerStack]) -> list[str]:
    """Paths of the modules that train whole: the task head, and those that `names` gives."""
    paths = [path for path, _ in model.named_modules() if path]
    unmatched = [name for name in names if not any(ends_with(path, name) for path in paths)]
    if unmatched:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"modules_to_save {unmatched} match no module; at the top there are: {children}")
    named = [path for path in paths if any(ends_with(path, name) for name in names)]
    for path in named:
        if any(f"{packed}.".startswith(f"{path}.") for stack in stacks for packed in stack.modules):
            raise ValueError(
                f"modules_to_save names {path}, which is or holds linears that are quantized; they cannot train whole. "
                "Give them factors with target_modules instead."
            )
    return list(dict.fromkeys(task_head(model) + named))
