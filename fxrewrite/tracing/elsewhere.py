"""Which modules of a model's parts are called by more than the part that was traced."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .partial import Part
from .tracer import has_no_forward


def used_elsewhere(model: nn.Module, parts: Iterable[Part], untraced: Iterable[str]) -> set[int]:
    """The identities of modules that a second part calls, or that untraced code may call itself.

    What code that was not traced does is read off its source, conservatively: a module inside of a
    part that it names, iterates over, or calls another method of than `forward`, is taken for used
    there, with all that is inside. That it calls a part as a whole is what the part was traced for.

    Args:
        model: the model.
        parts: its parts that were traced.
        untraced: the qualified names of the modules whose own forward was not.
    """
    calls: Counter[int] = Counter()
    for part in parts:
        targets = {str(node.target) for node in part.graph.find_nodes(op="call_module")}
        calls.update({id(model.get_submodule(target)) for target in targets})
    found = {key for key, count in calls.items() if count > 1}
    roots = {id(model.get_submodule(part.name)) for part in parts}
    opened = {id(model.get_submodule(name)) for name in untraced}
    for name in untraced:
        for module, is_opened_up in _reached(model.get_submodule(name)):
            if id(module) in opened:
                continue
            for each in module.children() if is_opened_up else (module,):
                found.update(map(id, _inside(each, roots)))
    return found


def _inside(module: nn.Module, roots: set[int]) -> Iterator[nn.Module]:
    """A module with all in it, but nothing of a part that is called as a whole."""
    if id(module) in roots:
        return
    if has_no_forward(module):
        for child in module.children():
            yield from _inside(child, roots)
    else:
        yield from module.modules()


def _reached(module: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """The submodules that the code of a module's class names, and whether it goes inside them."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.nn.modules") or not issubclass(cls, nn.Module):
            continue
        kind: Any = cls  # mypy takes the hash of a class for that of its instances
        chains = _chains(kind)
        if chains is None:
            yield from ((each, True) for each in module.children())
            continue
        for names, goes_inside in chains:
            inner, rest = _resolved(module, names)
            if inner is not module:
                is_method = bool(rest) and callable(getattr(type(inner), rest[0], None))
                calls_forward = rest[:1] in ((), ("forward",))
                yield inner, goes_inside or (is_method and not calls_forward)


def _resolved(module: nn.Module, names: tuple[str, ...]) -> tuple[nn.Module, tuple[str, ...]]:
    """The submodule that a chain of attributes leads to, and what of the chain is left."""
    for i, name in enumerate(names):
        child = module._modules.get(name)
        if child is None:
            return module, names[i:]
        module = child
    return module, ()


@functools.lru_cache(maxsize=1024)
def _chains(cls: type[nn.Module]) -> tuple[tuple[tuple[str, ...], bool], ...] | None:
    """Each `self.a.b` of a class's methods, and whether it is iterated over or subscripted.

    `__init__` is left out, since it only builds. None where there is no source to read.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return None
    methods = [
        each
        for each in ast.walk(tree)
        if isinstance(each, ast.FunctionDef) and each.name != "__init__"
    ]
    found: dict[tuple[tuple[str, ...], bool], None] = {}
    for node in (each for method in methods for each in ast.walk(method)):
        inside: list[ast.expr] = []
        if isinstance(node, ast.For | ast.comprehension):
            inside = [node.iter, *(node.iter.args if isinstance(node.iter, ast.Call) else [])]
        elif isinstance(node, ast.Subscript):
            inside = [node.value]
        found.update({(names, True): None for each in inside if (names := _names(each))})
        if isinstance(node, ast.Attribute) and (names := _names(node)):
            found[names, False] = None
    return tuple(found)


def _names(expression: ast.expr) -> tuple[str, ...]:
    """The names of `self.a.b`, or none."""
    names: list[str] = []
    while isinstance(expression, ast.Attribute):
        names.append(expression.attr)
        expression = expression.value
    is_own = isinstance(expression, ast.Name) and expression.id == "self"
    return tuple(reversed(names)) if is_own else ()
