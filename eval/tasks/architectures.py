"""A small random model of every architecture of transformers, and inputs that it takes.

The architectures are the model types that transformers lists for one of the heads in `HEADS`. The
default config of a type is made small by the names of its values (`RULES`); a short table holds the
types that need other values (`EXCEPTIONS`).
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

HEADS = (  # a type with several heads is built with the first
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
)
HIDDEN = 64
VOCABULARY = 128
ROWS = 2
TOKENS = 16
SAMPLES = 3200  # of sound
FRAMES = 64  # of sound features

# The whole name of a config's value, and its small size; the first rule that matches counts.
RULES: tuple[tuple[str, int], ...] = (
    (r"num_feat_extract_layers|acoustic_tokenizer_chunk_size", 1 << 20),
    (r"num_nextn_predict_layers|.*n_group.*", 1),
    (r"rotary_dim|.*chunk_size|block_size", 8),
    (r".*vocab_size.*|codebook_size", VOCABULARY),
    (r"pad_token_id|pad_index", 0),
    (r"bos_token_id|decoder_start_token_id|cls_token_id", 1),
    (r"eos_token_id|sep_token_id|eos_index", 2),
    (r"mask_token_id|mask_index", 3),
    (r".*(head_dim|d_kv|dim_head|head_size|headdim|kv_channels|d_head)", 16),
    (r".*(lora_rank|time_step_rank|dt_rank|adapter_rank)", 16),
    (r"(.*_)?(num_)?(key_value|kv|key)_?heads|kv_n_heads|num_query_groups", 2),
    (r".*(heads|n_head|n_heads)", 4),
    (r"(.*_)?(num_|n_)?(hidden_)?layers|n_layer|num_blocks|depth|.*_layers", 2),
    (r".*(experts_per_tok|experts_per_token|top_?k|moe_k)", 2),
    (r"(num_|n_)?(local_|routed_)?experts|moe_num_experts", 4),
    (r"n_groups?|topk_group|num_expert_group|o_groups", 1),
    (r".*(intermediate|ffn|d_ff|dff|dim_ff|feed_forward|n_inner|mlp_dim).*", 2 * HIDDEN),
    (r".*(hidden_size.*|d_model|n_embd|embed_dim|embedding_size|emb_dim|embedding_dim)", HIDDEN),
    (r"dim|lru_width|hidden_dim|.*proj_dim|projection_dim|conv_channels", HIDDEN),
    (r".*(max_position_embeddings|n_positions|n_ctx|max_seq_len|positions)", 64),
    (r".*sliding_window", 8),
    (r"image_size|input_size", 32),
    (r"num_filters", 4),
    (r"patch_size", 8),
    (r"num_mel_bins|input_feat_per_channel", 16),
)
LISTS = {  # names of lists -> the largest number in them
    r"depths|depth|n_attn_blocks|num_block_repeats|stage_num_blocks|stage_numb_of_layers": 2,
    r"conv_dim|tdnn_dim": 32,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
HYBRID = {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
SPEECH = {"hidden_size": 64, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
SLIDING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
EXCEPTIONS: dict[str, dict[str, Any]] = {  # model type -> values
    "bamba": MAMBA | {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
    "bit": {"hidden_sizes": [32, 64, 64, 64], "embedding_size": 32, "num_groups": 8},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "convnext": {"hidden_sizes": [16, 32, 64, 64]},
    "convnextv2": {"hidden_sizes": [16, 32, 64, 64]},
    "bros": {
        "dim_bbox_projection": 16,
        "dim_bbox_sinusoid_emb_2d": 16,
        "dim_bbox_sinusoid_emb_1d": 2,
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "data2vec-audio": SPEECH,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"o_groups": 2},
    "donut-swin": {"embed_dim": 16, "num_heads": [1, 2, 4, 4], "window_size": 2, "patch_size": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": SLIDING,
    "dots3_note_text": SLIDING,
    "dory": {
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "efficientnet": {"hidden_dim": 320, "width_coefficient": 0.25, "depth_coefficient": 0.5},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 3},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "focalnet": {"embed_dim": 16, "hidden_sizes": [16, 32, 64, 64]},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "funnel": {"block_sizes": [2, 2], "block_repeats": [1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": MAMBA
    | {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 8, "num_mel_bins": 4}},
    "hgnet_v2": {
        "stage_in_channels": [48, 16, 32, 64],
        "stage_mid_channels": [8, 16, 16, 32],
        "stage_out_channels": [16, 32, 64, 64],
        "hidden_sizes": [16, 32, 64, 64],
    },
    "hiera": {"embed_dim": 16},
    "hrm_text": {"num_hidden_layers": 4, "num_layers_per_stack": 2},
    "hubert": SPEECH,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": HYBRID,
    "kimi_linear": {"linear_head_dim": 16},
    "kyutai_speech_to_text": {"vocab_size": 256, "codebook_vocab_size": 33},
    "layoutlmv3": {"coordinate_size": 12, "shape_size": 8, "visual_embed": False},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "levit": {"image_size": 224, "patch_size": 16},
    "longcat_flash": {
        "qk_rope_head_dim": 8,
        "qk_head_dim": 24,
        "head_dim": 8,
        "zero_expert_num": 2,
    },
    "lilt": {"hidden_size": 96, "max_2d_position_embeddings": 64},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "mistral4": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1},
    "ministral": {"head_dim": 16},
    "mobilebert": {"hidden_size": 64, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "mobilevit": {"image_size": 64},
    "mobilevitv2": {"image_size": 64, "base_attn_unit_dims": [16, 32, 64]},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "poolformer": {"hidden_sizes": [16, 32, 64, 64]},
    "pvt": {"hidden_sizes": [16, 32, 64, 64], "num_attention_heads": [1, 2, 4, 4]},
    "pvt_v2": {"hidden_sizes": [16, 32, 64, 64], "num_attention_heads": [1, 2, 4, 4]},
    "perceiver": {
        "d_latents": 64,
        "num_latents": 8,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "qwen4_exp": INDEXER,
    "qwen4_exp_text": INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 6},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [16, 48],
        "hash_seed": 0,
    },
    "regnet": {"hidden_sizes": [16, 32, 64, 64], "groups_width": 8},
    "resnet": {"hidden_sizes": [16, 32, 64, 64], "embedding_size": 16},
    "segformer": {"hidden_sizes": [16, 32, 64, 64], "num_attention_heads": [1, 2, 4, 4]},
    "sew": SPEECH,
    "sew-d": SPEECH,
    "swin": {"embed_dim": 16, "num_heads": [1, 2, 4, 4], "window_size": 2, "patch_size": 2},
    "swinv2": {"embed_dim": 16, "num_heads": [1, 2, 4, 4], "window_size": 2, "patch_size": 2},
    "swiftformer": {"embed_dims": [16, 32, 64, 64]},
    "shieldgemma2": {"yes_token_index": 5, "no_token_index": 6},
    "siglip2": {"vision_config": {"num_patches": 16, "patch_size": 8}},
    "textnet": {"image_size": 64},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "wav2vec2-conformer": SPEECH | {"vocab_size": VOCABULARY},
    "wav2vec2-bert": {"vocab_size": VOCABULARY, "feature_projection_input_dim": 16},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0, "chunk_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 8,
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 32,
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
}


class Architecture(NamedTuple):
    """A model type, the head that it is built with, and its model class.

    Attributes:
        name: the model type.
        head: of `HEADS`.
        class_name: in transformers.
    """

    name: str
    head: str
    class_name: str


def architectures() -> list[Architecture]:
    """All model types with one of the heads, by name."""
    found: dict[str, Architecture] = {}
    for head in HEADS:
        classes = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES")
        for name, class_name in classes.items():
            first = class_name if isinstance(class_name, str) else class_name[0]
            found.setdefault(name, Architecture(name, head, first))
    return sorted(found.values())


def small_model(architecture: Architecture) -> PreTrainedModel:
    """A seeded float32 model in eval mode; biases are not zero."""
    model_class = getattr(transformers, architecture.class_name)
    config = small_config(architecture.name, model_class.config_class)
    torch.manual_seed(0)
    model = model_class(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1 and parameter.requires_grad:
                parameter.mul_(2)  # so that a wrong weight shows in the outputs
    return model.eval()


def small_config(name: str, wanted: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The default config of a model type with small sizes.

    Args:
        name: the model type.
        wanted: config class of the model, which may be the text part of the type's config.
    """
    kind = CONFIG_MAPPING[name]
    if not issubclass(kind, wanted):
        kind = wanted
    chosen = EXCEPTIONS.get(name, {})
    try:
        default = kind()
    except ValueError:  # some configs have no valid default
        return kind(**chosen)
    config = kind(**_small_values(default, chosen))
    if getattr(config, "use_cache", False):
        config.use_cache = False
    return config


def _small_values(config: PreTrainedConfig, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Small values of a config by name; parts of a config are dicts again."""
    small: dict[str, Any] = {}
    values = vars(config)
    for name, value in values.items():
        if name.startswith("_"):
            continue
        if isinstance(value, PreTrainedConfig):
            inner = chosen.get(name, {})
            small[name] = {"model_type": value.model_type} | _small_values(value, inner)
        elif type(value) is int and value > 0:
            size = next((size for rule, size in RULES if re.fullmatch(rule, name)), value)
            small[name] = size if name.endswith("_id") else min(size, value)
        elif isinstance(value, list | tuple):
            limit = next((most for rule, most in LISTS.items() if re.fullmatch(rule, name)), None)
            if limit is not None:
                small[name] = [min(limit, number) for number in value]
            elif name == "eos_token_id":
                small[name] = 2
    if values.get("num_key_value_heads") == values.get("num_attention_heads"):
        small["num_key_value_heads"] = small.get("num_attention_heads")
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if values.get(name):
            kinds = list(dict.fromkeys(values[name]))
            small[name] = kinds * (4 // len(kinds)) if len(kinds) < 3 else kinds * 2
            small["num_hidden_layers"] = len(small[name])
    nested = {name for name, value in small.items() if isinstance(value, dict)}
    small |= {name: value for name, value in chosen.items() if name not in nested}
    return {name: value for name, value in small.items() if value is not None}


def small_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch of two rows that the model takes, always the same."""
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    names = inspect.signature(model.forward).parameters
    batch: dict[str, Tensor] = {}
    if "input_ids" in names:
        batch["input_ids"] = _tokens(config, generator)
    elif "input_values" in names:
        shape = (SAMPLES,)
        if hasattr(config, "max_length"):  # a spectrogram
            shape = (config.max_length, config.num_mel_bins)
        batch["input_values"] = torch.randn(ROWS, *shape, generator=generator)
    elif "input_features" in names:
        shape = (FRAMES, getattr(config, "feature_projection_input_dim", 16))
        if {"max_source_positions", "num_mel_bins"} <= vars(config).keys():
            shape = (config.num_mel_bins, 2 * config.max_source_positions)
        batch["input_features"] = torch.randn(ROWS, *shape, generator=generator)
    elif "pixel_values" in names:
        batch["pixel_values"] = _images(config, generator)
    if names.get("bbox") is not None and model.main_input_name == "input_ids":
        sides = getattr(config, "dim_bbox", 4)
        batch["bbox"] = torch.zeros(ROWS, TOKENS, sides, dtype=torch.long)
    if config.is_encoder_decoder and "decoder_input_ids" in names:
        batch["decoder_input_ids"] = _tokens(config, generator)
    return batch


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    """Random tokens, none of them special; a row for each codebook of a model of music."""
    size = min(VOCABULARY, getattr(config.get_text_config(), "vocab_size", VOCABULARY))
    rows = ROWS * getattr(config, "num_codebooks", 1)
    return torch.randint(8, size - 8, (rows, TOKENS), generator=generator)


def _images(config: Any, generator: torch.Generator) -> Tensor:
    size = getattr(config, "image_size", 32)
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "num_channels", 3)
    return torch.randn(ROWS, channels, height, width, generator=generator)
