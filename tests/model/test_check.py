"""Files and models that belong together, for classes that leave tensors out of their files."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import qrefta
from qrefta.files.verify import write_checksums
from tests.models import logits, prepared, tiny_bert
from tests.peculiar import tiny_funnel, tiny_marian

POSITIONS = "model.encoder.embed_positions.weight"
TYINGS = [{}, {"share_encoder_decoder_embeddings": False}, {"tie_word_embeddings": False}]


@pytest.mark.parametrize("tying", TYINGS, ids=["all tied", "two vocabularies", "separate head"])
def test_tensors_that_a_class_never_saves_are_not_missing(tying, tmp_path):
    """Marian makes its positions as it loads, in memory and out of core."""
    dense = tiny_marian(**tying)
    dense.save_pretrained(tmp_path / "dense")
    model = qrefta.prepare(dense, rank=4, progress=False)
    expected = logits(model)
    model.save_pretrained(tmp_path / "4bit")
    qrefta.prepare_checkpoint(tmp_path / "dense", tmp_path / "made", rank=4, progress=False)
    for folder in (tmp_path / "4bit", tmp_path / "made"):
        assert qrefta.verify(folder)
        assert torch.equal(logits(qrefta.load(folder)), expected)
        assert torch.equal(logits(type(dense).from_pretrained(folder)), expected)
    assert POSITIONS not in load_file(tmp_path / "4bit" / "model.safetensors")


def test_other_tensors_of_such_a_class_are_still_missing(tmp_path):
    lost = "model.encoder.layers.0.final_layer_norm.weight"
    qrefta.prepare(tiny_marian(), rank=4, progress=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[lost]
    save_file(tensors, file, {"format": "pt"})
    write_checksums(tmp_path)
    for read in (qrefta.load, qrefta.verify):
        with pytest.raises(ValueError, match=rf"^1 tensors .* are missing .*: {lost}"):
            read(tmp_path)


def test_adapted_layers_are_not_drawn_at_random(tmp_path):
    """Funnel takes them for linear layers, by the name of their class."""
    model = qrefta.prepare(tiny_funnel(), rank=4, progress=False)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(qrefta.load(tmp_path)), logits(model))


@pytest.mark.parametrize("max_shard_size", ["1GB", 20_000])
def test_a_folder_of_a_variant_is_not_called_unsaved(max_shard_size, tmp_path):
    model = prepared(tiny_bert, rank=2)
    model.save_pretrained(tmp_path, variant="fp32", max_shard_size=max_shard_size)
    with pytest.raises(ValueError, match=r"model\.fp32.*safetensors, weights of a variant"):
        qrefta.verify(tmp_path)
    assert torch.equal(logits(qrefta.load(tmp_path, variant="fp32")), logits(model))
