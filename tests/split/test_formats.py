import itertools
import json
import random
import re

import pytest
import torch
from torch.testing import assert_close

import qrefta
from qrefta.choices import MIXED_TYPES, bits_of
from qrefta.config.settings import Settings
from qrefta.model.prepared import is_prepared, prepared_config
from qrefta.model.stacks import find_stacks
from qrefta.model.weights import model_weights
from qrefta.split.calibrate import gather_moments
from qrefta.split.formats import formats_without_weights, least_error
from qrefta.split.stack_split import StackSplit
from tests.models import ARCHITECTURES, EXPERTS, inputs, logits, tiny_bert

SCALES = 0.255  # bits a weight, about, of scales in 8 bits


def mean_bits(model):
    rows = qrefta.quant_report(model)
    weights = sum(row["layers"] * row["shape"][0] * row["shape"][1] for row in rows)
    return 8 * sum(row["bytes"] for row in rows) / weights


def formats(model):
    return [row["quant_type"] for row in qrefta.quant_report(model)]


def mixed(target_bits=3.4, **options):
    settings = {"method": "refta", "rank": 2, "refine": 1, "progress": False} | options
    return qrefta.prepare(tiny_bert(hidden=64), bits="auto", target_bits=target_bits, **settings)


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_has_the_least_error_of_all_choices(seed):
    """Against every combination; also with equal errors, and errors that rise with the size."""
    draw = random.Random(seed)
    stacks = draw.randint(1, 6)
    sizes = [sorted(draw.sample(range(1, 40), 3)) for _ in range(stacks)]
    errors = [[float(draw.randint(0, 9)) for _ in range(3)] for _ in range(stacks)]
    limit = draw.randint(sum(map(min, sizes)), sum(map(max, sizes)))

    def sums(choices):
        size = sum(of_stack[choice] for of_stack, choice in zip(sizes, choices, strict=True))
        error = sum(of_stack[choice] for of_stack, choice in zip(errors, choices, strict=True))
        return error, size

    every = itertools.product(range(3), repeat=stacks)
    best = min(sums(choices) for choices in every if sums(choices)[1] <= limit)
    assert sums(least_error(sizes, errors, limit)) == best


def test_a_greedy_choice_by_error_per_byte_would_miss_the_optimum():
    """The first stack removes most error a byte, 6 for 4; then the second no longer fits."""
    assert least_error([[1, 5], [1, 7]], [[6.0, 0.0], [8.0, 0.0]], limit=8) == (0, 1)


def test_sixty_stacks_of_a_large_model_are_chosen_at_once():
    """Stacks of equal sizes have few different sums; every combination would be 3^60."""
    draw = random.Random(0)
    sizes = [[size * bits for bits in (2, 3, 4)] for size in (4, 1, 1, 4, 14, 14, 14) * 9]
    errors = [
        [share * base for share in (16.0, 4.0, 1.0)] for base in draw.choices(range(99), k=63)
    ]
    limit = int(3.3 * sum(size for size, *_ in sizes) / 2)
    chosen = least_error(sizes, errors, limit)
    spent = sum(of_stack[choice] for of_stack, choice in zip(sizes, chosen, strict=True))
    assert limit - 1 <= spent <= limit


@pytest.mark.parametrize(
    ("options", "calibrated"),
    [
        ({"method": "refta", "rank": 2, "refine": 1}, True),
        ({"method": "windows", "rank": 4, "double_quant": False}, True),
        ({"rank": 0}, False),
    ],
    ids=str,
)
def test_prepare_takes_the_formats_of_least_measured_error(options, calibrated):
    model = tiny_bert(hidden=64)
    stacks = find_stacks(model)
    moments = gather_moments(model, stacks, [inputs(model)]) if calibrated else None
    settings = Settings(bits="auto", target_bits=3.7, **options)
    measured = []
    for stack in stacks:
        rows = []
        for kind in MIXED_TYPES:
            smallest = {"block_size": 32, "double_quant": True}
            own = Settings(bits=bits_of(kind), **smallest | options)
            split = StackSplit(stack, model_weights(model, stack), own, own.rank, moments)
            list(split.residuals())
            rows.append(split.report())
        measured.append(rows)
    weights = sum(rows[0].weights for rows in measured)

    def sums(rows):
        plain = [of_stack[-1] for of_stack in measured]
        if calibrated:
            errors = [row.output_error / nf4.output_baseline for row, nf4 in zip(rows, plain)]
        else:
            errors = [row.residual_error / nf4.baseline_error for row, nf4 in zip(rows, plain)]
        return sum(errors), sum(row.bytes for row in rows)

    every = itertools.product(*measured)
    best = min(every, key=lambda rows: (8 * sums(rows)[1] > 3.7 * weights, *sums(rows)))
    model = qrefta.prepare(
        model, bits="auto", target_bits=3.7, moments=moments, progress=False, **options
    )
    assert formats(model) == [row.quant_type for row in best]
    assert qrefta.quant_report(model) == [row.report() for row in best]
    assert mean_bits(model) <= settings.target_bits


@pytest.mark.parametrize("architecture", ["bert", "llama_gqa", "gpt2", "mixtral"])
@pytest.mark.parametrize("target", [2.9, 3.3, 4.0])
def test_the_mean_is_at_most_the_target_and_near_it(architecture, target):
    """No stack of fewer than four bits could take one bit more."""
    model = (ARCHITECTURES | EXPERTS)[architecture]()
    model = qrefta.prepare(model, bits="auto", target_bits=target, rank=0, progress=False)
    assert mean_bits(model) <= target
    reports = prepared_config(model).stacks
    weights = sum(report.weights for report in reports)
    steps = [report.weights / weights for report in reports if report.quant_type != "nf4"]
    assert mean_bits(model) + min(steps) > target


def test_the_choice_is_printed(capsys):
    model = mixed(progress=True)
    found = zip(prepared_config(model).stacks, formats(model), strict=True)
    listed = ", ".join(f"{report.stack.name} {bits_of(kind)}" for report, kind in found)
    assert f"Bits: {listed}; {mean_bits(model):.3f} bits a weight" in capsys.readouterr().out


def test_a_saved_model_has_its_bits_without_choosing_again(tmp_path, monkeypatch):
    model = mixed()
    assert len(set(formats(model))) > 1
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("qrefta.split.formats.least_error", lambda *_: 1 / 0)
    loaded = qrefta.load(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert qrefta.quant_report(loaded) == qrefta.quant_report(model)
    assert prepared_config(loaded).to_dict() == prepared_config(model).to_dict()
    assert {file.name for file in qrefta.verify(tmp_path)} >= {"model.safetensors"}
    assert_close(logits(loaded), logits(model), rtol=0, atol=0)


@pytest.mark.slow
def test_a_dense_folder_is_prepared_while_it_loads(tmp_path):
    tiny_bert(hidden=64).save_pretrained(tmp_path)
    config = qrefta.QReftaConfig(bits="auto", target_bits=3.4, method="refta", rank=2, refine=1)
    loaded = type(tiny_bert()).from_pretrained(tmp_path, quantization_config=config)
    assert formats(loaded) == formats(mixed())
    assert_close(logits(loaded), logits(mixed()), rtol=0, atol=0)


def test_a_merged_model_has_the_logits_of_the_mixed_one():
    expected = logits(mixed())
    merged = qrefta.merge(mixed(), dtype=torch.float32)
    assert_close(logits(merged), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["nf4", "int3", None, 7], ids=str)
def test_a_file_with_another_format_of_a_stack_is_refused(change, tmp_path, monkeypatch):
    """Without checksums too."""
    model = mixed()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    stacks = saved["quantization_config"]["stacks"]
    next(row for row in stacks if row["quant_type"] != "nf4")["quant_type"] = change
    (tmp_path / "config.json").write_text(json.dumps(saved))
    monkeypatch.setenv("QREFTA_VERIFY", "off")
    words = r"must be one of nf2, nf3, nf4|which no stack has|belong together|ignore_mismatched"
    with pytest.raises((ValueError, RuntimeError), match=words):
        qrefta.load(tmp_path)


def test_a_start_with_other_bits_by_stack_is_refused(tmp_path):
    tiny_bert(hidden=64).save_pretrained(tmp_path / "dense")
    kind = type(tiny_bert())
    settings = {"bits": "auto", "method": "refta", "rank": 2, "refine": 0, "progress": False}
    model, start = (
        qrefta.prepare(kind.from_pretrained(tmp_path / "dense"), target_bits=target, **settings)
        for target in (3.4, 2.9)
    )
    written = qrefta.export_lora(model, tmp_path / "lora", "original", tolerance=2)
    assert any("weights in mixed bits" in note for note in written.notes)
    with pytest.raises(ValueError, match="other linear layers, ranks or bits than the model"):
        qrefta.export_lora(model, tmp_path / "out", "original", start=start)


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"rank": 0}, 2.262, 4.261),
        ({"rank": 0, "block_size": 64}, 2.137, 4.136),
        ({"rank": 0, "block_size": 64, "double_quant": False}, 2.5, 4.5),
        ({"rank": 0, "double_quant": False}, 3.0, 5.0),
    ],
    ids=str,
)
def test_a_target_out_of_reach_is_refused_with_the_reach(settings, low, high):
    """Before any stack is measured, and the model stays as it was."""
    model = tiny_bert(hidden=64)
    reach = rf"between {low} \(NF2 everywhere\) and {high} \(NF4 everywhere\)"
    fixes = {low - 0.01: "A smaller rank", high + 0.01: "For more give bits=4"}
    for target, fix in fixes.items():
        with pytest.raises(ValueError, match=rf"target_bits is {target}; .*{reach}\. {fix}"):
            qrefta.prepare(model, bits="auto", target_bits=target, **settings)
    assert not is_prepared(model)
    model = qrefta.prepare(model, bits="auto", target_bits=low + 0.005, progress=False, **settings)
    assert set(formats(model)) == {"nf2"}


def test_the_reach_in_the_message_is_taken():
    reach = re.compile(r"between ([\d.]+) \(NF2 everywhere\) and ([\d.]+) \(NF4 everywhere\)")
    with pytest.raises(ValueError, match=reach) as refused:
        mixed(target_bits=9.0)
    for target, kinds in zip(reach.search(str(refused.value)).groups(), ({"nf2"}, MIXED_TYPES)):
        assert set(formats(mixed(target_bits=float(target)))) <= set(kinds)


def test_bytes_without_weights_are_the_most_within_the_target():
    model = tiny_bert(hidden=64)
    stacks = find_stacks(model)
    settings = Settings(bits="auto", target_bits=3.4, rank=0)
    found = formats_without_weights(stacks, [0] * len(stacks), settings)
    weights = [stack.layers * stack.out_features * stack.in_features for stack in stacks]

    def mean(kinds):
        stored = [size * bits_of(kind) for size, kind in zip(weights, kinds, strict=True)]
        return sum(stored) / sum(weights) + SCALES

    every = itertools.product(MIXED_TYPES, repeat=len(stacks))
    assert mean(found) == max(mean(kinds) for kinds in every if mean(kinds) <= 3.4)
