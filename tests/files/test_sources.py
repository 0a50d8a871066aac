"""A model that transformers dequantized from a GGUF file is dense for prepare and finetune."""

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import qrefta
from qrefta.files.sources import dense_bytes, loaded_from, pretrained_source
from qrefta.model.prepared import prepared_config
from tests.language import SENTENCES, language_model
from tests.models import logits
from tests.test_cli import invoke

SETTINGS = {"rank": 2, "progress": False}


def dense(file):
    return AutoModelForCausalLM.from_pretrained(file.path.parent, gguf_file=file.path.name)


def test_prepare_takes_a_model_that_was_read_from_a_gguf_file(gguf_file, tmp_path):
    """transformers 5.24 marks it as quantized, and refuses to save it."""
    model = dense(gguf_file)
    same = dense(gguf_file)
    plain = type(same)(type(same.config).from_dict(gguf_file.model.config.to_dict()))
    plain.load_state_dict(same.state_dict())
    prepared = qrefta.prepare(model, **SETTINGS)
    assert_close(logits(prepared), logits(qrefta.prepare(plain, **SETTINGS)))
    prepared.save_pretrained(tmp_path)
    assert_close(logits(qrefta.load(tmp_path)), logits(prepared))


def test_its_tokenizer_is_found_for_calibration_and_for_exports(gguf_file, tmp_path):
    model = dense(gguf_file)
    assert loaded_from(model) == str(gguf_file.path)
    prepared = qrefta.prepare(model, calibration=SENTENCES, **SETTINGS)
    assert prepared_config(prepared).calibrated
    assert prepared_config(prepared).base_model == str(gguf_file.path)
    (gguf_file.path.parent / "stranger.json").touch()  # files next to it are not the model's
    qrefta.merge(prepared, out=tmp_path / "merged")
    assert not (tmp_path / "merged" / "stranger.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for text in SENTENCES:
        assert tokenizer(text)["input_ids"] == gguf_file.tokenizer(text)["input_ids"]


def test_weights_that_stay_packed_are_refused(gguf_file):
    model = dense(gguf_file)
    packed = torch.zeros(4, dtype=torch.uint8)
    model.model.norm.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"already quantized .*GgufConfig\(dequantize=True\)"):
        qrefta.prepare(model, **SETTINGS)


def test_the_command_line_prepares_a_gguf_file(gguf_file, tmp_path):
    out = tmp_path / "4bit"
    words = ["--rank", 2, "--calibration", "none", "--rounding", "nearest"]
    shown = invoke("prepare", gguf_file.path, out, *words).output
    assert f"{dense_bytes(gguf_file.path) / 1e6:.1f} MB ->" in shown
    expected = qrefta.prepare(dense(gguf_file), rounding="nearest", **SETTINGS)
    assert_close(logits(qrefta.load(out)), logits(expected))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == gguf_file.tokenizer.chat_template
    assert {path.suffix for path in out.iterdir()} >= {".safetensors", ".json", ".md"}


@pytest.mark.slow
def test_it_calibrates_a_gguf_file_by_default(gguf_file, tmp_path):
    assert "Calibrated on" in invoke("prepare", gguf_file.path, tmp_path / "out").output


def test_a_gguf_file_larger_than_the_memory_is_refused(gguf_file, tmp_path):
    assert dense_bytes(gguf_file.path) == 4 * sum(
        parameter.numel() for parameter in gguf_file.model.parameters()
    )
    with pytest.raises(ValueError, match=r"max_memory is 100kB, and .*tiny\.gguf takes"):
        invoke("prepare", gguf_file.path, tmp_path / "out", "--max-memory", "100kB")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_trains_a_gguf_file(gguf_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 20))
    words = ["--task", "lm", "--rank", 2, "--max-steps", 2, "--max-length", 16]
    invoke("finetune", gguf_file.path, text, tmp_path / "out", *words)
    trained = qrefta.load(tmp_path / "out")
    assert prepared_config(trained).base_model == str(gguf_file.path)
    assert (logits(trained) - logits(gguf_file.model)).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_other_sources_are_passed_on():
    named = {"pretrained_model_name_or_path": "org/name", "trust_remote_code": False}
    assert pretrained_source("org/name") == named
    model, _ = language_model("llama")
    assert loaded_from(model) == ""


def test_settings_of_a_gguf_file_are_checked_once(gguf_file, tmp_path):
    """A warning about a setting without effect comes once."""
    with pytest.warns(UserWarning, match="no effect") as found:
        qrefta.prepare_checkpoint(
            gguf_file.path, tmp_path / "out", rank=2, transform="dct", progress=False
        )
    assert len([one for one in found if "no effect" in str(one.message)]) == 1
