"""The mutation check: its faults are in qrefta as it is, and what it calls found and survived is so."""

import re
from pathlib import Path

import pytest

from eval.faults import FAULTS, Fault
from eval.mutants import ROOT, judge, repository, together

TESTS = "tests/test_limits.py"


def test_every_fault_changes_one_place():
    texts = {fault.file: (ROOT / "qrefta" / fault.file).read_text(encoding="utf-8") for fault in FAULTS}
    assert [(fault.file, fault.old) for fault in FAULTS if texts[fault.file].count(fault.old) != 1] == []
    assert all(fault.new != fault.old for fault in FAULTS)


def test_every_module_has_faults_and_every_fault_has_tests():
    modules = [path for path in (ROOT / "qrefta").rglob("*.py") if not path.name.startswith("__")]
    assert {path.relative_to(ROOT / "qrefta") for path in modules} == {Path(fault.file) for fault in FAULTS}
    files = {file for fault in FAULTS for file in re.findall(r"tests/\w+\.py", fault.tests)}
    assert {file for file in files if not (ROOT / file).exists()} == set()


def test_all_tests_of_a_file_run_together_and_once():
    faults = [
        Fault("a.py", "1", "2", "tests/test_a.py -k one"),
        Fault("a.py", "3", "4", "tests/test_a.py -k 'two or three'"),
        Fault("a.py", "5", "6", "tests/test_a.py -k one"),
        Fault("b.py", "1", "2", "tests/test_b.py"),
    ]
    assert together(faults) == ["tests/test_a.py -k '(one) or (two or three)'", "tests/test_b.py"]


@pytest.fixture
def small(tmp_path):
    """A package of one constant beside a message, and a test of the constant."""
    for folder in ("qrefta", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "qrefta" / "limits.py").write_text('LARGEST = 7\nMESSAGE = "too large"\n')
    test = "from qrefta.limits import LARGEST\n\n\ndef test_largest():\n    assert LARGEST == 7\n"
    (tmp_path / TESTS).write_text(test)
    return tmp_path


def test_a_fault_is_found_or_survives_and_the_file_stays_as_it_was(small):
    before = (small / "qrefta" / "limits.py").read_text()
    outcomes = {"= 8": "found", "=": "found", "= 0 + 7": "survived"}
    for new, outcome in (*outcomes.items(), ("= 8", "found")):  # what Python compiled of one is not taken for the next
        assert judge(Fault("limits.py", "= 7", new, TESTS), small).outcome == outcome
    assert (small / "qrefta" / "limits.py").read_text() == before


def test_a_fault_without_its_text_or_without_tests_is_refused(small):
    with pytest.raises(ValueError, match=r"limits\.py has 'no such text' 0 times"):
        judge(Fault("limits.py", "no such text", "", TESTS), small)
    with pytest.raises(ValueError, match=r"no tests for tests/test_limits\.py -k nothing"):
        judge(Fault("limits.py", "= 7", "= 8", f"{TESTS} -k nothing"), small)


def test_the_copy_holds_what_the_tests_need_and_is_removed():
    with repository() as copy:
        assert all((copy / "qrefta" / fault.file).is_file() for fault in FAULTS)
        assert (copy / "tests" / "models.py").is_file()
    assert not copy.exists()
