"""Private names of the packages that qrefta builds on are used in qrefta/_compat alone."""

import ast
from pathlib import Path

import pytest

import qrefta
from qrefta._compat import OVERRIDDEN

ROOT = Path(qrefta.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent.name != "_compat")
PACKAGES = ("torch", "transformers", "accelerate", "bitsandbytes", "datasets", "peft", "trl")

# Modules and functions without an underscore that the packages change without notice.
PRIVATE_MODULES = {
    "accelerate.state",
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.integrations.moe",
    "transformers.trainer_utils.rotate_checkpoints",
}
# Attributes of the packages' objects, also where qrefta has an attribute of the same name.
PRIVATE_ATTRIBUTES = {
    "_apply_gate",
    "_cdata",
    "_commit_hash",
    "_experts_implementation_internal",
    "_from_config",
    "_hf_peft_config_loaded",
    "_is_hf_initialized",
    "_is_quantized",
    "_is_replica",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_modules",
    "_parameters",
    "_upload_modified_files",
    "_version",
    "create_dynamic_map",
    "get_4bit_type",
    "nested",
    "state2",
}
PUBLIC = {"_asdict", "_fields", "_replace"}  # of a NamedTuple


def defined_names(tree: ast.AST) -> set[str]:
    """Names that the code itself gives to functions, attributes and variables."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


OURS = set().union(*(defined_names(ast.parse(path.read_text())) for path in FILES))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_imports(node: ast.AST) -> list[str]:
    """Dotted names in an import statement that are private to one of the packages."""
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        return []
    return [
        name
        for name in names
        if name.split(".")[0] in PACKAGES
        and (
            any(map(is_private, name.split(".")))
            or name in PRIVATE_MODULES
            or name.rpartition(".")[0] in PRIVATE_MODULES
        )
    ]


def private_attributes(node: ast.AST) -> list[str]:
    """Private names that an expression reads, sets or passes."""
    if isinstance(node, ast.Attribute):
        owner = node.value
        of_self = isinstance(owner, ast.Name) and owner.id in ("self", "cls")
        of_super = isinstance(owner, ast.Call) and ast.unparse(owner.func) == "super"
        if of_super and node.attr in OVERRIDDEN:
            return []
        if node.attr in PRIVATE_ATTRIBUTES and not (of_self and node.attr in OURS):
            return [node.attr]
        if is_private(node.attr) and node.attr not in OURS | PUBLIC:
            return [node.attr]
    if isinstance(node, ast.Constant) and node.value in PRIVATE_ATTRIBUTES:
        return [node.value]
    if isinstance(node, ast.keyword) and node.arg and is_private(node.arg):
        return [node.arg]
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_private_names_are_used_in_compat_alone(path):
    found = [
        f"line {node.lineno}: {name}"
        for node in ast.walk(ast.parse(path.read_text()))
        for name in private_imports(node) + private_attributes(node)
    ]
    assert not found, f"move to qrefta/_compat, with a reason: {found}"


@pytest.mark.parametrize(
    "line",
    [
        "from torch.utils._pytree import tree_leaves",
        "from transformers.core_model_loading import WeightConverter",
        "from transformers import core_model_loading",
        "import torch._subclasses",
        "tensor._version",
        "parameter.untyped_storage()._cdata",
        "model._keep_in_fp32_modules_strict = set()",
        "getattr(parameter, '_is_hf_initialized', False)",
        "super()._wrap_model(model)",
        "self._get_train_sampler()",
        "cached_file(name, _raise_exceptions_for_missing_entries=False)",
    ],
)
def test_a_private_name_is_found(line):
    nodes = list(ast.walk(ast.parse(line)))
    assert [name for node in nodes for name in private_imports(node) + private_attributes(node)]


def test_every_name_in_compat_has_a_use():
    """A name that nothing imports any more is removed."""
    imported = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "qrefta._compat"
            ):
                imported |= {alias.name for alias in node.names}
    for module in ROOT.glob("_compat/[a-z]*.py"):
        exported = next(
            ast.literal_eval(node.value)
            for node in ast.parse(module.read_text()).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        )
        assert set(exported) <= imported, module.name


def test_importing_compat_imports_no_package():
    """Else `import qrefta` would take seconds for one constant."""
    tree = ast.parse((ROOT / "_compat" / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
