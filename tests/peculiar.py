"""Small random models whose classes do something that most classes do not."""

from transformers import (
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    FunnelConfig,
    FunnelForMaskedLM,
    MarianConfig,
    MarianMTModel,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    RwkvConfig,
    RwkvForCausalLM,
)

from tests.models import VOCAB, build

_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def tiny_marian(**settings):
    """Its tables of positions are parameters that it never saves."""
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "forced_eos_token_id": 2}
    model = build(MarianMTModel, MarianConfig(**_SEQ2SEQ, **sizes, **settings))
    for side in (model.model.encoder, model.model.decoder):  # which `build` has changed
        side.embed_positions.weight.data = side.embed_positions.create_weight()
    return model


def tiny_prophetnet():
    """Its decoder reads the weight of an embedding."""
    sizes = {"hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes |= {"num_encoder_layers": 2, "num_decoder_layers": 2}
    sizes |= {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
    return build(ProphetNetForConditionalGeneration, ProphetNetConfig(**_SEQ2SEQ, **sizes))


def tiny_deberta():
    """Its blocks take the weight of an embedding of the encoder."""
    config = DebertaV2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
    )
    return build(DebertaV2ForMaskedLM, config)


def tiny_funnel():
    """It draws every module with "Linear" in the name of its class at random, as a matrix."""
    config = FunnelConfig(
        vocab_size=VOCAB, block_sizes=[2, 2], d_model=32, n_head=2, d_head=16, d_inner=64
    )
    return build(FunnelForMaskedLM, config)


def tiny_rwkv():
    """It divides the weights of its later blocks by two in eval mode."""
    config = RwkvConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        attention_hidden_size=32,
        num_hidden_layers=4,
        context_length=32,
        intermediate_size=64,
        rescale_every=2,
        use_cache=False,
    )
    return build(RwkvForCausalLM, config)
