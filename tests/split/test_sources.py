"""Every value of `prepare(calibration=...)`, and the values that are refused."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import normalizers
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import qrefta
from qrefta.model.prepared import is_prepared
from qrefta.model.stacks import find_stacks
from qrefta.split.batches import batch_inputs
from qrefta.split.calibrate import gather_moments
from qrefta.split.sources import calibration_batches
from qrefta.train.tasks.lm import load_text, text_windows
from tests.models import (
    VOCAB,
    build,
    decoder_sizes,
    encoder_sizes,
    tiny_bert,
    tiny_clip,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    tiny_vit,
)
from tests.tiny import color_rows, tiny_tokenizer

TEXTS = [row["text"] for row in color_rows(40, seed=5)]


def llama_classifier(pad):
    config = LlamaConfig(**decoder_sizes(32) | {"pad_token_id": pad})
    return build(LlamaForSequenceClassification, config)


def gpt2_classifier(pad):
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    return build(
        GPT2ForSequenceClassification, GPT2Config(vocab_size=96, pad_token_id=pad, **sizes)
    )


def ids(batches):
    return [batch["input_ids"].tolist() for batch in batches]


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_file_list_and_data_set_of_the_same_texts_give_the_same_batches(build, tmp_path):
    model = build()
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    table = Dataset.from_dict({"n": list(range(len(TEXTS))), "text": TEXTS})
    splits = DatasetDict(test=table.select([0]), train=table)
    expected = ids(calibration_batches(model, TEXTS, tiny_tokenizer()))
    for source in (tmp_path / "a.txt", str(tmp_path / "a.txt"), table, splits, tuple(TEXTS)):
        assert ids(calibration_batches(model, source, tiny_tokenizer())) == expected


@pytest.mark.parametrize(
    ("build", "running"),
    [(tiny_llama, True), (tiny_gpt2, True), (tiny_bert, False), (tiny_t5, False)],
)
def test_causal_language_models_read_windows_and_others_rows(build, running):
    model = build()
    batches = calibration_batches(model, TEXTS, tiny_tokenizer())
    rows = sum(len(batch["input_ids"]) for batch in batches)
    assert ("attention_mask" not in batches[0]) == running
    assert (rows < len(TEXTS)) == running
    moments = gather_moments(model, find_stacks(model), batches, progress=False)
    assert min(moments.tokens.values()) > 0


def test_generic_text_needs_no_data():
    batches = calibration_batches(tiny_llama(), "text", tiny_tokenizer())
    assert sum(batch["input_ids"].numel() for batch in batches) > 1000


def test_the_tokenizer_is_found_where_the_model_was_loaded_from(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match="needs a tokenizer, and none was found for 'this model'"):
        calibration_batches(model, TEXTS)
    model.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="tokenizer=tokenizer"):
        calibration_batches(model, TEXTS)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert ids(calibration_batches(model, TEXTS)) == ids(
        calibration_batches(model, TEXTS, tiny_tokenizer())
    )


def test_batches_and_tokenized_rows_are_left_as_they_are():
    model = tiny_llama()
    batch = {"input_ids": torch.tensor([[2, 3, 4]])}
    batches = [batch, batch]
    assert calibration_batches(model, batches) is batches
    assert calibration_batches(model, batch) == [batch]
    rows = Dataset.from_dict({"text": ["a", "b"], "input_ids": [[2, 3], [4]]})
    found = calibration_batches(model, DatasetDict(train=rows))
    moments = gather_moments(model, find_stacks(model), found, progress=False)
    assert set(moments.tokens.values()) == {3}


def test_more_tokens_of_text_are_read():
    """Windows of running text; one row for every 64 tokens where a row is a text."""
    tokenizer = tiny_tokenizer()
    texts = TEXTS * 40
    llama, bert = tiny_llama(), tiny_bert()
    length = calibration_batches(llama, texts, tokenizer)[0]["input_ids"].shape[1]

    def count(model, tokens):
        batches = calibration_batches(model, texts, tokenizer, tokens=tokens)
        return sum(len(batch["input_ids"]) for batch in batches)

    assert count(bert, None) == 256
    assert count(bert, 32_768) == 512
    assert count(bert, 1) == 1
    assert count(llama, 4 * length) == 4
    assert count(llama, 8 * length) == 8


@pytest.mark.parametrize("tokens", [0, -1, 1.5, "many"])
def test_a_number_of_tokens_that_cannot_be_read_is_refused(tokens):
    with pytest.raises(ValueError, match=f"calibration_tokens is {tokens!r}"):
        calibration_batches(tiny_llama(), TEXTS, tiny_tokenizer(), tokens=tokens)


def test_a_number_of_tokens_without_text_is_refused():
    model = tiny_llama()
    batch = {"input_ids": torch.tensor([[2, 3, 4]])}
    for calibration in (batch, [batch], Dataset.from_dict({"input_ids": [[2, 3]]})):
        with pytest.raises(ValueError, match="calibration_tokens is 64 and calibration holds batc"):
            qrefta.prepare(model, calibration=calibration, calibration_tokens=64, progress=False)
    with pytest.raises(ValueError, match="calibration_tokens is 64 and calibration is missing"):
        qrefta.prepare(model, calibration_tokens=64, progress=False)
    assert not is_prepared(model)


def test_prepare_reads_as_many_tokens_as_it_is_told():
    prepared = [
        qrefta.prepare(
            tiny_llama(),
            rank=0,
            calibration=TEXTS * 40,
            calibration_tokens=tokens,
            tokenizer=tiny_tokenizer(),
            progress=False,
        )
        for tokens in (None, 16_384, 64)
    ]
    default, same, few = [qrefta.quant_report(model) for model in prepared]
    assert default == same != few


def test_a_model_that_reads_more_than_text_is_refused_with_its_words():
    """It failed deep in its code, after the text was read."""
    config = BertConfig(vocab_size=VOCAB, **encoder_sizes(32))
    model = build(BertForMultipleChoice, config)
    with pytest.raises(ValueError, match=r"BertForMultipleChoice fails on a row of text \("):
        calibration_batches(model, ["red blue", "sky"], tiny_tokenizer())


def test_unusable_calibrations_are_refused(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match="no file"):
        calibration_batches(model, "nosuch.txt", tiny_tokenizer())
    with pytest.raises(ValueError, match="holds no text"):
        calibration_batches(model, ["", "  "], tiny_tokenizer())
    with pytest.raises(ValueError, match="strings and a int"):
        calibration_batches(model, ["red", 3], tiny_tokenizer())
    with pytest.raises(ValueError, match="reads pixel_values, not text"):
        calibration_batches(tiny_vit(), "text", tiny_tokenizer())
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"word{index}" for index in range(300)])
    with pytest.raises(ValueError, match=r"token \d+ and the model has \d+ embeddings"):
        calibration_batches(model, ["word299"], tokenizer)


def test_a_txt_file_is_one_document_for_causal_models_as_for_the_task_lm(tmp_path):
    """End-of-text stands once, at its end; other models read a text a line."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[UNK]"
    (tmp_path / "a.txt").write_text("red blue\nblue\n\nred\n" * 10)
    (batch,) = calibration_batches(tiny_llama(), tmp_path / "a.txt", tokenizer)
    calibrated = batch["input_ids"].flatten().tolist()
    recipe = text_windows(tiny_llama(), tokenizer, load_text(tmp_path / "a.txt", seed=0), 8)
    trained = [token for row in recipe.train for token in row["input_ids"]]
    assert calibrated[: len(trained)] == trained
    assert calibrated.count(tokenizer.eos_token_id) == 1
    rows = calibration_batches(tiny_bert(), tmp_path / "a.txt", tokenizer)
    assert sum(len(part["input_ids"]) for part in rows) == 30


@pytest.mark.parametrize("form", ["torch", "numpy", None, "tensor"])
def test_rows_of_a_tokenized_data_set_are_batches_of_one_row_in_every_form(form):
    rows = torch.randint(90, (4, 16), generator=torch.Generator().manual_seed(0))
    model = tiny_llama()
    stacks = find_stacks(model)
    expected = gather_moments(model, stacks, [rows], progress=False)
    data = rows
    if form != "tensor":
        data = Dataset.from_dict({"input_ids": rows.tolist(), "label": [1] * 4}).with_format(form)
    found = gather_moments(model, stacks, calibration_batches(model, data), progress=False)
    assert found.tokens == expected.tokens
    for path in stacks[0].modules:
        torch.testing.assert_close(found.of(path), expected.of(path))


def test_batches_of_a_tokenizer_without_return_tensors_calibrate():
    tokenizer = tiny_tokenizer()
    model = tiny_bert()
    stacks = find_stacks(model)
    texts = ["red blue red", "blue"]
    tensors, lists = (
        gather_moments(
            model,
            stacks,
            [dict(tokenizer(texts, padding=True, return_tensors=form), labels=[0, 1])],
            progress=False,
        )
        for form in ("pt", None)
    )
    assert lists.tokens == tensors.tokens
    for path in stacks[0].modules:
        assert torch.equal(lists.of(path), tensors.of(path))


def test_a_row_with_pairs_for_each_token_is_a_batch_of_one_row():
    model = tiny_bert()
    row = {"input_ids": [5, 7, 9], "offset_mapping": [[0, 2], [2, 4], [4, 6]]}
    assert batch_inputs(model, row)["input_ids"].shape == (1, 3)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": [[5, 7], [5]], "labels": [0, 1]}, "input_ids .list.*return_tensors="),
        ({"text": "red blue"}, "text .str.*list of strings"),
    ],
)
def test_a_batch_without_tensors_says_how_to_make_them(batch, message):
    """Rows of different lengths, and the rows of a streamed data set of text."""
    model = tiny_bert()
    with pytest.raises(ValueError, match=message):
        gather_moments(model, find_stacks(model), [batch], progress=False)


@pytest.mark.parametrize("pad", [None, 0])
@pytest.mark.parametrize("make", [llama_classifier, gpt2_classifier])
def test_a_decoder_that_classifies_without_a_pad_token_is_calibrated_on_text(make, pad):
    """Its class refuses batches of several rows; the moments are the ones of row after row."""
    model = make(pad)
    tokenizer = tiny_tokenizer()
    stacks = find_stacks(model)
    texts = ["red blue red", "blue", "red red"]
    found = gather_moments(
        model, stacks, calibration_batches(model, texts, tokenizer), progress=False
    )
    rows = [dict(tokenizer(text, return_tensors="pt")) for text in texts]
    expected = gather_moments(model, stacks, rows, progress=False)
    assert model.config.pad_token_id == pad
    assert found.tokens == expected.tokens
    for path in stacks[0].modules:
        torch.testing.assert_close(found.of(path), expected.of(path))


def test_a_model_of_text_and_images_asks_for_batches():
    with pytest.raises(ValueError, match=r"CLIPModel.*give calibration as batches"):
        calibration_batches(tiny_clip(), ["red"], tiny_tokenizer())


def test_a_text_without_a_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(ValueError, match="makes no token of the calibration text"):
        calibration_batches(tiny_llama(), ["\u200b"], tokenizer)
