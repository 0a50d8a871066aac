"""Planned memory: compared with a real step, the whole count, and the report of plan()."""

import time
from contextlib import nullcontext

import bitsandbytes
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import qrefta
from qrefta._compat.transformers import enable_checkpointing
from qrefta.config.rank import RankBudget
from qrefta.config.settings import Settings
from qrefta.config.stack import BANK
from qrefta.memory import footprint
from qrefta.memory.footprint import _AsOnCuda, _Ledger
from qrefta.memory.meta_model import Outline
from qrefta.memory.plan import _Case, _largest, _plan, _Tried, plan
from qrefta.model.stacks import find_stacks
from qrefta.nn.checkpointing import selective_contexts
from qrefta.nn.head_loss import CHUNK, plain_head
from qrefta.nn.linear import AdaptedLinear
from tests.models import build, decoder_sizes, tiny_bert, tiny_llama, tiny_mixtral, tiny_vit
from tests.peak import added_peak

BATCH, SEQ = 8, 64
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "num_hidden_layers": 1,
}


def small(**changed):
    return LlamaConfig(**LLAMA | changed)


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def randint(seq):
    return torch.randint(96, (BATCH, seq), generator=torch.Generator().manual_seed(0))


def prepared_step(model, checkpointing, plain=False, **settings):
    """Prepare a model; its inputs, optimizer, and a step with the loss that transformers
    computes, or with a plain head.
    """
    qrefta.prepare(model, refine=0, progress=False, **settings)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if checkpointing == "selective":
        options["context_fn"] = selective_contexts
    if checkpointing:
        # the states of the CPU's generator, five KB a block, are in no GPU's memory
        enable_checkpointing(model, options)
    images = model.main_input_name == "pixel_values"
    inputs = torch.zeros(BATCH, 3, 16, 16) if images else randint(SEQ)
    labels = torch.zeros(BATCH, dtype=torch.long) if images else inputs
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def step():
        with plain_head(model) if plain else nullcontext():
            loss = model(**{model.main_input_name: inputs}, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return inputs, optimizer, step


@pytest.mark.parametrize(
    ("make", "checkpointing", "settings"),
    [
        (tiny_llama, False, {"method": "refta", "rank": 40}),
        (tiny_llama, True, {"method": "tera", "rank": 4, "double_quant": True}),
        (tiny_llama, "selective", {"method": "refta", "rank": 8}),
        (tiny_mixtral, False, {"method": "refta", "rank": 8}),
        (tiny_llama, False, {"bits": 3}),
        (
            tiny_vit,
            False,
            {"method": "craft", "quant_type": "int4", "target_modules": ".*attention.*"},
        ),
    ],
)
def test_a_plan_equals_the_memory_of_a_step(make, checkpointing, settings):
    """The model's bytes and the optimizer's to the byte; the peak but for what lies within
    kernels.
    """
    model = make(hidden=64)
    seq = None if make is tiny_vit else SEQ
    asked = {"batch": BATCH, "seq": seq, "gradient_checkpointing": checkpointing}
    planned = plan(model, **asked, whole_logits=True, **settings)
    model.config.use_cache = False  # as a plan and a Trainer have it
    inputs, optimizer, step = prepared_step(model, checkpointing, **settings)
    step()
    added = added_peak(step)

    linears = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    packed = sum(
        p.nbytes for module in linears for name, p in module.named_parameters() if name != "bias"
    )
    factors = sum(parameter.nbytes for parameter in getattr(model, BANK).parameters())
    whole = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    states = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    assert (planned.linears_bytes, planned.factors_bytes, planned.optimizer_bytes) == (
        packed,
        factors,
        states,
    )
    assert planned.linears_bytes + planned.factors_bytes + planned.rest_bytes == whole
    assert planned.total_bytes == pytest.approx(whole + states + inputs.nbytes + added, rel=0.01)


def test_quantizing_alone_is_planned_as_a_pass_without_gradients():
    """With rank=0 nothing trains, so nothing is kept for a backward pass."""
    model = tiny_llama(hidden=64)
    planned = plan(model, batch=BATCH, seq=SEQ, whole_logits=True, rank=0)
    assert planned.factors_bytes == planned.optimizer_bytes == planned.gradients_bytes == 0
    model.config.use_cache = False
    qrefta.prepare(model, rank=0, progress=False).train()
    inputs = randint(SEQ)
    added = added_peak(lambda: model(inputs).logits.float().sum())
    whole = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert planned.total_bytes == pytest.approx(whole + inputs.nbytes + added, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_largest_rank_is_found_from_no_rank_too(rank):
    asked = {"batch": 2, "seq": 16, "target_modules": ["up_proj"], "rank": rank}
    found = plan(small(), gpu=300_000, reserve=50_000, **asked)
    assert 8 < found.largest_rank < 32
    here, beyond = (
        plan(small(), **asked | {"rank": found.largest_rank + more}).total_bytes for more in (0, 1)
    )
    assert here <= 250_000 < beyond
    assert plan(small(), gpu=100_000, reserve=1, **asked).largest_rank == 0
    assert plan(small(), gpu=600_000, reserve=1, **asked).largest_rank == 64


@pytest.mark.parametrize("target", [2.9, 3.9])
def test_a_plan_of_mixed_bits_counts_the_most_bytes_within_the_target(target):
    settings = {"bits": "auto", "target_bits": target, "rank": 2}
    model = tiny_llama(hidden=64)
    planned = plan(model, batch=BATCH, seq=SEQ, **settings)
    stacks = find_stacks(model)
    weights = sum(stack.layers * stack.out_features * stack.in_features for stack in stacks)
    prepared_step(model, False, **settings)
    linears = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
    packed = sum(p.nbytes for module in linears for p in module.parameters())
    stored = sum(factors.stored_bytes for factors in getattr(model, BANK).values())
    assert packed <= planned.linears_bytes <= target * weights / 8 - stored
    assert planned.linears_bytes > (target - 0.2) * weights / 8 - stored


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]], ids=str)
def test_logits_of_a_chunk_are_counted_where_finetune_makes_no_more(modules_to_save):
    """4,000 words, and four chunks of tokens: whole logits are most of the step."""
    settings = {"rank": 8, "modules_to_save": modules_to_save}
    model = build(LlamaForCausalLM, small(vocab_size=4000, num_hidden_layers=2))
    planned = plan(model, batch=BATCH, seq=SEQ, **settings)
    whole = plan(model, batch=BATCH, seq=SEQ, whole_logits=True, **settings)
    model.config.use_cache = False
    _, optimizer, step = prepared_step(model, False, plain=True, **settings)
    step()
    added = added_peak(step)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    held += sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
    assert planned.total_bytes == pytest.approx(held + added, rel=0.02)
    assert whole.total_bytes - planned.total_bytes > 4 * BATCH * SEQ * 4000


def one_list_of_blocks():
    return tiny_bert(layers=6)


def two_lists_of_blocks():
    sizes = {"vocab_size": 96, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return on_meta(
        BartForConditionalGeneration,
        BartConfig(encoder_layers=4, decoder_layers=4, **sizes, **heads),
    )


@pytest.mark.parametrize(
    ("make", "checkpointing", "target", "batch", "seq"),
    [
        (one_list_of_blocks, True, "intermediate.dense", 2, 16),
        (one_list_of_blocks, "selective", "intermediate.dense", 1, 1),
        (two_lists_of_blocks, False, "fc1", 2, 16),
        (two_lists_of_blocks, False, "fc1", 1, 1),
    ],
)
def test_three_blocks_stand_for_all(make, checkpointing, target, batch, seq):
    """Cut or whole, a model has the same plan, to the byte; factors so large that the gradients in
    flight matter.

    With one token the optimizer's step is the peak.
    """
    case = _Case(
        batch,
        seq,
        "bfloat16",
        checkpointing,
        True,
        "adamw",
        Settings(rank=90, bits=16, target_modules=[target]),
    )
    cut, whole = Outline.of(make()), Outline.of(make(), cut=False)
    assert cut.blocks
    assert not whole.blocks
    assert _plan(cut, case) == _plan(whole, case)


def test_unquantized_bytes_include_integer_buffers():
    model = tiny_bert()
    stacked = sum(
        model.get_submodule(path).weight.nbytes
        for stack in find_stacks(model)
        for path in stack.modules
    )
    assert not all(buffer.is_floating_point() for buffer in model.buffers())
    whole = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert plan(model, seq=8, rank=2).rest_bytes == whole - stacked


def test_blocks_that_differ_or_train_whole_are_not_cut():
    sizes = decoder_sizes(32, layers=6)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    attention = {"layer_types": ["full_attention", "sliding_attention"] * 3, "sliding_window": 8}
    assert Outline.of(on_meta(Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes, **experts))).blocks == {
        "model.layers": 6
    }
    dense_fourth = on_meta(
        Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes, **experts, mlp_only_layers=[4])
    )
    assert Outline.of(dense_fourth).blocks == {}
    dense_second = on_meta(
        Qwen3MoeForCausalLM, Qwen3MoeConfig(**sizes, **experts, mlp_only_layers=[1])
    )
    assert Outline.of(dense_second).blocks == {}
    assert Outline.of(on_meta(Qwen3ForCausalLM, Qwen3Config(**sizes, **attention))).blocks == {}
    assert Outline.of(one_list_of_blocks(), ["attention.output.LayerNorm"]).blocks == {}
    assert Outline.of(one_list_of_blocks(), ["pooler"]).blocks == {"bert.encoder.layer": 6}


def test_optimizers_state_is_counted_as_bitsandbytes_makes_it():
    """Large factors in 8 bits with their scales, small ones in 32 bits."""
    config = small(hidden_size=256)
    planned = plan(
        config, seq=8, rank=16, optimizer="adamw_8bit", target_modules=["q_proj", "k_proj"]
    )
    parameters = [torch.nn.Parameter(torch.zeros(256, 16)) for _ in range(4)]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    for index, parameter in enumerate(parameters):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    states = [
        t
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor)
    ]
    assert planned.optimizer_bytes == sum(
        {tensor.data_ptr(): tensor.nbytes for tensor in states}.values()
    )
    assert (
        planned.optimizer_bytes
        < 0.3 * plan(config, seq=8, rank=16, target_modules=["q_proj", "k_proj"]).optimizer_bytes
    )
    assert planned.gradients_bytes == sum(parameter.nbytes for parameter in parameters)


def test_where_tokens_are_few_the_optimizers_step_is_the_peak():
    """Then there are the gradients, and the copy that AdamW makes of all second moments."""
    planned = plan(small(), seq=1, rank=64)
    copies = (planned.activations_bytes + planned.temporary_bytes) / planned.gradients_bytes
    assert copies == pytest.approx(2, rel=1e-3)


def test_tied_embeddings_that_train_count_once():
    tied, apart = (
        plan(small(tie_word_embeddings=tie), seq=8, modules_to_save=["lm_head"])
        for tie in (True, False)
    )
    assert tied.gradients_bytes == apart.gradients_bytes
    assert apart.rest_bytes - tied.rest_bytes == 4 * 96 * 64


def test_logits_are_kept_in_float32():
    """Of a bf16 model, by the loss: four bytes for each further entry of the vocabulary and
    token.
    """
    few, many = (
        plan(small(vocab_size=size), seq=64, dtype="bfloat16", whole_logits=True).activations_bytes
        for size in (1024, 2048)
    )
    assert many - few == 4 * 64 * 1024


def test_attention_is_counted_as_on_a_gpu():
    """Kept is its output and a float32 number a row; going back the queries' gradient is there in
    float32 too.
    """
    query, key, value = (
        torch.zeros(2, 4, 8, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    ledger, numbers, rows = _Ledger(), query.numel(), 2 * 4 * 8
    with _AsOnCuda(), ledger:
        ledger.leave_out([query, key, value])
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        assert ledger.level() == 2 * numbers + 4 * rows
        back = torch.ones_like(out)
        before = ledger.level()
        ledger.begin()
        out.backward(back)
        assert ledger.peak() - before == 4 * numbers + 3 * 2 * numbers


def test_dropout_is_counted_as_on_a_gpu():
    """A byte an element of the hidden states, twice a block, and none for that within the attention
    kernel.
    """
    hidden, layers = 32, 2
    model = tiny_bert(hidden, layers)
    with_dropout = plan(model, batch=BATCH, seq=SEQ).activations_bytes
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    without = plan(model, batch=BATCH, seq=SEQ).activations_bytes
    before_the_head = (
        BATCH * hidden * (1 + 4)
    )  # the mask and its output, which is another tensor then
    assert with_dropout - without == 2 * layers * BATCH * SEQ * hidden + before_the_head


def test_largest_batch_and_rank_fit_and_the_next_do_not():
    config = small(intermediate_size=1024)
    asked = {"batch": 6, "seq": 64, "rank": 8, "target_modules": ["up_proj"], "bits": 16}
    found = plan(config, gpu=7_000_000, reserve=600_000, **asked)
    assert found.fits
    assert found.savings == ()
    assert (found.largest_batch, found.largest_rank) > (5, 8)
    for name, largest in (("batch", found.largest_batch), ("rank", found.largest_rank)):
        here, beyond = (
            plan(config, **asked | {name: number}).total_bytes for number in (largest, largest + 1)
        )
        assert here <= 6_400_000 < beyond


@pytest.mark.parametrize(
    ("slope", "bend", "most", "largest"),
    [(10, 0, 1000, 90), (10, 5, 1000, 62), (10, 0, 50, 50), (0, 0, 50, 50), (2000, 0, 50, 0)],
)
def test_the_largest_is_found_in_few_tries(slope, bend, most, largest):
    """Totals 100 + slope n, steeper by `bend` from 7 on; the asked number fits or does not."""
    for asked in (1, 7, most):
        tried = []

        def total(n, tried=tried):
            tried.append(n)
            return 100 + slope * n + bend * max(n - 7, 0)

        assert _largest(total, 1000, 100, _Tried(asked, total(asked)), most) == largest
        assert len(tried) <= 6


def test_savings_equal_the_effect_of_each_change_largest_first():
    asked = {"batch": 2, "seq": 64, "rank": 32, "dtype": "float32", "target_modules": ["up_proj"]}
    config = small(
        vocab_size=4096
    )  # large logits: checkpointing lowers the peak of a single block too
    found = plan(config, gpu=100_000, reserve=1, **asked)
    assert not found.fits
    assert (found.largest_batch, found.largest_rank) == (0, 0)
    savings = {saving.change: saving.saved_bytes for saving in found.savings}
    assert set(savings) == {
        "gradient checkpointing",
        "selective gradient checkpointing",
        "batch 1",
        "seq 32",
        "rank 16",
        "optimizer adamw_8bit",
        "double_quant",
        "dtype bfloat16",
    }
    assert list(savings.values()) == sorted(savings.values(), reverse=True)
    assert min(savings.values()) > 0
    checkpointed = plan(config, gradient_checkpointing=True, **asked)
    assert found.total_bytes - savings["gradient checkpointing"] == checkpointed.total_bytes


@pytest.mark.slow
def test_a_model_of_70_billion_weights_is_planned_in_seconds():
    sizes = {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
    llama = small(
        **sizes,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        dtype="bfloat16",
    )
    start = time.process_time()
    found = plan(llama, seq=4096, rank=64)
    assert time.process_time() - start < 20
    weights = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert found.linears_bytes == weights // 2 + weights // 64 * 4
    assert found.rest_bytes == pytest.approx(2 * (2 * 128256 * 8192 + 161 * 8192), rel=1e-6)


@pytest.mark.slow
def test_a_tiny_model_on_a_large_gpu_is_planned_in_seconds():
    """Many rows fit; the head's loss runs 128 tokens at a time, and a few times stand for all."""
    start = time.process_time()
    found = plan(tiny_llama(hidden=64), seq=16, gpu="1GB", reserve=1)
    assert time.process_time() - start < 20
    assert found.largest_batch > 1000


@pytest.mark.parametrize("seq", [3 * CHUNK, 3 * CHUNK + 1, 9 * CHUNK + 77])
def test_a_few_chunks_of_tokens_stand_for_all(seq, monkeypatch):
    """To the byte, also where the last chunk is a part."""
    asked = {"batch": 1, "seq": seq, "modules_to_save": ["lm_head"]}
    found = plan(small(vocab_size=4000), **asked)
    monkeypatch.setattr(footprint, "COUNTED_CHUNKS", None)
    assert plan(small(vocab_size=4000), **asked) == found


def test_a_folder_and_a_config_file_are_read_without_weights(tmp_path):
    small().save_pretrained(tmp_path)
    planned = plan(small(), seq=8)
    assert plan(tmp_path, seq=8) == plan(str(tmp_path / "config.json"), seq=8) == planned


@pytest.mark.slow
def test_models_that_cannot_be_planned_say_why():
    llama, vit, bert = small(), tiny_vit(), tiny_bert()
    prepared = qrefta.prepare(tiny_bert(), rank=2, progress=False)
    refused = {
        "give seq": (llama, {}),
        "seq is 65, but BertForSequenceClassification has 64 positions": (bert, {"seq": 65}),
        "seq is 8, but ViTForImageClassification takes images": (vit, {"seq": 8}),
        "image_size": (on_meta(SegformerForSemanticSegmentation, SegformerConfig()), {}),
        "takes input_features": (on_meta(WhisperForConditionalGeneration, WhisperConfig()), {}),
        "CLIPModel cannot be counted on zeros for input_ids": (
            on_meta(CLIPModel, CLIPConfig()),
            {"seq": 8},
        ),
        "not a Linear": (torch.nn.Linear(1, 1), {}),
        "names no model class": (LlamaConfig(), {"seq": 8}),
        "already quantized": (prepared, {"seq": 8}),
    }
    assert plan(llama, seq=2049).fits  # rotary positions are computed, so longer rows run
    assert plan(bert, seq=64).fits
    for message, (model, sizes) in refused.items():
        with pytest.raises(ValueError, match=message):
            plan(model, **sizes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "refta", "rank": RankBudget(error_ratio=0.5)}, "give a number"),
        ({"rank": 65}, "largest allowed rank is 64"),
        ({"batch": 0}, "batch is 0"),
        ({"gpu": "24 bananas"}, "gpu is '24 bananas'"),
        ({"gpu": "1GB", "reserve": "2GB"}, "nothing is left"),
        ({"dtype": "int8"}, "bfloat16, float16, float32"),
        ({"optimizer": "sgd"}, "adamw, adamw_8bit"),
        ({"target_modules": ["nothing"]}, "the stacks are"),
        ({"modules_to_save": "nothing"}, "match no module"),
        ({"method": "lora"}, "it must be one of refta"),
        ({"bits": "auto", "target_bits": 9.5}, "it must be between"),
    ],
)
def test_settings_that_are_not_allowed_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        plan(small(), **{"seq": 8} | settings)
