"""The syntax tree of a function that is there, found by its code object."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import attrs

Definition: TypeAlias = "ast.FunctionDef | ast.Lambda"
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.GeneratorExp)
_NOT_PLAIN = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


@attrs.frozen(eq=False)
class Source:
    """The definition of a function, and where it is written."""

    definition: Definition
    name: str
    filename: str

    @property
    def body(self) -> list[ast.stmt]:
        """The statements; of a lambda, the return of its value."""
        if isinstance(self.definition, ast.Lambda):
            inner = self.definition.body
            return [ast.copy_location(ast.Return(inner), inner)]
        return self.definition.body

    def at(self, node: ast.AST) -> str:
        """A place in the function as a message has it: its line, the file, the code there."""
        number = getattr(node, "lineno", 0)
        line = linecache.getline(self.filename, number).strip()
        return f"`{line}` in {self.name} ({Path(self.filename).name}:{number})"


@functools.lru_cache(maxsize=4096)
def source_of(code: types.CodeType) -> Source | None:
    """The definition that a code object was compiled from, or None where it is not to be had."""
    if code.co_flags & _NOT_PLAIN:
        return None
    found = [
        each
        for each in _definitions(code.co_filename).get(code.co_firstlineno, ())
        if getattr(each, "name", "<lambda>") == code.co_name and _is_of(each, code)
    ]
    return Source(found[0], code.co_name, code.co_filename) if len(found) == 1 else None


@functools.lru_cache(maxsize=4096)
def captured(definition: Definition) -> frozenset[str]:
    """The names that functions and generators inside a function mention."""
    inner = (each for each in _walk_inside(definition) if isinstance(each, _SCOPES))
    return frozenset(
        node.id for each in inner for node in ast.walk(each) if isinstance(node, ast.Name)
    )


def parameters(definition: Definition) -> list[str]:
    """The names of a function's parameters, as its code object orders them."""
    all_of = definition.args
    named = [*all_of.posonlyargs, *all_of.args, *all_of.kwonlyargs]
    named += [each for each in (all_of.vararg, all_of.kwarg) if each is not None]
    return [each.arg for each in named]


def _walk_inside(definition: Definition) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(definition):
        yield from ast.walk(child)


@functools.lru_cache(maxsize=256)
def _definitions(filename: str) -> dict[int, list[Any]]:
    """All functions of a file by the line where their code begins."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return {}
    found: dict[int, list[Any]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            decorators = getattr(node, "decorator_list", ())
            first = min([node.lineno, *(each.lineno for each in decorators)])
            found.setdefault(first, []).append(node)
    return found


def _is_of(definition: Definition, code: types.CodeType) -> bool:
    """Whether names agree: of several lambdas on one line, and of a file that has changed since."""
    named = parameters(definition)
    if tuple(named) != code.co_varnames[: len(named)]:
        return False
    mentioned: set[str] = set()
    for node in ast.walk(definition):
        if isinstance(node, ast.Name):
            mentioned.add(node.id)
        elif isinstance(node, ast.Attribute):
            mentioned.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            return True  # whose code names what the statement does not
    return all(name in mentioned for name in code.co_names if "__" not in name)
