"""Models whose class is code in their folder: it runs if the user trusts it, and nothing asks."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
)

import qrefta
from qrefta.chat import conversation
from qrefta.cli import app
from qrefta.model.whole_folder import verify
from tests.tiny import tiny_tokenizer

CONFIG = """
from transformers import PreTrainedConfig


class ToyConfig(PreTrainedConfig):
    model_type = "toy_with_code"

    def __init__(self, vocab_size=96, hidden_size=32, num_hidden_layers=3, **rest):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**rest)
"""
MODEL = """
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_toy import ToyConfig


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "transformer"

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, input_ids):
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x)
        return x


class ToyForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = ToyConfig
    base_model_prefix = "transformer"

    def __init__(self, config):
        super().__init__(config)
        self.transformer = ToyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, labels=None, **rest):
        logits = self.lm_head(self.transformer(input_ids))
        loss = None if labels is None else self.loss_function(logits, labels, logits.shape[-1])
        return CausalLMOutput(loss=loss, logits=logits)
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast


class ToyTokenizer(PreTrainedTokenizerFast):
    pass
"""
IDS = {"input_ids": torch.arange(3, 19).view(2, 8)}
FILES = {"configuration_toy.py", "modeling_toy.py"}
REFUSED = r"needs code that comes with it .*modeling_toy\.ToyForCausalLM.* trust_remote_code=True"


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch, tmp_path):
    """A question on the terminal fails the test."""

    def ask(question=""):
        raise AssertionError(f"asked: {question}")

    monkeypatch.setattr("builtins.input", ask)


@pytest.fixture
def folder(tmp_path):
    """A dense checkpoint with code and a tokenizer."""
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "configuration_toy.py").write_text(CONFIG)
    (dense / "modeling_toy.py").write_text(MODEL)
    auto_map = {
        "AutoConfig": "configuration_toy.ToyConfig",
        "AutoModelForCausalLM": "modeling_toy.ToyForCausalLM",
    }
    settings = {"model_type": "toy_with_code", "architectures": ["ToyForCausalLM"]}
    settings |= {"auto_map": auto_map, "vocab_size": len(tiny_tokenizer())}
    (dense / "config.json").write_text(json.dumps(settings))
    config = AutoConfig.from_pretrained(dense, trust_remote_code=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        model.save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    return dense


def trusted(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(**IDS).logits


@pytest.fixture
def model(folder):
    return qrefta.prepare(trusted(folder), rank=4, method="refta", progress=False)


def python_files(folder):
    return {path.name for path in Path(folder).glob("*.py")}


def test_a_prepared_folder_keeps_its_code(folder, model, tmp_path):
    """Saved, or made out of core; read by load and from_pretrained."""
    model.save_pretrained(tmp_path / "4bit")
    settings = {"rank": 4, "method": "refta", "progress": False}
    qrefta.prepare_checkpoint(folder, tmp_path / "made", trust_remote_code=True, **settings)
    for made in (tmp_path / "4bit", tmp_path / "made"):
        assert python_files(made) == FILES
        assert verify(made, trust_remote_code=True)
        loaded = qrefta.load(made, trust_remote_code=True)
        assert torch.equal(logits(loaded), logits(model))
        assert torch.equal(logits(trusted(made)), logits(model))
        loaded.save_pretrained(tmp_path / f"{made.name}-again")
        assert python_files(tmp_path / f"{made.name}-again") == FILES
    settings = qrefta.QReftaConfig(rank=4, method="refta")
    assert torch.equal(logits(trusted(folder, quantization_config=settings)), logits(model))


def test_a_merged_folder_keeps_its_code(model, tmp_path):
    written = qrefta.merge(model, torch.float32, out=tmp_path / "out")
    assert python_files(written.folder) == FILES
    assert_close(logits(trusted(written.folder)), logits(model), rtol=1e-5, atol=1e-5)
    expected = logits(model)
    qrefta.merge(model, torch.float32).save_pretrained(tmp_path / "saved")
    assert python_files(tmp_path / "saved") == FILES
    assert_close(logits(trusted(tmp_path / "saved")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["residual", "original"])
def test_a_lora_needs_no_further_consent(folder, model, tmp_path, base):
    pytest.importorskip("peft")
    model.save_pretrained(tmp_path / "start")
    start = tmp_path / "start" if base == "original" else None
    out = tmp_path / "lora"
    written = qrefta.export_lora(model, out, base, start=start, dtype=torch.float32)
    assert written.difference < (1e-5 if base == "residual" else 0.5)
    if base == "residual":
        assert python_files(out / "base") == FILES


def test_evaluation_and_chat_take_the_consent(model, tmp_path):
    out = tmp_path / "4bit"
    model.save_pretrained(out)
    tiny_tokenizer().save_pretrained(out)
    (tmp_path / "text.txt").write_text("the red fox " * 50)
    text = tmp_path / "text.txt"
    (row,) = qrefta.compare(out, None, text, window=16, trust_remote_code=True, progress=False)
    assert row.perplexity > 1
    told = conversation(str(out), "cpu", trust_remote_code=True, max_new_tokens=3)
    assert "".join(told.answer("the red")) is not None
    with pytest.raises(ValueError, match=REFUSED):
        qrefta.compare(out, None, text)
    with pytest.raises(ValueError, match=REFUSED):
        conversation(str(out))
    (out / "tokenization_toy.py").write_text(TOKENIZER)
    file = out / "tokenizer_config.json"
    code = {
        "auto_map": {"AutoTokenizer": [None, "tokenization_toy.ToyTokenizer"]},
        "tokenizer_class": "ToyTokenizer",
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | code))
    (same,) = qrefta.compare(out, None, text, window=16, trust_remote_code=True, progress=False)
    assert same == row


def test_a_class_from_before_generation_was_a_mixin_chats(folder):
    """transformers 4.49 and earlier gave every model with this method `generate`."""
    code = MODEL.replace("PreTrainedModel, GenerationMixin)", "PreTrainedModel)")
    code += """
    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        return {"input_ids": input_ids}
"""
    (folder / "modeling_toy.py").write_text(code)
    told = conversation(str(folder), "cpu", trust_remote_code=True, max_new_tokens=3)
    assert "".join(told.answer("the red"))


def test_a_run_trains_resumes_and_saves_the_code(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the red fox sees a blue bird.\n" * 200)
    options = {"task": "lm", "max_length": 16, "batch_size": 4, "progress": False}
    args = (tiny_tokenizer(), text, tmp_path / "run")
    qrefta.finetune(model, *args, **options, max_steps=2)
    assert python_files(tmp_path / "run") == FILES
    loaded = qrefta.load(tmp_path / "run", trust_remote_code=True)
    assert_close(logits(loaded), logits(model))
    result = qrefta.finetune(loaded, *args, **options, max_steps=3, resume=True)
    assert result.steps == 3


def test_what_is_not_trusted_is_refused_by_name(folder, model, tmp_path):
    model.save_pretrained(tmp_path / "4bit")
    calls = [
        lambda: qrefta.load(tmp_path / "4bit"),
        lambda: verify(tmp_path / "4bit"),
        lambda: qrefta.prepare_checkpoint(folder, tmp_path / "made", progress=False),
        lambda: qrefta.plan(folder, seq=8),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=REFUSED):
            call()
    assert not (tmp_path / "made").exists()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert qrefta.plan(config, seq=8, rank=4).total_bytes > 0
    assert qrefta.plan(folder, seq=8, rank=4, trust_remote_code=True).total_bytes > 0


def test_a_family_that_gguf_does_not_have_is_named(model, tmp_path):
    pytest.importorskip("gguf")
    model.save_pretrained(tmp_path / "4bit")
    for source in (tmp_path / "4bit", model):
        with pytest.raises(ValueError, match="A ToyForCausalLM cannot be written as a GGUF file"):
            qrefta.export_gguf(source, tmp_path / "file.gguf")


@pytest.fixture
def own_class(folder, monkeypatch):
    """The model's class in a user's module, and a folder that names no code."""
    settings = json.loads((folder / "config.json").read_text())
    del settings["auto_map"]
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own_model.py").write_text(MODEL.replace("from .", "from "))
    monkeypatch.syspath_prepend(folder)
    for name in ("own_model", "configuration_toy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("own_model").ToyForCausalLM


def test_a_class_of_the_users_script_is_prepared_saved_and_merged(folder, own_class, tmp_path):
    model = qrefta.prepare(own_class.from_pretrained(folder), rank=4, method="refta")
    model.save_pretrained(tmp_path / "4bit")
    settings = qrefta.QReftaConfig(rank=4, method="refta")
    loading = own_class.from_pretrained(folder, quantization_config=settings)
    for loaded in (own_class.from_pretrained(tmp_path / "4bit"), loading):
        assert torch.equal(logits(loaded), logits(model))
    assert qrefta.merge(model, torch.float32, out=tmp_path / "merged").difference < 1e-5
    with pytest.raises(ValueError, match=r"no model class 'ToyForCausalLM'.* or register"):
        qrefta.load(tmp_path / "4bit")


def test_a_registered_class_is_found_by_its_name(folder, own_class, tmp_path, monkeypatch):
    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})
    monkeypatch.setattr(MODEL_FOR_CAUSAL_LM_MAPPING, "_extra_content", {})
    AutoConfig.register("toy_with_code", own_class.config_class)
    AutoModelForCausalLM.register(own_class.config_class, own_class)
    qrefta.prepare_checkpoint(folder, tmp_path / "4bit", rank=4, progress=False)
    assert type(qrefta.load(tmp_path / "4bit")) is own_class
    assert verify(tmp_path / "4bit")
    assert qrefta.plan(folder, seq=8, rank=4).total_bytes > 0


def test_the_command_line_has_the_option(folder, tmp_path):
    steps = [
        ["prepare", str(folder), str(tmp_path / "4bit"), "--rank", "4", "--calibration", "text"],
        ["verify", str(tmp_path / "4bit")],
        ["merge", str(tmp_path / "4bit"), str(tmp_path / "merged")],
        ["plan", str(folder), "--seq", "8"],
    ]
    for step in steps:
        with pytest.raises(ValueError, match=REFUSED):
            app(step, standalone_mode=False)
        app([*step, "--trust-remote-code"], standalone_mode=False)
    assert python_files(tmp_path / "merged") == FILES
