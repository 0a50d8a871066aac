"""The blocks of a model, by which it is sharded."""

import pytest

from qrefta.nn.linear import AdaptedLinear
from qrefta.train.sharding import fsdp2_config, repeated_blocks
from tests.models import prepared, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5


@pytest.mark.parametrize(
    ("make", "classes"),
    [
        (tiny_bert, ["BertLayer"]),
        (tiny_llama, ["LlamaDecoderLayer"]),
        (tiny_gpt2, ["GPT2Block"]),
        (tiny_mixtral, ["MixtralDecoderLayer"]),
        (tiny_t5, ["T5Block"]),  # whose blocks hold lists too
    ],
)
def test_every_adapted_layer_is_in_one_block_and_trainer_gets_the_same_blocks(make, classes):
    model = prepared(make, rank=2)
    blocks = repeated_blocks(model)
    inside = [module for block in blocks for module in block.modules()]
    assert len(inside) == len(set(inside))
    adapted = {module for module in model.modules() if isinstance(module, AdaptedLinear)}
    assert adapted
    assert adapted <= set(inside)
    assert {type(block).__name__ for block in blocks} == set(classes)
    assert fsdp2_config(model)["transformer_layer_cls_to_wrap"] == classes


def test_the_blocks_of_a_plain_model_are_trainers_choice():
    assert "transformer_layer_cls_to_wrap" not in fsdp2_config(tiny_bert())
    with pytest.raises(ValueError, match="not prepared"):
        repeated_blocks(tiny_bert())
