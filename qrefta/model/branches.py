"""Branches of a module's code that its settings rule out.

Bloom multiplies with slices of a weight if `pretraining_tp` is more than 1. In published models it
is 1, so this code never runs.
"""

import ast
import copy
import operator
from collections.abc import Iterable, Mapping
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


def tested_settings(trees: Iterable[ast.AST]) -> set[str]:
    """Names of the attributes of `self` that conditions in some code use."""
    return {
        part.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        for part in ast.walk(node.test)
        if isinstance(part, ast.Attribute) and getattr(part.value, "id", "") == "self"
    }


def plain_setting(module: nn.Module, name: str) -> Any:
    """The value of an attribute if it is a plain setting of the module, else a mark for unknown.

    The mode (`training`) is none: it changes.
    """
    value = vars(module).get(name, _UNKNOWN)
    plain = isinstance(value, bool | int | float | str) and name != "training"
    return value if plain else _UNKNOWN


def without_dead_branches(tree: ast.AST, settings: Mapping[str, Any]) -> ast.AST:
    """A copy of code without the branches that a module's settings rule out.

    Args:
        tree: of a function.
        settings: `plain_setting` the module, by name: of all `tested_settings` of the code.
    """
    return _Pruned(settings).visit(copy.deepcopy(tree))


class _Pruned(ast.NodeTransformer):
    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings

    def visit_If(self, node: ast.If) -> Any:
        taken = _value(node.test, self._settings)
        self.generic_visit(node)
        if taken is _UNKNOWN:
            return node
        return (node.body if taken else node.orelse) or ast.Pass()


def _value(test: ast.expr, settings: Mapping[str, Any]) -> Any:
    """The value of a condition on plain settings of a module; `_UNKNOWN` if others decide it."""
    if isinstance(test, ast.Constant):
        return test.value
    if isinstance(test, ast.BoolOp):
        values = [_value(part, settings) for part in test.values]
        decisive = isinstance(test.op, ast.Or)
        if any(value is not _UNKNOWN and bool(value) is decisive for value in values):
            return decisive
        return _UNKNOWN if _UNKNOWN in values else not decisive
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = _value(test.operand, settings)
        return value if value is _UNKNOWN else not value
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        compare = _COMPARISONS.get(type(test.ops[0]))
        left = _value(test.left, settings)
        right = _value(test.comparators[0], settings)
        if compare is None or _UNKNOWN in (left, right):
            return _UNKNOWN
        return compare(left, right)
    return _setting(test, settings)


def _setting(node: ast.expr, settings: Mapping[str, Any]) -> Any:
    """The value of `self.<name>` if it is a plain setting of the module, else `_UNKNOWN`."""
    if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
        return _UNKNOWN
    return settings[node.attr] if node.value.id == "self" else _UNKNOWN
