"""LoRETTA: trains compared with explicit sums, the start, trainable parameters."""

import pytest
import torch
from torch import nn

from eval.peers.loretta import BOTTLENECK, LoRETTALinear, loretta, matrix, modes, train
from tests.models import ARCHITECTURES, inputs, logits


@pytest.mark.parametrize(
    ("features", "sizes"), [(384, (6, 8, 8)), (1536, (8, 12, 16)), (100, (4, 5, 5)), (7, (1, 1, 7))]
)
def test_modes_are_divisors_as_even_as_can_be(features, sizes):
    assert modes(features) == sizes


def test_a_train_is_a_product_of_its_cores_slices():
    torch.manual_seed(0)
    cores = train((2, 3, 4), 5)
    dense = matrix(cores).view(2, 3, 4)
    for i, j, k in ((0, 0, 0), (1, 2, 3), (1, 0, 2)):
        expected = cores[0][:, i] @ cores[1][:, j] @ cores[2][:, k]
        torch.testing.assert_close(dense[i, j, k], expected[0, 0])


def test_the_layer_adds_its_update():
    torch.manual_seed(0)
    linear = nn.Linear(12, 18)
    layer = LoRETTALinear(linear, 3)
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=0)
    nn.init.normal_(layer.up[-1])
    update = matrix(layer.up).view(18, BOTTLENECK) @ matrix(layer.down).view(BOTTLENECK, 12)
    torch.testing.assert_close(layer(x), x @ (linear.weight + update).T + linear.bias)
    torch.testing.assert_close(matrix(layer.down).norm(), torch.tensor(BOTTLENECK**0.5))


def test_the_start_is_the_model_and_only_cores_and_head_train():
    torch.manual_seed(0)
    model = loretta(ARCHITECTURES["bert"](), 2)
    torch.testing.assert_close(logits(model), logits(ARCHITECTURES["bert"]()))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(
        ".down." in name or ".up." in name or name.startswith("classifier") for name in names
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = inputs(model) | {"labels": torch.tensor([0, 1])}
    losses = []
    for _ in range(10):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_other_layers_are_refused():
    with pytest.raises(ValueError, match="Conv1D; LoRETTA is implemented for"):
        loretta(ARCHITECTURES["gpt2"](), 2)
