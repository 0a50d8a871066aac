"""GGUF files: read back by transformers, which is the reference for names, order and metadata."""

import sys
from types import SimpleNamespace

import gguf
import pytest
import torch
from tokenizers import Regex, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama import LlamaTokenizer

import qrefta
from qrefta.export import gguf as export
from qrefta.export.compare import output_difference
from qrefta.export.gguf import FAMILIES, TOLERANCES, export_gguf
from tests.language import (
    LLAMA3_SPLIT,
    MODELS,
    QWEN2_SPLIT,
    SENTENCES,
    TEKKEN_SPLIT,
    VOCAB,
    byte_level_tokenizer,
    language_model,
    sentencepiece_tokenizer,
    split,
    write_gguf,
)
from tests.models import logits, tiny_bert, tiny_gpt2
from tests.peak import added_peak
from tests.test_cli import invoke
from tests.tiny import tiny_tokenizer

IDS = torch.randint(5, 450, (2, 24), generator=torch.Generator().manual_seed(0))
INPUTS = {"input_ids": IDS}
TYPES = {
    "f16": ("F16", "F16", "F32"),
    "q8_0": ("Q8_0", "Q8_0", "F32"),
    "q4_0": ("Q4_0", "Q8_0", "F32"),
}


def scores(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def fields(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def read_tokenizer(path):
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("family", MODELS)
def test_a_written_family_has_the_models_logits_and_tokens(family, tmp_path):
    """Measured in float16: 0.0006 to 0.0012. A wrong order of rows or a missing 1 + norm is off by
    0.1 and more.
    """
    file = write_gguf(tmp_path, family, inputs=INPUTS, tolerance=0.003)
    tokenizer = read_tokenizer(file.path)
    for text in SENTENCES:
        assert tokenizer(text)["input_ids"] == file.tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2"])
def test_transformers_reads_the_settings_from_the_file_alone(family, tmp_path):
    """Settings that its reader leaves out are as by default here, or do not show in the logits."""
    file = write_gguf(tmp_path, family)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.path.name)
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    names += ["num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
    for name in names:
        assert getattr(read.config, name) == getattr(file.model.config, name), name
    assert read.config.tie_word_embeddings == file.model.config.tie_word_embeddings
    if family != "gemma2":
        assert output_difference(scores(read), scores(file.model)) < 0.003


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_stored_as_its_name_says_and_close_to_the_model(kind, tmp_path):
    """Measured: 0.0008, 0.021 and 0.28."""
    file = write_gguf(tmp_path, "llama", kind, inputs=INPUTS, tolerance=TOLERANCES[kind] / 2)
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file.path).tensors}
    found = (stored["blk.0.attn_q.weight"], stored["output.weight"], stored["output_norm.weight"])
    assert found == TYPES[kind]
    assert stored["token_embd.weight"] == found[1]
    sizes = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
    (weight,) = [
        one for one in gguf.GGUFReader(file.path).tensors if one.name == "blk.0.ffn_up.weight"
    ]
    assert weight.n_bytes == 96 * 64 * sizes[kind]


def test_a_prepared_model_and_its_merged_folder_give_one_file(tmp_path):
    model, tokenizer = language_model("qwen2")
    model = qrefta.prepare(model, rank=2, method="refta", refine=0, progress=False)
    before = logits(model)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = export_gguf(model, tmp_path / "a" / "m.gguf", "f16", tokenizer=tokenizer)
    assert found.folder == tmp_path / "a"
    assert found.difference < 0.003
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), before)
    qrefta.merge(model, torch.float32, out=tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    export_gguf(tmp_path / "merged", tmp_path / "b" / "m.gguf", "f16")
    tensors = [gguf.GGUFReader(tmp_path / name / "m.gguf").tensors for name in "ab"]
    assert [one.name for one in tensors[0]] == [one.name for one in tensors[1]]
    for one, other in zip(*tensors, strict=True):
        assert (one.data == other.data).all(), one.name


def test_rows_that_blocks_do_not_fit_stay_in_16_bits(tmp_path):
    config = type(MODELS["llama"][1])(**{**MODELS["llama"][1].to_dict(), "intermediate_size": 72})
    model = MODELS["llama"][0](config)
    path = tmp_path / "m.gguf"
    export_gguf(model, path, "q8_0", tokenizer=byte_level_tokenizer(), inputs=INPUTS)
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert stored["blk.0.ffn_down.weight"] == "F16"  # 72 wide
    assert stored["blk.0.ffn_up.weight"] == "Q8_0"  # 64 wide


def test_tied_embeddings_are_stored_once_and_llama_3_scales_its_rotation(tmp_path):
    file = write_gguf(tmp_path, "llama, tied, scaled")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file.path).tensors}
    assert "output.weight" not in tensors
    inv_freq = file.model.model.rotary_emb.inv_freq
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = torch.tensor(tensors["rope_freqs.weight"].data)
    assert_close(plain / factors, inv_freq)
    assert factors.max() > 7  # low frequencies are scaled by 8


def test_metadata_of_a_byte_level_tokenizer(gguf_file):
    found = fields(gguf_file.path)
    tokenizer = gguf_file.tokenizer
    assert found["general.architecture"] == "llama"
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "llama-bpe"
    assert len(found["tokenizer.ggml.tokens"]) == VOCAB
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{VOCAB - 1}]"
    assert found["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]  # control, then normal
    assert found["tokenizer.ggml.token_type"][-1] == 5  # unused
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert found["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert "tokenizer.ggml.bos_token_id" not in found
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == tokenizer.chat_template


def test_metadata_of_a_sentencepiece_tokenizer(tmp_path):
    file = write_gguf(tmp_path, "mistral")
    found = fields(file.path)
    tokens = found["tokenizer.ggml.tokens"]
    types = found["tokenizer.ggml.token_type"]
    assert found["tokenizer.ggml.model"] == "llama"
    assert types[:4] == [2, 3, 3, 6]  # unknown, control, control, byte
    assert tokens[3] == "<0x00>"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_space_prefix"] is True
    scores = dict(zip(tokens, found["tokenizer.ggml.scores"], strict=True))
    first, later = tokens[259], tokens[300]
    assert scores[first] > scores[later] > scores["e"]


def test_end_tokens_are_written_as_the_tokenizer_and_the_model_use_them(tmp_path):
    model, tokenizer = language_model("llama")
    template = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = template
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 1]
    export_gguf(model, tmp_path / "m.gguf", "f16", tokenizer=tokenizer)
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.add_eos_token"] is True
    assert found["tokenizer.ggml.eot_token_id"] == 1


def test_words_added_to_sentencepiece_are_written_as_they_stand_in_texts(tmp_path):
    model, tokenizer = language_model("llama, sentencepiece")
    number = len(tokenizer)
    tokenizer.add_tokens("new\u2581word")
    export_gguf(model, tmp_path / "m.gguf", "f16", tokenizer=tokenizer)
    found = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.tokens"][number] == "new word"
    assert found["tokenizer.ggml.token_type"][number] == 4  # user-defined


@pytest.mark.parametrize(
    ("regex", "name"),
    [(LLAMA3_SPLIT, "llama-bpe"), (QWEN2_SPLIT, "qwen2"), (TEKKEN_SPLIT, "tekken")],
    ids=["llama-bpe", "qwen2", "tekken"],
)
def test_splits_have_the_names_by_which_transformers_reads_them(regex, name, tmp_path):
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    tokenizer = byte_level_tokenizer(split(regex))
    path = tmp_path / "m.gguf"
    export_gguf(language_model("llama")[0], path, "f16", tokenizer=tokenizer)
    assert fields(path)["tokenizer.ggml.pre"] == name
    assert mapping.GGUF_PRE_TOKENIZER_SPLITS[name] == regex


def test_digits_before_byte_level_bpe_are_smollms(tmp_path):
    digits = pre_tokenizers.Digits(individual_digits=True)
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = byte_level_tokenizer(pre_tokenizers.Sequence([digits, levels]))
    path = tmp_path / "m.gguf"
    export_gguf(language_model("llama")[0], path, "f16", tokenizer=tokenizer)
    assert fields(path)["tokenizer.ggml.pre"] == "smollm"


def test_llama_cpp_is_asked_where_it_is_installed(tmp_path, monkeypatch):
    """Its logits count too; here they are far off."""

    class Llama:
        def __init__(self, path, **options):
            self.tokens = options["n_ctx"]
            self.scores = [[0.0] * VOCAB] * self.tokens

        def reset(self): ...

        def eval(self, row):
            assert len(row) == self.tokens

        def close(self): ...

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    with pytest.raises(ValueError, match=r"differ from the model's by 1 of their size"):
        write_gguf(tmp_path, "llama", inputs=INPUTS)
    assert list(tmp_path.iterdir()) == []


def test_logits_beyond_the_tolerance_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"0\.01 are allowed; nothing was kept"):
        write_gguf(tmp_path, "llama", "q4_0", tolerance=0.01)
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    """A model of 40 MB; its largest tensor is 2 MB."""
    config = type(MODELS["llama"][1])(
        **{
            **MODELS["llama"][1].to_dict(),
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "head_dim": 128,
        }
    )
    model = MODELS["llama"][0](config)
    tokenizer = byte_level_tokenizer()
    family = FAMILIES["LlamaForCausalLM"]
    path = tmp_path / "m.gguf"
    peak = added_peak(lambda: export._write(model, family, path, "f16", tokenizer))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert peak < weights / 2, f"{peak / 1e6:.1f} MB of {weights / 1e6:.1f} MB"


def changed(family, **changes):
    """A model of a family with other settings."""
    kind, config, tokenizer = MODELS[family]
    return kind(type(config)(**{**config.to_dict(), **changes})), tokenizer()


REFUSED = {
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'.*only 'silu'"),
    "rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope_type of full_attention is 'dynamic'",
    ),
    "bias": ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    "windows": ("gemma2", {"layer_types": ["full_attention"] * 3}, "layer_types is"),
    "scale": ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar is 99.*only 16"),
    "no cap": ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping or"),
    "cap": ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_llama_cpp_does_not_have_are_refused(case, tmp_path):
    family, changes, message = REFUSED[case]
    model, tokenizer = changed(family, **changes)
    with pytest.raises(ValueError, match=message):
        export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_sliding_window_that_llama_cpp_leaves_out_is_noted(tmp_path):
    model, tokenizer = changed("mistral", sliding_window=64)
    written = export_gguf(model, tmp_path / "m.gguf", "f16", tokenizer=tokenizer)
    assert "the model to the last 64 tokens" in written.notes[0]
    model, tokenizer = changed("mistral", sliding_window=128)  # as many as there are positions
    assert export_gguf(model, tmp_path / "a" / "m.gguf", "f16", tokenizer=tokenizer).notes == []


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])
def test_other_families_are_refused_by_name(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "dense")
    for source in (model, tmp_path / "dense"):
        with pytest.raises(
            ValueError, match=f"A {type(model).__name__} cannot be .*Qwen3ForCausalLM"
        ):
            export_gguf(source, tmp_path / "m.gguf")


def test_tokenizers_that_llama_cpp_cannot_run_are_refused(tmp_path):
    model, _ = language_model("llama")
    unknown_split = byte_level_tokenizer(split(r"\p{L}+|\p{N}+"))
    too_large = byte_level_tokenizer()
    too_large.add_tokens([f"<more{number}>" for number in range(100)])
    refused = {
        "model WordLevel": tiny_tokenizer(),
        "has no name in GGUF": unknown_split,
        "vocabulary 512 tokens": too_large,
    }
    for message, tokenizer in refused.items():
        with pytest.raises(ValueError, match=message):
            export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="none was found with the model"):
        export_gguf(model, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], "puts a space before a text"),
        (
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=True),
            ],
            "puts a space before a text",
        ),
        (
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            "has no name in GGUF",
        ),
        (
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="merged_with_next"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            "MergedWithNext.*has no name in GGUF",
        ),
        (
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
            "Removed.*has no name in GGUF",
        ),
        (
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ],
            "has no name in GGUF",
        ),
    ],
)
def test_splits_that_only_look_like_a_known_one_are_refused(steps, message, tmp_path):
    tokenizer = byte_level_tokenizer()
    whole = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.backend_tokenizer.pre_tokenizer = whole
    with pytest.raises(ValueError, match=message):
        export_gguf(language_model("llama")[0], tmp_path / "m.gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scheme", ["always", "never"])
def test_sentencepieces_space_is_seen_in_a_sequence(scheme, tmp_path):
    model, tokenizer = language_model("llama, sentencepiece")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)]
    )
    export_gguf(model, tmp_path / "m.gguf", "f16", tokenizer=tokenizer)
    found = fields(tmp_path / "m.gguf")["tokenizer.ggml.add_space_prefix"]
    assert found == (scheme == "always")


def test_a_split_before_sentencepieces_merges_is_refused(tmp_path):
    model, tokenizer = language_model("llama, sentencepiece")
    metaspace = tokenizer.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, metaspace])
    with pytest.raises(ValueError, match=r'splits text by .*"Digits".* by nothing but spaces'):
        export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_the_architecture_does_not_have_is_refused(tmp_path):
    """llama.cpp takes Gemma 2's embeddings for its head."""
    model, tokenizer = changed("gemma2", tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head.weight has no place in a GGUF file of gemma2:"):
        export_gguf(model, tmp_path / "sub" / "m.gguf", tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_gemma_3_may_have_a_head(tmp_path):
    model, tokenizer = changed("gemma3", tie_word_embeddings=False)
    export_gguf(
        model, tmp_path / "m.gguf", "f16", tokenizer=tokenizer, inputs=INPUTS, tolerance=0.003
    )
    tensors = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {"output.weight", "token_embd.weight"} <= tensors


def test_a_model_resized_after_it_was_loaded_is_noted_without_its_tokenizer(tmp_path):
    model, tokenizer = language_model("llama")
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    model = type(model).from_pretrained(tmp_path / "dense")
    assert export_gguf(model, tmp_path / "a" / "m.gguf").notes == []
    model.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    (note,) = export_gguf(model, tmp_path / "b" / "m.gguf").notes
    assert f"has {VOCAB + 2} tokens, and {VOCAB} in {tmp_path / 'dense'}" in note
    assert export_gguf(model, tmp_path / "c" / "m.gguf", tokenizer=tokenizer).notes == []


def test_bad_calls_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    model, tokenizer = language_model("llama")
    with pytest.raises(ValueError, match="type is 'q5_k'; it must be one of f16, q8_0, q4_0"):
        export_gguf(model, tmp_path / "m.gguf", "q5_k", tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"m\.bin; its name must end in \.gguf"):
        export_gguf(model, tmp_path / "m.bin", tokenizer=tokenizer)
    for name in ("m.gguf", "Modelfile"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name} exists"):
            export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    monkeypatch.setattr(export, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match="pip install gguf"):
        export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)


def test_the_command_line_writes_a_file_and_a_modelfile(tmp_path):
    model, tokenizer = language_model("llama")
    qrefta.prepare(model, rank=2, progress=False).save_pretrained(tmp_path / "4bit")
    tokenizer.save_pretrained(tmp_path / "4bit")
    path = tmp_path / "out" / "m.gguf"
    shown = invoke("export-gguf", tmp_path / "4bit", path, "--type", "q4_0").output
    assert "Logits differ from the model's by" in shown
    assert fields(path)["general.name"] == "4bit"
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./m.gguf\n")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["Modelfile", "m.gguf"]


def test_a_folder_called_mistral_can_be_read(tmp_path):
    """transformers takes this name in a file for an architecture, and fails on it."""
    model, tokenizer = language_model("mistral")
    model.save_pretrained(tmp_path / "mistral")
    tokenizer.save_pretrained(tmp_path / "mistral")
    export_gguf(tmp_path / "mistral", tmp_path / "m.gguf", "f16")
    assert fields(tmp_path / "m.gguf")["general.name"] == "Mistral"


def test_a_tokenizer_without_a_space_before_texts_says_so(tmp_path):
    model, _ = language_model("llama, sentencepiece")
    tokenizer = sentencepiece_tokenizer(
        lambda **parts: LlamaTokenizer(**parts, add_prefix_space=False)
    )
    export_gguf(model, tmp_path / "m.gguf", "f16", tokenizer=tokenizer)
    assert fields(tmp_path / "m.gguf")["tokenizer.ggml.add_space_prefix"] is False
