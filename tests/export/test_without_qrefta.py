"""Saved and exported folders in a process that does not import qrefta.

One process for all of them, as its imports take seconds.
"""

import os
import subprocess
import sys

import pytest
import torch

import qrefta
from qrefta.export.compare import outputs
from qrefta.export.examples import example_inputs
from tests.export.test_lora import trained
from tests.export.test_merge import prepared, take_steps
from tests.models import ARCHITECTURES, inputs, logits, tiny_bert, tiny_llama

pytestmark = pytest.mark.slow

PLAIN = """
import sys
from pathlib import Path
import peft, torch, transformers

def save_logits(model, folder):
    with torch.no_grad():
        batch = torch.load(folder / "batch.pt")
        torch.save(model.eval()(**batch).logits.float(), folder / "logits.pt")

root = Path(sys.argv[1])
for folder in sorted((root / "merged").iterdir()):
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    problems = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert not any(info[key] for key in problems), info
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save_logits(model, folder)
base = transformers.LlamaForCausalLM.from_pretrained(root / "lora" / "base", dtype=torch.bfloat16)
save_logits(peft.PeftModel.from_pretrained(base, root / "lora"), root / "lora")
try:
    transformers.AutoModelForSequenceClassification.from_pretrained(root / "prepared")
except Exception as error:
    print("REFUSED", type(error).__name__, error)
else:
    print("LOADED")
assert not any(name.startswith("qrefta") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder, the expected logits of each part of it, and the output of the process."""
    root = tmp_path_factory.mktemp("without")
    expected = {}
    for architecture in ARCHITECTURES:
        folder = root / "merged" / architecture
        merged = qrefta.merge(take_steps(prepared(architecture)))
        merged.save_pretrained(folder)
        torch.save(inputs(merged), folder / "batch.pt")
        expected[architecture] = logits(merged)
    model = trained(root / "original", tiny_llama, hidden=64)
    expected["difference"] = qrefta.export_lora(model, root / "lora", "residual-4bit").difference
    torch.save(example_inputs(model), root / "lora" / "batch.pt")
    expected["lora"] = outputs(model, example_inputs(model))
    qrefta.prepare(tiny_bert(), rank=5).save_pretrained(root / "prepared")
    command = [sys.executable, "-c", PLAIN, str(root)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, check=True, env=environment, cwd=root, stdout=subprocess.PIPE, text=True
    )
    return root, expected, done.stdout


def test_merged_models_load(found):
    """Trained ones: the same logits, bit for bit."""
    root, expected, _ = found
    for architecture in ARCHITECTURES:
        folder = root / "merged" / architecture
        assert "qrefta" not in (folder / "config.json").read_text()
        assert torch.equal(torch.load(folder / "logits.pt"), expected[architecture].float())


def test_a_4_bit_base_and_lora_load(found):
    """transformers, bitsandbytes and PEFT alone give the difference that the export reports."""
    root, expected, _ = found
    distance = (torch.load(root / "lora" / "logits.pt") - expected["lora"]).norm() / expected[
        "lora"
    ].norm()
    assert distance == pytest.approx(expected["difference"], rel=1e-3)


def test_loading_a_prepared_model_fails_loudly(found):
    """A size error of the packed weights, and not a model with random ones."""
    _, _, said = found
    assert "REFUSED RuntimeError" in said
    assert "mismatched_sizes" in said
    assert "LOADED" not in said
