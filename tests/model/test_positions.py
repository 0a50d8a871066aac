"""The limit that is told is the longest row that the model reads: one token more fails."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    CTRLConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MPNetConfig,
    MptConfig,
    NystromformerConfig,
    OPTConfig,
    PretrainedConfig,
    RobertaConfig,
    XLNetConfig,
)

from qrefta.model.positions import position_limit, trained_positions
from tests.models import encoder_sizes, tiny_clip

VOCAB = 40
NAMES = {"vocab_size": VOCAB, "max_position_embeddings": 20}
BLOCKS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ENCODER = NAMES | encoder_sizes(16, 1)
GPT = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}


def reads(model, tokens):
    ids = torch.full((1, tokens), 7)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (RuntimeError, IndexError):
        return False
    return True


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (ElectraConfig(**ENCODER), 20),
        (RobertaConfig(**ENCODER), 18),  # rows 0 and 1 of its table are for padding
        (MPNetConfig(**ENCODER), 18),
        (NystromformerConfig(**ENCODER), 20),
        (DistilBertConfig(**NAMES, n_layers=1, n_heads=2, dim=16, hidden_dim=16), 20),
        (GPT2Config(**GPT), 20),
        (CTRLConfig(**GPT, dff=16), 20),
        (GPTJConfig(**GPT, rotary_dim=4), 20),
        (MptConfig(vocab_size=VOCAB, d_model=16, n_layers=1, n_heads=2, max_seq_len=20), 20),
        (
            OPTConfig(**NAMES, **BLOCKS, ffn_dim=16, word_embed_proj_dim=16),
            20,
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_tables_of_positions_end(config: PretrainedConfig, limit):
    causal = config.model_type in ("gpt2", "ctrl", "gptj", "mpt", "opt")
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model = auto.from_config(config).eval()
    assert position_limit(model) == trained_positions(model) == limit
    assert reads(model, limit)
    assert not reads(model, limit + 1)


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (
            LlamaConfig(**NAMES, **BLOCKS, intermediate_size=16),
            20,
        ),
        (DebertaV2Config(**ENCODER, position_biased_input=False, relative_attention=True), 20),
        (BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2), None),
        (XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=16), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_computed_positions_do_not_end(config, trained):
    causal = config.model_type in ("llama", "bloom")
    auto = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    model = auto.from_config(config).eval()
    assert position_limit(model) is None
    assert trained_positions(model) == trained
    assert reads(model, 40)


def test_positions_of_images_are_no_limit_of_text():
    model = tiny_clip()
    text = model.text_model.embeddings.position_embedding.num_embeddings
    image = model.vision_model.embeddings.position_embedding.num_embeddings
    assert image < text
    assert position_limit(model) == text
