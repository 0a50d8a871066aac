"""The accuracy study: equal conditions for all methods, resumed studies, refused options."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers.trainer_utils import PredictionOutput

from eval.peers.baselines import lora, qlora
from eval.peers.named import CORE, build, calibration, parse
from eval.report.scores import study
from eval.rows import SCHEMA, read
from eval.studies import accuracy
from eval.studies.accuracy import (
    SEARCH_SEEDS,
    Cell,
    Study,
    measure,
)
from eval.tasks.task import (
    METRICS,
    NAMED,
    Sizes,
    balanced,
    best_rate,
    find_data,
    in_order,
    text_task,
)
from qrefta.train.rates import LORA_RATE, RATES
from tests.models import tiny_llama, tiny_mixtral
from tests.tiny import color_rows, tiny_folder

ROWS = Path(__file__).parents[2] / "eval" / "rows"
SIZES = Sizes(train=64, validation=16, test=24, length=12)
EVERY = [
    *CORE,
    "vera r=4",
    "loretta r=2",
    "loftq r=2",
    "qera r=2",
    "qlora r=2 quant_type=nf2",
    "rslora r=2",
    "dora r=2",
    "ia3",
    "refta R=3 quant_type=int4 transform=dct",
    "craft ranks=2/5/6",
    "tera trained_params=300",
    "lotr R=2",
    "lorta R=2 bits=16",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 80), ("dev", 24)):
        rows = color_rows(count, seed=len(name))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_folder(tmp_path_factory.mktemp("model"), width=64))


@pytest.fixture(scope="module")
def task(source, model):
    return text_task(str(source), str(source), model, None, SIZES, 0)


@pytest.fixture(autouse=True)
def without_profiler(request, monkeypatch):
    """Skip the slow peak measurement except in tests of the peak."""
    if "peak" not in request.node.name:
        monkeypatch.setattr(accuracy, "peak_bytes", lambda trainer, task, cell: 1)


def cell(method, kind="score", rate=1e-3, seed=0):
    return Cell(
        kind,
        "colors",
        "tiny",
        method,
        rate,
        seed,
        steps=3,
        batch_size=8,
        train_rows=64,
        validation_rows=16,
        test_rows=24,
        max_length=12,
    )


def run(source, model, rows, **options):
    settings = {
        "task": [str(source)],
        "kind": None,
        "methods": "head-only,lora r=2",
        "seeds": 2,
        "model": model,
        "data": None,
        "header": None,
        "learning_rates": "0.001,0.003,0.01",
        "steps": 2,
        "batch_size": 8,
        "train_rows": 64,
        "validation_rows": 16,
        "test_rows": 24,
        "max_length": 12,
        "threads": 1,
        "again": False,
        "rows": rows,
    }
    accuracy.run(**settings | options)


@pytest.mark.parametrize("method", EVERY)
def test_every_method_trains_and_is_scored(task, method):
    row = measure(cell(method.replace("48", "4").replace("15", "2")), task)
    assert row["split"] == "test"
    assert row["n"] == 24
    assert 0 <= row["value"] <= 1
    assert row["head_parameters"] <= row["trained_parameters"]
    assert (row["head_parameters"] == row["trained_parameters"]) == (method == "head-only")


def test_a_search_is_scored_on_rows_put_aside(task):
    row = measure(cell("head-only", kind="search"), task)
    assert (row["split"], row["n"]) == ("validation", 16)
    rows = {
        split: {tuple(ids) for ids in getattr(task, split)["input_ids"]}
        for split in ("train", "validation")
    }
    assert not rows["train"] & rows["validation"]


def test_equal_counts_train_equally_many_parameters(task):
    """K R' = R: the factors of a stack are as large as LoRA's pairs in its layers."""
    layers = len(task.model(0).base_model.encoder.layer)
    lora, refta = (
        measure(cell(method), task) for method in ("lora r=3", f"refta R={3 * layers} bits=16")
    )
    assert lora["trained_parameters"] == refta["trained_parameters"]


@pytest.mark.parametrize(
    "method", ["full", "lora r=2", "qlora r=2", "vera r=4", "refta R=4", "refta R=4 calibrated"]
)
def test_all_methods_see_the_same_batches(task, method):
    """The seed sets the order of batches, even if a method uses the global generator."""
    seen = []

    def collate(rows):
        seen.append([tuple(row["input_ids"]) for row in rows])
        return task.collate(rows)

    measure(cell(method), task._replace(collate=collate))
    order = in_order(task.train, 3, 8, 0)["input_ids"]
    batches = [[tuple(ids) for ids in order[start : start + 8]] for start in range(0, 24, 8)]
    at = seen.index(batches[0])
    assert seen[at : at + 3] == batches


def test_the_head_starts_alike_in_all_methods(task):
    heads = []
    for method in ("head-only", "lora r=2", "qlora r=2", "refta R=4"):
        found = dict(build(method, task, seed=3).named_parameters())
        heads.append(
            next(
                value
                for name, value in found.items()
                if "classifier" in name and value.requires_grad
            )
        )
    for head in heads[1:]:
        assert_close(head, heads[0])


def test_measuring_the_peak_changes_no_weight(task, monkeypatch):
    """Its steps come at the end of the decay, with a learning rate of 0."""
    found = {}

    def peak(trainer, *arguments, original=accuracy.peak_bytes):
        before = {name: value.clone() for name, value in trainer.model.named_parameters()}
        found["bytes"] = original(trainer, *arguments)
        found["same"] = all(
            torch.equal(before[name], value) for name, value in trainer.model.named_parameters()
        )
        return found["bytes"]

    monkeypatch.setattr(accuracy, "peak_bytes", peak)
    measure(cell("full"), task)
    assert found["same"]
    parameters = sum(parameter.numel() for parameter in task.model(0).parameters())
    assert found["bytes"] > 4 * 4 * parameters  # weights, gradients and two moments, float32


@pytest.mark.slow
def test_models_that_are_kept_for_other_rates_do_not_count_in_the_peak(task, tmp_path):
    study = Study(lambda seed: task, tmp_path / "rows.jsonl", False)
    peaks = [
        study.row(cell("lora r=2", kind="search")._replace(seed=seed))["peak_bytes"]
        for seed in SEARCH_SEEDS
    ]
    parameters = sum(parameter.numel() for parameter in task.model(0).parameters())
    assert max(peaks) - min(peaks) < 0.2 * 4 * parameters
    assert min(peaks) > 4 * parameters


def test_the_starts_of_quantized_peers_are_near_the_model(task):
    """QPiSSA, LoftQ and QERA: quantized part plus pair is nearer to the weights than QLoRA's
    start.
    """
    batch = next(calibration(task))
    dense = task.model(0).eval()

    def distance(method):
        with torch.no_grad():
            hidden = (
                build(method, task, 0).eval().get_base_model().base_model(**batch).last_hidden_state
            )
            wanted = dense.base_model(**batch).last_hidden_state
        return (hidden - wanted).norm() / wanted.norm()

    plain = distance("qlora r=8")
    assert 0.02 < plain < 0.5
    assert distance("pissa r=8") < 1e-4
    assert distance("loftq r=8") < plain
    assert distance("qpissa r=8") < 1.1 * plain
    assert distance("qera r=8") < plain
    two_bits = distance("qlora r=8 quant_type=nf2")
    assert two_bits > 2 * plain
    assert distance("loftq r=8 quant_type=nf2") < two_bits
    assert distance("qera r=8 quant_type=nf2") < two_bits


def test_a_quantized_peer_trains_the_same_after_an_evaluation():
    """bitsandbytes repacks weights in evaluation, on CPUs with AVX512-BF16, and not back."""
    ids = torch.arange(24).view(2, 12)

    def gradients(evaluate):
        torch.manual_seed(0)
        peer = qlora(tiny_llama(hidden=64), 2, alpha=4)
        if evaluate:
            with torch.no_grad():
                peer.eval()(input_ids=ids)
        peer.train()(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in peer.parameters() if p.grad is not None]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert_close(found, expected)


def test_calibration_has_no_labels(task):
    batches = list(calibration(task))
    assert all("labels" not in batch and "input_ids" in batch for batch in batches)
    assert sum(len(batch["input_ids"]) for batch in batches) == 64


def outcome(value, loss=1.0):
    return {"split": "", "metric": "accuracy", "value": value, "loss": loss, "cpu_s": 0.0}


@pytest.mark.slow
def test_rates_are_chosen_on_search_seeds_and_run_on_others(source, model, tmp_path, monkeypatch):
    """The mean over the search seeds decides; test rows have no influence."""
    best = {"head-only": 0.01, "lora r=2": 0.001}

    def scored(cell, task, built):
        good = (cell.learning_rate == best[cell.method]) == (cell.kind == "search")
        lucky = cell.kind == "search" and cell.learning_rate == 0.003 and cell.seed == 0
        return outcome(1.0 if lucky else 0.9 if good else 0.1)

    monkeypatch.setattr(accuracy, "measure", scored)
    file = tmp_path / "rows.jsonl"
    run(source, model, file, learning_rates="0.0003,0.001,0.003,0.01,0.03")
    for method, rate in best.items():
        rows = [row for row in read(file) if row["method"] == method]
        seeds = [row["seed"] for row in rows if row["kind"] == "search"]
        assert seeds == 5 * list(SEARCH_SEEDS)
        assert [(row["learning_rate"], row["seed"]) for row in rows if row["kind"] == "score"] == [
            (rate, 1),
            (rate, 2),
        ]


@pytest.mark.parametrize(
    ("peak", "tried"),
    [
        (0.003, [0.001, 0.003, 0.01]),
        (0.03, [0.001, 0.003, 0.01, 0.03, 0.1]),
        (0.0003, [0.0001, 0.0003, 0.001, 0.003, 0.01]),
        (100.0, [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]),
    ],
)
def test_a_search_grows_until_the_best_rate_has_neighbours(
    source, model, tmp_path, monkeypatch, peak, tried
):
    def scored(cell, task, built):
        return outcome(1 / (1 + abs(np.log(cell.learning_rate / peak))))

    monkeypatch.setattr(accuracy, "measure", scored)
    file = tmp_path / "rows.jsonl"
    run(source, model, file, methods="lora r=2", learning_rates="0.001,0.003,0.01", seeds=1)
    searched = [row["learning_rate"] for row in read(file) if row["kind"] == "search"]
    assert sorted(searched) == sorted(3 * tried)  # each rate once for each of three seeds
    (rate,) = {row["learning_rate"] for row in read(file) if row["kind"] == "score"}
    assert rate == min(peak, 3.0)


def test_language_tasks_take_the_model_of_a_package_by_default(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "smollm2_folder", lambda cache: cache / "here")
    monkeypatch.setenv("QREFTA_CACHE", str(tmp_path))
    place = str(tmp_path / "here")
    for kind in ("language", "choice", "prompt"):
        assert accuracy._model_of(kind, None) == ("SmolLM2-135M-Instruct", place)
        assert accuracy._model_of(kind, "mine") == ("mine", "mine")
    assert accuracy._model_of("text", None) == ("all-MiniLM-L6-v2", None)
    assert set(accuracy.LANGUAGE_KINDS) == set(accuracy.KINDS) - {"text", "image"}


@pytest.mark.slow
def test_a_stopped_study_resumes(source, model, tmp_path, monkeypatch):
    """Runs with a row are not repeated unless requested; missing runs are done."""
    file = tmp_path / "rows.jsonl"
    ran = []
    monkeypatch.setattr(
        accuracy,
        "measure",
        lambda cell, task, built: (
            ran.append(cell) or outcome(abs(cell.learning_rate - 0.003) < 0.002)
        ),
    )
    run(source, model, file)
    assert len(ran) == 2 * (9 + 2)
    run(source, model, file)
    assert len(ran) == 22
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5] + lines[6:]))
    run(source, model, file)
    assert ran[22:] == [ran[5]]
    run(source, model, file, seeds=3)
    assert len(ran) == 25
    run(source, model, file, again=True)
    assert len(ran) == 47


def test_of_equal_scores_the_lower_loss_wins_and_divergence_never():
    def best(*runs, metric="accuracy"):
        """The best of rates 1, 2, ...; each has a (value, loss) a seed."""
        return best_rate(
            [
                {"learning_rate": rate, "value": value, "loss": loss, "metric": metric}
                for rate, seeds in enumerate(runs, 1)
                for value, loss in seeds
            ]
        )

    assert best([(0.5, 2.0)], [(0.5, 1.0)], [(0.4, 0.1)]) == 2
    assert best([(0.4, 1.0)], [(0.9, 1.0), (0.9, float("nan"))]) == 1
    assert best([(0.5, 1.0), (0.5, 1.0)], [(0.9, 1.0), (0.2, 1.0)]) == 2  # by the mean
    assert best([(4.0, 1.0)], [(3.0, 1.0)], metric="perplexity") == 2


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("adalora r=8", r"no method 'adalora'; the methods are head-only, .*refta"),
        ("ia3 r=8", "ia3 takes no options"),
        ("lora", r"'lora': lora takes r=8"),
        ("lora r=0", "lora takes r=8"),
        ("lora r=8 alpha=2", "lora takes r=8"),
        ("full r=8", "full takes no options"),
        ("refta", "refta takes R=48"),
        ("refta R=48 nonsense=1", "refta takes R=48, .*any of bits"),
        ("craft", "craft takes R=48, ranks=6/48/48"),
        ("craft R=4 ranks=2/3/4", "craft takes R=48"),
        ("craft ranks=4", "craft takes R=48"),
        ("tera trained_params=many", "tera takes R=48"),
        ("refta R", "refta takes R=48"),
        ("refta R=auto", "refta takes R=48"),
        ("refta R=48 seed=5", "refta takes R=48"),
        ("refta R=48 refine", "only calibrated and double_quant may have no value"),
        ("refta R=48 bits=", "may have no value"),
        ("lora r", "lora takes r=8"),
        ("lora r=8 quant_type=nf2", "lora takes r=8"),
        ("qlora quant_type=nf2", "qlora takes r=8"),
        ("qera r=8 quant_type=nf8", "quant_type must be one of nf4"),
        ("", "no method ''"),
    ],
)
def test_methods_that_do_not_exist_are_refused_before_anything_runs(
    source, model, tmp_path, method, message
):
    with pytest.raises(ValueError, match=message):
        run(source, model, tmp_path / "rows.jsonl", methods=f"head-only,{method}")
    assert not (tmp_path / "rows.jsonl").exists()


def test_options_of_methods_are_read():
    assert parse("refta R=48 bits=16 transform=identity calibrated") == (
        "refta",
        {"R": 48, "bits": 16, "transform": "identity", "calibrated": True},
    )
    assert parse("lora r=8") == ("lora", {"r": 8})
    assert parse("refta R=8 bits=auto target_bits=3.6")[1]["target_bits"] == 3.6
    assert parse("loftq r=8 quant_type=nf2") == ("loftq", {"r": 8, "quant_type": "nf2"})
    assert parse("refta R=48 double_quant=False")[1]["double_quant"] is False
    assert parse("refta R=48 double_quant")[1]["double_quant"] is True


def test_finished_rows_are_kept_when_a_cell_fails(source, model, tmp_path):
    """The second method has a rank larger than its stack."""
    file = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="rank"):
        run(source, model, file, methods="head-only,refta R=100000", learning_rates="0.001")
    assert [row["method"] for row in read(file)] == ["head-only"] * 2


def test_rows_of_another_schema_are_refused_and_kept(source, model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"schema": SCHEMA + 1}) + "\n")
    with pytest.raises(ValueError, match=f"schema {SCHEMA + 1}"):
        run(source, model, file)
    assert file.read_text() == json.dumps({"schema": SCHEMA + 1}) + "\n"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("text,label\nred,1\nblue,0\n", "2 training rows and 16 are put aside"),
        ("text,colour\nred,1\nblue,0\n", "No label column"),
        ("words,label\n1,1\n2,0\n", "text"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(model, tmp_path, train, message):
    (tmp_path / "train.csv").write_text(train)
    (tmp_path / "dev.csv").write_text(train)
    with pytest.raises(ValueError, match=message):
        text_task("mine", str(tmp_path), model, None, SIZES, 0)


def test_named_data_are_found_or_asked_for(tmp_path, monkeypatch):
    (tmp_path / "sst2").mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_data("sst2", tmp_path) == str(tmp_path / "sst2")
    monkeypatch.setenv("QREFTA_DATA", str(tmp_path))
    assert find_data("sst2", None) == str(tmp_path / "sst2")
    assert find_data("mine.csv", None) == "mine.csv"
    with pytest.raises(
        ValueError,
        match=r"data for cola are missing: .* cola contains train.tsv and dev.tsv.*glue:cola",
    ):
        find_data("cola", None)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert find_data("cola", None) == NAMED["cola"].hub


def test_batches_in_order_are_whole_epochs_of_like_lengths():
    """Each epoch holds every row once, except the rest of its last batch."""
    lengths = np.random.default_rng(0).integers(3, 40, 100)
    rows = Dataset.from_dict(
        {"input_ids": [[index] * int(length) for index, length in enumerate(lengths)]}
    )
    order = [ids[0] for ids in in_order(rows, 24, 8, 0)["input_ids"]]
    assert len(order) == 24 * 8
    assert len(set(order[:96])) == len(set(order[96:])) == 96
    spreads = [
        np.ptp([lengths[row] for row in order[start : start + 8]]) for start in range(0, 192, 8)
    ]
    assert np.mean(spreads) < 8  # of 37
    assert order != [ids[0] for ids in in_order(rows, 24, 8, 1)["input_ids"]]
    assert order == [ids[0] for ids in in_order(rows, 24, 8, 0)["input_ids"]]


def test_balanced_rows_have_equal_classes():
    rows = Dataset.from_dict({"label": [0] * 70 + [1] * 20 + [0] * 10, "place": range(100)})
    chosen = balanced(rows, 30)
    assert sorted(chosen["label"]) == [0] * 15 + [1] * 15
    assert chosen["place"] == sorted(chosen["place"])
    assert sorted(balanced(rows, 1000)["label"]) == [0] * 20 + [1] * 20


def output(found, labels):
    return PredictionOutput(
        np.eye(int(max(found)) + 2)[found], np.array(labels), {"test_loss": 1.5}
    )


def test_metrics_against_their_definitions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    found = rng.integers(0, 2, 300)
    given = output(found, labels)
    assert METRICS["accuracy"].score(given) == pytest.approx((found == labels).mean())
    assert METRICS["matthews"].score(given) == pytest.approx(np.corrcoef(found, labels)[0, 1])
    assert METRICS["matthews"].score(output(labels, labels)) == pytest.approx(1)
    assert METRICS["matthews"].score(output(np.zeros(300, int), labels)) == 0
    assert METRICS["perplexity"].score(given) == pytest.approx(np.exp(1.5))


def test_matthews_of_several_classes_is_gorodkins():
    """(c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2)(s^2 - sum t_k^2)), from counts."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 500)
    found = np.where(rng.random(500) < 0.6, labels, rng.integers(0, 4, 500))
    told = np.bincount(found)
    true = np.bincount(labels)
    expected = (labels == found).sum() * 500 - (told * true).sum()
    expected /= np.sqrt((500**2 - (told**2).sum()) * (500**2 - (true**2).sum()))
    assert METRICS["matthews"].score(output(found, labels)) == pytest.approx(expected)


def test_a_study_loads_a_seeds_task_once(task, tmp_path):
    loaded = []
    study = Study(lambda seed: loaded.append(seed) or task, tmp_path / "rows.jsonl", False)
    for rate in (1e-3, 1e-2):
        study.row(cell("head-only", rate=rate))
    assert loaded == [0]


def test_test_rows_never_train_for_any_seed(model, tmp_path):
    """All seeds split a file equally, so the search seed never sees test rows of other seeds."""
    file = tmp_path / "all.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in color_rows(120, seed=1)))
    tests = []
    for seed in (0, 1):
        found = text_task("mine", str(file), model, None, SIZES, seed)
        tests.append(sorted(map(tuple, found.test["input_ids"])))
    assert tests[0] == tests[1]


def test_quantized_peers_are_refused_where_their_kernel_is_wrong(source, tmp_path):
    """bitsandbytes' Linear4bit on a CPU is wrong for rows that end within a block."""
    narrow = text_task("mine", str(source), str(tiny_folder(tmp_path)), None, SIZES, 0)
    with pytest.raises(ValueError, match=r"has width 32; .* needs multiples of 64"):
        build("qlora r=2", narrow, 0)


@pytest.mark.parametrize("peer", [lora, qlora])
def test_peers_adapt_a_mixture_without_its_experts(peer):
    """PEFT's and bitsandbytes' layers replace linear layers only."""
    adapted = peer(tiny_mixtral(hidden=64), 2, alpha=4)
    trained = {
        name.split(".lora_")[0].split(".")[-1]
        for name, p in adapted.named_parameters()
        if p.requires_grad
    }
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_the_default_learning_rates_follow_from_the_rows():
    """Each is the rate of the grid nearest to the geometric mean of a method's best rates."""
    best = defaultdict(list)
    for (method, _), rows in searches("sst2", "cifar10").items():
        best[method.split()[0]].append(np.log(best_rate(rows)))
    for method, rate in {**RATES, "lora": LORA_RATE, "qlora": LORA_RATE}.items():
        if best[method]:  # every method but those without rows
            assert abs(np.mean(best[method]) - np.log(rate)) < np.log(3), method


def searches(*tasks):
    """The search rows of every method and study of some tasks."""
    found = defaultdict(list)
    for row in read(ROWS / "accuracy.jsonl"):
        if row["kind"] == "search" and row["task"] in tasks:
            found[row["method"], study(row)].append(row)
    return found
