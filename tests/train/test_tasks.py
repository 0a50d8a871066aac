"""The data and batches of every task, and a training run of each."""

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
from qrefta.train.arguments import training_arguments
from qrefta.train.tasks import load_chat, load_images
from qrefta.train.tasks.chat import chat_recipe
from qrefta.train.tasks.image import image_classes
from tests.models import build, tiny_llama, tiny_vit

WORDS = ["[UNK]", "[PAD]", "[EOS]", "user", "assistant", "system", ":"]
WORDS += ["what", "is", "red", "blue", "sky", "blood", "?"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
QUESTION = [{"role": "user", "content": "what is sky ?"}]
ANSWER = [{"role": "assistant", "content": "blue"}]
SHAREGPT = [
    {"from": "system", "value": "red"},
    {"from": "human", "value": "what is sky ?"},
    {"from": "gpt", "value": "blue"},
]


@pytest.fixture
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
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
    """Questions about two things, each with one right answer."""
    rows = []
    for index in range(count):
        thing, color = [("sky", "blue"), ("blood", "red")][index % 2]
        question = {"role": "user", "content": f"what is {thing} ?"}
        rows.append({"messages": [question, {"role": "assistant", "content": color}]})
    return rows


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"messages": QUESTION + ANSWER}, QUESTION, ANSWER),
        ({"prompt": QUESTION, "completion": ANSWER}, QUESTION, ANSWER),
        ({"prompt": "what is sky ?", "completion": "blue"}, "what is sky ?", "blue"),
        (
            {"instruction": "what is", "input": "sky ?", "output": "blue"},
            [{"role": "user", "content": "what is\n\nsky ?"}],
            ANSWER,
        ),
        ({"instruction": "what is sky ?", "input": "", "output": "blue"}, QUESTION, ANSWER),
        (
            {"conversations": SHAREGPT},
            [{"role": "system", "content": "red"}, *QUESTION],
            ANSWER,
        ),
    ],
)
def test_the_usual_columns_become_prompt_and_completion(row, prompt, completion, tmp_path):
    data = load_chat(write_rows(tmp_path / "chat.jsonl", [row] * 20), 0)
    assert {name: len(part) for name, part in data.items()} == {"train": 18, "test": 2}
    assert data["train"][0] == {"prompt": prompt, "completion": completion}


def test_of_several_turns_the_last_answer_is_learned(tmp_path):
    rows = [{"messages": (QUESTION + ANSWER) * 2}] * 4
    data = load_chat(write_rows(tmp_path / "chat.jsonl", rows), 0)
    assert data["train"][0] == {"prompt": QUESTION + ANSWER + QUESTION, "completion": ANSWER}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "blue"}, r"columns \['text'\] and 0 turns; needed are prompt and completion"),
        ({"messages": ANSWER + QUESTION}, "the last is the assistant's"),
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
    conversations = load_chat(write_rows(tmp_path / "a.jsonl", chat_rows(20)), 0)
    with pytest.raises(ValueError, match=r"no chat template; set tokenizer\.chat_template"):
        chat_recipe(tiny_llama(), tokenizer, conversations, 32)
    rows = [{"prompt": "what is sky ?", "completion": "blue"}] * 20
    plain = load_chat(write_rows(tmp_path / "b.jsonl", rows), 0)
    assert len(chat_recipe(tiny_llama(), tokenizer, plain, 32).train) == 18


@pytest.fixture
def pictures(tmp_path):
    """Two classes of one-colored images, in folders."""
    for split, count in (("train", 12), ("test", 4)):
        for name in ("red", "blue"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                color = (200 + index, 0, 0) if name == "red" else name
                Image.new("RGB", (20, 24), color).save(folder / f"{index}.png")
    return tmp_path


def test_pictures_come_from_folders(pictures):
    """Grey images get three equal channels."""
    Image.new("L", (20, 24), 90).save(pictures / "train" / "blue" / "0.png")
    data = load_images(pictures, 0)
    assert {name: len(part) for name, part in data.items()} == {"train": 24, "test": 8}
    model = tiny_vit()
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match="3 labels and the data 2 classes"):
        image_classes(model, processor, data)
    model.config.num_labels = 2
    recipe = image_classes(model, processor, data)
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
    """TRL trains on the answers alone, packed or not, until the loss is as low as it can get."""
    file = write_rows(tmp_path / "chat.jsonl", chat_rows(60))
    for packing in (False, True):
        model = qrefta.prepare(tiny_llama(), rank=48, refine=0)
        args = training_arguments(
            "sft",
            tmp_path / str(packing),
            packing=packing,
            learning_rate=5e-2,
            max_steps=20,
            per_device_train_batch_size=8,
            max_length=32,
            gradient_checkpointing=packing,
            save_strategy="no",
            disable_tqdm=True,
        )
        result = qrefta.finetune(model, tokenizer, file, args=args, task="sft")
        assert result.accuracy_after is None
        assert result.test_loss < 2 < 4 < result.test_loss_before  # 1.6 is the frozen head's least
    loaded = qrefta.load(tmp_path / "False")
    assert {"tokenizer.json", "README.md"} <= {path.name for path in (tmp_path / "False").iterdir()}
    ids = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        logits = loaded(ids["input_ids"]).logits[0, -1]
    assert logits[WORDS.index("blue")] > logits[WORDS.index("red")]


def test_running_text_is_learned(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("what is sky ? blue\n" * 200)
    model = qrefta.prepare(tiny_llama(), rank=48, refine=0)
    args = training_arguments(
        "lm",
        tmp_path / "out",
        learning_rate=3e-2,
        max_steps=24,
        per_device_train_batch_size=8,
        save_strategy="no",
        disable_tqdm=True,
    )
    result = qrefta.finetune(model, tokenizer, file, args=args, task="lm", max_length=16)
    assert result.test_loss < 2.1 < 4 < result.test_loss_before


def test_images_are_learned_by_the_command(pictures, tmp_path):
    config = tiny_vit().config
    config.num_labels = 2
    build(ViTForImageClassification, config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    paths = [str(path) for path in (tmp_path / "vit", pictures, tmp_path / "out")]
    options = "--task image --rank 12 --refine 0 --max-steps 20 --batch-size 8 --learning-rate 0.01"
    command = ["finetune", *paths, *options.split()]
    shown = CliRunner().invoke(app, command, catch_exceptions=False)
    assert shown.exit_code == 0
    assert "100.0%" in shown.output
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


# TRL 1.16 switches checkpointing on and off by its old names
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
def test_dpo_trains_a_model_that_came_from_a_folder(tokenizer, tmp_path):
    """TRL loads the reference from the same folder; preferred answers win."""
    from trl import DPOConfig, DPOTrainer

    model = qrefta.prepare(tiny_llama(), rank=48, refine=0)
    model.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    other = {"blue": "red", "red": "blue"}
    rows = []
    for row in chat_rows(40):
        *prompt, chosen = row["messages"]
        rejected = {"role": "assistant", "content": other[chosen["content"]]}
        rows.append({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    arguments = DPOConfig(
        tmp_path / "out",
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_length=32,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
    )
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


def test_sft_without_trl_names_the_extra_to_install(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    data = load_chat(write_rows(tmp_path / "chat.jsonl", chat_rows(20)), 0)
    with pytest.raises(ImportError, match="pip install trl"):
        chat_recipe(tiny_llama(), tokenizer, data, 32)
