"""The quantization-error study: content of its rows, resumed studies, refused options."""

import pytest
import torch

from eval.rows import read
from eval.studies import quant_error
from eval.studies.error_totals import rising, totals, whole_model
from eval.studies.stack_errors import Cell, nuclear_norm
from qrefta import prepare, quant_report
from tests.tiny import color_rows, tiny_folder

RANKS = "0,3,8"


def study(folder, rows, **options):
    arguments = {
        "model": str(folder),
        "ranks": RANKS,
        "transforms": "lsm3,identity",
        "types": "nf4,fp4",
        "peers": "nf4",
        "craft": True,
        "samples": 20,
        "max_length": 8,
        "processes": 1,
        "again": False,
        "rows": rows,
        "text": folder / "text.txt",
    }
    quant_error.run(**arguments | options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("model"))
    (folder / "text.txt").write_text("\n".join(row["text"] for row in color_rows(60, seed=1)))
    return folder


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    study(folder, file)
    return file


def of(rows, **values):
    return [row for row in rows if values.items() <= row.items()]


@pytest.mark.slow
def test_errors_equal_the_report_of_prepare(folder, file):
    """One-shot and refined errors equal the report of a prepared model."""
    from transformers import AutoModel

    for start, rounds in (("one shot", 0), ("refined", 5)):
        model = prepare(
            AutoModel.from_pretrained(folder),
            method="refta",
            rank=8,
            refine=rounds,
            transform="identity",
            scales="absmax",
            progress=False,
        )
        for told in quant_report(model):
            (row,) = of(
                read(file),
                kind="stack",
                stack=told["stack"],
                quant_type="nf4",
                start=start,
                rank=8,
                transform="identity",
            )
            assert row["ratio"] == pytest.approx(told["ratio"], rel=1e-4)
            assert row["bits_per_weight"] == pytest.approx(told["bits_per_weight"], rel=0.02)


def test_every_method_is_there_once(file):
    rows = read(file)
    cells = [Cell(*(row[name] for name in Cell._fields)) for row in rows if row["kind"] == "stack"]
    assert len(cells) == len(set(cells))
    assert {cell.method for cell in cells if cell.quant_type == "nf4"} == {
        "refta",
        "craft",
        "pissa",
        "loftq",
        "qera",
        "smaller block",
        "smaller block, 8-bit scales",
    }
    assert {cell.start for cell in cells if cell.method == "refta"} == {
        "one shot",
        "refined",
        "calibrated",
    }
    assert all(row["ratio"] == row["output_ratio"] == 1 for row in of(rows, rank=0))
    assert len(of(rows, kind="gaussian")) == 2
    assert {row["transform"] for row in of(rows, kind="spectrum")} == {"lsm3", "identity"}


def test_rivals_take_no_more_bits_than_the_split(file):
    for row in read(file):
        if (
            row["kind"] == "stack"
            and row["method"].startswith(("smaller", "craft"))
            and row["rank"] > 3
        ):
            (ours,) = of(
                read(file),
                kind="stack",
                stack=row["stack"],
                quant_type="nf4",
                start="one shot",
                transform="lsm3",
                rank=row["rank"],
            )
            assert row["bits_per_weight"] <= ours["bits_per_weight"]


def test_the_model_is_the_sum_of_its_stacks(file):
    rows = read(file)
    (whole,) = of(rows, kind="model", quant_type="nf4", method="loftq", rank=8)
    parts = of(rows, kind="stack", quant_type="nf4", method="loftq", rank=8)
    assert whole["residual_error"] == pytest.approx(sum(row["residual_error"] for row in parts))
    assert whole["ratio"] == pytest.approx(
        whole["residual_error"] / sum(row["baseline_error"] for row in parts)
    )


def test_a_stack_that_is_missing_makes_no_model_row(file):
    rows = [row for row in read(file) if row["kind"] == "stack"]
    lost = next(row for row in rows if row["method"] == "pissa" and row["rank"] == 3)
    kept = {
        (row["method"], row["rank"])
        for row in whole_model([row for row in rows if row is not lost])
    }
    assert ("pissa", 8) in kept
    assert ("pissa", 3) not in kept
    assert (
        totals(of(rows, method="pissa", rank=3, quant_type="nf4"))["nuclear_reduction"] is not None
    )


@pytest.mark.slow
def test_nothing_is_measured_twice(folder, file):
    """A second run adds nothing; a resumed run adds the missing rows."""
    before = file.read_text()
    study(folder, file)
    assert file.read_text() == before
    lines = before.splitlines(keepends=True)
    part = file.with_name("part.jsonl")
    lost = [line for line in lines if '"method": "loftq"' in line and ".query" in line]
    assert lost
    part.write_text("".join(line for line in lines if line not in lost))
    study(folder, part, processes=2)

    def cells(path):
        return sorted(
            str([row.get(name) for name in ("kind", *Cell._fields)])
            for row in read(path)
            if row["kind"] != "run"
        )

    assert cells(part) == cells(file)


def test_a_series_that_rises_is_named():
    def rows(*errors):
        names = {
            "kind": "stack",
            "method": "refta",
            "model": "m",
            "stack": "query",
            "quant_type": "nf4",
        }
        how = {"transform": "dct", "start": "refined"}
        return [names | how | {"rank": rank, "ratio": error} for rank, error in enumerate(errors)]

    assert list(rising(rows(1, 0.9, 0.8))) == []
    assert list(rising(rows(1, 0.8, 0.9))) == ["m query nf4 dct refined: 1.0000, 0.8000, 0.9000"]


def test_nuclear_norm_is_the_sum_of_singular_values():
    for shape in ((20, 50), (50, 20)):
        matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        assert nuclear_norm(matrix) == pytest.approx(
            torch.linalg.svdvals(matrix).sum().item(), rel=1e-5
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": "3,100000"}, r"ranks are \[3, 100000\]; .* allows 0 to \d+"),
        ({"ranks": "-1"}, "allows 0 to"),
        ({"types": "nf5"}, "nf5: allowed are nf4, fp4, int4"),
        ({"transforms": "fft"}, "fft: allowed are lsm3, dct, identity"),
    ],
)
def test_unfit_options_are_refused_before_any_measurement(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        study(folder, tmp_path / "rows.jsonl", **options)
    assert not (tmp_path / "rows.jsonl").exists()
