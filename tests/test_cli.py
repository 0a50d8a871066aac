"""The command line, as `python -m qrefta` and through typer's runner."""

import inspect
import json
import re
import runpy
import shutil
import sys
import warnings

import pytest
import torch
import yaml
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    TrainingArguments,
)
from typer.testing import CliRunner

import qrefta
from qrefta.cli import app, main
from qrefta.cli.calibrating import calibration_of
from qrefta.cli.console import guarded
from qrefta.cli.finetune import finetune as finetune_command
from qrefta.cli.plan import _largest
from qrefta.config.rank import parse_rank
from qrefta.hf_config import QReftaConfig
from qrefta.measure.sources import load_causal_model
from qrefta.model.prepared import quant_report
from qrefta.model.stacks import find_stacks
from qrefta.split.calibrate import gather_moments
from qrefta.split.sources import calibration_batches
from qrefta.tables import report_table, results_table
from qrefta.train.arguments import DEFAULTS
from qrefta.train.models import load_classifier
from qrefta.train.run import FinetuneResult
from tests.models import build, logits, tiny_llama
from tests.pages import language_tokenizer
from tests.stacks import full_disk
from tests.tiny import color_rows, tiny_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in color_rows(60, seed=1)))
    return file


def invoke(*arguments):
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], catch_exceptions=False
    )


def test_prepare_inspect_merge_round_trip(dense, tmp_path):
    """The merged model is a plain one, near the dense original; inspect shows each stack."""
    result = invoke(
        "prepare",
        dense,
        tmp_path / "4bit",
        "--calibration",
        "none",
        "--rank",
        8,
        "--transform",
        "dct",
        "--quant-type",
        "int4",
    )
    assert result.exit_code == 0
    shown = " ".join(invoke("inspect", tmp_path / "4bit").output.split())
    assert "attention.self.query" in shown
    assert "transform dct" in shown
    assert "quant_type int4" in shown
    assert (
        invoke("merge", tmp_path / "4bit", tmp_path / "dense", "--dtype", "float32").exit_code == 0
    )
    original, merged = (
        AutoModelForSequenceClassification.from_pretrained(path)
        for path in (dense, tmp_path / "dense")
    )
    assert not hasattr(merged.config, "quantization_config")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == "float32"
    distance = (logits(merged) - logits(original)).norm() / logits(original).norm()
    assert 0 < distance < 0.5  # 4 bits on random weights cost; a wrong merge is off by 1 and more


def test_other_methods_are_prepared_and_trained(dense, rows, tmp_path):
    """CRAFT with three ranks, from a checkpoint; TeRA with a count of numbers, trained at once."""
    uncalibrated = ["--calibration", "none", "--refine", 1]
    result = invoke(
        "prepare", dense, tmp_path / "craft", "--method", "craft", "--rank", "2,5,6", *uncalibrated
    )
    assert result.exit_code == 0
    shown = " ".join(invoke("inspect", tmp_path / "craft").output.split())
    assert "[2, 5, 6]" in shown
    assert "method craft" in shown
    result = invoke(
        "finetune",
        dense,
        rows,
        tmp_path / "tera",
        "--method",
        "tera",
        "--rank",
        "parameters=500",
        "--max-steps",
        2,
        "--scales",
        "absmax",
        "--rounding",
        "nearest",
        "--calibration",
        "none",
    )
    assert result.exit_code == 0
    reports = quant_report(qrefta.load(tmp_path / "tera"))
    (rank,) = {row["rank"] for row in reports}
    assert rank == 500 // (4 * sum(row["layers"] for row in reports))
    assert {row["ratio"] for row in reports} == {1.0}
    with pytest.raises(ValueError, match="rank is 'auto,2,3'; it must be auto, a whole number"):
        invoke("prepare", dense, tmp_path / "none", "--method", "craft", "--rank", "auto,2,3")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["--ranks", "2,5,6"], "2,5,6"),
        (["--trained-params", 500], "parameters=500"),
        (["--rank", "auto", "--budget-mb", 0.02], "bytes=20000"),
        (["--rank", "auto", "--error-ratio", 0.8], "error=0.8"),
    ],
    ids=str,
)
def test_old_rank_options_work_and_name_the_new_one(old, new, dense, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        "qrefta._prepare.prepare_checkpoint", lambda *args, **settings: chosen.append(settings)
    )
    monkeypatch.setattr("qrefta.cli.prepare.saved_config", lambda folder: QReftaConfig())
    monkeypatch.setattr("qrefta.tables.report_table", lambda rows: "")
    result = invoke("prepare", dense, tmp_path / "out", *old, "--calibration", "none")
    assert f"use --rank {new}" in result.output
    assert chosen[0]["rank"] == parse_rank(new)


def test_calibration_moments_and_rank_by_need(dense, rows, tmp_path):
    """Text gathers moments while preparing; a folder is prepared out of core, also from moments in
    a file.
    """
    common = ["--method", "refta", "--rank", "error=0.8", "--refine", 1]
    words = [*common, "--rounding", "feedback"]
    result = invoke(
        "prepare", dense, tmp_path / "a", *words, "--calibration", rows, "--max-memory", "2GB"
    )
    assert result.exit_code == 0
    assert "Ranks: " in result.output
    model = AutoModelForSequenceClassification.from_pretrained(dense)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    batches = calibration_batches(model, rows, tokenizer)
    gathered = gather_moments(model, find_stacks(model), batches)
    gathered.save(tmp_path / "moments.safetensors")
    result = invoke(
        "prepare", dense, tmp_path / "b", *common, "--moments", tmp_path / "moments.safetensors"
    )
    assert result.exit_code == 0
    assert "Calibrated" not in result.output
    report, again = (qrefta.quant_report(qrefta.load(tmp_path / name)) for name in "ab")
    assert report == again
    assert sum(row["output_ratio"] for row in report) / len(report) < 0.9
    assert "output" in invoke("inspect", tmp_path / "a").output


@pytest.mark.slow
def test_finetune_prepares_trains_and_resumes(dense, rows, tmp_path):
    options = [
        "--rank",
        4,
        "--max-steps",
        4,
        "--batch-size",
        8,
        "--target",
        "query",
        "--target",
        "value",
    ]
    result = invoke("finetune", dense, rows, tmp_path / "out", *options)
    assert result.exit_code == 0
    assert "On the test rows" in result.output
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    again = invoke("finetune", tmp_path / "out", rows, tmp_path / "out", *options, "--resume")
    assert again.exit_code == 0


@pytest.mark.parametrize(
    ("option", "source"), [(None, "the training data"), ("text", "text"), ("rows", "rows.jsonl")]
)
def test_finetune_calibrates_on_its_training_rows_by_default(option, source, dense, rows, tmp_path):
    words = [] if option is None else ["--calibration", rows if option == "rows" else option]
    result = invoke(
        "finetune", dense, rows, tmp_path / "out", "--max-steps", 1, "--rank", 2, *words
    )
    shown = "".join(result.output.split())
    count = r"54rowsofthetrainingdata" if option is None else r"\d+rowsof\S*" + re.escape(source)
    assert re.search(rf"Calibratedon{count}andpreparedin\d+s;--calibrationnone", shown)
    config = qrefta.load(tmp_path / "out").config.quantization_config
    assert config.calibrated
    assert config.settings.rounding == "feedback"


def test_calibration_can_be_turned_off(dense, rows, tmp_path):
    options = ["--max-steps", 1, "--rank", 2, "--calibration", "none"]
    result = invoke("finetune", dense, rows, tmp_path / "out", *options)
    assert "Calibrated" not in result.output
    assert not qrefta.load(tmp_path / "out").config.quantization_config.calibrated


def test_rounding_in_order_needs_text(dense, rows, tmp_path):
    options = ["--rounding", "sequential", "--max-steps", 1, "--rank", 2]
    with pytest.raises(ValueError, match="leave --calibration none out"):
        invoke("finetune", dense, rows, tmp_path / "b", *options, "--calibration", "none")
    for words in (["--calibration", "none"], ["--moments", tmp_path / "m.safetensors"]):
        with pytest.raises(ValueError, match="give --calibration FILE or text, without --moments"):
            invoke("prepare", dense, tmp_path / "c", "--rounding", "sequential", *words)
    assert not (tmp_path / "c").exists()


def test_prepare_reads_as_many_tokens_as_it_is_told(dense, rows, tmp_path):
    options = ["--rank", 0, "--calibration", rows]
    told = invoke("prepare", dense, tmp_path / "a", *options, "--calibration-tokens", 128).output
    assert "Calibrated on 2 rows" in told
    with pytest.raises(ValueError, match="--calibration-tokens is 128 and nothing is calibrated"):
        invoke(
            "prepare", dense, tmp_path / "b", "--calibration", "none", "--calibration-tokens", 128
        )
    assert not (tmp_path / "b").exists()


def test_prepare_rounds_in_order_as_in_python(dense, rows, tmp_path):
    """In the dtype of the files, also where text is read in float32."""
    narrow = tmp_path / "narrow"
    AutoModelForSequenceClassification.from_pretrained(dense, dtype=torch.bfloat16).save_pretrained(
        narrow
    )
    AutoTokenizer.from_pretrained(dense).save_pretrained(narrow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qrefta.model.dtype.has_bf16_instructions", lambda: False)
        invoke("prepare", narrow, tmp_path / "a", "--rank", 0, "--calibration", rows)
    model = AutoModelForSequenceClassification.from_pretrained(narrow, dtype=torch.float32)
    expected = qrefta.prepare(model, rank=0, calibration=rows, progress=False).to(torch.bfloat16)
    found = qrefta.load(tmp_path / "a", dtype="auto")
    assert found.config.quantization_config.settings.rounding == "sequential"
    assert found.dtype == torch.bfloat16
    state = found.state_dict()
    assert state.keys() == expected.state_dict().keys()
    assert all(torch.equal(state[name], one) for name, one in expected.state_dict().items())
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    assert (tmp_path / "a" / "README.md").is_file()


def test_prepare_goes_on_with_a_run_that_was_interrupted_out_of_core(dense, rows, tmp_path):
    words = ["prepare", dense, tmp_path / "a", "--rank", 0, "--calibration", rows]
    with full_disk():
        invoke(*words, "--rounding", "feedback")
    assert invoke(*words).exit_code == 0
    settings = qrefta.load(tmp_path / "a").config.quantization_config.settings
    assert settings.rounding == "feedback"


def test_the_choice_of_rounding_agrees_with_a_prepared_model(dense, rows, tmp_path):
    qrefta.prepare_checkpoint(dense, tmp_path / "prepared", rank=2)
    for rounding, agrees in [("auto", True), ("feedback", True), ("nearest", False)]:
        out = tmp_path / rounding
        options = ["--rounding", rounding, "--max-steps", 1]
        if agrees:
            invoke("finetune", tmp_path / "prepared", rows, out, *options)
            assert (out / "config.json").exists()
            continue
        with pytest.raises(ValueError, match="is prepared already with rounding feedback"):
            invoke("finetune", tmp_path / "prepared", rows, out, *options)


def test_prepare_calibrates_on_generic_text_if_the_model_fits_in_memory(dense, tmp_path):
    result = invoke("prepare", dense, tmp_path / "a", "--rank", 2, "--calibration", "none")
    assert "Calibrated" not in result.output
    result = invoke("prepare", dense, tmp_path / "b", "--rank", 2)
    assert "Calibrated on 256 rows of text" in " ".join(result.output.split())
    assert qrefta.load(tmp_path / "b").config.quantization_config.calibrated


def test_prepare_says_that_a_model_is_too_large_to_calibrate(dense, tmp_path, capsys):
    assert calibration_of(str(dense), "1GB") == "text"
    assert calibration_of(str(dense), "1KB") == "none"
    assert "Not calibrated" in capsys.readouterr().out
    BertModel.from_pretrained(dense).save_pretrained(tmp_path)  # without a tokenizer
    assert calibration_of(str(tmp_path), "1GB") == "none"


def test_a_prepared_base_model_is_fine_tuned(dense, rows, tmp_path):
    """`prepare` saves the class of the checkpoint, here one without a head; `finetune` adds a head
    that trains.
    """
    BertModel.from_pretrained(dense).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    words = ["--rank", 4, "--calibration", "none"]
    assert invoke("prepare", tmp_path / "base", tmp_path / "4bit", *words).exit_code == 0
    result = invoke("finetune", tmp_path / "4bit", rows, tmp_path / "out", "--max-steps", 2)
    assert result.exit_code == 0
    assert "Calibrated on" not in result.output
    assert qrefta.load(tmp_path / "out").classifier.weight.requires_grad


def test_existing_output_is_never_overwritten(dense, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        invoke("prepare", dense, tmp_path, "--calibration", "none")
    with pytest.raises(ValueError, match="not empty"):
        invoke("finetune", dense, tmp_path / "rows.csv", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_expected_errors_are_one_line_and_exit_code_2(dense, tmp_path, monkeypatch, capsys):
    """No traceback for mistakes of the user, and brackets are not taken for markup."""
    words = ["prepare", str(dense), str(tmp_path / "out"), "--target-regex", ".*[qv]_x"]
    monkeypatch.setattr(sys, "argv", ["qrefta", *words, "--calibration", "none"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("qrefta", run_name="__main__")
    assert exit.value.code == 2
    shown = capsys.readouterr()
    assert ".*[qv]_x" in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert not (tmp_path / "out").exists()


def test_a_rank_too_large_names_the_largest(dense, tmp_path):
    with pytest.raises(ValueError, match="the largest allowed rank is 96"):
        invoke("prepare", dense, tmp_path / "out", "--rank", 100000, "--calibration", "none")
    assert not (tmp_path / "out").exists()


def test_inspect_refuses_a_folder_that_holds_no_prepared_model(dense, tmp_path):
    with pytest.raises(ValueError, match="no qrefta model"):
        invoke("inspect", dense)
    with pytest.raises(ValueError, match=r"no config\.json"):
        invoke("inspect", tmp_path)


def test_head_is_drawn_from_the_seed_and_leaves_the_global_one_alone(dense):
    state = torch.get_rng_state()
    first, same, other = (load_classifier(str(dense), ["a", "b", "c"], seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.classifier.weight, same.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


def named_classifier(folder, *names):
    """A tiny classifier with these labels, and its tokenizer."""
    tiny_folder(folder)
    config = AutoConfig.from_pretrained(folder)
    config.id2label = dict(enumerate(names))
    build(BertForSequenceClassification, config).save_pretrained(folder)
    return str(folder)


def test_a_trained_head_that_does_not_fit_is_named(tmp_path):
    model = named_classifier(tmp_path / "model", "a", "b", "c")
    message = (
        r"the labels \['a', 'b', 'c'\].* the classes \['neg', 'pos'\]: its trained head is left out"
    )
    with pytest.warns(UserWarning, match=message):
        loaded = load_classifier(model, ["neg", "pos"], 0)
    assert loaded.config.id2label == {0: "neg", 1: "pos"}


def test_labels_of_a_trained_head_that_get_other_names_are_named(tmp_path):
    model = named_classifier(tmp_path / "model", "ham", "spam")
    message = r"were named \['ham', 'spam'\]; they get the names.* \['neg', 'pos'\]"
    with pytest.warns(UserWarning, match=message):
        load_classifier(model, ["neg", "pos"], 0)


def test_labels_that_fit_and_models_without_a_head_are_not_warned_of(tmp_path):
    model = named_classifier(tmp_path / "model", "ham", "spam")
    BertModel.from_pretrained(model).save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_classifier(model, ["ham", "spam"], 0)
        load_classifier(str(tmp_path / "base"), ["a", "b", "c"], 0)


def test_verify_prints_a_line_a_file_and_refuses_with_the_fix(dense, tmp_path, monkeypatch, capsys):
    options = ["--rank", 2, "--refine", 0, "--calibration", "none"]
    invoke("prepare", dense, tmp_path / "4bit", *options)
    shown = " ".join(invoke("verify", tmp_path / "4bit").output.split())
    names = [path.name for path in (tmp_path / "4bit").iterdir() if path.suffix != ".md"]
    assert all(name in shown for name in names if name.endswith((".json", ".safetensors")))
    assert shown.endswith(f"is whole: {len(qrefta.verify(tmp_path / '4bit'))} files")
    weights = tmp_path / "4bit" / "model-rest.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["qrefta", "verify", str(tmp_path / "4bit")])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "the checksum of" in message
    assert "copy the folder again" in message


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A folder with a dense and a prepared language model, and a text."""
    root = tmp_path_factory.mktemp("language")
    tiny_llama().save_pretrained(root / "dense")
    language_tokenizer().save_pretrained(root / "dense")
    options = ["--rank", 2, "--refine", 0, "--calibration", "none"]
    invoke("prepare", root / "dense", root / "4bit", *options)
    (root / "text.txt").write_text(" ".join(f"w{30 + index * index % 60}" for index in range(90)))
    (root / "more.txt").write_text("w40 w50 w60")
    return root


def test_evaluate_measures_the_distance_to_a_reference(language):
    """The numbers are the results of `qrefta.compare`, one column a text; the card takes them."""
    texts = ["--text", language / "text.txt", "--text", language / "more.txt"]
    words = ["evaluate", language / "4bit", "--reference", language / "dense", *texts]
    shown = invoke(*words, "--window", 16, "--limit", 3, "--card").output
    for found in qrefta.compare(
        language / "4bit",
        language / "dense",
        [language / "text.txt", language / "more.txt"],
        window=16,
        limit=3,
        progress=False,
    ):
        assert found.kl_mean > 0
        for value in found.to_text().values():
            assert value in shown
    card = (language / "4bit" / "README.md").read_text()
    assert card.count("## Kept of the base model") == 1
    assert f"{found.kl_mean:.4g}" in card


def test_evaluate_measures_perplexity_alone(language):
    shown = invoke("evaluate", language / "4bit", "--text", language / "more.txt").output
    assert "perplexity" in shown
    assert "KL" not in shown
    assert "reference" not in shown


def test_evaluate_measures_texts_and_tasks_together(language, monkeypatch):
    asked = []

    def scores(model, tasks, **options):
        asked.append((model, tasks, options["limit"]))
        return {"results": {"colors": {"acc,none": 0.25}}}

    monkeypatch.setattr("qrefta.measure.harness.evaluate", scores)
    model = str(language / "dense")
    shown = invoke("evaluate", model, "colors", "--text", language / "more.txt", "--limit", 1)
    assert asked == [(model, ["colors"], 1)]
    assert "0.25" in shown.output
    assert "perplexity" in shown.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to measure; give tasks, or a text file by --text"),
        (["--reference", "base"], "--reference needs a text"),
        (["colors", "--reference", "base"], "--reference needs a text"),
        (["--text", "a.txt", "--card"], "--card writes a comparison; add --reference"),
        (["--text", "a.txt", "--num-fewshot", 1], "belong to tasks, and no task is given"),
        (["--text", "a.txt", "--include-path", "tasks"], "belong to tasks, and no task is given"),
        (["--text", "a.txt", "--reference", "b", "--card"], "has no model card by qrefta"),
    ],
    ids=str,
)
def test_evaluate_refuses_options_that_do_not_fit(options, message, language):
    with pytest.raises(ValueError, match=message):
        invoke("evaluate", language / "dense", *options)


def test_a_missing_package_is_one_line(language, monkeypatch, capsys):
    (language / "model.gguf").touch()
    monkeypatch.setattr("qrefta.files.sources.is_gguf_available", lambda: False)
    words = ["evaluate", str(language / "model.gguf"), "--text", str(language / "more.txt")]
    monkeypatch.setattr(sys, "argv", ["qrefta", *words])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert "pip install gguf" in " ".join(capsys.readouterr().err.split())


def test_tasks_on_a_gguf_file_are_refused():
    with pytest.raises(ValueError, match=r"tasks need a folder or hub name, and model\.gguf"):
        invoke("evaluate", "model.gguf", "colors")


def test_results_show_accuracy_of_classes_and_perplexity_of_text():
    result = FinetuneResult(0.25, 0.75, 2.0, 1.0, 1.2, 40, 12.0, 1234)
    shown = _printed(results_table({"one": result}))
    assert ["one", "1,234", "25.0%", "75.0%", "2.000", "1.000", "40", "12"] in shown
    text = result._replace(accuracy_before=None, accuracy_after=None)
    shown = _printed(results_table({"one": text}))
    assert ["one", "1,234", "7.389", "2.718", "2.000", "1.000", "40", "12"] in shown


def _printed(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return [line.split() for line in capture.get().splitlines()]


def test_bits_by_stack_are_chosen_printed_and_kept(dense, rows, tmp_path):
    asked = ["--bits", "auto", "--target-bits", "4.6", "--rank", 4]
    shown = invoke("prepare", dense, tmp_path / "mixed", "--calibration", "none", *asked).output
    assert "Bits: " in shown
    assert re.search(r"4\.[56]\d* bits a weight", shown)
    inspected = " ".join(invoke("inspect", tmp_path / "mixed").output.split())
    assert "bits auto target_bits 4.6" in inspected
    out = tmp_path / "out"
    assert (
        invoke("finetune", tmp_path / "mixed", rows, out, *asked, "--max-steps", 1).exit_code == 0
    )
    assert "peak" in invoke("plan", dense, "--seq", 32, *asked).output
    with pytest.raises(ValueError, match="bits is 'five'; it must be one of 4, 3, 2, 16, auto"):
        invoke("prepare", dense, tmp_path / "five", "--bits", "five", "--calibration", "none")


@pytest.mark.slow
def test_a_plan_shows_units_and_tells_what_does_not_fit(dense):
    shown = invoke("plan", dense, "--seq", 32, "--batch", 4000, "--gpu", "1001MB").output
    assert not re.search(r"\b0\.0 MB", shown.split("would save", 1)[1])
    assert re.search(r"peak +[\d.]+ MB", shown)
    with pytest.raises(ValueError, match=r"give seq.*\(seq=2048, --seq 2048\)"):
        raise invoke("plan", dense).exception
    assert [_largest("rank", count) for count in (0, 1200)] == [
        "no rank fits",
        "largest rank 1,200",
    ]


@pytest.fixture(scope="module")
def prepared(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "4bit"
    invoke("prepare", dense, folder, "--rank", 4, "--calibration", "none")
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", 5], r"--rank 5 belongs to preparing.*is prepared already with rank 4; leave"),
        (["--quant-type", "int4"], "prepared already with quant_type nf4"),
        (["--target", "query"], "prepared already with target_modules None"),
        (["--bits", "auto", "--target-bits", 3.3], "prepared already with bits 4"),
        (["--calibration", "text"], "--calibration text belongs to preparing"),
    ],
    ids=str,
)
def test_settings_of_preparing_are_refused_for_a_prepared_model(
    options, message, prepared, tmp_path
):
    """Before data and model are read."""
    with pytest.raises(ValueError, match=message):
        invoke("finetune", prepared, "none.csv", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_run_that_ended_before_its_first_checkpoint_can_begin_again(prepared, rows, tmp_path):
    out = tmp_path / "out"
    for left in ("unfinished", "start", "start.partial"):
        (out / left).mkdir(parents=True)
    (out / "recipe.yaml").touch()
    assert invoke("finetune", prepared, rows, out, "--max-steps", 1).exit_code == 0
    assert not {"unfinished", "start", "start.partial"} & {file.name for file in out.iterdir()}
    (tmp_path / "notes" / "start").mkdir(parents=True)
    (tmp_path / "notes" / "my.txt").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        invoke("finetune", prepared, rows, tmp_path / "notes")
    assert (tmp_path / "notes" / "start").is_dir()


def test_brackets_in_the_name_of_a_folder_are_shown(prepared, tmp_path):
    folder = tmp_path / "runs[v2]" / "[" / "old]"
    shutil.copytree(prepared, folder)
    shown = invoke("verify", folder).output.replace("\n", "")
    assert "runs[v2]/[/old] is whole" in shown


def test_too_little_memory_is_one_line(monkeypatch, capsys):
    def run_out():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(SystemExit) as error:
        guarded(run_out)
    assert error.value.code == 2
    told = capsys.readouterr().err.replace("\n", " ")
    assert told.startswith("Error: CUDA out of memory.")
    assert "--gradient-checkpointing" in told
    with pytest.raises(RuntimeError, match="another"):
        guarded(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_the_settings_with_which_a_model_was_prepared_may_be_given_again(prepared, rows, tmp_path):
    same = ["--rank", 4, "--seed", 1, "--max-steps", 1]
    assert invoke("finetune", prepared, rows, tmp_path / "out", *same).exit_code == 0
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["seed"] == 1
    assert not {"rank", "method", "quant-type", "calibration"} & recipe.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--task sft --text-column a",
            "--text-column is for the task classify and lm; the task is",
        ),
        ("--task lm --label-column a", "--label-column is for the task classify; the task is lm"),
        ("--task dpo --header a", "--header is for the task classify; the task is dpo"),
        ("--task lm --text-column a --text-column b", "the task lm reads one column"),
        ("--loss last", "loss='last' (--loss) is for the task sft; the task is 'classify'"),
        ("--batch-size 0", "batch_size (--batch-size) is 0; it must be a whole number, 1 or more"),
        ("--gradient-accumulation 0", "(--gradient-accumulation) is 0; it must be a whole number"),
        ("--epochs -1", "epochs (--epochs) is -1.0; it must be a number above 0, or give the st"),
        ("--epochs nan", "epochs (--epochs) is nan; it must be a number above 0"),
        ("--task lm --mix a.txt:50%", "--mix a.txt:50% has the weight '50%'; it must be a number"),
        (
            "--task grpo --reward REWARD --batch-size 2",
            "has 2 rows: batch_size (--batch-size) 2 x gradient_accumulation "
            "(--gradient-accumulation) 1, in 1 processes. They must be a multiple of "
            "num_generations (--num-generations) 8",
        ),
        ("--task lm --mix a.txt:2 --mix a.txt:3", "a.txt is given twice; give it once"),
    ],
)
def test_options_without_effect_and_numbers_that_are_none_are_refused(options, message, tmp_path):
    """Before data and model are read: there are none."""
    (tmp_path / "reward.py").write_text("def score(completions, **columns): ...")
    options = options.replace("REWARD", f"{tmp_path}/reward.py:score")
    with pytest.raises(ValueError, match=re.escape(message)):
        invoke("finetune", "none", "none.csv", tmp_path / "out", *options.split())


def test_the_command_and_the_function_have_the_same_defaults():
    """They are written twice, since the command line imports no torch to show its help."""
    options = {
        "num_train_epochs": "epochs",
        "per_device_train_batch_size": "batch_size",
        "optim": "optimizer",
        "bf16": "bf16",
    }
    command = inspect.signature(finetune_command).parameters
    for field, option in options.items():
        assert command[option].default == DEFAULTS[field], option
    unchanged = TrainingArguments("out")
    assert command["gradient_accumulation"].default == unchanged.gradient_accumulation_steps
    assert command["max_steps"].default == unchanged.max_steps


@pytest.mark.parametrize("command", ["finetune", "prepare"])
def test_an_empty_name_of_a_model_is_refused(command, rows, tmp_path):
    """As of an unset variable of a shell; as a path it would be the current folder."""
    more = [rows, tmp_path / "out"] if command == "finetune" else [tmp_path / "out", "--rank", 4]
    with pytest.raises(ValueError, match="The name of the model is empty"):
        invoke(command, "", *more)


@pytest.mark.parametrize("model", ["/nope/m", "./nope", "nope/runs/m"])
@pytest.mark.parametrize(
    "command",
    ["finetune MODEL ROWS OUT", "plan MODEL --rank 4", "chat MODEL", "evaluate MODEL --text ROWS"],
)
def test_a_folder_of_a_model_that_is_missing_is_said_to_be(command, model, rows, tmp_path):
    places = {"MODEL": model, "ROWS": rows, "OUT": tmp_path / "out"}
    with pytest.raises(ValueError, match=rf"There is no file or folder {model}"):
        invoke(*(places.get(word, word) for word in command.split()))


def test_other_processes_wait_for_the_first_as_long_as_it_prepares(tmp_path, monkeypatch):
    """The first settings of the processes hold; TrainingArguments' own wait less long."""

    def stop():
        raise RuntimeError("stopped")

    monkeypatch.setattr("qrefta.distributed.processes", stop)
    monkeypatch.setattr("qrefta.train.arguments.training_arguments", None)
    with pytest.raises(RuntimeError, match="stopped"):
        invoke("finetune", "none", "none.csv", tmp_path / "out")


def test_running_text_is_read_from_the_named_column(language, tmp_path):
    """Also of the further data sets; the other column has too few tokens to train on."""
    folder = language / "dense"
    files = []
    for name in ("a", "b"):
        rows = [{"title": "w1", "body": "w5 w6 w7 w8 " * 10}] * 8
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = f"--task lm --text-column body --max-length 32 --max-steps 1 --mix {files[1]}"
    result = invoke("finetune", folder, files[0], tmp_path / "out", *options.split())
    assert "Saved in" in result.output


def test_warnings_are_one_line(dense, tmp_path, monkeypatch, capsys):
    words = ["plan", str(dense), "--seq", "32", "--transform", "dct"]
    monkeypatch.setattr(sys, "argv", ["qrefta", *words])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    with pytest.raises(SystemExit):
        main()
    line = warnings.formatwarning(UserWarning("transform has no effect"), UserWarning, "a.py", 3)
    assert line == "Warning: transform has no effect\n"


def test_tables_fit_in_80_characters():
    """Names of roles and words of the head are whole, also without room to spare."""
    row = {
        "stack": "model.layers.*.self_attn.q_proj",
        "layers": 30,
        "shape": (1536, 576),
        "rank": 60,
        "baseline_error": 10070.4,
        "residual_error": 1234567.8,
        "ratio": 1.521,
        "output_ratio": 0.169,
        "bits_per_weight": 4.61,
        "bytes": 15_000_000,
    }
    console = Console(width=80)
    with console.capture() as capture:
        console.print(report_table([row, row | {"stack": "model.layers.*.mlp.down_proj"}]))
        result = FinetuneResult(None, None, 3.7, 2.6, 1.2, 40, 12.0, 1_234_567)
        console.print(results_table({"QLoRA r=2": result, "qrefta": result}))
    shown = capture.get()
    assert "self_attn.q_proj" in shown
    assert "30x1536x576" in shown
    assert "10,070" in shown
    assert "53.1 M" in shown
    assert "perplexity" in shown
    assert "…" not in shown


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], False),
        (["--gradient-checkpointing"], True),
        (["--gradient-checkpointing", "on"], True),
        (["--gradient-checkpointing=selective"], "selective"),
        (["--gradient-checkpointing", "--no-gradient-checkpointing"], False),
    ],
    ids=str,
)
def test_checkpointing_is_on_without_a_value(words, value, dense, monkeypatch):
    """As in qrefta 0.1, where it was a flag; also in front of an argument."""
    asked = {}

    def plan(_, **given):
        asked.update(given)
        raise ValueError("seen")

    monkeypatch.setattr("qrefta.memory.plan.plan", plan)
    with pytest.raises(ValueError, match="seen"):
        invoke("plan", *words, dense)
    assert asked["gradient_checkpointing"] == value


def test_other_values_of_checkpointing_are_refused(dense):
    with pytest.raises(ValueError, match="is 'full'; it must be off, on or selective"):
        invoke("plan", dense, "--gradient-checkpointing=full")


@pytest.fixture
def narrow(language, tmp_path):
    """The language model in bfloat16, and its running text."""
    folder = tmp_path / "narrow"
    shutil.copytree(language / "dense", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": "w5 w6 w7 w8 " * 10}) + "\n" for _ in range(8)))
    return folder, file


def embeddings_of(folder):
    return qrefta.load(folder, dtype="auto").get_input_embeddings().weight.dtype


@pytest.mark.parametrize(
    ("fast", "options", "dtype"),
    [
        (False, "", torch.float32),
        (False, "--dtype bfloat16", torch.bfloat16),
        (True, "", torch.bfloat16),
        (True, "--dtype float32", torch.float32),
    ],
)
def test_a_language_model_trains_in_float32_where_bfloat16_is_slow(
    fast, options, dtype, narrow, tmp_path, monkeypatch
):
    monkeypatch.setattr("qrefta.model.dtype.has_bf16_instructions", lambda: fast)
    folder, file = narrow
    words = f"--task lm --max-length 32 --max-steps 1 --calibration none {options}".split()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = invoke("finetune", folder, file, tmp_path / "out", *words).output
    warned = [one for one in caught if "computes in bfloat16" in str(one.message)]
    assert len(warned) == (not fast and dtype == torch.bfloat16)
    assert ("In float32, in memory and in OUT" in output) == (not fast and not options)
    assert embeddings_of(tmp_path / "out") == dtype


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fast", "options", "dtype"),
    [(False, "", "float32"), (False, "--dtype bfloat16", "bfloat16"), (True, "", "bfloat16")],
)
def test_chat_and_evaluate_compute_in_float32_where_bfloat16_is_slow(
    fast, options, dtype, narrow, tmp_path, monkeypatch
):
    monkeypatch.setattr("qrefta.model.dtype.has_bf16_instructions", lambda: fast)
    folder, file = narrow
    invoke("prepare", folder, tmp_path / "4bit", "--rank", "2", "--calibration", "none")
    loaded = []

    def noted(*given):
        loaded.append(load_causal_model(*given))
        return loaded[-1]

    monkeypatch.setattr("qrefta.chat.load_causal_model", noted)
    monkeypatch.setattr("qrefta.measure.compare.load_causal_model", noted)
    words = ["--device", "cpu", *options.split()]
    talked = CliRunner().invoke(app, ["chat", str(tmp_path / "4bit"), *words], input="w5")
    assert talked.exit_code == 0
    measured = invoke("evaluate", tmp_path / "4bit", "--text", file, "--window", "16", *words)
    assert {str(model.dtype) for model in loaded} == {f"torch.{dtype}"}
    assert len(loaded) == 2
    for output in (talked.stderr, measured.stderr):
        assert ("In float32" in output) == (not fast and not options)


def test_a_dtype_for_a_classifier_is_refused(dense, rows, tmp_path):
    with pytest.raises(ValueError, match="--dtype is bfloat16, and the task classify trains a hea"):
        invoke("finetune", dense, rows, tmp_path / "out", "--dtype", "bfloat16")


@pytest.mark.parametrize(
    ("max_memory", "line"),
    [
        ("2GB", "Calibrating in float32"),
        ("1KB", "Calibrating in the files' dtype.* with --max-memory 0.1MB"),
    ],
)
def test_prepare_calibrates_in_float32_where_bfloat16_is_slow(
    max_memory, line, narrow, tmp_path, monkeypatch
):
    monkeypatch.setattr("qrefta.model.dtype.has_bf16_instructions", lambda: False)
    monkeypatch.setattr("qrefta._prepare.prepare", lambda *_, **__: stop())

    def stop():
        raise ValueError("prepared")

    words = ["prepare", narrow[0], tmp_path / "out", "--calibration", "text", "--rank", 0]
    found = CliRunner().invoke(app, [*map(str, words), "--max-memory", max_memory])
    assert str(found.exception) == "prepared"
    assert re.search(line, " ".join(found.output.split()))
