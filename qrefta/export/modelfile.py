"""Ollama's Modelfile for a GGUF file: chat template and stop tokens.

Ollama's templates are Go's. A chat template is written in it where the formats below say the same
as the tokenizer's own template on conversations with and without a system message; else Ollama is
left to read the template in the file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from qrefta.export.gguf_vocab import adds_bos, end_tokens

MODELFILE = "Modelfile"
_SYSTEM, _USER, _ASSISTANT = "SYSTEM TEXT", "USER TEXT", "ASSISTANT TEXT"
_NO_TEMPLATE = "# No TEMPLATE: Ollama reads the chat template in the file."


@dataclass(frozen=True)
class _Format:
    """A format of conversations. A pair is the text before and after a message.

    Attributes:
        user, assistant: messages.
        system: message; None: it goes before the first user message, with `joint` between them.
        prompt: before the answer.
        joint: see `system`.
        stop: token that ends an answer.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None
    prompt: str
    stop: str
    joint: str = "\n\n"

    def text(self, messages: list[dict[str, str]]) -> str:
        """A conversation, up to the answer."""
        pieces = []
        before = ""
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "system" and self.system is None:
                before = content + self.joint
                continue
            first, last = getattr(self, role)
            pieces.append(first + (before if role == "user" else "") + content + last)
            before = ""
        return "".join(pieces) + self.prompt

    def template(self) -> str:
        """The same in Go's template language, over Ollama's `.Messages`.

        A system message is the first, so the first user message is number 0 or 1.
        """
        content = "{{ $message.Content }}"
        user = content
        cases = []
        if self.system is None:
            user = (
                "{{ if and $.System (le $index 1) }}{{ $.System }}" + self.joint + "{{ end }}"
            ) + content
        else:
            cases.append(("system", self.system[0] + content + self.system[1]))
        cases.append(("user", self.user[0] + user + self.user[1]))
        cases.append(("assistant", self.assistant[0] + content + self.assistant[1]))
        branches = [f'if eq $message.Role "{role}" }}}}{text}' for role, text in cases]
        body = "{{ else ".join(branches)
        return (
            "{{ range $index, $message := .Messages }}{{ " + body + "{{ end }}{{ end }}"
        ) + self.prompt


_FORMATS = (
    _Format(  # ChatML: Qwen, SmolLM
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        prompt="<|im_start|>assistant\n",
        stop="<|im_end|>",
    ),
    _Format(  # Llama 3
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        prompt="<|start_header_id|>assistant<|end_header_id|>\n\n",
        stop="<|eot_id|>",
    ),
    _Format(  # Gemma
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
        system=None,
        prompt="<start_of_turn>model\n",
        stop="<end_of_turn>",
    ),
    _Format(  # Mistral, first release
        user=("[INST] ", " [/INST]"),
        assistant=("", "</s>"),
        system=None,
        prompt="",
        stop="</s>",
    ),
    _Format(  # Mistral, later releases
        user=("[INST] ", "[/INST]"),
        assistant=(" ", "</s>"),
        system=None,
        prompt="",
        stop="</s>",
    ),
)


def modelfile(
    file: str, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None
) -> str:
    """The text of a Modelfile.

    Args:
        file: name of the GGUF file in the same folder.
        tokenizer: of the model, with its chat template.
        generation: for further end tokens.
    """
    lines = [f"FROM ./{file}"]
    stops = [str(tokenizer.convert_ids_to_tokens(end)) for end in end_tokens(tokenizer, generation)]
    found = next(_matching(tokenizer), None)
    if found is not None:
        form, system = found
        lines.append(f'TEMPLATE """{form.template()}"""')
        if system is not None:
            lines.append(f'SYSTEM """{system}"""')
        stops.append(form.stop)
    elif tokenizer.chat_template:
        lines.append(_NO_TEMPLATE)
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops)]
    return "\n".join(lines) + "\n"


def _matching(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[_Format, str | None]]:
    """Formats that say the same as the tokenizer's chat template, each with its default system
    message, if it has one.
    """
    user = {"role": "user", "content": _USER}
    turns = [user, {"role": "assistant", "content": _ASSISTANT}, user]
    system = {"role": "system", "content": _SYSTEM}
    plain = _rendered(tokenizer, [user])
    with_system = _rendered(tokenizer, [system, *turns])
    for form in _FORMATS:
        default = _default_system(form, plain, form.text([user]))
        start = [] if default is None else [{"role": "system", "content": default}]
        same = _rendered(tokenizer, turns) == form.text([*start, *turns])
        if same and with_system in (None, form.text([system, *turns])):
            yield form, default


def _default_system(form: _Format, found: str | None, expected: str) -> str | None:
    """The system message that a template puts before a conversation without one."""
    if found is None or form.system is None or not found.endswith(expected):
        return None
    first, last = form.system
    added = found.removesuffix(expected)
    if added.startswith(first) and added.endswith(last):
        return added.removeprefix(first).removesuffix(last)
    return None


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Any]) -> str | None:
    """A conversation in the tokenizer's template, without the first token, which llama.cpp adds.

    None if there is no template, or the template refuses the conversation.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception:  # templates raise errors of Jinja's for roles that they do not take
        return None
    assert isinstance(text, str), "not tokenized"
    return text.removeprefix(str(tokenizer.bos_token)) if adds_bos(tokenizer) else text
