"""A prepared model as a LoRA in PEFT's format, and the base that it goes on, for LoRA servers.

On the residual the LoRA is Delta_l itself, and the base is dequant(Q_l), dense or in bitsandbytes'
4-bit format, with the same bits. On the original model it is the change by training (see
`qrefta.export.updates`). Then the quantization error of the residual, with which the model was
trained, is left out. The nearest matrix of the same rank to the whole difference from the original
would include some of this error, but the error is by far the larger part and does not fit a low
rank: on SST-2 the logits are then 0.064 of their size from the trained model's, not 0.076.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, Conv1D, PreTrainedModel, PreTrainedTokenizerBase

from qrefta._compat.transformers import keeps_float32
from qrefta.choices import BITSANDBYTES_TYPES, LORA_BASES, LoraBase
from qrefta.config.checks import whole
from qrefta.config.report import StackReport
from qrefta.export.compare import example_inputs, output_difference, outputs
from qrefta.export.result import ROUNDING_TOLERANCE, Export, agreed, check_floating
from qrefta.export.updates import (
    Update,
    check_original,
    check_start,
    layer_updates,
    starting_factors,
)
from qrefta.export.write import (
    check_exportable,
    check_tokenizer,
    copy_tokenizer,
    plain_config,
    tokenizer_notes,
    wanted_dtype,
    write_model,
)
from qrefta.files.code import is_trusted
from qrefta.files.folders import new_folder
from qrefta.files.shards import write_shard
from qrefta.files.sources import is_gguf, pretrained_source
from qrefta.hf_config import QReftaConfig
from qrefta.methods import METHODS
from qrefta.model.config_file import read_config
from qrefta.model.prepared import prepared_config
from qrefta.model_card import write_card
from qrefta.nn.factors import Factors
from qrefta.nn.grid import level_table
from qrefta.nn.linear import AdaptedLinear
from qrefta.nn.quantized import QuantFormat, QuantizedWeight
from qrefta.split.loop import PROGRESS_DELAY_S

# A cut rank or a missing quantization error changes the function: this only refuses results that
# are not even close.
APPROXIMATION_TOLERANCE = 0.5
_LARGEST_SERVED = 512  # the largest --max-lora-rank of vLLM
_ADAPTER = "adapter_model.safetensors"
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
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
_BASES: dict[LoraBase, str] = {
    "residual": "the residual, dequantized",
    "residual-4bit": "the residual in bitsandbytes' 4 bits",
}
_BASE_USE = "The LoRA in the folder above belongs to it; load both with PEFT."
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
        inputs: a batch to compare logits on; default: see `qrefta.export.compare.example_inputs`.
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
        bare, notes = _original(model, original or config.base_model)
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
        source = str(original or config.base_model)
        if bare is None:
            source = str(Path(out) / "base")
            bare = _write_base(model, config, folder / "base", base, dtype, tokenizer)
        written = _write_adapter(model, config, folder, bar, source, dtype)
        if base == "original":
            _cast(bare, dtype)
        exact = base != "original" and written.error == 0
        default = ROUNDING_TOLERANCE if exact else APPROXIMATION_TOLERANCE
        difference = _difference(model, _with_adapter(bare, folder), inputs, base)
        agreed(difference, default if tolerance is None else tolerance, _FIXES[base])
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


def _original(
    model: PreTrainedModel, source: str | Path | None
) -> tuple[PreTrainedModel, list[str]]:
    """The dense model that was prepared, with new heads if its checkpoint has none; and notes."""
    if source is None:
        raise ValueError(
            "The prepared model does not name the model that it was prepared from; give it as "
            "`original`."
        )
    model_class: Any = type(model)  # the annotation of from_pretrained knows no loading info
    bare, loaded = model_class.from_pretrained(
        **pretrained_source(source, is_trusted(model)),
        config=plain_config(model, model.dtype, None),
        dtype=model.dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    stored = {key: list(shape) for key, shape, *_ in loaded["mismatched_keys"]}
    _check_original(model, source, stored, set(loaded["missing_keys"]))
    notes = [
        f"{name} is {shape} in {source}: give the base the model's shape before PEFT loads the "
        "adapter (embeddings: resize_token_embeddings)"
        for name, shape in stored.items()
    ]
    return bare.to(model.device), notes


def _check_original(
    model: PreTrainedModel, source: str | Path, stored: dict[str, list[int]], missing: set[str]
) -> None:
    """Refuse an original that is without a tensor which the adapter does not hold either.

    Args:
        model: prepared.
        source: of the original.
        stored: shapes of the tensors that have another shape there.
        missing: names of the tensors that it does not have.

    Raises:
        ValueError: naming the tensor and both shapes.
    """
    config = prepared_config(model)
    for row in config.stacks:
        for path in row.stack.modules:
            if (path if row.stack.experts else f"{path}.weight") in stored.keys() | missing:
                raise ValueError(
                    f"{source} has no {path}.weight in the shape of the prepared model; give the "
                    "model that was prepared as `original`."
                )
    unusable = {name: f"{shape} in {source}" for name, shape in stored.items()}
    unusable |= dict.fromkeys(missing, f"missing in {source}")
    for tied, name in model.all_tied_weights_keys.items():
        if name in unusable:
            unusable.setdefault(tied, unusable[name])
    in_adapter = tuple(f"{path}." for path in config.settings.modules_to_save)
    for name, tensor in model.state_dict().items():
        if name in unusable and not name.startswith(in_adapter):
            raise ValueError(
                f"{name} is {list(tensor.shape)} in this model and {unusable[name]}, and the "
                "adapter does not hold it. It was added or resized after that model was loaded "
                "(for example by resize_token_embeddings). Save the dense model after that change "
                'and give its folder as `original`, or give base="residual", whose base holds it.'
            )


def _write_base(
    model: PreTrainedModel,
    config: QReftaConfig,
    folder: Path,
    base: LoraBase,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
) -> PreTrainedModel:
    """Write the residuals as a plain model, and load it."""
    folder.mkdir()
    write_card(folder, config, f"This is {_BASES[base]}, without the factors.", _BASE_USE)
    if base == "residual":
        write_model(model, folder, dtype, _residual_tensors, tokenizer=tokenizer)
        return _moved(type(model).from_pretrained(folder, dtype=dtype), model.device)
    dense = _kept_dense(model, config)
    fmt = QuantFormat.of(config.settings)
    assert fmt is not None, "settings were checked"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=fmt.quant_type,
        bnb_4bit_use_double_quant=fmt.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=sorted(dense),
    )

    def stored(layer: AdaptedLinear, row: StackReport) -> dict[str, Tensor]:
        # bitsandbytes does not quantize fused experts.
        if row.stack.experts or layer in dense.values():
            return _residual_tensors(layer, row)
        return _bnb_tensors(layer)

    write_model(model, folder, dtype, stored, quantization, tokenizer=tokenizer)
    return type(model).from_pretrained(folder, dtype=dtype, device_map={"": model.device})


def _moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on a device."""
    untyped: Any = model  # type checkers lose `self` of PreTrainedModel.to in its decorator
    return untyped.to(device)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the tensors of a dense model's checkpoint as `from_pretrained(dtype=...)` does."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(wanted_dtype(model, name, dtype))


def _residual_tensors(layer: AdaptedLinear, row: StackReport) -> dict[str, Tensor]:
    residual = layer.residual(torch.float32)
    return {"weight": residual.T if row.stack.transposed else residual}


def _kept_dense(model: PreTrainedModel, config: QReftaConfig) -> dict[str, nn.Module]:
    """Linear layers that the bitsandbytes plug-in must leave alone, by path.

    They are not in 4 bits here, or the model may want them in float32 (T5's `wo`).
    """
    adapted = {path for row in config.stacks for path in row.stack.modules}
    dense: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and path not in adapted:
            dense[path] = module
        wide = keeps_float32(model, f"{path}.weight", torch.float16)  # bitsandbytes asks no dtype
        if isinstance(module, AdaptedLinear) and wide:
            dense[path] = module
    return dense


def _bnb_tensors(layer: AdaptedLinear) -> dict[str, Tensor]:
    """The tensors that bitsandbytes' Linear4bit saves, made of the residual's bytes."""
    weight = layer.frozen_weight()
    assert isinstance(weight, QuantizedWeight), "settings were checked"
    state = weight.bnb_state(torch.bfloat16)
    state.code = level_table(weight.format.quant_type).to(weight.codes.device)
    used_bytes = -(-layer.out_features * layer.in_features // 2)
    codes = weight.codes.view(torch.uint8)[:used_bytes].unsqueeze(1)
    tensors = {"weight": codes}
    for name, tensor in state.as_dict(packed=True).items():
        tensors[f"weight.{name}"] = tensor
    return tensors


class _Written(NamedTuple):
    """The contents of an adapter.

    Attributes:
        ranks: of its updates, ascending.
        error: the share of the updates' squared norm that is missing.
    """

    ranks: list[int]
    error: float


def _write_adapter(
    model: PreTrainedModel,
    config: QReftaConfig,
    folder: Path,
    updates: Iterable[tuple[str, Update]],
    source: str,
    dtype: torch.dtype,
) -> _Written:
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
    return _Written(sorted(set(ranks.values())), missing / norm if norm else 0.0)


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
    peft = _peft()
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


def _with_adapter(bare: PreTrainedModel, folder: Path) -> nn.Module:
    """The base with the adapter, as PEFT loads them.

    Raises:
        ValueError: if PEFT takes no model of this class.
    """
    try:
        return _peft().PeftModel.from_pretrained(bare, folder)
    except NotImplementedError as error:
        raise ValueError(
            f"PEFT takes no {type(bare).__name__} ({error}); merge the model instead."
        ) from None


def _difference(
    model: PreTrainedModel, written: nn.Module, inputs: Mapping[str, Any] | None, base: LoraBase
) -> float:
    """The relative difference of the logits of the written model.

    Raises:
        ValueError: if bitsandbytes fails on its 4 bits.
    """
    inputs = example_inputs(model) if inputs is None else inputs
    try:
        found = outputs(written, inputs)
    except (AssertionError, RuntimeError) as error:
        if base != "residual-4bit" or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"bitsandbytes fails on the written model ({error}); nothing was kept. {_FIXES[base]}"
        ) from error
    return output_difference(found, outputs(model, inputs))


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
    _peft()
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


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "A LoRA is written and checked with PEFT, which is not installed: pip install peft"
        ) from error
    return peft
