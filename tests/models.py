"""Small random transformers models for the tests, built from configs, seeded and in eval mode.

Weights are larger than transformers' defaults, and biases are not zero, so a wrong or missing
tensor shows in the logits. Preparing a model takes most of a test's time, so `prepared` does it
once per process.
"""

import copy
import json
from functools import cache
from itertools import cycle

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GteConfig,
    GteForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import qrefta

VOCAB = 96
LAYERS = 3


def build(model_class, config):
    """A seeded model; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    return model.float().eval()


def encoder_sizes(hidden, layers=LAYERS):
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * hidden,
        "initializer_range": 0.1,
    }


def decoder_sizes(hidden, layers=LAYERS):
    """Grouped-query attention: 4 query heads, 2 key-value heads."""
    return encoder_sizes(hidden, layers) | {
        "vocab_size": VOCAB,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }


def tiny_bert(hidden=32, layers=LAYERS):
    config = BertConfig(
        vocab_size=VOCAB, max_position_embeddings=64, num_labels=3, **encoder_sizes(hidden, layers)
    )
    return build(BertForSequenceClassification, config)


def tiny_gte(hidden=32):
    """Its checkpoints hold query, key and value in one matrix, and gate and up in another."""
    config = GteConfig(vocab_size=VOCAB, max_position_embeddings=64, **encoder_sizes(hidden))
    return build(GteForMaskedLM, config)


def tiny_roberta(hidden=32):
    config = RobertaConfig(
        vocab_size=VOCAB, max_position_embeddings=64, num_labels=3, **encoder_sizes(hidden)
    )
    return build(RobertaForSequenceClassification, config)


def tiny_vit(hidden=32):
    config = ViTConfig(image_size=16, patch_size=4, num_labels=3, **encoder_sizes(hidden))
    return build(ViTForImageClassification, config)


def tiny_llama(hidden=32):
    return build(LlamaForCausalLM, LlamaConfig(**decoder_sizes(hidden)))


def tiny_qwen3(hidden=32):
    return build(Qwen3ForCausalLM, Qwen3Config(**decoder_sizes(hidden)))


def tiny_mistral(hidden=32):
    return build(MistralForCausalLM, MistralConfig(**decoder_sizes(hidden)))


def tiny_mixtral(hidden=32):
    """Mixture of experts: transformers 5 keeps the experts as fused 3-D parameters."""
    return build(
        MixtralForCausalLM, MixtralConfig(num_local_experts=4, **decoder_sizes(hidden, layers=2))
    )


def tiny_qwen3_moe(hidden=32):
    """Its middle layer is dense; in alphabetical order the tenth expert precedes the second."""
    config = Qwen3MoeConfig(
        num_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        **decoder_sizes(hidden),
    )
    return build(Qwen3MoeForCausalLM, config)


def tiny_gpt_oss(hidden=32):
    """Experts with biases, a special gate, and weights stored as (in, out)."""
    config = GptOssConfig(
        num_local_experts=4, num_experts_per_tok=2, **decoder_sizes(hidden, layers=2)
    )
    return build(GptOssForCausalLM, config)


def tiny_gpt2(hidden=32):
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=hidden,
        n_layer=LAYERS,
        n_head=4,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=1,
    )
    return build(GPT2LMHeadModel, config)


def tiny_t5(hidden=32):
    config = T5Config(
        vocab_size=VOCAB,
        d_model=hidden,
        d_kv=hidden // 4,
        d_ff=2 * hidden,
        num_layers=LAYERS,
        num_decoder_layers=2,
        num_heads=4,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    return build(T5ForConditionalGeneration, config)


def tiny_whisper(hidden=32):
    """Speech features in, text out; the output layer is tied to the decoder's embeddings."""
    config = WhisperConfig(
        vocab_size=VOCAB,
        d_model=hidden,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * hidden,
        decoder_ffn_dim=2 * hidden,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
        init_std=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
    )
    return build(WhisperForConditionalGeneration, config)


def towers(hidden):
    """A text and an image tower of different width."""
    text = encoder_sizes(hidden, layers=2) | {"vocab_size": VOCAB, "max_position_embeddings": 16}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision = encoder_sizes(2 * hidden, layers=2) | {"image_size": 16, "patch_size": 8}
    return {"text_config": text, "vision_config": vision}


def tiny_clip(hidden=32):
    return build(CLIPModel, CLIPConfig(projection_dim=16, **towers(hidden)))


def tiny_siglip(hidden=32):
    """Both towers must project to the same width; the image tower pools with an
    `nn.MultiheadAttention`.
    """
    sizes = towers(hidden)
    sizes["text_config"]["projection_size"] = 2 * hidden
    return build(SiglipModel, SiglipConfig(**sizes))


def tiny_gemma3(hidden=32):
    """A model of images and text, which `AutoModelForCausalLM` loads too."""
    config = Gemma3Config(
        text_config=decoder_sizes(hidden),
        vision_config=encoder_sizes(hidden, LAYERS) | {"image_size": 16, "patch_size": 4},
        image_token_id=95,
        boi_token_index=94,
        eoi_token_index=93,
        mm_tokens_per_image=4,
    )
    return build(Gemma3ForConditionalGeneration, config)


def tiny_swin():
    """Two stages, of widths 32 and 64."""
    config = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=3,
        initializer_range=0.1,
    )
    return build(SwinForImageClassification, config)


def tiny_segformer():
    """Its decode head holds a list of linear layers."""
    config = SegformerConfig(
        num_labels=3,
        hidden_sizes=[8, 8, 16, 16],
        decoder_hidden_size=16,
        num_attention_heads=[1, 1, 2, 2],
        depths=[1, 1, 1, 1],
    )
    return build(SegformerForSemanticSegmentation, config)


def bert_100():
    """A width that is no multiple of the quantization block, or of 32."""
    return tiny_bert(hidden=100)


def llama_96():
    """96 % 64 == 32: the rows for which bitsandbytes' CPU kernel is wrong."""
    return tiny_llama(hidden=96)


ARCHITECTURES = {
    "bert": tiny_bert,
    "roberta": tiny_roberta,
    "vit": tiny_vit,
    "llama_gqa": tiny_llama,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
    "gpt2": tiny_gpt2,
    "t5": tiny_t5,
    "bert_100": bert_100,
    "llama_96": llama_96,
}


def covered(cases):
    """Pairs: every architecture with one of the cases in turn, and the first one with all."""
    first, *others = ARCHITECTURES
    return [(first, case) for case in cases] + list(zip(others, cycle(cases), strict=False))


TOWERS = {"whisper": tiny_whisper, "clip": tiny_clip, "siglip": tiny_siglip}
EXPERTS = {"mixtral": tiny_mixtral, "qwen3_moe": tiny_qwen3_moe, "gpt_oss": tiny_gpt_oss}


def language_tokenizer():
    """Words w0, w1, ... and a chat template that joins the turns."""
    vocabulary = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", pad_token="w1", eos_token="w2"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return fast


def prepared(make, **settings):
    """A copy of `qrefta.prepare(make(), **settings)`, by default with ReFTA in one shot."""
    return copy.deepcopy(
        _prepared(make, frozenset(({"method": "refta", "refine": 0} | settings).items()))
    )


@cache
def _prepared(make, settings):
    return qrefta.prepare(make(), progress=False, **dict(settings))


def inputs(model):
    """A deterministic batch of two for any of the models."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": pixels(model.config, generator)}
    if hasattr(model.config, "num_mel_bins"):
        features = torch.randn(
            2, model.config.num_mel_bins, 2 * model.config.max_source_positions, generator=generator
        )
        return {
            "input_features": features,
            "decoder_input_ids": torch.randint(2, VOCAB, (2, 6), generator=generator),
        }
    batch = {"input_ids": torch.randint(2, VOCAB, (2, 8), generator=generator)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(2, VOCAB, (2, 6), generator=generator)
    if hasattr(model.config, "vision_config"):
        batch["pixel_values"] = pixels(model.config.vision_config, generator)
    return batch


def pixels(config, generator):
    return torch.randn(2, 3, config.image_size, config.image_size, generator=generator)


def scores(model):
    """Logits of the deterministic batch; for two towers both embeddings before their product."""
    batch = {name: tensor.to(model.device) for name, tensor in inputs(model).items()}
    output = model(**batch)
    if "logits" in output:
        return output.logits
    return torch.cat(
        [output.text_model_output.pooler_output, output.vision_model_output.pooler_output], dim=1
    )


@torch.no_grad()
def logits(model):
    """`scores` without gradients, on the CPU."""
    return scores(model).cpu()


def header_and_data(path):
    """A safetensors file, whatever the order in which its metadata is written."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]
