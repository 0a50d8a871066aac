"""requirements.lock fits pyproject.toml: `scripts/lock` was run after a requirement changed."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [
    line
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if not line.startswith("#")
]


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for text in sum(extras, PROJECT["dependencies"])]


def test_every_requirement_is_locked_within_its_bounds():
    locked = {
        canonicalize_name(name): version for name, version in (line.split("==") for line in LINES)
    }
    for requirement in requirements():
        version = locked.get(canonicalize_name(requirement.name))
        assert version in requirement.specifier, f"{requirement} is locked as {version}"


def test_the_lock_names_releases_and_no_builds_of_one_machine():
    """A CPU build's suffix, a URL or a CUDA package would not install on another machine."""
    for line in LINES:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", line), line
        assert not re.match(r"nvidia|cuda|triton", line), line


def test_every_requirement_has_a_lower_bound():
    """scripts/test --oldest tests these versions."""
    for requirement in requirements():
        assert ">=" in str(requirement.specifier), requirement
