"""LoRA exports: as PEFT loads them, on every base, against the dense definition."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from bitsandbytes.cextension import lib
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SwiftFormerConfig,
    SwiftFormerForImageClassification,
)

import qrefta
from qrefta.config.stack import BANK
from qrefta.export import lora
from qrefta.export.compare import output_difference, outputs
from qrefta.export.examples import example_inputs
from qrefta.export.lora import _notes
from qrefta.model.prepared import prepared_config
from qrefta.nn.linear import AdaptedLinear
from tests.export.test_merge import FLOAT32_ROUTERS, prepared_in_bf16, routers, take_steps
from tests.language import write_gguf
from tests.models import (
    ARCHITECTURES,
    VOCAB,
    build,
    decoder_sizes,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_whisper,
    towers,
)

MIXED = {"bits": "auto", "target_bits": 4.6}
ADAPTER = "adapter_model.safetensors"
WRONG_WITH_AVX512 = pytest.mark.skipif(
    not lib.has_avx512f_cpu(), reason="the other kernel is right"
)


def trained(folder, architecture=tiny_bert, hidden=32, steps=3, **settings):
    """A model prepared from a folder, with factors and head moved away from their start."""
    original = architecture() if hidden is None else architecture(hidden=hidden)
    original.save_pretrained(folder)
    settings = {"method": "refta", "rank": 5, "refine": 0} | settings
    return take_steps(qrefta.prepare(type(original).from_pretrained(folder), **settings), steps)


def one_key_head(hidden):
    """Keys and values of 16 features, where hidden is 64."""
    return build(
        LlamaForCausalLM, LlamaConfig(**decoder_sizes(hidden) | {"num_key_value_heads": 1})
    )


def through_peft(model, folder, source, **kwargs):
    """Outputs of the base with the adapter, as PEFT loads both."""
    base = type(model).from_pretrained(source, **kwargs)
    return outputs(PeftModel.from_pretrained(base, folder), example_inputs(model))


@pytest.mark.parametrize("make", FLOAT32_ROUTERS)
@pytest.mark.parametrize("base", ["residual", "residual-4bit", "original"])
def test_tokens_keep_their_experts_on_the_base(make, base, tmp_path, monkeypatch):
    """The class of the model keeps the weights of routers in float32 in bf16 models too."""
    compared = []
    monkeypatch.setattr(lora, "with_adapter", lambda bare, folder: bare)
    # bitsandbytes cannot run layers as narrow as these on a CPU
    monkeypatch.setattr(lora, "_difference", lambda _, bare, *__: compared.append(bare) or 0.0)
    targets = ["self_attn.o_proj"]
    model = prepared_in_bf16(make, tmp_path / "dense", target_modules=targets)
    qrefta.export_lora(model, tmp_path / "out", base)
    (bare,) = compared
    assert bare.dtype == torch.bfloat16
    for name, tensor in routers(model).items():
        assert_close(routers(bare)[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_float32_residual_and_its_lora_are_the_trained_model(architecture, tmp_path):
    """Nothing is approximated on the residual; the reported difference is PEFT's."""
    model = trained(tmp_path / "original", ARCHITECTURES[architecture], hidden=None)
    expected = outputs(model, example_inputs(model))
    written = qrefta.export_lora(model, tmp_path / "lora", dtype=torch.float32)
    assert written.difference < 2e-5
    assert written.weight_error == 0
    assert_close(
        through_peft(model, tmp_path / "lora", tmp_path / "lora" / "base"),
        expected,
        rtol=1e-4,
        atol=1e-4,
    )
    assert torch.equal(outputs(model, example_inputs(model)), expected)  # the model does not change


@pytest.mark.parametrize("method", ["craft", "lotr", "lorta", "windows"])
def test_other_methods_are_exact_too(method, tmp_path):
    model = trained(tmp_path / "original", method=method)
    assert qrefta.export_lora(model, tmp_path / "lora", dtype=torch.float32).difference < 2e-5


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama, tiny_gpt2, tiny_t5])
def test_the_4_bit_base_holds_the_same_bits(build, tmp_path):
    """transformers and bitsandbytes read the same residual; they want T5's `wo` dense."""
    model = trained(tmp_path / "original", build, hidden=64, double_quant=build is tiny_llama)
    written = qrefta.export_lora(model, tmp_path / "lora", "residual-4bit")
    assert written.difference < 0.04  # bf16; up to 0.029 measured
    stored = load_file(tmp_path / "lora" / "base" / "model.safetensors")
    layers = {
        path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)
    }
    packed = [path for path in layers if f"{path}.weight.absmax" in stored]
    assert packed
    assert all("wo" in path for path in layers if path not in packed)
    for path in packed:
        assert torch.equal(
            stored[f"{path}.weight"].flatten(), layers[path].weight.view(torch.uint8)
        )


@pytest.mark.parametrize(
    ("method", "settings"), [("refta", {}), ("craft", {}), ("refta", {"bits": 16})]
)
def test_on_the_original_the_lora_is_the_change_by_training(method, settings, tmp_path):
    """Every layer against Delta minus its start.

    The start comes from splitting again, or from the prepared folder.
    """
    original = tiny_bert()
    original.save_pretrained(tmp_path / "original")
    model = qrefta.prepare(
        type(original).from_pretrained(tmp_path / "original"),
        rank=5,
        refine=1,
        method=method,
        **settings,
    )
    model.save_pretrained(tmp_path / "start")
    layers = [
        (path, layer) for path, layer in model.named_modules() if isinstance(layer, AdaptedLinear)
    ]
    start = {path: layer.factors.delta(layer._adapter[2]) for path, layer in layers}
    take_steps(model)
    written = qrefta.export_lora(model, tmp_path / "lora", "original", dtype=torch.float32)
    assert written.difference < (1e-4 if settings else 0.2)
    assert written.weight_error == 0
    adapter = load_file(tmp_path / "lora" / ADAPTER)
    for path, layer in layers:
        stem = f"base_model.model.{path}"
        lora = adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
        assert_close(
            lora, layer.factors.delta(layer._adapter[2]) - start[path], rtol=1e-4, atol=1e-6
        )
    given = qrefta.export_lora(
        model, tmp_path / "given", "original", start=tmp_path / "start", dtype=torch.float32
    )
    again = load_file(given.folder / ADAPTER)
    assert all(torch.equal(again[name], tensor) for name, tensor in adapter.items())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "original")
    assert any("weights in NF4" in note for note in written.notes) == (not settings)
    found = through_peft(model, tmp_path / "lora", tmp_path / "original")
    expected = outputs(model, example_inputs(model))
    assert ((found - expected).norm() / expected.norm()).item() == pytest.approx(
        written.difference, rel=0.05, abs=1e-5
    )


def test_a_change_is_cut_to_the_nearest_of_a_rank(tmp_path):
    model = trained(tmp_path / "original")
    exact = qrefta.export_lora(model, tmp_path / "exact", "original", dtype=torch.float32)
    cut = qrefta.export_lora(model, tmp_path / "cut", "original", rank=2, dtype=torch.float32)
    whole, part = (load_file(written.folder / ADAPTER) for written in (exact, cut))
    missing = norm = 0.0
    for name in (name for name in whole if name.endswith("lora_A.weight")):
        other = name.replace("lora_A", "lora_B")
        change, kept = (
            adapter[other].double() @ adapter[name].double() for adapter in (whole, part)
        )
        assert part[name].shape[0] == 2
        assert_close(
            (change - kept).square().sum(),
            torch.linalg.svdvals(change)[2:].square().sum(),
            rtol=1e-3,
            atol=0,
        )
        missing = missing + (change - kept).square().sum()
        norm = norm + change.square().sum()
    assert cut.weight_error == pytest.approx((missing / norm).item(), rel=1e-3)


def test_a_start_that_is_another_is_refused(tmp_path):
    """Another split, a calibrated one, or a start that its settings do not give."""
    model = trained(tmp_path / "original")
    other = qrefta.prepare(
        type(model).from_pretrained(tmp_path / "original"), method="refta", rank=5, refine=2
    )
    with pytest.raises(
        ValueError, match=r"packed weights of bert.* differ from the start's.*as `start`"
    ):
        qrefta.export_lora(model, tmp_path / "lora", "original", start=other)
    prepared_config(model).calibrated = True
    with pytest.raises(
        ValueError, match=r"was calibrated, .*; give the prepared model before training"
    ):
        qrefta.export_lora(model, tmp_path / "lora", "original")
    config = prepared_config(model)
    config.calibrated = False
    config.settings = replace(config.settings, refine=1)
    with pytest.raises(ValueError, match="differ from the start's"):
        qrefta.export_lora(model, tmp_path / "lora", "original")
    assert not (tmp_path / "lora").exists()


@pytest.mark.slow
def test_tera_is_cut_to_a_rank_and_reports_the_missing_part(tmp_path):
    model = trained(tmp_path / "original", method="tera", rank=8, steps=30)
    deltas = [
        m.factors.delta(m._adapter[2]) for m in model.modules() if isinstance(m, AdaptedLinear)
    ]
    missing = sum(torch.linalg.svdvals(delta.double())[4:].square().sum() for delta in deltas)
    norm = sum(delta.double().square().sum() for delta in deltas)
    errors = [
        qrefta.export_lora(model, tmp_path / str(rank), rank=rank, dtype=torch.float32).weight_error
        for rank in (4, 16, 32)
    ]
    assert errors[0] == pytest.approx((missing / norm).item(), rel=0.02)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10


def test_a_cut_rank_gets_the_tolerance_of_an_approximation(tmp_path):
    """The error is larger than by rounding, for which the bound is 0.15."""
    model = trained(tmp_path / "original", method="tera", rank=8, steps=0)
    with torch.no_grad():
        for seed, factors in enumerate(getattr(model, BANK).values()):
            drawn = torch.randn(factors.scales.shape, generator=torch.Generator().manual_seed(seed))
            factors.scales += 0.5 * drawn
    assert 0.15 < qrefta.export_lora(model, tmp_path / "lora", rank=1).difference < 0.5


def test_ranks_that_differ_are_in_the_pattern(tmp_path):
    model = trained(tmp_path / "original", rank=qrefta.RankBudget(bytes="20KB"))
    written = qrefta.export_lora(model, tmp_path / "lora", dtype=torch.float32)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert written.difference < 2e-5
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert any("different ranks" in note for note in written.notes)


def test_a_model_of_speech_names_no_task(tmp_path):
    """PEFT's wrapper of a task gives the model input_ids, which its decoder may take for its
    tokens (Canary).
    """
    qrefta.export_lora(trained(tmp_path / "dense", tiny_whisper), tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["task_type"] is None


def test_a_model_that_peft_does_not_take_is_refused(tmp_path, monkeypatch):
    """PEFT asks some models of speech for embeddings of tokens, which they do not have."""

    def ask(*_):
        raise NotImplementedError("no embeddings")

    model = trained(tmp_path / "dense", tiny_whisper)
    monkeypatch.setattr(PeftModel, "from_pretrained", ask)
    with pytest.raises(ValueError, match=r"PEFT takes no WhisperFor\w+ \(no embeddings\); merge"):
        qrefta.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_targets_alone_are_adapted(tmp_path):
    model = trained(tmp_path / "original", tiny_llama, target_modules=["q_proj", "v_proj"])
    qrefta.export_lora(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert config["task_type"] == "CAUSAL_LM"
    assert len(load_file(tmp_path / "lora" / ADAPTER)) == 2 * 2 * 3


def test_targets_whose_names_others_share_are_named_by_their_paths(tmp_path):
    """BERT has three linear layers named dense in a block, and one in the pooler."""
    model = trained(tmp_path / "original", target_modules=["intermediate.dense"])
    assert qrefta.export_lora(model, tmp_path / "lora", dtype=torch.float32).difference < 2e-5
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert all(path.endswith("intermediate.dense") for path in config["target_modules"])


def test_a_head_that_trained_is_in_the_adapter_and_said(tmp_path):
    model = trained(tmp_path / "original")
    written = qrefta.export_lora(model, tmp_path / "lora")
    adapter = load_file(tmp_path / "lora" / ADAPTER)
    assert torch.equal(adapter["base_model.model.classifier.weight"], model.classifier.weight)
    assert any("trained in full are in the adapter (classifier)" in note for note in written.notes)


def test_a_head_whose_name_blocks_have_too_is_in_the_adapter_with_them(tmp_path):
    """SwiftFormer's head begins with a `norm`, and PEFT takes every module that is called so."""
    config = SwiftFormerConfig(
        image_size=32, embed_dims=[8, 16, 16, 16], depths=[1, 1, 2, 2], num_labels=3
    )
    model = qrefta.prepare(build(SwiftFormerForImageClassification, config), rank=2)
    exported = qrefta.export_lora(model, tmp_path / "lora", dtype=torch.float32)
    assert exported.difference < 1e-5
    names = load_file(tmp_path / "lora" / ADAPTER)
    assert "base_model.model.norm.weight" in names
    assert any(".blocks.0." in name and name.endswith("norm.weight") for name in names)


def test_a_rank_too_large_for_servers_is_noted(tmp_path):
    model = trained(tmp_path / "original", tiny_llama, rank=5)
    assert qrefta.export_lora(model, tmp_path / "lora").notes == []
    wide = trained(
        tmp_path / "wide",
        tiny_bert,
        hidden=256,
        rank=520,
        steps=1,
        target_modules=["query"],
        refine=0,
    )
    assert any(
        "rank 520 is beyond" in note for note in qrefta.export_lora(wide, tmp_path / "out").notes
    )
    assert not any("beyond" in note for note in _notes(prepared_config(wide), [512], "residual"))


def test_an_export_leaves_the_random_numbers_alone(tmp_path):
    model = trained(tmp_path / "dense", tiny_llama)
    state = torch.get_rng_state()
    qrefta.export_lora(model, tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), state)


# Errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"base": "merged"},
            r"base is 'merged'; it must be one of residual, residual-4bit, original",
        ),
        ({"rank": 0}, "rank is 0; it must be a whole number, 1 or more"),
        ({"dtype": torch.int8}, r"dtype is torch.int8; it must be a floating type"),
        (
            {"tolerance": 1e-4},
            r"differ from the model's by .* and 0.0001 are allowed; nothing was kept",
        ),
    ],
)
def test_a_refused_export_leaves_nothing(settings, message, tmp_path):
    model = trained(tmp_path / "original")
    with pytest.raises(ValueError, match=message):
        qrefta.export_lora(model, tmp_path / "lora", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


@pytest.mark.parametrize("settings", [{"bits": 16}, {"bits": 3}, {"quant_type": "int4"}, MIXED])
def test_formats_unknown_to_bitsandbytes_are_refused_in_4_bits(settings, tmp_path):
    model = trained(tmp_path / "original", **settings)
    with pytest.raises(
        ValueError, match=r'bitsandbytes has no format for residuals in .*; give base="residual"'
    ):
        qrefta.export_lora(model, tmp_path / "lora", "residual-4bit")
    assert qrefta.export_lora(model, tmp_path / "lora").difference < 0.04


@pytest.mark.parametrize(
    ("packs", "architecture", "hidden", "message"),
    [
        pytest.param(
            False, tiny_llama, 96, "The logits of the written model differ", marks=WRONG_WITH_AVX512
        ),
        (True, tiny_llama, 96, r"bitsandbytes fails on the written model \(shape"),
        (
            True,
            one_key_head,
            64,
            r"bitsandbytes fails on the written model \(N must be divisible by block_n",
        ),
    ],
)
def test_sizes_that_bitsandbytes_gets_wrong_on_a_cpu_are_refused(
    tmp_path, monkeypatch, packs, architecture, hidden, message
):
    """bitsandbytes' CPU kernel (0.50) is wrong for widths of 96.

    With AVX512-BF16 it repacks weights.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: packs)
    model = trained(tmp_path / "original", architecture, hidden)
    with pytest.raises(ValueError, match=rf'{message}.*; nothing was kept\. Give base="residual"'):
        qrefta.export_lora(model, tmp_path / "lora", "residual-4bit")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_another_original_is_refused(tmp_path):
    model = trained(tmp_path / "original")
    tiny_bert(hidden=64).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"has no bert.*query.weight .*; give the model that was prepared"
    ):
        qrefta.export_lora(model, tmp_path / "lora", "original", original=tmp_path / "other")
    unnamed = qrefta.prepare(tiny_bert(), rank=5)
    with pytest.raises(
        ValueError, match="does not name the model that it was prepared from; give it as `original`"
    ):
        qrefta.export_lora(unnamed, tmp_path / "lora", "original")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bits": 16},
        {"quant_type": "int4"},
        {"method": "tera", "rank": 8},
        {"calibration": True},
    ],
    ids=["windows", "16-bits", "int4", "tera", "calibrated"],
)
def test_another_original_of_the_same_shape_is_refused(settings, tmp_path):
    """Factors that start from zero are without a trace of it; the quantization error has one.

    The other is the same model after a fine-tuning that moves its weights by 1 %.
    """
    if settings.get("calibration"):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, VOCAB, (8, 4, 16), generator=generator)
        settings = {"calibration": [{"input_ids": rows} for rows in ids]}
    settings = {"method": "windows", "rank": "auto", "refine": None} | settings
    model = trained(tmp_path / "original", tiny_llama, **settings)
    assert qrefta.export_lora(model, tmp_path / "lora", "original").difference < 0.5
    other = LlamaForCausalLM.from_pretrained(tmp_path / "original")
    for name, parameter in other.named_parameters():
        if name.endswith("up_proj.weight"):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.data += 0.01 * noise * parameter.data.std()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"up_proj are .*: it was prepared from another"):
        qrefta.export_lora(model, tmp_path / "out", "original", original=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_another_original_is_refused_with_a_start_too(tmp_path):
    model = trained(tmp_path / "original", rank=5, refine=2)
    start = qrefta.prepare(
        type(model).from_pretrained(tmp_path / "original"), method="refta", rank=5, refine=2
    )
    qrefta.export_lora(model, tmp_path / "lora", "original", start=start)
    other = type(model).from_pretrained(tmp_path / "original")
    for parameter in other.parameters():
        parameter.data *= 1.01
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="it was prepared from another model"):
        qrefta.export_lora(
            model, tmp_path / "out", "original", original=tmp_path / "other", start=start
        )


@pytest.mark.parametrize("bits", [4, 16])
def test_a_model_prepared_in_float32_and_loaded_in_bf16_takes_its_original(bits, tmp_path):
    model = trained(
        tmp_path / "original", tiny_llama, bits=bits, method="windows", rank="auto", refine=None
    )
    model.save_pretrained(tmp_path / "prepared")
    narrow = LlamaForCausalLM.from_pretrained(tmp_path / "prepared", dtype=torch.bfloat16)
    assert qrefta.export_lora(narrow, tmp_path / "lora", "original").difference < 0.5


def test_a_dense_start_or_one_with_other_settings_is_refused(tmp_path):
    model = trained(tmp_path / "original")
    dense = type(model).from_pretrained(tmp_path / "original")
    with pytest.raises(ValueError, match=r"start is a BertFor\w+ that is not prepared; give the"):
        qrefta.export_lora(model, tmp_path / "lora", "original", start=dense)
    others = {
        "bits 16 and the model with 4": {"rank": 5, "method": "refta", "bits": 16},
        "method 'craft' and the model with 'refta'": {"rank": 5, "method": "craft"},
        "other linear layers, ranks or bits": {"rank": 3, "method": "refta"},
    }
    for message, settings in others.items():
        start = qrefta.prepare(
            type(model).from_pretrained(tmp_path / "original"), refine=0, **settings
        )
        with pytest.raises(ValueError, match=message):
            qrefta.export_lora(model, tmp_path / "lora", "original", start=start)
    assert not (tmp_path / "lora").exists()


def test_the_original_may_be_a_gguf_file(tmp_path):
    """The card says how its base is loaded."""
    pytest.importorskip("gguf")
    file = write_gguf(tmp_path / "dense").path
    model = qrefta.prepare(LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name))
    take_steps(model)
    written = qrefta.export_lora(model, tmp_path / "lora", "original", dtype=torch.float32)
    assert written.difference < 0.5
    card = (written.folder / "README.md").read_text()
    assert f'from_pretrained("{file.parent}", gguf_file="tiny.gguf")' in card
    base = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    found = outputs(PeftModel.from_pretrained(base, written.folder), example_inputs(model))
    expected = outputs(model, example_inputs(model))
    assert output_difference(found, expected) == pytest.approx(written.difference, rel=0.01)


def test_a_decoder_that_takes_images_is_a_causal_language_model(tmp_path):
    """T5's class ends in the same word, and is not."""
    model = qrefta.prepare(tiny_llava(), progress=False)
    batch = {"input_ids": torch.randint(2, 90, (2, 8)), "attention_mask": torch.ones(2, 8).long()}
    qrefta.export_lora(model, tmp_path / "lora", inputs=batch)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    qrefta.export_lora(trained(tmp_path / "t5", tiny_t5), tmp_path / "t5-lora")
    config = json.loads((tmp_path / "t5-lora" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"


def tiny_llava():
    vision = towers(16)["vision_config"]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**decoder_sizes(32)),
        image_token_index=VOCAB - 1,
        vision_feature_layer=-1,
    )
    return build(LlavaForConditionalGeneration, config)


def test_a_full_folder_a_dense_model_and_no_factors_are_refused(tmp_path):
    model = trained(tmp_path / "original")
    with pytest.raises(ValueError, match="original exists and is not empty"):
        qrefta.export_lora(model, tmp_path / "original")
    with pytest.raises(ValueError, match="is not prepared"):
        qrefta.export_lora(tiny_bert(), tmp_path / "lora")


def test_without_peft_the_error_names_the_package_to_install(tmp_path, monkeypatch):
    model = trained(tmp_path / "original")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        qrefta.export_lora(model, tmp_path / "lora")


def resized(folder, tokens=VOCAB + 8):
    """A dense model with more tokens than its folder has."""
    tiny_llama(hidden=64).save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_an_original_without_the_added_tokens_is_named(before, tmp_path):
    """Its embeddings would be drawn at random. A resized folder serves."""
    model = resized(tmp_path / "dense")
    model.save_pretrained(tmp_path / "larger")
    if not before:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    model = qrefta.prepare(model, rank=4, progress=False)
    if not before:
        wider = LlamaForCausalLM.from_pretrained(tmp_path / "larger")
        model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
        model.get_input_embeddings().load_state_dict(wider.get_input_embeddings().state_dict())
        model.get_output_embeddings().load_state_dict(wider.get_output_embeddings().state_dict())
    cause = rf"embed_tokens.weight is \[{VOCAB + 8}, 64\] .* and \[{VOCAB}, 64\] in .*dense"
    with pytest.raises(ValueError, match=cause):
        qrefta.export_lora(model, tmp_path / "out", "original", original=tmp_path / "dense")
    assert not (tmp_path / "out").exists()
    options = {"original": tmp_path / "larger", "dtype": torch.float32}
    written = qrefta.export_lora(model, tmp_path / "out", "original", **options)
    assert written.difference < 0.5
    qrefta.export_lora(model, tmp_path / "residual", "residual", dtype=torch.float32)


def test_resized_embeddings_in_the_adapter_are_noted(tmp_path):
    trained = ["embed_tokens", "lm_head"]
    model = qrefta.prepare(resized(tmp_path / "dense"), modules_to_save=trained, progress=False)
    written = qrefta.export_lora(model, tmp_path / "out", "original", dtype=torch.float32)
    assert any("give the base the model's shape before PEFT" in note for note in written.notes)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    base.resize_token_embeddings(VOCAB + 8)
    loaded = PeftModel.from_pretrained(base, written.folder)
    batch = {"input_ids": torch.arange(VOCAB, VOCAB + 8).view(1, 8)}
    assert output_difference(outputs(loaded, batch), outputs(model, batch)) < 0.5
