"""The study of the whole step: two processes take turns on a tiny model."""

import io
import json
import sys
from time import sleep

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput

import qrefta
from eval.report.readme_table import whole_step_table
from eval.rows import read
from eval.studies import whole_step
from eval.studies.step_profile import KINDS, StepProfile
from qrefta._compat.transformers import enable_checkpointing
from qrefta.model.adapters import without_peft
from tests.models import tiny_llama
from tests.train.talk import words

pytest.importorskip("trl")
SLEEP = 0.2  # seconds


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny_llama(64).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_processes_take_turns_and_their_tokens_are_counted(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    tokenizer = words()
    whole_step.run(
        "trl qlora r=16,qrefta R=24",
        str(model),
        steps=2,
        batch_size=2,
        length=0,
        bf16=False,
        checkpointing=True,
        threads=1,
        memory=False,
        profiled=False,
        rows=rows,
        child="",
        watched="",
    )
    theirs, ours = read(rows)
    settings = whole_step.Run(str(model), 4, 2, 0, False, True, 1)
    lengths = [
        len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
        for messages in whole_step.data_of(settings, tokenizer)["messages"]
    ]
    for row in (theirs, ours):
        assert row["steps"] == 1  # the first is left out
        assert sum(sorted(lengths)[:2]) <= row["tokens"] <= sum(sorted(lengths)[2:])
    assert theirs["tokens_per_s_of_qlora"] == 1
    assert ours["trained_parameters"] < theirs["trained_parameters"]
    table = whole_step_table(
        [row | {"peak_bytes": 2e6, "peak_bytes_of_qlora": 0.5} for row in (theirs, ours)]
    )
    assert "| 2 of 16 to 512 tokens | float32 | qrefta R=24 |" in table


@pytest.mark.slow
def test_a_watched_process_profiles_its_steps(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(4 * whole_step.GO))
    whole_step._train("qrefta R=24", whole_step.Run(str(model), 4, 2, 0, False, True, 1), "profile")
    lines = capsys.readouterr().out.splitlines()
    reports = [line.removeprefix(whole_step.SIGN) for line in lines if whole_step.SIGN in line]
    steps = [json.loads(report) for report in reports[1:]]
    row = dict.fromkeys(whole_step.PROFILE_FIELDS, "") | {"method": "qrefta R=24"}
    [profile] = whole_step.profile_rows([row], {"qrefta R=24": steps})
    assert profile["method"] == "qrefta R=24"
    assert {kind for kind in KINDS if profile["seconds"][kind] > 0} == set(KINDS)


def test_rows_of_one_length_are_longer_than_it():
    tokenizer = words()
    settings = whole_step.Run("", 4, 2, 48, False, True, 1)
    for messages in whole_step.data_of(settings, tokenizer)["messages"]:
        ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert len(ids) > 48


class Slow(torch.autograd.Function):
    """Sleeps in the forward and in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        sleep(SLEEP)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        sleep(SLEEP)
        return grad.clone()


def slowed(module):
    module.register_forward_hook(lambda _, __, out: Slow.apply(out))


def profiled_step(model, checkpointing):
    """Seconds by kind of a step, and of the whole step."""
    profile = StepProfile(model)
    if checkpointing:
        enable_checkpointing(without_peft(model), {"use_reentrant": False})
    batch = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    profile.start()
    model.train()(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    optimizer.step()
    seconds = profile.stop()
    events = [event for event in profile.profiler.events() if event.name == "step: other"]
    return seconds, max(event.cpu_time_total for event in events) / 1e6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("model.layers.0.self_attn.o_proj", "attention"),
        ("model.layers.1.mlp.act_fn", "MLP"),
        ("lm_head", "head and loss"),
    ],
)
def test_a_profile_gives_the_time_of_both_passes_to_the_module(path, kind, checkpointing):
    """Blocks run forward twice with checkpointing. The kinds add up to the step."""
    model = qrefta.prepare(tiny_llama(), rank=5, refine=0, progress=False)
    slowed(model.get_submodule(path))
    seconds, whole = profiled_step(model, checkpointing)
    passes = 3 if checkpointing and kind != "head and loss" else 2
    assert seconds[kind] >= passes * SLEEP
    assert sum(seconds.values()) == pytest.approx(whole, rel=0.01)
    assert {name for name in KINDS if seconds[name] > 0} == set(KINDS) - {"data"}


def test_the_factors_of_peft_and_a_loss_without_the_heads_module_are_told_apart():
    """TRL computes the loss from the decoder and the weight of the head."""
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear"))
    causal = model.get_base_model()

    def forward(input_ids, labels, **_):
        hidden = causal.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = Slow.apply(hidden) @ causal.lm_head.weight.T
        return CausalLMOutput(functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))

    causal.forward = forward
    slowed(causal.get_submodule("model.layers.0.mlp.up_proj.lora_B.default"))
    seconds, whole = profiled_step(model, checkpointing=False)
    for kind in ("factors", "head and loss"):
        assert seconds[kind] >= 2 * SLEEP
    assert sum(seconds.values()) == pytest.approx(whole, rel=0.01)


@pytest.mark.parametrize("method", ["qlora r=16", "qrefta r=8", "trl qlora r=0", "qrefta R=", ""])
def test_unknown_methods_are_refused(method):
    with pytest.raises(ValueError, match="is not a method; give 'trl qlora r=16' or 'qrefta R=64'"):
        whole_step.parse(method)
