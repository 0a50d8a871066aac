"""Importing qrefta: light, registers the plug-in in either order, and changes nothing else in
transformers.
"""

import json
import resource
import subprocess
import sys
from importlib import import_module
from typing import get_args

import pytest

import qrefta
from qrefta import choices
from qrefta.export.merge import merge
from qrefta.memory.plan import OPTIMIZERS
from qrefta.methods import METHODS
from qrefta.nn.factors import Factors
from qrefta.train.data import load_classification
from qrefta.train.tasks import TASKS, load_chat
from qrefta.train.tasks.chat import chat_recipe
from qrefta.train.tasks.lm import text_windows
from tests.models import tiny_bert

pytestmark = pytest.mark.slow

HEAVY = ("torch", "transformers", "datasets", "bitsandbytes", "accelerate", "lm_eval", "scipy")


FORKS = """
import os, sys
import accelerate, bitsandbytes, scipy.optimize, torch
assert "transformers" not in sys.modules
for code in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


def forked(codes):
    """The JSON that each piece of code prints in a process where neither qrefta nor transformers
    was imported: forks of one process that has imported others, which take seconds.
    """
    run = subprocess.run([sys.executable, "-c", FORKS, *codes], stdout=subprocess.PIPE, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def loaded_modules(code):
    """Names of the modules that a fresh process has imported after running some code."""
    code += "\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def test_import_loads_nothing_heavy():
    assert not set(HEAVY) & set(loaded_modules("import qrefta"))


@pytest.mark.parametrize("words", [["--help"], ["prepare", "--help"], ["prepar"]], ids=str)
def test_help_and_a_mistyped_command_load_nothing_heavy(words):
    code = f"import sys, contextlib\nsys.argv = ['qrefta', *{words}]\nfrom qrefta.cli import main\n"
    code += "with contextlib.suppress(SystemExit): main()"
    assert not set(HEAVY) & set(loaded_modules(code))


def test_inspect_loads_no_trainer_data_sets_or_harness(tmp_path):
    qrefta.prepare(tiny_bert(), rank=2, refine=0, progress=False).save_pretrained(tmp_path)
    code = f"import sys\nsys.argv = ['qrefta', 'inspect', {str(tmp_path)!r}]\n"
    code += "from qrefta.cli import app\napp(standalone_mode=False)"
    modules = set(loaded_modules(code))
    assert "qrefta.hf_config" in modules
    absent = {"transformers.trainer", "transformers.modeling_utils", "datasets", "lm_eval"}
    assert not (absent | {"bitsandbytes"}) & modules


def test_help_takes_little_processor_time():
    """Measured: 0.2 s; with torch and transformers it would be 5 s. The bound is for a busy
    machine.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "qrefta", "--help"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


ATTRIBUTES = """
import json
import transformers
from transformers import PreTrainedConfig, PreTrainedModel, Trainer
from transformers import configuration_utils, modeling_utils
from transformers.quantizers import base

def contents():
    owners = [PreTrainedModel, PreTrainedConfig, Trainer, base.HfQuantizer]
    owners += [modeling_utils, configuration_utils]
    return [dict(vars(owner)) for owner in owners]

before = contents()
import qrefta
for name in qrefta.__all__:
    getattr(qrefta, name)
import qrefta.train.checkpoints, qrefta.cli
changed = [
    name
    for old, new in zip(before, contents())
    for name in old.keys() | new.keys()
    if name != "__warningregistry__" and old.get(name) is not new.get(name)
]
print(json.dumps(changed))
"""


LOAD = """
import json
{imports}
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({folder!r})
print(json.dumps(type(model.hf_quantizer).__name__))
"""
ORDERS = [
    "import qrefta, transformers",
    "import transformers.modeling_utils, qrefta",
    "import qrefta.hf_quantizer",
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """By code: names that qrefta changed in transformers, and the quantizer of a plain load."""
    folder = tmp_path_factory.mktemp("prepared")
    qrefta.prepare(tiny_bert(), rank=2, refine=0, progress=False).save_pretrained(folder)
    codes = [LOAD.format(imports=imports, folder=str(folder)) for imports in ORDERS]
    return dict(zip(["attributes", *ORDERS], forked([ATTRIBUTES, *codes]), strict=True))


def test_import_changes_nothing_in_transformers(answers):
    assert answers["attributes"] == []


@pytest.mark.parametrize("imports", ORDERS)
def test_plain_from_pretrained_knows_prepared_folders_in_any_order_of_imports(imports, answers):
    assert answers[imports] == "QReftaQuantizer"


def test_names_are_imported_on_first_use():
    assert qrefta.merge is merge
    assert set(qrefta.__all__) <= set(dir(qrefta))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = qrefta.nothing


def test_choices_are_those_that_the_code_has():
    assert list(METHODS) == list(choices.METHOD_NAMES)
    assert list(TASKS) == list(choices.TASK_NAMES)
    assert list(OPTIMIZERS) == list(choices.OPTIMIZER_NAMES)
    fitted = {name: method.transforms for name, method in METHODS.items() if method.fits}
    assert fitted == choices.FITTED
    assert Factors.transforms == get_args(choices.Transform)


@pytest.mark.parametrize(
    ("module", "name", "found"),
    [
        ("qrefta.data", "load_classification", load_classification),
        ("qrefta.tasks", "load_chat", load_chat),
        ("qrefta.tasks", "chat", chat_recipe),
        ("qrefta.tasks", "language_model", text_windows),
    ],
)
def test_names_of_the_release_before_are_found_where_they_were(module, name, found):
    with pytest.warns(DeprecationWarning, match=rf"{module}\.{name} is deprecated.*; use qrefta\."):
        assert getattr(import_module(module), name) is found
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'absent'"):
        getattr(import_module(module), "absent")  # noqa: B009 -- as a statement it looks useless
