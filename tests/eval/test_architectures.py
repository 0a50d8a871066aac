"""The study of architectures: its checks see faults, and a process that ends becomes a row."""

import json
import os
import time

import pytest
import torch

from eval.report.architectures import architectures_table
from eval.rows import append, read
from eval.studies import coverage
from eval.tasks import checks
from eval.tasks.architectures import Architecture, architectures, small_model
from eval.tasks.checks import check, summary

LLAMA = Architecture("llama", "CAUSAL_LM", "LlamaForCausalLM")
MIXTRAL = Architecture("mixtral", "CAUSAL_LM", "MixtralForCausalLM")
RESNET = Architecture("resnet", "IMAGE_CLASSIFICATION", "ResNetForImageClassification")


def test_every_type_comes_once_with_its_first_head():
    names = [architecture.name for architecture in architectures()]
    assert len(names) == len(set(names)) > 300
    assert {LLAMA, MIXTRAL, RESNET} <= set(architectures())


def test_a_small_model_is_small_and_always_the_same():
    first, second = (small_model(LLAMA) for _ in "ab")
    assert first.num_parameters() < 1e6
    assert all(
        torch.equal(tensor, other)
        for tensor, other in zip(first.parameters(), second.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("architecture", "result", "lora"),
    [(LLAMA, "works", "works"), (MIXTRAL, "works", "refused"), (RESNET, "refused", "refused")],
)
def test_outcomes(architecture, result, lora, tmp_path):
    found = check(small_model(architecture), tmp_path)
    assert summary(found["checks"]) == result
    assert found["checks"]["LoRA"].partition(":")[0] == lora
    assert found["share_16_bit"] == 0


def test_a_wrong_weight_in_a_merged_model_is_seen(tmp_path, monkeypatch):
    merge = checks.merge

    def merge_wrongly(model, *args, **kwargs):
        merged = merge(model, *args, **kwargs)
        if "out" not in kwargs:
            merged.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
        return merged

    monkeypatch.setattr(checks, "merge", merge_wrongly)
    found = check(small_model(LLAMA), tmp_path)["checks"]
    assert found["merge in place"].startswith("fails: AssertionError: the merged model differs by")
    assert {name for name, outcome in found.items() if outcome != "works"} == {"merge in place"}


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (lambda _: os._exit(3), "the process ended with 3"),
        (lambda _: time.sleep(60), "no end in 1 s"),
    ],
)
def test_a_process_that_ends_or_hangs_becomes_a_row(end, error, monkeypatch):
    monkeypatch.setattr(coverage, "small_model", end)
    assert coverage.checked(LLAMA, 1) == {"result": "fails", "error": error}


def test_a_type_with_a_row_is_skipped_unless_it_is_named(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(coverage, "PUBLISHED", {})
    monkeypatch.setattr(coverage, "architectures", lambda: [LLAMA, RESNET])
    monkeypatch.setattr(
        coverage, "checked", lambda one, _: measured.append(one.name) or {"result": "works"}
    )
    rows = tmp_path / "rows.jsonl"
    append(rows, [{"study": "coverage", "type": "llama"}], seed=0)
    coverage.run(rows)
    assert measured == ["resnet"]
    coverage.run(rows)
    coverage.run(rows, only=["llama"])
    assert measured == ["resnet", "llama"]
    assert [row["type"] for row in read(rows)] == ["llama", "resnet", "llama"]


def test_the_table_has_the_last_row_of_a_type_and_says_what_was_refused():
    outcome = "refused: ValueError: It | is not possible. Do this instead."
    good = dict.fromkeys(("training", "reload", "LoRA"), "works")
    row = {"type": "x", "class": "X", "result": "refused", "share_16_bit": 0.25}
    layers = [{"role": "model.layers.*.mixer.out_proj", "weights": 1, "reason": ""}]
    rows = [
        row | {"result": "fails", "error": "dead"},
        row | {"checks": good | {"LoRA": outcome, "reload": outcome}, "layers_16_bit": layers},
        {"type": "a", "class": "A", "result": "works", "share_16_bit": 0.0, "checks": good},
    ]
    assert architectures_table(json.loads(json.dumps(rows))).splitlines() == [
        "2 architectures: 1 work, 1 refused.",
        "",
        "| model type | class | result | stays in 16 bits | notes |",
        "|---|---|---|---|---|",
        "| a | `A` | works | 0% |  |",
        "| x | `X` | refused | 25% | reload, LoRA: It / is not possible; 16 bits: "
        "`mixer.out_proj` |",
    ]
