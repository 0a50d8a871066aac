"""A prepared model as a LoRA in PEFT's format, and the base that it goes on, for LoRA servers.

On the residual the LoRA is Delta_l itself, and the base is dequant(Q_l), dense or in bitsandbytes'
4-bit format, with the same bits. On the original model it is the change by training (see
`qrefta.export.updates`). Then the quantization error of the residual, with which the model was
trained, is left out. The nearest matrix of the same rank to the whole difference from the original
would include some of this error, but the error is by far the larger part and does not fit a low
rank: on SST-2 the logits are then 0.064 of their size from the trained model's, not 0.076.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qrefta.choices import BITSANDBYTES_TYPES, LORA_BASES, LoraBase
from qrefta.config.checks import whole
from qrefta.export.adapter import import_peft, with_adapter, write_adapter
from qrefta.export.compare import Reference, reference
from qrefta.export.lora_base import cast_as_loaded, original_base, residual_base
from qrefta.export.result import ROUNDING_TOLERANCE, Export, check_agreement, check_floating
from qrefta.export.updates import check_original, check_start, layer_updates, starting_factors
from qrefta.export.write import (
    check_exportable,
    check_tokenizer,
    copy_tokenizer,
    tokenizer_notes,
)
from qrefta.files.folders import new_folder
from qrefta.files.sources import is_gguf
from qrefta.hf_config import QReftaConfig
from qrefta.methods import METHODS
from qrefta.model.config_file import read_config
from qrefta.model.prepared import prepared_config
from qrefta.model_card import write_card
from qrefta.nn.factors import Factors
from qrefta.split.loop import PROGRESS_DELAY_S

# A cut rank or a missing quantization error changes the function: this only refuses results that
# are not even close.
APPROXIMATION_TOLERANCE = 0.5
_LARGEST_SERVED = 512  # the largest --max-lora-rank of vLLM
_FIXES: dict[LoraBase, str] = {
    "residual": "Give a higher rank, dtype=torch.float32, or a larger tolerance.",
    "residual-4bit": (
        'Give base="residual": on some processors the CPU kernels of bitsandbytes are wrong or '
        "fail for widths that are no multiple of the block size, or heights that are no multiple "
        "of 32."
    ),
    "original": 'Give a higher rank, or base="residual", which leaves nothing out.',
}
_DESCRIPTIONS: dict[LoraBase, str] = {
    "residual": "the dequantized residual (base/)",
    "residual-4bit": "the residual in bitsandbytes' 4 bits (base/)",
    "original": "the base model; the quantization error that it was trained with is left out",
}
_USE = """```python
from peft import PeftModel
from transformers import AutoModel  # or the class with the head

model = PeftModel.from_pretrained(AutoModel.from_pretrained({base}), "this-folder")
```"""


def export_lora(
    model: PreTrainedModel,
    out: str | Path,
    base: LoraBase = "residual",
    *,
    original: str | Path | None = None,
    start: PreTrainedModel | str | Path | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inputs: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
    progress: bool = True,
) -> Export:
    """Write a LoRA that PEFT loads, and the base that it goes on; the model stays as it is.

    The base is loaded with stock transformers, the LoRA with PEFT, and their logits are compared
    with the model's before `out` gets its name.

    Args:
        model: prepared.
        out: folder to write, new or empty: the adapter, and for a residual base the folder `base`
            in it.
        base: "residual": dequantized, dense, exact except for rounding to `dtype`. "residual-4bit":
            the same in bitsandbytes' format, which transformers loads without qrefta (NF4 and FP4).
            "original": the model that was prepared; the quantization error of the residual is left
            out.
        original: folder or hub name of that model; default: the place it was loaded from.
        start: with "original", the prepared model before training, or its folder; default: the
            original is split again, which takes as long as preparing it.
        rank: of the LoRA; default: the width of the factors; for "original", with a method that
            starts from the weights, twice that. The part that is left out is measured.
        dtype: of the LoRA, and of the base's dense parameters.
        tokenizer: written with both; default: the one that the model was loaded with. Give it if
            tokens were added.
        inputs: a batch to compare logits on; default: see `qrefta.export.examples`.
        tolerance: largest relative difference of the logits; beyond it nothing is written. Default:
            0.15 if the result differs by rounding only, else 0.5.
        progress: show a progress bar over the linear layers, if they take more than two seconds.

    Raises:
        ValueError: if the model is not prepared, parameters are offloaded, a setting is not
            allowed, the original or the start is not the model that was prepared, `out` is not
            empty, the tokenizer has more tokens than the model, or the logits differ by more than
            `tolerance`.
        ImportError: if PEFT is not installed.
    """
    config = prepared_config(model)
    check_exportable(model)
    _check_settings(config, base, rank, dtype)
    if tokenizer is not None:
        check_tokenizer(model, tokenizer)
    bare: PreTrainedModel | None = None
    starts: Iterator[Factors] | None = None
    notes: list[str] = []
    if base == "original":
        bare, notes = original_base(model, original or config.base_model)
        if METHODS[config.settings.method].fits:
            if isinstance(start, str | Path):
                read_config(start)  # refuses a folder that holds no prepared model
                start = type(model).from_pretrained(start)
            if start is not None:
                check_start(start, config)
            starts = starting_factors(model, config, bare, start)
        else:
            check_original(model, config, bare)
    bar = tqdm(
        layer_updates(model, config, starts, rank),
        total=sum(len(row.stack.modules) for row in config.stacks if row.rank),
        desc="LoRA",
        unit="layer",
        disable=not progress,
        delay=PROGRESS_DELAY_S,
    )
    with new_folder(out) as folder:
        expected = reference(model, inputs)
        source = str(original or config.base_model)
        if bare is None:
            source = str(Path(out) / "base")
            bare = residual_base(model, config, folder / "base", base, dtype, tokenizer)
        written = write_adapter(model, config, folder, bar, source, dtype)
        if base == "original":
            cast_as_loaded(bare, dtype)
        exact = base != "original" and written.error == 0
        default = ROUNDING_TOLERANCE if exact else APPROXIMATION_TOLERANCE
        difference = _difference(expected, with_adapter(bare, folder), base)
        check_agreement(difference, default if tolerance is None else tolerance, _FIXES[base])
        copy_tokenizer(model, folder, tokenizer)
        largest = max(written.ranks)
        text = f"This is the trained part as a LoRA of rank {largest} on {_DESCRIPTIONS[base]}."
        write_card(folder, config, text, _use(source), library="peft")
    notes += _notes(config, written.ranks, base) + tokenizer_notes(model, tokenizer)
    return Export(Path(out), difference, written.error, notes)


def _use(source: str) -> str:
    """Code that loads the base and the adapter."""
    named = f'"{source}"'
    if is_gguf(source):
        named = f'"{Path(source).parent}", gguf_file="{Path(source).name}"'
    return _USE.replace("{base}", named)


def _difference(expected: Reference, written: nn.Module, base: LoraBase) -> float:
    """The relative difference of the logits of the written model.

    Raises:
        ValueError: if bitsandbytes fails on its 4 bits.
    """
    try:
        return expected.difference(written)
    except (AssertionError, RuntimeError) as error:
        if base != "residual-4bit" or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"bitsandbytes fails on the written model ({error}); nothing was kept. {_FIXES[base]}"
        ) from error


def _notes(config: QReftaConfig, ranks: list[int], base: LoraBase) -> list[str]:
    """Settings that a server needs, and things that it will refuse."""
    notes = []
    if base == "original" and config.settings.bits != 16:
        notes.append(
            f"the LoRA was trained on weights in {config.settings.format_name} and goes on the "
            "original ones, so the difference includes the rounding; base residual has none of it"
        )
    if max(ranks) > _LARGEST_SERVED:
        notes.append(
            f"rank {max(ranks)} is beyond the largest that vLLM serves ({_LARGEST_SERVED}); give a "
            "rank, or merge instead"
        )
    if len(ranks) > 1:
        notes.append(
            f"linear layers have different ranks ({ranks[0]} to {ranks[-1]}); a server must read "
            "rank_pattern"
        )
    trained = ", ".join(config.settings.modules_to_save)
    if trained:
        notes.append(
            f"modules that trained in full are in the adapter ({trained}): PEFT takes them, vLLM "
            "does not"
        )
    return notes


def _check_settings(
    config: QReftaConfig, base: LoraBase, rank: int | None, dtype: torch.dtype
) -> None:
    import_peft()
    if base not in LORA_BASES:
        raise ValueError(f"base is {base!r}; it must be one of {', '.join(LORA_BASES)}")
    if base == "residual-4bit" and (
        config.settings.bits == 16 or config.settings.quant_type not in BITSANDBYTES_TYPES
    ):
        raise ValueError(
            f"bitsandbytes has no format for residuals in {config.settings.format_name}; give "
            'base="residual"'
        )
    if base == "original" and any(row.rows for row in config.stacks):
        raise ValueError(
            "Blocks of the model were removed or reordered after prepare, so a LoRA on the "
            'original does not fit it; give base="residual", or merge the model.'
        )
    if rank is not None:
        whole("rank", rank, 1)
    check_floating(dtype)
    if any(row.rank and row.stack.experts for row in config.stacks):
        raise ValueError(
            "PEFT and LoRA servers share no LoRA format for experts with factors; merge the model "
            "instead."
        )
    if not any(row.rank for row in config.stacks):
        raise ValueError(
            "No stack of the model has factors, so there is nothing to export; merge it instead."
        )
