"""Modes that users turn on: each computes the same as the plain float32 passes."""

import copy
import shutil

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import qrefta
from qrefta._compat.transformers import enable_checkpointing
from qrefta.config.stack import BANK
from qrefta.hf_config import QReftaConfig
from qrefta.model.device_map import place_bank
from qrefta.model.prepared import is_prepared
from qrefta.train.arguments import training_arguments
from qrefta.train.finetune import finetune
from qrefta.train.models import load_classifier
from tests import models
from tests.models import ARCHITECTURES, VOCAB, build, decoder_sizes
from tests.tiny import color_data, tiny_folder

DECODERS = ["llama_gqa", "gpt2", "mistral", "qwen3"]
decoders = pytest.mark.parametrize("architecture", DECODERS)


@pytest.fixture
def fresh_compiler():
    """Graphs of earlier tests count towards the limit of recompilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def tokens(rows=2, length=8, seed=0):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def prepared(architecture="llama_gqa", **options):
    """Prepared, with factors that have moved since."""
    model = models.prepared(ARCHITECTURES[architecture], **({"rank": 5} | options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients(model, batch):
    """Loss, and gradients of everything that trains."""
    loss = model(input_ids=batch, labels=batch).loss
    return [loss, *torch.autograd.grad(loss, trained(model))]


def assert_same(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, **tolerance)


@decoders
@pytest.mark.parametrize("length", [8, 40], ids=["few tokens", "more tokens than features"])
def test_gradient_checkpointing_changes_no_bit(architecture, length):
    model = prepared(architecture).train()
    batch = tokens(length=length)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = gradients(model, batch)
    enable_checkpointing(model)
    assert_same(gradients(model, batch), expected, rtol=0, atol=0)


def test_a_checkpointed_model_keeps_the_inputs_of_its_blocks_only():
    """Only tensors as large as a hidden state count; the last norm keeps its input in two forms."""
    model, batch = prepared().train(), tokens(2, 16)
    enable_checkpointing(model)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    wide = {
        t.data_ptr()
        for t in kept
        if t.untyped_storage().data_ptr() not in known and t.numel() >= hidden.numel()
    }
    assert len(wide) <= model.config.num_hidden_layers + 2


# transformers 5.24 renamed it to activation_checkpointing
old_name = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")


@old_name
@pytest.mark.parametrize(
    "options", [{"use_reentrant": True}, {"preserve_rng_state": True}], ids=["asked", "default"]
)
def test_reentrant_checkpointing_is_refused_with_the_reason(options):
    model = prepared()
    with pytest.raises(ValueError, match="wrong gradients"):
        enable_checkpointing(model, options)
    enable_checkpointing(model, {"use_reentrant": False})
    model.gradient_checkpointing_disable()
    copy.deepcopy(model)


def test_a_mark_of_checkpointing_without_its_function_is_left_alone():
    """Code in a model's folder may call torch's function itself."""
    model = models.tiny_llama()
    model.model.gradient_checkpointing = True
    assert is_prepared(qrefta.prepare(model, rank=2, progress=False))


@old_name
def test_trainer_refuses_reentrant_checkpointing(tmp_path):
    arguments = TrainingArguments(
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
        report_to="none",
    )
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    with pytest.raises(ValueError, match="use_reentrant"):
        Trainer(prepared(), arguments, train_dataset=data).train()


def test_checkpointing_by_hand_gives_the_same_gradients():
    """Outside transformers nobody can refuse: in one process both kinds are right."""
    model = prepared()
    layer = model.model.layers[1].mlp
    x = torch.randn(2, 8, model.config.hidden_size)
    factors = trained(model)
    expected = torch.autograd.grad(layer(x).square().sum(), factors, allow_unused=True)
    for reentrant in (False, True):
        y = checkpoint(layer, x.clone().requires_grad_(), use_reentrant=reentrant)
        y.square().sum().backward()
        for parameter, wanted in zip(factors, expected, strict=True):
            if wanted is not None:
                assert_close(parameter.grad, wanted)
            parameter.grad = None


# 32 and 64 inputs: half a block and a whole one; few tokens, and more than features
COMPILED = [
    ({"quant_type": "nf4"}, "up_proj", 8),
    ({"quant_type": "nf4"}, "down_proj", 40),
    ({"quant_type": "fp4"}, "up_proj", 40),
    ({"quant_type": "int4"}, "down_proj", 8),
    ({"quant_type": "nf3", "bits": 3}, "up_proj", 8),
    ({"double_quant": True}, "down_proj", 40),
]


@pytest.mark.parametrize(("quant", "role", "length"), COMPILED, ids=repr)
def test_compiled_layer_has_no_graph_break_and_the_same_gradients(
    quant, role, length, fresh_compiler
):
    layer = getattr(prepared(**quant).model.layers[0].mlp, role)
    x = torch.randn(
        2, length, layer.in_features, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    leaves = [x, layer.factors.A, layer.factors.B]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).square().sum(), leaves)
    assert_same(found, torch.autograd.grad(layer(x).square().sum(), leaves))
    assert_close(compiled(x), layer(x))


@pytest.mark.slow
def test_compiled_model_has_the_same_gradients(fresh_compiler):
    config = LlamaConfig(**decoder_sizes(32, layers=2))  # the fewest that share factors
    model = qrefta.prepare(build(LlamaForCausalLM, config), rank=5, refine=0)
    batch = tokens()
    expected = gradients(model, batch)
    assert_same(gradients(torch.compile(model, backend="aot_eager"), batch), expected)


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile's default backend needs a C++ compiler"
)
@pytest.mark.parametrize("role", ["up_proj", "down_proj"])
def test_compiled_layer_runs_through_inductor(role, fresh_compiler):
    layer = getattr(prepared().model.layers[0].mlp, role)
    x = torch.randn(
        2, 8, layer.in_features, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    leaves = [x, layer.factors.A, layer.factors.B]
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    found = torch.autograd.grad(torch.compile(layer, fullgraph=True)(x).square().sum(), leaves)
    assert_same(found, expected, rtol=1e-4, atol=1e-4)


@decoders
def test_accumulated_gradients_equal_the_whole_batch(architecture):
    model = prepared(architecture)
    batch = tokens(4)
    expected = gradients(model, batch)[1:]
    for half in batch.split(2):
        (model(input_ids=half, labels=half).loss / 2).backward()
    assert_same([parameter.grad for parameter in trained(model)], expected, rtol=1e-4, atol=1e-6)


@decoders
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_the_float32_loss_and_keeps_master_gradients(architecture, dtype):
    """Relative root difference of the gradients, over 4 decoders: at most 0.030 and 0.0030."""
    model = prepared(architecture)
    batch = tokens(4, 16)
    expected = gradients(model, batch)
    with torch.autocast("cpu", dtype):
        found = gradients(model, batch)
    assert {gradient.dtype for gradient in found[1:]} == {torch.float32}
    limit = 0.05 if dtype == torch.bfloat16 else 0.006
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < limit * b.norm()


@decoders
def test_bf16_model_trains_float32_masters(architecture):
    """Measured over 4 decoders: relative root difference of the gradients at most 0.028."""
    model = prepared(architecture)
    batch = tokens(4, 16)
    expected = gradients(model, batch)
    found = gradients(model.to(torch.bfloat16), batch)
    assert {parameter.dtype for parameter in trained(model)} == {torch.float32}
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b).norm() < 0.05 * b.norm()


@decoders
def test_generating_with_a_cache_gives_the_tokens_of_the_merged_model(architecture):
    model = prepared(architecture)
    prompt = tokens(3, 5)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(prompt, use_cache=use, **options) for use in (True, False))
    assert cached.shape == (3, 17)
    assert torch.equal(cached, plain)
    assert torch.equal(qrefta.merge(model, dtype=torch.float32).generate(prompt, **options), cached)


@decoders
def test_evaluating_and_generating_between_steps_changes_no_bit(architecture):
    def train(look):
        model = prepared(architecture)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        for step in range(3):
            model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if look:
                with torch.no_grad():
                    model(input_ids=tokens(1, 1))
                    model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False, pad_token_id=0)
        return [parameter.detach() for parameter in trained(model)]

    assert_same(train(look=True), train(look=False), rtol=0, atol=0)


# adamw_torch is tested in test_finetune.py. On a CPU the paged optimizers are not paged, so one
# of them stands for both.
OPTIMIZERS = ["adamw_torch_fused", "adamw_8bit", "paged_adamw_32bit", "adafactor"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a dense classifier, and the classifier, prepared; copy it before changes."""
    folder = tiny_folder(tmp_path_factory.mktemp("tiny"))
    return folder, qrefta.prepare(load_classifier(str(folder), ["red", "blue"], seed=0), rank=8)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trainers_optimizers_learn_the_task(optimizer, tiny, tmp_path):
    folder, model = tiny
    args = training_arguments(
        "classify",
        tmp_path / "out",
        learning_rate=3e-2,
        per_device_train_batch_size=16,
        num_train_epochs=4,
        optim=optimizer,
        disable_tqdm=True,
    )
    result = finetune(
        copy.deepcopy(model), AutoTokenizer.from_pretrained(folder), color_data(), args=args
    )
    assert result.accuracy_after > 0.9


@pytest.mark.slow
def test_recipe_accumulates_and_checkpoints_to_the_same_model(tiny, tmp_path):
    """Two passes of 8 rows are one of 16; float32 sums in another order, amplified by Adam."""
    folder, prepared_once = tiny
    found = []
    settings = [
        {"batch_size": 16},
        {"batch_size": 8, "gradient_accumulation": 2},
        {"batch_size": 16, "gradient_checkpointing": True},
    ]
    for index, options in enumerate(settings):
        model = copy.deepcopy(prepared_once)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        finetune(
            model,
            AutoTokenizer.from_pretrained(folder),
            color_data(),
            tmp_path / str(index),
            max_steps=4,
            progress=False,
            **options,
        )
        found.append(trained(model))
    assert_same(found[2], found[0], rtol=0, atol=0)
    assert_same(found[1], found[0], rtol=0.01, atol=1e-4)


@pytest.mark.parametrize(
    ("device_map", "added"),
    [
        ({"model": 0, "lm_head": 1}, {BANK: 0}),
        ({"model": "cpu", "lm_head": 1, BANK: "cpu"}, {BANK: 1}),
        ({"model": "cpu", "lm_head": "cpu"}, {BANK: "cpu"}),
        ({"model": 0, "lm_head": 1, BANK: 1}, {}),
        (
            {"model": 0, "lm_head": "cpu", f"{BANK}.stack0": 0, f"{BANK}.stack1": "cpu"},
            {BANK: 0, f"{BANK}.stack0": 0, f"{BANK}.stack1": 0},
        ),
        ({"": 0}, {}),
        ({"": "cpu"}, {}),
    ],
    ids=repr,
)
def test_the_factors_get_a_device_that_is_not_offloaded(device_map, added):
    assert place_bank(device_map) == added


def test_a_cuda_build_of_torch_prepares_at_loading_without_a_gpu(tmp_path, monkeypatch):
    """It names its accelerator although there is none."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    models.tiny_llama().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QReftaConfig(rank=2), device_map="auto"
    )
    assert loaded.device.type == "cpu"


def test_a_device_map_needs_no_entry_for_the_factors(tmp_path):
    model = prepared()
    model.save_pretrained(tmp_path)
    device_map = {"model": "cpu", "lm_head": "cpu"}
    loaded = qrefta.load(tmp_path, device_map=device_map)
    assert device_map == {"model": "cpu", "lm_head": "cpu"}
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
