"""Models whose class does another task than the run."""

import pytest
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

import qrefta
from qrefta.train.models import load_model
from qrefta.train.task_class import check_class
from tests.models import build, encoder_sizes, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit
from tests.tiny import VOCAB, color_data, tiny_tokenizer

CAUSAL = ("lm", "sft", "dpo", "grpo")


def bert(kind, **settings):
    return build(kind, BertConfig(vocab_size=VOCAB, **encoder_sizes(32), **settings))


def classifier():
    return bert(BertForSequenceClassification)


def neox():
    """Its config says is_decoder=False, as BERT's does, and it is causal: Pythia."""
    sizes = encoder_sizes(32) | {"max_position_embeddings": 64}
    return build(GPTNeoXForCausalLM, GPTNeoXConfig(vocab_size=VOCAB, **sizes))


def xlnet():
    """Its config has no entry is_decoder, and it sees the next token."""
    config = XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=64)
    return build(XLNetLMHeadModel, config)


def xlm():
    """As XLNet."""
    return build(XLMWithLMHeadModel, XLMConfig(vocab_size=VOCAB, emb_dim=32, n_layers=2, n_heads=4))


FITTING = {
    "gpt-neox": (neox, CAUSAL),
    "llama": (tiny_llama, CAUSAL),
    "gpt2": (tiny_gpt2, CAUSAL),
    "a BERT that is a decoder": (lambda: bert(BertLMHeadModel, is_decoder=True), CAUSAL),
    "a text classifier": (classifier, ("classify",)),
    "an image classifier": (tiny_vit, ("image",)),
    "a BERT that sees the next token": (lambda: bert(BertLMHeadModel), ()),
    "xlnet": (xlnet, ()),
    "xlm": (xlm, ()),
    "a masked language model": (lambda: bert(BertForMaskedLM), ()),
    "a model without a head": (lambda: bert(BertModel), ()),
    "an encoder-decoder": (tiny_t5, ()),
}


@pytest.mark.parametrize("name", FITTING)
def test_a_class_does_its_tasks_and_no_other(name):
    make, tasks = FITTING[name]
    model = make()
    for task in (*CAUSAL, "classify", "image"):
        if task in tasks:
            check_class(model, task)
        else:
            with pytest.raises(
                ValueError, match=f"is a {type(model).__name__}, and the task {task}"
            ):
                check_class(model, task)


def test_subclasses_and_classes_of_others_are_trusted():
    class Mine(BertForSequenceClassification):
        """A subclass, in the user's file."""

    check_class(bert(Mine), "classify")
    lora = pytest.importorskip("peft")
    check_class(lora.get_peft_model(tiny_gpt2(), lora.LoraConfig(task_type="CAUSAL_LM")), "lm")


def test_finetune_refuses_before_it_reads_the_data(tmp_path):
    model = qrefta.prepare(bert(BertLMHeadModel), rank=4, refine=0)
    with pytest.raises(ValueError, match="trains a causal language model"):
        qrefta.finetune(model, tiny_tokenizer(), color_data(), tmp_path / "out", task="lm")
    assert not (tmp_path / "out").exists()


def test_the_command_line_refuses_before_it_prepares(tmp_path):
    """A BERT's folder loads as a language model whose head is drawn at random."""
    bert(BertForMaskedLM).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a BertLMHeadModel, and the task lm"):
        load_model(str(tmp_path / "bert"), "lm", color_data(), seed=0)
