"""Read an expression: what it may give, whichever way the forward goes."""

from __future__ import annotations

import ast
import builtins
import itertools
import operator
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ..reading import calls, objects
from .binding import Arguments
from .reader import Reader, UnreadableError
from .sources import Source
from .values import (
    DEFERRED,
    UNKNOWN,
    Env,
    Items,
    Keywords,
    Known,
    Many,
    Output,
    Value,
    constants,
    hold_code,
    is_plain,
    joined,
    joined_envs,
    known,
    names_of,
)

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda one, other: one in other,
    ast.NotIn: lambda one, other: one not in other,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
# How many combinations of what two operands may be are looked at each by itself.
_MOST_PAIRS = 16


def _has_no_eq(value: Value) -> bool:
    """Whether all that it may be are modules, which are equal if they are one and the same."""
    return all(
        isinstance(atom, Known)
        and isinstance(atom.value, nn.Module)
        and type(atom.value).__eq__ is object.__eq__
        for atom in value
    )


class Expressions:
    """Reads the expressions of one function.

    `env` has the variables; it is None where no way leads to.
    """

    def __init__(self, reader: Reader, source: Source, names: Callable[[str], Any]) -> None:
        self.reader = reader
        self.source = source
        self.env: Env | None = {}
        self.self_value: Value = UNKNOWN
        self.owner: type | None = None
        # Functions and generators that were made here, and may run later.
        self.deferred: dict[int, ast.AST] = {}
        self._names = names

    @property
    def here(self) -> Env:
        """The variables at a place that a way leads to."""
        assert self.env is not None
        return self.env

    def at(self, node: ast.AST) -> str:
        """The place of a node as messages have it."""
        return self.source.at(node)

    def value(self, node: ast.expr) -> Value:
        """What an expression may give."""
        self.reader.step()
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        return method(node) if method is not None else self._rest(node)

    def truth(self, node: ast.expr) -> bool | None:
        """Whether a test holds, or None where it does not hold or fail for ever."""
        value = self.value(node)
        found = {objects.truth(atom, self.reader) for atom in value}
        if found == {True} or found == {False}:
            return found.pop()
        self.reader.consume(frozenset(a for a in value if isinstance(a, Output)), self.at(node))
        return None

    def used(self, node: ast.expr) -> Value:
        """Read an expression of whose value nothing further is known."""
        self.reader.consume(self.value(node), self.at(node))
        return UNKNOWN

    def _rest(self, node: ast.AST) -> Value:
        found = [self.value(e) for e in ast.iter_child_nodes(node) if isinstance(e, ast.expr)]
        for each in found:
            self.reader.consume(each, self.at(node))
        return UNKNOWN | DEFERRED if hold_code(found) else UNKNOWN

    def _constant(self, node: ast.Constant) -> Value:
        return known(node.value)

    def _name(self, node: ast.Name) -> Value:
        if node.id in self.here:
            return self.here[node.id]
        found = self._names(node.id)
        if found is objects.MISSING:
            found = getattr(builtins, node.id, objects.MISSING)
        elif is_plain(found):  # a setting that somebody may change
            return UNKNOWN
        return UNKNOWN if found is objects.MISSING else known(found)

    def _attribute(self, node: ast.Attribute) -> Value:
        return self._each(node.value, lambda atom: objects.attribute(atom, node.attr, self, node))

    def _subscript(self, node: ast.Subscript) -> Value:
        index = self.value(node.slice)
        return self._each(node.value, lambda atom: objects.item(atom, index, self, node))

    def _each(self, node: ast.expr, read: Callable[[Any], Value]) -> Value:
        return joined(*[read(atom) for atom in self.value(node)])

    def _slice(self, node: ast.Slice) -> Value:
        parts = [
            known(None) if e is None else self.value(e) for e in (node.lower, node.upper, node.step)
        ]
        found = constants(parts)
        if found is not None and is_plain(tuple(found)):
            return known(slice(*found))
        for part in parts:
            self.reader.consume(part, self.at(node))
        return UNKNOWN

    def _tuple(self, node: ast.Tuple) -> Value:
        if any(isinstance(each, ast.Starred) for each in node.elts):
            return self._rest(node)
        return frozenset({Items(tuple(map(self.value, node.elts)))})

    def _dict(self, node: ast.Dict) -> Value:
        keys = [each.value for each in node.keys if isinstance(each, ast.Constant)]
        if len(keys) < len(node.keys) or not all(isinstance(each, str) for each in keys):
            return self._rest(node)
        values = map(self.value, node.values)
        return names_of(dict(zip(map(str, keys), values, strict=True)), node)

    def _namedexpr(self, node: ast.NamedExpr) -> Value:
        value = self.value(node.value)
        self.store(node.target, value)
        return value

    def _boolop(self, node: ast.BoolOp) -> Value:
        """As Python does: the first operand that decides it, or else the last."""
        decides = isinstance(node.op, ast.Or)
        found: list[Value] = []
        unclear = 0
        for i, operand in enumerate(node.values):
            value = self.value(operand)
            truths = {objects.truth(atom, self.reader) for atom in value}
            if truths == {decides} or i == len(node.values) - 1:
                found.append(value)
                break
            if truths != {not decides}:
                found.append(value)
                unclear += 1
                self.reader.conditions.append(ast.unparse(operand))
        del self.reader.conditions[len(self.reader.conditions) - unclear :]
        return joined(*found)

    def _ifexp(self, node: ast.IfExp) -> Value:
        test = self.truth(node.test)
        if test is not None:
            return self.value(node.body if test else node.orelse)
        with self.reader.under(self.reader.conditions, ast.unparse(node.test)):
            before = dict(self.here)
            one, after = self.value(node.body), self.env
            self.env = before
            other = self.value(node.orelse)
            self.env = joined_envs([after, self.env])
        return joined(one, other)

    def _unaryop(self, node: ast.UnaryOp) -> Value:
        if isinstance(node.op, ast.Not):
            test = self.truth(node.operand)
            return UNKNOWN if test is None else known(not test)
        return self._computed(node, node.op, [self.value(node.operand)])

    def _binop(self, node: ast.BinOp) -> Value:
        return self._computed(node, node.op, [self.value(node.left), self.value(node.right)])

    def _compare(self, node: ast.Compare) -> Value:
        values = [self.value(each) for each in (node.left, *node.comparators)]
        if len(node.ops) > 1:
            for value in values:
                self.reader.consume(value, self.at(node))
            return UNKNOWN
        if isinstance(node.ops[0], ast.Is | ast.IsNot):
            return self._identity(values, isinstance(node.ops[0], ast.Is))
        if isinstance(node.ops[0], ast.Eq | ast.NotEq) and all(map(_has_no_eq, values)):
            return self._identity(values, isinstance(node.ops[0], ast.Eq))
        if isinstance(node.ops[0], ast.In | ast.NotIn):
            pairs = list(itertools.product(*values))
            found = [objects.is_key(one, other, self.reader) for one, other in pairs]
            if pairs and None not in found:
                is_in = isinstance(node.ops[0], ast.In)
                return joined(*[known(each is is_in) for each in found])
        return self._computed(node, node.ops[0], values)

    def _identity(self, values: list[Value], positive: bool) -> Value:
        found: list[Value] = []
        for one, other in itertools.product(*values):
            if isinstance(one, Known) and isinstance(other, Known):
                found.append(known((one.value is other.value) == positive))
            else:
                one_is_none = Known(None) in (one, other)
                both = (one, other)
                fixed = one_is_none and any(isinstance(e, Items | Many | Keywords) for e in both)
                found.append(known(not positive) if fixed else UNKNOWN)
        return joined(*found)

    def _computed(self, node: ast.AST, op: ast.AST, values: list[Value]) -> Value:
        """An operator's value, where its operands are plain; else anything."""
        function = _OPERATORS.get(type(op))
        pairs = list(itertools.islice(itertools.product(*values), _MOST_PAIRS + 1))
        found: list[Value] = []
        for pair in pairs:
            operands = constants([frozenset({atom}) for atom in pair])
            if function is None or operands is None or not all(map(is_plain, operands)):
                break
            try:
                found.append(known(function(*operands)))
            except Exception:
                break
        if pairs and len(found) == len(pairs) <= _MOST_PAIRS:
            return joined(*found)
        for value in values:
            self.reader.consume(value, self.at(node))
        return UNKNOWN

    def _joinedstr(self, node: ast.JoinedStr) -> Value:
        parts = []
        for each in node.values:
            inner = each.value if isinstance(each, ast.FormattedValue) else each
            found = constants([self.value(inner)])
            special = isinstance(each, ast.FormattedValue) and (
                each.format_spec is not None or each.conversion != -1
            )
            if found is None or special or not is_plain(found[0]):
                return self._rest(node)
            parts.append(str(found[0]))
        return known("".join(parts))

    def _call(self, node: ast.Call) -> Value:
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args:
            return self._super()
        callee = self.value(node.func)
        arguments = Arguments.of(node, self)
        found = []
        for i, atom in enumerate(callee):
            with self.reader.under(self.reader.path, (id(node), i)):
                found.append(calls.call(atom, arguments, self, node))
        return joined(*found)

    def _super(self) -> Value:
        found = constants([self.self_value])
        cell = self._names("__class__")
        if not found or not isinstance(cell, type) or not isinstance(found[0], cell):
            raise UnreadableError("super() can't be followed")
        key = ("super", id(cell), id(found[0]))
        return known(self.reader.once(key, lambda: super(cell, found[0])))

    def _lambda(self, node: ast.Lambda) -> Value:
        return self.defer(node)

    def defer(self, node: ast.AST) -> Value:
        """A function that is made here: it is read at the end, as if called on anything."""
        self.deferred[id(node)] = node
        return DEFERRED

    def store(self, target: ast.expr, value: Value) -> None:
        """Give what stands left of an assignment its value."""
        raise NotImplementedError

    def inline(self, function: types.MethodType, node: ast.AST) -> Value:
        """What a method that takes nothing may return."""
        with self.reader.under(self.reader.path, (id(node), "property")):
            return calls.call(Known(function), Arguments(), self, node)
