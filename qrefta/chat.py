"""A conversation with a language model in the terminal; answers appear word by word."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from threading import Thread
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
)

from qrefta.measure.sources import load_causal_model, load_tokenizer

NEW = "/new"  # forgets the conversation
EXIT = "/exit"


@dataclass
class Conversation:
    """A model, its tokenizer and the turns so far.

    Attributes:
        model, tokenizer: of a chat model; without a chat template a turn is continued as text.
        system: first message; None for the template's own.
        max_new_tokens: most tokens of an answer.
        temperature: of sampling; 0 takes the most likely token.
        turns: messages with role and content.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    system: str | None = None
    max_new_tokens: int = 512
    temperature: float = 0.0
    turns: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}; it must be 0 (the most likely token) or more"
            )
        self.model.eval()
        self.forget()

    def forget(self) -> None:
        """Begin a new conversation."""
        self.turns = []
        if self.system is not None:
            self.turns.append({"role": "system", "content": self.system})

    def answer(self, text: str) -> Iterator[str]:
        """The parts of the answer to a message, as they are generated; it joins the turns.

        An answer that is not read to its end stays out of the conversation, with its question.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        streamer = TextIteratorStreamer(
            self.tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,  # pyright: ignore[reportArgumentType]
        )
        failures: list[BaseException] = []
        stopped = _Stopped()

        def generate() -> None:
            try:
                with torch.no_grad():
                    self.model.generate(  # pyright: ignore[reportCallIssue]
                        **self._inputs(turns, text),
                        generation_config=self._generation(),
                        streamer=streamer,
                        stopping_criteria=[stopped],
                    )
            except BaseException as error:
                failures.append(error)
                streamer.end()

        worker = Thread(target=generate, daemon=True)
        worker.start()
        parts = []
        try:
            for part in streamer:
                parts.append(part)
                yield part
        finally:
            stopped.now = True
            worker.join()
        if failures:
            raise failures[0]
        self.turns = [*turns, {"role": "assistant", "content": "".join(parts).strip()}]

    def _inputs(self, turns: list[dict[str, str]], text: str) -> dict[str, Any]:
        if self.tokenizer.chat_template is None:
            encoded: Any = self.tokenizer(text, return_tensors="pt")
        else:
            try:
                encoded = self.tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            except TemplateError as error:
                hint = "" if self.system is None else "; leave out the system message (--system)"
                raise ValueError(
                    "The model's chat template does not take the conversation, whose turns are by "
                    f"{', '.join(turn['role'] for turn in turns)}: {error}{hint}"
                ) from error
        names = ("input_ids", "attention_mask")
        return {name: encoded[name].to(self.model.device) for name in names}

    def _generation(self) -> GenerationConfig:
        """The model's own settings of generation, with the length and temperature asked for."""
        config = GenerationConfig.from_dict(self.model.generation_config.to_dict())
        config.max_new_tokens = self.max_new_tokens
        config.max_length = None
        config.do_sample = self.temperature > 0
        if config.do_sample:
            config.temperature = self.temperature
        else:
            config.temperature = config.top_p = config.top_k = None
        if config.eos_token_id is None:
            config.eos_token_id = self.tokenizer.eos_token_id
        if config.pad_token_id is None:
            ends = config.eos_token_id
            config.pad_token_id = ends[0] if isinstance(ends, list) else ends
        return config


class _Stopped:
    """A stopping criterion that another thread sets."""

    now = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.now, dtype=torch.bool, device=input_ids.device)


def conversation(
    source: str,
    device: str | None = None,
    trust_remote_code: bool = False,
    dtype: torch.dtype | Literal["auto"] = "auto",
    **settings: Any,
) -> Conversation:
    """A conversation with the model of a folder, hub name or GGUF file.

    Args:
        source: prepared, trained, merged or dense.
        device: such as "cuda:1"; default: the GPU, on a machine without one the CPU.
        trust_remote_code: whether to run code that comes with the model.
        dtype: of the model; "auto": as it is stored.
        settings: see `Conversation`.

    Raises:
        ValueError: if it is not a causal language model, or has no tokenizer.
    """
    model = load_causal_model(source, device, trust_remote_code, dtype)
    tokenizer = load_tokenizer(source, trust_remote_code)
    if tokenizer is None:
        raise ValueError(
            f"{source} has no tokenizer; save one into it with "
            f"tokenizer.save_pretrained({source!r})"
        )
    return Conversation(model, tokenizer, **settings)


def talk(
    conversation: Conversation, messages: Iterable[str], show: Callable[[str], object]
) -> None:
    """Answer messages until they end or one is /exit; Ctrl-C ends an answer.

    Args:
        conversation: with the model.
        messages: lines; /new forgets the conversation.
        show: prints a part of an answer.
    """
    for message in messages:
        text = message.strip()
        if text == EXIT:
            return
        if text == NEW:
            conversation.forget()
        elif text:
            try:
                for part in conversation.answer(text):
                    show(part)
            except KeyboardInterrupt:
                show(" [stopped]")
            show("\n")
