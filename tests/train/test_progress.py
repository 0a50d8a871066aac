"""Lines of a run: loss, tokens a second and time left; Ctrl-C; evaluations and early stopping."""

import copy
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from torch.testing import assert_close
from transformers import EarlyStoppingCallback, TrainerCallback

import qrefta
from qrefta.cli import main
from qrefta.train.arguments import training_arguments
from qrefta.train.checkpoints import last_checkpoint
from qrefta.train.finetune import finetune
from qrefta.train.interrupt import TrainingInterrupted
from qrefta.train.models import load_classifier
from qrefta.train.progress import duration
from tests.tiny import color_data, color_rows, tiny_folder, tiny_tokenizer

BEST = {
    "max_steps": 2,
    "eval_strategy": "steps",
    "logging_steps": 1,  # and steps between evaluations
    "save_steps": 1,
    "load_best_model_at_end": True,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tiny_folder(tmp_path_factory.mktemp("dense"))
    return qrefta.prepare(load_classifier(str(folder), ["red", "blue"], 0), rank=4, progress=False)


@pytest.fixture
def train(start, tmp_path):
    def run(name="run", callbacks=(), **settings):
        model = copy.deepcopy(start)
        keywords = {
            key: settings.pop(key)
            for key in ("resume", "eval_steps", "early_stopping")
            if key in settings
        }
        args = training_arguments(
            "classify", tmp_path / name, **{"per_device_train_batch_size": 8} | settings
        )
        result = finetune(
            model, tiny_tokenizer(), color_data(), args=args, callbacks=callbacks, **keywords
        )
        return model, result

    return run


class Interrupt(TrainerCallback):
    """Ctrl-C in a step, once or twice."""

    def __init__(self, step, times=1):
        self.step, self.times = step, times

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)  # two of os.kill may arrive as one


@pytest.mark.slow
def test_lines_tell_loss_rate_speed_and_time_left(train, capsys):
    """The first and the last: every 10 steps in a run of 30; the tokens of the rows are counted."""
    train(max_steps=30)
    lines = re.findall(
        r"step (\d+) of 30: loss ([\d.]+), learning rate ([\d.e-]+), ([\d,]+) tokens/s, (.+) left",
        capsys.readouterr().out,
    )
    assert [int(line[0]) for line in lines] == [10, 20, 30]
    assert lines[-1][4] == "0 s"
    assert all(int(line[3].replace(",", "")) > 0 for line in lines)


@pytest.mark.slow
def test_tokens_are_counted_without_padding(train, tmp_path):
    train(max_steps=12, save_steps=1.0)
    state = json.loads((tmp_path / "run/checkpoint-12/trainer_state.json").read_text())
    assert state["num_input_tokens_seen"] == 12 * 8 * 6  # six words a row


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "logged"), [(40, [10, 20, 30, 40]), (3000, [30])])
def test_long_runs_show_every_hundredth_part(train, steps, logged, tmp_path, capsys):
    stop = Interrupt(31)
    if steps > 100:
        with pytest.raises(TrainingInterrupted):
            train(max_steps=steps, callbacks=[stop])
    else:
        train(max_steps=steps)
    found = re.findall(r"step ([\d,]+) of [\d,]+: loss", capsys.readouterr().out)
    assert [int(step.replace(",", "")) for step in found] == logged
    state = json.loads((last_checkpoint(tmp_path / "run") / "trainer_state.json").read_text())
    rows = [row["step"] for row in state["log_history"] if "loss" in row]
    assert rows[:3] == [10, 20, 30]  # the log of the Trainer has them all


@pytest.mark.slow
def test_the_callers_logging_steps_hold(train, capsys):
    train(max_steps=6, logging_steps=3)
    found = re.findall(r"step (\d+) of 6: loss", capsys.readouterr().out)
    assert found == ["3", "6"]


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_and_the_run_resumes_bit_for_bit(train, tmp_path):
    whole, _ = train("whole", max_steps=12)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=r"after step 5 of 12; .*checkpoint-5 is whole"):
        train(max_steps=12, callbacks=[Interrupt(5)])
    assert signal.getsignal(signal.SIGINT) is before
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-5"
    assert not (tmp_path / "run" / "config.json").exists()
    resumed, result = train(max_steps=12, resume=True)
    assert result.steps == 12
    for name, parameter in resumed.named_parameters():
        assert_close(parameter, whole.get_parameter(name), rtol=0, atol=0)


@pytest.mark.slow
def test_ctrl_c_keeps_its_checkpoint_beside_the_best(train, tmp_path):
    """Of one checkpoint alone, Trainer keeps the best."""
    with pytest.raises(TrainingInterrupted) as stopped:
        train(
            max_steps=12,
            callbacks=[Interrupt(7)],
            save_total_limit=1,
            eval_steps=2,
            early_stopping=5,
        )
    assert stopped.value.checkpoint.is_dir()
    assert last_checkpoint(tmp_path / "run") == stopped.value.checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["optimizer.pt", "scheduler.pt"])
def test_a_checkpoint_of_the_model_alone_is_not_resumed(train, tmp_path, lost):
    train(max_steps=4)
    (tmp_path / "run" / "checkpoint-4" / lost).unlink()
    with pytest.raises(ValueError, match="without the state of its optimizer and schedule"):
        train(max_steps=8, resume=True)


@pytest.mark.slow
def test_a_resumed_run_saves_at_its_own_intervals(train, tmp_path):
    """A quarter of 4 steps is 1, and of 12 it is 3."""
    train(max_steps=4)
    _, result = train(max_steps=12, resume=True)
    assert result.steps == 12
    saved = {int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*")}
    assert saved == {9, 12}  # the last two are kept


@pytest.fixture
def listening():
    """Ctrl-C is heard, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("listening")
def test_a_second_ctrl_c_stops_at_once(train, tmp_path):
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(max_steps=12, callbacks=[Interrupt(5, times=2)])
    assert not isinstance(stopped.value, TrainingInterrupted)
    assert not list((tmp_path / "run").glob("checkpoint-5"))


@pytest.mark.slow
def test_ctrl_c_in_the_last_step_ends_as_a_finished_run(train, tmp_path):
    _, result = train(max_steps=4, callbacks=[Interrupt(4)])
    assert result.steps == 4
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_evaluations_during_the_run(train, tmp_path):
    train(max_steps=8, eval_steps=2)
    state = json.loads((last_checkpoint(tmp_path / "run") / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "eval_loss" in row] == [0, 2, 4, 6, 8]


def test_early_stopping_keeps_the_best_model(train, tmp_path):
    """The learning rate is far too high from the second evaluation on."""
    _, result = train(
        max_steps=40, eval_steps=2, early_stopping=2, learning_rate=3.0, warmup_steps=0
    )
    state = json.loads((last_checkpoint(tmp_path / "run") / "trainer_state.json").read_text())
    losses = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    assert result.steps < 40
    best = min(losses[step] for step in losses if step)
    assert result.test_loss == pytest.approx(best)
    assert list(losses.values())[-2:] > [best, best]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stopping": 0}, "early_stopping is 0; it must be a number of evaluations"),
        ({"eval_steps": -1}, "eval_steps is -1; it must be a number of steps, or a share"),
    ],
)
def test_values_that_are_not_allowed_are_named(train, settings, message):
    with pytest.raises(ValueError, match=message):
        train(max_steps=2, **settings)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0 s"), (99, "99 s"), (130, "2 min"), (11_100, "3 h 05 min")]
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


@pytest.mark.slow
def test_the_command_prints_how_to_resume_and_a_used_folder_says_so(tmp_path, monkeypatch, capsys):
    """A real process and a real signal."""
    folder = tiny_folder(tmp_path / "dense")
    rows = tmp_path / "rows.csv"
    rows.write_text(
        "\n".join(["text,label", *(f"{r['text']},{r['label']}" for r in color_rows(96, seed=1))])
    )
    command = [
        *(sys.executable, "-m", "qrefta", "finetune", folder, rows, tmp_path / "out"),
        *("--rank=4", "--calibration=none", "--batch-size=8", "--max-steps=4000"),
    ]
    errors = tmp_path / "errors.txt"
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=errors.open("w"),
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if "loss" in line and "left" in line:
            process.send_signal(signal.SIGINT)
            break
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "kernels" not in errors.read_text()  # a notice of bitsandbytes
    told = " ".join(out.split())
    assert f"qrefta finetune {folder} {rows} {tmp_path / 'out'} --rank=4" in told
    assert told.endswith("--max-steps=4000 --resume")
    assert last_checkpoint(tmp_path / "out") is not None
    monkeypatch.setattr(sys, "argv", [str(word) for word in command[2:]])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert "Add --resume to go on with it" in " ".join(capsys.readouterr().err.split())


def test_trainers_early_stopping_works_or_says_what_to_do(start, train, tmp_path):
    """As a callback alone it evaluates; with args that do not evaluate, an error names the way."""
    with pytest.raises(ValueError, match=r"eval_strategy='no'.*finetune\(early_stopping=3\)"):
        train(max_steps=4, callbacks=[EarlyStoppingCallback(2)])
    model = copy.deepcopy(start)
    result = finetune(
        model,
        tiny_tokenizer(),
        color_data(),
        tmp_path / "alone",
        max_steps=20,
        batch_size=8,
        learning_rate=3.0,
        callbacks=[EarlyStoppingCallback(2)],
    )
    assert result.steps < 20


@pytest.mark.slow
def test_the_classes_names_are_saved(start, train, tmp_path):
    model, _ = train(max_steps=1)
    assert model.config.id2label == {0: "red", 1: "blue"}
    plain = load_classifier(str(tiny_folder(tmp_path / "dense")), ["a", "b"], 0)
    plain.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    model = qrefta.prepare(plain, rank=2, progress=False)
    finetune(model, tiny_tokenizer(), color_data(), tmp_path / "named", max_steps=1)
    assert qrefta.load(tmp_path / "named").config.id2label == {0: "red", 1: "blue"}
    assert qrefta.load(tmp_path / "named").config.label2id == {"red": 0, "blue": 1}


@pytest.mark.slow
def test_callbacks_are_objects_or_classes_alone_or_in_a_list(start, tmp_path):
    def run(name, callbacks):
        model = copy.deepcopy(start)
        options = {"max_steps": 2, "batch_size": 8, "progress": False, "callbacks": callbacks}
        finetune(model, tiny_tokenizer(), color_data(16, 8), tmp_path / name, **options)

    run("class", [EarlyStoppingCallback])
    run("alone", EarlyStoppingCallback(1))
    with pytest.raises(ValueError, match="callbacks holds 'early'; give transformers' TrainerC"):
        run("text", ["early"])


@pytest.mark.parametrize("metric", ["accuracy", "eval_accuracy", "loss"])
def test_the_best_model_is_found_by_a_metric_of_the_task(metric, train):
    _, result = train(**BEST, metric_for_best_model=metric)
    assert result.steps == 2


def test_a_metric_that_the_task_does_not_have_is_refused_before_the_run(train, tmp_path):
    message = "metric_for_best_model is 'f1'; this task measures loss and accuracy"
    with pytest.raises(ValueError, match=message):
        train(**BEST, metric_for_best_model="f1")
    assert not list(tmp_path.glob("**/checkpoint-*"))


def test_a_batch_larger_than_a_split_cannot_be_dropped(train, tmp_path):
    message = r"dataloader_drop_last is True, and the (train|test) split has \d+ rows, fewer than a"
    with pytest.raises(ValueError, match=message):
        train(dataloader_drop_last=True, per_device_train_batch_size=1000)
    with pytest.raises(ValueError, match=message.replace("train|", "")):
        train(dataloader_drop_last=True, per_device_eval_batch_size=1000)
    assert not list(tmp_path.glob("**/checkpoint-*"))


@pytest.mark.slow
def test_no_bar_means_lines_and_no_progress_means_silence(start, tmp_path, capsys):
    """Trainer alone prints dictionaries if its bar is off."""
    options = {"max_steps": 10, "batch_size": 8, "task": "classify"}
    model, data = copy.deepcopy(start), color_data()
    finetune(model, tiny_tokenizer(), data, tmp_path / "silent", progress=False, **options)
    assert capsys.readouterr().out == ""
    args = training_arguments("classify", tmp_path / "lines", max_steps=10, disable_tqdm=True)
    finetune(copy.deepcopy(start), tiny_tokenizer(), data, args=args)
    shown = capsys.readouterr().out
    assert "{" not in shown
    assert "step 10 of 10: loss" in shown
    assert "test loss" in shown
