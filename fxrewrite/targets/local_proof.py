"""Whether a value goes from one call to the next and nowhere else, on every way through a function.

Nothing runs, and one function is looked at by itself. A way on which the value is not taken at all
is no flaw here: that is seen at run time.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeAlias

import attrs
from torch import nn

from ..ir.op_traits import traits_of_method
from ..tracing.passages import Passage
from .sources import COMPREHENSIONS, Scope, Source, asks_metadata, found, last_name

_MOST_STATES = 500
# What asks nothing of a tensor but what it is, and what may get at any variable.
_QUESTIONS = frozenset({"isinstance", "is_tensor", "hasattr", "len", "type"})
_OF_ALL_VARIABLES = frozenset({"locals", "vars", "eval", "exec"})


def flaw(way: Passage, *, strict: bool = True, late: bool = False) -> str | None:
    """Why the value may also go elsewhere, or None; with the line.

    Args:
        way: the passage of the value through one call of a function.
        strict: whether any call that reads it may change it in place and give it back.
        late: whether nothing else may be called before it is taken.
    """
    if way.code is nn.Sequential.forward.__code__:  # the way through it is the same each time
        return None
    return _flaw(Passage(way.code, way.begin, way.end), strict, late)


@functools.lru_cache(maxsize=4096)
def _flaw(way: Passage, strict: bool, late: bool) -> str | None:
    source, begin, end, scope = found(way)
    if source is None or scope is None or begin is None or (way.end is not None and end is None):
        return f"its source is not found, {way.code.co_filename}:{way.code.co_firstlineno}"
    return _Walk(scope, begin, end, source, strict, late).flaw()


Status = Literal["none", "fresh", "read", "taken"]


@attrs.frozen
class _State:
    """The variables that may have the value, what was done with it, and what read it first."""

    names: frozenset[str] = frozenset()
    status: Status = "none"
    reader: ast.AST | None = None

    def bound(self, name: str, holds: bool) -> _State:
        names = self.names | {name} if holds else self.names - {name}
        return self if names == self.names else attrs.evolve(self, names=names)


_States: TypeAlias = "set[_State]"
_Values: TypeAlias = "set[tuple[_State, bool]]"


class _FlawError(Exception):
    pass


class _Walk:
    """All ways through a function, each with where the value is.

    An expression gives, for each state before it, states after it, each with whether it has the
    value itself. Where the value is given again, it is another one, and both are followed.
    """

    def __init__(
        self,
        scope: Scope,
        begin: ast.expr | str,
        end: ast.expr | None,
        source: Source,
        strict: bool,
        late: bool,
    ) -> None:
        self._strict, self._late = strict, late
        self._scope, self._begin, self._end, self._source = scope, begin, end, source
        self._outer = _names_of_inner_scopes(scope)
        self._loops: list[tuple[_States, _States]] = []
        self._tries: list[_States] = []

    def flaw(self) -> str | None:
        """What is wrong, or None."""
        first = _State()
        if isinstance(self._begin, str):
            first = _State(frozenset({self._begin}), "fresh")
            if self._begin in self._outer:
                return f"a nested function may read {self._begin}"
        try:
            if isinstance(self._scope, COMPREHENSIONS):
                self._comprehension(self._scope, first)
            elif isinstance(self._scope, ast.Lambda):
                self._return(self._scope.body, {first})
            else:
                self._block(self._scope.body, {first})
        except _FlawError as error:
            return str(error)
        return None

    # Statements: states before, states after.

    def _block(self, statements: Sequence[ast.stmt], states: _States) -> _States:
        for each in statements:
            if not states:
                break
            if len(states) > _MOST_STATES:
                raise _FlawError(f"there are too many ways to {self._source.line(each)}")
            for seen in self._tries:
                seen |= states
            states = self._statement(each, states)
        for seen in self._tries:
            seen |= states
        return states

    def _statement(self, node: ast.stmt, states: _States) -> _States:
        match node:
            case ast.Return():
                self._return(node.value, states)
                return set()
            case ast.Raise():
                return set()
            case ast.Assign():
                return self._assign(node.targets, node.value, states)
            case ast.AnnAssign():
                return self._assign([node.target] if node.value else [], node.value, states)
            case ast.AugAssign():
                values = self._use(node, self._operands([node.value], states))
                return self._bind(node.target, {(s, False) for s in values}, reads=True)
            case ast.If():
                states = self._plain(node.test, states)
                return self._block(node.body, states) | self._block(node.orelse, states)
            case ast.For() | ast.AsyncFor():
                return self._for(node, self._plain(node.iter, states))
            case ast.While():
                return self._while(node, states)
            case ast.With() | ast.AsyncWith():
                for item in node.items:
                    states = self._plain(item.context_expr, states)
                    if item.optional_vars is not None:
                        states = self._bind(item.optional_vars, {(s, False) for s in states})
                return self._block(node.body, states)
            case ast.Try():
                return self._try(node, states)
            case ast.Break() | ast.Continue():
                self._loops[-1][isinstance(node, ast.Continue)].update(states)
                return set()
            case ast.Delete():
                names = [each.id for each in node.targets if isinstance(each, ast.Name)]
                return {functools.reduce(lambda s, n: s.bound(n, False), names, s) for s in states}
            case ast.Match():
                return self._match(node, states)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                return {each.bound(node.name, False) for each in states}
            case ast.Expr():
                return {state for state, _ in self._values(node.value, states)}
        for child in ast.iter_child_nodes(node):  # assert, import, global, pass
            if isinstance(child, ast.expr):
                states = self._plain(child, states)
        return states

    def _return(self, value: ast.expr | None, states: _States) -> None:
        for state, holds in self._values(value, states) if value is not None else ():
            if not holds:
                continue
            if self._end is None:
                self._take(value or self._scope, state)
            else:
                self._used(value or self._scope, state)

    def _assign(
        self, targets: Sequence[ast.expr], value: ast.expr | None, states: _States
    ) -> _States:
        parts = targets[0] if len(targets) == 1 else None
        if (
            isinstance(parts, ast.Tuple)
            and isinstance(value, ast.Tuple)
            and len(parts.elts) == len(value.elts)
            and not _starred(*parts.elts, *value.elts)
        ):
            return self._assign_parts(parts.elts, value.elts, states)
        values = self._values(value, states) if value is not None else {(s, False) for s in states}
        for target in targets:
            again = {(s, h) for s, h in values}
            states = self._bind(target, again)
            # A further target gets the same value.
            values = {(s, h) for s in states for h in {h for _, h in again}}
        return states if targets else {state for state, _ in values}

    def _assign_parts(
        self, targets: Sequence[ast.expr], values: Sequence[ast.expr], states: _States
    ) -> _States:
        ways: set[tuple[_State, tuple[bool, ...]]] = {(state, ()) for state in states}
        for value in values:
            ways = {
                (after, (*held, holds))
                for state, held in ways
                for after, holds in self._values(value, {state})
            }
        done: _States = set()
        for state, held in ways:
            now = {state}
            for target, holds in zip(targets, held, strict=True):
                now = self._bind(target, {(s, holds) for s in now})
            done |= now
        return done

    def _bind(self, target: ast.expr, values: _Values, *, reads: bool = False) -> _States:
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

    def _for(self, node: ast.For | ast.AsyncFor, states: _States) -> _States:
        def once(states: _States) -> _States:
            return self._block(node.body, self._bind(node.target, {(s, False) for s in states}))

        after, broken = self._loop(states, once)
        return self._block(node.orelse, after) | broken

    def _while(self, node: ast.While, states: _States) -> _States:
        after, broken = self._loop(
            self._plain(node.test, states),
            lambda states: self._plain(node.test, self._block(node.body, states)),
        )
        return self._block(node.orelse, after) | broken

    def _loop(self, states: _States, once: Any) -> tuple[_States, _States]:
        """The states in which a loop may end by itself, and those in which it is left."""
        known, new, left = set(states), states, set[_State]()
        while new:
            self._loops.append((set(), set()))
            after = once(new)
            breaks, continues = self._loops.pop()
            left |= breaks
            new = (after | continues) - known
            known |= new
        return known, left

    def _try(self, node: ast.Try, states: _States) -> _States:
        calls = {self._begin, self._end}
        if node.handlers and any(each in calls for each in ast.walk(node)):
            raise _FlawError(self._said("catches what a call may raise", node))
        self._tries.append(set(states))
        after = self._block(node.body, states)
        raised = self._tries.pop()
        done = self._block(node.orelse, after)
        for handler in node.handlers:
            now = {each.bound(handler.name, False) for each in raised} if handler.name else raised
            done |= self._block(handler.body, now)
        return self._block(node.finalbody, done)

    def _match(self, node: ast.Match, states: _States) -> _States:
        states = self._plain(node.subject, states)
        done = set(states)
        for case in node.cases:
            captured = [getattr(e, "name", None) for e in ast.walk(case.pattern)]
            now = states
            for name in filter(None, captured):
                now = {each.bound(name, False) for each in now}
            if case.guard is not None:
                now = self._plain(case.guard, now)
            done |= self._block(case.body, now)
        return done

    # Expressions: states before; states after, each with whether the expression has the value.

    def _values(self, node: ast.expr, states: Iterable[_State]) -> _Values:
        return {each for state in states for each in self._value(node, state)}

    def _value(self, node: ast.expr, state: _State) -> _Values:
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

    def _call(self, node: ast.Call, state: _State) -> _Values:
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
        found: _Values = set()
        for before, holds in values:
            for after, held in self._operands(operands, {before}):
                is_read = held and name not in _QUESTIONS
                if holds and is_read:
                    raise _FlawError(self._said("reads it twice", node))
                found.add((after, holds or is_read))
        return self._given(node, found)

    def _operands(self, nodes: Sequence[ast.expr], states: _States) -> _Values:
        """The states after all of them, each with whether one of them has the value."""
        values: _Values = {(state, False) for state in states}
        for each in nodes:
            values = {
                (after, held or holds)
                for before, held in values
                for after, holds in self._value(each, before)
            }
        return values

    def _given(self, node: ast.expr, values: _Values) -> _Values:
        """What an expression gives, once its operands are there, of which one may be the value."""
        found: _Values = set()
        does_more = self._late and isinstance(node, ast.Call) and not _is_question(node)
        for state, holds in values:
            if does_more and node is not self._end and state.status == "fresh":
                raise _FlawError(self._said("may do something else before", node))
            if holds and node is self._end:
                found.add((self._take(node, state), False))
            elif holds:
                used = self._used(node, state)
                comes_back = isinstance(node, ast.Call) and (self._strict or _in_place(node))
                found |= {(used, False), (used, comes_back)}
            else:
                found.add((state, False))
        if node is self._begin:
            found.add((_State(status="fresh"), True))
        return found

    def _comprehension(self, node: Any, state: _State) -> _States:
        states = {state}
        for each in node.generators:
            states = self._plain(each.iter, states)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]

        def once(states: _States) -> _States:
            for each in node.generators:
                states = self._bind(each.target, {(s, False) for s in states})
                for test in each.ifs:
                    states = self._plain(test, states)
            return self._use(node, self._operands(parts, states))

        return self._loop(states, once)[0]

    # What is done with the value.

    def _plain(self, node: ast.expr, states: _States) -> _States:
        """The states after an expression that something is done with."""
        return self._use(node, self._values(node, states))

    def _use(self, node: ast.AST, values: _Values) -> _States:
        return {self._used(node, state) if holds else state for state, holds in values}

    def _used(self, node: ast.AST, state: _State) -> _State:
        if state.status == "taken":
            raise _FlawError(self._said("also reads it", node))
        reader = state.reader if state.status == "read" else node
        return attrs.evolve(state, status="read", reader=reader)

    def _take(self, node: ast.AST, state: _State) -> _State:
        if state.reader is not None:
            raise _FlawError(self._said("may also read it", state.reader))
        if state.status != "fresh":
            raise _FlawError(self._said("may read it twice", node))
        return attrs.evolve(state, status="taken")

    def _said(self, what: str, node: ast.AST) -> str:
        return (
            f"{getattr(self._scope, 'name', 'an expression')} {what}, at {self._source.line(node)}"
        )


def _is_question(node: ast.Call) -> bool:
    name = last_name(node.func)
    return name in _QUESTIONS or (isinstance(node.func, ast.Attribute) and asks_metadata(name))


def _in_place(node: ast.Call) -> bool:
    """Whether a call says that it changes what it reads."""
    name = last_name(node.func)
    is_named = name.endswith("_") and not name.endswith("__")
    return is_named or any(each.arg == "inplace" for each in node.keywords)


def _starred(*nodes: ast.expr) -> bool:
    return any(isinstance(each, ast.Starred) for each in nodes)


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
