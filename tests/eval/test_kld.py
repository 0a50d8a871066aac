"""The study of 4-bit bases: rows of tiny models, resumed runs, what each base is."""

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import qrefta
from eval.peers import bases
from eval.peers.bases import (
    Base,
    Calibration,
    Errors,
    errors_of,
    make_base,
    plain_errors,
    sets_of_bases,
)
from eval.rows import read
from eval.studies import cosine, kld
from qrefta.model.stacks import find_stacks
from qrefta.model.weights import read_slice
from qrefta.nn.quantized import QuantFormat
from qrefta.split.calibrate import gather_moments
from tests.models import tiny_llama
from tests.pages import language_tokenizer
from tests.tiny import color_rows, tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than", "ignore:Calibration saw")
SMALL = {"calibration": 64}
PEERS = [
    Base("bitsandbytes"),
    Base("pissa", 4),
    Base("loftq", 4),
    Base("qera", 4, **SMALL),
    Base("gptq", **SMALL),
]
OURS = [Base(rank=4), Base(rank=4, refine=0, block_size=128), Base(rank=4, **SMALL)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language") / "tiny"
    tiny_llama(hidden=64).save_pretrained(folder)
    language_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(folder):
    file = folder.parent / "words.txt"
    file.write_text(" ".join(f"w{30 + 7 * index % 66}" for index in range(500)))
    return file


@pytest.fixture
def few(monkeypatch):
    """Few bases, and little text to calibrate on."""
    monkeypatch.setattr(kld, "sets_of_bases", lambda: {"peers": PEERS, "ours": OURS})
    monkeypatch.setattr(kld, "WINDOWS", {64: 16})
    monkeypatch.setattr(kld, "HELD_OUT", 64)


def study(folder, file, rows, **options):
    arguments = {
        "model": folder,
        "sets": None,
        "only": "",
        "tokens": 64,
        "window": 16,
        "calibration": file,
        "text": [file],
        "data": None,
        "cache": folder.parent / "cache",
        "rows": rows,
    }
    kld.run(**arguments | options)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def moments_of(model):
    tokens = torch.arange(60).view(2, 30)
    return gather_moments(model, find_stacks(model), [tokens], progress=False)


@pytest.mark.slow
def test_a_row_has_its_base_its_cost_and_its_distance(folder, text, tmp_path, few):
    rows = tmp_path / "rows.jsonl"
    study(folder, text, rows)
    found = read(rows)
    assert [Base(*(row[name] for name in Base._fields)) for row in found] == [*PEERS, *OURS]
    for row in found:
        (measured,) = row["texts"]
        assert measured["windows"] == 4
        assert measured["kl_mean"] > 0
        assert measured["perplexity"] > 1
        assert math.isfinite(row["output_error"])
        assert row["bits_per_weight"] > 4
        assert (row["settings"] is None) == (row["maker"] != "qrefta")
    assert found[0]["weight_error"] == found[0]["output_error"] == 1
    assert found[0]["bits_per_weight"] == 4.5


def test_a_row_equals_a_comparison_of_a_model_quantized_by_hand(folder, text, tmp_path, few):
    rows = tmp_path / "rows.jsonl"
    study(folder, text, rows, sets=["peers"], only="bitsandbytes")
    quantized = load(folder)
    for stack in find_stacks(quantized):
        for index in range(stack.layers):
            weight = read_slice(quantized, stack, index)
            codes, state = bnb.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4")
            weight.copy_(bnb.dequantize_4bit(codes, state))
    (expected,) = qrefta.compare(quantized, folder, text, window=16, limit=4, progress=False)
    (row,) = read(rows)
    assert row["texts"][0]["kl_mean"] == pytest.approx(expected.kl_mean, rel=1e-6)
    assert row["texts"][0]["kl_999"] == pytest.approx(expected.kl_999, rel=1e-5)


def test_nothing_is_measured_twice_and_other_texts_are(folder, text, tmp_path, few):
    rows = tmp_path / "rows.jsonl"
    study(folder, text, rows, sets=["peers"], only="pissa")
    study(folder, text, rows, sets=["peers"], only="pissa")
    assert len(read(rows)) == 1
    study(folder, text, rows, sets=["peers"], only="pissa", tokens=32)
    assert [row["tokens"] for row in read(rows)] == [64, 32]


def test_moments_are_gathered_once(folder, text, tmp_path, few, monkeypatch):
    cache = tmp_path / "cache"
    study(folder, text, tmp_path / "rows.jsonl", only="gptq", cache=cache)
    assert len(list((cache / "moments").iterdir())) == 2
    monkeypatch.setattr(kld, "gather_moments", None)
    study(folder, text, tmp_path / "other.jsonl", only="gptq", cache=cache)
    first, second = (read(tmp_path / name)[0] for name in ("rows.jsonl", "other.jsonl"))
    assert first["texts"] == second["texts"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sets": ["peer"]}, "--set is peer; sets are peers, ours"),
        ({"text": None}, "Give the folder of data: --data FOLDER, or the variable QREFTA_DATA"),
        ({"tokens": 480}, "64 tokens to calibrate on and 480 to measure on are needed"),
    ],
)
def test_unfit_options_are_refused(options, message, folder, text, tmp_path, few, monkeypatch):
    monkeypatch.delenv("QREFTA_DATA", raising=False)
    with pytest.raises(ValueError, match=message):
        study(folder, text, tmp_path / "rows.jsonl", **options)


def test_text_that_is_measured_is_not_calibrated_on(folder, text, few):
    tokenizer = language_tokenizer()
    texts = kld.Texts(text, [text], tokens=64, window=16)
    windows = kld.calibration_windows(texts, tokenizer, 64, 16)
    every = kld.cut_windows(kld.read_text(text), tokenizer, 16)
    whole = [window for window in every if len(window) == 16]
    assert_close(torch.stack(windows), torch.stack(whole[-4:]))
    other = texts._replace(measured=[text.with_name("other.txt")])
    assert_close(
        torch.stack(kld.calibration_windows(other, tokenizer, 64, 16)), torch.stack(whole[:4])
    )


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_plain_rounding_equals_bitsandbytes(quant_type, double_quant):
    model = tiny_llama(hidden=64)
    base = Base("bitsandbytes", quant_type=quant_type, double_quant=double_quant)
    dense = tiny_llama(hidden=64)
    make_base(model, base, None)
    for stack in find_stacks(dense):
        weight = read_slice(dense, stack, 0)
        codes, state = bnb.quantize_4bit(
            weight, blocksize=64, quant_type=quant_type, compress_statistics=double_quant
        )
        assert_close(read_slice(model, stack, 0), bnb.dequantize_4bit(codes, state))


def test_bits_count_codes_scales_and_pairs_at_16_bits():
    """R = 6 over 3 layers: 2 components a layer, so 2 (in + out) numbers of 16 bits."""
    weights = 0
    pairs = 0
    model = tiny_llama(hidden=64)
    for stack in find_stacks(model):
        weights += stack.layers * stack.in_features * stack.out_features
        pairs += 6 * (stack.in_features + stack.out_features)
    made = make_base(model, Base("pissa", 6), None)
    assert made.bits_per_weight == pytest.approx(4.5 + 16 * pairs / weights)
    ours = make_base(tiny_llama(hidden=64), Base(rank=6, refine=0), None)
    # Ours has in addition the layers' mixing of the shared factors.
    assert made.bits_per_weight < ours.bits_per_weight < 1.2 * made.bits_per_weight


def test_errors_are_sums_over_all_layers():
    dense = tiny_llama(hidden=64)
    moments = moments_of(dense)
    model = tiny_llama(hidden=64)
    assert errors_of(model, dense, moments) == Errors(0, 0)
    make_base(model, Base("bitsandbytes"), None)
    assert errors_of(model, dense, moments) == plain_errors(dense, moments)
    weight = 0.0
    output = 0.0
    for stack in find_stacks(dense):
        for index, path in enumerate(stack.modules):
            error = (read_slice(dense, stack, index) - read_slice(model, stack, index)).double()
            weight += error.square().sum().item()
            output += torch.trace(error @ moments.of(path).double() @ error.T).item()
    assert plain_errors(dense, moments).weight == pytest.approx(weight)
    assert plain_errors(dense, moments).output == pytest.approx(output, rel=1e-5)


def test_peers_do_what_they_promise():
    """Less error of weights with PiSSA and LoftQ; less error of outputs with QERA and GPTQ."""
    dense = tiny_llama(hidden=64)
    moments = moments_of(dense)
    plain = plain_errors(dense, moments)
    found = {}
    for base in PEERS:
        model = tiny_llama(hidden=64)
        make_base(model, base, Calibration(moments, []) if base.calibration else None)
        found[base.maker] = errors_of(model, dense, moments)
    assert found["loftq"].weight < found["pissa"].weight < plain.weight
    assert found["qera"].output < plain.output
    assert found["gptq"].output < plain.output


def test_sets_hold_every_question_once():
    sets = sets_of_bases()
    every = [base for found in sets.values() for base in found]
    assert len(every) == len(set(every))
    assert len({base.label for base in every}) == len(every)
    assert {base.rank for base in every} == {0, *bases.RANKS}
    assert all(base.calibration for base in every if base.rounding == "feedback")
    uniform = [base for base in [*every, *bases.encoder_bases()] if base.target_bits is None]
    assert all(isinstance(base.format, QuantFormat) for base in uniform)


def test_embeddings_are_compared_sentence_by_sentence(tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "encoder", width=64)
    (tmp_path / "sst2").mkdir()
    for name, seed in (("train", 1), ("dev", 2)):
        lines = [f"{row['text']}\t{row['label']}" for row in color_rows(40, seed)]
        (tmp_path / "sst2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]))
    monkeypatch.setattr(cosine, "encoder_bases", lambda: [Base("bitsandbytes"), Base(rank=4)])
    rows = tmp_path / "rows.jsonl"
    for _ in range(2):
        cosine.run(folder, "", tmp_path, tmp_path / "cache", rows)
    plain, ours = read(rows)
    assert plain["sentences"] == 40
    assert plain["cosine_least"] <= plain["cosine_1"] <= plain["cosine_mean"] < 1
    assert ours["weight_error"] < plain["weight_error"] == 1


def test_cosines_are_those_of_numpy():
    found = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    measured = cosine.cosines(found, torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
    assert measured["cosine_mean"] == pytest.approx((1 + 0.5**0.5) / 2)
    assert measured["cosine_least"] == pytest.approx(0.5**0.5)


def test_sentences_end_when_there_are_enough_tokens():
    tokenizer = language_tokenizer()
    texts = ["w30 w31 w32", "w33 w34", "w35"]
    length = len(tokenizer(texts[0])["input_ids"])
    assert cosine.enough(texts, tokenizer, length) == texts[:1]
    assert cosine.enough(texts, tokenizer, length + 1) == texts[:2]
    assert cosine.enough(texts, tokenizer, 1000) == texts
