"""Write docs/api.md from the docstrings, and the index of error messages in docs/troubleshooting.md from the source.

python scripts/reference.py
"""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import qrefta
from qrefta.config import StackRow
from qrefta.export.merge import Export
from qrefta.files.checksums import check_digests, write_digests
from qrefta.nn.factors import Factors, LowRankFactors
from qrefta.nn.linear import AdaptedLinear
from qrefta.nn.quantized import QuantFormat, dequantize, quantize
from qrefta.split.calibrate import gather_moments, load_moments
from qrefta.train.arguments import training_arguments
from qrefta.train.data import load_classification, read_calibration

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api.md"
TROUBLE = ROOT / "docs" / "troubleshooting.md"
START, END = "<!-- errors: scripts/reference.py -->", "<!-- end of errors -->"
ERRORS = {
    "ValueError",
    "OSError",
    "ImportError",
    "RuntimeError",
    "TypeError",
    "NotImplementedError",
}
FURTHER = [
    StackRow, Export, training_arguments, load_classification, read_calibration, gather_moments, load_moments,
    AdaptedLinear, Factors, LowRankFactors, QuantFormat, quantize, dequantize,
    write_digests, check_digests,
]  # fmt: skip


def api() -> str:
    """The page: what `import qrefta` gives first, then what it is made of."""
    public = [getattr(qrefta, name) for name in qrefta.__all__]
    parts = ["# Reference", "Made from the docstrings by `scripts/reference.py`."]
    parts += [_entry(f"qrefta.{item.__name__}", item) for item in public]
    parts += ["# What it is made of"]
    parts += [_entry(f"{item.__module__}.{item.__name__}", item) for item in FURTHER]
    return "\n\n".join(parts) + "\n"


def _entry(name: str, item: Any) -> str:
    signature = (
        str(inspect.signature(item)).replace("qrefta.", "").replace("torch.Tensor", "Tensor")
    )
    shown = f"{name}{signature}" if len(signature) < 90 else f"{name}(\n    {_lines(item)}\n)"
    return f"## {name}\n\n```text\n{shown}\n```\n\n{_markdown(inspect.getdoc(item) or '')}"


def _lines(item: Any) -> str:
    parameters = inspect.signature(item).parameters.values()
    star = next((p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY), None)
    return ",\n    ".join(f"*,\n    {p}" if p.name == star else str(p) for p in parameters)


def _markdown(text: str) -> str:
    """A docstring's sections as headings and lists; the rest as it is."""
    out, section = [], False
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Attributes|Attributes \(.*\)|Shapes)(\?)?:", line):
            section = True
            out += [f"**{line.rstrip(':')}**", ""]
        elif section and re.match(r"    \S", line):
            out.append(
                "- " + re.sub(r"^([\w, ]+):", lambda found: f"`{found[1]}`:", line.strip(), count=1)
            )
        elif section and line.startswith("     "):
            out[-1] += " " + line.strip()
        else:
            section = section and not line
            out.append(line)
    return "\n".join(out)


def errors() -> str:
    """Every message that the package raises, by file; what is filled in stands as `...`."""
    lines = ["| message | raised in |", "|---|---|"]
    for file in sorted((ROOT / "qrefta").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ERRORS
            )
            message = _text(node.args[-1]) if called and node.args else ""
            if message:
                shown = message.replace("|", "\\|").replace("<", "&lt;")
                lines.append(f"| {shown} | {file.relative_to(ROOT).as_posix()} |")
    return "\n".join(lines)


def _text(node: ast.expr) -> str:
    """The message of a literal or an f-string."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "..." for part in node.values
        )
    return ""


def insert(page: str) -> str:
    """A page with the index of errors between its marks."""
    before, rest = page.split(START)
    return f"{before}{START}\n{errors()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    API.write_text(api(), encoding="utf-8")
    TROUBLE.write_text(insert(TROUBLE.read_text(encoding="utf-8")), encoding="utf-8")
