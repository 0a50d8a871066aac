"""Checksums in the files' headers: written by every way of saving, checked before anything is made
of the files.
"""

import contextlib
import copy
import hashlib
import json
import os
import shutil
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    modeling_utils,
)
from transformers.utils import hub

import qrefta
from qrefta.files.checksums import KEY
from qrefta.files.safetensors import Checkpoint
from qrefta.files.verify import LIST, SWITCH, check_saved, write_checksums
from qrefta.hf_quantizer import _hub_list
from qrefta.train.arguments import training_arguments
from qrefta.train.checkpoints import last_checkpoint
from tests.models import ARCHITECTURES, logits, tiny_bert, tiny_swin
from tests.models import prepared as prepared_architecture
from tests.peers import add_adapter
from tests.test_hf_quantizer import EVERY_2_STEPS, nudge, trainer
from tests.tiny import color_data, tiny_folder, tiny_tokenizer

LOADERS = {"load": qrefta.load, "auto": AutoModelForSequenceClassification.from_pretrained}
any_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


def prepared(rank=5):
    return qrefta.prepare(tiny_bert(), rank=rank, progress=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    prepared().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def old(folder):
    """A folder of format version 1: no checksums in the headers, but a list of SHA-256."""
    edit_config(folder, lambda config: config["quantization_config"].update(format_version=1))
    weights = folder / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    write_list(folder)
    return folder


def write_list(folder):
    """The list of version 1."""
    files = {}
    for name in ("config.json", "model.safetensors"):
        data = (folder / name).read_bytes()
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / LIST).write_text(json.dumps({"format": 1, "files": files}))


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def flip(path, place=-1, bit=0):
    """One bit of one byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def header(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY])


def assert_whole(folder):
    """Every tensor has its checksum, and zlib agrees; the folder loads without a warning, and is
    verified.
    """
    for path in folder.glob("*.safetensors"):
        checksums = header(path)["tensors"]
        for name, tensor in load_file(path).items():
            form = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
            data = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            assert checksums[name] == f"{form:08x}{data:08x}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qrefta.load(folder)
    qrefta.verify(folder)


# Saving


def test_save_pretrained_writes_checksums(saved):
    written = {path.name for path in saved.iterdir()}
    assert written == {"README.md", "config.json", "model.safetensors"}
    assert_whole(saved)


def test_every_shard_has_the_checksums_of_all(tmp_path):
    prepared().save_pretrained(tmp_path, max_shard_size="20KB")
    headers = [header(path) for path in tmp_path.glob("*.safetensors")]
    assert len(headers) > 1
    assert all(one == headers[0] for one in headers)
    assert_whole(tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("original", [True, False])
def test_names_are_those_in_the_files(architecture, original, tmp_path):
    """Fused experts, renamed architectures, tied weights; in the checkpoint's names and in the
    model's.
    """
    model = prepared_architecture(ARCHITECTURES[architecture], rank=3)
    model.save_pretrained(tmp_path, save_original_format=original)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names <= header(tmp_path / "model.safetensors")["tensors"].keys()
    check_saved([tmp_path / "model.safetensors"], 2)


def test_renamed_tensors_are_covered(tmp_path):
    qrefta.prepare(tiny_swin(), rank=3, progress=False).save_pretrained(tmp_path)
    assert_whole(tmp_path)


def test_a_checkpoint_prepared_out_of_core_has_checksums(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / LIST).write_text("{}")  # it must not be copied
    out = qrefta.prepare_checkpoint(tmp_path / "dense", tmp_path / "out", rank=5, progress=False)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert not (out / LIST).exists()
    assert_whole(out)


def test_a_checkpoint_of_the_trainer_is_not_resumed_from_when_damaged(tmp_path):
    trainer(prepared(), tmp_path, **EVERY_2_STEPS).train()
    assert_whole(tmp_path / "checkpoint-4")
    flip(last_checkpoint(tmp_path) / "model.safetensors")
    with pytest.raises(ValueError, match="the checksum of"):
        qrefta.load(last_checkpoint(tmp_path))


@pytest.mark.parametrize("again", ["loaded", "prepared while loading", "copied"])
def test_every_model_that_is_prepared_writes_checksums(again, saved, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "dense")
    if again == "prepared while loading":
        model = BertForSequenceClassification.from_pretrained(
            tmp_path / "dense", quantization_config=qrefta.QReftaConfig(rank=5)
        )
    else:
        model = qrefta.load(saved)
    if again == "copied":
        model = nudge(copy.deepcopy(model))
    model.save_pretrained(tmp_path / "again")
    assert_whole(tmp_path / "again")
    assert torch.equal(logits(qrefta.load(tmp_path / "again")), logits(model))


def test_a_merged_model_saves_as_any_other(tmp_path):
    model = qrefta.merge(prepared())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert "save_pretrained" not in vars(model)


def test_a_dense_model_is_saved_over_a_prepared_one(tmp_path):
    model = prepared()
    model.save_pretrained(tmp_path)
    qrefta.merge(model).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert KEY not in file.metadata()
    AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_an_adapter_that_is_saved_into_a_prepared_folder_leaves_the_weights(folder):
    before = (folder / "model.safetensors").read_bytes()
    dense = tiny_bert()
    add_adapter(dense, LoraConfig(r=2, target_modules=["query"]))
    dense.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").is_file()
    assert (folder / "model.safetensors").read_bytes() == before


def test_uploaded_files_carry_checksums(tmp_path, monkeypatch):
    """`save_pretrained(push_to_hub=True)` uploads before it returns; `push_to_hub` saves to a
    temporary folder.
    """
    sent = []
    api = SimpleNamespace(
        create_repo=lambda *args, **kwargs: SimpleNamespace(repo_id="me/model"),
        create_commit=lambda **kwargs: sent.append(
            {
                one.path_in_repo: Path(one.path_or_fileobj).read_bytes()
                for one in kwargs["operations"]
            }
        ),
    )
    card = SimpleNamespace(save=lambda path: Path(path).write_text("# Card"))
    for module in (hub, modeling_utils):
        monkeypatch.setattr(module, "hf_api", lambda: api, raising=False)
        monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: card)
    model = prepared()
    model.save_pretrained(tmp_path / "model", push_to_hub=True)
    model.push_to_hub("me/model")
    assert len(sent) == 2
    for number, files in enumerate(sent):
        received = tmp_path / f"received{number}"
        received.mkdir()
        for name, data in files.items():
            (received / name).write_bytes(data)
        assert_whole(received)


# Checking


@any_loader
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_is_refused(folder, load, name):
    data = (folder / name).read_bytes()
    place = -1
    if name == "config.json":
        place = data.index(b'"initializer_range": 0.1') + 21  # 0.1 -> 1.1: valid JSON
    flip(folder / name, place)
    with pytest.raises(ValueError, match=rf"{name} .*checksum .* copy .* again .* QREFTA_VERIFY=0"):
        load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_bit_flipped_anywhere_is_refused(folder, name):
    """Plain from_pretrained, at 60 places over the whole file: lengths, names, checksums, tensors,
    settings.
    """
    path = folder / name
    whole = path.read_bytes()
    config = (folder / "config.json").read_bytes()
    places = range(0, len(whole), len(whole) // 60)
    loaded = []
    for number, place in enumerate(places):
        flip(path, place, bit=number % 8)
        # some of the errors come from transformers, which reads config.json first
        with contextlib.suppress(
            ValueError, OSError, TypeError, KeyError, AttributeError, RuntimeError
        ):
            AutoModelForSequenceClassification.from_pretrained(folder)
            loaded.append(place)
        path.write_bytes(whole)
    spaces = {place for place in loaded if chr(config[place]).isspace()}
    assert set(loaded) == (spaces if name == "config.json" else set())


@any_loader
def test_nothing_is_made_of_damaged_files(folder, load, monkeypatch):
    """The refusal comes before a tensor is materialised, and before an adapted layer is built."""
    flip(folder / "model.safetensors")
    monkeypatch.setattr("qrefta.model.build.build", lambda *args: pytest.fail("a layer was built"))
    monkeypatch.setattr(
        "transformers.modeling_utils.convert_and_load_state_dict_in_model",
        lambda *args, **kwargs: pytest.fail("a tensor was read"),
    )
    with pytest.raises(ValueError, match="the checksum of"):
        load(folder)


@pytest.mark.parametrize(
    "change", [{"num_labels": 10**6}, {"quantization_config": {"quant_method": "mxfp4"}}], ids=str
)
def test_a_changed_config_is_refused_before_transformers_makes_anything_of_it(change, folder):
    """Else the first is built for ever, and the second loads as another quantizer's model."""
    edit_config(folder, lambda config: config.update(change))
    with pytest.raises(ValueError, match=r"num_labels 1,000,000|quant_method is 'mxfp4'"):
        qrefta.load(folder)
    with pytest.raises(ValueError, match=r"num_labels 1,000,000|quant_method is 'mxfp4'"):
        qrefta.verify(folder)


def test_from_pretrained_refuses_a_changed_config_before_it_builds_a_model(folder, monkeypatch):
    edit_config(folder, lambda config: config.update(num_labels=150_000))
    monkeypatch.setattr(
        BertForSequenceClassification, "__init__", lambda *args: pytest.fail("a model was built")
    )
    with pytest.raises(ValueError, match="num_labels 150,000, and 100,000 is the largest"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    edit_config(folder, lambda config: config.update(num_labels=5))
    with pytest.raises(ValueError, match=r"config\.json differs from the one that was saved"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    AutoConfig.from_pretrained(folder)  # reads it unchecked: nothing is made of it


@any_loader
def test_a_kernel_of_a_hub_in_the_config_is_refused_before_it_is_fetched(folder, load, monkeypatch):
    monkeypatch.setenv(SWITCH, "0")
    edit_config(folder, lambda config: config.update(attn_implementation="someone/kernel"))
    with pytest.raises(ValueError, match="someone/kernel', which is code from a hub"):
        load(folder)


def test_without_checksums_numbers_of_the_config_are_still_checked(old):
    (old / LIST).unlink()
    edit_config(old, lambda config: config.update(num_labels=150_000))
    with pytest.raises(ValueError, match="num_labels 150,000, and 100,000 is the largest"):
        AutoModelForSequenceClassification.from_pretrained(old)


def test_without_checksums_a_strange_type_of_model_is_refused(old):
    (old / LIST).unlink()
    edit_config(old, lambda config: config.update(model_type={}))
    with pytest.raises(ValueError, match=r"config\.json is damaged or of another version"):
        qrefta.load(old)


@any_loader
def test_files_without_checksums_are_refused(folder, load):
    """Another program wrote them, with another program's damage."""
    weights = folder / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"has no checksums, but config\.json says format version 3"
    ):
        load(folder)


def test_a_tensor_of_another_shape_is_not_even_hashed(folder, monkeypatch):
    """A sparse file may claim terabytes."""
    weights = folder / "model.safetensors"
    metadata = {"format": "pt", KEY: json.dumps(header(weights))}
    tensors = load_file(weights)
    save_file(tensors | {"classifier.bias": torch.ones(5)}, weights, metadata=metadata)
    monkeypatch.setattr(Checkpoint, "checksum", lambda *args: pytest.fail("it was hashed"))
    with pytest.raises(ValueError, match=r"classifier.bias is torch.float32 of shape \[5\]"):
        qrefta.load(folder)


def test_a_tensor_without_a_checksum_is_refused(folder):
    weights = folder / "model.safetensors"
    metadata = {"format": "pt", KEY: json.dumps(header(weights))}
    save_file(load_file(weights) | {"more": torch.ones(1)}, weights, metadata=metadata)
    with pytest.raises(ValueError, match="holds more, for which no checksum was saved"):
        qrefta.load(folder)


def test_a_flipped_index_is_refused(tmp_path):
    prepared().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("query.absmax", "query.absmxa", 1))
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        qrefta.load(tmp_path)


@pytest.mark.parametrize("weights", ["one file", "a shard", "a shard of our writer"])
def test_weights_of_another_save_are_refused(weights, tmp_path):
    """Two saves side by side: a copy that mixed them."""
    first, second = tmp_path / "first", tmp_path / "second"
    if weights == "one file":
        prepared().save_pretrained(first)
        prepared(rank=4).save_pretrained(second)
    elif weights == "a shard":
        nudge(prepared()).save_pretrained(first, max_shard_size="20KB")
        nudge(prepared(), scale=1e-3).save_pretrained(second, max_shard_size="20KB")
    else:
        for folder in (first, second):
            dense = tiny_bert()
            with torch.no_grad():
                dense.bert.encoder.layer[0].attention.self.query.weight.mul_(1 + (folder == second))
            dense.save_pretrained(folder / "dense")
            qrefta.prepare_checkpoint(folder / "dense", folder / "out", rank=5, progress=False)
        first, second = first / "out", second / "out"
    name = next(
        path.name
        for path in sorted(first.glob("*.safetensors"))
        if path.read_bytes() != (second / path.name).read_bytes()
    )
    shutil.copy(second / name, first / name)
    with pytest.raises(ValueError, match=r"of another\s*save"):
        qrefta.load(first)


@pytest.mark.parametrize("off", ["0", "false", "no", "OFF"])
def test_the_switch_loads_unchecked(folder, off, monkeypatch):
    flip(folder / "model.safetensors")
    monkeypatch.setenv(SWITCH, off)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qrefta.load(folder)
    with pytest.raises(ValueError, match="the checksum of"):
        qrefta.verify(folder)


def test_a_folder_changed_on_purpose_gets_new_checksums(folder):
    labels = {"0": "no", "1": "yes", "2": "maybe"}
    edit_config(folder, lambda config: config.update(id2label=labels))
    with pytest.raises(ValueError, match="write_checksums"):
        qrefta.load(folder)
    write_checksums(folder)
    assert qrefta.load(folder).config.id2label[2] == "maybe"
    assert_whole(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "no checksums of tensors"),
        ('{"algorithm": "crc32", "tensors": 3}', "no checksums of tensors"),
        ('{"algorithm": "crc32", "tensors": {}}', "checksum of config"),
        ('{"algorithm": "crc32", "config": "00000000", "tensors": {}}', "differs from the one"),
        ('{"algorithm": "sha512", "tensors": {}}', "of the kind 'sha512'.* pip install -U qrefta"),
    ],
)
def test_damaged_checksums_are_refused(folder, text, message):
    weights = folder / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", KEY: text})
    with pytest.raises(ValueError, match=message):
        qrefta.load(folder)


def test_the_recipe_does_not_go_on_from_damaged_weights(tmp_path):
    """Trainer reads a checkpoint's weights itself, past the plug-in."""
    tiny_folder(tmp_path / "base")
    tokenizer, data = tiny_tokenizer(), color_data(16, 8)

    def run(max_steps, resume=False):
        model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
        model = qrefta.prepare(model, rank=2, refine=0, progress=False)
        args = training_arguments(
            "classify",
            tmp_path / "out",
            per_device_train_batch_size=4,
            max_steps=max_steps,
            save_steps=1,
            disable_tqdm=True,
        )
        qrefta.finetune(model, tokenizer, data, args=args, resume=resume)

    run(max_steps=2)
    flip(last_checkpoint(tmp_path / "out") / "model.safetensors")
    with pytest.raises(ValueError, match="the checksum of"):
        run(max_steps=4, resume=True)


# Folders of format version 1


@any_loader
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_old_folder_is_checked_by_its_list(old, load, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(old)
    data = (old / name).read_bytes()
    place = data.index(b'"initializer_range": 0.1') + 21 if name == "config.json" else -1
    flip(old / name, place)
    with pytest.raises(ValueError, match=rf"{name} is damaged: its SHA-256 .* QREFTA_VERIFY=0"):
        load(old)


def test_an_old_file_of_another_length_is_not_even_hashed(old, monkeypatch):
    """A sparse file of a terabyte would be hashed for an hour."""
    (old / "config.json").write_text((old / "config.json").read_text() + " ")
    monkeypatch.setattr("qrefta.files.verify._sha256", lambda file: pytest.fail("it was hashed"))
    with pytest.raises(ValueError, match=r"bytes, and .* were saved"):
        qrefta.load(old)


@any_loader
def test_an_old_folder_without_a_list_loads_with_one_warning(old, load):
    (old / LIST).unlink()
    with pytest.warns(UserWarning, match=LIST) as seen:
        load(old)
    assert len([one for one in seen if LIST in str(one.message)]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is damaged or unreadable"),
        ("[" * 100_000, "is damaged or unreadable"),
        ("[]", "lists no files"),
        ("{}", "lists no files"),
        ('{"format": 1, "files": {}}', "lists no files"),
        ('{"format": 1, "files": {"config.json": 3}}', "lists no files"),
        ('{"format": 1, "files": {"../x": {"bytes": 1, "sha256": ""}}}', "lists no files"),
        ('{"format": 2, "files": {}}', "format 2; this package reads 1. Update it"),
    ],
)
def test_a_damaged_list_is_refused(old, content, message):
    (old / LIST).write_text(content)
    with pytest.raises(ValueError, match=message):
        qrefta.load(old)


def test_an_old_folder_that_is_saved_again_has_checksums(old, tmp_path):
    qrefta.load(old).save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 3
    assert_whole(tmp_path / "new")


def test_checksums_for_an_old_folder(old):
    write_checksums(old)
    assert not (old / LIST).exists()
    assert_whole(old)


def test_an_old_hub_folder_gets_its_list_from_the_hub(old, tmp_path, monkeypatch):
    """transformers fetches only what it loads; the list is asked for, at the same commit."""
    snapshot = tmp_path / "snapshot"
    shutil.move(old, snapshot)
    remote = tmp_path / "remote.json"
    shutil.move(snapshot / LIST, remote)
    asked = []

    def cached_file(name, file, revision=None, **options):
        asked.append((name, file, revision))
        return str(remote)

    monkeypatch.setattr("qrefta._compat.hub.cached_file", cached_file)
    model = SimpleNamespace(name_or_path="me/model", config=SimpleNamespace(_commit_hash="abc"))
    files = [snapshot / "model.safetensors"]
    check_saved(files, 1, _hub_list(model))
    assert asked == [("me/model", LIST, "abc")]
    flip(snapshot / "model.safetensors")
    with pytest.raises(ValueError, match="SHA-256"):
        check_saved(files, 1, _hub_list(model))


# Saving over an older folder


def test_shards_over_one_file_are_refused_until_the_older_file_is_deleted(tmp_path):
    """transformers leaves the one file beside new shards, and then loads it: the old weights."""
    prepared().save_pretrained(tmp_path)
    last = nudge(prepared(), scale=0.1)
    last.save_pretrained(tmp_path, max_shard_size="20KB")
    for load in (*LOADERS.values(), qrefta.verify):
        with pytest.raises(ValueError, match=r"two saves.* model\.safetensors has the older date"):
            load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert_close(logits(qrefta.load(tmp_path)), logits(last), rtol=0, atol=0)


def test_one_file_over_shards_loads(tmp_path):
    """transformers removes the older shards, though not their index."""
    prepared().save_pretrained(tmp_path, max_shard_size="20KB")
    last = nudge(prepared(), scale=0.1)
    last.save_pretrained(tmp_path)
    for load in (*LOADERS.values(), qrefta.verify):
        load(tmp_path)
    assert_close(logits(qrefta.load(tmp_path)), logits(last), rtol=0, atol=0)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"Delete model\.safetensors\.index\.json: by"):
        qrefta.load(tmp_path)


def test_of_two_saves_the_one_of_config_json_is_kept_whatever_the_dates(tmp_path):
    """Copying a folder may reverse the dates of its files."""
    prepared(rank=4).save_pretrained(tmp_path)
    prepared(rank=3).save_pretrained(tmp_path, max_shard_size="20KB")
    os.utime(tmp_path / "model.safetensors", (2e9, 2e9))
    os.utime(tmp_path / "model.safetensors.index.json", (1e9, 1e9))
    with pytest.raises(ValueError, match=r"Delete model\.safetensors: by its checksum"):
        qrefta.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    qrefta.load(tmp_path)


def test_a_save_that_stops_halfway_is_refused(folder, monkeypatch):
    def stop(*args, **kwargs):
        raise OSError(28, "No space left on device")

    config = (folder / "config.json").read_text()
    model = nudge(prepared(rank=4))
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", stop)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder)
    assert (folder / "config.json").read_text() != config
    with pytest.raises(ValueError, match=r"config\.json"):
        qrefta.load(folder)


def test_adapters_of_other_libraries_in_the_folder_do_not_matter(folder):
    expected = qrefta.load(folder).state_dict()
    for content in (b"\0" * 8, b"\1" * 9):
        (folder / "adapter_model.safetensors").write_bytes(content)
        # with adapter_config.json transformers would load the adapter
        assert_close(qrefta.load(folder).state_dict(), expected, rtol=0, atol=0)


# verify


def test_verify_names_the_files(folder):
    tiny_tokenizer().save_pretrained(folder)
    names = [file.name for file in qrefta.verify(folder)]
    assert set(names) == {path.name for path in folder.iterdir()} - {
        "README.md",
        "special_tokens_map.json",
    }
    assert names[:2] == ["config.json", "model.safetensors"]


def left_over(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")


def infinite_scales(folder):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("query.absmax"))
    tensors[name].view(torch.float32)[3] = torch.inf
    save_file(tensors, weights, metadata={"format": "pt"})
    write_checksums(folder)


def no_bias(folder):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["classifier.bias"]
    save_file(tensors, weights, metadata={"format": "pt"})
    write_checksums(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (left_over, "holds model-00001-of-00002.safetensors of another save.*delete it"),
        (lambda folder: (folder / LIST).write_text("{}"), f"holds {LIST} of another save"),
        (lambda folder: (folder / "qrefta_unfinished.json").write_text("{}"), "is unfinished"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer.json is damaged"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "has neither model.safetensors nor",
        ),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (infinite_scales, r"query\.absmax holds NaN or infinite numbers"),
        (no_bias, r"1 tensors .* missing in the checkpoint: classifier\.bias"),
        (lambda folder: flip(folder / "model.safetensors"), "the checksum of"),
    ],
)
def test_verify_refuses(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        qrefta.verify(folder)


def test_verify_waits_for_no_pipe(folder):
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ValueError, match="a pipe, device or folder"):
        qrefta.verify(folder)


def test_verify_of_an_old_folder_uses_its_list(old):
    assert [file.name for file in qrefta.verify(old)][:2] == ["config.json", "model.safetensors"]
    flip(old / "model.safetensors")
    with pytest.raises(ValueError, match="SHA-256"):
        qrefta.verify(old)
