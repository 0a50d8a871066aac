"""Batches that are made for models of several inputs, of sound, and of random numbers."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForQuestionAnswering,
    GPT2Config,
    ViltConfig,
    ViltForQuestionAnswering,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    VitsConfig,
    VitsModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

import qrefta
from qrefta.export.compare import output_difference, reference
from tests.models import VOCAB, build, tiny_bert, tiny_gpt2
from tests.test_cli import invoke

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
IMAGES = {"image_size": 16, "patch_size": 8, **SIZES}
TEXT = {"vocab_size": VOCAB, "max_position_embeddings": 40, **SIZES}


def image_to_text():
    decoder = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, add_cross_attention=True, is_decoder=True
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**IMAGES), decoder)
    return build(VisionEncoderDecoderModel, config)


def blip(kind):
    text = TEXT | {"encoder_hidden_size": 32, "bos_token_id": 1, "sep_token_id": 2}
    return build(kind, BlipConfig(text_config=text, vision_config=IMAGES))


def speech():
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(
        vocab_size=20, num_feat_extract_layers=2, **convolutions, **positions, **SIZES
    )
    return build(Wav2Vec2ForCTC, config)


def masked_patches():
    decoder = {"decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
    sizes = {"decoder_hidden_size": 16, "decoder_intermediate_size": 32, **decoder}
    config = ViTMAEConfig(**IMAGES | {"patch_size": 4}, **sizes)
    return build(ViTMAEForPreTraining, config)


def text_to_speech():
    sizes = {"ffn_dim": 64, "flow_size": 16, "spectrogram_bins": 9, "upsample_initial_channel": 16}
    return build(VitsModel, VitsConfig(vocab_size=VOCAB, **SIZES, **sizes))


MADE = {
    "images to text": image_to_text,
    "captions": lambda: blip(BlipForConditionalGeneration),
    "questions about images": lambda: blip(BlipForQuestionAnswering),
    "text and images": lambda: build(
        ViltForQuestionAnswering, ViltConfig(num_labels=3, **TEXT | IMAGES)
    ),
    "multiple choice": lambda: build(BertForMultipleChoice, BertConfig(**TEXT)),
    "waves": speech,
    "random masks": masked_patches,
    "random durations": text_to_speech,
}


@pytest.mark.parametrize("name", MADE)
def test_a_written_model_is_compared_without_a_given_batch(name, tmp_path):
    """It failed in the model's code, or two right models drew other random numbers."""
    model = qrefta.prepare(MADE[name](), rank=3, refine=0, progress=False)
    written = qrefta.merge(model, torch.float32, out=tmp_path / "dense")
    assert written.difference < 1e-5


def test_random_numbers_of_the_caller_go_on():
    model = masked_patches()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    reference(model, None)
    assert torch.equal(torch.rand(3), expected)


def test_a_model_that_runs_on_no_example_asks_for_a_batch(tmp_path):
    class Picky(type(tiny_bert())):
        """Takes rows of twenty tokens."""

        def forward(self, input_ids, **options):
            assert input_ids.shape[1] == 20, "twenty tokens, please"
            return super().forward(input_ids, **options)

    model = qrefta.prepare(Picky(tiny_bert().config), rank=3, refine=0, progress=False)
    with pytest.raises(ValueError, match=r"(?s)twenty tokens, please.*Give a batch .* `inputs`"):
        qrefta.merge(model, out=tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    batch = {"input_ids": torch.arange(40).view(2, 20)}
    assert qrefta.merge(model, out=tmp_path / "dense", inputs=batch).difference < 0.1


def test_outputs_of_other_shapes_differ():
    assert output_difference(torch.zeros(2, 3), torch.zeros(2, 4)) == float("inf")


def test_the_command_line_takes_a_batch_from_a_file(tmp_path):
    qrefta.prepare(tiny_gpt2(), rank=3, refine=0, progress=False).save_pretrained(tmp_path / "4bit")
    save_file({"input_ids": torch.arange(40).view(2, 20)}, tmp_path / "batch.safetensors")
    file = tmp_path / "batch.safetensors"
    result = invoke("merge", tmp_path / "4bit", tmp_path / "out", "--inputs", file)
    assert re.search(r"differ from the model's by 0\.0", result.output)
    (tmp_path / "batch.json").write_text(json.dumps({"input_ids": [[1, 2]]}))
    for name, message in (("no.safetensors", "There is no file"), ("batch.json", "is no safetens")):
        with pytest.raises(ValueError, match=message):
            invoke("merge", tmp_path / "4bit", tmp_path / "no", "--inputs", tmp_path / name)
