"""Damaged and hostile files: a few mutants of every kind of `eval.robustness.hostile`, and by name
what it found.
"""

import ast
import builtins
import inspect
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import qrefta
from eval.robustness import hostile
from eval.robustness.file_edits import join, split
from qrefta.chat import conversation
from qrefta.cli import app
from qrefta.files.layout import INDEX, SINGLE
from qrefta.files.safetensors import Checkpoint
from qrefta.files.verify import SWITCH
from qrefta.files.whole_file import replace_text
from qrefta.model.whole_folder import verify
from tests.models import ARCHITECTURES, tiny_bert

ROOT = Path(__file__).parents[2]
PACKAGE = [(path, ast.parse(path.read_text())) for path in sorted((ROOT / "qrefta").rglob("*.py"))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    hostile.make_bases(folder)
    return folder


@pytest.fixture
def prepared(root, tmp_path, monkeypatch):
    """A prepared folder whose checksums are not compared: the other checks are tested here."""
    monkeypatch.setenv(SWITCH, "0")
    return Path(shutil.copytree(root / "bases" / "prepared, shards", tmp_path / "model"))


@pytest.fixture
def dense(root, tmp_path):
    return Path(shutil.copytree(root / "bases" / "dense, one file", tmp_path / "dense"))


def edit_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def edit_header(path, change):
    header, data = split(path)
    change(header)
    join(path, header, data)


# Mutants


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reader", "state"),
    [("load", "kept"), ("load", "rewritten"), ("from_pretrained", "kept"), ("prepare", "removed")],
)
def test_mutants_of_every_kind_are_refused_or_load_correctly(root, reader, state):
    kinds = [kind for kind, found in hostile.combinations(reader) if found == state]
    assert len(kinds) > 20
    for kind in kinds:
        row = hostile.run_kind(root, reader, kind, state, range(1))
        faults = {
            name for name in hostile.FAULTS if row[name] and hostile.is_fault(reader, state, name)
        }
        assert faults == set(), kind
        assert sum(row[name] for name in hostile.OUTCOMES) == 1
        if state == "kept":
            assert row["as_written"] == 0, kind


def test_the_faults_are_seen(root, monkeypatch):
    """A faulty reader is reported; otherwise the rows of the study would mean nothing."""
    faults = {
        "crashed": lambda folder: os.kill(os.getpid(), signal.SIGKILL),
        "hung": lambda folder: time.sleep(60),
        "memory": lambda folder: torch.ones(1 << 40),
        "wrote": lambda folder: (folder.parent / "x").write_text(""),
        "unclear": lambda folder: {}["x"],
        "differs": lambda folder: tiny_bert(),
    }
    for fault, reader in faults.items():
        monkeypatch.setattr(hostile, "LIMIT_S", 3 if fault == "hung" else 60)
        monkeypatch.setattr(hostile.qrefta, "load", reader)
        found = [
            result
            for _, result, _ in hostile.run_mutants(root, "load", "adapter", "kept", range(1))
        ]
        assert found == [fault]


# Faults that mutants found


def refused(folder, message, read=qrefta.load):
    with pytest.raises(ValueError, match=message):
        read(folder)


def out_of_core(folder):
    return qrefta.prepare_checkpoint(
        folder, folder.parent / "out", rank=1, refine=0, progress=False
    )


def test_a_pipe_in_the_index_is_not_waited_for(prepared):
    index = json.loads((prepared / INDEX).read_text())
    name = next(iter(index["weight_map"].values()))
    (prepared / name).unlink()
    os.mkfifo(prepared / name)
    refused(prepared, "damaged or truncated: it is missing or is not a file")


def test_an_index_does_not_lead_outside_of_the_folder(prepared):
    shutil.copy(sorted(prepared.glob("*.safetensors"))[0], prepared.parent / "outside.safetensors")
    index = json.loads((prepared / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../outside.safetensors")
    (prepared / INDEX).write_text(json.dumps(index))
    refused(prepared, r"is outside .*; it is refused")


def test_a_config_with_a_million_blocks_is_refused_at_once(prepared, dense):
    for folder, read in ((prepared, qrefta.load), (dense, out_of_core)):
        edit_config(folder, num_hidden_layers=10**6)
        refused(folder, "num_hidden_layers 1,000,000, and 2,000 is the largest", read)
        edit_config(folder, num_hidden_layers=2, num_labels=10**9)
        refused(folder, "num_labels 1,000,000,000, and 100,000 is the largest", read)


def test_a_config_that_is_given_as_an_object_is_checked_too(prepared):
    config = AutoConfig.from_pretrained(prepared)
    config.num_hidden_layers = 10**4
    with pytest.raises(ValueError, match="num_hidden_layers 10,000, and 2,000 is the largest"):
        AutoModelForSequenceClassification.from_pretrained(prepared, config=config)


def test_a_config_with_gigabytes_of_positions_takes_no_memory(prepared, monkeypatch):
    """transformers initializes missing tensors at random before it reports that sizes differ."""
    monkeypatch.setattr("torch.empty_like", lambda *args, **kwargs: pytest.fail("memory was taken"))
    edit_config(prepared, max_position_embeddings=10**8)
    refused(prepared, r"config\.json describes 14.4 GB of tensors that the files .* do not hold")


def test_a_sparse_file_of_gigabytes_is_not_read(prepared):
    """transformers reads a tensor whole before it compares its shape."""
    path = next(
        path
        for path in prepared.glob("*.safetensors")
        if "bert.pooler.dense.weight" in split(path)[0]
    )
    header, data = split(path)
    first = header.pop("bert.pooler.dense.weight")
    kept = {name: entry for name, entry in header.items() if name != "__metadata__"}
    begin = first["data_offsets"][0]
    size = first["data_offsets"][1] - first["data_offsets"][0]
    for entry in kept.values():
        entry["data_offsets"] = [at - size if at > begin else at for at in entry["data_offsets"]]
    end = len(data) - size
    kept["bert.pooler.dense.weight"] = {
        "dtype": "F32",
        "shape": [1 << 30, 32],
        "data_offsets": [end, end + (1 << 37)],
    }
    join(path, kept, data[:begin] + data[begin + size :])
    os.truncate(path, path.stat().st_size + (1 << 37))
    refused(prepared, "137.4 GB of tensors in other shapes")


def test_a_sparse_source_of_gigabytes_is_not_copied(dense):
    """Tensors outside of the stacks are copied as they are, whatever their sizes."""
    header, data = split(dense / SINGLE)
    header["more"] = {
        "dtype": "U8",
        "shape": [1 << 37],
        "data_offsets": [len(data), len(data) + (1 << 37)],
    }
    join(dense / SINGLE, header, data)
    os.truncate(dense / SINGLE, (dense / SINGLE).stat().st_size + (1 << 37))
    refused(dense, "hold 137.4 GB, and the model of its config", out_of_core)


def test_scales_that_are_nan_are_refused(prepared):
    path = next(
        path
        for path in prepared.glob("*.safetensors")
        if any("absmax_state" in k for k in load_file(path))
    )
    state = load_file(path)
    name = next(name for name in state if name.endswith("absmax_state"))
    state[name].view(torch.float32)[0] = float("nan")
    save_file(state, path, {"format": "pt"})
    refused(prepared, f"{name} holds NaN or infinite numbers")


def test_packed_weights_of_another_dtype_are_refused(prepared):
    path = next(
        path
        for path in prepared.glob("*.safetensors")
        if any("query.weight" in k for k in load_file(path))
    )
    state = load_file(path)
    name = next(name for name in state if name.endswith("query.weight"))
    save_file(state | {name: state[name].float()}, path, {"format": "pt"})
    refused(prepared, f"{name} is torch.float32 in the checkpoint and torch.int8 by its config")


def test_a_config_does_not_fetch_code_from_a_hub(prepared, dense):
    for folder, read in ((prepared, qrefta.load), (dense, out_of_core)):
        edit_config(folder, attn_implementation="someone/kernel")
        refused(folder, "someone/kernel', which is code from a hub", read)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"stack": {"out_features": 10**30}}, "has out_features"),
        ({"stack": {"in_features": "x"}}, "has in_features 'x'"),
        ({"rank": -1}, "has rank -1"),
        ({"stack": {"modules": []}}, r"has modules \(\)"),
        ({"stack": {"transposed": 0}}, "has transposed 0"),
        ({"stack": {"experts": 10**30}}, "has experts"),
        ({"slice_ranks": None}, "has slice_ranks None"),
        ({"bytes": "x"}, "has bytes 'x'"),
    ],
)
def test_rows_of_the_config_that_no_stack_has_are_refused(prepared, row, message):
    row = dict(row)
    settings = json.loads((prepared / "config.json").read_text())["quantization_config"]
    structure = settings["stacks"][0]["stack"] | row.pop("stack", {})
    settings["stacks"][0] |= row | {"stack": structure}
    edit_config(prepared, quantization_config=settings)
    refused(prepared, message)


def test_an_architecture_that_is_no_name_is_refused(prepared):
    edit_config(prepared, architectures=[5])
    refused(prepared, "transformers has no model class 5")


def test_config_errors_of_transformers_are_raised_as_ours(prepared):
    """A number of heads of 0 is a ZeroDivisionError in its code."""
    edit_config(prepared, num_attention_heads=0)
    refused(prepared, "cannot be loaded as BertForSequenceClassification: ZeroDivisionError")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["classifier.bias"].update(shape=[3.0]), r"has the shape \[3.0\]"),
        (lambda h: h["classifier.bias"].update(shape=[True, 3]), "has the shape"),
        (
            lambda h: h["classifier.bias"].update(
                data_offsets=h["bert.pooler.dense.bias"]["data_offsets"]
            ),
            "bytes for",
        ),
        (
            lambda h: h["bert.pooler.dense.bias"].update(data_offsets=_other(h)),
            "but the next free byte is",
        ),
        (
            lambda h: h["classifier.bias"].update(dtype="F4"),
            "has the dtype 'F4'; qrefta reads F64",
        ),
        (lambda h: h.update(__metadata__={"a": 5}), "metadata that is no text"),
        (lambda h: h.pop("classifier.bias"), "next free byte|bytes, but its header"),
    ],
)
def test_a_header_that_safetensors_refuses_is_refused_out_of_core(dense, change, message):
    edit_header(dense / SINGLE, change)
    with pytest.raises(Exception, match=r"header|invalid|Invalid|Incomplete"):
        load_file(dense / SINGLE)
    refused(dense, message, out_of_core)


def _other(header):
    """The place of another tensor of the same length."""
    return header["bert.encoder.layer.0.output.dense.bias"]["data_offsets"]


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000])
def test_nesting_ends_in_no_recursion_error(dense, deep):
    data = split(dense / SINGLE)[1]
    join(dense / SINGLE, deep, data)
    refused(dense, "damaged, truncated or unreadable", out_of_core)
    shutil.copy(dense / SINGLE, dense / "config.json")
    (dense / "config.json").write_text(deep)
    refused(dense, r"config\.json is damaged or unreadable", qrefta.load)


def test_two_tensors_of_one_name_are_refused(dense):
    header, data = split(dense / SINGLE)
    text = json.dumps(header)
    twice = {"classifier.bias": header["classifier.bias"]}
    join(dense / SINGLE, text[:-1] + ", " + json.dumps(twice)[1:], data)
    refused(dense, "a name that is there twice", out_of_core)


def test_the_one_file_goes_before_a_stale_index_as_in_transformers(tmp_path):
    """Saving one file over shards leaves their index; it was read first, and the shards it names
    were missing.
    """
    model = ARCHITECTURES["bert"]()
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(tmp_path)
    assert (tmp_path / INDEX).exists()
    assert torch.equal(Checkpoint(tmp_path).read("classifier.bias"), model.classifier.bias)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"fingerprint": {}, "ranks": 5, "files": [], "rows": []}', "[" * 10**5],
)
def test_a_damaged_journal_is_refused(dense, content):
    out = dense.parent / "out"
    out.mkdir()
    (out / "qrefta_unfinished.json").write_text(content)
    refused(dense, r"qrefta_unfinished\.json is damaged", out_of_core)


def test_a_journal_does_not_lead_outside_of_its_folder(dense, monkeypatch):
    out = dense.parent / "out"
    monkeypatch.setattr("qrefta.split.folder_sink.FolderSink.finish", lambda *args: None)
    out_of_core(dense)
    state = json.loads((out / "qrefta_unfinished.json").read_text())
    state["files"].append("../outside.safetensors")
    (out / "qrefta_unfinished.json").write_text(json.dumps(state))
    refused(dense, "outside its folder", out_of_core)


def test_writing_does_not_follow_a_planted_link(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "x.json.tmp").symlink_to(tmp_path / "victim")
    replace_text(tmp_path / "x.json", "new")
    assert (tmp_path / "victim").read_text() == "kept"
    assert (tmp_path / "x.json").read_text() == "new"


# No code out of files


def test_the_package_neither_unpickles_nor_evaluates_nor_trusts_remote_code():
    """Weights are safetensors only; a model's code runs only where the user passes
    trust_remote_code.
    """
    modules = {
        "pickle",
        "cPickle",
        "marshal",
        "shelve",
        "dill",
        "cloudpickle",
        "joblib",
        "subprocess",
        "importlib",
        "code",
    }
    names = {"eval", "exec", "compile", "__import__", "breakpoint"}
    assert names <= set(dir(builtins))
    attributes = {
        ("torch", "load"),
        ("torch", "save"),
        ("numpy", "load"),
        ("np", "load"),
        ("os", "system"),
        ("yaml", "load"),
    }
    attributes |= {("torch", "hub"), ("yaml", "unsafe_load")}
    for path, tree in PACKAGE:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                # imports the file with the reward function that the user names
                allowed = {"importlib"} if path.name == "rewards.py" else set()
                imported = {alias.name.split(".")[0] for alias in node.names}
                assert not imported & (modules - allowed), path
            elif isinstance(node, ast.ImportFrom):
                module = (node.module or "").split(".")[0]
                # these import modules of the package and of transformers, by names that they hold
                # themselves
                named = ("__init__.py", "_plugin.py", "_deprecations.py")
                by_name = module == "importlib" and path.name in named
                assert by_name or module not in modules, path
            elif isinstance(node, ast.Name):
                assert node.id not in names, (path, node.lineno)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in attributes, (path, node.lineno)
            elif isinstance(node, ast.keyword) and node.arg == "weights_only":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is True, path


def test_trust_is_the_users_alone():
    """Every function that takes it has False as default, and it is passed on as it came."""
    passed_on = {"False", "trust_remote_code", "is_trusted(model)"}
    for path, tree in PACKAGE:
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) in passed_on, (path, node.lineno)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                assert "trust_remote_code" not in map(ast.unparse, targets), (path, node.lineno)
    for function in (qrefta.load, qrefta.prepare_checkpoint, qrefta.compare, verify, conversation):
        assert inspect.signature(function).parameters["trust_remote_code"].default is False
    commands = typer.main.get_command(app).commands.values()
    options = [option for command in commands for option in command.params]
    trusts = [option.default for option in options if option.name == "trust_remote_code"]
    assert len(trusts) == 9
    assert not any(trusts)


@pytest.mark.parametrize("read", [qrefta.load, out_of_core], ids=["load", "prepare"])
def test_a_pickle_is_refused_and_not_run(root, read, tmp_path):
    """As `pytorch_model.bin`, and as a pickle by the name of a safetensors file."""
    kind = "dense" if read is out_of_core else "prepared"
    for name in ("pytorch_model.bin", SINGLE):
        home = tmp_path / name
        home.mkdir()
        folder = Path(shutil.copytree(root / "bases" / f"{kind}, one file", home / "model"))
        (folder / SINGLE).unlink()
        torch.save({"a": _Evil(home / "pwned")}, folder / name)
        with pytest.raises((ValueError, OSError), match=r"no other format|damaged|neither"):
            read(folder)
        assert not (home / "pwned").exists()


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))
