"""Uses of a model besides training: each works, or the error says which call to use."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, GPT2LMHeadModel

import qrefta
from qrefta._compat.transformers import enable_checkpointing
from qrefta.nn.linear import AdaptedLinear
from tests.models import inputs, logits, tiny_bert


@pytest.fixture
def model():
    """Prepared, with factors that have moved since."""
    prepared = qrefta.prepare(tiny_bert(), rank=4, refine=0, progress=False)
    with torch.no_grad():
        for parameter in prepared.parameters():
            if parameter.requires_grad:
                parameter += 0.01
    return prepared


def bytes_of(model):
    state = model.state_dict()
    return {
        name: (tensor.dtype, tensor.view(torch.uint8).numpy().tobytes())
        for name, tensor in state.items()
    }


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), by_torch_save]
)
def test_a_copy_is_equal_and_on_its_own(model, copied):
    """Its layers use the copy's factors: training the copy leaves the original, and it saves, as a
    prepared model does.
    """
    before = bytes_of(model)
    other = copied(model)
    assert torch.equal(logits(other), logits(model))
    trained = [parameter for parameter in other.parameters() if parameter.requires_grad]
    assert len(trained) == sum(parameter.requires_grad for parameter in model.parameters())
    other(**inputs(other)).logits.sum().backward()
    torch.optim.SGD(trained, lr=0.1).step()
    assert not torch.equal(logits(other), logits(model))
    assert bytes_of(model) == before
    assert qrefta.quant_report(other) == qrefta.quant_report(model)


def test_a_copy_saves_and_loads(model, tmp_path):
    copy.deepcopy(model).save_pretrained(tmp_path)
    assert torch.equal(logits(qrefta.load(tmp_path)), logits(model))


def test_a_state_dict_goes_through_torch_save(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = qrefta.prepare(tiny_bert(), rank=4, refine=0, progress=False)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(other), logits(model))


def test_a_state_dict_of_another_rank_or_of_a_dense_model_is_refused(model):
    before = bytes_of(model)
    with pytest.raises(RuntimeError, match=r"size mismatch for qrefta_factors\.stack0\.A"):
        model.load_state_dict(
            qrefta.prepare(tiny_bert(), rank=5, refine=0, progress=False).state_dict()
        )
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(tiny_bert().state_dict())
    assert {name: kind for name, (kind, _) in bytes_of(model).items()} == {
        name: kind for name, (kind, _) in before.items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_near_and_leaves_the_packed_bytes(model, dtype):
    expected, packed = (
        logits(model),
        {n: t for n, t in bytes_of(model).items() if t[0] is torch.int8},
    )
    model.to(dtype)
    assert (logits(model).double() - expected).abs().max() < 0.02 * expected.abs().max()
    assert {name: kept for name, kept in bytes_of(model).items() if kept[0] is torch.int8} == packed


def test_casts_that_transformers_keeps_from_quantized_models_are_refused(model):
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="not supported for quantized"):
            cast()
    with pytest.raises(TypeError, match="only accepts floating point"):
        model.to(torch.int8)


def test_frozen_numbers_that_are_made_to_require_gradients_get_none(model):
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    model(**inputs(model)).logits.sum().backward()
    layers = [layer for layer in model.modules() if isinstance(layer, AdaptedLinear)]
    assert all(layer.bias.grad is not None for layer in layers)  # which may train
    assert all(
        parameter.grad is None
        for layer in layers
        for name, parameter in layer.named_parameters()
        if name != "bias"
    )
    for unfreeze in (lambda model: model.requires_grad_(True), unfreeze_one_by_one):
        with pytest.raises(ValueError, match=r"bytes and cannot train.*is_floating_point"):
            unfreeze(model)


def unfreeze_one_by_one(model):
    for parameter in model.parameters():
        parameter.requires_grad = True


def test_a_model_that_is_frozen_whole_still_computes(model):
    batch = inputs(model)
    expected = logits(model)
    model.requires_grad_(False)
    assert torch.equal(logits(model), expected)
    assert not model(**batch).logits.requires_grad


def test_preparing_twice_and_merging_twice_are_refused_and_change_nothing(model):
    before = bytes_of(model)
    with pytest.raises(ValueError, match=r"already prepared; call qrefta\.merge"):
        qrefta.prepare(model, rank=2)
    assert bytes_of(model) == before
    dense = qrefta.merge(model)
    for function in (qrefta.merge, qrefta.quant_report):
        with pytest.raises(ValueError, match="is not prepared"):
            function(dense)


def test_a_model_merged_between_two_steps_is_dense_and_trains_whole(model):
    """The optimizer's factors are no part of it any more."""
    batch = inputs(model)
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1
    )
    model.train()(**batch).logits.sum().backward()
    dense = qrefta.merge(model, dtype=torch.float32)
    before = dense.bert.encoder.layer[0].attention.self.query.weight.clone()
    optimizer.step()
    assert torch.equal(dense.bert.encoder.layer[0].attention.self.query.weight, before)
    dense(**batch).logits.sum().backward()
    assert all(
        parameter.grad is not None for parameter in dense.parameters() if parameter.requires_grad
    )


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 1e-5), (4, 0.2)])
def test_prepared_merged_and_prepared_again(model, bits, tolerance):
    """Three times, by merging in float32: the same up to the residuals' quantization."""
    expected = logits(model)
    for _ in range(3):
        model = qrefta.prepare(
            qrefta.merge(model, dtype=torch.float32), bits=bits, rank=4, refine=0, progress=False
        )
    assert (logits(model) - expected).abs().max() < tolerance * expected.abs().max()


def test_two_models_in_one_process_do_not_touch(model):
    before = bytes_of(model)
    other = qrefta.prepare(
        tiny_bert(hidden=64), rank=3, quant_type="int4", refine=0, progress=False
    )
    expected = logits(model)
    other(**inputs(other)).logits.sum().backward()
    torch.optim.SGD(
        [parameter for parameter in other.parameters() if parameter.requires_grad], lr=1.0
    ).step()
    assert bytes_of(model) == before
    assert torch.equal(logits(model), expected)


def test_a_prepared_folder_in_another_class_or_with_another_config_says_so(model, tmp_path):
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)  # the same blocks without the head
    assert torch.equal(bare(**inputs(model))[0], model.bert(**inputs(model))[0])
    AutoModelForMaskedLM.from_pretrained(tmp_path)  # another head, which is fresh
    with pytest.raises((ValueError, RuntimeError, OSError)):
        AutoModel.from_pretrained(tmp_path, hidden_size=16)
    with pytest.raises(ValueError, match="GPT2"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def test_copies_of_data_parallel_are_refused(model):
    """torch marks them; with one device or none DataParallel makes none."""
    batch = inputs(model)
    assert torch.equal(nn.DataParallel(model)(**batch).logits, logits(model))
    layer = next(layer for layer in model.modules() if isinstance(layer, AdaptedLinear))
    with pytest.raises(ValueError, match="one process a GPU"):
        layer._replicate_for_data_parallel()(torch.ones(1, layer.in_features))


def test_a_lora_on_top_is_refused_and_dequantize_names_merge(model):
    with pytest.raises(ValueError, match="AdaptedLinear"):
        get_peft_model(model, LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"qrefta\.merge"):
        model.dequantize()


def test_a_model_inside_pefts_is_not_saved_under_other_names(model, tmp_path):
    adapted = get_peft_model(model, LoraConfig(target_modules=["classifier"]))
    with pytest.raises(ValueError, match=r"carries PEFT adapters; call merge_and_unload\(\)"):
        adapted.get_base_model().save_pretrained(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(qrefta.load(tmp_path / "whole")), logits(merged))


@pytest.mark.parametrize("options", [{}, {"use_gradient_checkpointing": False}])
def test_preparing_for_kbit_training_is_refused_and_freezes_no_factors(model, options):
    """A habit from QLoRA; the optimizer would get no parameter."""
    before = model.num_parameters(only_trainable=True)
    with pytest.raises(ValueError, match="Leave the call out: a prepared model is ready"):
        prepare_model_for_kbit_training(model, **options)
    assert model.num_parameters(only_trainable=True) == before


def test_peft_on_other_layers_freezes_the_factors_and_the_first_step_says_so(model):
    adapted = get_peft_model(model, LoraConfig(target_modules=["classifier"]))
    with pytest.warns(UserWarning, match=r"6 of 6 stacks are frozen.*get_peft_model"):
        adapted.train()(**inputs(model))


@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}])
def test_checkpointing_before_preparing_works_unless_it_is_reentrant(options):
    dense = tiny_bert().train()
    enable_checkpointing(dense, options or None)
    model = qrefta.prepare(dense, rank=4, refine=0, progress=False)
    model(**inputs(model)).logits.sum().backward()
    assert all(
        parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad
    )


def test_reentrant_checkpointing_before_preparing_is_refused_and_changes_nothing():
    dense = tiny_bert()
    before = bytes_of(dense)
    enable_checkpointing(dense, {"use_reentrant": True})
    with pytest.raises(ValueError, match=r"use_reentrant=True.*gradient_checkpointing_disable"):
        qrefta.prepare(dense, rank=4, refine=0, progress=False)
    assert bytes_of(dense) == before


@pytest.mark.parametrize("made_inside", [True, False])
def test_inference_mode_is_refused_and_no_grad_is_not(made_inside):
    with torch.inference_mode(made_inside):
        model = tiny_bert()
    with (
        torch.inference_mode(not made_inside),
        pytest.raises(ValueError, match=r"under torch\.inference_mode\(\).*no_grad\(\) is allowed"),
    ):
        qrefta.prepare(model, rank=4)
    with torch.no_grad():
        model = qrefta.prepare(tiny_bert(), rank=4)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_is_deleted_frees_its_memory_at_once(model, tmp_path):
    """Nothing refers to it in a circle, prepared or loaded: on a GPU that would wait for Python's
    collector.
    """
    model.save_pretrained(tmp_path)
    models = [qrefta.prepare(tiny_bert(), rank=4, refine=0, progress=False), qrefta.load(tmp_path)]
    seen = [weakref.ref(model) for model in models]
    gc.disable()
    try:
        models.clear()
        assert [reference() for reference in seen] == [None, None]
    finally:
        gc.enable()
