"""The linear layers that a model's code uses in another way than to call them.

A packed weight would break code that reads the weight, and a plain residual would make it compute
something else; code that asks whether a module is an `nn.Linear` would take another branch. So the
source of all classes in a model is searched for reads of `.weight`, for `next(X.parameters())`,
which tells a dtype, and for such questions, and so is the source of the functions next to them.
Names are followed through assignments, loops and arguments:

    for block in self.blocks:                    # RWKV, before its first pass in eval mode
        block.attention.output.weight.div_(2)    # reads blocks.*.attention.output

Code that initializes, ties or resizes weights runs before a model is prepared. Reading the device
is harmless, code that names `torch.int8` (T5's feed-forward) expects packed weights, and branches
that a module's settings rule out (Bloom's) do not run.
"""

import ast
import functools
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeGuard

from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from qrefta.model.branches import plain_setting, tested_settings, without_dead_branches

# Parts of a module path; "*" stands for any one part. The first part is "self" for a path from the
# module whose code it is, else it is any module.
_Path = tuple[str, ...]

_ANY = "*"
_FIRST = "next()"  # the last part of a path, for the module that has the first parameter below it
_BEFORE = re.compile(r"__init__$|_?init|reset_param|post_init$|_?tie_|.*resize|set_.*embed|extra_")
_LIBRARY = {*PreTrainedModel.__mro__, *GenerationMixin.__mro__}
_LOOPS = ("enumerate", "zip", "reversed", "list", "tuple", "iter", "next")
_CONTENTS = ("values", "items", "children", "named_children")
_DEEPEST = 20  # a name may be assigned from itself


def read_weights(model: nn.Module) -> set[str]:
    """Paths of the modules in a model whose weight is read by code of the model."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=False)]
    read: set[str] = set()
    for path, module in model.named_modules():
        kind = type(module)
        settings = tuple((name, plain_setting(module, name)) for name in _tested(kind))
        found = _read_by(kind, settings)
        for first, *parts in found:
            takes_first = parts[-1] == _FIRST
            if takes_first:
                parts.pop()
            pattern = _pattern(path if first == "self" else None, parts)
            for owner in filter(pattern.fullmatch, paths):
                if takes_first:
                    read.update(_owner_of_first(owner, model.get_submodule(owner)))
                else:
                    read.add(owner)
    return read


def _owner_of_first(path: str, module: nn.Module) -> Iterator[str]:
    """The path of the module that has the first parameter of a module; none without parameters."""
    name = next((name for name, _ in module.named_parameters()), None)
    if name is not None:
        yield ".".join(part for part in (path, *name.split(".")[:-1]) if part)


# Kept, because finding and parsing the code of a class takes longer than all else here.
@functools.cache
def _read_by(kind: type, settings: tuple[tuple[str, Any], ...]) -> set[_Path]:
    """Paths of the modules whose weight the code of a class reads, with some settings."""
    pruned = [(name, without_dead_branches(tree, dict(settings))) for name, tree in _trees(kind)]
    return _reads(pruned)


@functools.cache
def _tested(kind: type) -> list[str]:
    """Names of the settings that conditions in the code of a class use."""
    return sorted(tested_settings(tree for _, tree in _trees(kind)))


def _pattern(start: str | None, parts: Iterable[str]) -> re.Pattern[str]:
    """An expression for the paths that end in `parts`, directly below `start` if it is given."""
    tail = [r"[^.]+" if part == _ANY else re.escape(part) for part in parts]
    if start is None:
        return re.compile(r"(.*\.)?" + r"\.".join(tail))
    return re.compile(r"\.".join([re.escape(start), *tail] if start else tail))


@functools.cache
def _trees(kind: type) -> list[tuple[str, ast.AST]]:
    """Names and code of the functions of a class, and near it, that may read weights."""
    functions = _functions(kind)
    marks = ("weight", "parameters(", "Linear")
    if not any(mark in source for _, source in functions for mark in marks):
        return []
    trees = [(name, _parsed(source)) for name, source in functions if "torch.int8" not in source]
    return trees + [inner for _, tree in trees for inner in _inner_functions(tree)]


def _inner_functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Names and code of the functions and named lambdas inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node not in tree.body:
            yield node.name, node
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            for target in node.targets:
                yield getattr(target, "id", ""), node.value


def _parsed(source: str) -> ast.Module:
    """The code of a function that is indented as in its file; comments and texts in it may be
    less.
    """
    if not source[:1].isspace():
        return ast.parse(source)
    block = ast.parse(f"if True:\n{source}").body[0]
    assert isinstance(block, ast.If)
    return ast.Module(block.body, type_ignores=[])


def _reads(trees: list[tuple[str, ast.AST]]) -> set[_Path]:
    """Paths of the modules whose weight some functions read."""
    read: set[_Path] = set()
    arguments: dict[str, set[int | str]] = {}  # of functions that read an argument's weight
    for name, tree in trees:
        names = _Names(tree)
        for first, *parts in (path for node in _owners(tree) for path in names.paths(node)):
            if parts == [_FIRST] and first in names.parameters[:1]:
                read.add(("self", _FIRST))  # also of functions that a method calls with itself
            elif parts and parts != [_FIRST]:
                read.add((first, *parts))
            elif first in names.parameters:
                arguments.setdefault(name, set()).update((first, names.parameters.index(first)))
    for _, tree in trees:
        read |= {path for path in _passed(tree, arguments) if len(path) > 1}
    return read


def _passed(tree: ast.AST, arguments: dict[str, set[int | str]]) -> Iterator[_Path]:
    """Paths of the modules that are passed to functions which read their weight."""
    names = _Names(tree)
    for call in ast.walk(tree) if arguments else ():
        if not isinstance(call, ast.Call):
            continue
        is_method = isinstance(call.func, ast.Attribute)
        name = getattr(call.func, "attr" if is_method else "id", "")
        given: list[tuple[int | str | None, ast.expr]] = list(enumerate(call.args, is_method))
        given += [(keyword.arg, keyword.value) for keyword in call.keywords]
        for place, value in given:
            if place in arguments.get(name, ()):
                yield from names.paths(value)


def _owners(tree: ast.AST) -> Iterator[ast.expr]:
    """The expressions X of `X.weight`, `getattr(X, "weight")`, `X.get_parameter("weight")`,
    `X.parameters()`, `isinstance(X, nn.Linear)` and `type(X) is nn.Linear`, except of
    `X.weight.device`; and `next(X.parameters())`, except of its device.
    """
    of_device = _of_device(tree)
    for node in ast.walk(tree):
        yield from _asked_for_linear(node)
        if isinstance(node, ast.Attribute) and node.attr == "weight" and node not in of_device:
            yield node.value
        elif _is_getattr(node) and _constant(node.args[1]) == "weight":
            yield node.args[0]
        elif _takes_first(node) and node not in of_device:
            yield node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if node.func.attr == "parameters" and not _is_taken_first(node, tree):
                yield owner
            elif node.func.attr == "get_parameter" and node.args:
                yield from _owner_of_parameter(owner, _constant(node.args[0]))


def _asked_for_linear(node: ast.AST) -> Iterator[ast.expr]:
    """The expression X of `isinstance(X, nn.Linear)` or `type(X) is nn.Linear`."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
        if len(node.args) == 2 and "Linear" in ast.unparse(node.args[1]):
            yield node.args[0]
    elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Call):
        of_type = getattr(node.left.func, "id", "") == "type" and bool(node.left.args)
        if of_type and any("Linear" in ast.unparse(other) for other in node.comparators):
            yield node.left.args[0]


def _takes_first(node: ast.AST) -> TypeGuard[ast.Call]:
    """Whether an expression is `next(X.parameters())`."""
    return (
        isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "next"
        and len(node.args) > 0
        and isinstance(node.args[0], ast.Call)
        and getattr(node.args[0].func, "attr", "") == "parameters"
    )


def _of_device(tree: ast.AST) -> set[ast.expr]:
    """The expressions X of `X.device`."""
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.value for node in attributes if node.attr == "device"}


def _is_taken_first(call: ast.Call, tree: ast.AST) -> bool:
    """Whether a call of `parameters()` is the one in `next(X.parameters())`."""
    return any(_takes_first(node) and call is node.args[0] for node in ast.walk(tree))


def _owner_of_parameter(owner: ast.expr, name: Any) -> Iterator[ast.expr]:
    """The expression of the module that has a parameter, by the parameter's name below `owner`."""
    path, _, last = str(name).rpartition(".")
    if last != "weight":
        return
    function = ast.Attribute(owner, "get_submodule", ast.Load())
    yield ast.Call(function, [ast.Constant(path)], []) if path else owner


class _Names:
    """The names of a function, and the modules that they may stand for.

    Attributes:
        parameters: of the function, in order; "self" among them, or "" for a static method.
    """

    def __init__(self, tree: ast.AST) -> None:
        self.parameters: list[str] = []
        self._values: dict[str, list[ast.expr]] = {}  # that are assigned
        self._looped: dict[str, list[ast.expr]] = {}  # whose items are assigned
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.Lambda) and not self.parameters:
                self.parameters = _parameters(node)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self._bind(target, node.value, self._values)
            elif isinstance(node, ast.NamedExpr | ast.AnnAssign) and node.value is not None:
                self._bind(node.target, node.value, self._values)
            elif isinstance(node, ast.For | ast.comprehension):
                self._bind(node.target, node.iter, self._looped)

    def _bind(self, target: ast.expr, value: ast.expr, bound: dict[str, list[ast.expr]]) -> None:
        """Bind a name to a value, or several to the parts of a tuple, of zip or of enumerate."""
        if isinstance(target, ast.Name):
            bound.setdefault(target.id, []).append(value)
        if not isinstance(target, ast.Tuple):
            return
        values = [value] * len(target.elts)
        if isinstance(value, ast.Tuple):
            values = value.elts
        elif isinstance(value, ast.Call) and getattr(value.func, "id", "") == "zip":
            values = value.args
        for name, part in zip(target.elts, values, strict=False):
            self._bind(name, part, bound)

    def paths(self, node: ast.expr, depth: int = 0) -> set[_Path]:
        """The paths that an expression may stand for; none if it is no module."""
        depth += 1
        if depth > _DEEPEST:
            return set()
        if isinstance(node, ast.Name):
            return self._of_name(node.id, depth)
        if isinstance(node, ast.Attribute):
            return self._inside(node.value, node.attr, depth)
        if isinstance(node, ast.Subscript):
            if isinstance(node.slice, ast.Slice):
                return self.paths(node.value, depth)
            return self._inside(node.value, _constant(node.slice), depth)
        if isinstance(node, ast.List | ast.Tuple):
            return {path for part in node.elts for path in self.paths(part, depth)}
        if _is_getattr(node):
            return self._inside(node.args[0], _constant(node.args[1]), depth)
        if _takes_first(node):
            assert isinstance(node.args[0], ast.Call)
            assert isinstance(node.args[0].func, ast.Attribute)
            return self._inside(node.args[0].func.value, _FIRST, depth)
        if isinstance(node, ast.Call):
            return self._of_call(node, depth)
        return set()

    def _of_name(self, name: str, depth: int) -> set[_Path]:
        found: set[_Path] = set()
        for value in self._values.get(name, []):
            found |= self.paths(value, depth)
        for value in self._looped.get(name, []):
            for path in self.paths(value, depth):
                found |= {path, (*path, _ANY)}  # of a list of modules, or of a module list
        return found or {(name,)}

    def _of_call(self, call: ast.Call, depth: int) -> set[_Path]:
        """The paths of `loop(modules)`, `modules.values()` or `module.get_submodule("a.b")`."""
        if isinstance(call.func, ast.Name) and call.func.id in _LOOPS:
            return {path for value in call.args for path in self.paths(value, depth)}
        if not isinstance(call.func, ast.Attribute):
            return set()
        owner = call.func.value
        if call.func.attr in _CONTENTS:
            return self.paths(owner, depth)
        if call.func.attr == "get_submodule" and call.args:
            return self._inside(owner, _constant(call.args[0]), depth)
        return set()

    def _inside(self, owner: ast.expr, name: Any, depth: int) -> set[_Path]:
        """The paths of a module's child by its name; None: of any child."""
        parts = (_ANY,) if name is None else tuple(str(name).split("."))
        return {(*path, *parts) for path in self.paths(owner, depth)}


def _parameters(function: ast.FunctionDef | ast.Lambda) -> list[str]:
    """The names of a function's parameters, in the order of a call through an object."""
    taken = function.args
    every = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs]
    names = [argument.arg for argument in every]
    decorators = getattr(function, "decorator_list", [])
    is_static = any(getattr(one, "id", "") == "staticmethod" for one in decorators)
    return ["", *names] if is_static else names


def _is_getattr(node: ast.AST) -> TypeGuard[ast.Call]:
    return (
        isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "getattr"
        and len(node.args) > 1
    )


def _constant(node: ast.expr) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


def _functions(kind: type) -> list[tuple[str, str]]:
    """Names and source code of the methods of a class and its bases, and of the functions in their
    files that these name.

    Functions without source code (made at run time) are left out, and so are transformers' base
    classes. It is read function by function, because `inspect.getsource` of a class parses its
    whole file.
    """
    sources: list[tuple[str, str]] = []
    near: dict[str, Any] = {}
    for base in kind.__mro__:
        if base not in _LIBRARY:
            module = vars(sys.modules.get(base.__module__, object))
            near |= {name: value for name, value in module.items() if inspect.isfunction(value)}
            for member in vars(base).values():
                sources += _source(_plain_function(member))
    for _, source in sources:  # it grows
        for name in set(re.findall(r"\w+", source)) & near.keys():
            sources += _source(near.pop(name))
    return sources


def _source(function: Any) -> list[tuple[str, str]]:
    """Name and source code of a function; nothing for other objects, or without source code."""
    if not inspect.isfunction(function) or _BEFORE.match(function.__name__):
        return []
    with suppress(OSError):
        return [(function.__name__, inspect.getsource(function))]
    return []


def _plain_function(member: Any) -> Any:
    """The function of a method, property, static or class method."""
    if isinstance(member, property):
        return member.fget
    return getattr(member, "__func__", member)
