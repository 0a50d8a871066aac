"""Recipes: the options of `qrefta finetune` in a file, which a run writes into its folder."""

import pytest
import yaml
from typer.testing import CliRunner

import qrefta
from qrefta.cli import app
from qrefta.model.prepared import prepared_config
from tests.tiny import color_rows, tiny_folder


@pytest.fixture
def recipe(tmp_path):
    """The content of a recipe for a tiny classifier."""
    rows = tmp_path / "rows.csv"
    lines = [f"{row['text']},{row['label']}" for row in color_rows(48, seed=1)]
    rows.write_text("\n".join(["text,label", *lines]))
    return {
        "model": str(tiny_folder(tmp_path / "dense")),
        "dataset": str(rows),
        "out": str(tmp_path / "out"),
        "rank": 4,
        "max-steps": 2,
        "batch_size": 8,
        "calibration": "none",
        "target": ["query", "key"],
    }


def finetune(tmp_path, content, *options):
    file = tmp_path / "run.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    result = CliRunner().invoke(app, ["finetune", str(file), *options])
    if isinstance(result.exception, ValueError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def weights(folder):
    return dict(qrefta.load(folder).named_parameters())


def test_a_recipe_gives_the_options_and_the_command_line_replaces_them(tmp_path, recipe):
    finetune(tmp_path, recipe, "--rank", "3")
    settings = prepared_config(qrefta.load(tmp_path / "out")).settings
    assert settings.rank == 3
    assert settings.target_modules == ("query", "key")


def test_one_value_stands_for_a_list(tmp_path, recipe):
    finetune(tmp_path, recipe | {"target": "query", "text-column": "text"})
    settings = prepared_config(qrefta.load(tmp_path / "out")).settings
    assert settings.target_modules == ("query",)


@pytest.mark.parametrize(("value", "written"), [(True, "True"), ("selective", "selective")])
def test_checkpointing_is_true_or_selective(tmp_path, recipe, value, written):
    finetune(tmp_path, recipe | {"gradient-checkpointing": value})
    kept = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert kept["gradient-checkpointing"] == written


@pytest.mark.slow
def test_the_written_recipe_repeats_the_run(tmp_path, recipe):
    finetune(tmp_path, recipe, "--seed", "5")
    written = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert (written["rank"], written["seed"], written["max-steps"]) == ("4", 5, 2)
    assert written["target"] == ["query", "key"]
    assert written["learning-rate"] == "auto"
    assert "resume" not in written
    finetune(tmp_path, written | {"out": str(tmp_path / "again")})
    first, second = weights(tmp_path / "out"), weights(tmp_path / "again")
    assert all((first[name] == second[name]).all() for name in first)


def test_a_failed_run_leaves_no_folder_in_the_way(tmp_path, recipe):
    with pytest.raises(ValueError, match="nothing"):
        finetune(tmp_path, recipe | {"text-column": ["nothing"]})
    finetune(tmp_path, recipe)
    with pytest.raises(ValueError, match="Add --resume to go on with it"):
        finetune(tmp_path, recipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rnak": 4}, "has 'rnak', which is no option; the options are .*rank"),
        (
            {"max_steps": 3},
            "has 'max-steps' and 'max_steps', which are the same option; remove one",
        ),
        ({"out": None}, "has no out; a recipe needs model, dataset, out"),
        ("- 4", "holds list; a recipe has lines `name: value`"),
        ("a: [", "is not YAML"),
    ],
)
def test_recipes_that_cannot_be_run_are_refused(tmp_path, recipe, change, message):
    with pytest.raises(ValueError, match=message):
        finetune(tmp_path, change if isinstance(change, str) else recipe | change)


def test_a_missing_recipe_is_named():
    result = CliRunner().invoke(app, ["finetune", "none.yaml"])
    assert "There is no recipe none.yaml" in str(result.exception)
