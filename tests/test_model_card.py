"""The model card names the base, its licence, the steps taken and the errors."""

import copy
import pickle
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import BertForSequenceClassification, modeling_utils
from transformers.utils import hub

import qrefta
from qrefta import model_card as card
from qrefta.model.prepared import prepared_config
from qrefta.model_card import base_license, model_card, write_card
from tests.kill import killed_while_writing
from tests.models import inputs, tiny_bert
from tests.tiny import tiny_folder

USE = "qrefta.load("
LICENSED = "---\nlicense: mit\n---\n# Base\n"


def prepared(folder, **settings):
    tiny_folder(folder)
    (folder / "README.md").write_text(LICENSED)
    return prepared_config(
        qrefta.prepare(type(tiny_bert()).from_pretrained(folder), **{"rank": 5} | settings)
    )


def test_hubs_can_read_the_header(tmp_path):
    config = prepared(tmp_path, double_quant=True)
    page = ModelCard(model_card(config, "It was trained."))
    assert page.data.base_model is None  # a folder; a hub refuses it
    assert tmp_path.name in page.text
    assert str(tmp_path) not in page.text
    assert page.data.license == "mit"
    assert page.data.library_name == "transformers"
    assert {"qrefta", "windows", "nf4"} <= set(page.data.tags)
    assert "NF4 in blocks of 64, scales in 8 bits" in page.text
    assert "It was trained." in page.text


def test_the_card_says_what_trains(tmp_path):
    text = model_card(prepared(tmp_path))
    assert "(method windows), which add nothing to the weights before training." in text
    text = model_card(prepared(tmp_path, method="refta"))
    assert "without the part that refta keeps in trainable factors, which all layers" in text


def test_every_stack_has_its_errors(tmp_path):
    config = prepared(tmp_path)
    assert "NF4 in blocks of 64, scales searched. The" in model_card(config)
    plain = prepared(tmp_path, quant_type="int4")  # without data its scales are not searched
    assert "INT4 in blocks of 64. The" in model_card(plain)
    assert "ratio of outputs" not in model_card(config)
    lines = [line for line in model_card(config).splitlines() if line.startswith("| bert.")]
    assert len(lines) == len(config.stacks)
    for line, row in zip(lines, config.stacks, strict=True):
        assert line.startswith(
            f"| {row.stack.name.replace('*', '&#42;')} |"
        )  # two stars in a row of a table make it bold
        assert f"{row.baseline_error:.4g} | {row.residual_error:.4g} | {row.ratio:.3f}" in line


@pytest.mark.parametrize(
    ("rounding", "words"),
    [("auto", "error feedback"), ("sequential", "error feedback layer after layer")],
)
def test_a_calibrated_model_states_its_rounding_and_output_errors(rounding, words):
    model = tiny_bert()
    batches = [inputs(model)] * 10
    config = prepared_config(
        qrefta.prepare(model, rank=5, rounding=rounding, calibration=batches, progress=False)
    )
    card = model_card(config)
    assert f"NF4 in blocks of 64, scales searched, rounded with {words}. The" in card
    assert "| ratio | ratio of outputs | bits per weight |" in card
    for row in config.stacks:
        assert f"| {row.ratio:.3f} | {row.output_ratio:.3f} | {row.bits_per_weight:.2f} |" in card


def test_bits_by_stack_are_named(tmp_path):
    config = prepared(tmp_path, bits="auto", target_bits=3.9, rank=1)
    page = ModelCard(model_card(config))
    formats = sorted({row.quant_type for row in config.stacks})
    assert set(formats) <= set(page.data.tags)
    named = ", ".join(map(str.upper, formats))
    words = "by stack, for at most 3.9 bits a weight, in blocks of 32, scales in 8 bits"
    assert f"{named} {words}, scales searched for NF4. The" in page.text


def test_a_model_without_a_name_has_a_card_too():
    page = ModelCard(model_card(prepared_config(qrefta.prepare(tiny_bert(), rank=5, bits=16))))
    assert page.data.base_model is None
    assert "a model that was not named" in page.text
    assert "16 bits" in page.text
    assert "Licence of the base model: see the page of the base model" in page.text


def test_a_card_that_is_there_is_kept(tmp_path):
    config = prepared(tmp_path)
    write_card(tmp_path, config)
    assert (tmp_path / "README.md").read_text() == LICENSED
    (tmp_path / "README.md").unlink()
    write_card(tmp_path, config)
    assert "qrefta.load(" in (tmp_path / "README.md").read_text()


def test_the_card_of_a_killed_process_is_removed_by_the_next_save(tmp_path, monkeypatch):
    model = qrefta.prepare(tiny_bert(), rank=5, refine=0, progress=False)
    killed_while_writing(partial(model.save_pretrained, tmp_path), monkeypatch)
    assert not (tmp_path / "README.md").exists()
    assert [path.suffix for path in tmp_path.glob("README.md.*")] == [".tmp"]
    model.save_pretrained(tmp_path)
    names = {"README.md", "config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_licence_is_looked_for_where_the_base_is(tmp_path, monkeypatch):
    assert base_license(None) is None
    assert base_license(str(tmp_path)) is None
    assert base_license("no/such-model") is None
    (tmp_path / "cached.md").write_text(LICENSED)
    with monkeypatch.context() as patch:
        patch.setattr(
            card, "try_to_load_from_cache", lambda source, name: str(tmp_path / "cached.md")
        )
        assert base_license("some/model") == "mit"
    (tmp_path / "README.md").write_text("# no header\n")
    assert base_license(str(tmp_path)) is None


def test_all_that_writes_a_folder_writes_a_card(tmp_path):
    tiny_folder(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text(LICENSED)
    qrefta.prepare_checkpoint(tmp_path / "dense", tmp_path / "4bit", rank=4, progress=False)
    model = qrefta.load(tmp_path / "4bit")
    qrefta.merge(model, out=tmp_path / "merged")
    qrefta.export_lora(model, tmp_path / "lora")
    model.save_pretrained(tmp_path / "loaded")
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    qrefta.prepare(dense, rank=4, progress=False).save_pretrained(tmp_path / "saved")
    for folder, words in (
        ("4bit", "qrefta.load"),
        ("merged", "merged"),
        ("lora", "PeftModel.from_pretrained"),
        ("lora/base", "the residual, dequantized"),
        ("saved", "qrefta.load"),
        ("loaded", "qrefta.load"),
    ):
        page = ModelCard.load(tmp_path / folder / "README.md")
        assert page.data.license == "mit"
        assert page.data.library_name == ("peft" if folder == "lora" else "transformers")
        assert words in page.text


def test_a_hub_name_is_the_base_model(tmp_path, monkeypatch):
    """A folder may have a name that a repository could have."""
    config = prepared(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    config.base_model = tmp_path.name
    assert ModelCard(model_card(config)).data.base_model is None
    config.base_model = "some/model"
    page = ModelCard(model_card(config))
    assert page.data.base_model == "some/model"
    assert "in the blocks of some/model are" in page.text


def test_a_merged_model_writes_no_card(tmp_path):
    tiny_folder(tmp_path / "dense")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    dense = qrefta.merge(qrefta.prepare(model, rank=4, progress=False))
    dense.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()


@pytest.fixture
def pushed(monkeypatch):
    """Cards that were sent to a hub, and the card that its repository had before, or None."""
    found = SimpleNamespace(cards=[], on_hub=None)

    class Card(ModelCard):
        @classmethod
        def load(cls, name, **_):
            assert name == "me/model"
            if found.on_hub is None:
                raise EntryNotFoundError("There is no README.md.")
            return cls(found.on_hub)

    def create_commit(**commit):
        for one in commit["operations"]:
            if one.path_in_repo == "README.md":
                found.cards.append(ModelCard.load(one.path_or_fileobj))

    api = SimpleNamespace(
        create_repo=lambda *_, **__: SimpleNamespace(repo_id="me/model"),
        create_commit=create_commit,
    )
    monkeypatch.setattr(hub, "ModelCard", Card)
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(modeling_utils, "hf_api", lambda: api)
    return found


def copied(model):
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


def test_a_pushed_model_has_the_card_and_the_callers_tags(tmp_path, pushed):
    """transformers writes a card of its template over the card of `save_pretrained`."""
    model = qrefta.prepare(tiny_bert(), rank=5, progress=False)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/model")
    for one in [model, qrefta.load(tmp_path / "saved"), *copied(model)]:
        one.push_to_hub("me/model", tags=["mine"])
    assert len(pushed.cards) == 5
    for page in pushed.cards:
        assert USE in page.text
        assert {"qrefta", "windows"} <= set(page.data.tags)
    assert all("mine" in page.data.tags for page in pushed.cards[1:])
    assert USE in Path(tmp_path, "saved", "README.md").read_text()


def test_the_card_of_a_repository_is_kept(pushed):
    pushed.on_hub = LICENSED
    qrefta.prepare(tiny_bert(), rank=5, progress=False).push_to_hub("me/model")
    (page,) = pushed.cards
    assert page.text.strip() == "# Base"


def test_a_merged_model_is_pushed_as_any_dense_model(pushed):
    dense = qrefta.merge(qrefta.prepare(tiny_bert(), rank=5, progress=False))
    dense.push_to_hub("me/model")
    (page,) = pushed.cards
    assert USE not in page.text
