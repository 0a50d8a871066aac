"""Modelfiles: the template, run by Jinja after its Go commands are put into Jinja's words, must say
the same as the tokenizer's chat template.
"""

import re

import pytest
from jinja2 import Environment
from transformers import GemmaTokenizer, GenerationConfig

from qrefta.export.modelfile import modelfile
from tests.language import CHATML, byte_level_tokenizer, sentencepiece_tokenizer

LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set prefix = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set prefix = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
    " + (prefix if loop.first else '') + message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + (system if loop.first else '') + "
    "message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml with a default system message": SMOLLM,
    "llama 3": LLAMA3,
    "gemma 2": GEMMA2,
    "gemma 3": GEMMA3,
    "mistral": MISTRAL,
}
CONVERSATIONS = [
    [("user", "Hello?")],
    [
        ("user", "Hello?"),
        ("assistant", "Yes."),
        ("user", "Who is it?"),
        ("assistant", "I."),
        ("user", "Ah"),
    ],
    [("system", "Be brief."), ("user", "Hello?"), ("assistant", "Yes."), ("user", "Who is it?")],
]


def with_template(template):
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def run(template, system, messages):
    """Ollama's template, of the few Go commands that are used here, by Jinja."""
    words = {
        "range $index, $message := .Messages": "% for message in messages %",
        "end": None,
        "$message.Content": "{ message.content }",
        "$.System": "{ system }",
        "and $.System (le $index 1)": "system and loop.index0 <= 1",
    }
    open_blocks = []

    def jinja(match):
        command = match.group(1).strip()
        if command.startswith("range"):
            open_blocks.append("endfor")
        elif command.startswith("if"):
            open_blocks.append("endif")
        if command == "end":
            return "{% " + open_blocks.pop() + " %}"
        condition = re.fullmatch(r"(else )?if (.*)", command)
        if condition:
            test = re.sub(r'eq \$message\.Role "(\w+)"', r'message.role == "\1"', condition[2])
            return "{% " + ("elif " if condition[1] else "if ") + words.get(test, test) + " %}"
        return "{" + words[command] + "}"

    text = re.sub(r"{{(.*?)}}", jinja, template)
    assert open_blocks == []
    environment = Environment(keep_trailing_newline=True)
    return environment.from_string(text).render(system=system, messages=messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_says_the_same_as_the_tokenizers(name):
    tokenizer = with_template(TEMPLATES[name])
    text = modelfile("m.gguf", tokenizer, None)
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    default = re.search(r'SYSTEM """(.*?)"""', text)
    assert (default is not None) == ("default" in name)
    for conversation in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in conversation]
        system = next((content for role, content in conversation if role == "system"), "")
        if name == "gemma 2" and system:
            continue  # refused by the tokenizer's template
        expected = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        if default and not system:  # Ollama puts the Modelfile's SYSTEM before the messages
            messages = [{"role": "system", "content": default[1]}, *messages]
        assert run(template, system, messages) == expected.removeprefix("<s>")


def test_another_template_is_left_to_ollama():
    strange = CHATML.replace("<|im_end|>\n{% endfor", "<|im_end|>{% endfor")
    text = modelfile("m.gguf", with_template(strange), None)
    assert text == (
        "FROM ./m.gguf\n# No TEMPLATE: Ollama reads the chat template in the file.\n"
        'PARAMETER stop "</s>"\n'
    )


def test_without_a_chat_template_there_is_none():
    text = modelfile("m.gguf", sentencepiece_tokenizer(GemmaTokenizer), None)
    assert text == 'FROM ./m.gguf\nPARAMETER stop "<eos>"\n'


def test_every_end_token_stops():
    tokenizer = byte_level_tokenizer()
    generation = GenerationConfig(eos_token_id=[0, 2])
    text = modelfile("m.gguf", tokenizer, generation)
    assert re.findall(r'PARAMETER stop "(.*)"', text) == ["<|im_end|>", "<|endoftext|>"]
    gemma = with_template(GEMMA3)
    assert 'PARAMETER stop "<end_of_turn>"' in modelfile("m.gguf", gemma, None)
