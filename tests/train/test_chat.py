"""Conversations: their columns, which tokens are learned under any chat template, packing."""

import itertools
import json
import random
import re
import sys
from importlib.resources import files

import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict
from jinja2 import TemplateError

import qrefta
from qrefta.nn.head_loss import IGNORED
from qrefta.train.arguments import training_arguments
from qrefta.train.tasks import load_chat
from qrefta.train.tasks.answer_spans import answer_spans
from qrefta.train.tasks.answers import learned_ids, left_out
from qrefta.train.tasks.chat import chat_recipe, conversations
from qrefta.train.tasks.template import ChatTemplate, _common_length
from tests.models import tiny_llama
from tests.train.talk import (
    ANSWER,
    QUESTION,
    TEMPLATE,
    WORDS,
    chat_rows,
    letters,
    words,
    write_rows,
)

pytest.importorskip("trl")
SYSTEM = [{"role": "system", "content": "red"}]
MULTIPLY = {"name": "multiply", "arguments": {"a": 2, "b": 3}}
CALL = {"id": "call00001", "type": "function", "function": MULTIPLY}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "multiply",
            "description": "Multiply.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
SHAREGPT = [
    {"from": "human", "value": "what is sky ?"},
    {"from": "gpt", "value": "blue"},
]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": QUESTION + ANSWER}, QUESTION + ANSWER),
        ({"prompt": QUESTION, "completion": ANSWER}, QUESTION + ANSWER),
        (
            {"instruction": "what is", "input": "sky ?", "output": "blue"},
            [{"role": "user", "content": "what is\n\nsky ?"}, *ANSWER],
        ),
        ({"instruction": "what is sky ?", "input": "", "output": "blue"}, QUESTION + ANSWER),
        (
            {"instruction": "what is", "context": "sky ?", "output": "blue"},
            [{"role": "user", "content": "what is\n\nsky ?"}, *ANSWER],
        ),
        (
            {
                "system_prompt": "be short",
                "conversations": SHAREGPT,
            },
            [{"role": "system", "content": "be short"}, *QUESTION, *ANSWER],
        ),
        (
            {"instruction": "what is sky ?", "output": "blue", "history": [["is", "red"]]},
            [
                {"role": "user", "content": "is"},
                {"role": "assistant", "content": "red"},
                *QUESTION,
                *ANSWER,
            ],
        ),
        ({"conversations": SHAREGPT}, QUESTION + ANSWER),
        ({"conversations": SHAREGPT, "system": "red"}, SYSTEM + QUESTION + ANSWER),
        ({"messages": SYSTEM + QUESTION + ANSWER, "system": "blue"}, SYSTEM + QUESTION + ANSWER),
        ({"messages": (QUESTION + ANSWER) * 2 + QUESTION}, (QUESTION + ANSWER) * 2),
        (
            {
                "messages": [
                    *QUESTION,
                    {"role": "model", "content": [{"type": "text", "text": "b"}]},
                ]
            },
            [*QUESTION, {"role": "assistant", "content": "b"}],
        ),
        (
            {
                "conversations": [
                    *SHAREGPT[:1],
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "3"},
                    {"from": "gpt", "value": "blue"},
                ]
            },
            [
                *QUESTION,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
                    ],
                },
                {"role": "tool", "content": "3"},
                *ANSWER,
            ],
        ),
    ],
)
def test_the_usual_columns_become_turns(row, messages, tmp_path):
    data = load_chat(write_rows(tmp_path / "chat.jsonl", [row] * 20), 0)
    assert {name: len(part) for name, part in data.items()} == {"train": 18, "test": 2}
    assert data["train"][0] == {"messages": messages}


def test_prompts_and_completions_of_text_stay_text(tmp_path):
    row = {"prompt": "what is sky ?", "completion": "blue"}
    data = load_chat(write_rows(tmp_path / "chat.jsonl", [row] * 20), 0)
    assert data["train"][0] == row


def test_tools_are_kept_as_they_are(tmp_path):
    """Also where other rows offer other tools, or none; arguments in JSON become a dict."""
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [
        {"messages": [*QUESTION, called], "tools": TOOLS},
        {"messages": QUESTION + ANSWER, "tools": '[{"name": "g"}]'},
        {"messages": QUESTION + ANSWER},
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", rows)
    data = load_chat(tmp_path, 0)["train"]
    assert data["tools"] == [TOOLS, [{"name": "g"}], None]
    assert data[0]["messages"][1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }


def test_arguments_and_tools_of_parquet_get_no_keys_of_other_rows(tmp_path):
    """Arrow gives every call all keys of all calls; nulls that a row writes as JSON stay."""

    def row(arguments):
        parameters = {"properties": {name: {"type": "string"} for name in arguments}}
        function = {"name": "f", "arguments": arguments}
        called = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
        tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
        return {"messages": [*QUESTION, called], "tools": tools}

    rows = [row({"city": "Paris"}), row({"street": "Rue", "flat": [{"door": 1}]})]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    write_rows(tmp_path / "test.jsonl", [row({"city": None}), *rows])
    data = load_chat(tmp_path, 0)
    for part, given in ((data["train"], rows), (data["test"], [row({"city": None}), *rows])):
        assert part["tools"] == [one["tools"] for one in given]
        calls = [turns[1]["tool_calls"][0]["function"] for turns in part["messages"]]
        assert calls == [one["messages"][1]["tool_calls"][0]["function"] for one in given]


def test_calls_of_tools_keep_the_number_that_their_answers_name(tmp_path):
    turns = [
        *QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "6", "tool_call_id": CALL["id"]},
        *ANSWER,
    ]
    file = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 2)
    assert load_chat(file, 0)["train"][0]["messages"] == turns


@pytest.mark.parametrize("written", [json.dumps, repr])  # pandas writes a list as Python does
@pytest.mark.parametrize(
    "row",
    [
        {"messages": QUESTION + ANSWER},
        {"Conversations": SHAREGPT},
        {"prompt": QUESTION, "completion": ANSWER},
        {"Prompt": QUESTION, "Completion": ANSWER},
    ],
)
def test_turns_in_the_cells_of_a_csv_file_are_turns(row, written, tmp_path):
    cells = {name: [written(turns)] * 20 for name, turns in row.items()}
    pandas.DataFrame(cells).to_csv(tmp_path / "chat.csv", index=False)
    data = load_chat(tmp_path / "chat.csv", 0)
    assert data["train"][0] == {"messages": QUESTION + ANSWER}


def test_cells_of_text_stay_text_also_if_they_look_like_json_or_numbers(tmp_path):
    rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": '[{"a": 1}]', "completion": "null"}]
    pandas.DataFrame(rows * 10).to_csv(tmp_path / "chat.csv", index=False)
    data = load_chat(tmp_path / "chat.csv", 0)
    found = {(row["prompt"], row["completion"]) for row in data["train"]}
    assert found == {(row["prompt"], row["completion"]) for row in rows}


GENERATION = (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% generation %}{{ m['content'] }} {% endgeneration %}"
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.mark.parametrize("template", [TEMPLATE, GENERATION], ids=["plain", "marked"])
@pytest.mark.parametrize("loss", ["all", "last"])
def test_a_turn_with_the_weight_0_is_not_learned(template, loss, tmp_path):
    """OpenAI's files mark the assistant's turns that are no example."""
    turns = [*QUESTION, {**ANSWER[0], "weight": 0}, *QUESTION]
    turns += [{"role": "assistant", "content": "red", "weight": 1}]
    data = load_chat(write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 20), 0)
    tokenizer = words()
    tokenizer.chat_template = template
    labels = learned_ids(data["train"][0], tokenizer, loss)["labels"]
    learned = tokenizer.decode([label for label in labels if label != IGNORED])
    assert "red" in learned
    assert "blue" not in learned


def test_a_turn_that_is_marked_not_to_train_is_not_learned(tmp_path):
    """As Axolotl's files mark it."""
    turns = [*QUESTION, {**ANSWER[0], "train": False}, *QUESTION]
    turns += [{"role": "assistant", "content": "red", "train": True}]
    data = load_chat(write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 20), 0)
    tokenizer = words()
    labels = learned_ids(data["train"][0], tokenizer, "all")["labels"]
    learned = tokenizer.decode([label for label in labels if label != IGNORED])
    assert "red" in learned
    assert "blue" not in learned


def test_roles_in_capital_letters_are_known(tmp_path):
    turns = [{"role": "User", "content": "what is sky ?"}, {"role": "ASSISTANT", "content": "blue"}]
    data = load_chat(write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 20), 0)
    assert data["train"][0]["messages"] == QUESTION + ANSWER


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": None}, "column output is None"),
        ({"instruction": "a", "output": "  "}, "column output is '  '"),
        ({"messages": []}, r"column messages is \[\]"),
        (
            {"messages": [*QUESTION, {**ANSWER[0], "weight": 0.5}]},
            "column messages, turn 2 has the weight 0.5; it must be 0 or 1",
        ),
        (
            {"messages": [*QUESTION, {**ANSWER[0], "train": "no"}]},
            "column messages, turn 2 has train 'no'; it must be true or false",
        ),
        (
            {"instruction": "a", "output": "b", "history": 7},
            r"column history, is 7; it must be a list of questions with answers",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c"]]},
            r"column history, has \['c'\]; it must be a question and its answer",
        ),
        ({"messages": None}, "column messages is None"),
        ({"messages": "hello"}, "column messages is not JSON: 'hello'"),
        ({"prompt": QUESTION, "completion": None}, "column completion is None"),
        ({"prompt": QUESTION, "completion": 4}, "column completion, is 4; it must be text, or a"),
        (
            {"messages": [*QUESTION, {"role": "assistant", "content": " "}]},
            "column messages, turn 2 is .*the assistant says nothing",
        ),
        (
            {"messages": [*QUESTION, {"role": "assistant", "content": None}]},
            "column messages, turn 2 is .*'role': 'assistant'}; needed are a role",
        ),
    ],
)
def test_rows_that_are_not_filled_are_refused_with_their_column(row, message, tmp_path):
    file = write_rows(tmp_path / "chat.jsonl", [row])
    with pytest.raises(ValueError, match=rf"chat\.jsonl \(train\), row 1, {message}"):
        load_chat(file, 0)


@pytest.mark.parametrize("completion", [None, "", " "])
def test_prompts_without_a_completion_are_refused(completion, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": completion}]
    file = write_rows(tmp_path / "chat.jsonl", rows)
    with pytest.raises(ValueError, match=rf"row 2, .* 'c' and {completion!r}; fill the row"):
        load_chat(file, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "blue"}, r"the columns with content are \['text'\]; needed are messages"),
        ({"messages": QUESTION}, "column messages: none of the 1 turns is the assistant's"),
        (
            {"messages": [*QUESTION, {"role": "robot", "content": "blue"}]},
            r"column messages, turn 2 is .*robot.*; needed are a role \(system",
        ),
        ({"messages": [{"role": "user"}, *ANSWER]}, "column messages, turn 1 is"),
        ({"messages": ["what", *ANSWER]}, "column messages, turn 1 is 'what'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, *ANSWER]},
            "turn 1 has content that is no text",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "f("}]},
            r"column conversations, turn 1 is not JSON: 'f\('",
        ),
        ({"messages": QUESTION + ANSWER, "tools": "f("}, r"column tools is not JSON: 'f\('"),
    ],
)
def test_bad_rows_are_refused_with_their_place(row, message, tmp_path):
    good = {"messages": QUESTION + ANSWER}
    file = write_rows(tmp_path / "chat.jsonl", [good, good, row])
    with pytest.raises(ValueError, match=rf"chat\.jsonl \(train\), row 3\W.*{message}"):
        load_chat(file, 0)


def test_a_broken_line_is_named(tmp_path):
    file = write_rows(tmp_path / "chat.jsonl", [{"messages": QUESTION + ANSWER}] * 2)
    file.write_text(file.read_text() + '{"messages": [{"role"')
    with pytest.raises(ValueError, match=r"chat\.jsonl, row 3, is not JSON"):
        load_chat(file, 0)


# Learned tokens


def learned(row, tokenizer, loss="all"):
    """The text of the tokens with labels, one text for each run of them."""
    ids = learned_ids(row, tokenizer, loss)
    runs = [[]]
    for token, label in zip(ids["input_ids"], ids["labels"]):
        if label == IGNORED:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


def test_all_answers_or_the_last_are_learned():
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    row = {"messages": SYSTEM + (QUESTION + ANSWER) * 2}
    assert learned(row, tokenizer) == ["blue ", "blue "]
    assert learned(row, tokenizer, "last") == ["blue "]
    ids = learned_ids(row, tokenizer, "last")["labels"]
    assert ids[-1] != IGNORED  # it is the last of the two
    plain = {"prompt": "sky is", "completion": " blue"}
    assert learned(plain, tokenizer) == [" blue<end>"]


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = CHATML.replace(
    "{{ m['content'] | trim }}<|stop|>",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}<|stop|>",
)
# thoughts of earlier turns are left out, and without a thought there is an empty one
THINKING = CHATML.replace(
    "{{ m['content'] | trim }}",
    "{% if m['role'] == 'assistant' and loop.last and '</t>' not in m['content'] %}<t></t>"
    "{% endif %}{{ m['content'] if loop.last else m['content'].split('</t>')[-1] }}",
)
TURNS = [
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": " a\n"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "a"},
]


@pytest.mark.parametrize(
    ("template", "answers", "found"),
    [
        (CHATML, (" a\n", "a"), ["a<|stop|>\n", "a<|stop|>\n"]),
        (CHATML.split("{% if add")[0], ("b", "a"), ["b<|stop|>\n", "a<|stop|>\n"]),
        (MARKED, ("b", "a"), ["b", "a"]),
        (THINKING, ("<t>x</t>b", "<t>y</t>a"), ["b<|stop|>\n", "<t>y</t>a<|stop|>\n"]),
        (THINKING, ("b", "a"), ["b<|stop|>\n", "<t></t>a<|stop|>\n"]),
    ],
)
def test_answers_are_found_where_the_template_puts_them(template, answers, found):
    """Equal content in other turns is not learned."""
    tokenizer = letters()
    tokenizer.chat_template = template
    turns = [dict(turn) for turn in TURNS]
    turns[1]["content"], turns[3]["content"] = answers
    assert learned({"messages": turns}, tokenizer) == found
    assert learned({"messages": turns}, tokenizer, "last") == found[1:]


def test_the_template_s_mark_is_used_where_it_has_one():
    """Also if it begins with the marker before the answer; the last answer is found within it."""
    tokenizer = letters()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}<|assistant|>"
        "{{ m['content'] }}<|stop|>{% endgeneration %}{% else %}<|user|>{{ m['content'] }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    row = {"messages": TURNS}
    assert learned(row, tokenizer) == ["<|assistant|> a\n<|stop|>", "<|assistant|>a<|stop|>"]
    assert learned(row, tokenizer, "last") == ["a<|stop|>"]
    assert left_out(row, tokenizer) == ""


def test_a_template_that_leaves_the_end_of_turn_unlearned_is_told(tokenizer):
    tokenizer = letters()
    tokenizer.chat_template = MARKED
    assert left_out({"messages": TURNS[:2]}, tokenizer) == "<|stop|>\n"
    tokenizer.chat_template = CHATML
    assert left_out({"messages": TURNS[:2]}, tokenizer) == ""


CONVERSATIONS = {
    "turns": TURNS,
    "thoughts": [
        TURNS[0],
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nso"},
        TURNS[2],
        {"role": "assistant", "content": "<think>\nok\n</think>\n\nhello"},
    ],
    "tools": [
        {"role": "user", "content": "what is 2*3"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "multiply", "content": "6"},
        {"role": "assistant", "content": "It is 6."},
        {"role": "user", "content": "thanks"},
        {"role": "assistant", "content": "welcome"},
    ],
}
# such as <|im_end|>, <think> and DeepSeek's markers with wide bars
MARKERS = re.compile(r"</?\|?[a-z_]+\|?>|<\|[A-Za-z_]+\|>|<[\uff5c|][^<>\s]{1,30}[\uff5c|]>")
_FOLDER = files("trl") / "chat_templates"
WITHOUT_TEXT = ("idefics3", "smolvlm")  # contents are lists of parts
MODELS = sorted(
    file.name.removesuffix("_training.jinja")
    for file in _FOLDER.iterdir()
    if file.name.endswith("_training.jinja") and not file.name.startswith(WITHOUT_TEXT)
)


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_what_the_template_itself_marks(name, kind):
    """Under the templates of the usual models, to which TRL added marks.

    A mark may begin earlier, with the generation prompt. Gemma's tool call ends with the marker of
    the tool's answer, which TRL leaves out.
    """
    tokenizer = letters()
    tokenizer.chat_template = (_FOLDER / f"{name}_training.jinja").read_text("utf-8")
    markers = sorted(set(MARKERS.findall(tokenizer.chat_template)))
    tokenizer.add_special_tokens({"extra_special_tokens": markers})
    messages = CONVERSATIONS[kind]
    try:
        shown = tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError) as error:
        pytest.skip(f"the template does not take it: {error}")
    if kind == "tools" and "multiply" not in shown:
        with pytest.raises(ValueError, match="does not show turn 2 of a conversation"):
            answer_spans(messages, ChatTemplate(tokenizer))
        return
    text, spans = answer_spans(messages, ChatTemplate(tokenizer))
    assert left_out({"messages": messages}, tokenizer) in ("", "<|tool_response>")
    turns = [turn for turn in messages if turn["role"] == "assistant"]
    for (start, end), turn in zip(spans, turns, strict=True):
        answer = turn["content"].split("</think>")[-1].strip() or "multiply"
        assert answer in text[start:end]


def test_rows_that_the_template_does_not_take_are_named(tokenizer, tmp_path):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    good = {"messages": QUESTION + ANSWER}
    twice = {"messages": QUESTION + QUESTION + ANSWER}
    write_rows(tmp_path / "train.jsonl", [good, twice])
    write_rows(tmp_path / "test.jsonl", [good])
    data = load_chat(tmp_path, 0)
    message = r"The train split, row 2: the chat template .*: roles must alternate\. Change or remo"
    with pytest.raises(ValueError, match=message):
        chat_recipe(tiny_llama(), tokenizer, data, 32)
    data["train"] = data["train"].select([1])
    with pytest.raises(ValueError, match="The train split, row 1: the chat template"):
        chat_recipe(tiny_llama(), tokenizer, data, 32)


@pytest.mark.parametrize("loss", ["all", "last"])
@pytest.mark.parametrize("template", [CHATML, MARKED, THINKING])
def test_turns_behind_the_cut_change_nothing_and_are_not_looked_for(template, loss, monkeypatch):
    tokenizer = letters()
    tokenizer.chat_template = template
    row = {"messages": TURNS * 5}
    whole = learned_ids(row, tokenizer, loss)
    for length in (1, 30, 80, len(whole["input_ids"]) - 1):
        cut = learned_ids(row, tokenizer, loss, length)
        assert {name: ids[:length] for name, ids in cut.items()} == {
            name: ids[:length] for name, ids in whole.items()
        }
    last = len(tokenizer.apply_chat_template(row["messages"], tokenize=False)) // 2
    assert len(answer_spans(row["messages"], ChatTemplate(tokenizer), last)[1]) < 8


def test_the_common_length_of_two_texts_is_counted():
    for one, other, length in [("", "a", 0), ("abc", "abd", 2), ("ab", "abc", 2), ("a", "a", 1)]:
        assert _common_length(one, other) == length
    generator = random.Random(0)
    for _ in range(200):
        one, other = ("".join(generator.choices("ab", k=9)) for _ in range(2))
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other))
        assert _common_length(one, other) == len([*same])


# Training


def test_long_rows_are_cut_and_rows_without_an_answer_left_out(tokenizer, tmp_path):
    long = {"messages": [{"role": "user", "content": "what " * 20}, *ANSWER]}
    write_rows(tmp_path / "train.jsonl", [*chat_rows(3), long])
    write_rows(tmp_path / "test.jsonl", chat_rows(1))
    data = load_chat(tmp_path, 0)
    with pytest.warns(UserWarning, match="1 of 4 rows of the train split have no answer in their"):
        recipe = chat_recipe(tiny_llama(), tokenizer, data, 10)
    assert len(recipe.train) == 3
    with pytest.raises(ValueError, match="No row of the train split has an answer in its first 3"):
        chat_recipe(tiny_llama(), tokenizer, data, 3)
    assert len(chat_recipe(tiny_llama(), tokenizer, data, None).train) == 4


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "completion": ANSWER},
        {"conversations": SHAREGPT},
        {"instruction": "what is sky ?", "output": "blue"},
    ],
    ids=["prompt and completion", "ShareGPT", "Alpaca"],
)
def test_data_in_memory_are_read_as_a_file_is(row, tokenizer, tmp_path):
    part = Dataset.from_list([row] * 4)
    file = tmp_path / "rows.jsonl"
    file.write_text((json.dumps(row) + "\n") * 4)
    model = tiny_llama()
    read = conversations(DatasetDict(train=part, test=part), "the data", 0)
    given = chat_recipe(model, tokenizer, read, 32)
    expected = chat_recipe(model, tokenizer, load_chat(file, 0), 32)
    assert given.train[0] == expected.train[0]
    again = conversations(DatasetDict(read), "the data", 0)  # rows that were read stay as they are
    assert again["train"].to_list() == read["train"].to_list()
    part = Dataset.from_list([{"messages": QUESTION}] * 4)
    with pytest.raises(ValueError, match=r"the data \(train\), row 1"):
        conversations(DatasetDict(train=part, test=part), "the data", 0)


def test_conversations_need_a_template_and_plain_text_none(tokenizer, tmp_path):
    tokenizer.chat_template = None
    conversations = load_chat(write_rows(tmp_path / "a.jsonl", chat_rows(20)), 0)
    with pytest.raises(ValueError, match=r"no chat template; set tokenizer\.chat_template"):
        chat_recipe(tiny_llama(), tokenizer, conversations, 32)
    rows = [{"prompt": "what is sky ?", "completion": "blue"}] * 20
    plain = load_chat(write_rows(tmp_path / "b.jsonl", rows), 0)
    assert len(chat_recipe(tiny_llama(), tokenizer, plain, 32).train) == 18


@pytest.mark.slow
@pytest.mark.parametrize("option", [None, "packing", "padding_free"])
def test_sft_learns_the_answers(option, tokenizer, tmp_path):
    """TRL trains on the answers alone, packed or not, until the loss is as low as it can get."""
    file = write_rows(tmp_path / "chat.jsonl", chat_rows(60))
    model = qrefta.prepare(tiny_llama(), rank=48, refine=0)
    options = {} if option is None else {option: True}
    args = training_arguments(
        "sft",
        tmp_path / "out",
        learning_rate=2e-2,
        max_steps=20,
        per_device_train_batch_size=8,
        max_length=32,
        gradient_checkpointing=option == "packing",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    result = qrefta.finetune(model, tokenizer, file, args=args, task="sft")
    assert result.accuracy_after is None
    assert result.test_loss < 2 < 4 < result.test_loss_before
    loaded = qrefta.load(tmp_path / "out")
    assert {"tokenizer.json", "README.md"} <= {path.name for path in (tmp_path / "out").iterdir()}
    ids = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        logits = loaded(ids["input_ids"]).logits[0, -1]
    assert logits[WORDS.index("blue")] > logits[WORDS.index("red")]


def test_sft_without_trl_names_the_extra_to_install(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    data = load_chat(write_rows(tmp_path / "chat.jsonl", chat_rows(20)), 0)
    with pytest.raises(ImportError, match="pip install trl"):
        chat_recipe(tiny_llama(), tokenizer, data, 32)


def test_text_with_a_history_or_a_system_message_is_a_conversation(tmp_path):
    rows = [{"prompt": "what is sky ?", "completion": "blue", "history": [], "system": ""}] * 3
    rows.append(rows[0] | {"history": [["is", "red"]], "system": "red"})
    data = load_chat(write_rows(tmp_path / "chat.jsonl", rows), 0)
    found = [row["messages"] for part in data.values() for row in part]
    earlier = [{"role": "user", "content": "is"}, {"role": "assistant", "content": "red"}]
    assert max(found, key=len) == SYSTEM + earlier + QUESTION + ANSWER
    assert found.count(QUESTION + ANSWER) == 3


def test_text_without_a_history_stays_text(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "history": [], "system": None}] * 4
    data = load_chat(write_rows(tmp_path / "chat.jsonl", rows), 0)
    assert data["train"].column_names == ["prompt", "completion"]
