"""A prepared or dense language model as one GGUF file, for llama.cpp and Ollama.

Names of tensors and metadata are llama.cpp's, from the package gguf, which also packs the weights.
llama.cpp expects some weights in another form than transformers: Llama's query and key rows in
interleaved order, because it rotates neighbouring rows, and Gemma's norms as 1 + weight.

The settings that llama.cpp takes from the architecture, such as Gemma's pattern of sliding windows,
must have the model's values, or the model is refused.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_gguf_available

from qrefta.choices import GGUF_TYPES, GgufType
from qrefta.config.report import StackReport
from qrefta.export.compare import Reference, output_difference, reference
from qrefta.export.gguf_vocab import add_vocabulary
from qrefta.export.modelfile import MODELFILE, modelfile
from qrefta.export.result import Export, check_agreement
from qrefta.export.write import (
    LayerTensors,
    check_exportable,
    check_tokenizer,
    dense_tensors,
    plain_tensors,
    tokenizer_notes,
)
from qrefta.files.sources import is_gguf, loaded_from, pretrained_source, tokenizer_of
from qrefta.model.empty import model_class
from qrefta.nn.linear import AdaptedLinear

# Relative difference of logits that a type may make. Measured, the larger of transformers and
# llama.cpp, on SmolLM2 dense and prepared and on tiny models of every family in float32: 0.0008 to
# 0.0018, 0.022 to 0.044, and 0.21 to 0.41. Reading in bf16 rounds too (see ROUNDING_TOLERANCE).
TOLERANCES: dict[GgufType, float] = {"f16": 0.15, "q8_0": 0.15, "q4_0": 0.6}
_FIX = "Give inputs that the model was made for, a wider type, or a larger tolerance."
_BLOCK = 32  # weights that Q8_0 and Q4_0 pack together; rows of another width stay in 16 bits


@dataclass(frozen=True)
class _Family:
    """An architecture of llama.cpp.

    Attributes:
        arch: its name.
        activation: of the feed-forward layers.
        interleaved: it rotates neighbouring rows of queries and keys.
        shifted_norms: it stores 1 + the weights of norms.
        capped: attention scores and logits are capped, by tanh.
        window_period: every layer with this number attends to everything, the others to a sliding
            window; 1: all attend to everything.
        wide_layers: layers of the size whose attention is scaled by the model's width, not by the
            heads'.
        unread: settings that transformers' reader does not take from the file.
    """

    arch: str
    activation: str = "silu"
    interleaved: bool = False
    shifted_norms: bool = False
    capped: bool = False
    window_period: int = 1
    wide_layers: int = 0
    unread: tuple[str, ...] = ("rope_parameters", "attention_bias", "mlp_bias", "head_dim")


_GEMMA = {
    "activation": "gelu_pytorch_tanh",
    "shifted_norms": True,
    "unread": (
        "rope_parameters",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "layer_types",
    ),
}
FAMILIES = {
    "LlamaForCausalLM": _Family("llama", interleaved=True),
    "MistralForCausalLM": _Family("llama", interleaved=True),
    "Qwen2ForCausalLM": _Family("qwen2"),
    "Qwen3ForCausalLM": _Family("qwen3"),
    "Gemma2ForCausalLM": _Family("gemma2", capped=True, window_period=2, wide_layers=46, **_GEMMA),
    "Gemma3ForCausalLM": _Family("gemma3", window_period=6, wide_layers=62, **_GEMMA),
}


def export_gguf(
    model: PreTrainedModel | str | Path,
    file: str | Path,
    type: GgufType = "q8_0",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inputs: Mapping[str, Any] | None = None,
    tolerance: float | None = None,
) -> Export:
    """Write a GGUF file with weights and tokenizer, and Ollama's Modelfile next to it.

    The weights are written a tensor at a time: besides the model this takes the memory of its
    largest tensor in float32, twice. The file is then read by transformers, and by
    llama-cpp-python where it is installed, and their logits are compared with the model's before it
    gets its name. For this transformers dequantizes the whole file, so a dense model is held
    besides the given one.

    Llama, Mistral, Qwen 2 and 3, and Gemma 2 and 3 are written, without experts and images.

    Args:
        model: prepared or dense; an object, a folder or a hub name.
        file: to write; it must not exist, nor a Modelfile in its folder.
        type: of the weights: "f16": 16 bits; "q8_0": 8.5 bits a weight; "q4_0": 4.5 bits, which
            quantizes the merged weights once more. Embeddings and head of "q4_0" are in "q8_0",
            norms and biases always in float32.
        tokenizer: of the model; default: the one that it was loaded with.
        inputs: a batch to compare logits on; default: see `qrefta.export.examples`.
        tolerance: largest relative difference of the logits; beyond it nothing is written. Default:
            0.15, for "q4_0" 0.6.

    Returns:
        The file's folder, the largest difference, and notes.

    Raises:
        ValueError: for a model of another family, with offloaded parameters, or with settings that
            llama.cpp does not have, a tokenizer that it cannot run, a file that exists, or logits
            that differ by more than `tolerance`.
        ImportError: if the package gguf is not installed.
    """
    file = Path(file)
    _check_call(file, type)
    if isinstance(model, str | Path):
        model = _loaded(model)
    check_exportable(model)
    family = _family(model.__class__.__name__)
    config = model.config
    notes = _check_config(config, family)
    _check_names(model, family)
    notes += tokenizer_notes(model, tokenizer)
    tokenizer = tokenizer or tokenizer_of(model)
    if tokenizer is None:
        raise ValueError(
            "A GGUF file holds the tokenizer, and none was found with the model; give it as "
            "`tokenizer`."
        )
    check_tokenizer(model, tokenizer)
    expected = reference(model, inputs)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as folder:
        made = Path(folder, file.name)
        _write(model, family, made, type, tokenizer)
        difference = _largest_difference(model, family, made, expected)
        check_agreement(difference, TOLERANCES[type] if tolerance is None else tolerance, _FIX)
        text = modelfile(file.name, tokenizer, model.generation_config)
        Path(folder, MODELFILE).write_text(text, encoding="utf-8")
        made.replace(file)
        Path(folder, MODELFILE).replace(file.parent / MODELFILE)
    return Export(file.parent, difference, notes=notes)


def _check_call(file: Path, type: GgufType) -> None:
    if not is_gguf_available():
        raise ImportError("A GGUF file is written with the package gguf: pip install gguf")
    if type not in GGUF_TYPES:
        raise ValueError(f"type is {type!r}; it must be one of {', '.join(GGUF_TYPES)}")
    if not is_gguf(file):
        raise ValueError(f"The file is {file}; its name must end in .gguf, as readers expect.")
    for path in (file, file.parent / MODELFILE):
        if path.exists():
            raise ValueError(f"{path} exists; choose another folder or remove it.")


def _loaded(source: str | Path) -> PreTrainedModel:
    """The model in a folder or hub name; another family is refused before its weights are read."""
    settings, _ = PretrainedConfig.get_config_dict(source)
    _family((settings.get("architectures") or [""])[0])
    kind = model_class(settings, source)
    return kind.from_pretrained(source, dtype="auto", use_safetensors=True)


def _family(name: str) -> _Family:
    """The family of a model class.

    Raises:
        ValueError: if it cannot be written.
    """
    if name not in FAMILIES:
        raise ValueError(
            f"A {name} cannot be written as a GGUF file here; these can: {', '.join(FAMILIES)}. "
            "Merge the model, and convert the folder with llama.cpp's convert_hf_to_gguf.py."
        )
    return FAMILIES[name]


def _check_config(config: PretrainedConfig, family: _Family) -> list[str]:
    """Refuse settings that llama.cpp does not have for the family; notes on smaller differences.

    Raises:
        ValueError: for such a setting.
    """
    settings: Any = config
    activation = getattr(settings, "hidden_activation", None) or settings.hidden_act
    if activation != family.activation:
        raise _no_setting("hidden_act", activation, f"{family.activation!r}")
    for kind, rope in _ropes(config).items():
        allowed = ["default"]
        if kind == "full_attention":
            allowed += ["linear", "llama3"] if family.interleaved else ["linear"]
        if rope.get("rope_type", "default") not in allowed:
            raise _no_setting(f"rope_type of {kind}", rope["rope_type"], ", ".join(allowed))
    if getattr(settings, "attention_bias", False) and not family.interleaved:
        raise _no_setting("attention_bias", True, "False")
    cap = getattr(settings, "attn_logit_softcapping", None)
    if family.capped and not (cap and settings.final_logit_softcapping):
        raise _no_setting("attn_logit_softcapping or final_logit_softcapping", None, "numbers")
    if cap and not family.capped:
        raise _no_setting("attn_logit_softcapping", cap, "None")
    types = getattr(settings, "layer_types", None) or []
    period = family.window_period
    if period > 1:
        expected = [
            "sliding_attention" if (layer + 1) % period else "full_attention"
            for layer in range(len(types))
        ]
        if types != expected:
            raise _no_setting("layer_types", types, f"full attention in each {period}th layer")
        scale = settings.query_pre_attn_scalar
        allowed_scale = _head_dim(config)
        if settings.num_hidden_layers == family.wide_layers:
            allowed_scale = settings.hidden_size // settings.num_attention_heads
        if scale != allowed_scale:
            raise _no_setting("query_pre_attn_scalar", scale, str(allowed_scale))
        return []
    window = getattr(settings, "sliding_window", None)
    windowed = "sliding_attention" in types if types else True
    if windowed and window is not None and window < settings.max_position_embeddings:
        return [
            f"llama.cpp attends to the whole text, and the model to the last {window} tokens: "
            "longer texts give other outputs"
        ]
    return []


def _no_setting(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(
        f"The config's {name} is {value!r}; llama.cpp has only {allowed} for this architecture."
    )


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Settings of the rotary embedding by type of attention."""
    ropes = config.rope_parameters
    return ropes if "full_attention" in ropes else {"full_attention": ropes}


def _write(
    model: PreTrainedModel,
    family: _Family,
    file: Path,
    type: GgufType,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the file: all metadata and sizes first, then a tensor at a time."""
    import gguf

    writer = gguf.GGUFWriter(file, family.arch)
    _add_settings(writer, model, family, type)
    add_vocabulary(writer, tokenizer, model.config.vocab_size, model.generation_config)
    kinds = {}
    for name, tensor in _tensors(model, family, model.dtype, _sizes):
        kind = kinds[name] = _kind(name, tensor.shape, type)
        _add_info(writer, name, tensor.shape, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in _tensors(model, family, torch.float32, dense_tensors):
            array = tensor.cpu().contiguous().numpy()
            writer.write_tensor_data(gguf.quants.quantize(array, kinds[name]))
            del tensor, array  # free it before the next one is made
    finally:
        writer.close()


def _add_settings(writer: Any, model: PreTrainedModel, family: _Family, type: GgufType) -> None:
    """Write the model's settings under llama.cpp's names."""
    import gguf

    config: Any = model.config
    file_types = {
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    }
    writer.add_type("model")
    name = Path(loaded_from(model) or model.__class__.__name__).name.removesuffix(".gguf")
    # transformers takes this one name for an architecture, and fails (modeling_gguf_pytorch_utils)
    writer.add_name("Mistral" if name == "mistral" else name)
    writer.add_file_type(file_types[type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    ropes = _ropes(config)
    rope = ropes["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    if family.window_period > 1:
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _check_names(model: PreTrainedModel, family: _Family) -> None:
    """Refuse a model with a tensor that files of its architecture do not have.

    Raises:
        ValueError: naming the tensor.
    """
    name_of = _names(model.config, family)
    for path, _ in plain_tensors(model, model.dtype, _sizes):
        if name_of(path) is None:
            raise ValueError(
                f"{path} has no place in a GGUF file of {family.arch}: llama.cpp reads no such "
                "tensor for this architecture, and takes the embeddings for the head. Give a model "
                "without it (for a head: tie_word_embeddings=True), or serve the merged model by "
                "other programs."
            )


def _names(config: Any, family: _Family) -> Callable[[str], str | None]:
    """llama.cpp's name of a tensor; None if the architecture has none for it."""
    import gguf

    (arch,) = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    return partial(names.get_name, try_suffixes=(".weight", ".bias"))


def _sizes(layer: AdaptedLinear, row: StackReport) -> dict[str, Tensor]:
    """The merged weight without storage."""
    return {"weight": torch.empty(layer.out_features, layer.in_features, device="meta")}


def _tensors(
    model: PreTrainedModel, family: _Family, dtype: torch.dtype, stored: LayerTensors
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the file, in the form that llama.cpp expects.

    Args:
        model, dtype, stored: see `qrefta.export.write.plain_tensors`.
        family: of the model.
    """
    config: Any = model.config
    name_of = _names(config, family)
    if _ropes(config)["full_attention"].get("rope_type") == "llama3":
        yield "rope_freqs.weight", _rope_factors(model)
    for path, tensor in plain_tensors(model, dtype, stored):
        name = name_of(path)
        assert name is not None, "names were checked"
        if family.interleaved and ".attn_q." in name:
            tensor = _interleaved(tensor, config.num_attention_heads)
        elif family.interleaved and ".attn_k." in name:
            tensor = _interleaved(tensor, config.num_key_value_heads)
        elif family.shifted_norms and name.endswith("norm.weight"):
            tensor = tensor + 1
        yield name, tensor.detach()


def _interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of each head in the order 0, h/2, 1, h/2 + 1, ...: pairs that rotate become neighbours.

    Args:
        rows: (heads * h, ...).
        heads: number of heads.
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _rope_factors(model: PreTrainedModel) -> Tensor:
    """Factors (head_dim / 2,) by which llama.cpp divides the frequencies: Llama 3's scaling."""
    config: Any = model.config
    size = _head_dim(config)
    theta = _ropes(config)["full_attention"]["rope_theta"]
    plain = theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    decoder: Any = model.get_decoder()
    return plain / decoder.rotary_emb.inv_freq.float().cpu()


def _kind(name: str, shape: torch.Size, type: GgufType) -> Any:
    """How a tensor is stored, a `gguf.GGMLQuantizationType`."""
    from gguf import GGMLQuantizationType as Kind

    if len(shape) == 1:
        return Kind.F32
    if type == "f16" or shape[-1] % _BLOCK:
        return Kind.F16
    if type == "q8_0" or name.startswith(("token_embd.", "output.")):
        return Kind.Q8_0
    return Kind.Q4_0


def _add_info(writer: Any, name: str, shape: torch.Size, kind: Any) -> None:
    """Announce a tensor: its shape and bytes as stored."""
    import gguf
    import numpy as np

    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        dtype = np.dtype(plain[kind])
        writer.add_tensor_info(name, shape, dtype, prod(shape) * dtype.itemsize, kind)
    else:
        stored = gguf.quants.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), prod(stored), kind)


def _largest_difference(
    model: PreTrainedModel, family: _Family, file: Path, expected: Reference
) -> float:
    """The difference of the file's logits, by transformers and llama-cpp-python."""
    differences = [expected.difference(_read(model, family, file))]
    if set(expected.inputs) == {"input_ids"}:
        with suppress(ModuleNotFoundError):
            found = _llama_cpp_logits(file, expected.inputs["input_ids"])
            differences.append(output_difference(found, expected.outputs))
    return max(differences)


def _read(model: PreTrainedModel, family: _Family, file: Path) -> PreTrainedModel:
    """The model in the file, by transformers, with the settings that it does not read."""
    source = pretrained_source(file)
    config = AutoConfig.from_pretrained(**source)
    for name in family.unread:
        if hasattr(model.config, name):
            setattr(config, name, getattr(model.config, name))
    return AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=model.dtype)


def _llama_cpp_logits(file: Path, ids: Tensor) -> Tensor:
    """Logits (rows, tokens, vocabulary) of llama.cpp on the CPU.

    Raises:
        ModuleNotFoundError: if llama-cpp-python is not installed.
    """
    import llama_cpp  # optional  # pyright: ignore[reportMissingImports]

    tokens = ids.shape[1]
    runner = llama_cpp.Llama(
        str(file), n_ctx=tokens, n_gpu_layers=0, logits_all=True, verbose=False
    )
    found = []
    for row in ids.tolist():
        runner.reset()
        runner.eval(row)
        found.append(torch.tensor(runner.scores[:tokens]))
    runner.close()
    return torch.stack(found)
