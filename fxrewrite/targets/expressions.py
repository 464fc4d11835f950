"""Where a value is after an expression, on every way through it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import attrs

from ..ir.op_traits import traits_of_method
from .sources import COMPREHENSIONS, Function, Scope, asks_metadata, last_name

# What asks nothing of a tensor but what it is, and what may get at any variable.
_QUESTIONS = frozenset({"isinstance", "is_tensor", "hasattr", "len", "type"})
_OF_ALL_VARIABLES = frozenset({"locals", "vars", "eval", "exec"})

_Status = Literal["none", "fresh", "read", "taken"]


@attrs.frozen
class State:
    """The variables that may have the value, what was done with it, and what read it first."""

    names: frozenset[str] = frozenset()
    status: _Status = "none"
    reader: ast.AST | None = None

    def bound(self, name: str, holds: bool) -> State:
        """The state once a variable has, or no longer has, the value."""
        names = self.names | {name} if holds else self.names - {name}
        return self if names == self.names else attrs.evolve(self, names=names)


States: TypeAlias = "set[State]"
Values: TypeAlias = "set[tuple[State, bool]]"


class FlawError(Exception):
    """The value may go elsewhere; with the line."""


class Expressions:
    """Ways through the expressions of a function, each with where the value is.

    An expression gives, for each state before it, states after it, each with whether it has the
    value itself. Where the value is given again, it is another one, and both are followed.

    Args:
        function: the function, and the calls in it that give and take the value.
        strict: whether any call that reads it may change it in place and give it back.
        late: whether nothing else may be called before it is taken.
    """

    def __init__(self, function: Function, strict: bool, late: bool) -> None:
        self._function, self._strict, self._late = function, strict, late
        self._scope, self._begin, self._end = function.scope, function.begin, function.end
        self._outer = _names_of_inner_scopes(function.scope)
        self._loops: list[tuple[States, States]] = []  # the states of `break`, and of `continue`

    def _values(self, node: ast.expr, states: Iterable[State]) -> Values:
        return {each for state in states for each in self._value(node, state)}

    def _value(self, node: ast.expr, state: State) -> Values:
        match node:
            case ast.Name():
                return {(state, node.id in state.names)}
            case ast.Constant():
                return {(state, False)}
            case ast.NamedExpr():
                values = self._value(node.value, state)
                return {
                    (s, h) for v in values for h in [v[1]] for s in self._bind(node.target, {v})
                }
            case ast.BoolOp():
                found, states = set[tuple[State, bool]](), {state}
                for each in node.values:  # any of them may be the last that is asked
                    now = self._values(each, states)
                    found, states = found | now, {after for after, _ in now}
                return self._given(node, found)
            case ast.IfExp():
                states = self._plain(node.test, {state})
                return self._values(node.body, states) | self._values(node.orelse, states)
            case ast.Starred():
                return self._value(node.value, state)
            case ast.Lambda():
                return {(state, False)}
            case ast.Call():
                return self._call(node, state)
            case ast.Attribute():
                known = asks_metadata(node.attr)
                values = self._value(node.value, state)
                return self._given(node, values if not known else {(s, False) for s, _ in values})
        if isinstance(node, COMPREHENSIONS):
            return {(each, False) for each in self._comprehension(node, state)}
        inner = [each for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr)]
        is_identity = isinstance(node, ast.Compare) and all(
            isinstance(each, ast.Is | ast.IsNot) for each in node.ops
        )
        values = self._operands(inner, {state})
        return self._given(node, {(s, False) for s, _ in values} if is_identity else values)

    def _call(self, node: ast.Call, state: State) -> Values:
        function = node.func
        is_method = isinstance(function, ast.Attribute)
        operands = [*node.args, *(each.value for each in node.keywords)]
        called = function.value if isinstance(function, ast.Attribute) else function
        name = last_name(function)
        if name in _OF_ALL_VARIABLES and state.names:
            state = self._used(node, state)
        values = self._value(called, state)
        if is_method and traits_of_method(name).asks in ("metadata", "new"):
            values = {(s, False) for s, _ in values}
        found: Values = set()
        for before, holds in values:
            for after, held in self._operands(operands, {before}):
                is_read = held and name not in _QUESTIONS
                if holds and is_read:
                    raise FlawError(self._said("reads it twice", node))
                found.add((after, holds or is_read))
        return self._given(node, found)

    def _operands(self, nodes: Sequence[ast.expr], states: States) -> Values:
        """The states after all of them, each with whether one of them has the value."""
        values: Values = {(state, False) for state in states}
        for each in nodes:
            values = {
                (after, held or holds)
                for before, held in values
                for after, holds in self._value(each, before)
            }
        return values

    def _given(self, node: ast.expr, values: Values) -> Values:
        """What an expression gives, once its operands are there, of which one may be the value."""
        found: Values = set()
        does_more = self._late and isinstance(node, ast.Call) and not _is_question(node)
        for state, holds in values:
            takes = holds and node is self._end
            if does_more and not takes and state.status == "fresh":
                raise FlawError(self._said("may do something else before", node))
            if takes:
                found.add((self._take(node, state), False))
            elif holds:
                used = self._used(node, state)
                comes_back = isinstance(node, ast.Call) and (self._strict or _in_place(node))
                found |= {(used, False), (used, comes_back)}
            else:
                found.add((state, False))
        if node is self._begin:
            found.add((State(status="fresh"), True))
        return found

    def _comprehension(self, node: Any, state: State) -> States:
        states = {state}
        for each in node.generators:
            states = self._plain(each.iter, states)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]

        def once(states: States) -> States:
            for each in node.generators:
                states = self._bind(each.target, {(s, False) for s in states})
                for test in each.ifs:
                    states = self._plain(test, states)
            return self._use(node, self._operands(parts, states))

        return self._loop(states, once)[0]

    def _bind(self, target: ast.expr, values: Values, *, reads: bool = False) -> States:
        if isinstance(target, ast.Name):
            done = set()
            for state, holds in values:
                if (holds and target.id in self._outer) or (reads and target.id in state.names):
                    state = self._used(target, state)
                # What is changed in place is the same tensor still.
                done.add(state.bound(target.id, holds or (reads and target.id in state.names)))
            return done
        states = {self._used(target, s) if holds else s for s, holds in values}
        if isinstance(target, ast.Tuple | ast.List):
            for each in target.elts:
                states = self._bind(each, {(s, False) for s in states})
            return states
        if isinstance(target, ast.Starred):
            return self._bind(target.value, {(s, False) for s in states})
        inner = [e for e in ast.iter_child_nodes(target) if isinstance(e, ast.expr)]
        return self._use(target, self._operands(inner, states))

    def _loop(self, states: States, once: Any) -> tuple[States, States]:
        """The states in which a loop may end by itself, and those in which it is left."""
        known, new, left = set(states), states, set[State]()
        while new:
            self._loops.append((set(), set()))
            after = once(new)
            breaks, continues = self._loops.pop()
            left |= breaks
            new = (after | continues) - known
            known |= new
        return known, left

    # What is done with the value.

    def _plain(self, node: ast.expr, states: States) -> States:
        """The states after an expression that something is done with."""
        return self._use(node, self._values(node, states))

    def _use(self, node: ast.AST, values: Values) -> States:
        return {self._used(node, state) if holds else state for state, holds in values}

    def _used(self, node: ast.AST, state: State) -> State:
        if state.status == "taken":
            raise FlawError(self._said("also reads it", node))
        reader = state.reader if state.status == "read" else node
        return attrs.evolve(state, status="read", reader=reader)

    def _take(self, node: ast.AST, state: State) -> State:
        if state.reader is not None:
            raise FlawError(self._said("may also read it", state.reader))
        if state.status != "fresh":
            raise FlawError(self._said("may read it twice", node))
        return attrs.evolve(state, status="taken")

    def _said(self, what: str, node: ast.AST) -> str:
        name = getattr(self._scope, "name", "an expression")
        return f"{name} {what}, at {self._function.source.line(node)}"


def _is_question(node: ast.Call) -> bool:
    name = last_name(node.func)
    return name in _QUESTIONS or (isinstance(node.func, ast.Attribute) and asks_metadata(name))


def _in_place(node: ast.Call) -> bool:
    """Whether a call says that it changes what it reads."""
    name = last_name(node.func)
    is_named = name.endswith("_") and not name.endswith("__")
    return is_named or any(each.arg == "inplace" for each in node.keywords)


def _names_of_inner_scopes(scope: Scope) -> frozenset[str]:
    """The variables that functions inside may read, and those that are not the scope's own."""
    names: set[str] = set()
    for inner in ast.walk(scope):
        if inner is scope:
            continue
        if isinstance(inner, ast.Global | ast.Nonlocal):
            names.update(inner.names)
        elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            names.update(each.id for each in ast.walk(inner) if isinstance(each, ast.Name))
    return frozenset(names)
