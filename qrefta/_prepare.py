"""prepare(): a dense transformers model -> a 4-bit residual and trainable factors, in memory or out
of core.
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from qrefta._compat.transformers import checkpointing_options, dequantized_gguf
from qrefta.choices import AUTO_BITS, AUTO_RANK, Bits
from qrefta.config.call import settings_of_call, shows_settings
from qrefta.config.rank import RankSetting
from qrefta.config.settings import Settings, SettingsKeywords
from qrefta.config.sizes import parse_bytes
from qrefta.config.stack import BANK, LayerStack
from qrefta.files.folders import new_folder
from qrefta.files.sources import (
    dense_bytes,
    is_gguf,
    loaded_from,
    pretrained_source,
    save_tokenizer,
)
from qrefta.hf_config import QReftaConfig
from qrefta.hf_quantizer import register
from qrefta.methods import METHODS
from qrefta.model.adapters import check_no_peft
from qrefta.model.build import freeze, with_trained_modules
from qrefta.model.check import check_in_memory
from qrefta.model.modes import without_autocast_and_compile
from qrefta.model.prepared import is_prepared
from qrefta.model.stacks import find_stacks
from qrefta.model.unquantized import warn_of_unquantized
from qrefta.model.weights import check_values
from qrefta.nn.bank import FactorBank
from qrefta.nn.linear import AdaptedLinear
from qrefta.split.batches import Batch
from qrefta.split.calibrate import gather_moments
from qrefta.split.checkpoint import convert, without_order
from qrefta.split.in_memory import ModelSource, layers_in_order, split_model
from qrefta.split.loop import check_choices
from qrefta.split.moments import Moments, load_moments
from qrefta.split.sequential import LayerSequence
from qrefta.split.sources import Calibration, calibration_batches


@shows_settings
def prepare(
    model: PreTrainedModel,
    bits: Bits = 4,
    rank: RankSetting = AUTO_RANK,
    *,
    calibration: Calibration | None = None,
    calibration_tokens: int | None = None,
    moments: Moments | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    **settings: Unpack[SettingsKeywords],
) -> PreTrainedModel:
    """The same model with every linear layer of its blocks in 4 bits, ready to train factors.

    Each stack of linear layers W_l (one role over all layers) becomes dequant(Q_l) + Delta_l, with
    Q_l frozen. By default Delta_l starts at zero and trains eight low-rank components a layer,
    which neighbouring layers share (`qrefta.methods.windows`): on SmolLM2-135M this ends 4 % below
    QLoRA's perplexity with as many trainable parameters. With `method="refta"` Delta_l is the
    tensor rank-R principal part of the stack, and Q_l the quantized residual.

    Example:
        model = qrefta.prepare(AutoModelForCausalLM.from_pretrained(name), bits=4, rank=64)

    It works in place; the peak is the model plus about its largest stack in float32. Calibration
    adds the hidden states of all tokens twice, and the inputs of one block's linear layers; where
    moments are gathered, a square matrix for each input. A model that is refused is left exactly as
    it was, unless its own code fails while layers are rounded in their order: then the error says
    to load it again. A warning names the linear layers that stay in 16 bits, if they hold more than
    5 % of the weights in the blocks.

    Args:
        model: any transformers model with its weights in memory, float32, bf16 or fp16; also one
            that `from_pretrained(folder, gguf_file=name)` dequantized.
        bits, rank, settings: see `qrefta.Settings`.
        calibration: text of the kind that the model will read: a file (txt, csv, tsv, jsonl,
            parquet; a causal language model reads a txt as one document, other models read it line
            by line), a list of strings, a `datasets.Dataset` with a column of text or tokenized
            rows, or the word "text" for generic text. Or batches of model inputs; images and audio
            always. Rounding then keeps the outputs of the layers close to the original, instead of
            the weights (see `rounding`).
        calibration_tokens: of text to read; default: 16,384. More take longer, and keep more of
            the model. Models that read one text a row get one text for every 64.
        moments: second moments of the inputs, gathered before (`qrefta.split.calibrate`), or their
            file.
        tokenizer: of the model, for calibration on text; default: the tokenizer in the folder or
            hub name that the model was loaded from.
        device: where each stack is worked on, for example "cuda" for a model in CPU memory;
            default: the device of its weights.
        progress: show progress bars, and lines that name a choice.

    Returns:
        The model, the same object; `save_pretrained`, `from_pretrained` and `Trainer` work on it as
        on any other.

    Raises:
        ValueError: for a setting that is not allowed, a rank that is too large for a stack, targets
            that match nothing, weights that are NaN, infinite or on the meta device, or a model
            that is already prepared, quantized or under PEFT.
        TypeError: for an unknown keyword.
    """
    if calibration is None and calibration_tokens is not None:
        raise ValueError(
            f"calibration_tokens is {calibration_tokens} and calibration is missing; give the text "
            'to read, or calibration="text" for generic text.'
        )
    if isinstance(model, str | Path):
        return _old_call_with_folder(
            model,
            bits,
            rank,
            calibration,
            tokenizer,
            moments=moments,
            device=device,
            progress=progress,
            **settings,
        )
    if "out" in settings:
        raise ValueError(
            "`out` goes with prepare_checkpoint and a folder or hub name; save this model with "
            "save_pretrained."
        )
    chosen = settings_of_call("prepare", {"bits": bits, "rank": rank, **settings})
    if calibration is not None and moments is not None:
        raise ValueError(
            "calibration and moments are both given; moments are gathered from calibration: give "
            "one of the two."
        )
    batches_of = None
    if calibration is not None:
        batches_of = partial(
            calibration_batches,
            calibration=calibration,
            tokenizer=tokenizer,
            seed=chosen.seed,
            tokens=calibration_tokens,
        )
    return _prepare(model, chosen, batches_of, moments, device, progress)


@without_autocast_and_compile()
def _prepare(
    model: PreTrainedModel,
    chosen: Settings,
    batches_of: Callable[[PreTrainedModel], Iterable[Batch]] | None,
    moments: Moments | str | Path | None,
    device: torch.device | str | None,
    progress: bool,
) -> PreTrainedModel:
    """`prepare` with settings that were checked.

    Args:
        model, moments, device, progress: as for `prepare`.
        chosen: the settings.
        batches_of: the batches to calibrate a model with; None: it is not calibrated here.
    """
    _check_model(model)
    name = loaded_from(model)  # a GGUF file's name goes with the marks that are replaced below
    source = ModelSource(model, None if device is None else torch.device(device))
    chosen = with_trained_modules(model, chosen, source.stacks)
    _check_weights(model, source.stacks)
    warn_of_unquantized(model, source.stacks)
    check_choices(source.stacks, chosen)
    sequence = None
    if batches_of is not None:
        sequence, gathered = _calibrated(source, batches_of(model), chosen, progress)
    else:
        gathered = _given_moments(moments, source.stacks, chosen)
    chosen = chosen.with_rounding(in_order=sequence is not None)
    _copy_config(model)
    reports = split_model(source, sequence, chosen, gathered, progress)
    freeze(model, chosen.modules_to_save)
    getattr(model, BANK).train(model.training)
    config = QReftaConfig(
        chosen,
        calibrated=batches_of is not None or gathered is not None,
        base_model=name or None,
        stacks=reports,
    )
    model.name_or_path = name
    register(model, config)
    return model


def _calibrated(
    source: ModelSource, batches: Iterable[Batch], settings: Settings, progress: bool
) -> tuple[LayerSequence | None, Moments | None]:
    """The layers in the order in which they run, if they are rounded so, and the moments that
    rounding or fitting needs.
    """
    sequence = None
    if settings.may_round_in_order:
        sequence, batches = layers_in_order(source, batches, settings, progress)
    if sequence is not None and settings.bits != AUTO_BITS and not METHODS[settings.method].fits:
        return sequence, None
    return sequence, gather_moments(source.model, source.stacks, batches, progress=progress)


def _given_moments(
    moments: Moments | str | Path | None, stacks: list[LayerStack], settings: Settings
) -> Moments | None:
    """The moments that the caller gave, of these stacks."""
    if settings.must_round_in_order:
        raise ValueError(
            'rounding is "sequential" and calibration= is missing, a text or batches; moments hold '
            "the inputs of the 16-bit model only."
        )
    loaded = _moments(moments)
    if loaded is not None:
        loaded.check(stacks)
    return loaded


@shows_settings
def prepare_checkpoint(
    source: str | Path,
    out: str | Path,
    bits: Bits = 4,
    rank: RankSetting = AUTO_RANK,
    *,
    moments: Moments | str | Path | None = None,
    device: torch.device | str = "cpu",
    max_memory: int | str = "2GB",
    trust_remote_code: bool = False,
    progress: bool = True,
    **settings: Unpack[SettingsKeywords],
) -> Path:
    """The folder of a prepared checkpoint, made from a dense one a few rows at a time; no model is
    held in memory.

    The result equals `prepare` on the loaded model with the same moments, or without any, bit for
    bit. An interrupted run resumes if it is called again with the same settings and moments. The
    source is only read.

    A GGUF file is an exception: transformers dequantizes it whole, so the model is held in memory,
    and an interrupted run starts again. Its tokenizer is written too.

    Args:
        source: folder or hub name of a transformers model in safetensors files, or a `.gguf` file
            of a causal language model.
        out: folder to write: new, empty, or left by an interrupted run.
        bits, rank, settings: see `qrefta.Settings`.
        moments: see `prepare`; gathered on a model in memory.
        device: where each stack is worked on.
        max_memory: bytes, or text like "3GB", that preparing may take besides the imported
            libraries.
        trust_remote_code: whether to run code that comes with the model.
        progress: show progress bars, and lines that name a choice.

    Raises:
        ValueError: as `prepare`; and if `out` holds something else, the checkpoint is damaged or a
            weight is missing, `max_memory` is too small, or rounding is "sequential".
        TypeError: for an unknown keyword.
    """
    chosen = settings_of_call("prepare_checkpoint", {"bits": bits, "rank": rank, **settings})
    loaded = _moments(moments)
    if is_gguf(source):
        chosen = without_order(chosen)
        with new_folder(out) as folder:
            model = _dense_of_gguf(source, max_memory)
            _prepare(model, chosen, None, loaded, device, progress)
            model.save_pretrained(folder)
            save_tokenizer(source, folder)
        return Path(out)
    return convert(
        source,
        Path(out),
        chosen,
        loaded,
        torch.device(device),
        max_memory,
        progress,
        trust_remote_code=trust_remote_code,
    )


def _dense_of_gguf(source: str | Path, max_memory: int | str) -> PreTrainedModel:
    """The causal language model in a GGUF file, in float32.

    Raises:
        ValueError: if it takes more than `max_memory`, or there is no such file.
        ImportError: if the package gguf is not installed.
    """
    needed = dense_bytes(source)
    if needed > parse_bytes("max_memory", max_memory):
        raise ValueError(
            f"max_memory is {max_memory}, and {source} takes {needed / 1e9:.2f} GB as a dense "
            "float32 model, which transformers makes of it in memory; give more."
        )
    return AutoModelForCausalLM.from_pretrained(**pretrained_source(source), dtype="auto")


@without_autocast_and_compile()
def calibrate(
    model: PreTrainedModel,
    calibration: Calibration,
    *,
    calibration_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Moments:
    """Second moments of the inputs of a dense model, for `prepare` or `prepare_checkpoint`.

    Args:
        model, calibration, calibration_tokens, tokenizer: as for `prepare`.
        seed: of the choice of texts.
        progress: show a progress bar.

    Raises:
        ValueError: if `prepare` would refuse the model or the calibration.
    """
    _check_model(model)
    stacks = find_stacks(model)
    _check_weights(model, stacks)
    batches = calibration_batches(
        model, calibration, tokenizer, seed=seed, tokens=calibration_tokens
    )
    return gather_moments(model, stacks, batches, progress=progress)


def _old_call_with_folder(
    source: str | Path,
    bits: Bits,
    rank: RankSetting,
    calibration: Calibration | None,
    tokenizer: PreTrainedTokenizerBase | None,
    **keywords: Any,
) -> Any:
    """prepare("folder", out=...), the call of qrefta 0.1 for a checkpoint."""
    out = keywords.pop("out", None)
    if out is None or calibration is not None or tokenizer is not None:
        raise ValueError(
            f"prepare got the folder or hub name {str(source)!r}. Load the model and give that, or "
            "call prepare_checkpoint(source, out), which needs `out`, the folder to write, and "
            "takes `moments` instead of `calibration`."
        )
    warnings.warn(
        "prepare(folder, out=...) is deprecated; call qrefta.prepare_checkpoint(folder, out).",
        DeprecationWarning,
        stacklevel=3,
    )
    if keywords["device"] is None:
        del keywords["device"]
    return prepare_checkpoint(source, out, bits, rank, **keywords)


def _moments(moments: Moments | str | Path | None) -> Moments | None:
    return load_moments(moments) if isinstance(moments, str | Path) else moments


def _copy_config(model: PreTrainedModel) -> None:
    """Give a model a config that no other model shares: preparing, training and merging write marks
    into it, and into its parts, such as text_config.

    Modules that hold the same objects follow.
    """
    copies: dict[int, Any] = {}  # id of an object in the config -> its copy
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        own = copies.get(id(getattr(module, "config", None)))
        if own is not None:
            setattr(module, "config", own)  # noqa: B010 -- Module.__setattr__ is typed for modules


def _check_model(model: nn.Module) -> None:
    check_no_peft(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"prepare takes a transformers PreTrainedModel, not {type(model).__name__}. If it "
            "wraps one (torch.compile, DDP, accelerate), prepare the model first and wrap it then."
        )
    if is_prepared(model):
        raise ValueError(
            "The model is already prepared; call qrefta.merge(model) first to prepare it again."
        )
    if any(isinstance(module, AdaptedLinear | FactorBank) for module in model.modules()):
        raise ValueError(
            "A part of the model is already prepared, or an earlier prepare was interrupted; load "
            "the model again."
        )
    marked = getattr(model, "hf_quantizer", None) or getattr(model, "is_quantized", False)
    if marked and dequantized_gguf(model) is None:
        method = getattr(model, "quantization_method", "unknown")
        raise ValueError(
            f"The model is already quantized ({method}); load it without quantization_config, or a "
            "GGUF file with quantization_config=GgufConfig(dequantize=True): prepare quantizes it "
            "itself."
        )
    if any(options.get("use_reentrant", True) for options in checkpointing_options(model)):
        raise ValueError(
            "The model has gradient checkpointing with use_reentrant=True, which gives shared "
            "factors wrong gradients when several processes train. Call "
            "model.gradient_checkpointing_disable() before prepare, or enable it with "
            'gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )
    inference = any(parameter.is_inference() for parameter in model.parameters())
    if inference or torch.is_inference_mode_enabled():
        raise ValueError(
            "The model was made or is prepared under torch.inference_mode(), whose tensors cannot "
            "train. Load and prepare it outside; torch.no_grad() is allowed."
        )
    for path, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("bitsandbytes."):
            raise ValueError(
                f"{path} is a {kind.__module__}.{kind.__name__}; prepare needs the plain dense "
                "model: load it without quantization."
            )


def _check_weights(model: PreTrainedModel, stacks: list[LayerStack]) -> None:
    check_in_memory(
        model, "Load it whole, without device_map, or call prepare_checkpoint on its folder."
    )
    for stack in stacks:
        for path in stack.modules:
            if stack.experts:
                check_values(path, model.get_parameter(path))
                continue
            for name, parameter in model.get_submodule(path).named_parameters(path):
                check_values(name, parameter)
