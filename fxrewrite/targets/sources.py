"""The source of functions: what an instruction computes, and in which scope."""

from __future__ import annotations

import ast
import dis
import functools
import linecache
from types import CodeType
from typing import TypeAlias

import attrs

from ..ir.op_traits import ATTRIBUTES, traits_of_method
from ..tracing.passages import Passage

Scope: TypeAlias = (
    ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
)  # fmt: skip
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, *COMPREHENSIONS)
_METADATA = frozenset({"is_cuda", "layout", "requires_grad"})


def asks_metadata(name: str) -> bool:
    """Whether an attribute or method of a tensor says nothing of its numbers."""
    known = name in ATTRIBUTES and ATTRIBUTES[name].asks == "metadata"
    return known or name in _METADATA or traits_of_method(name).asks == "metadata"


def last_name(node: ast.AST) -> str:
    """What a variable or an attribute is called; empty for any other expression."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


@attrs.frozen
class Function:
    """The source of a function, and the expressions in it that give and take a value.

    The value comes in by a parameter where `begin` is its name, and is returned where nothing takes
    it. What is not found in the source is None.
    """

    source: Source
    scope: Scope
    begin: ast.expr | str | None
    end: ast.expr | None


def found(way: Passage) -> Function | None:
    """The source of a passage, if it is found."""
    source = source_of(way.code.co_filename)
    if source is None:
        return None
    begin = way.begin if isinstance(way.begin, str) else source.at(way.code, way.begin)
    end = None if way.end is None else source.at(way.code, way.end)
    scope = source.scope(way.code, begin if isinstance(begin, ast.expr) else end)
    return None if scope is None else Function(source, scope, begin, end)


def line_of(way: Passage, *, giving: bool = False) -> str:
    """The line at which a function calls what gives, or takes, a value."""
    function = found(way)
    node = function and (function.begin if giving else function.end)
    return function.source.line(node) if function and isinstance(node, ast.expr) else ""


class Source:
    """A file's syntax tree, with the scope that each expression stands in."""

    def __init__(self, name: str, tree: ast.Module) -> None:
        self.name = name
        self._by_end: dict[tuple[int | None, int | None], list[ast.expr]] = {}
        self._scopes: list[Scope] = []
        self._inside: dict[ast.AST, tuple[Scope, ...]] = {}
        self._scope_of: dict[tuple[CodeType, ast.expr | None], Scope | None] = {}
        self._add(tree, ())

    def _add(self, node: ast.AST, inside: tuple[Scope, ...]) -> None:
        if isinstance(node, ast.expr):
            self._by_end.setdefault((node.end_lineno, node.end_col_offset), []).append(node)
            self._inside[node] = inside
        if isinstance(node, _SCOPES):
            self._scopes.append(node)
            inside = (*inside, node)
        for child in ast.iter_child_nodes(node):
            self._add(child, inside)

    def at(self, code: CodeType, instruction: int) -> ast.expr | None:
        """The expression that an instruction computes."""
        positions = getattr(code, "co_positions", None)
        if positions is None:  # Python 3.10 tells the line alone
            line = next((n for a, b, n in code.co_lines() if a <= instruction < b), None)
            known = (each for found in self._by_end.values() for each in found)
            calls = [e for e in known if isinstance(e, ast.Call) and e.lineno == line]
            return calls[0] if len(calls) == 1 else None
        line, end_line, column, end_column = list(positions())[instruction // 2]
        found = self._by_end.get((end_line, end_column), [])
        if dis.opname[code.co_code[instruction]].startswith(("CALL", "PRECALL")):
            return next((each for each in found if isinstance(each, ast.Call)), None)
        exact = (each for each in found if (each.lineno, each.col_offset) == (line, column))
        return next(exact, None)

    def scope(self, code: CodeType, expression: ast.expr | None) -> Scope | None:
        """The function, or comprehension, whose code this is."""
        key = code, expression
        if key not in self._scope_of:
            inside = self._scopes if expression is None else self._inside[expression]
            found = (each for each in reversed(inside) if _is_code_of(each, code))
            self._scope_of[key] = next(found, None)
        return self._scope_of[key]

    def line(self, node: ast.AST) -> str:
        """Where a node is: file, number and text of the line."""
        number = getattr(node, "lineno", 0)
        return f"{self.name}:{number}: {linecache.getline(self.name, number).strip()}"


def _is_code_of(scope: Scope, code: CodeType) -> bool:
    if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
        first = min(each.lineno for each in (scope, *scope.decorator_list))
        return scope.name == code.co_name and first == code.co_firstlineno
    name = {ast.Lambda: "lambda", ast.GeneratorExp: "genexpr"}.get(type(scope))
    return code.co_name == f"<{name or type(scope).__name__.lower()}>" and (
        scope.lineno == code.co_firstlineno
    )


@functools.lru_cache(maxsize=256)
def source_of(name: str) -> Source | None:
    """The syntax tree of a file, or of code that is known under such a name."""
    try:
        return Source(name, ast.parse("".join(linecache.getlines(name)) or "?"))
    except SyntaxError:
        return None
