"""Every tensor of a checkpoint comes back, also under the other names that a class saves."""

import copy
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file

import qrefta
from qrefta.nn.packed import plain_bytes
from qrefta.train.arguments import training_arguments
from qrefta.train.restoring import restore
from tests.models import (
    language_tokenizer,
    prepared,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_swin,
    tiny_vit,
)


def gated():
    return prepared(tiny_mixtral, rank=4, modules_to_save=("gate",))


@pytest.mark.parametrize(
    "make",
    [tiny_vit, tiny_swin, tiny_mixtral, tiny_llama, tiny_gpt2, gated],
    ids=lambda make: make.__name__,
)
def test_a_saved_model_is_restored_whole(make, tmp_path):
    """Swin has buffers, Mixtral makes one tensor of the matrices of all experts, GPT-2 has tied
    tensors.
    """
    model = make()
    model.save_pretrained(tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            plain_bytes(tensor).zero_()
    # as the Trainer does
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    restore(other, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_a_tensor_without_values_is_named(tmp_path):
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    lost = next(name for name in stored if "query.weight" in name)
    save_file({name: stored[name] for name in stored if name != lost}, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"no values for vit\.layers\.0\.attention\.q_proj\.weight"
    ):
        restore(model, tmp_path)


def texts(count, step):
    rows = [" ".join(f"w{(i * step + j * j) % 60 + 3}" for j in range(40)) for i in range(count)]
    return Dataset.from_dict({"text": rows})


@pytest.mark.slow
def test_the_best_model_has_the_best_gates(tmp_path):
    """Their names in a checkpoint are `block_sparse_moe.gate`."""
    model = copy.deepcopy(gated())
    args = training_arguments(
        "lm",
        tmp_path,
        max_steps=40,
        per_device_train_batch_size=2,
        learning_rate=1.0,
        save_total_limit=None,
        warmup_steps=0,
    )
    data = DatasetDict(train=texts(40, 7), test=texts(10, 11))
    with pytest.warns(UserWarning, match="learning rate"):
        qrefta.finetune(
            model,
            language_tokenizer(),
            data,
            task="lm",
            args=args,
            max_length=16,
            eval_steps=2,
            early_stopping=2,
            progress=False,
        )
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    best = json.loads((last / "trainer_state.json").read_text())["best_model_checkpoint"]
    assert Path(best) != last
    gates = [
        load_file(Path(folder) / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"]
        for folder in (best, last)
    ]
    found = model.get_parameter("model.layers.0.mlp.gate.weight")
    assert torch.equal(found, gates[0])
    assert not torch.equal(gates[0], gates[1])
