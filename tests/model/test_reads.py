"""Weights that a model's own code reads or shares stay dense, whatever the code looks like."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
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
