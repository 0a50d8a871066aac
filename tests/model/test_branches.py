"""Reads of a weight in a module's code: those that its settings rule out do not count."""

import pytest
from torch import nn

from qrefta.model.reads import read_weights


class Block(nn.Module):
    """It reads the weight of each layer in another kind of branch."""

    def __init__(self, slices=1, exact=False):
        super().__init__()
        self.slices = slices
        self.exact = exact
        for name in ("both", "either", "negated", "other", "mode", "device", "plain"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, x, mask=None):
        if self.slices > 1 and self.exact:
            x = x @ self.both.weight
        if self.slices > 1 or mask is not None:
            x = x @ self.either.weight
        if not self.exact:
            x = self.negated(x)
        else:
            x = x @ self.negated.weight
            x = x + 1
        if self.slices == 1:
            x = self.other(x)
        elif self.exact:
            x = x @ self.other.weight
        if self.training:
            x = x @ self.mode.weight
        return self.plain(x.to(self.device.weight.device))


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({}, {"either", "mode"}),
        ({"slices": 2}, {"either", "mode"}),
        ({"exact": True}, {"either", "mode", "negated"}),
        ({"slices": 2, "exact": True}, {"both", "either", "mode", "negated", "other"}),
    ],
)
def test_reads_count_in_branches_that_the_settings_leave_open(settings, read):
    assert read_weights(Block(**settings)) == read


def test_blocks_with_other_settings_are_told_apart():
    model = nn.ModuleDict({"dense": Block(), "sliced": Block(slices=2, exact=True)})
    read = read_weights(model)
    assert "sliced.both" in read
    assert "dense.both" not in read
