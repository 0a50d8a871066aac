import json
import signal
import subprocess
import sys
import time
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import qrefta
from qrefta.files import shards
from qrefta.files.folders import JOURNAL, LOCK
from qrefta.files.safetensors import Checkpoint, Part
from qrefta.model.empty import model_class
from qrefta.model.stacks import find_stacks
from qrefta.split import folder_sink, folder_source
from qrefta.split.calibrate import gather_moments
from tests.models import ARCHITECTURES, EXPERTS, inputs, tiny_gte
from tests.stacks import full_disk

CHOSEN = ["bert", "llama_gqa", "gpt2", "vit", "t5"]


@pytest.fixture
def saved(tmp_path):
    def save(architecture, dtype=torch.float32, **options):
        model = (ARCHITECTURES | EXPERTS)[architecture]().to(dtype)
        model.save_pretrained(tmp_path / "dense", **options)
        return tmp_path / "dense"

    return save


def in_memory(folder, **settings):
    model = model_class(json.loads((folder / "config.json").read_text()), folder)
    settings = {"method": "refta", "progress": False} | settings
    return qrefta.prepare(model.from_pretrained(folder, dtype="auto"), **settings)


def assert_equal(folder, model):
    loaded = qrefta.load(folder, dtype="auto")
    expected, state = model.state_dict(), loaded.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    stored = [name for file in folder.glob("*.safetensors") for name in load_file(file)]
    assert len(stored) == len(set(stored))  # no dense weight beside its packed one
    assert qrefta.quant_report(loaded) == qrefta.quant_report(model)
    return loaded


@pytest.mark.parametrize(
    ("architecture", "options"),
    [*product(CHOSEN, [{"max_shard_size": "20KB"}]), ("bert", {}), ("gpt2", {})],
    ids=str,
)
def test_the_result_is_that_of_preparing_in_memory_bit_for_bit(
    saved, tmp_path, architecture, options
):
    dense = saved(architecture, **options)
    before = {file.name: file.read_bytes() for file in dense.iterdir()}
    assert (
        qrefta.prepare_checkpoint(
            dense, tmp_path / "out", method="refta", rank=5, refine=2, progress=False
        )
        == tmp_path / "out"
    )
    assert_equal(tmp_path / "out", in_memory(dense, rank=5, refine=2))
    assert {file.name: file.read_bytes() for file in dense.iterdir()} == before


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.bfloat16, {"bits": 16}),
        (torch.float16, {"bits": 16}),
        (torch.float16, {"bits": 2}),
        (torch.bfloat16, {"bits": "auto", "target_bits": 4.6}),
        (torch.bfloat16, {"quant_type": "int4", "double_quant": True, "refine": 1}),
    ],
    ids=str,
)
def test_other_dtypes_and_formats_are_equal_too(saved, tmp_path, dtype, settings):
    dense = saved("llama_gqa", dtype)
    qrefta.prepare_checkpoint(
        dense, tmp_path / "out", method="refta", rank=4, progress=False, **settings
    )
    assert_equal(tmp_path / "out", in_memory(dense, rank=4, **settings))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama_gqa", {}),
        ("llama_gqa", {"quant_type": "int4"}),
        ("llama_gqa", {"quant_type": "fp4"}),
        ("llama_gqa", {"bits": 3}),
        ("llama_gqa", {"bits": "auto", "target_bits": 4.6}),
        ("llama_gqa", {"rank": 0}),
        ("gpt2", {"double_quant": True}),
        ("mixtral", {"bits": 3}),
    ],
    ids=str,
)
def test_error_feedback_is_equal_out_of_core(saved, tmp_path, architecture, settings):
    """Moments from a file; widths of 32, 36, 64 and more: blocks span rows in some layers."""
    dense = saved(architecture)
    settings = {"rank": 4, "refine": 1, "progress": False} | settings
    model = (ARCHITECTURES | EXPERTS)[architecture]()
    batches = [inputs(model)] * 20
    gather_moments(model, find_stacks(model), batches, progress=False).save(tmp_path / "moments")
    moments = {"moments": tmp_path / "moments"}
    qrefta.prepare_checkpoint(dense, tmp_path / "out", method="refta", **settings, **moments)
    prepared = in_memory(dense, **(settings | moments))
    loaded = assert_equal(tmp_path / "out", prepared)
    assert loaded.config.quantization_config.calibrated
    rounded = in_memory(dense, **(settings | moments), rounding="nearest")
    assert all(
        fed["output_error"] < nearest["output_error"]
        for fed, nearest in zip(qrefta.quant_report(prepared), qrefta.quant_report(rounded))
    )


def test_16_bits_of_conv1d_are_equal_too(saved, tmp_path):
    """GPT-2 stores (in, out); an adapted layer stores (out, in) whatever its bits."""
    dense = saved("gpt2")
    qrefta.prepare_checkpoint(
        dense, tmp_path / "out", method="refta", rank=4, bits=16, progress=False
    )
    assert_equal(tmp_path / "out", in_memory(dense, rank=4, bits=16))


@pytest.mark.parametrize(
    ("architecture", "options", "bits"),
    [
        ("mixtral", {}, 4),
        ("mixtral", {"save_original_format": False}, 4),
        ("qwen3_moe", {}, 4),
        ("gpt_oss", {}, 16),
    ],
    ids=["one by one", "fused", "many", "transposed"],
)
def test_experts_are_read_one_by_one_or_fused(saved, tmp_path, architecture, options, bits):
    """transformers stores the experts of most models as separate matrices, in shards of any
    size.
    """
    dense = saved(architecture, max_shard_size="40KB", **options)
    settings = {"rank": 5, "refine": 0, "bits": bits}
    qrefta.prepare_checkpoint(dense, tmp_path / "out", method="refta", progress=False, **settings)
    assert_equal(tmp_path / "out", in_memory(dense, **settings))


def test_a_missing_expert_is_told(saved, tmp_path):
    dense = saved("mixtral")
    tensors = load_file(dense / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"no tensor for 1 of the 12 linear layers, .* model\.layers\.1\.mlp\.experts\.gate",
    ):
        qrefta.prepare_checkpoint(dense, tmp_path / "out", method="refta", rank=2, progress=False)


def test_smaller_blocks_differ_by_rounding(saved, tmp_path, monkeypatch):
    """Sums of float32 products in another order; a factor may then round to the next bf16 value."""
    dense = saved("bert")
    monkeypatch.setattr(folder_source, "BLOCK_BYTES", 1 << 12)
    qrefta.prepare_checkpoint(
        dense, tmp_path / "out", method="refta", rank=5, refine=0, progress=False
    )
    report, expected = (
        qrefta.quant_report(model)
        for model in (qrefta.load(tmp_path / "out"), in_memory(dense, rank=5, refine=0))
    )
    for row, other in zip(report, expected, strict=True):
        assert row["residual_error"] == pytest.approx(other["residual_error"], rel=1e-2)


def test_an_interrupted_run_is_no_model_and_goes_on(saved, tmp_path, monkeypatch):
    dense, out = saved("bert"), tmp_path / "out"
    whole = tmp_path / "whole"
    qrefta.prepare_checkpoint(dense, whole, method="refta", rank=5, progress=False)
    real, count = shards.write_shard, iter(range(100))

    def fail(path, tensors):
        if next(count) == 3:
            raise OSError(28, "No space left on device")
        real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", fail)
        with pytest.raises(OSError, match="No space left"):
            qrefta.prepare_checkpoint(dense, out, method="refta", rank=5, progress=False)
    assert not (out / "config.json").exists()
    with pytest.raises(ValueError, match=r"no config\.json"):
        qrefta.load(out)
    with pytest.raises(ValueError, match="unfinished run with another settings"):
        qrefta.prepare_checkpoint(dense, out, method="refta", rank=6, progress=False)
    written = []
    monkeypatch.setattr(
        shards, "write_shard", lambda path, tensors: (written.append(path), real(path, tensors))
    )
    qrefta.prepare_checkpoint(dense, out, method="refta", rank=5, progress=False)
    assert len(written) == 3  # of six stacks three were there
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in whole.iterdir()
    }


def test_moments_of_another_model_are_refused_before_a_folder_is_made(saved, tmp_path):
    other = ARCHITECTURES["bert"](hidden=64)
    moments = gather_moments(other, find_stacks(other), [inputs(other)], progress=False)
    with pytest.raises(ValueError, match="64 wide and its weight 32"):
        qrefta.prepare_checkpoint(saved("bert"), tmp_path / "out", moments=moments, progress=False)
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_does_not_go_on_with_other_moments(saved, tmp_path):
    dense = saved("bert")
    model = ARCHITECTURES["bert"]()
    batch = inputs(model)
    first, second = (
        gather_moments(model, find_stacks(model), [one], progress=False)
        for one in (batch, batch | {"input_ids": batch["input_ids"].flip(0) + 1})
    )
    assert first.tokens == second.tokens

    def prepare(moments):
        qrefta.prepare_checkpoint(dense, tmp_path / "out", moments=moments, progress=False)

    with full_disk():
        prepare(first)
    with pytest.raises(ValueError, match="unfinished run with another moments"):
        prepare(second)
    prepare(first)
    assert qrefta.load(tmp_path / "out")


def test_a_run_that_goes_on_keeps_the_bits_that_it_chose(saved, tmp_path, monkeypatch):
    """They are in the journal: nothing is measured again."""
    settings = {"rank": 5, "bits": "auto", "target_bits": 3.9, "progress": False}
    dense = saved("bert")
    qrefta.prepare_checkpoint(dense, tmp_path / "whole", **settings)
    with full_disk():
        qrefta.prepare_checkpoint(dense, tmp_path / "out", **settings)
    monkeypatch.setattr("qrefta.split.formats.least_error", lambda *_: 1 / 0)
    qrefta.prepare_checkpoint(dense, tmp_path / "out", **settings)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_run_that_was_killed_before_its_journal_had_its_name_is_begun_anew(saved, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / f"{JOURNAL}.0123456789abcdef.tmp").write_text("{")
    (out / LOCK).touch()
    qrefta.prepare_checkpoint(saved("bert"), out, method="refta", rank=5, refine=0, progress=False)
    qrefta.load(out)
    assert not list(out.glob(f"{JOURNAL}*"))


def test_files_that_a_killed_run_left_half_written_are_removed(saved, tmp_path, monkeypatch):
    dense, out = saved("bert"), tmp_path / "out"
    settings = {"method": "refta", "rank": 5, "refine": 0, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(folder_sink, "write_card", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            qrefta.prepare_checkpoint(dense, out, **settings)
    (out / "model-stack000-0000.safetensors.0123456789abcdef.tmp").write_text("half")
    qrefta.prepare_checkpoint(dense, out, **settings)
    assert not [path for path in out.iterdir() if path.suffix in (".tmp", ".lock")]
    qrefta.verify(out)


TAKE = "import sys, filelock; filelock.FileLock(sys.argv[1], timeout=0).acquire()"


def test_a_second_process_on_the_same_folder_is_refused(saved, tmp_path, monkeypatch):
    """The lock holds for other processes and for other calls; starting another process would take
    seconds of imports.
    """
    dense, out = saved("bert"), tmp_path / "out"
    settings = {"method": "refta", "rank": 5, "refine": 0, "progress": False}
    write_card = folder_sink.write_card
    said = []

    def meanwhile(*arguments):
        lock = out / LOCK
        other = subprocess.run([sys.executable, "-c", TAKE, lock], capture_output=True, text=True)
        said.append(other.stderr)
        with pytest.raises(ValueError, match="Another process is writing to"):
            qrefta.prepare_checkpoint(dense, out, **settings)
        write_card(*arguments)

    monkeypatch.setattr(folder_sink, "write_card", meanwhile)
    qrefta.prepare_checkpoint(dense, out, **settings)
    assert len(said) == 1
    assert "could not be acquired" in said[0]
    qrefta.verify(out)


def test_a_refused_run_leaves_no_folder(saved, tmp_path):
    with pytest.raises(ValueError, match="rank"):
        qrefta.prepare_checkpoint(
            saved("bert"), tmp_path / "out", method="refta", rank=9999, progress=False
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("last", ["write_index", "write_card"])
def test_a_run_that_was_killed_while_it_finished_goes_on(saved, tmp_path, monkeypatch, last):
    dense, out = saved("bert"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(folder_sink, last, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            qrefta.prepare_checkpoint(dense, out, method="refta", rank=5, refine=0, progress=False)
    qrefta.prepare_checkpoint(dense, out, method="refta", rank=5, refine=0, progress=False)
    assert not (out / JOURNAL).exists()
    qrefta.load(out)


@pytest.mark.slow
def test_a_killed_run_goes_on(saved, tmp_path):
    """Signal 9 at some moment: nothing that loads is left, and the second run ends as an
    undisturbed one.
    """
    dense, out, whole = saved("bert"), tmp_path / "out", tmp_path / "whole"
    # not a fork, which has locks of other threads but not the threads
    process = subprocess.Popen(
        [sys.executable, "-m", "qrefta", "prepare", dense, out, "--rank=5", "--method=refta"]
    )
    while not (out / JOURNAL).exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    if process.wait():
        assert process.returncode == -signal.SIGKILL
        assert not (out / "config.json").exists()
        qrefta.prepare_checkpoint(dense, out, method="refta", rank=5, progress=False)
    qrefta.prepare_checkpoint(dense, whole, method="refta", rank=5, progress=False)
    first, second = (load_all(folder) for folder in (out, whole))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert_close(tensor, second[name], rtol=1e-2, atol=1e-2)  # it may have had more threads


def load_all(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {
            n: t.float()
            for n, t in load_file(file).items()
            if n.startswith("qrefta_factors") and t.is_floating_point()
        }
    return tensors


def test_a_folder_in_use_is_refused(saved, tmp_path):
    dense, out = saved("bert"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        qrefta.prepare_checkpoint(dense, out, method="refta", rank=2)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def damage_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layer.1.attention.self.key.weight" in name)
    tensors[name][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def damage_missing(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if "layer.1.attention.self.key.weight" in name))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def damage_rows(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layer.1.attention.self.key.weight" in name)
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def damage_truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def damage_index(folder):
    (folder / "model.safetensors").unlink()  # which goes before an index
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "gone.safetensors"}}'
    )


def damage_escape(folder):
    (folder / "model.safetensors").unlink()  # which goes before an index
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../x.safetensors"}}'
    )


def damage_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nan, "layer.1.attention.self.key.weight holds NaN"),
        (
            damage_missing,
            "no tensor for 1 of the 18 linear layers, the first is .*layer.1.attention.self.key",
        ),
        (
            damage_rows,
            r"layer.1.attention.self.key.weight has the shape \[31, 32\] .* and \[32, 32\] by its "
            r"config",
        ),
        (damage_truncate, "damaged, truncated or unreadable"),
        (damage_index, "names gone.safetensors, which is missing"),
        (damage_escape, "outside its folder"),
        (damage_pickle, "bin files: pytorch_model.bin"),
    ],
)
def test_damaged_sources_are_refused_and_named(saved, tmp_path, damage, message):
    dense = saved("bert")
    damage(dense)
    with pytest.raises(ValueError, match=message):
        qrefta.prepare_checkpoint(dense, tmp_path / "out", method="refta", rank=2, progress=False)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("max_memory", "message"),
    [
        ("10MB", "this model needs 0.30 GB"),
        ("plenty", "give a positive number of bytes, or text like"),
    ],
)
def test_too_little_memory_is_refused_with_the_needed_bytes(saved, tmp_path, max_memory, message):
    with pytest.raises(ValueError, match=message):
        qrefta.prepare_checkpoint(
            saved("bert"), tmp_path / "out", method="refta", rank=2, max_memory=max_memory
        )


def test_arguments_that_do_not_go_together_are_refused(saved, tmp_path):
    dense = saved("bert")
    with pytest.raises(ValueError, match="needs `out`"):
        qrefta.prepare(dense)
    with pytest.raises(ValueError, match="takes `moments`"):
        qrefta.prepare(
            dense, out=tmp_path / "out", calibration=[torch.zeros(1, 4, dtype=torch.long)]
        )
    with pytest.raises(ValueError, match="save_pretrained"):
        qrefta.prepare(ARCHITECTURES["bert"](), out=tmp_path / "out")
    with pytest.raises(ValueError, match="There is no file or folder"):
        qrefta.prepare_checkpoint(tmp_path / "nothing", tmp_path / "out")


def test_the_old_call_with_a_folder_works_and_names_the_new_one(saved, tmp_path):
    dense = saved("bert")
    with pytest.warns(DeprecationWarning, match=r"call qrefta\.prepare_checkpoint\(folder, out\)"):
        out = qrefta.prepare(
            dense, out=tmp_path / "old", method="refta", rank=2, refine=0, progress=False
        )
    new = qrefta.prepare_checkpoint(
        dense, tmp_path / "new", method="refta", rank=2, refine=0, progress=False
    )
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        file.name: file.read_bytes() for file in new.iterdir()
    }


def test_rows_and_columns_read_as_the_library_reads_them(saved):
    dense = saved("gpt2", max_shard_size="20KB")
    checkpoint = Checkpoint(dense)
    for file in dense.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert torch.equal(checkpoint.read(name), tensor)
            if tensor.dim() == 2:
                assert torch.equal(checkpoint.read(name, 2, 5), tensor[2:5])
                assert torch.equal(checkpoint.read(name, 2, 5, columns=True), tensor.T[2:5])


def test_layers_that_the_checkpoint_holds_as_one_are_read_by_their_rows(tmp_path):
    dense = tiny_gte()
    dense.save_pretrained(tmp_path / "dense")
    assert any("qkv_proj" in name for name in load_file(tmp_path / "dense" / "model.safetensors"))
    qrefta.prepare_checkpoint(tmp_path / "dense", tmp_path / "out", rank=5)
    assert_equal(tmp_path / "out", qrefta.prepare(dense, rank=5))


def test_rows_are_read_across_matrices_and_within_fused_ones(tmp_path):
    tensors = {"gate": torch.randn(3, 4), "up": torch.randn(5, 4), "fused": torch.randn(2, 3, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    below = torch.cat([tensors["gate"], tensors["up"]])
    for start, stop in ((0, 8), (0, 2), (1, 3), (2, 6), (3, 8), (4, 7)):
        parts = [Part("gate"), Part("up")]
        assert torch.equal(checkpoint.read_parts(parts, start, stop), below[start:stop])
    middle = [Part("up", rows=(1, 4)), Part("gate")]
    below = torch.cat([tensors["up"][1:4], tensors["gate"]])
    for start, stop in ((0, 6), (1, 3), (2, 5)):
        assert torch.equal(checkpoint.read_parts(middle, start, stop), below[start:stop])
    second = [Part("fused", 1)]
    assert torch.equal(checkpoint.read_parts(second, 1, 3), tensors["fused"][1, 1:3])
    assert torch.equal(
        checkpoint.read_parts(second, 1, 4, columns=True), tensors["fused"][1].T[1:4]
    )


def test_shards_are_written_as_the_library_reads_them(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.arange(4),
        "c": torch.tensor(2.0),
        "d": torch.zeros(0, 3),
    }
    shards.write_shard(tmp_path / "x.safetensors", tensors)
    (tmp_path / "x.safetensors").rename(tmp_path / "model.safetensors")
    shards.copy_shard(tmp_path / "copy.safetensors", Checkpoint(tmp_path), list(tensors))
    for file in ("model", "copy"):
        found = load_file(tmp_path / f"{file}.safetensors")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
