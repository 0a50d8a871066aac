"""Language tasks: text by perplexity, questions by lm-evaluation-harness on the model in memory."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval.studies.accuracy import Cell, measure
from eval.tasks import language
from eval.tasks.language import choice_task, judge_choices, prompt_task, text_lm_task
from eval.tasks.task import NAMED, Named, Sizes

WORDS = [
    "the",
    "sky",
    "is",
    "blue",
    "grass",
    "green",
    "Answer",
    "format",
    ":",
    "/",
    "correct",
    "answer",
    "?",
    "red",
    "1",
    "2",
]
SIZES = Sizes(train=40, validation=10, test=12, length=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of whole words and digits."""
    folder = tmp_path_factory.mktemp("lm")
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits()]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "input.txt").write_text("the sky is blue the grass is green " * 200)
    return tmp_path


@pytest.fixture
def questions(tmp_path):
    for split, count in (("train", 60), ("test", 20)):
        rows = [
            {
                "instruction": f"the {thing} is ?\n\nAnswer format: blue/green",
                "input": "",
                "answer": color,
                "output": f"the correct answer is {color}",
            }
            for thing, color in [("sky", "blue"), ("grass", "green")] * (count // 2)
        ]
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    return tmp_path


def cell(method, rate=3e-2, steps=30, kind="score"):
    return Cell(
        kind,
        "mine",
        "tiny",
        method,
        rate,
        0,
        steps=steps,
        batch_size=8,
        train_rows=40,
        validation_rows=16,
        test_rows=24,
        max_length=16,
    )


def test_perplexity_is_the_exponential_of_the_mean_loss(folder, text):
    """Compared with the model's loss, block by block."""
    task = text_lm_task("mine", str(text), folder, None, SIZES, 0)
    row = measure(cell("head-only"), task)
    model = task.model(0).eval()
    with torch.no_grad():
        losses = [model(**task.collate([block])).loss.item() for block in task.test]
    assert row["metric"] == "perplexity"
    assert row["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert row["train_loss"] is row["peak_bytes"] is None
    assert row["trained_parameters"] == 0


@pytest.mark.parametrize("method", ["lora r=2", "refta R=8", "full"])
def test_training_lowers_perplexity(folder, text, method):
    task = text_lm_task("mine", str(text / "input.txt"), folder, None, SIZES, 0)
    assert measure(cell(method), task)["value"] < 0.9 * measure(cell("head-only"), task)["value"]


def test_text_is_cut_into_whole_blocks_that_do_not_overlap(folder, text):
    task = text_lm_task("mine", str(text), folder, None, SIZES, 0)
    assert [len(rows) for rows in (task.train, task.validation, task.test)] == [40, 10, 10]
    assert all(len(ids) == 16 for rows in (task.train, task.test) for ids in rows["input_ids"])


@pytest.mark.slow
def test_questions_are_learned_and_judged_by_the_harness(folder, questions):
    pytest.importorskip("lm_eval")
    task = choice_task("mine", str(questions), folder, None, SIZES, 0)
    row = measure(cell("full", steps=40), task)
    assert row["metric"] == "accuracy"
    assert row["value"] == 1
    row = measure(cell("windows R=16", rate=1e-2, steps=60), task)
    assert row["value"] > 0.5
    row = measure(cell("refta R=16", kind="search"), task)
    assert row["metric"] == "perplexity"  # the rate is chosen by the answers' loss
    assert row["value"] == pytest.approx(math.exp(row["loss"]))


LISTED = (
    "Choose: the {thing} is ? Answer1: blue Answer2: green red\n\nAnswer format: answer1/answer2"
)
NAMED_ANSWERS = {"blue": "answer1", "green": "answer2"}


def test_listed_options_are_answered_in_their_words(folder, questions):
    """The model sees no option, and its answer is the text of one."""
    for split in ("train", "test"):
        file = questions / f"{split}.json"
        rows = json.loads(file.read_text())
        for row in rows:
            thing = "sky" if "sky" in row["instruction"] else "grass"
            row["instruction"] = LISTED.format(thing=thing)
            row["answer"] = NAMED_ANSWERS[row["answer"]]
        file.write_text(json.dumps(rows))
    task = choice_task("mine", str(questions), folder, None, SIZES, 0)
    tokenizer = language.AutoTokenizer.from_pretrained(folder)
    for row in task.test:
        thing = "sky" if "sky" in row["question"] else "grass"
        assert row["question"] == f"Question: the {thing} is ?"
        assert row["choices"] == ["blue", "green red"]
        answer = "blue" if thing == "sky" else "green red"
        assert tokenizer.decode(row["input_ids"]).endswith(f": {answer}")


def test_the_harness_scores_the_most_likely_choice_per_byte(folder, questions):
    """Compared with sums of log probabilities, divided by the bytes of the choices."""
    pytest.importorskip("lm_eval")
    words = ("blue", "green red")
    for split in ("train", "test"):
        file = questions / f"{split}.json"
        file.write_text(file.read_text().replace("green", words[1]))
    task = choice_task("mine", str(questions), folder, None, SIZES, 0)
    model = task.model(0).float().eval()
    tokenizer = language.AutoTokenizer.from_pretrained(folder)
    right, loss = 0, 0.0
    for row in task.test:
        scores = []
        prompt = tokenizer(row["question"] + "\n\nthe correct answer is")["input_ids"]
        for choice in words:
            ids = torch.tensor([prompt + tokenizer(choice)["input_ids"]])
            with torch.no_grad():
                odds = model(ids).logits[0].log_softmax(-1)
            scores.append(
                sum(odds[at - 1, ids[0, at]].item() for at in range(len(prompt), ids.shape[1]))
            )
        best = max(range(2), key=lambda at: scores[at] / len(words[at]))
        right += best == row["target"]
        loss -= scores[row["target"]]
    judged = judge_choices(model, task.test, tokenizer)
    assert 0 < judged.accuracy == pytest.approx(right / len(task.test))
    assert judged.loss == pytest.approx(loss / len(task.test), rel=1e-4)


def test_labels_are_on_the_answer_alone(folder, questions):
    task = choice_task("mine", str(questions), folder, None, SIZES, 0)
    batch = task.collate([task.train[0], task.train[1]])
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        counted = labels[labels != language.IGNORED]
        assert len(counted) == 5  # the correct answer is blue
        assert torch.equal(counted, ids[labels != language.IGNORED])


def test_a_folder_of_question_sets_is_one_task_with_equal_shares(folder, questions, tmp_path):
    union = tmp_path / "union"
    for name, answer in (("a", "blue"), ("b", "green")):
        (union / name).mkdir(parents=True)
        for split in ("train", "test"):
            rows = json.loads((questions / f"{split}.json").read_text())
            kept = [row for row in rows if row["answer"] == answer]
            (union / name / f"{split}.json").write_text(json.dumps(kept))
    (union / "untrained").mkdir()
    (union / "untrained" / "test.json").write_text("[]")
    task = choice_task("mine", str(union), folder, None, SIZES, 0)
    for rows, count in ((task.test, 12), (task.train, 40)):
        answers = rows["target"]
        assert len(answers) == count
        assert abs(answers.count(0) - count / 2) <= 5  # 10 of 50 drawn rows validate
    assert task.train["target"] != sorted(task.train["target"])


def test_a_classification_is_a_prompt_with_answers_in_words(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(NAMED, "mine", Named(answers=("red", "blue")))
    for name in ("train", "dev", "test-labeled"):
        lines = [f"the sky {at % 2}\t{at % 2}" for at in range(60 if name == "train" else 6)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    task = prompt_task("mine", str(tmp_path), folder, None, SIZES, 0)
    assert len(task.test) == 12  # 6 of dev and 6 of test-labeled
    for row in task.test:
        assert row["question"].endswith("\n\nAnswer format: red/blue")
        assert row["choices"] == ["red", "blue"]
        assert row["target"] == ("the sky 1" in row["question"])
    with pytest.raises(ValueError, match="other has 2 classes and 0 answers"):
        prompt_task("other", str(tmp_path), folder, None, SIZES, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"instruction": "a"}, r"must be a JSON list of \{instruction, answer\} with at"),
        ([], "must be a JSON list"),
        ([{"instruction": "Answer format: a/b"}], "row 0: .*missing: answer"),
        ([{"instruction": "why?", "answer": "a"}], "row 0: .*missing: Answer format"),
        (
            [{"instruction": "Answer format: a/b", "answer": "c"}],
            "row 0: answer is 'c'; allowed are a, b",
        ),
        (
            [{"instruction": "Answer format: a/b", "answer": "a"}],
            "1 training rows and 10 are put aside",
        ),
    ],
)
def test_questions_that_cannot_be_used_are_refused(folder, tmp_path, content, message):
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        choice_task("mine", str(tmp_path), folder, None, SIZES, 0)


def test_missing_files_are_named(folder, tmp_path, text):
    with pytest.raises(ValueError, match=r"train\.json is missing"):
        choice_task("mine", str(tmp_path / "none"), folder, None, SIZES, 0)
    with pytest.raises(ValueError, match="must be a text file, or a folder"):
        text_lm_task("mine", str(tmp_path / "none"), folder, None, SIZES, 0)
    with pytest.raises(ValueError, match=r"mine needs a causal language model.*--model"):
        text_lm_task("mine", str(text), None, None, SIZES, 0)
    (tmp_path / "input.txt").write_text("the sky")
    with pytest.raises(ValueError, match="0 training and 0 test blocks of 16 tokens"):
        text_lm_task("mine", str(tmp_path), folder, None, SIZES, 0)
