"""The comparison that every export passes: made inputs, outputs, and their distance."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from qrefta.export.compare import output_difference, outputs
from qrefta.export.examples import example_inputs
from tests.models import (
    ARCHITECTURES,
    logits,
    tiny_bert,
    tiny_segformer,
    tiny_t5,
    tiny_whisper,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inputs_are_made_for_every_architecture_and_are_always_the_same(architecture):
    model = ARCHITECTURES[architecture]()
    batch = example_inputs(model)
    assert all(torch.equal(tensor, example_inputs(model)[name]) for name, tensor in batch.items())
    found = outputs(model, batch)
    assert len(found) == 2
    assert torch.isfinite(found).all()
    assert not torch.allclose(found[0], found[1])  # two different rows


def test_special_tokens_are_left_out():
    """Some classifiers look for the end-of-sequence token, and padding is masked by others."""
    model = tiny_bert()
    model.config.pad_token_id = 3
    model.config.eos_token_id = [5, 7]
    tokens = example_inputs(model)["input_ids"]
    assert not set(tokens.flatten().tolist()) & {3, 5, 7}
    assert tokens.max() < model.config.vocab_size


def test_inputs_that_a_config_does_not_tell_are_asked_for():
    model = tiny_bert()
    model.main_input_name = "graph"
    with pytest.raises(ValueError, match=r"takes \(graph\); give a batch of it as `inputs`"):
        example_inputs(model)
    model.main_input_name = "inputs"  # Perceiver's, whose encoder is no model
    model.get_encoder = torch.nn.Identity
    with pytest.raises(ValueError, match=r"takes \(inputs\); give a batch of it as `inputs`"):
        example_inputs(model)


def test_the_image_size_is_the_configs():
    assert example_inputs(ARCHITECTURES["vit"]())["pixel_values"].shape == (2, 3, 16, 16)
    model = tiny_segformer()
    assert example_inputs(model)["pixel_values"].shape[1] == 3


def test_sound_is_as_long_as_the_encoder_takes_it():
    model = tiny_whisper()
    batch = example_inputs(model)
    assert batch["input_features"].shape[2] == 2 * model.config.max_source_positions
    assert torch.isfinite(outputs(model, batch)).all()


def test_outputs_keep_the_mode_and_take_half_models():
    model = tiny_bert().train()
    found = outputs(model, example_inputs(model))
    assert model.training
    assert torch.equal(found, outputs(model.eval(), example_inputs(model)))
    assert not model.training
    vit = ARCHITECTURES["vit"]().bfloat16()
    assert outputs(vit, example_inputs(vit)).dtype == torch.bfloat16


def test_outputs_keep_the_mode_of_each_module():
    """A frozen part may be in eval mode while the rest trains."""
    model = tiny_bert().train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    outputs(model, example_inputs(model))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("return_dict", [True, False])
def test_labels_in_the_inputs_do_not_make_the_loss_the_output(return_dict):
    """Two models with the same loss may have different logits."""
    model = tiny_bert()
    model.config.return_dict = return_dict
    batch = example_inputs(model)
    found = outputs(model, batch | {"labels": torch.tensor([0, 2])})
    assert torch.equal(found, outputs(model, batch))
    assert found.shape == (2, 3)


def test_a_decoders_inputs_may_come_from_labels():
    model = tiny_t5()
    batch = example_inputs(model)
    batch["labels"] = batch.pop("decoder_input_ids")
    assert outputs(model, batch).shape == (2, 16, model.config.vocab_size)


def test_a_model_that_gives_only_a_loss_is_refused():
    class OnlyLoss(BertForSequenceClassification):
        def forward(self, **batch):
            return {"loss": super().forward(**batch).loss}

    model = OnlyLoss(tiny_bert().config)
    batch = example_inputs(model) | {"labels": torch.tensor([0, 2])}
    with pytest.raises(ValueError, match=r"only a loss for inputs with input_ids, labels;.*Leave"):
        outputs(model, batch)


def test_the_difference_is_relative_and_infinite_for_nan():
    expected = torch.tensor([[3.0, 4.0]])
    assert output_difference(expected, expected) == 0
    assert output_difference(torch.tensor([[3.0, 4.5]]), expected) == pytest.approx(0.1)
    assert output_difference(torch.tensor([[3.0, float("nan")]]), expected) == float("inf")
    assert logits(tiny_bert()).shape == (2, 3)


def test_text_is_taken_where_the_model_came_with_a_tokenizer(tmp_path):
    """Text, if the tokenizer fits the vocabulary; else random tokens."""
    words = {
        word: index
        for index, word in enumerate(["[UNK]", "the", "old", "its", "film", "river", "and"])
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tiny_bert().save_pretrained(tmp_path)
    model = type(tiny_bert()).from_pretrained(tmp_path)
    random = example_inputs(model)["input_ids"]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    text = example_inputs(model)["input_ids"]
    assert random.max() > 7 > text.max()
    assert text.shape == (2, 16)
    tokenizer.add_tokens([f"w{index}" for index in range(200)] + ["mill"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    assert torch.equal(example_inputs(model)["input_ids"], random)
