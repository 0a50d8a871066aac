"""Weights that a model's own code reads or shares stay dense, whatever the code looks like."""

import copy
from functools import partial

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.testing import assert_close
from transformers import PreTrainedConfig, PreTrainedModel

import qrefta
from qrefta.model.reads import read_weights
from qrefta.model.stacks import find_stacks
from tests.models import logits
from tests.peculiar import tiny_rwkv

WIDTH = 16


class Block(nn.Module):
    """A linear layer that nothing reads, and two that the block runs."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return x + self.mlp(self.up(self.plain(x)))


class Body(PreTrainedModel):
    config_class = PreTrainedConfig
    main_input_name = "x"

    def __init__(self, config, block=Block):
        super().__init__(config)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.post_init()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return (x,)


class ReadsItself(Block):
    def forward(self, x):
        return self.mlp(self.plain(linear(x, self.up.weight)))


class ReadsByName(Block):
    def forward(self, x):
        return linear(x, getattr(self, "up").weight)  # noqa: B009


class ReadsAnAlias(Block):
    def forward(self, x):
        layer = self.up
        weight = getattr(layer, "weight")  # noqa: B009
        return self.plain(x) @ weight.T


class ReadsInAProperty(Block):
    @property
    def matrix(self):
        return self.up.weight.T

    def forward(self, x):
        return x @ self.matrix


class ReadsAPlace(Block):
    def forward(self, x):
        return linear(x, self.mlp[0].weight)


class ReadsInALoop(Block):
    def forward(self, x):
        for called, scale in zip([self.plain], [2.0], strict=True):
            x = called(x) * scale
        for place, layer in enumerate(self.mlp):
            x = linear(x, layer.weight) if place != 1 else layer(x)
        return x


def product(x, layer):
    return x @ layer.weight.T


class PassesToAFunction(Block):
    def forward(self, x):
        return product(x, layer=self.up)


class ReadsBesideText(Block):
    """The text's second line begins in the first column."""

    def forward(self, x):
        text = """of
several lines"""
        return x @ self.up.weight.T, text


class PassesToAMethod(Block):
    def forward(self, x):
        return self.multiplied(self.up, x)

    def multiplied(self, layer, x):
        return x @ layer.weight.T


class ReadsFirstParameter(Block):
    def forward(self, x):
        return linear(x, next(self.up.parameters()))


class TakesItsOwnDtype(Block):
    """The first parameter of the block is the weight of `plain`."""

    def forward(self, x):
        return super().forward(x.to(next(self.parameters()).dtype))


class TakesTheDtypeOfAnMlp(Block):
    """As Swin V2's attention does, to make a table of coordinates."""

    def forward(self, x):
        return super().forward(x.to(next(self.mlp.parameters()).dtype))


class TakesItsOwnDevice(Block):
    def forward(self, x):
        return super().forward(x.to(next(self.parameters()).device))


class AsksForTheType(Block):
    def forward(self, x):
        if isinstance(self.up, nn.Linear):
            x = self.up(x)
        for layer in self.mlp:
            x = layer(x) if type(layer) is nn.Linear else x.relu()
        return self.plain(x)


class ReadsParameterByPath(Block):
    def forward(self, x):
        return linear(x, self.get_parameter("mlp.0.weight"))


class PassesToAStaticMethod(Block):
    @staticmethod
    def multiplied(layer, x):
        return linear(x, layer.weight)

    def forward(self, x):
        return self.multiplied(self.up, x)


class PassesToAnInnerFunction(Block):
    def forward(self, x):
        def multiplied(x, layer):
            return linear(x, layer.weight)

        added = lambda layer, x: x + linear(x, layer.weight)  # noqa: E731
        return multiplied(x, self.up) + added(self.mlp[2], x)


class ReadsTheDeviceOfParameters(Block):
    def forward(self, x):
        return super().forward(x.to(next(self.up.parameters()).device))


class Rescales(Body):
    """RWKV's way: the model changes its blocks' weights when it is switched to evaluation."""

    def train(self, mode=True):
        for number, block in enumerate(self.blocks):
            block.up.weight.data.mul_(2.0 if mode else 0.5 ** (number + 1))
        return super().train(mode)


def rescale(block):
    block.up.weight.data.mul_(2.0)


class RescalesByAFunction(Body):
    def eval(self):
        for block in self.blocks:
            rescale(block)
        return super().eval()


class ReadsTheDevice(Block):
    def forward(self, x):
        return super().forward(x.to(self.up.weight.device))


class DrawsAtRandom(Body):
    def _init_weights(self, module):
        for block in self.blocks:
            nn.init.normal_(block.up.weight)


def roles(model):
    return {stack.name.removeprefix("blocks.*.") for stack in find_stacks(model)}


ALL = {"plain", "up", "mlp.0", "mlp.2"}
BLOCKS = {
    ReadsItself: {"up"},
    ReadsByName: {"up"},
    ReadsAnAlias: {"up"},
    ReadsInAProperty: {"up"},
    ReadsAPlace: {"mlp.0"},
    ReadsInALoop: {"mlp.0", "mlp.2"},
    PassesToAFunction: {"up"},
    ReadsBesideText: {"up"},
    PassesToAMethod: {"up"},
    ReadsTheDevice: set(),
    ReadsFirstParameter: {"up"},
    ReadsParameterByPath: {"mlp.0"},
    PassesToAStaticMethod: {"up"},
    PassesToAnInnerFunction: {"up", "mlp.2"},
    ReadsTheDeviceOfParameters: set(),
    TakesItsOwnDtype: {"plain"},
    TakesTheDtypeOfAnMlp: {"mlp.0"},
    TakesItsOwnDevice: set(),
    AsksForTheType: {"up", "mlp.0", "mlp.2"},
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_a_weight_that_its_block_reads_stays_dense(block):
    assert roles(Body(PreTrainedConfig(), block)) == ALL - BLOCKS[block]


@pytest.mark.parametrize("body", [Rescales, RescalesByAFunction], ids=lambda body: body.__name__)
def test_a_weight_that_the_model_reads_stays_dense(body):
    model = body(PreTrainedConfig())
    assert roles(model) == ALL - {"up"}
    assert {f"blocks.{number}.up" for number in range(3)} <= read_weights(model)


def test_drawing_weights_at_random_reads_none():
    assert roles(DrawsAtRandom(PreTrainedConfig())) == ALL


@pytest.mark.parametrize("bits", [16, 4])
def test_a_model_that_rescales_its_weights_computes_as_the_dense_one(bits):
    """RWKV halves its output weights in eval mode, and doubles them to train."""
    dense = tiny_rwkv().train()
    settings = {"bits": bits, "rank": 8, "method": "refta", "progress": False}
    model = qrefta.prepare(copy.deepcopy(dense), **settings)
    merged = qrefta.merge(copy.deepcopy(model), torch.float32)
    expected = logits(merged.eval())
    assert_close(logits(model.eval()), expected, rtol=1e-4, atol=1e-5)
    assert_close(logits(model.train()), logits(merged.train()), rtol=1e-4, atol=1e-5)
    assert_close(logits(model.eval()), expected, rtol=1e-4, atol=1e-5)
    if bits == 16:
        assert_close(expected, logits(dense.eval()), rtol=1e-4, atol=1e-5)


class Tied(Body):
    """The last two blocks share a linear layer's weight; with `named`, transformers knows it."""

    _tied_weights_keys = {"blocks.2.up.weight": "blocks.1.up.weight"}  # noqa: RUF012


def test_linear_layers_that_share_a_weight_stay_dense():
    assert Tied(PreTrainedConfig()).blocks[2].up.weight is not None
    assert "up" in roles(Tied(PreTrainedConfig(tie_word_embeddings=False)))
    named = find_stacks(Tied(PreTrainedConfig(tie_word_embeddings=True)))
    unnamed = Body(PreTrainedConfig())
    unnamed.blocks[2].up.weight = unnamed.blocks[1].up.weight
    for stacks in (named, find_stacks(unnamed)):
        modules = [path for stack in stacks for path in stack.modules if path.endswith("up")]
        assert modules == ["blocks.0.up"]


def body():
    torch.manual_seed(0)
    return Body(PreTrainedConfig()).eval()


def difference_of_prepared(dense):
    """Of the outputs before any training, with 16 bits, where preparing changes nothing else."""
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    expected = dense(x)[0]
    settings = {"bits": 16, "rank": 8, "method": "refta", "progress": False}
    model = qrefta.prepare(dense, **settings)
    prepared = (model(x)[0] - expected).norm() / expected.norm()
    merged = qrefta.merge(model, torch.float32)
    return max(prepared.item(), ((merged(x)[0] - expected).norm() / expected.norm()).item())


def test_hooks_on_linear_layers_still_run_and_can_be_removed():
    model = body()
    model.blocks[1].up.register_forward_pre_hook(lambda layer, inputs: (inputs[0] * 2,))
    seen = []
    handle = model.blocks[2].up.register_forward_hook(lambda *_: seen.append(1))
    assert roles(model) == ALL
    assert difference_of_prepared(model) < 1e-5
    assert len(seen) == 3
    handle.remove()
    model(torch.zeros(1, WIDTH))
    assert len(seen) == 3


def test_a_linear_layer_whose_forward_was_replaced_stays_dense():
    model = body()
    for block in model.blocks:
        forward = block.up.forward
        block.up.forward = lambda x, forward=forward: 3 * forward(x)
    assert roles(model) == ALL - {"up"}
    assert difference_of_prepared(model) < 1e-5


def test_layers_with_hooks_of_accelerate_are_quantized():
    model = body()
    for module in [module for module in model.modules() if not list(module.children())]:
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    assert roles(model) == ALL
    assert difference_of_prepared(model) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        weight_norm,
        spectral_norm,
        parametrizations.weight_norm,
        partial(prune.identity, name="weight"),
    ],
    ids=["weight_norm", "spectral_norm", "parametrized", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_are_computed_in_each_pass_stay_dense(change):
    model = body()
    for block in model.blocks:
        change(block.up)
    assert roles(model) == ALL - {"up"}
    assert difference_of_prepared(model) < 1e-5
