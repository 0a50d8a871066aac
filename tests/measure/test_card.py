"""The section of the model card: added, replaced, and nothing else touched."""

from dataclasses import replace
from functools import partial

import pytest
from huggingface_hub import ModelCard
from transformers import LlamaForCausalLM

import qrefta
from qrefta.measure.card import check_card, write_comparison
from qrefta.measure.compare import TextComparison
from qrefta.model.prepared import prepared_config
from qrefta.model_card import write_card
from tests.kill import killed_while_writing

COMPARISON = TextComparison(
    model="mine",
    reference="base/model",
    text="wikitext2/test.txt",
    window=512,
    windows=20,
    tokens=10220,
    perplexity=35.158,
    perplexity_stderr=162.4,
    reference_perplexity=29.6017,
    reference_perplexity_stderr=None,
    kl_mean=0.23744,
    kl_stderr=0.004587,
    kl_median=0.1899,
    kl_99=1.1529,
    kl_999=2.5836,
    agreement=0.7112,
    flips=0.0903,
)
ROW = (
    "| wikitext2/test.txt | 10,220 | 20 | 35.16 ± 160 | 29.6 | 0.2374 ± 0.0046 | 0.19 | 1.15 "
    "| 2.58 | 71.1% | 9.0% |"
)


@pytest.fixture
def card(folder, tmp_path):
    """The card of a prepared model."""
    model = qrefta.prepare(
        LlamaForCausalLM.from_pretrained(folder), rank=2, refine=0, progress=False
    )
    write_card(tmp_path, prepared_config(model))
    return tmp_path / "README.md"


def test_the_section_is_added_once_and_then_replaced(card):
    before = card.read_text()
    write_comparison(card.parent, [COMPARISON])
    first = card.read_text()
    assert first.startswith(before.rstrip())
    assert "## Kept of the base model" in first
    assert "Compared with base/model on texts, in windows of 512 tokens." in first
    assert ROW in first.splitlines()
    write_comparison(card.parent, [COMPARISON])
    assert card.read_text() == first
    write_comparison(str(card.parent), [replace(COMPARISON, tokens=5), COMPARISON])
    second = card.read_text()
    assert second.count("## Kept of the base model") == 1
    assert second.count("| wikitext2/test.txt |") == 2
    assert "tags" in ModelCard.load(card).data.to_dict()


def test_the_file_of_a_killed_process_is_removed(card, monkeypatch):
    killed_while_writing(partial(write_comparison, card.parent, [COMPARISON]), monkeypatch)
    assert len(list(card.parent.iterdir())) == 2
    write_comparison(card.parent, [COMPARISON])
    assert list(card.parent.iterdir()) == [card]


def test_other_text_stays_byte_by_byte(card):
    write_comparison(card.parent, [COMPARISON])
    content = card.read_bytes()
    content = content.replace(b"## Use", b"My words.\r\n\r\n## Use") + b"\n\n# Mine  \r\n"
    card.write_bytes(content)
    write_comparison(card.parent, [replace(COMPARISON, tokens=77)])
    assert card.read_bytes() == content.replace(b"| 10,220 |", b"| 77 |")


def test_a_bar_in_a_name_does_not_break_the_table(card):
    write_comparison(card.parent, [replace(COMPARISON, text="a|b.txt")])
    assert "| a&#124;b.txt | 10,220 |" in card.read_text()


def test_a_folder_without_such_a_card_is_refused(tmp_path):
    for content in (None, "# Mine\n", "---\ntags:\n- other\n---\n", "---\ntags: [\n---\n"):
        if content is not None:
            (tmp_path / "README.md").write_text(content)
        with pytest.raises(ValueError, match="no model card by qrefta"):
            check_card(tmp_path)
        with pytest.raises(ValueError, match="no model card by qrefta"):
            write_comparison(tmp_path, [COMPARISON])


@pytest.mark.parametrize("removed", ["<!-- kept", "<!-- end of kept"])
def test_half_a_section_is_refused_and_kept(removed, card):
    write_comparison(card.parent, [COMPARISON])
    card.write_text(card.read_text().replace(f"{removed} of the base model -->", ""))
    before = card.read_text()
    with pytest.raises(ValueError, match="remove both comments"):
        write_comparison(card.parent, [COMPARISON])
    assert card.read_text() == before


@pytest.mark.parametrize("comment", ["kept of the base model", "end of kept of the base model"])
@pytest.mark.parametrize("place", ["## Use", "\n| wikitext2"])
def test_a_second_comment_is_refused(comment, place, card):
    """It is not clear which text lies between the comments."""
    write_comparison(card.parent, [COMPARISON])
    card.write_text(card.read_text().replace(place, f"<!-- {comment} -->\n{place}"))
    before = card.read_text()
    with pytest.raises(ValueError, match="remove both comments"):
        write_comparison(card.parent, [COMPARISON])
    assert card.read_text() == before


@pytest.mark.parametrize(
    "comparisons",
    [[], [replace(COMPARISON, reference=None)], [COMPARISON, replace(COMPARISON, reference="b")]],
)
def test_only_comparisons_with_one_reference_are_shown(comparisons, card):
    before = card.read_text()
    with pytest.raises(ValueError, match="comparisons with one reference"):
        write_comparison(card.parent, comparisons)
    assert card.read_text() == before
