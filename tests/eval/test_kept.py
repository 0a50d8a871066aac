"""How much of a model its bases keep: titles, tables, pictures and verdicts follow the rows."""

import pytest
from scipy.stats import spearmanr

from eval.peers.bases import TEXT, UNCALIBRATED, Base, sets_of_bases
from eval.report import kept
from eval.report.kept import ORDERED, ROUNDED, SHAKESPEARE, TARGETS, WIKITEXT, front, groups
from eval.report.report import encoder_sections, language_sections, run, sections
from eval.report.summary import summary
from eval.report.verdicts import FAILS, HOLDS, IN_PART, UNDECIDED, verdicts
from eval.tasks.smollm2 import NAME
from tests.eval.test_report_page import CONTEXT, cost_rows, write

PLAIN = Base("bitsandbytes")
DEFAULT = UNCALIBRATED()
BASES = {
    PLAIN: 0.267,
    Base("gptq-ordered", calibration=TEXT): 0.15,
    Base("qera", 64, TEXT): 0.2,
    DEFAULT: 0.23,
    ORDERED: 0.11,
    ROUNDED: 0.11,
    ROUNDED._replace(rank=64, refine=1): 0.085,
    ROUNDED._replace(double_quant=True): 0.12,
}
BITS = {0: 4.5, 64: 4.6}


def row_of(base, divergence, weight_error=None, model=NAME, tokens=2048):
    """A row of a language model; the second text has 1.4 times the divergence of the first."""
    texts = [
        {
            "text": text,
            "kl_mean": divergence * factor,
            "kl_stderr": 0.005,
            "kl_99": 3.0,
            "agreement": 0.7,
            "flips": 0.1,
            "perplexity": 35.0,
        }
        for text, factor in ((WIKITEXT, 1), (SHAKESPEARE, 1.4))
    ]
    settings = {"rounding": base.rounding} if base.maker == "qrefta" else None
    return (
        CONTEXT
        | {"study": "kld", "kind": "language", "model": model, "tokens": tokens, "window": 256}
        | {"measured": [WIKITEXT, SHAKESPEARE], "texts": texts, "settings": settings}
        | {"bits_per_weight": 4.128 if base.double_quant else BITS[base.rank], "seconds": 60.0}
        | {"weight_error": weight_error or divergence, "output_error": divergence}
        | base._asdict()
    )


def rows_of(changes=None, **options):
    return [row_of(base, value, **options) for base, value in (BASES | (changes or {})).items()]


def encoder_row(base, cosine):
    row = row_of(base, 0.1, model="mini")
    del row["tokens"], row["window"], row["texts"]
    return row | {
        "kind": "encoder",
        "measured": ["sst2/dev.tsv"],
        "sentences": 872,
        "cosine_mean": cosine,
        "cosine_stderr": 0.0001,
        "cosine_1": cosine - 0.02,
        "cosine_least": cosine - 0.05,
    }


def word(claim, rows):
    (found,) = [one for one in verdicts({"kld": rows}) if claim in one.claim]
    return found.word


def test_the_title_names_the_best_base_and_the_best_of_the_other_side():
    (group,) = groups(rows_of(), "language")
    assert kept.title(group) == (
        "With at most 4.5 bits a weight qrefta NF4 searched sequential calibrated keeps most of "
        f"{NAME}: KL divergence 0.110, the best of the other side, ordered GPTQ NF4 calibrated, "
        f"0.150, bitsandbytes NF4 0.267 ({WIKITEXT})"
    )
    (group,) = groups(rows_of({Base("gptq-ordered", calibration=TEXT): 0.05}), "language")
    assert "ordered GPTQ NF4 calibrated keeps most" in kept.title(group)
    assert "the best of the other side, qrefta NF4 searched" in kept.title(group)


def test_the_front_holds_the_points_that_none_beats():
    points = [(4.6, 0.1), (4.5, 0.2), (4.5, 0.3), (4.1, 0.25), (4.7, 0.15), (4.8, 0.05)]
    assert front(points) == [(4.1, 0.25), (4.5, 0.2), (4.6, 0.1), (4.8, 0.05)]


def test_series_tell_peers_calibration_and_feedback_apart():
    names = {base: kept.series_of(row_of(base, 0.1)) for base in BASES}
    assert names[PLAIN] == "bitsandbytes"
    assert names[DEFAULT] == "qrefta without text"
    assert names[ORDERED] == "qrefta, layer after layer"
    assert names[ROUNDED._replace(double_quant=True)] == "qrefta, error feedback"
    nearest = row_of(ROUNDED, 0.1) | {"settings": {"rounding": "nearest"}}
    assert kept.series_of(nearest) == "qrefta, calibrated"


def test_rank_correlation_is_spearmans():
    rows = [
        row_of(base, value, weight_error=error)
        for (base, value), error in zip(BASES.items(), (1.0, 1.5, 0.9, 0.7, 1.3, 1.2, 1.1, 1.4))
    ]
    found = kept.rank_correlation(rows, "weight_error", WIKITEXT)
    expected = spearmanr([1.0, 1.5, 0.9, 0.7, 1.3, 1.2, 1.1, 1.4], list(BASES.values())).statistic
    assert found == pytest.approx(expected)
    assert kept.rank_correlation(rows, "output_error", WIKITEXT) == pytest.approx(1)
    assert kept.rank_correlation(rows[:2], "weight_error", WIKITEXT) is None
    assert word("Weight error tells", rows) == FAILS
    assert word("Weight error tells", rows_of()) == HOLDS


def test_the_study_measures_every_base_that_a_verdict_reads():
    every = {base for found in sets_of_bases().values() for base in found}
    assert {PLAIN, DEFAULT, *(target.base for target in TARGETS)} <= every


def test_targets_hold_or_not():
    claims = [target.base.label for target in TARGETS]
    met = rows_of({TARGETS[-2].base: 0.3, TARGETS[-1].base: 0.2})
    assert [word(f"{claim}: KL", met) for claim in claims] == [HOLDS] * 5
    missed = rows_of({target.base: 0.45 for target in TARGETS})
    assert [word(f"{claim}: KL", missed) for claim in claims] == [FAILS] * 5
    half = rows_of({ORDERED: 0.1155})  # 0.1155 and 0.1617
    assert word(f"{claims[0]}: KL", half) == IN_PART
    assert word(f"{claims[0]}: KL", rows_of(model="other")) == UNDECIDED
    assert word(f"{claims[0]}: KL", []) == UNDECIDED


def test_the_default_is_compared_with_bitsandbytes_on_every_text():
    assert word("Without text", rows_of()) == HOLDS
    assert word("Without text", rows_of({DEFAULT: 0.268})) == FAILS
    assert word("Without text", rows_of()[1:]) == UNDECIDED


def test_a_base_that_was_measured_again_counts_once():
    (group,) = groups([*rows_of(), row_of(PLAIN, 0.5)], "language")
    assert len(group.rows) == len(BASES)
    assert kept.divergence(group.rows[0], WIKITEXT) == 0.5


def test_more_tokens_make_a_section_of_their_own_after_the_larger_study():
    more = [row_of(PLAIN, 0.3, tokens=16384), *rows_of()]
    assert [group.tokens for group in groups(more, "language")] == [2048, 16384]
    first, second = language_sections({"kld": more})
    assert "2,048 tokens" in first.text
    assert "16,384 tokens" in second.text
    assert not {one.name for one in first.pictures} & {one.name for one in second.pictures}


def test_the_table_has_the_best_base_first_and_losses_too():
    (group,) = groups(rows_of(), "language")
    table = kept.language_table(group)
    assert [line[0] for line in table.rows][:2] == [
        "qrefta NF4 R=64 searched feedback refine=1 calibrated",
        "qrefta NF4 searched sequential calibrated",
    ]
    assert table.rows[-1][0] == "bitsandbytes NF4"
    assert table.rows[-1][2] == "0.2670 ± 0.0050"
    assert all(len(line) == len(table.header) for line in table.rows)


def test_the_16_bit_model_of_smollm2_is_explained():
    assert "GGUF" in language_sections({"kld": rows_of()})[0].text
    assert "GGUF" not in language_sections({"kld": rows_of(model="other")})[0].text


def test_encoders_have_a_section():
    rows = [encoder_row(PLAIN, 0.968), encoder_row(ROUNDED, 0.985)]
    (section,) = encoder_sections({"kld": rows})
    assert section.title == (
        "With at most 4.5 bits a weight qrefta NF4 searched feedback calibrated keeps most of "
        "mini: mean cosine 0.9850 to the 16-bit embeddings, bitsandbytes NF4 0.9680"
    )
    assert [line[2] for line in section.tables["All bases"].rows] == [
        "0.98500 ± 0.00010",
        "0.96800 ± 0.00010",
    ]


def test_the_first_section_comes_before_the_claims(tmp_path):
    rows = write(tmp_path / "rows", kld=[*rows_of(), encoder_row(PLAIN, 0.968)], cost=cost_rows())
    run(rows, tmp_path / "REPORT.md", None)
    for name in ("REPORT.md", "page/index.html"):
        text = (tmp_path / name).read_text()
        assert text.index("keeps most of") < text.index("The claims") < text.index("mean cosine")
    assert len(list((tmp_path / "page").glob("kld-*.svg"))) == 2
    assert len(sections({"kld": rows_of()})) == 0


def test_the_summary_names_base_and_ranks_from_the_rows():
    base, rank = summary({"kld": rows_of({ROUNDED._replace(rank=64, refine=1): 0.095})})
    assert base.startswith("Base: qrefta 0.110 (4.50 bits a weight) away from the 16-bit SmolLM2")
    assert "lower is better" in base
    assert "GPTQ on NF4 (absmax scales, larger inputs first) 0.150" in base  # the nearest other
    assert "bitsandbytes NF4 0.267" in base
    assert 'method="refta", R = 64 0.095 (4.60 bits a weight)' in rank
    assert summary({}) == []


def test_the_page_opens_with_the_summary_and_the_pictures_of_the_bases(tmp_path):
    write(tmp_path, kld=rows_of())
    run(rows=tmp_path, out=tmp_path / "R.md", page=tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.index("In short") < page.index("Base: qrefta") < page.index("<svg")
    assert page.index("<svg") < page.index("The claims")
    assert page.count("(lower is better)") >= 2  # on the axes


def test_models_are_called_by_name(tmp_path):
    write(tmp_path, kld=rows_of(model="runs/models/tiny"))
    run(rows=tmp_path, out=tmp_path / "R.md", page=tmp_path / "page")
    assert "keeps most of tiny:" in (tmp_path / "R.md").read_text()
    assert "runs/models" not in (tmp_path / "R.md").read_text()
