"""Models by object, folder and GGUF file; models that predict no next token are refused."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BlipConfig,
    BlipForConditionalGeneration,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

import qrefta
from qrefta.measure.sources import load_causal_model, load_tokenizer, source_name
from tests.models import (
    VOCAB,
    build,
    decoder_sizes,
    encoder_sizes,
    logits,
    tiny_bert,
    tiny_clip,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen3_moe,
    tiny_t5,
    tiny_vit,
    tiny_whisper,
    towers,
)

NO_NEXT_TOKEN = {
    "encoder-decoder": tiny_t5,
    "encoder-decoder with a config of two": lambda: build(
        T5GemmaForConditionalGeneration,
        T5GemmaConfig(encoder=decoder_sizes(32), decoder=decoder_sizes(32), vocab_size=VOCAB),
    ),
    "speech": tiny_whisper,
    "classifier": tiny_bert,
    "image classifier": tiny_vit,
    "two towers": tiny_clip,
    "no head": lambda: build(LlamaModel, LlamaConfig(**decoder_sizes(32))),
    "classifier of a causal model": lambda: build(
        LlamaForSequenceClassification, LlamaConfig(**decoder_sizes(32))
    ),
    "captions of images": lambda: build(
        BlipForConditionalGeneration, BlipConfig(projection_dim=16, **towers(32))
    ),
    "encoder with a head": lambda: build(
        BertLMHeadModel, BertConfig(vocab_size=VOCAB, **encoder_sizes(32))
    ),
}


@pytest.mark.parametrize("make", NO_NEXT_TOKEN.values(), ids=NO_NEXT_TOKEN)
def test_models_that_predict_no_next_token_are_refused(make, tmp_path):
    model = make()
    name = type(model).__name__
    with pytest.raises(ValueError, match=rf"{name} is not a causal language model"):
        load_causal_model(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"\({name}\) is not a causal language model"):
        load_causal_model(tmp_path)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_qwen3_moe])
def test_causal_models_are_taken(make):
    model = make()
    assert load_causal_model(model) is model


def test_pythia_is_taken_whose_config_says_that_it_is_no_decoder(tmp_path):
    """`qrefta chat` and `qrefta evaluate` refused it."""
    model = build(GPTNeoXForCausalLM, GPTNeoXConfig(vocab_size=VOCAB, **encoder_sizes(32)))
    assert not model.config.is_decoder
    assert load_causal_model(model) is model
    model.save_pretrained(tmp_path)
    assert isinstance(load_causal_model(tmp_path), GPTNeoXForCausalLM)


def test_an_encoder_that_was_made_a_decoder_is_taken():
    config = BertConfig(vocab_size=VOCAB, is_decoder=True, **encoder_sizes(32))
    model = build(BertLMHeadModel, config)
    assert load_causal_model(model) is model


def test_folders_are_loaded_in_their_dtype_and_kind(tmp_path):
    dense = tiny_llama().bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    qrefta.prepare_checkpoint(tmp_path / "dense", tmp_path / "4bit", rank=2, progress=False)
    assert load_causal_model(tmp_path / "dense", "cpu").dtype == torch.bfloat16
    prepared = load_causal_model(str(tmp_path / "4bit"), "cpu")
    assert qrefta.quant_report(prepared)


def test_an_unknown_class_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MyModel"))
    with pytest.raises(ValueError, match="no model class 'MyModel'"):
        load_causal_model(tmp_path)


def test_a_gguf_file_is_loaded_with_its_tokenizer(gguf_file):
    model = load_causal_model(str(gguf_file.path), "cpu")
    assert_close(logits(model), logits(gguf_file.model), rtol=0.01, atol=0.01)
    assert source_name(model) == str(gguf_file.path)
    for source in (gguf_file.path, model):
        found = load_tokenizer(source)("the mill")
        assert found["input_ids"] == gguf_file.tokenizer("the mill")["input_ids"]


def test_gguf_without_its_package_or_file_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"There is no file .*model\.gguf"):
        load_causal_model(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr("qrefta.files.sources.is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match="pip install gguf"):
        load_causal_model(tmp_path / "model.gguf")


def test_names_and_tokenizers_of_sources(folder, tmp_path):
    model = tiny_llama()
    assert source_name(model) == "LlamaForCausalLM"
    assert source_name(folder) == source_name(str(folder)) == str(folder)
    assert load_tokenizer(model) is None
    model.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path) is None
    loaded = load_causal_model(folder)
    assert source_name(loaded) == str(folder)
    assert len(load_tokenizer(loaded)) == VOCAB
