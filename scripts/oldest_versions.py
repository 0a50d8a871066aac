"""Print the oldest version that pyproject.toml admits of each package, as constraints for pip."""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def oldest_versions() -> dict[str, str]:
    """Package -> the lower bound of its version, except for the tools of the extra `test`."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    requirements = list(project["dependencies"])
    for extra, names in project["optional-dependencies"].items():
        if extra != "test":
            requirements += names
    versions = {}
    for requirement in requirements:
        name, bounds = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
        versions[name] = re.search(r">=([\w.]+)", bounds).group(1)
    return versions


if __name__ == "__main__":
    for name, version in sorted(oldest_versions().items()):
        print(f"{name}=={version}")
