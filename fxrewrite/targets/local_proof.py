"""Whether a value goes from one call to the next and nowhere else, on every way through a function.

Nothing runs, and one function is looked at by itself. A way on which the value is not taken at all
is no flaw here: that is seen at run time.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence

from torch import nn

from ..tracing.passages import Passage
from .expressions import Expressions, FlawError, State, States
from .sources import COMPREHENSIONS, Function, found

_MOST_STATES = 500


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
    function = found(way)
    if function is None or function.begin is None or (way.end is not None and not function.end):
        return f"its source is not found, {way.code.co_filename}:{way.code.co_firstlineno}"
    try:
        _Walk(function, strict, late).walk()
    except FlawError as error:
        return str(error)
    return None


class _Walk(Expressions):
    """All ways through a function: the statements, with states before and states after."""

    def __init__(self, function: Function, strict: bool, late: bool) -> None:
        super().__init__(function, strict, late)
        self._tries: list[States] = []

    def walk(self) -> None:
        """Go all ways, or raise FlawError."""
        first, scope, begin = State(), self._scope, self._begin
        if isinstance(begin, str):
            first = State(frozenset({begin}), "fresh")
            if begin in self._outer:
                raise FlawError(f"a nested function may read {begin}")
        if isinstance(scope, COMPREHENSIONS):
            self._comprehension(scope, first)
        elif isinstance(scope, ast.Lambda):
            self._return(scope.body, {first})
        else:
            self._block(scope.body, {first})

    def _block(self, statements: Sequence[ast.stmt], states: States) -> States:
        for each in statements:
            if not states:
                break
            if len(states) > _MOST_STATES:
                raise FlawError(f"there are too many ways to {self._function.source.line(each)}")
            for seen in self._tries:
                seen |= states
            states = self._statement(each, states)
        for seen in self._tries:
            seen |= states
        return states

    def _statement(self, node: ast.stmt, states: States) -> States:
        match node:
            case ast.Return():
                self._return(node.value or ast.Constant(None), states)
                return set()
            case ast.Raise():
                return set()
            case ast.Assign():
                return self._assign(node.targets, node.value, states)
            case ast.AnnAssign():
                return self._assign([node.target], node.value, states)
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
                return self._block(node.body, states)
            case ast.Try():
                return self._try(node, states)
            case ast.Break() | ast.Continue():
                self._loops[-1][isinstance(node, ast.Continue)].update(states)
                return set()
            case ast.Match():
                states = self._plain(node.subject, states)
                return states.union(*(self._case(each, states) for each in node.cases))
            case ast.Delete() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                return states
            case ast.Expr():
                return {state for state, _ in self._values(node.value, states)}
        for child in ast.iter_child_nodes(node):  # assert, import, global, pass
            if isinstance(child, ast.stmt):
                raise FlawError(self._said("goes ways that are not followed", node))
            if isinstance(child, ast.expr):
                states = self._plain(child, states)
        return states

    def _return(self, value: ast.expr, states: States) -> None:
        for state, holds in self._values(value, states):
            if holds:
                state = self._used(value, state) if self._end else self._take(value, state)
            for seen in self._tries:
                seen.add(state)

    def _assign(
        self, targets: Sequence[ast.expr], value: ast.expr | None, states: States
    ) -> States:
        if value is None:
            return states
        if len(targets) == 1 and (parts := _parts(targets[0], value)):
            # All values are there before the first of them is bound.
            for i, (_, each) in enumerate(parts):
                states = self._bind(ast.Name(f"{i}"), self._values(each, states))
            for i, (target, _) in enumerate(parts):
                states = self._bind(target, {(s, f"{i}" in s.names) for s in states})
                states = {each.bound(f"{i}", False) for each in states}
            return states
        values = self._values(value, states)
        for target in targets:
            states = self._bind(target, values)
            # A further target gets the same value.
            values = {(s, h) for s in states for h in {h for _, h in values}}
        return states

    def _for(self, node: ast.For | ast.AsyncFor, states: States) -> States:
        def once(states: States) -> States:
            return self._block(node.body, self._bind(node.target, {(s, False) for s in states}))

        after, broken = self._loop(states, once)
        return self._block(node.orelse, after) | broken

    def _while(self, node: ast.While, states: States) -> States:
        after, broken = self._loop(
            self._plain(node.test, states),
            lambda states: self._plain(node.test, self._block(node.body, states)),
        )
        return self._block(node.orelse, after) | broken

    def _try(self, node: ast.Try, states: States) -> States:
        calls = {self._begin, self._end}
        if node.handlers and any(each in calls for each in ast.walk(node)):
            raise FlawError(self._said("catches what a call may raise", node))
        self._tries.append(set(states))
        done = self._block(node.body, states)
        raised = set(self._tries[-1])
        done = self._block(node.orelse, done)
        done = done.union(*(self._block(each.body, raised) for each in node.handlers))
        self._block(node.finalbody, self._tries.pop())  # left by an error or by `return`
        return self._block(node.finalbody, done)

    def _case(self, node: ast.match_case, states: States) -> States:
        return self._block(node.body, self._plain(node.guard, states) if node.guard else states)


def _parts(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """The single assignments that one of several values to several targets comes to."""
    if not isinstance(target, ast.Tuple) or not isinstance(value, ast.Tuple):
        return []
    is_starred = any(isinstance(each, ast.Starred) for each in (*target.elts, *value.elts))
    is_plain = not is_starred and len(target.elts) == len(value.elts)
    return list(zip(target.elts, value.elts, strict=True)) if is_plain else []
