"""Perplexity and KL divergence of real models: dense, prepared, trained, merged, in 4 bits."""

import copy
import json
import math

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

import qrefta
from qrefta.measure import compare as module
from qrefta.measure.compare import _comparison_entries, compare
from qrefta.measure.divergence import compare_logits
from tests.models import build, decoder_sizes, tiny_llama
from tests.pages import language_tokenizer


@pytest.fixture
def dense(folder):
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.fixture
def prepared(folder):
    """With factors that have moved since."""
    model = qrefta.prepare(
        LlamaForCausalLM.from_pretrained(folder), rank=8, refine=0, progress=False
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.002
    return model


def measured(model, reference, text, **options):
    """The comparison on one text."""
    (comparison,) = compare(model, reference, text, progress=False, **options)
    return comparison


def measures(comparison):
    """The numbers, without the names."""
    names = ("model", "reference", "text")
    return {key: value for key, value in comparison.to_dict().items() if key not in names}


def in_four_bits(model):
    """A copy with the linear layers of the blocks in bitsandbytes' NF4."""
    model = copy.deepcopy(model)
    blocks = model.model.layers
    for name, layer in list(blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            small = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
            small.weight = bnb.nn.Params4bit(layer.weight.data, quant_type="nf4")
            owner, _, leaf = name.rpartition(".")
            setattr(blocks.get_submodule(owner), leaf, small.to("cpu"))
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 512.0}, "window is 512.0; it must be a whole number, 2 or more"),
        ({"window": "512"}, "window is '512'; it must be a whole number, 2 or more"),
        ({"limit": 1.5}, "limit is 1.5; it must be a whole number, 1 or more"),
    ],
)
def test_counts_that_are_no_whole_numbers_are_refused(options, message, dense, text):
    with pytest.raises(ValueError, match=message):
        measured(dense, None, text, **options)


def test_a_model_keeps_all_of_itself(dense, folder, text):
    """Object and folder are the same model."""
    found = measured(dense, folder, text, window=16)
    assert (found.windows, found.window, found.tokens) == (10, 16, 9 * 15 + 5)
    assert found.perplexity == found.reference_perplexity
    assert found.kl_mean == found.kl_stderr == found.kl_median == found.kl_999 == 0
    assert found.agreement == 1
    assert found.flips == 0


def test_perplexity_is_that_of_transformers_loss(dense, text):
    """One window of the whole text, as long as the model's positions allow."""
    ids = torch.tensor([language_tokenizer()(text.read_text())["input_ids"][:64]])
    with torch.no_grad():
        loss = dense(ids, labels=ids).loss.item()
    found = measured(dense, None, text, limit=1)
    assert found.window == 64
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.perplexity_stderr is None
    assert found.reference is found.kl_mean is found.agreement is None


def test_every_measure_is_that_of_the_logits(prepared, dense, text):
    """The whole computation again, with numpy, of all tokens at once."""
    ids = torch.tensor(language_tokenizer()(text.read_text())["input_ids"][:144]).view(9, 16)
    with torch.no_grad():
        logits, expected = (
            model(ids).logits[:, :-1].double().log_softmax(-1) for model in (prepared, dense)
        )
    targets = ids[:, 1:]
    divergence = (expected.exp() * (expected - logits)).sum(-1).numpy()
    loss = -logits.gather(-1, targets[..., None])[..., 0].numpy()
    first = logits.argmax(-1)
    reference_first = expected.argmax(-1)
    found = measured(prepared, dense, text, window=16, limit=9)
    wanted = {
        "perplexity": np.exp(loss.mean()),
        "perplexity_stderr": np.exp(loss.mean()) * loss.mean(1).std(ddof=1) / 3,
        "kl_mean": divergence.mean(),
        "kl_stderr": divergence.mean(1).std(ddof=1) / 3,
        "kl_median": np.median(divergence),
        "kl_99": np.quantile(divergence, 0.99),
        "kl_999": np.quantile(divergence, 0.999),
        "agreement": (first == reference_first).double().mean().item(),
        "flips": ((first == targets) ^ (reference_first == targets)).double().mean().item(),
    }
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name
    assert 0 < found.kl_median < found.kl_99 < found.kl_999
    assert 0 < found.agreement < 1


def test_a_prepared_model_its_folder_and_its_merged_model_agree(prepared, folder, text, tmp_path):
    prepared.save_pretrained(tmp_path / "4bit")
    qrefta.merge(prepared, torch.float32, out=tmp_path / "merged")
    options = {"window": 32, "tokenizer": language_tokenizer()}
    first = measured(prepared, folder, text, **options)
    assert first.kl_mean > 0.001
    for name in ("4bit", "merged"):
        again = measured(tmp_path / name, folder, text, **options)
        assert measures(again) == pytest.approx(measures(first), rel=1e-3), name
        assert again.model == str(tmp_path / name)


def test_training_a_prepared_model_moves_it(prepared, dense, text):
    before = measured(prepared, dense, text, window=32)
    with torch.no_grad():
        for parameter in prepared.parameters():
            if parameter.requires_grad:
                parameter += 0.05
    assert measured(prepared, dense, text, window=32).kl_mean > 2 * before.kl_mean


def test_a_model_in_bitsandbytes_four_bits(dense, text):
    small = in_four_bits(dense)
    found = measured(small, dense, text, window=32)
    assert 0.001 < found.kl_mean < 0.5
    assert 0.5 < found.agreement < 1


def test_dtypes_may_differ(dense, folder, text):
    """Rounding to bfloat16 moves a model a little."""
    rounded = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found = measured(rounded, dense, text, window=32)
    assert 0 < found.kl_mean < 0.01


def test_mode_and_cache_are_as_before(dense, prepared, text):
    """A module that was in eval mode within a training model stays so, also after an error."""
    prepared.train()
    prepared.model.norm.eval()
    dense.eval()
    modes = [[part.training for part in model.modules()] for model in (prepared, dense)]
    caches = [model.config.use_cache for model in (prepared, dense)]
    measured(prepared, dense, text, window=32)
    with torch.no_grad():
        dense.lm_head.weight[0] = math.nan
    with pytest.raises(ValueError, match="not a number"):
        measured(prepared, dense, text, window=32)
    assert [[part.training for part in model.modules()] for model in (prepared, dense)] == modes
    assert [model.config.use_cache for model in (prepared, dense)] == caches


def test_dropout_is_off(folder, dense, text):
    wild = LlamaForCausalLM.from_pretrained(folder, attention_dropout=0.9).train()
    assert measured(wild, dense, text, window=32).kl_mean == 0
    assert measured(dense, wild, text, window=32).kl_mean == 0


def test_several_texts_come_in_order(folder, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("w1 w2 w3")
    found = compare(folder, folder, [other, text], window=16, progress=False)
    assert [entry.text for entry in found] == [f"{tmp_path.name}/other.txt", "texts0/words.txt"]
    assert [entry.tokens for entry in found] == [2, 140]
    assert found[0].kl_stderr is None


def test_only_a_window_of_logits_is_kept(dense, prepared, text, monkeypatch):
    """The model's logits wait for the reference's; both are freed before the next window."""
    made = []
    counts = []
    logits = module._logits

    def counted(model, window):
        counts.append(sum(not storage.expired() for storage in made))
        found = logits(model, window)
        made.append(StorageWeakRef(found.untyped_storage()))
        return found

    monkeypatch.setattr(module, "_logits", counted)
    measured(prepared, dense, text, window=16)
    assert counts == [0, 1] * 10


@pytest.mark.parametrize("side", [0, 1])
def test_logits_that_are_not_finite_are_refused(side, dense, prepared, text):
    models = [prepared, dense]
    with torch.no_grad():
        models[side].lm_head.weight[3] = math.nan
    name = ("model", "reference")[side]
    with pytest.raises(ValueError, match=rf"loss of the {name} is .* 31 of 31 tokens"):
        measured(*models, text, window=32)
    with pytest.raises(ValueError, match=r"loss of the model is .* 31 of 31 tokens"):
        measured(models[side], None, text, window=32)


def test_a_divergence_that_is_infinite_is_refused(dense, prepared, text, monkeypatch):
    """The model rules out a token that the text does not have; the losses stay finite."""
    logits = module._logits

    def without_a_token(model, window):
        found = logits(model, window)
        if model is prepared:
            found[:, 20] = -math.inf
        return found

    monkeypatch.setattr(module, "_logits", without_a_token)
    with pytest.raises(ValueError, match=r"KL divergence is .* 31 of 31 tokens"):
        measured(prepared, dense, text, window=32)


def test_two_sizes_of_vocabulary_are_refused(dense, text):
    padded = build(LlamaForCausalLM, LlamaConfig(**decoder_sizes(32) | {"vocab_size": 128}))
    with pytest.raises(ValueError, match=r"128 tokens and the reference's 96.*resize_token"):
        measured(padded, dense, text)


def test_two_tokenizers_are_refused(folder, text, tmp_path):
    """Of equal size, but the words have other numbers."""
    tiny_llama(hidden=64).save_pretrained(tmp_path)
    tokenizer = language_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w7"], vocabulary["w8"] = vocabulary["w8"], vocabulary["w7"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"token 'w7' is number 7 in .* and 8 in"):
        measured(tmp_path, folder, text)
    assert measured(tmp_path, folder, text, tokenizer=tokenizer).kl_mean == 0


def test_the_tokenizer_may_be_with_either_model(dense, text, folder):
    """A model that was made in memory has none."""
    made = tiny_llama(hidden=64)
    assert measured(made, folder, text).kl_mean == 0
    assert measured(folder, made, text).kl_mean == 0
    with pytest.raises(ValueError, match=r"no tokenizer in LlamaForCausalLM or LlamaForCausalLM"):
        measured(made, made, text)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(text):
    small = build(LlamaForCausalLM, LlamaConfig(**decoder_sizes(32) | {"vocab_size": 50}))
    with pytest.raises(ValueError, match=r"token number 9., and the model's vocabulary has 50"):
        measured(small, None, text, tokenizer=language_tokenizer())


def test_texts_are_checked_before_models_are_loaded(folder, text):
    with pytest.raises(ValueError, match=r"no text is given"):
        compare("no/such-model", None, [])
    with pytest.raises(ValueError, match=r"no text file nothing\.txt"):
        compare("no/such-model", None, [text, "nothing.txt"])


def test_quantiles_are_numpys_over_the_tokens_of_all_windows():
    generator = torch.Generator().manual_seed(0)
    windows = []
    for length in (30, 200, 7):
        logits = torch.randn(2, length, 20, generator=generator)
        targets = torch.zeros(length, dtype=torch.long)
        windows.append(compare_logits(logits[0], logits[1], targets))
    entries = _comparison_entries(windows)
    values = np.concatenate([window.divergence.numpy() for window in windows])
    for name, share in {"kl_median": 0.5, "kl_99": 0.99, "kl_999": 0.999}.items():
        assert entries[name] == pytest.approx(np.quantile(values, share)), name
    assert entries["kl_mean"] == pytest.approx(values.mean(), rel=1e-6)
