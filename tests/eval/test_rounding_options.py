"""The study of additions to error feedback: every option has a row, and lowers its objective."""

import copy
from dataclasses import replace

import pytest
import torch

from eval.rows import read
from eval.studies import kld, rounding_options
from eval.studies.rounding_options import (
    OPTIONS,
    Layer,
    damped_moment,
    descended,
    fed_back,
    refitted,
    run,
    sequential,
)
from qrefta.linalg.metric import output_error
from qrefta.model.stacks import find_stacks
from qrefta.split.calibrate import gather_moments
from tests.models import tiny_llama
from tests.pages import language_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer tokens than", "ignore:Calibration saw")


@pytest.fixture(scope="module")
def model():
    return tiny_llama(hidden=64).eval()


@pytest.fixture(scope="module")
def batches(model):
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, model.config.vocab_size, (8, 16), generator=generator)}
        for _ in range(2)
    ]


@pytest.fixture(scope="module")
def layer(model, batches):
    stack = find_stacks(model)[-1]
    path = stack.modules[1]
    weight = model.get_submodule(path).weight.detach()
    return Layer(
        weight, replace(stack, modules=(path,)), gather_moments(model, find_stacks(model), batches)
    )


@pytest.mark.parametrize("option", [refitted, descended])
def test_scales_and_codes_that_move_after_feedback_lower_the_output_error(layer, option):
    def error(values):
        return output_error(layer.weight - values, damped_moment(layer))

    assert error(option(layer)) < error(fed_back(layer))


def test_codes_that_cannot_move_are_the_best_for_given_others(layer):
    """After descent no single code of a row has a better level."""
    values, damped = descended(layer), damped_moment(layer)
    packed = layer.packed()
    scales = rounding_options.scales_of(packed)
    levels = rounding_options.grid_of("nf4", values.device).levels
    row, best = 3, output_error((layer.weight - values)[3:4], damped)
    for column in range(0, layer.weight.shape[1], 5):
        for level in levels:
            tried = values[row : row + 1].clone()
            tried[0, column] = level * scales[row, column]
            assert output_error(layer.weight[row : row + 1] - tried, damped) >= best * (1 - 1e-5)


def test_the_second_block_is_rounded_on_what_the_rounded_first_block_gives(batches):
    first, second = (f"model.layers.{index}.self_attn.q_proj" for index in (0, 1))
    dense, ours = tiny_llama(hidden=64).eval(), tiny_llama(hidden=64).eval()
    with torch.no_grad():
        sequential(ours, None, batches)
    half = copy.deepcopy(ours)
    half.model.layers[1] = copy.deepcopy(dense.model.layers[1])

    def rounded_q(path, model):
        (stack,) = [stack for stack in find_stacks(dense) if path in stack.modules]
        moments = gather_moments(model, find_stacks(model), batches)
        weight = dense.get_submodule(path).weight.detach()
        return fed_back(Layer(weight, replace(stack, modules=(path,)), moments))

    def same(path, model):
        return (rounded_q(path, model) == ours.get_submodule(path).weight).float().mean()

    assert same(first, dense) > 0.99
    assert same(second, half) > 0.99
    assert same(second, dense) < 0.99


def test_every_option_has_a_row_and_is_measured_once(model, tmp_path, monkeypatch):
    folder, data = tmp_path / "tiny", tmp_path / "data"
    model.save_pretrained(folder)
    language_tokenizer().save_pretrained(folder)
    words = " ".join(f"w{30 + 7 * index % 66}" for index in range(700))
    for name in ("wikitext2/valid.txt", "wikitext2/test.txt", "tinyshakespeare/input.txt"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(words)
    monkeypatch.setattr(rounding_options, "WINDOWS", {rounding_options.HALF_TEXT: 16})
    monkeypatch.setattr(kld, "HELD_OUT", 64)
    given = {
        "tokens": 64,
        "window": 16,
        "calibration_tokens": 512,
        "model": folder,
        "data": data,
        "cache": tmp_path / "cache",
        "rows": tmp_path / "rows.jsonl",
        "only": "",
    }
    run(**given | {"only": "norms"})
    run(**given)
    run(**given)
    rows = read(given["rows"])
    assert sorted(row["option"] for row in rows) == sorted(OPTIONS)
    assert all(len(row["texts"]) == 2 and row["output_error"] > 0 for row in rows)
    with pytest.raises(ValueError, match="--only is 'best'; options are feedback, "):
        run(**given | {"only": "best"})
