"""A prepared model as a LoRA in PEFT's format, and the base that it goes on, for whatever serves LoRA.

On the residual the LoRA is Delta_l itself: (up core_l, down), of rank r for factors of width r, and the base is
dequant(Q_l), dense or in bitsandbytes' own 4 bits, which are the same bits. On the original model W_l it is what
training changed, Delta_l less Delta_l at the start, of rank 2r: for ReFTA [A' diag(u_l), -A diag(u_l)] and [B'; B]. The
quantization error of the residual, with which the model was trained, is left out. (The nearest matrix of that rank to
all that differs from W_l would take some of it in, but that error is by far the larger part, so it could not be cut; on
SST-2 its logits are little nearer: 0.064 of their size from those of the trained model, not 0.076.)

The factors at the start are those of the prepared model before training; without it the original is split again, and
the packed weights prove that the split is the same. A method whose Delta_l has no two thin factors (TeRA) is cut to a
rank on either base.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, Conv1D, PreTrainedModel

from qrefta._compat.transformers import float32_under_float16
from qrefta.choices import LORA_BASES
from qrefta.config import StackReport
from qrefta.export.compare import example_inputs, output_difference, outputs
from qrefta.export.merge import (
    ROUNDING_TOLERANCE,
    Export,
    agreed,
    copy_tokenizer,
    new_folder,
    plain_config,
    write_model,
)
from qrefta.files.safetensors import write_shard
from qrefta.hf_config import QReftaConfig
from qrefta.hf_quantizer import load, prepared_config
from qrefta.linalg.slices import Slices
from qrefta.linalg.tsvd import t_svd
from qrefta.methods import METHODS
from qrefta.model.stacks import model_weights
from qrefta.model_card import write_card
from qrefta.nn.factors import Factors, LowRankFactors
from qrefta.nn.linear import AdaptedLinear
from qrefta.nn.quantized import FrozenWeight, QuantizedWeight, bnb_code
from qrefta.split.residual import split_layers, split_stack

# What lacks rank or leaves out a quantization error is another function: this catches what is not even near.
APPROXIMATION_TOLERANCE = 0.5
_LARGEST_SERVED = 512  # vLLM's largest --max-lora-rank
_ADAPTER = "adapter_model.safetensors"
_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}  # fmt: skip


def export_lora(
    model: PreTrainedModel,
    out: str | Path,
    base: str = "residual",
    *,
    original: str | Path | None = None,
    start: PreTrainedModel | str | Path | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    inputs: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
) -> Export:
    """Write a LoRA that PEFT loads, and the base that it goes on; the model stays as it is.

    The base is loaded with stock transformers, the LoRA with PEFT, and their logits are compared with the model's
    before `out` gets its name.

    Args:
        model: prepared.
        out: folder to write, new or empty: the adapter, and for a residual base the folder `base` in it.
        base: "residual": dequantized, dense, exact but for rounding to `dtype`. "residual-4bit": the same in
            bitsandbytes' format, which transformers loads without qrefta (NF4 and FP4). "original": the model that was
            prepared; the quantization error of the residual is left out.
        original: folder or hub name of that model; default: where it was loaded from.
        start: with "original", the prepared model before training, or its folder; default: the original is split again,
            which takes as long as preparing it.
        rank: of the LoRA; default: as wide as the factors, for "original" twice that. What is left out is measured.
        dtype: of the LoRA, and of the base's dense parameters.
        inputs: a batch to compare logits on; default: see `qrefta.export.compare.example_inputs`.
        tolerance: relative difference of the logits beyond which nothing is written; default: 0.15 where rounding is
            all that differs, else 0.5.

    Raises:
        ValueError: if the model is not prepared, a setting is not allowed, the original or the start is not what was
            prepared, `out` is not empty, or the logits differ by more than `tolerance`.
        ImportError: if PEFT is not installed.
    """
    config = prepared_config(model)
    _check_settings(config, base, rank, dtype)
    starts: Iterator[Factors | None] = repeat(None)
    if base == "original":
        bare = _original(model, original or config.base_model)
        if METHODS[config.settings.method].fits:
            starts = _starts(
                model, config, bare, load(start) if isinstance(start, str | Path) else start
            )
    updates = _updates(model, config, starts, rank)
    with new_folder(out) as folder:
        source = str(original or config.base_model)
        if base != "original":
            source = str(Path(out) / "base")
            bare = _write_base(model, config, folder / "base", base, dtype)
        written = _write_adapter(model, config, folder, updates, source, dtype)
        bare = bare if base != "original" else bare.to(dtype)
        inputs = example_inputs(model) if inputs is None else inputs
        difference = output_difference(
            _theirs(_with_adapter(bare, folder), inputs, base), outputs(model, inputs)
        )
        if tolerance is None:
            exact = base != "original" and not written.error
            tolerance = ROUNDING_TOLERANCE if exact else APPROXIMATION_TOLERANCE
        agreed(difference, tolerance, _MENDS[base])
        copy_tokenizer(model, folder)
        did = f"This is the trained part as a LoRA of rank {max(written.ranks)} on {_WORDS[base]}."
        write_card(folder, config, did, _USE.replace("{base}", source))
    return Export(Path(out), difference, written.error, _notes(config, written.ranks, base))


_MENDS = {
    "residual": "Give a higher rank, dtype=torch.float32, or a larger tolerance.",
    "residual-4bit": (
        'Give base="residual": on some processors bitsandbytes\' CPU kernels are wrong or fail for widths that are no '
        "multiple of the block size, or heights that are no multiple of 32."
    ),
    "original": 'Give a higher rank, or base="residual", which leaves nothing out.',
}


_WORDS = {
    "residual": "the dequantized residual (base/)",
    "residual-4bit": "the residual in bitsandbytes' 4 bits (base/)",
    "original": "the base model; the quantization error that it was trained with is left out",
}

_USE = """```python
from peft import PeftModel
from transformers import AutoModel  # or the class with the head

model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "this-folder")
```"""


class _Update(NamedTuple):
    """The LoRA of one linear.

    Attributes:
        left, right: (out, r) and (r, in), float32; their product is the update.
        lacking, norm: squared norms of what the product lacks of what it stands for, and of that.
    """

    left: Tensor
    right: Tensor
    lacking: float = 0.0
    norm: float = 0.0


class _Written(NamedTuple):
    """What an adapter holds: the ranks in it, and the share of the updates' squared norm that it lacks."""

    ranks: list[int]
    error: float


@torch.no_grad()
def _updates(
    model: PreTrainedModel, config: QReftaConfig, starts: Iterator[Factors | None], rank: int | None
) -> Iterator[tuple[str, _Update]]:
    """Delta_l of every target, less that of the start where there is one, cut to a rank if need be."""
    for row, start in zip((row for row in config.stacks if row.rank), starts, strict=False):
        for index, path in enumerate(row.stack.modules):
            factors = model.get_submodule(path).factors
            if not isinstance(factors, LowRankFactors):
                yield path, _nearest(factors.delta(index), rank or factors.rank)
                continue
            left, right = factors.pair(index)
            if start is not None:
                first, second = start.pair(index)
                left, right = (
                    torch.cat([left, -first.to(left)], dim=1),
                    torch.cat([right, second.to(right)]),
                )
                yield path, _compressed(left, right, rank)
            else:
                yield path, _Update(left, right) if rank is None else _compressed(left, right, rank)


def _starts(
    model: PreTrainedModel,
    config: QReftaConfig,
    bare: PreTrainedModel,
    start: PreTrainedModel | None,
) -> Iterator[Factors]:
    """The factors that every target stack began with: those of `start`, or of splitting the original again.

    Raises:
        ValueError: if the packed weights that belong to them are not the model's.
    """
    if start is None and config.calibrated:
        raise ValueError(
            "The split was calibrated; give the prepared model before training, or its folder, as `start`."
        )
    for row in config.stacks:
        if not row.rank:
            continue
        layers = [model.get_submodule(path) for path in row.stack.modules]
        if start is not None:
            found = [start.get_submodule(path) for path in row.stack.modules]
            _check_same(row, layers, [layer.frozen_weight() for layer in found])
            yield found[0].factors
            continue
        weights = model_weights(bare, row.stack)
        split = split_stack(weights, config.settings, row.rank)
        again = (layer.residual for layer in split_layers(weights, split, config.settings))
        _check_same(row, layers, again)
        yield split.factors


def _check_same(
    row: StackReport, layers: list[AdaptedLinear], found: Iterable[FrozenWeight]
) -> None:
    for path, layer, residual in zip(row.stack.modules, layers, found, strict=True):
        wanted = residual.to(layer.weight.device, layer.weight.dtype).tensors()
        for name, tensor in layer.frozen_weight().tensors().items():
            if not torch.equal(tensor, wanted[name]):
                raise ValueError(
                    f"The packed weights of {path} are not those of the start: it was prepared from another model, or "
                    "on another machine or from another dtype, where splitting again rounds differently. Give the "
                    "prepared model before training, or its folder, as `start`."
                )


def _compressed(left: Tensor, right: Tensor, rank: int | None) -> _Update:
    """The product of two thin factors by its singular vectors, the nearest of a rank; in float64, never made whole.

    Its own factors also round to bf16 by less than a difference of two products would.
    """
    (basis, first), (other, second) = (
        torch.linalg.qr(left.double()),
        torch.linalg.qr(right.T.double()),
    )
    core = torch.linalg.svd(first @ second.T, full_matrices=False)
    kept = slice(0, len(core.S) if rank is None else min(rank, len(core.S)))
    roots = core.S[kept].sqrt()
    left, right = basis @ (core.U[:, kept] * roots), (roots.unsqueeze(1) * core.Vh[kept]) @ other.T
    squares = core.S.square()
    return _Update(
        left.float(), right.float(), squares[kept.stop :].sum().item(), squares.sum().item()
    )


def _nearest(matrix: Tensor, rank: int) -> _Update:
    """The matrix of a rank that is nearest to `matrix`, the root of its singular values in either factor."""
    rank = min(rank, *matrix.shape)
    rows = slice(0, len(matrix))
    found, _ = t_svd(
        Slices(lambda: [(rows, matrix.unsqueeze(0))], (1, *matrix.shape), matrix.device),
        rank,
        seed=0,
    )
    roots = found.values.sqrt()
    left, right = (found.left * roots).float(), (roots.unsqueeze(1) * found.right).float()
    norm, lacking = (
        part.double().square().sum().item() for part in (matrix, matrix - left @ right)
    )
    return _Update(left, right, lacking, norm)


def _original(model: PreTrainedModel, source: str | Path | None) -> PreTrainedModel:
    """The dense model that was prepared, with fresh heads where its checkpoint has none."""
    if source is None:
        raise ValueError(
            "The prepared model does not say what it was prepared from; give it as `original`."
        )
    bare, loaded = type(model).from_pretrained(
        source,
        config=plain_config(model, model.dtype, None),
        dtype=model.dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    lacking = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    for row in prepared_config(model).stacks:
        for path in row.stack.modules:
            if (path if row.stack.experts else f"{path}.weight") in lacking:
                raise ValueError(
                    f"{source} has no {path}.weight of the prepared model's shape; give the model that was prepared as "
                    "`original`."
                )
    return bare.to(model.device)


def _write_base(
    model: PreTrainedModel, config: QReftaConfig, folder: Path, base: str, dtype: torch.dtype
) -> PreTrainedModel:
    """Write the residuals as a model of their own, and load it."""
    folder.mkdir()
    if base == "residual":
        write_model(model, folder, dtype, _residual_tensors)
        return type(model).from_pretrained(folder, dtype=dtype).to(model.device)
    dense = _kept_dense(model, config)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.settings.quant_type,
        bnb_4bit_use_double_quant=config.settings.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=sorted(dense),
    )

    def stored(layer: AdaptedLinear, row: StackReport) -> dict[str, Tensor]:
        whole = (
            row.stack.experts or layer in dense.values()
        )  # bitsandbytes leaves fused experts alone
        return _residual_tensors(layer, row) if whole else _bnb_tensors(layer)

    write_model(model, folder, dtype, stored, quantization)
    return type(model).from_pretrained(folder, dtype=dtype, device_map={"": model.device})


def _residual_tensors(layer: AdaptedLinear, row: StackReport) -> dict[str, Tensor]:
    residual = layer.residual(torch.float32)
    return {"weight": residual.T if row.stack.transposed else residual}


def _kept_dense(model: PreTrainedModel, config: QReftaConfig) -> dict[str, nn.Module]:
    """Linears that the bitsandbytes plug-in is to leave alone: not in 4 bits here, or wanted in float32 (T5's `wo`)."""
    adapted = {path for row in config.stacks for path in row.stack.modules}
    kept = float32_under_float16(model)
    return {
        path: module
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear | Conv1D) and path not in adapted)
        or (isinstance(module, AdaptedLinear) and kept.intersection(path.split(".")))
    }


def _bnb_tensors(layer: AdaptedLinear) -> dict[str, Tensor]:
    """What bitsandbytes' Linear4bit saves; codes and scales are those of the residual as they are."""
    weight = layer.frozen_weight()
    assert isinstance(weight, QuantizedWeight)
    state = weight.bnb_state(torch.bfloat16)
    state.code = bnb_code(weight.format).to(weight.codes.device)
    values = layer.out_features * layer.in_features
    codes = weight.codes.view(torch.uint8)[: -(-values // 2)].unsqueeze(1)
    return {"weight": codes} | {
        f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()
    }


def _write_adapter(
    model: PreTrainedModel,
    config: QReftaConfig,
    folder: Path,
    updates: Iterator[tuple[str, _Update]],
    source: str,
    dtype: torch.dtype,
) -> _Written:
    """Write adapter_config.json and the adapter's tensors, heads that trained included."""
    tensors, ranks, lacking, norm = {}, {}, 0.0, 0.0
    for path, update in updates:
        ranks[path] = len(update.right)
        lacking, norm = lacking + update.lacking, norm + update.norm
        tensors[f"base_model.model.{path}.lora_A.weight"] = update.right.to(
            "cpu", dtype
        ).contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = update.left.to(
            "cpu", dtype
        ).contiguous()
    modules = dict(model.named_modules())
    saved = [
        path
        for path in config.settings.modules_to_save
        if path in modules and list(modules[path].parameters())
    ]
    for path in saved:
        for name, tensor in modules[path].state_dict().items():
            tensors[f"base_model.model.{path}.{name}"] = tensor.detach().cpu().contiguous()
    write_shard(folder / _ADAPTER, tensors)
    _lora_config(model, config, ranks, saved, source).save_pretrained(folder)
    return _Written(sorted(set(ranks.values())), lacking / norm if norm else 0.0)


def _lora_config(
    model: PreTrainedModel,
    config: QReftaConfig,
    ranks: dict[str, int],
    saved: list[str],
    source: str,
) -> Any:
    """PEFT's config; alpha is the rank everywhere, so that nothing scales the product."""
    peft = _peft()
    commonest = max(ranks.values(), key=list(ranks.values()).count)
    others = {path: rank for path, rank in ranks.items() if rank != commonest}
    task = next(
        (task for suffix, task in _TASKS.items() if type(model).__name__.endswith(suffix)), None
    )
    return peft.LoraConfig(
        task_type=task,
        r=commonest,
        lora_alpha=commonest,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=_names(model, set(ranks)),
        modules_to_save=saved or None,
        fan_in_fan_out=any(row.stack.transposed for row in config.stacks),
        base_model_name_or_path=source,
        inference_mode=True,
    )


def _names(model: PreTrainedModel, paths: set[str]) -> list[str]:
    """Last parts of the paths, where these name no other module; else the paths."""
    names = {path.rpartition(".")[2] for path in paths}
    named = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in names}
    return sorted(names if named == paths else paths)


def _with_adapter(bare: PreTrainedModel, folder: Path) -> nn.Module:
    return _peft().PeftModel.from_pretrained(bare, folder)


def _theirs(written: nn.Module, inputs: Mapping[str, Any], base: str) -> Tensor:
    try:
        return outputs(written, inputs)
    except (AssertionError, RuntimeError) as error:
        if base != "residual-4bit" or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"bitsandbytes fails on what was written ({error}); nothing was kept. {_MENDS[base]}"
        ) from error


def _notes(config: QReftaConfig, ranks: list[int], base: str) -> list[str]:
    notes = []
    if base == "original" and config.settings.bits == 4:
        error, whole = (
            sum(getattr(row, key) for row in config.stacks)
            for key in ("residual_error", "baseline_error")
        )
        ratio = f"{error / whole:.3f}" if whole else "1"
        notes.append(
            f"the residual's squared quantization error is left out: {error:.4g}, {ratio} of whole weights'"
        )
    if max(ranks) > _LARGEST_SERVED:
        notes.append(
            f"rank {max(ranks)} is beyond what vLLM serves ({_LARGEST_SERVED}); give a rank, or merge instead"
        )
    if len(ranks) > 1:
        notes.append(
            f"linears have different ranks ({ranks[0]} to {ranks[-1]}); a server must read rank_pattern"
        )
    if config.settings.modules_to_save:
        notes.append(
            f"{', '.join(config.settings.modules_to_save)} trained whole, in the adapter: PEFT takes it, vLLM does not"
        )
    return notes


def _check_settings(config: QReftaConfig, base: str, rank: int | None, dtype: torch.dtype) -> None:
    _peft()
    if base not in LORA_BASES:
        raise ValueError(f"base is {base!r}; it must be one of {', '.join(LORA_BASES)}")
    if base == "residual-4bit" and (
        config.settings.bits == 16 or config.settings.quant_type == "int4"
    ):
        stored = "16 bits" if config.settings.bits == 16 else "INT4"
        raise ValueError(
            f'bitsandbytes has no format for residuals in {stored}; give base="residual"'
        )
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is {rank!r}; it must be a whole number, 1 or more")
    if not dtype.is_floating_point:
        raise ValueError(
            f"dtype is {dtype}; it must be a floating type such as torch.bfloat16 or torch.float32"
        )
    if any(row.rank and row.stack.experts for row in config.stacks):
        raise ValueError(
            "Experts with factors have no form as LoRA that PEFT and servers share; merge the model instead."
        )
    if not any(row.rank for row in config.stacks):
        raise ValueError(
            "No stack of the model has factors; there is nothing to export: merge it instead."
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            "A LoRA is written and checked with PEFT, which is not installed: pip install peft"
        ) from error
    return peft
