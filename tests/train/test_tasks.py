"""What each task reads and makes batches of, and that each trains."""

import json
import sys

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTForImageClassification, ViTImageProcessor
from typer.testing import CliRunner

import qrefta
from qrefta.cli import app
from qrefta.train.tasks import chat, images, language_model, load_chat, load_images, load_text
from tests.models import build, tiny_llama, tiny_vit

WORDS = [
    "[UNK]",
    "[PAD]",
    "[EOS]",
    "user",
    "assistant",
    "system",
    ":",
    "what",
    "is",
    "red",
    "blue",
    "sky",
    "blood",
    "?",
]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
ASKED, ANSWER = (
    [{"role": "user", "content": "what is sky ?"}],
    [{"role": "assistant", "content": "blue"}],
)


@pytest.fixture
def tokenizer():
    words = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]"
    )
    fast.chat_template = TEMPLATE
    return fast


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chat_rows(count):
    """Questions about two things, with one right answer each."""
    colors = [("sky", "blue"), ("blood", "red")]
    return [
        {
            "messages": [
                {"role": "user", "content": f"what is {thing} ?"},
                {"role": "assistant", "content": color},
            ]
        }
        for thing, color in (colors[index % 2] for index in range(count))
    ]


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"messages": ASKED + ANSWER}, ASKED, ANSWER),
        ({"prompt": ASKED, "completion": ANSWER}, ASKED, ANSWER),
        ({"prompt": "what is sky ?", "completion": "blue"}, "what is sky ?", "blue"),
        ({"instruction": "what is", "input": "sky ?", "output": "blue"},
         [{"role": "user", "content": "what is\n\nsky ?"}], ANSWER),
        ({"instruction": "what is sky ?", "input": "", "output": "blue"}, ASKED, ANSWER),
        ({"conversations": [{"from": "system", "value": "red"}, {"from": "human", "value": "what is sky ?"},
                            {"from": "gpt", "value": "blue"}]},
         [{"role": "system", "content": "red"}, *ASKED], ANSWER),
    ],
)  # fmt: skip
def test_the_usual_columns_become_prompt_and_completion(row, prompt, completion, tmp_path):
    data = load_chat(write_rows(tmp_path / "chat.jsonl", [row] * 20), 0)
    assert {name: len(part) for name, part in data.items()} == {"train": 18, "test": 2}
    assert data["train"][0] == {"prompt": prompt, "completion": completion}


def test_of_several_turns_the_last_answer_is_learned(tmp_path):
    data = load_chat(
        write_rows(tmp_path / "chat.jsonl", [{"messages": (ASKED + ANSWER) * 2}] * 4), 0
    )
    assert data["train"][0] == {"prompt": ASKED + ANSWER + ASKED, "completion": ANSWER}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "blue"}, r"columns \['text'\] and 0 turns; needed are prompt and completion"),
        ({"messages": ANSWER + ASKED}, "the last is the assistant's"),
        ({"messages": ANSWER}, "1 turns"),
        (
            {"messages": [{"role": "robot", "content": "blue"}] * 2},
            r"A turn is .*robot.*; needed are a role \(human",
        ),
        ({"messages": [{"role": "user"}, {"role": "assistant"}]}, "A turn is"),
    ],
)
def test_other_rows_are_refused(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_chat(write_rows(tmp_path / "chat.jsonl", [row] * 4), 0)


def test_conversations_need_a_template_and_plain_text_none(tokenizer, tmp_path):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template; set tokenizer\.chat_template"):
        chat(
            tiny_llama(),
            tokenizer,
            load_chat(write_rows(tmp_path / "a.jsonl", chat_rows(20)), 0),
            32,
        )
    rows = [{"prompt": "what is sky ?", "completion": "blue"}] * 20
    assert (
        len(
            chat(
                tiny_llama(), tokenizer, load_chat(write_rows(tmp_path / "b.jsonl", rows), 0), 32
            ).train
        )
        == 18
    )


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_text_is_cut_into_blocks_across_texts(tokenizer, suffix, tmp_path):
    """Every token once, in order, with an end after each text; what fills no block is left out."""
    texts = ["what is sky ?", "blue", "what is blood ?", "red"] * 10
    for split, part in (("train", texts), ("test", texts[:8])):
        file = tmp_path / f"{split}.{suffix}"
        if suffix == "txt":
            file.write_text("\n".join(part))
        else:
            write_rows(file, [{"content": text} for text in part])
    ids = [
        token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    ]
    for length in (7, 10):
        recipe = language_model(tiny_llama(), tokenizer, load_text(tmp_path, 0), length)
        found = [token for block in recipe.train["input_ids"] for token in block]
        assert found == ids[: len(ids) // length * length]
        assert recipe.train["labels"] == recipe.train["input_ids"]
    assert len(ids) % 10 == 0  # the last block is whole
    with pytest.raises(
        ValueError,
        match="The test split has less than 64 tokens; give more text or less max_length",
    ):
        language_model(tiny_llama(), tokenizer, load_text(tmp_path, 0), 64)


@pytest.fixture
def pictures(tmp_path):
    """Two classes of plain pictures, in folders."""
    for split, count in (("train", 12), ("test", 4)):
        for color in ("red", "blue"):
            folder = tmp_path / split / color
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (20, 24), (color, (200 + index, 0, 0))[color == "red"]).save(
                    folder / f"{index}.png"
                )
    return tmp_path


def test_pictures_come_from_folders(pictures):
    """Grey ones too, as three equal channels."""
    Image.new("L", (20, 24), 90).save(pictures / "train" / "blue" / "0.png")
    data = load_images(pictures, 0)
    assert {name: len(part) for name, part in data.items()} == {"train": 24, "test": 8}
    model = tiny_vit()
    with pytest.raises(ValueError, match="3 labels and the data 2 classes"):
        images(model, ViTImageProcessor(size={"height": 16, "width": 16}), data)
    model.config.num_labels = 2
    recipe = images(model, ViTImageProcessor(size={"height": 16, "width": 16}), data)
    batch = recipe.collate([recipe.train[0], recipe.train[23]])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["labels"].tolist() == [0, 1]
    assert torch.isfinite(batch["pixel_values"]).all()


def test_a_folder_without_classes_is_refused(tmp_path):
    for index in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{index}.png")
    with pytest.raises(ValueError, match="needed are image, and label with classes"):
        load_images(tmp_path, 0)


# Training


def test_sft_learns_the_answers(tokenizer, tmp_path):
    """Through the harness of TRL: loss on answers alone falls to nothing, packed or not."""
    file = write_rows(tmp_path / "chat.jsonl", chat_rows(60))
    for packing in (False, True):
        model = qrefta.prepare(tiny_llama(), rank=48)
        result = qrefta.finetune(
            model, tokenizer, file, tmp_path / str(packing), task="sft", packing=packing, learning_rate=2e-2,
            max_steps=40, batch_size=8, max_length=32, save_steps=1.0, progress=False,
        )  # fmt: skip
        assert result.accuracy_after is None
        assert (
            result.test_loss < 2 < 4 < result.test_loss_before
        )  # its small frozen head allows no less than 1.6
    loaded = qrefta.load(tmp_path / "False")
    assert {"tokenizer.json", "README.md"} <= {path.name for path in (tmp_path / "False").iterdir()}
    ids = tokenizer.apply_chat_template(
        ASKED, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        logits = loaded(ids["input_ids"]).logits[0, -1]
    blue, red = (logits[WORDS.index(word)] for word in ("blue", "red"))
    assert blue > red


def test_running_text_is_learned(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("what is sky ? blue\n" * 200)
    model = qrefta.prepare(tiny_llama(), rank=48)
    result = qrefta.finetune(
        model, tokenizer, tmp_path / "text.txt", tmp_path / "out", task="lm", learning_rate=2e-2, max_steps=40,
        batch_size=8, max_length=16, save_steps=1.0, progress=False,
    )  # fmt: skip
    assert result.test_loss < 2.1 < 4 < result.test_loss_before


def test_pictures_are_learned_by_the_command(pictures, tmp_path):
    config = tiny_vit().config
    config.num_labels = 2
    build(ViTForImageClassification, config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    command = ["finetune", tmp_path / "vit", pictures, tmp_path / "out", "--task", "image", "--rank", 12, "--max-steps",
               20, "--batch-size", 8, "--learning-rate", 0.01]  # fmt: skip
    shown = CliRunner().invoke(app, [str(part) for part in command], catch_exceptions=False)
    assert shown.exit_code == 0
    assert "100.0%" in shown.output
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_dpo_trains_a_model_that_came_from_a_folder(tokenizer, tmp_path):
    """TRL loads the reference from the same folder; preferred answers win."""
    from trl import DPOConfig, DPOTrainer

    model = qrefta.prepare(tiny_llama(), rank=48)
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    other = {"blue": "red", "red": "blue"}
    rows = [
        {"prompt": row["messages"][:-1], "chosen": row["messages"][-1:],
         "rejected": [{"role": "assistant", "content": other[row["messages"][-1]["content"]]}]}
        for row in chat_rows(40)
    ]  # fmt: skip
    arguments = DPOConfig(
        tmp_path / "out", max_steps=12, per_device_train_batch_size=8, learning_rate=1e-2, max_length=32,
        report_to="none", disable_tqdm=True, use_cpu=True, bf16=False, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    loaded = qrefta.load(tmp_path / "start")
    trainer = DPOTrainer(
        loaded, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.6 < losses[0]


def test_an_unknown_task_is_refused(tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match="task is 'chat'; it must be one of classify, lm, sft, image"
    ):
        qrefta.finetune(tiny_llama(), tokenizer, "x", tmp_path, task="chat")


def test_sft_without_trl_says_what_to_install(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    data = load_chat(write_rows(tmp_path / "chat.jsonl", chat_rows(20)), 0)
    with pytest.raises(ImportError, match="pip install trl"):
        chat(tiny_llama(), tokenizer, data, 32)
