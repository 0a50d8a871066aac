import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import qrefta
from qrefta.config.stack import BANK
from qrefta.export import merge as export
from qrefta.export import write
from qrefta.model.prepared import is_prepared, prepared_config
from qrefta.nn import experts
from qrefta.nn.linear import AdaptedLinear
from tests import models
from tests.models import (
    ARCHITECTURES,
    VOCAB,
    build,
    decoder_sizes,
    inputs,
    language_tokenizer,
    logits,
    tiny_bert,
    tiny_gpt2,
    tiny_gte,
    tiny_llama,
    tiny_mixtral,
    tiny_segformer,
)
from tests.peak import added_peak
from tests.peculiar import tiny_deberta, tiny_marian, tiny_prophetnet
from tests.tiny import tiny_folder, tiny_tokenizer

all_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def prepared(architecture, **settings):
    return models.prepared(ARCHITECTURES[architecture], rank=5, **settings)


def classes(model):
    return {path: type(module) for path, module in model.named_modules()}


def take_steps(model, steps=3):
    """Plain SGD on the sum of squared logits: moves every factor and the head."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs(model)).logits.square().mean().backward()
        optimizer.step()
    return model


@all_architectures
@pytest.mark.parametrize("bits", [4, 16])
def test_merged_float32_logits_equal_the_prepared_ones(architecture, bits):
    model = prepared(architecture, bits=bits)
    expected = logits(model)
    merged = qrefta.merge(model, dtype=torch.float32)
    assert merged is model
    assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


@all_architectures
def test_merged_logits_equal_the_trained_models(architecture):
    start = prepared(architecture)
    model = take_steps(copy.deepcopy(start))
    expected = logits(model)
    assert (expected - logits(start)).abs().max() > 1e-3  # training did something
    assert_close(logits(qrefta.merge(model, dtype=torch.float32)), expected, rtol=1e-5, atol=1e-5)


@all_architectures
def test_merged_weights_equal_the_dense_weights_of_layers(architecture):
    """Every merged weight and bias, against the layer that it replaces, bit for bit in float32."""
    model = prepared(architecture)
    expected = {
        path: m for path, m in copy.deepcopy(model).named_modules() if isinstance(m, AdaptedLinear)
    }
    qrefta.merge(model, dtype=torch.float32)
    for path, layer in expected.items():
        linear = model.get_submodule(path)
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        assert torch.equal(weight, layer.dense_weight())
        assert weight.data_ptr() != layer.weight.data_ptr()
        assert (linear.bias is None) == (layer.bias is None)
        assert linear.bias is None or torch.equal(linear.bias, layer.bias)
        assert linear.weight.is_contiguous()


@all_architectures
def test_module_classes_and_names_equal_the_original(architecture):
    original = ARCHITECTURES[architecture]()
    merged = qrefta.merge(prepared(architecture))
    assert classes(merged) == classes(original)
    assert list(merged.state_dict()) == list(original.state_dict())
    for path, module in original.named_modules():
        if isinstance(module, nn.Linear):
            assert repr(merged.get_submodule(path)) == repr(module)
    for name, tensor in original.state_dict().items():
        assert merged.state_dict()[name].shape == tensor.shape


@all_architectures
def test_no_trace_of_qrefta_is_left(architecture):
    original = ARCHITECTURES[architecture]()
    merged = qrefta.merge(prepared(architecture))
    assert not hasattr(merged, BANK)
    assert not hasattr(merged.config, "quantization_config")
    assert getattr(merged, "hf_quantizer", None) is None
    assert not getattr(merged, "is_quantized", False)
    assert not getattr(merged, "quantization_method", None)
    assert set(merged._keep_in_fp32_modules_strict or ()) == set(
        original._keep_in_fp32_modules_strict or ()
    )
    assert "qrefta" not in json.dumps(merged.config.to_dict())
    assert not any("qrefta" in type(module).__module__ for module in merged.modules())
    assert all(parameter.requires_grad for parameter in merged.parameters())


@all_architectures
def test_everything_is_bf16_by_default_and_near(architecture):
    model = prepared(architecture)
    expected = logits(model)
    merged = qrefta.merge(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert merged.dtype == torch.bfloat16
    # As from_pretrained has it: rotary frequencies rounded to bf16 would turn far positions by the
    # wrong angle.
    buffers = dict(ARCHITECTURES[architecture]().named_buffers())
    for name, buffer in merged.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name])
    # Rounding of the weights and all activations: relative root difference measured over the ten up
    # to 0.012.
    assert (logits(merged).float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_are_summed_in_float32_and_rounded_once(dtype):
    single = qrefta.merge(prepared("gpt2"), dtype=torch.float32).state_dict()
    merged = qrefta.merge(prepared("gpt2"), dtype=dtype).state_dict()
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, single[name].to(dtype))


def test_a_bf16_model_merges_from_float32_sums():
    """Residual and update must not pass through bf16 before they are summed."""
    half = tiny_bert().bfloat16()
    single = copy.deepcopy(half).float()
    merged = qrefta.merge(qrefta.prepare(half, rank=5), dtype=torch.float32).state_dict()
    for name, tensor in (
        qrefta.merge(qrefta.prepare(single, rank=5), dtype=torch.float32).state_dict().items()
    ):
        assert torch.equal(merged[name], tensor)


def test_layers_that_checkpoints_hold_as_one_are_written_together(tmp_path):
    """GTE's checkpoints hold query, key and value in one matrix."""
    model = take_steps(qrefta.prepare(tiny_gte(), rank=5), 2)
    qrefta.merge(model, torch.float32, out=tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert_close(logits(merged), logits(model), rtol=0, atol=1e-4)
    assert any("qkv_proj" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))
    with pytest.raises(ValueError, match=r"hold several linear layers as one.*base=.residual"):
        qrefta.export_lora(model, tmp_path / "lora", base="residual-4bit")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("build_model", [tiny_gpt2, tiny_llama])
def test_language_models_stay_tied_and_generate(build_model):
    merged = qrefta.merge(models.prepared(build_model, rank=5), dtype=torch.float32)
    tied = merged.config.tie_word_embeddings
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
    batch = inputs(merged)
    generated = merged.generate(**batch, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > batch["input_ids"].shape[1]


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept(training):
    model = prepared("bert").train(training)
    assert all(module.training == training for module in qrefta.merge(model).modules())


def test_a_loaded_model_merges_to_the_same_weights(tmp_path):
    model = take_steps(prepared("bert", double_quant=True))
    model.save_pretrained(tmp_path)
    loaded = qrefta.merge(qrefta.load(tmp_path)).state_dict()
    for name, tensor in qrefta.merge(model).state_dict().items():
        assert torch.equal(loaded[name], tensor)


def test_merged_weights_take_gradients_and_share_no_memory():
    merged = qrefta.merge(prepared("bert", bits=16), dtype=torch.float32)
    merged(**inputs(merged)).logits.square().mean().backward()
    assert all(
        p.grad is not None for name, p in merged.named_parameters() if "embeddings" not in name
    )


# Errors


def test_a_model_that_is_not_prepared_is_refused():
    with pytest.raises(
        ValueError, match=r"BertForSequenceClassification is not prepared; call qrefta.prepare"
    ):
        qrefta.merge(tiny_bert())
    with pytest.raises(ValueError, match=r"Linear is not prepared"):
        qrefta.merge(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"is not prepared"):
        qrefta.quant_report(tiny_bert())


def test_a_merged_model_is_not_merged_again():
    merged = qrefta.merge(prepared("bert"))
    with pytest.raises(ValueError, match="is not prepared"):
        qrefta.merge(merged)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_a_dtype_that_is_no_float_is_refused_and_the_model_left(dtype):
    model = prepared("bert")
    expected = logits(model)
    with pytest.raises(ValueError, match=f"dtype is {dtype}; it must be a floating type"):
        qrefta.merge(model, dtype=dtype)
    assert torch.equal(logits(model), expected)
    assert qrefta.quant_report(model)


def test_merging_keeps_long_positions_right(tmp_path):
    """bf16 leaves RoPE's inv_freq alone: merged in memory equals saved and loaded.

    At position 1,500 too.
    """
    model = build(
        LlamaForCausalLM, LlamaConfig(**decoder_sizes(32) | {"max_position_embeddings": 2048})
    )
    merged = qrefta.merge(qrefta.prepare(model, rank=5))
    merged.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    tokens = torch.randint(2, VOCAB, (1, 1500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(merged(tokens).logits, loaded(tokens).logits, rtol=0, atol=0)


def test_a_merged_loaded_model_says_nothing_of_quantization(tmp_path):
    prepared("bert").save_pretrained(tmp_path)
    merged = qrefta.merge(qrefta.load(tmp_path), torch.float32)
    assert not getattr(merged.config, "_is_quantized", False)
    assert merged.config.dtype == torch.float32


def test_modules_that_the_model_wants_in_float32_stay_in_float32(tmp_path):
    """T5's wo overflows in fp16; from_pretrained(dtype=float16) keeps it in float32 too."""
    merged = qrefta.merge(prepared("t5"), torch.float16)
    merged.save_pretrained(tmp_path)
    loaded = type(merged).from_pretrained(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in merged.parameters()} == {torch.float16, torch.float32}
    for (name, ours), theirs in zip(merged.named_parameters(), loaded.parameters(), strict=True):
        assert ours.dtype == theirs.dtype, name


ROUTED = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}


def tiny_deepseek_v3():
    """Its class keeps the weights of routers in float32."""
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    groups = {"n_group": 2, "topk_group": 1, "v_head_dim": 8, "num_key_value_heads": 4}
    config = DeepseekV3Config(**decoder_sizes(32) | ROUTED | ranks | groups)
    return build(DeepseekV3ForCausalLM, config)


def tiny_glm4_moe():
    """Its class keeps the weights of routers in float32."""
    return build(Glm4MoeForCausalLM, Glm4MoeConfig(**decoder_sizes(32) | ROUTED))


FLOAT32_ROUTERS = [tiny_deepseek_v3, tiny_glm4_moe]


def prepared_in_bf16(make, folder, **settings):
    """Prepared from the folder, as from_pretrained loads it."""
    original = make()
    original.save_pretrained(folder)
    loaded = type(original).from_pretrained(folder, dtype=torch.bfloat16)
    return qrefta.prepare(loaded, rank=3, refine=0, progress=False, **settings)


def routers(model):
    """The tensors that choose experts, by name."""
    names = ("gate.weight", "e_score_correction_bias")
    return {name: t for name, t in model.state_dict().items() if name.endswith(names)}


@pytest.mark.parametrize("make", FLOAT32_ROUTERS)
def test_tokens_keep_their_experts_after_merging(make, tmp_path):
    """The class names parts of paths such as "gate.weight"; a rounded gate chooses others."""
    model = prepared_in_bf16(make, tmp_path / "dense")
    expected = {name: tensor.clone() for name, tensor in routers(model).items()}
    assert len(expected) == 4
    assert {tensor.dtype for tensor in expected.values()} == {torch.float32}
    qrefta.merge(model, out=tmp_path / "merged")
    written = type(model).from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    merged = qrefta.merge(model)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in expected.items():
        assert_close(stored[name], tensor, rtol=0, atol=0)
        assert_close(merged.state_dict()[name], tensor, rtol=0, atol=0)
    for name, tensor in merged.state_dict().items():
        assert_close(written.state_dict()[name], tensor, rtol=0, atol=0)
    assert torch.equal(logits(written), logits(merged))


def test_merging_in_place_holds_one_linear_layer_in_float32():
    """The dense model takes 2 bytes a weight; in float32 it would take 4."""
    sizes = decoder_sizes(128, layers=12) | {"vocab_size": 32}
    model = qrefta.prepare(build(LlamaForCausalLM, LlamaConfig(**sizes)), rank=4, refine=0)
    weights = sum(row.weights for row in prepared_config(model).stacks)
    assert added_peak(lambda: qrefta.merge(model)) < 2.3 * weights


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_mixtral])
@pytest.mark.parametrize("calls", range(1, 30, 4))
def test_an_interrupted_merge_is_finished_by_the_next(make, calls, monkeypatch):
    """Ctrl-C in any step: the layers that are dense already are left as they are."""
    model = models.prepared(make, rank=5)
    expected = qrefta.merge(copy.deepcopy(model)).state_dict()
    interrupt_after(calls, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        qrefta.merge(model)
    monkeypatch.undo()
    merged = qrefta.merge(model).state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())
    assert not is_prepared(model)
    assert classes(model) == classes(make())


def interrupt_after(calls, monkeypatch):
    """Raise KeyboardInterrupt in one of the steps of a merge in place."""
    left = [calls]

    def counted(step):
        def run(*args):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return step(*args)

        return run

    for owner, name in (
        (export, "replace_module"),
        (AdaptedLinear, "dense_weight"),
        (experts, "_use"),
        (export, "set_always_float32"),
        (export, "wanted_dtype"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))


def test_a_half_merged_model_is_not_written(tmp_path, monkeypatch):
    model = prepared("llama_gqa")
    interrupt_after(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        qrefta.merge(model)
    monkeypatch.undo()
    for export_to in exports(tmp_path):
        with pytest.raises(ValueError, match=r"merge in place was interrupted. Call qrefta.merge"):
            export_to(model)
    assert not list(tmp_path.iterdir())


def exports(folder):
    """The functions that write a model to a folder."""
    return [
        lambda model: qrefta.merge(model, out=folder / "out"),
        lambda model: qrefta.export_lora(model, folder / "out"),
        lambda model: qrefta.export_gguf(model, folder / "out.gguf"),
    ]


def test_a_model_with_adapters_of_peft_is_refused_and_left_as_it_was(tmp_path):
    model = prepared("llama_gqa")
    peft = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    expected = logits(peft)
    for one in (peft, peft.get_base_model()):
        for export_to in (qrefta.merge, *exports(tmp_path)):
            with pytest.raises(ValueError, match=r"carries PEFT adapters; call merge_and_unload"):
                export_to(one)
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(peft), expected)


def test_an_offloaded_model_is_refused_and_left_as_it_was(tmp_path):
    """Its parameters are on the meta device between two forward passes."""
    model = prepared("llama_gqa")
    expected = logits(model)
    cpu_offload(model)
    for export_to in (qrefta.merge, *exports(tmp_path)):
        with pytest.raises(ValueError, match=r"on the meta device .* offloads them. Load it whole"):
            export_to(model)
    assert not list(tmp_path.iterdir())
    remove_hook_from_submodules(model)
    assert torch.equal(logits(model), expected)


# Written to a folder


@all_architectures
def test_a_written_folder_equals_merging_in_place(architecture, tmp_path):
    """Tensor by tensor and bit for bit, in as many files as it takes; the model stays prepared."""
    model = take_steps(prepared(architecture))
    expected = logits(model)
    for dtype in (torch.bfloat16, torch.float32):
        written = qrefta.merge(model, dtype, out=tmp_path / str(dtype), max_shard_size=30_000)
        assert written.difference < (0.02 if dtype == torch.bfloat16 else 1e-5)
        assert len(list(written.folder.glob("*.safetensors"))) > 1
    assert torch.equal(logits(model), expected)
    written = type(model).from_pretrained(tmp_path / "torch.bfloat16").state_dict()
    for name, tensor in qrefta.merge(model).state_dict().items():
        assert torch.equal(written[name], tensor), name


def test_statistics_of_norms_are_written_and_compared(tmp_path):
    """BatchNorm's are buffers, which a checkpoint holds as it does weights."""
    model = qrefta.prepare(tiny_segformer(), rank=2)
    model.decode_head.batch_norm.running_mean.fill_(0.5)
    assert qrefta.merge(model, torch.float32, out=tmp_path / "out").difference < 1e-5


@pytest.mark.parametrize("architecture", ["vit", "gpt2"])
def test_published_names_and_one_file(architecture, tmp_path):
    """Written names are the published ones.

    ViT's checkpoints have other names than its modules; GPT-2's hold a tied head once.
    """
    model = prepared(architecture)
    written = qrefta.merge(model, out=tmp_path / "written")
    qrefta.merge(model).save_pretrained(tmp_path / "saved")
    files = [folder / "model.safetensors" for folder in (written.folder, tmp_path / "saved")]
    ours, theirs = map(load_file, files)
    assert ours.keys() == theirs.keys()
    configs = [json.loads(file.with_name("config.json").read_text()) for file in files]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("make", [tiny_prophetnet, tiny_deberta, tiny_marian])
def test_modules_read_the_weights_of_others(make, tmp_path):
    """The folder is compared as it runs from disk: an embedding's weight is there for all."""
    model = qrefta.prepare(make(), rank=4, progress=False)
    written = qrefta.merge(model, torch.float32, out=tmp_path / "out")
    assert written.difference < 1e-5
    loaded = type(model).from_pretrained(written.folder)
    assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_a_damaged_tensor_is_seen_from_disk(tmp_path, monkeypatch):
    """The comparison reads the written bytes, not the model's."""
    write = export.write_model

    def write_and_damage(model, folder, *args, **options):
        write(model, folder, *args, **options)
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-4096:] = bytes(4096)
        file.write_bytes(data)

    monkeypatch.setattr(export, "write_model", write_and_damage)
    with pytest.raises(ValueError, match="differ from the model's by"):
        qrefta.merge(prepared("bert"), torch.float32, out=tmp_path / "out", tolerance=1e-3)
    assert not list(tmp_path.iterdir())


def test_writing_holds_a_shard_and_a_linear_at_a_time(tmp_path):
    """About a tenth of the dense model's 4.7 MB is held, comparison included.

    Mapped files are not counted: the system may drop their pages.
    """
    sizes = {
        "vocab_size": 64,
        "hidden_size": 128,
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
    }
    sizes |= {"intermediate_size": 256, "num_key_value_heads": 2}
    model = qrefta.prepare(build(LlamaForCausalLM, LlamaConfig(**sizes)), rank=4, refine=0)
    peak = added_peak(
        lambda: qrefta.merge(model, torch.float32, out=tmp_path / "out", max_shard_size="100KB")
    )
    dense = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert dense > 4_700_000
    assert peak < 0.2 * dense


def test_other_files_of_the_folder_are_copied(tmp_path):
    tiny_folder(tmp_path / "dense")
    qrefta.prepare_checkpoint(tmp_path / "dense", tmp_path / "4bit", rank=4, progress=False)
    written = qrefta.merge(qrefta.load(tmp_path / "4bit"), out=tmp_path / "merged").folder
    names = {path.name for path in (tmp_path / "dense").iterdir()}
    assert {path.name for path in written.iterdir()} == names | {"README.md"}
    assert (written / "tokenizer.json").read_text() == (
        tmp_path / "dense" / "tokenizer.json"
    ).read_text()


def test_logits_that_differ_too_much_leave_nothing(tmp_path):
    model = prepared("bert")
    with pytest.raises(
        ValueError, match=r"differ from the model's by 0\.0.* and 1e-06 are allowed"
    ):
        qrefta.merge(model, out=tmp_path / "out", tolerance=1e-6)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="exists and is not empty"):
        qrefta.merge(model, out=tmp_path.parent)
    assert is_prepared(model)


def test_invalid_generation_settings_are_found_before_a_tensor_is_written(tmp_path, monkeypatch):
    """A temperature without sampling, which transformers does not save."""
    model = prepared("llama_gqa")
    model.generation_config.temperature = 0.5
    written = []
    monkeypatch.setattr(write.ShardWriter, "add", lambda *given: written.append(given))
    with pytest.raises(ValueError, match="temperature"):
        qrefta.merge(model, out=tmp_path / "out")
    assert written == []
    assert not list(tmp_path.iterdir())


def with_added_tokens(folder):
    """A prepared language model and its tokenizer, both with tokens that its folder has not."""
    tiny_llama().save_pretrained(folder)
    words = language_tokenizer()
    words.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    words.add_tokens(["<tool>", "</tool>"])
    model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
    return qrefta.prepare(model, progress=False), words


def test_tokens_added_in_memory_are_in_the_written_tokenizer(tmp_path):
    """Given as `tokenizer`; else a note names the difference."""
    model, words = with_added_tokens(tmp_path / "dense")
    for name, export_to in (
        ("merged", lambda out, **given: qrefta.merge(model, out=out, **given)),
        ("lora", lambda out, **given: qrefta.export_lora(model, out, **given)),
    ):
        written = export_to(tmp_path / name, tokenizer=words)
        assert not any("tokens were added" in note for note in written.notes)
        for folder in {written.folder, *written.folder.glob("base")}:
            read = AutoTokenizer.from_pretrained(folder)
            assert read("<tool>")["input_ids"] == [VOCAB]
        without = export_to(tmp_path / f"{name}-without")
        (note,) = [note for note in without.notes if "tokens were added" in note]
        assert f"has {VOCAB + 8} tokens, and {VOCAB} in {tmp_path / 'dense'}" in note


def test_a_model_with_more_embeddings_than_tokens_has_no_note(tmp_path):
    """Sizes of embeddings are often rounded up."""
    tiny_llama().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    model = qrefta.prepare(LlamaForCausalLM.from_pretrained(tmp_path / "dense"), progress=False)
    assert len(tiny_tokenizer()) < VOCAB
    assert qrefta.merge(model, out=tmp_path / "out").notes == []
    assert qrefta.merge(model, out=tmp_path / "given", tokenizer=tiny_tokenizer()).notes == []


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    model = prepared("llama_gqa")
    words = language_tokenizer()
    words.add_tokens(["<tool>"])
    for export_to in (
        lambda: qrefta.merge(model, out=tmp_path / "out", tokenizer=words),
        lambda: qrefta.export_lora(model, tmp_path / "out", tokenizer=words),
    ):
        with pytest.raises(ValueError, match=f"number {VOCAB} and the model's vocabulary {VOCAB} "):
            export_to()
    assert not list(tmp_path.iterdir())
