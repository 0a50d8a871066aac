"""prepare(): a dense transformers model -> 4-bit residual + trained factors, in place, a stack at a time."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from qrefta._compat.transformers import has_peft_adapter
from qrefta.config import QReftaConfig, StackRow
from qrefta.hf_quantizer import QReftaQuantizer, is_prepared
from qrefta.model.build import adapt, attach_bank, bank_key, freeze, trained_modules
from qrefta.model.stacks import (
    LayerStack,
    Weights,
    check_values,
    find_stacks,
    model_weights,
    read_slice,
    select_stacks,
)
from qrefta.nn.factors import BANK, FactorBank, Rank
from qrefta.nn.linear import AdaptedLinear
from qrefta.nn.quantized import Packed
from qrefta.split.allocate import choose_ranks
from qrefta.split.calibrate import Moments, gather_moments, load_moments
from qrefta.split.checkpoint import convert
from qrefta.split.stack_split import StackSplit

PROGRESS_DELAY_S = 2.0


def prepare(
    model: PreTrainedModel | str | Path,
    bits: int = 4,
    rank: int | str = 16,
    *,
    out: str | Path | None = None,
    method: str = "refta",
    ranks: Sequence[int] | None = None,
    trained_params: int | None = None,
    transform: str = "lsm3",
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    target_modules: str | Iterable[str] | None = None,
    modules_to_save: str | Iterable[str] | None = None,
    refine: int = 5,
    calibration: Iterable[Any] | None = None,
    moments: Moments | str | Path | None = None,
    budget_mb: float | None = None,
    error_ratio: float | None = None,
    seed: int = 0,
    factor_dtype: str = "bfloat16",
    device: torch.device | str | None = None,
    max_memory: int | str = "2GB",
    progress: bool = True,
) -> PreTrainedModel:
    """A model with every linear of its blocks in 4 bits, ready to train the principal parts of the targets.

    Each stack of linears W_l (one role over all layers) becomes dequant(Q_l) + Delta_l, where Delta_l is its tensor
    rank-R principal part (trained) and Q_l the quantized rest (frozen).

    With a model in memory it works in place: the peak is the model plus about its largest stack in float32. A model
    that is refused is left exactly as it was. With a folder or hub name and `out`, the checkpoint is read and written a
    few rows at a time and no model is made (see `qrefta.split.checkpoint`); the result is the same.

    Args:
        model: any transformers model with its weights in memory, float32, bf16 or fp16; or, with `out`, the folder or
            hub name of one in safetensors files.
        bits: 4, or 16 to keep the residual as it is (ablation: no quantization error at all).
        rank: R, components kept of every target stack, over all its layers together; a stack trains R (in + out)
            numbers. "auto": distributed over the stacks by where a component removes most error per byte, to keep
            `budget_mb` or to reach `error_ratio`.
        out: folder to write, new, empty, or left by an interrupted run with the same settings, which then goes on.
        method: the tensor method, one of `qrefta.methods.METHODS`: refta; craft, whose factors are frozen but for three
            small squares a stack; and from a zero update, with the whole weight quantized, tera, lotr and lorta.
        ranks: in the place of `rank` for craft, (r_layer, r_out, r_in), each capped at the stack's own sizes.
        trained_params: in the place of `rank`: the largest rank, the same for all stacks, that trains at most so many
            numbers in the factors of all targets.
        transform: the mode-3 transform: lsm3 (from the data), dct, or identity (each layer on its own). craft takes
            lsm3; methods that start from zero take none.
        quant_type: nf4, fp4 or int4.
        block_size: weights that share a scale.
        double_quant: store the scales in 8 bits too, as QLoRA does.
        target_modules: which linears get factors. None: all in the repeated blocks; a list: module paths that end in
            one of the names ("q_proj", "self_attn.q_proj"); a string: a regular expression that matches whole paths.
            All others in the blocks are quantized only. Fused experts go by their parameters ("experts.down_proj"); a
            stack of them has one slice for each expert of each layer, and the transform's cost grows with its square.
        modules_to_save: names (or path ends) of further modules to train whole, such as a fresh "pooler". The task
            head that lies outside the base model trains without being named, unless it is a language-model head.
        refine: rounds of refitting the principal part and the quantized residual to each other.
        calibration: batches of model inputs (a few hundred samples of text are enough): the split then keeps the
            outputs near the original's, instead of the weights. A model in memory only.
        moments: second moments of the inputs, gathered before (`qrefta.split.calibrate`), or the file that holds them.
        budget_mb: with rank="auto", megabytes (10^6 bytes) for all factors.
        error_ratio: with rank="auto", squared error to reach over all targets, relative to quantizing whole weights;
            of the outputs, with calibration or moments. Splits all stacks several times to measure it.
        seed: of the block method's random start.
        factor_dtype: bfloat16, or float32 for factors that are not rounded.
        device: where a stack at a time is worked on, for example "cuda" for a model in CPU memory; default: where its
            weights are, for a checkpoint the CPU.
        max_memory: bytes, or text like "3GB", that preparing a checkpoint may take beside the imported libraries.
        progress: show a progress bar over the stacks, if it takes more than two seconds.

    Returns:
        The model, the same object; `save_pretrained`, `from_pretrained` and `Trainer` work on it as on any. For a
        checkpoint: the path `out`.

    Raises:
        ValueError: for a setting that is not allowed, a rank beyond a stack's, targets that match nothing, weights that
            are NaN, infinite or on the meta device, or a model that is already prepared, quantized or under PEFT.
    """
    names = (
        target_modules
        if target_modules is None or isinstance(target_modules, str)
        else list(target_modules)
    )
    saved = [modules_to_save] if isinstance(modules_to_save, str) else list(modules_to_save or [])
    if calibration is not None and moments is not None:
        raise ValueError(
            "calibration and moments are both given; moments are what calibration gathers: give one."
        )
    config = QReftaConfig(
        method=method,
        ranks=ranks,
        trained_params=trained_params,
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
        modules_to_save=saved,
        budget_mb=budget_mb,
        error_ratio=error_ratio,
        calibrated=calibration is not None or moments is not None,
    )
    moments = load_moments(moments) if isinstance(moments, str | Path) else moments
    device = None if device is None else torch.device(device)
    if isinstance(model, str | Path):
        if out is None or calibration is not None:
            raise ValueError(
                "A folder or hub name needs `out`, the folder to write, and takes `moments` (gathered on a model in "
                "memory) in the place of `calibration`; or load the model and give that."
            )
        return convert(
            model, Path(out), config, moments, device or torch.device("cpu"), max_memory, progress
        )
    if out is not None:
        raise ValueError(
            "`out` goes with the folder or hub name of a model; save this one with save_pretrained."
        )
    return _prepare_in_memory(model, config, calibration, moments, device, progress)


def _prepare_in_memory(
    model: PreTrainedModel,
    config: QReftaConfig,
    calibration: Iterable[Any] | None,
    moments: Moments | None,
    device: torch.device | None,
    progress: bool,
) -> PreTrainedModel:
    _check_model(model)
    stacks = find_stacks(model)
    targets = select_stacks(stacks, config.target_modules)
    config.modules_to_save = trained_modules(model, config.modules_to_save, stacks)
    _check_weights(model, stacks)
    if calibration is not None:
        moments = gather_moments(model, stacks, calibration, progress=progress)
    weights = {stack: model_weights(model, stack, device) for stack in stacks}
    ranks = choose_ranks(targets, [weights[stack] for stack in targets], config, moments, progress)

    attach_bank(model)
    for stack in tqdm(
        stacks, desc="Preparing", unit="stack", disable=not progress, delay=PROGRESS_DELAY_S
    ):
        rank = ranks.get(stack, 0)
        config.stacks.append(_prepare_stack(model, stack, weights[stack], config, rank, moments))
    freeze(model, config.modules_to_save)
    config.base_model = model.name_or_path or None
    _register(model, config)
    return model


def _prepare_stack(
    model: PreTrainedModel,
    stack: LayerStack,
    weights: Weights,
    config: QReftaConfig,
    rank: Rank,
    moments: Moments | None,
) -> StackRow:
    """Replace the K linears of a stack; the row says what it did."""
    home = read_slice(model, stack, 0).device
    split = StackSplit(stack, weights, config, rank, moments)
    key = bank_key(len(config.stacks)) if rank else None
    if key is not None:
        getattr(model, BANK)[key] = split.split.factors
    for index, residual in enumerate(split.residuals()):
        _store(model, stack, index, residual, config, key)
    if key is not None:
        split.split.factors.to(home)
    return split.row()


def _store(
    model: PreTrainedModel,
    stack: LayerStack,
    index: int,
    residual: Packed | Tensor,
    config: QReftaConfig,
    key: str | None,
) -> None:
    """Put a residual where the dense weight was."""
    dense = read_slice(model, stack, index)
    new = adapt(model, stack, index, config, key)
    if isinstance(residual, Packed):
        residual = Packed(*(None if part is None else part.to(dense.device) for part in residual))
    else:
        residual = residual.to(dense.device, dense.dtype)
    new.store(residual, new.bias)


def _register(model: PreTrainedModel, config: QReftaConfig) -> None:
    """Mark the model as quantized by the plug-in, as transformers does for a model that it loads."""
    model.hf_quantizer = QReftaQuantizer(config)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"prepare takes a transformers PreTrainedModel, not {type(model).__name__}."
        )
    if is_prepared(model):
        raise ValueError(
            "The model is already prepared; call qrefta.merge(model) first to prepare it anew."
        )
    if any(isinstance(module, AdaptedLinear | FactorBank) for module in model.modules()):
        raise ValueError(
            "A part of the model is already prepared, or an earlier prepare was interrupted; load the model again."
        )
    if getattr(model, "peft_config", None) or has_peft_adapter(model):
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


def _check_weights(model: PreTrainedModel, stacks: list[LayerStack]) -> None:
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent:
        raise ValueError(
            f"{len(absent)} parameters are on the meta device ({absent[0]}, ...): the model has no weights, or "
            "a device_map offloads them. Load it whole, without device_map, or give its folder and `out`."
        )
    for stack in stacks:
        for path in stack.modules:
            fused = [(path, model.get_parameter(path))] if stack.experts else None
            for name, parameter in fused or model.get_submodule(path).named_parameters(path):
                check_values(name, parameter)
