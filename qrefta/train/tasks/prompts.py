"""Token ids of prompts and their answers, as text or as turns of a conversation."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from qrefta.train.tasks.template import template_errors


def token_ids(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    answer: bool,
    where: str = "A row of the train split",
) -> list[int]:
    """The token ids of a prompt, with the better answer or else ready for an answer.

    Raises:
        ValueError: if the chat template does not take the row; it names `where`.
    """
    if isinstance(row["prompt"], str):
        encoded: Any = tokenizer(row["prompt"] + (row["chosen"] if answer else ""))
    else:
        turns = [*row["prompt"], *(row["chosen"] if answer else [])]
        with template_errors(where, row):
            encoded = tokenizer.apply_chat_template(
                turns, tools=row.get("tools"), add_generation_prompt=not answer, return_dict=True
            )
    return encoded["input_ids"]
