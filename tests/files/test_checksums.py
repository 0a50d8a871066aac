"""The list of SHA-256 digests: written last by every way of saving, checked before anything is made of the files."""

import copy
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    modeling_utils,
)
from transformers.utils import hub

import qrefta
from qrefta.files.checksums import DIGESTS, SWITCH, check_digests, write_digests
from qrefta.hf_quantizer import _check_digests
from qrefta.train.arguments import training_arguments
from qrefta.train.checkpoints import last_checkpoint
from tests.models import logits, tiny_bert
from tests.peers import add_adapter
from tests.test_hf_quantizer import EVERY_2_STEPS, nudge, trainer
from tests.tiny import color_data, tiny_folder, tiny_tokenizer

LOADERS = {"load": qrefta.load, "auto": AutoModelForSequenceClassification.from_pretrained}
any_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


def prepared():
    return qrefta.prepare(tiny_bert(), rank=5, progress=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    prepared().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def listed(folder):
    return json.loads((folder / DIGESTS).read_text())["files"]


def flip(path, place=-1):
    """One bit of one byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def assert_whole(folder, names):
    """The list has these files, and `sha256sum` agrees with it."""
    entries = listed(folder)
    assert set(entries) == set(names)
    for name, entry in entries.items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    newest = max(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == DIGESTS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qrefta.load(folder)


def test_save_pretrained_ends_with_the_list(saved):
    assert_whole(saved, ["config.json", "model.safetensors"])


def test_shards_and_their_index_are_listed(tmp_path):
    prepared().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(shards) > 1
    assert_whole(tmp_path, shards | {"config.json", "model.safetensors.index.json"})


def test_a_checkpoint_prepared_out_of_core_has_the_list(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "dense")
    write_digests(tmp_path / "dense")  # it must not be copied
    out = qrefta.prepare(tmp_path / "dense", out=tmp_path / "out", rank=5, progress=False)
    shards = {path.name for path in out.glob("*.safetensors")}
    assert len(shards) > 1
    assert_whole(out, shards | {"config.json", "model.safetensors.index.json"})


def test_a_checkpoint_of_the_trainer_has_the_list_and_is_not_resumed_from_when_damaged(tmp_path):
    trainer(prepared(), tmp_path, **EVERY_2_STEPS).train()
    assert set(listed(tmp_path / "checkpoint-4")) == {"config.json", "model.safetensors"}
    qrefta.load(tmp_path / "checkpoint-4")
    flip(last_checkpoint(tmp_path) / "model.safetensors")
    with pytest.raises(ValueError, match="SHA-256"):
        qrefta.load(last_checkpoint(tmp_path))


@pytest.mark.parametrize("again", ["loaded", "prepared while loading", "copied"])
def test_every_model_that_is_prepared_writes_the_list(again, saved, tmp_path):
    tiny_bert().save_pretrained(tmp_path / "dense")
    model = {
        "loaded": lambda: qrefta.load(saved),
        "prepared while loading": lambda: BertForSequenceClassification.from_pretrained(
            tmp_path / "dense", quantization_config=qrefta.QReftaConfig(rank=5)
        ),
        "copied": lambda: copy.deepcopy(qrefta.load(saved)),
    }[again]()
    if again == "copied":
        nudge(model)
    model.save_pretrained(tmp_path / "again")
    assert_whole(tmp_path / "again", ["config.json", "model.safetensors"])
    assert torch.equal(logits(qrefta.load(tmp_path / "again")), logits(model))


def test_a_merged_model_saves_as_any_other(tmp_path):
    model = qrefta.merge(prepared())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / DIGESTS).exists()
    assert "save_pretrained" not in vars(model)


def test_a_dense_model_takes_a_prepared_ones_place(tmp_path):
    model = prepared()
    model.save_pretrained(tmp_path)
    qrefta.merge(model).save_pretrained(tmp_path)
    assert not (tmp_path / DIGESTS).exists()
    AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_an_adapter_that_is_saved_beside_a_prepared_model_leaves_the_list(folder):
    before = (folder / DIGESTS).read_bytes()
    dense = tiny_bert()
    add_adapter(dense, LoraConfig(r=2, target_modules=["query"]))
    dense.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").is_file()
    assert (folder / DIGESTS).read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"num_labels": 10**6}, {"quantization_config": {"quant_method": "mxfp4"}}], ids=str
)
def test_a_changed_config_is_refused_before_transformers_makes_anything_of_it(change, folder):
    """Else the first is built for ever, and the second loads as what it is not."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    for kind in (AutoConfig, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=r"config\.json has \d+ bytes"):
            kind.from_pretrained(folder)


def test_without_a_list_numbers_of_the_config_are_still_looked_at(folder):
    (folder / DIGESTS).unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_labels": 10**6}))
    with pytest.raises(ValueError, match="num_labels 1,000,000, and 100,000 is the largest"):
        AutoModelForSequenceClassification.from_pretrained(folder)


def test_a_merge_to_a_folder_leaves_the_list_behind(saved, tmp_path):
    qrefta.merge(qrefta.load(saved), out=tmp_path / "dense")
    assert not (tmp_path / "dense" / DIGESTS).exists()


def test_what_is_uploaded_ends_with_the_list(tmp_path, monkeypatch):
    """`save_pretrained(push_to_hub=True)` uploads before it returns; `push_to_hub` saves to a folder of its own."""
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
        check_digests(received, received.glob("*.safetensors"))
        assert DIGESTS in files


# Checking


@any_loader
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_is_refused(folder, load, name):
    data = (folder / name).read_bytes()
    place = (
        data.index(b'"initializer_range": 0.1') + 21 if name == "config.json" else -1
    )  # 0.1 -> 1.1: valid JSON
    flip(folder / name, place)
    with pytest.raises(
        ValueError, match=rf"{name} is damaged: its SHA-256 .* copy it again .* QREFTA_VERIFY=0"
    ):
        load(folder)


@any_loader
def test_nothing_is_made_of_damaged_files(folder, load, monkeypatch):
    """The refusal comes before a tensor is materialised, and before an adapted layer is built."""
    flip(folder / "model.safetensors")
    monkeypatch.setattr("qrefta.hf_quantizer.build", lambda *args: pytest.fail("a layer was built"))
    monkeypatch.setattr(
        "transformers.modeling_utils.convert_and_load_state_dict_in_model",
        lambda *args, **kwargs: pytest.fail("a tensor was read"),
    )
    with pytest.raises(ValueError, match="SHA-256"):
        load(folder)


def test_a_flipped_index_is_refused(tmp_path):
    prepared().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("query.absmax", "query.absmxa", 1))
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        qrefta.load(tmp_path)


def test_a_file_of_another_length_is_not_even_hashed(folder, monkeypatch):
    """A sparse file of a terabyte would be hashed for an hour."""
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    monkeypatch.setattr(
        "qrefta.files.checksums._digests", lambda files: pytest.fail("it was hashed")
    )
    with pytest.raises(ValueError, match=r"bytes, and .* were saved"):
        check_digests(folder, [])


def test_weights_of_another_save_are_refused(folder):
    """Two saves side by side: a copy that mixed them."""
    nudge(prepared()).save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other" / "model.safetensors", folder)
    with pytest.raises(ValueError, match="were saved"):
        qrefta.load(folder)


@pytest.mark.parametrize("off", ["0", "false", "no", "OFF"])
def test_the_switch_loads_unchecked(folder, off, monkeypatch):
    flip(folder / "model.safetensors")
    monkeypatch.setenv(SWITCH, off)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qrefta.load(folder)


@any_loader
def test_an_old_folder_loads_with_one_warning(folder, load):
    (folder / DIGESTS).unlink()
    with pytest.warns(UserWarning, match=DIGESTS) as seen:
        load(folder)
    assert len([one for one in seen if DIGESTS in str(one.message)]) == 1


def test_a_folder_changed_on_purpose_gets_a_new_list(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"id2label": {"0": "no", "1": "yes", "2": "maybe"}})
    )
    with pytest.raises(ValueError, match="write_digests"):
        qrefta.load(folder)
    write_digests(folder)
    assert qrefta.load(folder).config.id2label[2] == "maybe"


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
def test_a_damaged_list_is_refused(folder, content, message):
    (folder / DIGESTS).write_text(content)
    with pytest.raises(ValueError, match=message):
        qrefta.load(folder)


def test_a_hub_name_gets_its_list_from_the_hub(folder, tmp_path, monkeypatch):
    """transformers fetches only what it loads; the list is asked for, at the same commit."""
    snapshot = tmp_path / "snapshot"
    shutil.move(folder, snapshot)
    remote = tmp_path / "remote.json"
    shutil.move(snapshot / DIGESTS, remote)
    asked = []

    def cached_file(name, file, revision=None, **options):
        asked.append((name, file, revision))
        return str(remote)

    monkeypatch.setattr("qrefta.hf_quantizer.cached_file", cached_file)
    model = SimpleNamespace(name_or_path="me/model", config=SimpleNamespace(_commit_hash="abc"))
    _check_digests(model, [str(snapshot / "model.safetensors")])
    assert asked == [("me/model", DIGESTS, "abc")]
    flip(snapshot / "model.safetensors")
    with pytest.raises(ValueError, match="SHA-256"):
        _check_digests(model, [str(snapshot / "model.safetensors")])


# Saving over an older folder


@pytest.mark.parametrize("first", ["one file", "shards"])
def test_saving_over_the_other_layout_loads_what_was_saved_last(first, tmp_path):
    """transformers leaves the one file beside new shards, and then loads it: the old weights."""
    sizes = {"one file": "1GB", "shards": "20KB"}
    prepared().save_pretrained(tmp_path, max_shard_size=sizes.pop(first))
    last = nudge(prepared(), scale=0.1)
    last.save_pretrained(tmp_path, max_shard_size=next(iter(sizes.values())))
    assert_close(logits(qrefta.load(tmp_path)), logits(last), rtol=0, atol=0)
    assert (tmp_path / "model.safetensors").exists() != (
        tmp_path / "model.safetensors.index.json"
    ).exists()


def test_saving_over_a_folder_without_a_list_writes_one(folder):
    (folder / DIGESTS).unlink()
    nudge(prepared()).save_pretrained(folder)
    assert_whole(folder, ["config.json", "model.safetensors"])


def test_a_save_that_stops_halfway_is_refused(folder, monkeypatch):
    def stop(*args, **kwargs):
        raise OSError(28, "No space left on device")

    config = (folder / "config.json").read_text()
    model = nudge(qrefta.prepare(tiny_bert(), rank=4, progress=False))
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", stop)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder)
    assert (folder / "config.json").read_text() != config
    with pytest.raises(ValueError, match=r"config\.json"):
        qrefta.load(folder)


def test_adapters_of_other_libraries_beside_the_weights_do_not_matter(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 8)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_config.json").unlink()  # with one transformers would load it
    qrefta.load(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"\1" * 9)
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
    with pytest.raises(ValueError, match="SHA-256"):
        run(max_steps=4, resume=True)


def test_writing_a_list_waits_for_no_pipe(folder):
    os.mkfifo(folder / "model.safetensors.index.json")
    (folder / "model-1.safetensors").mkdir()
    write_digests(folder)
    assert set(listed(folder)) == {"config.json", "model.safetensors"}
