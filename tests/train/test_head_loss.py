"""The loss without whole logits: equal to the model's own, with its gradients, and smaller."""

import copy

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    Trainer,
    TrainingArguments,
)

from qrefta.nn.head_loss import CHUNK, head_cross_entropy, plain_head
from qrefta.train.head_loss import WithoutLogits, causal_model_of, has_plain_head
from tests.models import (
    build,
    decoder_sizes,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_vit,
)
from tests.peak import added_peak

VOCAB = 96


def tied_llama():
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def biased_phi():
    return build(PhiForCausalLM, PhiConfig(**decoder_sizes(32)))


def scaled():
    return build(CohereForCausalLM, CohereConfig(**decoder_sizes(32), logit_scale=3.0))


def routed_mixtral():
    model = tiny_mixtral()
    model.config.output_router_logits = True
    return model


def batch_of(rows=3, length=2 * CHUNK):
    """Token ids and labels, a third of them without a label, and more than a chunk with one."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 3] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss, {name: one.grad.clone() for name, one in model.named_parameters()}


@pytest.mark.parametrize("count", [None, 77])
@pytest.mark.parametrize(
    "make", [tiny_llama, tied_llama, tiny_gpt2, biased_phi, scaled, routed_mixtral]
)
def test_loss_and_all_gradients_are_the_models_own(make, count):
    model = make()
    batch = batch_of(length=40) if make is tiny_gpt2 else batch_of()
    if count is not None:
        batch["num_items_in_batch"] = count
    loss, expected = gradients(model, batch)
    assert has_plain_head(model)
    with plain_head(model):
        found, ours = gradients(model, batch)
    torch.testing.assert_close(found, loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert model(**batch).logits.shape == (*batch["input_ids"].shape, model.config.vocab_size)


def test_under_autocast_the_loss_is_as_near_as_bfloat16_allows():
    model = tiny_llama()
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = gradients(model, batch_of())
        with plain_head(model):
            found, ours = gradients(model, batch_of())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss, rtol=1e-3, atol=0)
    head = "lm_head.weight"
    error = (ours[head] - expected[head]).norm() / expected[head].norm()
    assert error < 0.02


def test_a_batch_without_labels_has_a_loss_of_zero_and_no_gradient():
    hidden = torch.randn(5, 8, requires_grad=True)
    loss = head_cross_entropy(hidden, torch.randn(7, 8), None, torch.full((5,), -100))
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros(5, 8))


def capped():
    config = Gemma2Config(**decoder_sizes(32), final_logit_softcapping=2.0)
    return build(Gemma2ForCausalLM, config)


def capped_by_another_name():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "lru_width": 64}
    config = RecurrentGemmaConfig(
        vocab_size=VOCAB, num_attention_heads=4, num_key_value_heads=1, bos_token_id=2, **sizes
    )
    return build(RecurrentGemmaForCausalLM, config)


def capped_by_its_code():
    model = tiny_llama()
    forward = model.forward

    def cap(**inputs):
        labels = inputs.pop("labels", None)
        output = forward(**inputs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        if labels is not None:
            output.loss = model.loss_function(output.logits, labels, model.config.vocab_size)
        return output

    model.forward = cap
    return model


@pytest.mark.parametrize("capped", [capped, capped_by_another_name, capped_by_its_code])
def test_a_model_that_caps_its_logits_keeps_its_own_loss(capped, tmp_path):
    """Also if the logits of a model that has learnt nothing are far below the cap."""
    model = capped().eval()
    assert not has_plain_head(model)
    batch = batch_of()
    trainer = trainer_of(model, tmp_path)
    torch.testing.assert_close(trainer.compute_loss(model, batch), model(**batch).loss)


def test_copies_on_several_devices_keep_their_own_loss(tmp_path):
    model = tiny_llama()
    trainer = trainer_of(model, tmp_path)
    assert trainer._plain_model() is model
    trainer.args._n_gpu = 2  # DataParallel
    assert trainer._plain_model() is None


def test_a_model_whose_code_takes_the_logits_for_its_loss_keeps_it():
    model = tiny_llama()
    forward = model.forward

    def own(labels=None, **inputs):
        output = forward(**inputs)
        output.loss = nn.functional.cross_entropy(output.logits.view(-1, VOCAB), labels.view(-1))
        return output

    model.forward = own
    assert not has_plain_head(model)
    assert "forward" not in vars(model.lm_head)


def test_a_count_of_zero_gives_a_finite_loss():
    hidden = torch.randn(5, 8, requires_grad=True)
    none = torch.full((5,), -100)
    assert head_cross_entropy(hidden, torch.randn(7, 8), None, none, torch.tensor(0)) == 0


def test_a_trained_head_in_bfloat16_sums_its_gradient_in_float32():
    tokens, words = 64 * CHUNK, 8
    hidden = torch.ones(tokens, 4, dtype=torch.bfloat16)
    weight = torch.zeros(words, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = head_cross_entropy(hidden, weight, None, torch.zeros(tokens, dtype=torch.long), 1)
    loss.backward()
    expected = torch.full((words, 4), tokens / words)
    expected[0] -= tokens
    torch.testing.assert_close(weight.grad.float(), expected, rtol=5e-3, atol=0)


def test_models_without_a_head_of_words_are_left_alone():
    assert causal_model_of(tiny_bert()) is None
    assert not has_plain_head(tiny_vit())
    wrapped = tiny_llama()
    wrapped.lm_head.forward = nn.Linear.forward.__get__(wrapped.lm_head)
    assert not has_plain_head(wrapped)


def trainer_of(model, folder, **options):
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", dataloader_pin_memory=False
    )
    return WithoutLogits(model=model, args=args, **options)


def test_a_step_holds_less_than_the_logits(tmp_path):
    model = tiny_llama()
    words = 20_000
    model.resize_token_embeddings(words)
    batch = batch_of(rows=4)
    trainer = trainer_of(model, tmp_path)
    trainer.compute_loss(model, batch)  # the check of the head
    logits_bytes = batch["labels"].numel() * words * 4

    def peak(compute_loss):
        return added_peak(lambda: compute_loss(model, dict(batch)).backward())

    whole = peak(lambda model, batch: Trainer.compute_loss(trainer, model, batch))
    assert whole > 2 * logits_bytes
    assert peak(trainer.compute_loss) < whole / 2


def test_metrics_of_the_caller_get_their_logits(tmp_path):
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2)
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {}

    trainer = trainer_of(
        tiny_llama(),
        tmp_path,
        eval_dataset=rows,
        compute_metrics=metrics,
        data_collator=lambda rows: {
            name: torch.tensor([row[name] for row in rows]) for name in rows[0]
        },
    )
    trainer.evaluate()
    assert seen == [(2, 3, VOCAB)]


def test_the_model_is_as_before(tmp_path):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    logits = model(torch.tensor([[1, 2, 3]])).logits
    trainer = trainer_of(model, tmp_path)
    trainer.compute_loss(model, batch_of())
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, logits)
    assert before.keys() == model.state_dict().keys()
