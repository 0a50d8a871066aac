"""Run the Python blocks of a Markdown page, with small models instead of its hub names."""

import json
import re
from pathlib import Path

from tests.language import language_model
from tests.models import language_tokenizer, tiny_llama
from tests.tiny import tiny_folder

ROOT = Path(__file__).parents[1]
CLASSIFIER = "sentence-transformers/all-MiniLM-L6-v2"
LANGUAGE_MODEL = "meta-llama/Llama-3.2-1B"
CHAT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"  # its tokenizer is one that GGUF files hold
PYTHON_BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)


def small_models(root):
    """Folders with small models, by the hub name that they stand for."""
    tiny_folder(root / "classifier", width=64)
    tiny_llama(hidden=64).save_pretrained(root / "language")
    language_tokenizer().save_pretrained(root / "language")
    for part in language_model("qwen2"):
        part.save_pretrained(root / "chat")
    return {
        CLASSIFIER: str(root / "classifier"),
        LANGUAGE_MODEL: str(root / "language"),
        CHAT_MODEL: str(root / "chat"),
    }


def write_data(folder):
    """The data files that the pages name."""
    turns = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    (folder / "more.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    pair = {"prompt": turns[:1], "chosen": turns[1:]}
    pair["rejected"] = [{"role": "assistant", "content": "w9"}]
    (folder / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 20)
    question = {"question": "w5 w6", "answer": "w7"}
    (folder / "questions.jsonl").write_text((json.dumps(question) + "\n") * 20)
    reviews = [f"{'red' if index % 2 else 'blue'} film {index},{index % 2}" for index in range(40)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *reviews]))
    words = [f"w{5 + index % 20}" for index in range(1000)]
    lines = [" ".join(words[start : start + 20]) for start in range(0, len(words), 20)]
    (folder / "train.txt").write_text("\n".join(lines))


def run_blocks(text, folders):
    """Run the Python blocks in one namespace, in order; return how many there were."""
    namespace = {}
    blocks = PYTHON_BLOCK.findall(text)
    for block in blocks:
        for name, folder in folders.items():
            block = block.replace(name, folder)
        exec(block, namespace)
    return len(blocks)
