"""Two real processes, on CPUs: as one process, replicated or sharded, and after one of them was killed."""

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
from qrefta.distributed import check_sharding
from qrefta.nn.factors import BANK
from qrefta.nn.quantized import QuantFormat
from qrefta.train.checkpoints import last_checkpoint
from qrefta.train.finetune import finetune
from tests.processes import (
    BREAKS,
    DOCS,
    TEXT,
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

BEFORE = "bert.encoder.layer.1.attention.output.LayerNorm"  # whose output is the input of BREAKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of the command line whose second process was killed, then everything else."""
    multiprocessing.set_forkserver_preload(["tests.processes"])
    forkserver.ensure_running()
    folder = tmp_path_factory.mktemp("two")
    tiny_folder(folder / "tiny")
    (folder / "data").mkdir()
    for name, count, seed in (("train", 96, 1), ("dev", 32, 2)):
        lines = [json.dumps(row) for row in color_rows(count, seed)]
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    with pytest.raises(ChildFailedError) as error:
        torchrun(killed, folder)
    # of the killed process and the one that lost it, the launcher tells of the one that it sees first
    [(rank, failure)] = error.value.failures.items()
    assert (rank, failure.exitcode) in {(1, -signal.SIGKILL), (0, 1)}
    assert last_checkpoint(folder / "killed") is not None
    assert not (folder / "killed" / "model.safetensors").exists()
    torchrun(everything, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What the two processes found."""
    return [torch.load(folder / f"found{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def single(folder):
    model = start(folder)
    return tune(folder, "single", model, 16), trained(model)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_all_rows(way, folder, single, found):
    """Sharded with checkpointed blocks. Measured, relative: losses 1e-7 apart, what trains 2e-5 of its way."""

    def steps(name):
        state = json.loads((folder / name / "checkpoint-5" / "trainer_state.json").read_text())
        return [row["loss"] for row in state["log_history"] if "loss" in row]

    result, expected = single
    before = trained(start(folder))
    assert steps(way) == pytest.approx(steps("single"), rel=1e-5)
    for rank in found:
        own, moved = rank[way]
        for field in (
            "accuracy_before",
            "accuracy_after",
            "test_loss_before",
            "test_loss",
            "train_loss",
        ):
            assert getattr(own, field) == pytest.approx(getattr(result, field), rel=1e-5)
        assert own.trained_parameters == result.trained_parameters
        assert moved.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (moved[name] - tensor).norm() < 1e-4 * (tensor - before[name]).norm(), name


def test_a_run_goes_on_after_a_process_was_killed(folder):
    """Bit for bit as if it had not been, with dropout; from what the first run prepared."""
    assert not (folder / "killed" / "start").exists()
    for name in ("model.safetensors", "checkpoint-16/model.safetensors"):
        tensors, expected = (load_file(folder / run / name) for run in ("killed", "whole"))
        assert_close(tensors, expected, rtol=0, atol=0)


def test_only_the_first_process_prints(folder):
    first = (folder / "killed0.txt").read_text()
    assert "Squared quantization error" in first
    assert "Saved in" not in first
    assert "Saved in" in (folder / "everything0.txt").read_text()
    assert (folder / "killed1.txt").read_text() == (folder / "everything1.txt").read_text() == ""


def test_sharded_processes_hold_half_of_the_packed_weights(found):
    assert set(found[0]["shares"] + found[1]["shares"]) == {0.5}


def test_a_sharded_run_resumes_bit_for_bit(found):
    for rank in found:
        assert_close(rank["resumed"], rank["fsdp"][1], rtol=0, atol=0)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_the_saved_folder_holds_what_that_of_one_process_holds(way, folder, single):
    tensors, expected = (load_file(folder / name / "model.safetensors") for name in (way, "single"))
    assert_close(tensors, expected, rtol=1e-4, atol=1e-5)
    qrefta.load(folder / way)


def test_trainer_as_documented_has_the_losses_of_one_process(folder, found):
    """FSDP2 rounds the loss itself to bf16. Measured: at most 0.1 % apart in bf16, 1e-7 in float32."""
    arguments = TrainingArguments(
        folder / "text", use_cpu=True, logging_steps=1, max_steps=3, per_device_train_batch_size=16,
        save_strategy="no", disable_tqdm=True, report_to="none",
    )  # fmt: skip
    trainer = Trainer(language_model(), arguments, train_dataset=TEXT)
    trainer.train()
    for rank in found:
        assert rank["documented"] == pytest.approx(losses(trainer), rel=0.004)
        assert rank["sharded at load"] == pytest.approx(losses(trainer), rel=1e-5)


def test_trainer_and_all_processes_together_save_the_same(folder):
    """The second after rounding: its masters are stored as the bf16 values that they are."""
    first, second = (
        load_file(folder / "documented" / name / "model.safetensors")
        for name in ("out", "together")
    )
    masters = {
        name
        for name, tensor in first.items()
        if name.startswith(BANK) and tensor.dtype == torch.float32
    }
    assert masters == {name for name, tensor in second.items() if tensor.dtype == torch.bfloat16}
    assert_close(
        {n: t.bfloat16() if n in masters else t for n, t in first.items()}, second, rtol=0, atol=0
    )
    for name in ("out", "together", "at-load"):
        qrefta.load(folder / "documented" / name)


def test_a_process_that_saves_a_sharded_model_alone_is_told_and_does_not_wait_for_ever(found):
    [message], others = found[0]["alone"], found[1]["alone"]
    assert "process 1 does not take part" in message
    assert "SHARDED_STATE_DICT" in message
    assert others == []


def test_a_checkpoint_that_the_first_process_saves_alone_is_whole(folder):
    qrefta.load(folder / "full" / "checkpoint-1")
    qrefta.verify(folder / "full" / "checkpoint-1")


def test_gathering_in_bf16_leaves_the_packed_bytes_alone(found):
    for rank in found:
        assert_close(
            rank["gathered"],
            [parameter.data for parameter in packed(language_model())],
            rtol=0,
            atol=0,
        )


def test_a_sharded_model_in_evaluation_follows_what_is_loaded(found):
    assert [rank["loaded"] for rank in found] == [(True, True)] * 2


@pytest.mark.parametrize(
    ("case", "what"),
    [("ddp stops", f"the loss is nan; the output of {BREAKS} is not finite"),
     ("fsdp stops", f"the loss is nan; the output of {BREAKS} is not finite"),
     ("fsdp stops backwards", f"gradients are not finite; the gradient of {BEFORE}'s output is not finite")],
)  # fmt: skip
def test_all_processes_stop_where_one_of_them_breaks_and_name_the_layer(case, what, found):
    for rank in found:
        assert rank[case].startswith(
            f"In step 3 {what}. The step was not taken; the last checkpoint is"
        )
        assert "checkpoint-2" in rank[case]


@pytest.mark.parametrize(
    ("case", "reason"),
    [("fsdp1", "flat tensors cannot hold"), ("merge", "packed weights of a block are sharded"),
     ("layer", "shared factors are sharded"), ("no GPUs", "there are none here")],
)  # fmt: skip
def test_what_cannot_work_is_refused(case, reason, found):
    for rank in found:
        assert reason in rank[case]


FSDP1 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("variables", "reason"),
    [(FSDP1, "flat tensors cannot hold"), (ZERO3, "ZeRO-3 gathers")],
    ids=["FSDP1", "ZeRO-3"],
)
def test_the_recipe_refuses_before_it_reads_anything(variables, reason, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=reason):
        finetune(None, None, "no-such-file.csv", "nowhere")
    with pytest.raises(ValueError, match=reason):
        CliRunner().invoke(
            app,
            ["finetune", "no-such-model", "no-such-file.csv", "nowhere"],
            catch_exceptions=False,
        )


def test_fsdp2_needs_a_torch_that_shards_bytes(monkeypatch):
    for name, value in (FSDP1 | {"FSDP_VERSION": "2"}).items():
        monkeypatch.setenv(name, value)
    check_sharding()
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0"))
    with pytest.raises(ValueError, match=r"from torch 2\.12 on, and this is 2\.11\.0"):
        check_sharding()


def test_loading_under_zero_3_is_refused(tmp_path):
    """DeepSpeed's config is all that transformers asks; DeepSpeed itself is not needed."""

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
    """Llama-3-70B on 8 GPUs, from its shapes; what a GPU receives is 7/8 of what is gathered or scattered."""
    shapes = [
        (8192, 8192),
        (1024, 8192),
        (1024, 8192),
        (8192, 8192),
        (28672, 8192),
        (28672, 8192),
        (8192, 28672),
    ]
    block = sum(sum(QuantFormat().packed_sizes(out * into).values()) for out, into in shapes) / 1e9
    dense, widths = sum(out * into for out, into in shapes) / 1e9, sum(map(sum, shapes)) / 1e9
    embedding, factors, lora = 128256 * 8192 / 1e9, 64 * widths, 80 * 16 * widths
    weights, everything, received = 80 * block + 4 * embedding, 80 * dense + 2 * embedding, 7 / 8
    counted = {
        "trainable parameters": [1e3 * factors, 1e3 * lora, 1e3 * factors, 1e3 * lora, everything],
        "frozen weights": [weights, weights, weights / 8, weights / 8],
        "masters": [16 * factors, 16 * lora, 2 * factors, 2 * lora, 2 * everything],
        "a gathered block": [block, block + 2 * lora / 80, 2 * dense],
        "weights of the blocks": [
            received * 2 * 80 * gathered for gathered in (block, block, 2 * dense)
        ],
        "embeddings and head": [received * 2 * embedding * times for times in (2, 2, 3)],
        "factors or LoRA": [received * 4 * factors, received * 2 * 4 * lora],
        "gradients": [
            received * bytes
            for bytes in (8 * factors, 8 * lora, 4 * factors, 4 * lora, 2 * everything)
        ],
    }
    page = DOCS.read_text(encoding="utf-8")
    for start_of_row, values in counted.items():
        row = next(line for line in page.splitlines() if re.match(rf"\| \(?{start_of_row}", line))
        shown = re.findall(r"([\d.]+) [MBG]", row)
        assert [
            f"{value:.{len(text.partition('.')[2])}f}"
            for value, text in zip(values, shown, strict=True)
        ] == shown


def test_a_checkpoint_in_parts_is_passed_over(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10", "checkpoint-20"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-5" / "trainer_state.json").touch()
    (tmp_path / "checkpoint-10" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
