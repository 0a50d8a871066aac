"""Whether the code of a module reads the weight of a linear layer that it holds.

A packed weight is no matrix, so such a layer must stay as it is. The source code is read, because
only a run of every branch could show the same.
"""

import ast
import inspect
import operator
import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any

from torch import nn

_COMPARISONS: dict[type[ast.cmpop], Any] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}
_UNKNOWN = object()


def reads_weight(parent: nn.Module, name: str) -> bool:
    """Whether code of a module reads the weight of its linear layer `name`.

    Reading the device is harmless, and code that names `torch.int8` (T5's feed-forward) expects
    packed weights. Branches that the module's settings rule out do not count: Bloom reads weights
    only if `pretraining_tp` is more than 1.
    """
    source = _source(type(parent))
    if "torch.int8" in source or not re.search(rf"self\.{name}\.weight\b(?!\.device)", source):
        return False
    return any(
        _is_weight(node, name) for tree in _trees(type(parent)) for node in _reachable(tree, parent)
    )


def _is_weight(node: ast.AST, name: str) -> bool:
    """Whether a node is `self.<name>.weight`."""
    return isinstance(node, ast.Attribute) and ast.unparse(node) == f"self.{name}.weight"


def _reachable(node: ast.AST, module: nn.Module) -> Iterator[ast.AST]:
    """The node and all nodes in it, without branches that the module's settings rule out."""
    yield node
    children: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If):
        taken = _value(node.test, module)
        if taken is not _UNKNOWN:
            children = list(node.body if taken else node.orelse)
    elif isinstance(node, ast.Attribute) and node.attr == "device":
        children = []
    for child in children:
        yield from _reachable(child, module)


def _value(test: ast.expr, module: nn.Module) -> Any:
    """The value of a condition on plain settings of a module; `_UNKNOWN` if others decide it."""
    if isinstance(test, ast.Constant):
        return test.value
    if isinstance(test, ast.BoolOp):
        values = [_value(part, module) for part in test.values]
        decisive = isinstance(test.op, ast.Or)
        if any(value is not _UNKNOWN and bool(value) is decisive for value in values):
            return decisive
        return _UNKNOWN if _UNKNOWN in values else not decisive
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _value(test.operand, module)
        return value if value is _UNKNOWN else not value
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        compare = _COMPARISONS.get(type(test.ops[0]))
        left = _value(test.left, module)
        right = _value(test.comparators[0], module)
        if compare is None or _UNKNOWN in (left, right):
            return _UNKNOWN
        return compare(left, right)
    return _setting(test, module)


def _setting(node: ast.expr, module: nn.Module) -> Any:
    """The value of `self.<name>` if it is a plain setting of the module, else `_UNKNOWN`."""
    if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
        return _UNKNOWN
    if node.value.id != "self" or node.attr == "training":
        return _UNKNOWN
    value = vars(module).get(node.attr, _UNKNOWN)
    return value if isinstance(value, bool | int | float | str) else _UNKNOWN


@cache
def _trees(module_class: type) -> tuple[ast.AST, ...]:
    """The parsed methods of a class and its bases."""
    return tuple(ast.parse(textwrap.dedent(source)) for source in _methods(module_class))


@cache
def _source(module_class: type) -> str:
    """Source code of the methods of a class and its bases."""
    return "".join(_methods(module_class))


def _methods(module_class: type) -> Iterator[str]:
    """Source code of each method of a class and its bases.

    Methods without source code (made at run time) are left out. It is read method by method,
    because `inspect.getsource` of a class parses its whole file.
    """
    for base in module_class.__mro__:
        if base in (nn.Module, object):
            continue
        for method in vars(base).values():
            if inspect.isfunction(method):
                with suppress(OSError):
                    yield inspect.getsource(method)
