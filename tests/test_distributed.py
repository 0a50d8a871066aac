"""Two processes on CPUs train as one process does: replicated, sharded, and after a kill."""

import json
import multiprocessing
import re
import signal
from multiprocessing import forkserver

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments
from transformers.integrations import deepspeed
from typer.testing import CliRunner

import qrefta
from qrefta.cli import app
from qrefta.config.stack import BANK
from qrefta.distributed import check_sharding
from qrefta.nn.quantized import QuantFormat
from qrefta.train.checkpoints import last_checkpoint
from qrefta.train.finetune import finetune
from tests.processes import (
    BREAKS,
    COMMAND_STEPS,
    DOCS,
    ROWS,
    STEPS,
    TEXT,
    chat_losses,
    class_losses,
    everything,
    killed,
    language_model,
    losses,
    packed,
    start,
    torchrun,
    trained,
    tune,
)
from tests.tiny import color_rows, tiny_folder

pytestmark = pytest.mark.slow

BEFORE = "bert.encoder.layer.1.attention.output.LayerNorm"  # its output is the input of BREAKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of a command whose second process was killed, and of all other runs."""
    multiprocessing.set_forkserver_preload(["tests.processes"])
    forkserver.ensure_running()
    folder = tmp_path_factory.mktemp("two")
    tiny_folder(folder / "tiny")
    (folder / "data").mkdir()
    for name, count, seed in (("train", ROWS, 1), ("dev", 32, 2)):
        lines = [json.dumps(row) for row in color_rows(count, seed)]
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    with pytest.raises(ChildFailedError) as error:
        torchrun(killed, folder)
    # the launcher reports the process that it sees first: the killed one, or the one that lost it
    [(rank, failure)] = error.value.failures.items()
    assert (rank, failure.exitcode) in {(1, -signal.SIGKILL), (0, 1)}
    assert last_checkpoint(folder / "killed") is not None
    assert not (folder / "killed" / "model.safetensors").exists()
    torchrun(everything, folder)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """The results of both processes."""
    return [torch.load(folder / f"results{rank}.pt", weights_only=False) for rank in range(2)]


def test_the_test_loss_of_unequal_processes_is_that_of_one(results, tmp_path):
    """One process of four has all rows; two have a long and a short one, and repeat a row."""
    alone = chat_losses(tmp_path)
    classes = class_losses(tmp_path)
    for found in results:
        assert found["test losses"] == pytest.approx(alone, rel=1e-5)
        assert found["class losses"] == pytest.approx(classes, rel=1e-5)


@pytest.fixture(scope="module")
def single(folder):
    model = start(folder)
    return tune(folder, "single", model, 16), trained(model)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_all_rows(way, folder, single, results):
    """Sharded blocks are checkpointed. Measured, relative: losses 1e-7, trained weights 2e-5."""
    expected, weights = single
    before = trained(start(folder))
    assert step_losses(folder / way) == pytest.approx(step_losses(folder / "single"), rel=1e-5)
    for rank in results:
        result, moved = rank[way]
        for field in (
            "accuracy_before",
            "accuracy_after",
            "test_loss_before",
            "test_loss",
            "train_loss",
        ):
            assert getattr(result, field) == pytest.approx(getattr(expected, field), rel=1e-5)
        assert result.trained_parameters == expected.trained_parameters
        assert moved.keys() == weights.keys()
        for name, tensor in weights.items():
            assert (moved[name] - tensor).norm() < 1e-4 * (tensor - before[name]).norm(), name


def step_losses(run):
    """The loss of every logged step, from the last checkpoint of a run."""
    state = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


def test_training_gives_no_warning_of_a_deprecation(results):
    """The runs include DDP, and FSDP2 with gradient checkpointing."""
    assert [rank["warnings"] for rank in results] == [[], []]


def test_a_run_resumes_after_a_process_was_killed(folder):
    """Bit for bit as without the kill, with dropout, from the model that the first run prepared;
    inside the second epoch, whose order of rows differs from the first.
    """
    assert not (folder / "killed" / "start").exists()
    for name in ("model.safetensors", f"checkpoint-{COMMAND_STEPS}/model.safetensors"):
        tensors = load_file(folder / "killed" / name)
        expected = load_file(folder / "whole" / name)
        assert_close(tensors, expected, rtol=0, atol=0)


def test_only_the_first_process_prints(folder):
    first = (folder / "killed0.txt").read_text()
    assert "Squared quantization error" in first
    assert "Saved in" not in first
    assert "Saved in" in (folder / "everything0.txt").read_text()
    assert (folder / "killed1.txt").read_text() == ""
    assert (folder / "everything1.txt").read_text() == ""


def test_sharded_processes_hold_half_of_the_packed_weights(results):
    for rank in results:
        assert set(rank["shares"]) == {0.5}


def test_a_sharded_run_resumes_bit_for_bit_inside_the_second_epoch(results):
    for rank in results:
        assert_close(rank["resumed"], rank["fsdp"][1], rtol=0, atol=0)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_the_saved_folder_equals_the_folder_of_one_process(way, folder, single):
    tensors = load_file(folder / way / "model.safetensors")
    expected = load_file(folder / "single" / "model.safetensors")
    assert_close(tensors, expected, rtol=1e-4, atol=1e-5)
    qrefta.load(folder / way)


def test_trainer_as_documented_has_the_losses_of_one_process(folder, results):
    """FSDP2 rounds the loss to bf16. Measured: at most 0.1 % apart in bf16, 1e-7 in float32."""
    arguments = TrainingArguments(
        folder / "text",
        use_cpu=True,
        logging_steps=1,
        max_steps=3,
        per_device_train_batch_size=16,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Trainer(language_model(), arguments, train_dataset=TEXT)
    trainer.train()
    for rank in results:
        assert rank["documented"] == pytest.approx(losses(trainer), rel=0.004)
        assert rank["sharded at load"] == pytest.approx(losses(trainer), rel=1e-5)


def test_trainer_and_all_processes_together_save_the_same(folder):
    """The second model was rounded, so its masters are stored as bf16."""
    saved = folder / "documented"
    first = load_file(saved / "out" / "model.safetensors")
    second = load_file(saved / "together" / "model.safetensors")
    rounded = {name for name, tensor in second.items() if tensor.dtype == torch.bfloat16}
    masters = set()
    for name, tensor in first.items():
        if name.startswith(BANK) and tensor.dtype == torch.float32:
            masters.add(name)
            first[name] = tensor.bfloat16()
    assert masters == rounded
    assert_close(first, second, rtol=0, atol=0)
    for name in ("out", "together", "at-load"):
        qrefta.load(saved / name)


def test_a_process_that_saves_a_sharded_model_alone_is_told_and_does_not_wait_for_ever(results):
    [message], others = results[0]["alone"], results[1]["alone"]
    assert "process 1 does not take part" in message
    assert "SHARDED_STATE_DICT" in message
    assert others == []


def test_a_checkpoint_that_the_first_process_saves_alone_is_whole(folder):
    checkpoint = folder / "full" / "checkpoint-1"
    files = {file.name for file in qrefta.verify(checkpoint)}
    assert files >= {"config.json", "model.safetensors"}
    model = qrefta.load(checkpoint)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_gathering_in_bf16_leaves_the_packed_bytes_alone(results):
    expected = [parameter.data for parameter in packed(language_model())]
    for rank in results:
        assert_close(rank["gathered"], expected, rtol=0, atol=0)


def test_a_sharded_model_in_evaluation_follows_a_loaded_state(results):
    assert [rank["loaded"] for rank in results] == [(True, True)] * 2


FORWARD = f"the loss is nan; the output of {BREAKS} is not finite"
BACKWARD = f"gradients are not finite; the gradient of {BEFORE}'s output is not finite"


@pytest.mark.parametrize(
    ("case", "problem"),
    [("ddp stops", FORWARD), ("fsdp stops", FORWARD), ("fsdp stops backwards", BACKWARD)],
)
def test_all_processes_stop_where_one_of_them_breaks_and_name_the_layer(case, problem, results):
    begin = f"In step {STEPS} {problem}. The step was not taken; the last checkpoint is"
    for rank in results:
        assert rank[case].startswith(begin)
        assert f"checkpoint-{STEPS - 1}" in rank[case]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("fsdp1", "flat tensors cannot hold"),
        ("merge", "packed weights of a block are sharded"),
        ("layer", "shared factors are sharded"),
        ("no GPUs", "there are none here"),
    ],
)
def test_impossible_cases_are_refused(case, reason, results):
    for rank in results:
        assert reason in rank[case]


FSDP1 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("variables", "reason"),
    [(FSDP1, "flat tensors cannot hold"), (ZERO3, "ZeRO-3 gathers")],
    ids=["FSDP1", "ZeRO-3"],
)
def test_finetuning_refuses_before_it_reads_anything(variables, reason, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=reason):
        finetune(None, None, "no-such-file.csv", "nowhere")
    command = ["finetune", "no-such-model", "no-such-file.csv", "nowhere"]
    with pytest.raises(ValueError, match=reason):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_fsdp2_needs_a_torch_that_shards_bytes(monkeypatch):
    for name, value in (FSDP1 | {"FSDP_VERSION": "2"}).items():
        monkeypatch.setenv(name, value)
    check_sharding()
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0"))
    with pytest.raises(ValueError, match=r"from torch 2\.12 on, and this is 2\.11\.0"):
        check_sharding()


def test_loading_under_zero_3_is_refused(tmp_path):
    """transformers asks DeepSpeed's config alone, so the test needs no DeepSpeed."""

    class Config:
        is_zero3 = staticmethod(lambda: True)

    language_model().save_pretrained(tmp_path)
    config = Config()  # transformers keeps a weak reference
    deepspeed.set_hf_deepspeed_config(config)
    try:
        with pytest.raises(ValueError, match="ZeRO-3 gathers"):
            qrefta.load(tmp_path)
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_the_page_counts_right():
    """Llama-3-70B on 8 GPUs, from its shapes. A GPU receives 7/8 of each gather or scatter."""
    page = DOCS.read_text(encoding="utf-8")
    for start_of_row, values in counted().items():
        row = next(line for line in page.splitlines() if re.match(rf"\| \(?{start_of_row}", line))
        shown = re.findall(r"([\d.]+) [MBG]", row)
        for value, text in zip(values, shown, strict=True):
            digits = len(text.partition(".")[2])
            assert f"{value:.{digits}f}" == text, start_of_row


def counted():
    """Numbers of the page's rows, by the start of the row."""
    shapes = [
        (8192, 8192),
        (1024, 8192),
        (1024, 8192),
        (8192, 8192),
        (28672, 8192),
        (28672, 8192),
        (8192, 28672),
    ]
    packed_sizes = [QuantFormat().packed_sizes(rows * columns) for rows, columns in shapes]
    block = sum(sum(sizes.values()) for sizes in packed_sizes) / 1e9
    dense = sum(rows * columns for rows, columns in shapes) / 1e9
    widths = sum(map(sum, shapes)) / 1e9
    embedding = 128256 * 8192 / 1e9
    factors = 64 * widths
    lora = 80 * 16 * widths
    weights = 80 * block + 4 * embedding
    everything = 80 * dense + 2 * embedding
    received = 7 / 8
    gradients = [8 * factors, 8 * lora, 4 * factors, 4 * lora, 2 * everything]
    return {
        "trainable parameters": [1e3 * factors, 1e3 * lora, 1e3 * factors, 1e3 * lora, everything],
        "frozen weights": [weights, weights, weights / 8, weights / 8],
        "masters": [16 * factors, 16 * lora, 2 * factors, 2 * lora, 2 * everything],
        "a gathered block": [block, block + 2 * lora / 80, 2 * dense],
        "weights of the blocks": [received * 160 * size for size in (block, block, 2 * dense)],
        "embeddings and head": [received * 2 * embedding * times for times in (2, 2, 3)],
        "factors or LoRA": [received * 4 * factors, received * 2 * 4 * lora],
        "gradients": [received * size for size in gradients],
    }


def test_a_checkpoint_in_parts_is_skipped(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10", "checkpoint-20"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-5" / "trainer_state.json").touch()
    (tmp_path / "checkpoint-10" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
