"""`qrefta chat`: answers stream, turns are kept, and the terminal's commands work."""

import sys

import pytest
import torch
from typer.testing import CliRunner

import qrefta
from qrefta.chat import Conversation, conversation, talk
from qrefta.cli import app, main
from tests.models import tiny_llama
from tests.pages import language_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared tiny language model with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    qrefta.prepare(tiny_llama(hidden=64), rank=4, progress=False).save_pretrained(folder)
    language_tokenizer().save_pretrained(folder)
    return str(folder)


def greedy(told, turns):
    """The most likely continuation of a conversation, by plain generate."""
    batch = told.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        made = told.model.generate(**batch, max_new_tokens=told.max_new_tokens, do_sample=False)
    new = made[0, batch["input_ids"].shape[1] :]
    return told.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_an_answer_is_the_most_likely_one_and_sees_the_turns_before(folder):
    told = conversation(folder, max_new_tokens=6, system="w9")
    turns = [{"role": "system", "content": "w9"}]
    for text in ("w5 w6", "w7"):
        turns.append({"role": "user", "content": text})
        expected = greedy(told, turns)
        assert "".join(told.answer(text)).strip() == expected
        turns.append({"role": "assistant", "content": expected})
        assert told.turns == turns
    told.forget()
    assert told.turns == turns[:1]


def test_an_answer_that_is_stopped_stays_out(folder):
    told = conversation(folder, max_new_tokens=100_000)
    parts = told.answer("w5")
    next(parts)
    parts.close()  # returns when the generation has ended
    assert told.turns == []


def test_a_failure_while_generating_is_raised(folder, monkeypatch):
    told = conversation(folder, max_new_tokens=4)
    monkeypatch.setattr(told, "_inputs", lambda *_: {"input_ids": torch.zeros(0, 0)})
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        list(told.answer("w5"))


def test_commands_of_the_terminal(folder):
    told = conversation(folder, max_new_tokens=3)
    shown = []
    talk(told, ["w5\n", "  ", "/new", "w6", "/exit", "w7"], shown.append)
    assert [turn["content"] for turn in told.turns if turn["role"] == "user"] == ["w6"]
    assert shown.count("\n") == 2


def test_the_command_answers_standard_input(folder):
    result = CliRunner().invoke(app, ["chat", folder, "--max-new-tokens", "4"], input="w5 w6\n")
    told = conversation(folder, max_new_tokens=4)
    assert result.exit_code == 0
    assert result.output.strip() == "".join(told.answer("w5 w6")).strip()


def test_sampling_differs_between_answers(folder):
    told = conversation(folder, max_new_tokens=12, temperature=5.0)
    torch.manual_seed(0)
    found = set()
    for _ in range(4):
        found.add("".join(told.answer("w5")))
        told.forget()
    assert len(found) > 1


def test_a_model_without_template_continues_the_text(folder):
    told = conversation(folder, max_new_tokens=4)
    told.tokenizer.chat_template = None
    ids = told.tokenizer("w5 w6", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        made = told.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    expected = told.tokenizer.decode(made, skip_special_tokens=True).strip()
    assert "".join(told.answer("w5 w6")).strip() == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_bad_settings_are_named(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        conversation(folder, **settings)


def test_a_system_message_that_the_template_does_not_take_is_an_error_in_words(folder):
    told = conversation(folder, system="w9")
    told.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    message = r"turns are by system, user: no system role; leave out .*\(--system\)"
    with pytest.raises(ValueError, match=message):
        list(told.answer("w5"))


def test_a_model_without_tokenizer_is_refused(tmp_path, monkeypatch, capsys):
    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qrefta", "chat", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert "tokenizer; save one into it" in " ".join(capsys.readouterr().err.split())


def test_a_trained_conversation_is_in_eval_mode(folder):
    told = conversation(folder)
    assert isinstance(told, Conversation)
    assert not told.model.training
