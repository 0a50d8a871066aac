"""The report follows the rows, opposite rows give opposite findings, and its page opens."""

import json
import re
import shutil
from pathlib import Path

import pytest

from eval.report import findings, scores
from eval.report.report import read_all, run, sections
from eval.report.verdicts import FAILS, HOLDS, IN_PART, UNDECIDED, verdicts

ROWS = Path(__file__).parents[2] / "eval" / "rows"
CONTEXT = {
    "schema": 1,
    "command": "study.py --rows rows.jsonl",
    "commit": "0123456789ab",
    "python": "3.11.7",
    "versions": {"torch": "2.8.0"},
    "device": "a processor",
    "threads": 2,
    "seed": 0,
}
STACKS = {
    "encoder.layer.*.attention.self.query": [6, 384, 384],
    "encoder.layer.*.attention.output.dense": [6, 384, 384],
    "encoder.layer.*.intermediate.dense": [6, 1536, 384],
    "encoder.layer.*.output.dense": [6, 384, 1536],
}
RANKS = (15, 48, 96, 192)
STARTS = {"one shot": 1.0, "refined": 0.93, "calibrated": 0.97}
TRANSFORMS = {"lsm3": 1.0, "dct": 1.012, "identity": 1.03}
RIVALS = {"pissa": 1.04, "loftq": 0.98, "qera": 0.99}


def error_rows(transforms=TRANSFORMS, starts=STARTS, rivals=RIVALS, rises=False, smaller=0.8):
    """Rows of every stack and their sum; ratios fall with R."""
    rows = []

    def add(method, start, transform, rank, quant_type, ratio, output, bits):
        shared = {
            "study": "quant_error",
            "quant_type": quant_type,
            "method": method,
            "start": start,
            "transform": transform,
            "rank": rank,
            "bits_per_weight": bits,
            "model": "mini",
            "text": "first.txt",
            "samples": 600,
            "max_length": 48,
            "nuclear_reduction": None if transform == "dct" else 0.1,
        }
        for place, (stack, shape) in enumerate(STACKS.items()):
            scaled = ratio * (1 + 0.02 * place) if rank else 1.0
            layers = [scaled * (1 + 0.01 * layer) for layer in range(shape[0])]
            rows.append(
                shared
                | {
                    "kind": "stack",
                    "stack": stack,
                    "shape": shape,
                    "refine": 5,
                    "baseline_error": 100.0,
                    "layer_ratios": layers,
                    "residual_error": 100 * scaled,
                    "ratio": scaled,
                    "output_ratio": output,
                }
            )
        rows.append(
            shared
            | {
                "kind": "model",
                "stack": "all",
                "baseline_error": 400.0,
                "residual_error": 400 * ratio,
                "ratio": ratio,
                "output_ratio": output,
            }
        )

    for quant_type, worse in {"nf4": 1.0, "fp4": 0.98, "int4": 0.99}.items():
        add("refta", "one shot", "lsm3", 0, quant_type, 1.0, 1.0, 4.5)
        for rank in RANKS:
            falling = worse * 0.95 * (1 + rank / 500 if rises else 1 - rank / 400)
            bits = 4.5 + rank / 75
            for transform, factor in transforms.items():
                for start, gain in starts.items():
                    output = falling * factor * (0.7 if start == "calibrated" else gain)
                    add(
                        "refta",
                        start,
                        transform,
                        rank,
                        quant_type,
                        falling * factor * gain,
                        output,
                        bits,
                    )
            for rival, factor in rivals.items():
                add(rival, None, None, rank, quant_type, falling * factor, falling * factor, bits)
            if quant_type == "nf4":
                add(
                    "smaller block",
                    None,
                    None,
                    rank,
                    quant_type,
                    smaller * (1 - rank / 600),
                    0.9,
                    bits,
                )
    rows += [
        {
            "kind": "spectrum",
            "stack": "encoder.layer.*.attention.self.query",
            "shape": [6, 384, 384],
            "transform": transform,
            "model": "mini",
            "values": [10 * at ** (-0.3 * factor) for at in range(1, 193)],
        }
        for transform, factor in transforms.items()
    ]
    gaussian = {
        "kind": "gaussian",
        "quant_type": "nf4",
        "block_size": 64,
        "n": 20,
        "relative_root_error": 0.09,
    }
    return [CONTEXT | row for row in [*rows, gaussian]]


METHODS = {
    "head-only": 0,
    "full": 22_000_000,
    "lora r=1": 41_472,
    "lora r=8": 331_776,
    "pissa r=8": 331_776,
    "qlora r=8": 331_776,
    "refta R=15 bits=16": 103_680,
    "refta R=48 bits=16": 331_776,
    "refta R=48 bits=16 transform=identity": 331_776,
    "refta R=48 refine=0": 331_776,
    "refta R=48": 331_776,
    "refta R=48 calibrated": 331_776,
}


def score_rows(shifts=None, task="sst2", metric="accuracy", seeds=5):
    """Rows of every method: one score per seed, with a shift per method."""
    shifts = {"head-only": -0.12} | (shifts or {})
    wiggle = [0.004, -0.006, 0.002, 0.005, -0.003]
    rows = []
    for place, (method, adapter) in enumerate(METHODS.items()):
        shared = {
            "study": "accuracy",
            "task": task,
            "model": "mini",
            "method": method,
            "steps": 64,
            "batch_size": 32,
            "train_rows": 2000,
            "validation_rows": 500,
            "test_rows": 2000,
            "max_length": 64,
            "n": 872,
            "metric": metric,
            "loss": 0.4,
            "train_loss": 0.4,
            "trained_parameters": 148_610 + adapter,
            "head_parameters": 148_610,
            "build_s": 1.0,
            "train_s": 20.0,
            "cpu_s": 20.0,
            "peak_bytes": 300_000_000,
        }
        rates = (0.001, 0.003, 0.01)
        chosen = rates[-1] if method == "lora r=1" else rates[1]
        better = 0.79 if metric == "perplexity" else 0.81
        rows += [
            shared
            | {
                "kind": "search",
                "split": "validation",
                "learning_rate": rate,
                "value": better if rate == chosen else 0.8,
            }
            for rate in rates
        ]
        for seed in range(1, seeds + 1):
            value = (
                0.82
                + wiggle[seed - 1]
                + 0.001 * wiggle[(seed + place) % 5]
                + shifts.get(method, 0.0)
            )
            rows.append(
                shared
                | {
                    "kind": "score",
                    "split": "test",
                    "seed": seed,
                    "value": value,
                    "learning_rate": chosen,
                }
            )
    return [CONTEXT | row for row in rows]


def cost_rows(rebuilding=1.5):
    """One setting, without and with checkpointing."""
    methods = {
        "floor": (0, 1.0),
        "qlora r=16": (2_523_136, 1.1),
        "qlora r=8": (1_261_568, 1.08),
        "rebuilding R=64": (1_261_568, rebuilding),
        "refta R=64": (1_261_568, 1.05),
    }
    rows = [
        {
            "study": "cost",
            "kind": "step",
            "setting": "cpu",
            "method": method,
            "checkpointing": checkpointing,
            "dtype": "float32",
            "batch": [4, 256],
            "trained_parameters": count,
            "n": 7,
            "step_s": seconds,
            "of_floor": seconds,
            "of_qlora": seconds / 1.1,
            "peak_bytes": int(6e8 * seconds),
            "peak_of_floor": seconds,
            "peak_of_qlora": seconds / 1.1,
        }
        for checkpointing in (False, True)
        for method, (count, seconds) in methods.items()
    ]
    return [CONTEXT | row for row in rows]


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A folder with REPORT.md and page/ from all three files; one metric is a perplexity."""
    folder = tmp_path_factory.mktemp("report")
    lines = score_rows({"refta R=15 bits=16": 0.1}, task="tiny shakespeare", metric="perplexity")
    rows = write(
        folder / "rows",
        quant_error=error_rows(),
        accuracy=[*score_rows(), *lines],
        cost=cost_rows(),
    )
    run(rows, folder / "REPORT.md", None)
    return folder


def word(claim, **files):
    """The verdict on the one claim that contains these words."""
    (found,) = [one for one in verdicts(files) if claim in one.claim]
    return found.word


def model_rows(rows):
    return findings.pick(rows, kind="model", quant_type="nf4")


def test_titles_say_who_leaves_less_error_and_flip_with_the_rows():
    ahead = findings.error_title(model_rows(error_rows()), "ratio", "weight error")
    assert ahead.startswith(
        "NF4, R = 192: ReFTA lsm3, refined leaves the least weight error, 0.46 times Q(W)'s"
    )
    assert "the best of the other side, LoftQ, 0.48" in ahead
    behind = findings.error_title(
        model_rows(error_rows(rivals={"pissa": 0.5})), "ratio", "weight error"
    )
    assert behind.startswith("NF4, R = 192: PiSSA leaves the least")
    assert "ReFTA lsm3, refined" in behind
    nothing = findings.error_title(model_rows(error_rows(rises=True)), "ratio", "weight error")
    assert nothing.startswith("NF4, R = 192: no method lowers weight error")
    level = findings.error_title(
        model_rows(error_rows(rivals={"pissa": 0.93})), "ratio", "weight error"
    )
    assert "are level in weight error" in level


@pytest.mark.parametrize(
    ("factors", "title", "verdict"),
    [
        ({"lsm3": 1.0, "identity": 1.03}, "lsm3 beats identity in all 36 cells", HOLDS),
        ({"lsm3": 1.0, "identity": 1.0}, "identity is as good as lsm3 in all 36 cells", FAILS),
        ({"lsm3": 1.0, "identity": 0.9}, "identity is better than lsm3 in all 36 cells", FAILS),
    ],
)
def test_lsm3_against_identity(factors, title, verdict):
    rows = error_rows(transforms=factors)
    assert findings.transform_title(rows).startswith(title)
    assert word("(lsm3) leaves less error", quant_error=rows) == verdict


def test_error_that_rises_with_rank_is_found_and_named():
    count, exceptions = findings.monotone(findings.pick(error_rows(), kind="stack"))
    assert count == 4 * 3 * 3 * 3
    assert exceptions == {}
    assert word("falls as R grows", quant_error=error_rows()) == HOLDS
    rows = error_rows(rises=True)
    assert word("falls as R grows", quant_error=rows) == FAILS
    assert word("One number, R", quant_error=rows) == FAILS
    one = [
        row | {"ratio": 0.99} if row.get("rank") == 96 and "query" in row["stack"] else row
        for row in error_rows(transforms={"lsm3": 1.0}, starts={"refined": 1.0})
    ]
    _, exceptions = findings.monotone(findings.pick(one, kind="stack", quant_type="nf4"))
    assert list(exceptions) == ["mini, attention.self.query, NF4, ReFTA lsm3, refined"]
    assert exceptions.popitem()[1] == ["R = 48 to 96: 0.8360 to 0.9900"]
    assert word("falls as R grows", quant_error=one) == IN_PART


def test_residual_above_the_baseline_is_told():
    assert word("with less error than the whole weight", quant_error=error_rows()) == HOLDS
    assert (
        word(
            "with less error than the whole weight", quant_error=error_rows(starts={"one shot": 3})
        )
        == FAILS
    )


@pytest.mark.parametrize(
    ("shift", "verdict", "title"),
    [
        (0.0, HOLDS, "is level with"),
        (-0.05, FAILS, "loses to"),
        (0.05, HOLDS, "beats"),
    ],
)
def test_scores_against_lora(shift, verdict, title):
    rows = score_rows({"refta R=15 bits=16": shift, "refta R=48 bits=16": shift})
    (methods,) = scores.scores(rows).values()
    assert title in scores.score_title("sst2", methods)
    (name, one), *_ = methods.items()
    assert f"sst2: {name} alone so far" in scores.score_title("sst2", {name: one})
    assert (
        word("ReFTA: LoRA's score or better with fewer trainable parameters (16", accuracy=rows)
        == verdict
    )
    assert (
        word("a fraction of LoRA's parameters", accuracy=rows) == IN_PART
    )  # R = 15 trains more than r = 1


def test_a_difference_is_paired_and_has_the_textbook_standard_error():
    rows = score_rows()
    (methods,) = scores.scores(rows).values()
    pair = scores.difference(
        methods["refta R=48 bits=16"], methods["lora r=8"], methods["head-only"]
    )
    values = [
        methods["refta R=48 bits=16"].values[seed] - methods["lora r=8"].values[seed]
        for seed in range(1, 6)
    ]
    middle = sum(values) / 5
    assert pair.mean == pytest.approx(middle)
    assert pair.standard_error == pytest.approx(
        (sum((one - middle) ** 2 for one in values) / 4 / 5) ** 0.5
    )
    assert pair.gain == pytest.approx(methods["lora r=8"].mean - methods["head-only"].mean)


def test_less_perplexity_is_better():
    shifts = {"head-only": 0.9, "refta R=48 bits=16": 0.05, "refta R=15 bits=16": 0.05}
    rows = score_rows(shifts, metric="perplexity")
    assert (
        word("ReFTA: LoRA's score or better with fewer trainable parameters (16", accuracy=rows)
        == FAILS
    )


def test_nothing_is_told_where_lora_gains_nothing_or_one_seed_ran():
    blind = score_rows({"head-only": 0.01})
    assert (
        word("ReFTA: LoRA's score or better with fewer trainable parameters (16", accuracy=blind)
        == UNDECIDED
    )
    single = score_rows(seeds=1)
    assert (
        word("ReFTA: LoRA's score or better with fewer trainable parameters (16", accuracy=single)
        == UNDECIDED
    )


def test_adapter_parameters_leave_out_the_head_and_edges_are_marked():
    (methods,) = scores.scores(score_rows()).values()
    table = {line[0]: line for line in scores.score_table(methods).rows}
    assert table["refta R=15 bits=16"][1] == "103,680"
    assert table["lora r=1"][4] == "0.01 (edge)"
    assert table["lora r=8"][4] == "0.003"


def test_scores_at_a_learning_rate_that_was_not_chosen_do_not_count():
    """A larger search may choose another rate; runs at the old rate stay in the file."""
    rows = score_rows()
    other = [
        row | {"learning_rate": 0.001, "value": 0.1}
        for row in rows
        if row["kind"] == "score" and row["method"] == "lora r=8"
    ]
    assert scores.scores([*rows, *other]) == scores.scores(rows) == scores.scores([*other, *rows])


def test_rates_that_one_method_alone_was_searched_on_do_not_count():
    """Otherwise a finer search would choose for that method, and not for its rivals."""
    rows = score_rows()
    finer = [
        row | {"learning_rate": 0.0055, "value": 0.9}
        for row in rows
        if row["method"] == "lora r=8" and row["learning_rate"] == 0.003
    ]
    assert scores.scores([*rows, *finer]) == scores.scores(rows)


def test_a_difference_names_learning_rates_that_differ():
    (methods,) = scores.scores(score_rows()).values()
    assert "learning rates" not in str(
        scores.difference(methods["refta R=48"], methods["qlora r=8"], None)
    )
    told = str(scores.difference(methods["refta R=15 bits=16"], methods["lora r=1"], None))
    assert told.endswith("2.5 times the trainable parameters; learning rates 0.003 and 0.01)")


def test_a_run_that_diverged_is_shown_and_decides_nothing():
    rows = [
        row | {"value": float("nan")}
        if (row["kind"], row["method"], row.get("seed")) == ("score", "lora r=8", 2)
        else row
        for row in score_rows()
    ]
    (methods,) = scores.scores(rows).values()
    assert "nan" in scores.shown(methods["lora r=8"])
    assert (
        scores.difference(methods["refta R=48 bits=16"], methods["lora r=8"], None).word
        == "undecided"
    )


def judged(values, gain=None, metric="accuracy"):
    """The word for these differences to a rival that scores 0.8 and gains `gain`."""

    def score(values):
        return scores.Score("refta", metric, values, 10, 1e-3, False, 1.0, None, 100)

    seeds = range(len(values))
    ours = score({seed: 0.8 + values[seed] for seed in seeds})
    theirs = score(dict.fromkeys(seeds, 0.8))
    head = None if gain is None else score(dict.fromkeys(seeds, 0.8 - gain))
    return scores.difference(ours, theirs, head).word


def test_few_seeds_need_a_wider_margin():
    """Student's t: with two seeds 12.7 standard errors, with five 2.8."""
    assert judged([0.02, 0.03]) == "undecided"  # 5 standard errors
    assert judged([0.02, 0.03, 0.02, 0.03, 0.025]) == "better"


def test_level_means_that_a_loss_above_the_margin_is_excluded():
    assert judged([0.001, -0.001, 0.002, -0.002, 0.0]) == "level"
    assert judged([-0.004, -0.002, -0.003, 0.0005, -0.001]) == "level"  # -0.4 points at worst
    assert judged([-0.03, 0.03, -0.02, 0.02, 0.0]) == "undecided"
    assert judged([-0.02, -0.01, 0.001, -0.03, 0.0]) == "undecided"  # clearly below 0, never level
    assert judged([-0.02, -0.021, -0.019, -0.02, -0.02]) == "worse"
    assert judged([0.003, -0.003, 0.002, -0.002, 0.0], metric="perplexity") == "level"  # of 0.8


def test_a_task_on_which_nothing_is_learned_tells_nothing_either_way():
    clear = [-0.02, -0.021, -0.019, -0.02, -0.02]
    assert judged(clear, gain=0.05) == "worse"
    assert judged(clear, gain=0.0005) == "undecided"
    assert judged([-value for value in clear], gain=0.0005) == "undecided"


def test_starts_are_compared_by_error_and_by_score():
    rows = error_rows()
    assert word("refinement leaves less weight error than", quant_error=rows) == HOLDS
    worse = error_rows(starts={"one shot": 1.0, "refined": 1.1, "calibrated": 0.97})
    assert word("refinement leaves less weight error than", quant_error=worse) == FAILS
    assert word("calibration leaves less output error than refinement", quant_error=rows) == HOLDS
    assert word("improve the score", accuracy=score_rows()) == FAILS
    shows = score_rows({"refta R=48": 0.02, "refta R=48 calibrated": 0.04})
    assert word("improve the score", accuracy=shows) == HOLDS


def test_layers_are_shown_and_those_above_one_counted():
    rows = [row for row in error_rows() if row["kind"] == "stack" and row["quant_type"] == "nf4"]
    table = findings.layers_table(rows, 48)
    assert table.header == ["stack", *(f"layer {layer}" for layer in range(1, 7))]
    (query,) = [
        row
        for row in rows
        if row["rank"] == 48
        and row["start"] == "refined"
        and row["transform"] == "lsm3"
        and "query" in row["stack"]
    ]
    assert table.rows[0] == [
        "attention.self.query",
        *(f"{ratio:.3f}" for ratio in query["layer_ratios"]),
    ]
    assert "every linear layer has less error than whole" in findings.layers_title(rows, 48)
    worse = [row | {"layer_ratios": [1.5, *row["layer_ratios"][1:]]} for row in rows]
    title = findings.layers_title(worse, 48)
    assert "4 of 24 linear layers have no less error than whole" in title
    assert "1.50 (attention.self.query, layer 1)" in title
    assert (
        findings.layer_rows(
            [{key: row[key] for key in row if key != "layer_ratios"} for row in rows], 48
        )
        == []
    )


def test_a_model_that_is_scored_as_it_is_has_no_peak():
    rows = [
        row | {"peak_bytes": None, "trained_parameters": row["head_parameters"]}
        for row in score_rows()
        if row["method"] == "head-only"
    ]
    (methods,) = scores.scores(rows).values()
    assert scores.score_table(methods).rows[0][-1] == "-"


def test_rivals_for_the_same_bytes():
    assert word("PiSSA", quant_error=error_rows()) == HOLDS
    assert word("PiSSA", quant_error=error_rows(rivals={"pissa": 0.8})) == FAILS
    assert word("PiSSA", quant_error=error_rows(rivals={})) == UNDECIDED
    assert word("smaller block", quant_error=error_rows(smaller=2)) == HOLDS
    assert word("smaller block", quant_error=error_rows(smaller=0.3)) == FAILS
    title = findings.bytes_title(model_rows(error_rows(smaller=0.3)))
    assert title.startswith(
        "For the same bytes a smaller block beats a refined split in all 4 cells"
    )


def test_rebuilding_must_cost_more_for_its_claim():
    assert word("rebuilding a dense weight", cost=cost_rows(1.5)) == HOLDS
    assert word("rebuilding a dense weight", cost=cost_rows(0.9)) == FAILS
    assert word("rebuilding a dense weight") == UNDECIDED


def test_counted_parameters_equal_those_of_training_runs():
    """R (in + out) per stack, r (in + out) per layer, as counted in training runs of MiniLM."""
    stacks = [(6, 384, 384)] * 4 + [(6, 1536, 384), (6, 384, 1536)]
    assert (
        findings.trainable_parameters(stacks, R=48)
        == findings.trainable_parameters(stacks, r=8)
        == METHODS["lora r=8"]
    )
    assert findings.trainable_parameters(stacks, R=15) == METHODS["refta R=15 bits=16"]
    assert (
        "ReFTA R = 15 trains more parameters than LoRA r = 1 (103,680 and 41,472)"
        in findings.depth_title(stacks)
    )
    deep = [(48, 384, 384)]
    assert "trains fewer parameters than" in findings.depth_title(deep)


def test_spectra_are_compared_by_the_energy_of_their_largest_values():
    rows = [
        {"stack": "a.*.b", "transform": "lsm3", "values": [3.0, 1.0]},
        {"stack": "a.*.b", "transform": "identity", "values": [2.0, 1.0]},
    ]
    assert findings.energies(rows, 1) == {"lsm3": 9.0, "identity": 4.0}
    assert findings.spectrum_title(rows) == (
        "lsm3 gathers the most energy in the 2 largest components of b: +100.0% relative to "
        "identity"
    )
    flipped = [
        row | {"values": row["values"][::-1] if row["transform"] == "lsm3" else [9.0, 9.0]}
        for row in rows
    ]
    assert findings.spectrum_title(flipped).startswith("identity gathers the most")
    assert "No transform gathers more" in findings.spectrum_title(
        [row | {"values": [1.0]} for row in rows]
    )


def test_links_of_the_markdown_file_lead_to_pictures(report):
    text = (report / "REPORT.md").read_text(encoding="utf-8")
    links = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert {Path(link).name for link in links} == {
        path.name for path in (report / "page").glob("*.svg")
    }
    assert all((report / link).is_file() for link in links)
    assert "tiny shakespeare: refta" in text


@pytest.mark.slow
def test_the_same_rows_give_the_same_bytes(report, tmp_path):
    run(report / "rows", tmp_path / "REPORT.md", None)
    for path in sorted((report / "page").iterdir()):
        assert (tmp_path / "page" / path.name).read_bytes() == path.read_bytes(), path.name
    assert (tmp_path / "REPORT.md").read_bytes() == (report / "REPORT.md").read_bytes()


def test_pictures_of_removed_rows_go_and_other_files_stay(tmp_path):
    rows = cost_rows()
    write(tmp_path / "rows", cost=[row | {"setting": f"old {row['setting']}"} for row in rows])
    run(tmp_path / "rows", tmp_path / "REPORT.md", None)
    page = tmp_path / "page"
    before = {path.name for path in page.glob("*.svg")}
    (page / "mine.svg").write_text("<svg/>")
    run(write(tmp_path / "rows", cost=rows), tmp_path / "REPORT.md", None)
    after = {path.name for path in page.glob("*.svg")}
    assert before
    assert after & before == set()
    assert "mine.svg" in after
    assert len(after) == len(before) + 1


def test_a_missing_file_leaves_its_section_out_and_names_its_command(tmp_path):
    run(write(tmp_path / "rows", cost=cost_rows()), tmp_path / "REPORT.md", tmp_path / "out")
    for text in (
        (tmp_path / "REPORT.md").read_text(),
        (tmp_path / "out" / "index.html").read_text(),
    ):
        assert "python -m eval accuracy" in text
        assert "eval cost --rows" not in text.split("How it was measured")[0]
    assert len(sections(read_all(tmp_path / "rows"))) == 1


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no rows.*accuracy\.jsonl.*python -m eval cost"):
        run(tmp_path, tmp_path / "REPORT.md", None)


def test_rows_of_another_version_are_refused(tmp_path):
    write(tmp_path / "rows", cost=[row | {"schema": 0} for row in cost_rows()])
    with pytest.raises(ValueError, match="schema 0"):
        run(tmp_path / "rows", tmp_path / "REPORT.md", None)
    old = [{key: value for key, value in row.items() if key != "method"} for row in error_rows()]
    write(tmp_path / "old", quant_error=old)
    with pytest.raises(ValueError, match=r"line 1: .* without method, .*Measure again"):
        run(tmp_path / "old", tmp_path / "REPORT.md", None)


def test_a_cell_that_was_measured_again_counts_once(tmp_path):
    again = [row for row in error_rows() if row["kind"] in ("stack", "model")]
    once = read_all(write(tmp_path / "once", quant_error=error_rows()))
    twice = read_all(write(tmp_path / "twice", quant_error=[*error_rows(), *again]))
    assert len(twice["quant_error"]) == len(once["quant_error"])
    assert verdicts(twice) == verdicts(once)


def test_rows_of_several_texts_are_refused(tmp_path):
    other = [
        row | {"text": "other.txt"} for row in error_rows() if row["kind"] in ("stack", "model")
    ]
    with pytest.raises(
        ValueError, match=r"mini was measured with several settings: .*first\.txt.*other\.txt"
    ):
        read_all(write(tmp_path / "rows", quant_error=[*error_rows(), *other]))


@pytest.mark.parametrize(
    "kept",
    [
        lambda row: row.get("rank", 0) == 0,
        lambda row: row.get("transform") in (None, "dct", "identity"),
        lambda row: row.get("method") in (None, "pissa"),
        lambda row: row.get("start") in (None, "one shot"),
    ],
)
def test_a_part_of_the_rows_makes_a_report(tmp_path, kept):
    """Sections without rows of their ranks, transforms or methods are left out."""
    rows = write(tmp_path / "rows", quant_error=[row for row in error_rows() if kept(row)])
    run(rows, tmp_path / "REPORT.md", None)
    assert "## The claims" in (tmp_path / "REPORT.md").read_text()


def test_the_committed_report_follows_from_the_committed_rows(tmp_path):
    """Pictures are compared by their texts, because matplotlib versions draw differently."""
    run(ROWS, tmp_path / "REPORT.md", None)
    committed = ROWS.parent
    assert (tmp_path / "REPORT.md").read_text() == (committed / "REPORT.md").read_text()
    names = {path.name for path in (tmp_path / "page").iterdir()}
    assert {path.name for path in (committed / "page").iterdir()} == names
    for name in names:
        new, old = (texts((folder / "page" / name).read_text()) for folder in (tmp_path, committed))
        assert new == old, name


def texts(markup):
    """The texts between tags."""
    return [text.strip() for text in re.findall(r">([^<>]+)<", markup) if text.strip()]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        pytest.skip("no Chromium is installed")
    options = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=options)
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [390, 1200])
def test_page_opens_in_a_browser(report, browser, width):
    """Pictures are visible, nothing is wider than the screen, no requests, no console messages."""
    opened = browser.new_page(viewport={"width": width, "height": 900})
    requests = []
    complaints = []
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    address = (report / "page" / "index.html").as_uri()
    opened.goto(address)
    pictures = opened.locator("figure svg").all()
    assert len(pictures) == len(list((report / "page").glob("*.svg")))
    for picture in pictures:
        box = picture.bounding_box()
        assert min(box["width"], box["height"]) > 100
        assert (
            opened.evaluate(
                "svg => svg.querySelector('title').textContent.length", picture.element_handle()
            )
            > 20
        )
    opened.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    ids = opened.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))
    assert opened.locator("html").get_attribute("lang") == "en"
    assert (requests, complaints) == ([address], [])
    opened.close()
