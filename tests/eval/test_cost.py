"""The cost studies on a model small enough for a test."""

import pytest
import torch

from eval.memory import tensor_peak
from eval.rows import read
from eval.studies import cost, cost_model, decoding

pytestmark = pytest.mark.slow


def test_tensor_peak_counts_live_tensors_and_the_most_that_a_step_adds():
    living = torch.zeros(1 << 18)  # 1 MiB

    def step():
        first = torch.zeros(1 << 20)
        del first
        second = torch.zeros(1 << 19)
        third = torch.zeros(1 << 20)
        del second, third

    nothing = tensor_peak(lambda: None, "cpu")
    assert nothing >= living.nbytes
    assert tensor_peak(step, "cpu") - nothing == pytest.approx(6 << 20, rel=0.01)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "cost.jsonl"
    cost.run(
        "tiny",
        "16,64",
        repetitions=1,
        checkpointing=False,
        memory=True,
        time=True,
        only="",
        threads=1,
        rows=path,
    )
    return {row["method"]: row for row in read(path)}


def test_every_method_is_measured(rows):
    assert set(rows) == set(cost.method_names("tiny", "16,64"))
    for row in rows.values():
        assert row["step_s"] > 0
        assert row["of_floor"] == pytest.approx(row["step_s"] / rows["floor"]["step_s"])
        assert row["peak_of_qlora"] == pytest.approx(
            row["peak_bytes"] / rows["qlora r=16"]["peak_bytes"]
        )


@pytest.mark.parametrize("setting", cost.SETTINGS)
def test_no_method_is_measured_twice(setting):
    """With 32 layers the smallest windows have R = 64."""
    names = cost.method_names(setting, "16,64")
    assert len(set(names)) == len(names)


def test_trainable_parameters_of_each_method(rows):
    """Two layers: q and o 128 x 128, k and v 64 x 128, gate and up 256 x 128, down 128 x 256."""
    sums = 2 * 256 + 2 * 192 + 3 * 384
    counts = {name: row["trained_parameters"] for name, row in rows.items()}
    assert counts["floor"] == counts["floor bitsandbytes"] == 0
    assert counts["refta R=16"] == 16 * sums
    assert counts["refta R=64"] == counts["rebuilding R=64"] == 64 * sums
    assert (
        counts["qlora r=16"]
        == counts["qlora r=16 dropout=0.05"]
        == counts["lora r=16"]
        == 2 * 16 * sums
    )
    assert counts["qlora r=32"] == counts["refta R=64"] == counts["windows R=64"]
    assert counts["qlora r=2"] == counts["windows R=4"] == 4 * sums


def test_rebuilding_needs_more_memory_than_the_same_factors_without(rows):
    assert (
        rows["rebuilding R=64"]["peak_bytes"]
        > rows["refta R=64"]["peak_bytes"]
        > rows["floor"]["peak_bytes"]
    )


def test_the_rebuilding_form_computes_the_same():
    """Both forms have the same gradient; autograd rounds one to bf16 (difference 0.0016)."""
    settings = cost.Run("tiny", "cpu", torch.float32, checkpointing=False)
    ids = torch.arange(32).view(2, 16)
    found = []
    for name in ("rebuilding R=64", "refta R=64"):
        model = cost.build(name, settings)
        loss = model(input_ids=ids, labels=ids).loss
        found.append(
            [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]
        )
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 0.004 * theirs.norm()


def test_decoding_is_measured_with_plain_bitsandbytes(tmp_path):
    decoding.run(
        "tiny",
        "qlora r=16, windows R=16",
        "1,2",
        prompt=4,
        new_tokens=3,
        repetitions=1,
        threads=1,
        rows=tmp_path / "rows.jsonl",
    )
    found = read(tmp_path / "rows.jsonl")
    assert [row["batch"] for row in found] == [1] * 4 + [2] * 4
    assert {row["method"] for row in found} == {
        "floor bitsandbytes",
        "floor",
        "qlora r=16",
        "windows R=16",
    }
    assert all(
        row["of_bitsandbytes"] == 1 for row in found if row["method"] == "floor bitsandbytes"
    )


def test_cost_model_recovers_the_constants_of_times_that_follow_it():
    cells = []
    for tokens in (16, 64, 256, 1024):
        for rank in (0, 8, 64):
            count = cost_model.cost.step_cost(tokens, 128, 256, rank, value_bytes=4)
            seconds = count.operations / 2e11 + count.moved_bytes / 3e10 + 4e-5
            cells.append(
                {
                    "tokens": tokens,
                    "in_features": 128,
                    "out_features": 256,
                    "rank": rank,
                    "counted_s": seconds,
                }
            )
    predicted, constants = cost_model.fit(cells)
    assert predicted == pytest.approx([cell["counted_s"] for cell in cells], rel=1e-4)
    assert constants == pytest.approx([2e11, 3e10, 4e-5], rel=1e-2)


def test_cost_model_measures_both_forms(tmp_path):
    cost_model.run(
        "64x128", "32,160", "0,8", repetitions=1, threads=1, rows=tmp_path / "rows.jsonl"
    )
    *cells, summary = read(tmp_path / "rows.jsonl")
    assert [("thin_s" in cell, cell["tokens"]) for cell in cells] == [
        (False, 32),
        (True, 32),
        (False, 160),
        (True, 160),
    ]
    assert summary["n"] == 4
