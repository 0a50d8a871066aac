"""Gradient checkpointing: how often each part of a block runs; no bit of the gradients changes."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from qrefta._compat.torch import TorchDispatchMode
from qrefta._compat.transformers import enable_checkpointing
from qrefta.nn.checkpointing import check_checkpointing, selective_contexts
from tests.models import ARCHITECTURES, EXPERTS, VOCAB, prepared, tiny_llama

OPTIONS = {"use_reentrant": False, "context_fn": selective_contexts}
WIDTH = 8


class Counting(TorchDispatchMode):
    """Counts operators by their names."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def attention(self):
        """Forward passes of attention."""
        return sum(
            number
            for name, number in self.names.items()
            if "attention" in name and "backward" not in name
        )

    def dequantized(self):
        """Dequantized weights: one for each product with a frozen weight."""
        return sum(number for name, number in self.names.items() if "dequantize" in name)


def batch_of(model):
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    batch = {"input_ids": torch.randint(VOCAB, (2, 12), generator=generator)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    return batch


def step(model):
    """Loss, gradients of everything that trains, and forward passes of attention."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.manual_seed(0)  # for dropout
    with Counting() as counting:
        loss = model(**batch_of(model))[0].square().mean()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return [loss, *gradients], counting.attention()


@pytest.mark.parametrize(
    ("architecture", "dropout"),
    [("bert", True), *((name, False) for name in (*ARCHITECTURES, *EXPERTS))],
)
def test_gradients_are_the_same_and_attention_runs_once(architecture, dropout):
    model = prepared((ARCHITECTURES | EXPERTS)[architecture], rank=5).train()
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
    expected, once = step(model)
    enable_checkpointing(model, {"use_reentrant": False})
    whole, twice = step(model)
    enable_checkpointing(model, OPTIONS)
    found, runs = step(model)
    assert (runs, twice) == (once, 2 * once)
    assert_close(found, whole, rtol=0, atol=0)
    # Recomputed blocks add up the gradients of T5's encoder in another order.
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if architecture == "t5" else {"rtol": 0, "atol": 0}
    assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("options", [{"use_reentrant": False}, OPTIONS], ids=["whole", "selective"])
@pytest.mark.parametrize("length", [12, 80], ids=["few tokens", "more tokens than features"])
@pytest.mark.parametrize("method", ["windows", "tera", None])
def test_the_last_product_of_a_block_is_not_computed_again(method, length, options):
    """A block is computed again until all that it keeps is there; `down_proj` is its last product.

    Products with frozen weights: seven a block in the forward pass, and one for the gradient of
    each input. In our formats each of them dequantizes its weight.
    """
    settings = {"rank": 0} if method is None else {"rank": 5, "method": method}
    model = prepared(tiny_llama, quant_type="int4", **settings).train()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, length, model.config.hidden_size, generator=generator).requires_grad_()
    counts = []
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model, options)
        with Counting() as counting:
            result = model.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
            gradients += torch.autograd.grad(result.square().sum(), hidden)
        counts.append(counting.dequantized())
    blocks = model.config.num_hidden_layers
    assert counts == [14 * blocks, 20 * blocks]
    assert torch.equal(*gradients)


@torch.library.custom_op("tests::attention", mutates_args=())
def attention(x: torch.Tensor, dropout_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.rand(x.shape) if dropout_p > 0 else torch.ones(x.shape)  # as kernels do
    mask = (drawn >= dropout_p).to(x.dtype)
    return x * mask, mask


attention.register_autograd(
    lambda ctx, grad, _: (grad * ctx.saved_tensors[0], None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output[1]),
)


@torch.library.custom_op("tests::attention_into", mutates_args={"out"})
def attention_into(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x)


def block_gradients(block, checkpointed):
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    torch.manual_seed(0)
    y = checkpoint(block, x, **OPTIONS) if checkpointed else block(x)
    with Counting() as counting:
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
    return gradient, counting.attention()


@pytest.mark.parametrize(("dropout_p", "again"), [(0.0, 0), (0.5, 1)])
def test_attention_with_dropout_runs_again_as_later_dropout_needs_its_random_numbers(
    dropout_p, again
):
    def block(x):
        return nn.functional.dropout(attention(x.sin(), dropout_p)[0], 0.5).sin()

    expected, _ = block_gradients(block, checkpointed=False)
    found, runs = block_gradients(block, checkpointed=True)
    assert torch.equal(found, expected)
    assert runs == again


def test_attention_that_writes_into_a_tensor_runs_again():
    def block(x):
        out = torch.zeros(x.shape)
        attention_into(x.detach(), out)
        return (x * out).sin()

    expected, _ = block_gradients(block, checkpointed=False)
    found, runs = block_gradients(block, checkpointed=True)
    assert torch.equal(found, expected)
    assert runs == 1


@pytest.mark.parametrize("value", ["full", None, 1, "Selective"])
def test_other_values_of_the_setting_are_refused(value):
    with pytest.raises(ValueError, match=r"must be True, False or 'selective'"):
        check_checkpointing(value)
