"""The pages under docs are true: their code runs, in order, and what is generated is current."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import VOCAB, tiny_llama
from tests.tiny import tiny_folder

ROOT = Path(__file__).parents[1]
CLASSIFIER, LANGUAGE_MODEL = "sentence-transformers/all-MiniLM-L6-v2", "meta-llama/Llama-3.2-1B"
ELSEWHERE = {"add-a-method.md", "distributed.md"}  # run by test_methods.py and test_distributed.py
PAGES = sorted(
    {page.name for page in (ROOT / "docs").glob("*.md") if "```python" in page.read_text()}
    - ELSEWHERE
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models under the names that the pages use."""
    root = tmp_path_factory.mktemp("models")
    tiny_folder(root / "classifier", width=64)
    tiny_llama(hidden=64).save_pretrained(root / "language")
    vocabulary = {f"w{index}": index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", pad_token="w1", eos_token="w2"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(root / "language")
    return {CLASSIFIER: str(root / "classifier"), LANGUAGE_MODEL: str(root / "language")}


# the pages use the name that all supported releases of transformers have; TRL's configs do too
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order(page, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8"}]
    Path("chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20)
    namespace = {}
    for block in re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL
    ):
        for name, folder in folders.items():
            block = block.replace(name, folder)
        exec(block, namespace)


def test_links_between_pages_lead_somewhere():
    for page in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
