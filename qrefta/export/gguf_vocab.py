"""A tokenizer as the metadata of a GGUF file.

llama.cpp has a tokenizer for byte-level BPE ("gpt2", by merges) and one for SentencePiece's BPE
("llama", by scores). How text is split before byte-level BPE is not stored: the file names one of
the splits that llama.cpp knows, so only these can be written.
"""

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import GenerationConfig, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Numbers of gguf.TokenType.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"  # SentencePiece's space
_ADDED_SCORE = -1000.0  # of added tokens, as llama.cpp's converter gives it
_LEAST_SCORE = -1e6  # below all merges: of characters, which merge nothing

_GPT2 = "gpt-2"
# By the regular expression before byte-level BPE, as in tokenizer.json of the model families.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}


class _Vocabulary(NamedTuple):
    """Tokens by number, with their types and scores."""

    tokens: list[str]
    types: list[int]
    scores: list[float]


def add_vocabulary(
    writer: "GGUFWriter",
    tokenizer: PreTrainedTokenizerBase,
    size: int,
    generation: GenerationConfig | None,
) -> None:
    """Write vocabulary, merges or scores, special tokens and chat template.

    Args:
        writer: of the file.
        tokenizer: of the model; its token numbers are below `size`.
        size: of the model's vocabulary; tokens that the tokenizer has no text for are unused.
        generation: its further end tokens are ends of a turn.

    Raises:
        ValueError: for a tokenizer that llama.cpp cannot run.
    """
    state = _backend_state(tokenizer)
    model = state["model"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    if model["byte_fallback"]:
        vocabulary = _vocabulary(tokenizer, size, _scores(merges))
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(_prefixes_space(state))
    else:
        vocabulary = _vocabulary(tokenizer, size, None)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split_name(state["pre_tokenizer"]))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    _add_special_tokens(writer, tokenizer, generation)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in template.items()]
        )
    elif template:
        writer.add_chat_template(template)


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None
) -> list[int]:
    """The tokens that end a text or a turn; the tokenizer's first."""
    tokens = getattr(generation, "eos_token_id", None)
    more = tokens if isinstance(tokens, list) else [tokens]
    every = [tokenizer.eos_token_id, *more]
    return list(dict.fromkeys(token for token in every if token is not None))


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins every text with its first token."""
    return tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _backend_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's tokenizer.json.

    Raises:
        ValueError: if it is not BPE.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {"model": {"type": None}}
    kind = state["model"]["type"]
    if kind != "BPE":
        raise ValueError(
            f"The tokenizer is a {type(tokenizer).__name__} with the model {kind}; a GGUF file of "
            "these families takes byte-level BPE, or SentencePiece's BPE with bytes as fallback."
        )
    return state


def _vocabulary(
    tokenizer: PreTrainedTokenizerBase, size: int, scores: dict[str, float] | None
) -> _Vocabulary:
    """Every token of the model; numbers without text are unused.

    Args:
        tokenizer: of the model.
        size: of the model's vocabulary.
        scores: by text, for SentencePiece; None: byte-level BPE, which has no scores, and no tokens
            for bytes and for the unknown.
    """
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    found = _Vocabulary([], [], [])
    for number in range(size):
        text = texts.get(number, f"[PAD{number}]")
        score = (scores or {}).get(text, _LEAST_SCORE)
        if number not in texts:
            kind = _UNUSED
        elif scores is not None and text == tokenizer.unk_token:
            kind = _UNKNOWN
        elif number in added:
            kind = _CONTROL if added[number].special else _USER_DEFINED
            score = _ADDED_SCORE
            if kind == _USER_DEFINED and scores is not None:
                text = text.replace(_SPACE, " ")  # llama.cpp looks for it in the text as it is
        elif scores is not None and _is_byte(text):
            kind = _BYTE
        else:
            kind = _NORMAL
        found.tokens.append(text)
        found.types.append(kind)
        found.scores.append(score)
    return found


def _is_byte(text: str) -> bool:
    """Whether a token of SentencePiece stands for a byte, such as <0x0A>."""
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _scores(merges: list[list[str]]) -> dict[str, float]:
    """Scores by which SentencePiece merges in the order of these merges.

    It merges the neighbours whose token has the highest score, and BPE by merges the neighbours
    whose merge comes first. All merges that make one token lie together in a tokenizer that was
    converted from SentencePiece, so the first gives the token's place.
    """
    scores: dict[str, float] = {}
    for place, (left, right) in enumerate(merges):
        scores.setdefault(left + right, -float(place))
    return scores


def _prefixes_space(state: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text.

    Raises:
        ValueError: if it splits text by anything but spaces, which llama.cpp does not.
    """
    splits = _steps(state["pre_tokenizer"])
    for step in splits:
        by_spaces = step["type"] == "Split" and step["pattern"] == {"String": " "}
        if step["type"] != "Metaspace" and not by_spaces:
            raise ValueError(
                f"The tokenizer splits text by {json.dumps(step)} before its merges, and llama.cpp "
                "splits a text for SentencePiece's merges by nothing but spaces: it would make "
                "other tokens."
            )
    for step in [*_steps(state["normalizer"]), *splits]:
        if step["type"] == "Prepend":
            return True
        if step["type"] == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
    return False


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, sequences in it laid flat."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    inner = part.get("normalizers") or part.get("pretokenizers") or []
    return [step for each in inner for step in _steps(each)]


def _split_name(pre_tokenizer: dict[str, Any] | None) -> str:
    """llama.cpp's name of the split before byte-level BPE.

    Raises:
        ValueError: if it has no name for it.
    """
    steps = _steps(pre_tokenizer)
    kinds = [step["type"] for step in steps]
    if kinds[-1:] == ["ByteLevel"] and steps[-1]["add_prefix_space"]:
        raise ValueError(
            "The tokenizer puts a space before a text (ByteLevel, add_prefix_space=True), which "
            "llama.cpp does not for byte-level BPE: it would make other tokens. Give a tokenizer "
            "with add_prefix_space=False as `tokenizer`, if the model works with it."
        )
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return _GPT2
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        name = _SPLITS.get(steps[0]["pattern"].get("Regex"))
        whole = steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
        if name is not None and whole:
            return name
    raise ValueError(
        f"The tokenizer splits text by {json.dumps(pre_tokenizer)}, which has no name in GGUF "
        f"files here; known are the splits {', '.join([_GPT2, 'smollm', *_SPLITS.values()])}."
    )


def _add_special_tokens(
    writer: "GGUFWriter", tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None
) -> None:
    special: dict[Any, Any] = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for add, number in special.items():
        if number is not None:
            add(number)
    ends = [end for end in end_tokens(tokenizer, generation) if end != tokenizer.eos_token_id]
    if ends:
        writer.add_eot_token_id(ends[0])
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id)
