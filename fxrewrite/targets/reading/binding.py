"""What a call is given, and which parameter each of it goes to."""

from __future__ import annotations

import ast
import inspect
import types
from typing import TYPE_CHECKING

import attrs

from ..reading import objects
from .values import UNKNOWN, Atom, Env, Items, Many, Value, joined, known, names_of

if TYPE_CHECKING:
    from .expressions import Expressions


@attrs.frozen
class Arguments:
    """What a call is given; `others` is what nobody can say to which further parameter it goes."""

    positional: tuple[Value, ...] = ()
    keywords: dict[str, Value] = attrs.field(factory=dict)
    others: Value = frozenset()

    @classmethod
    def of(cls, node: ast.Call, at: Expressions) -> Arguments:
        """The arguments of a call as it is written."""
        positional: list[Value] = []
        keywords: dict[str, Value] = {}
        others: Value = frozenset()
        for each in node.args:
            found: Value | list[Value] = (
                objects.iterate(at.value(each.value), at, each)
                if isinstance(each, ast.Starred)
                else [at.value(each)]
            )
            if isinstance(found, list) and not others:
                positional += found
            else:
                others = joined(others, *found) if isinstance(found, list) else others | found
        for keyword in node.keywords:
            value = at.value(keyword.value)
            if keyword.arg is not None:
                keywords[keyword.arg] = value
                continue
            items = at.reader.keywords(*value) if len(value) == 1 else None
            if items is None:
                others |= UNKNOWN
                at.reader.consume(value, at.at(node))
            else:
                keywords |= items
        return cls(tuple(positional), keywords, others)

    @property
    def exact(self) -> bool:
        """Whether it is clear to which parameter each goes."""
        return not self.others

    @property
    def values(self) -> tuple[Value, ...]:
        """All that is given."""
        others = (self.others,) if self.others else ()
        return (*self.positional, *self.keywords.values(), *others)

    @property
    def is_one(self) -> bool:
        """Whether it is one value, and by position."""
        return self.exact and len(self.positional) == 1 and not self.keywords

    def after(self, first: Value) -> Arguments:
        """The same with another argument before them."""
        return attrs.evolve(self, positional=(first, *self.positional))

    def without(self, count: int) -> Arguments:
        """The same without the first ones."""
        return attrs.evolve(self, positional=self.positional[count:])


def bound(function: types.FunctionType, given: Arguments) -> Env | None:
    """The parameters with what they get; None where the call would raise."""
    code = function.__code__
    count = code.co_argcount
    names = code.co_varnames[: count + code.co_kwonlyargcount]
    more = list(code.co_varnames[len(names) :])
    takes_rest = code.co_flags & inspect.CO_VARARGS
    takes_names = code.co_flags & inspect.CO_VARKEYWORDS
    defaults = dict(zip(names[:count][::-1], (function.__defaults__ or ())[::-1], strict=False))
    defaults |= function.__kwdefaults__ or {}
    if len(given.positional) > count and not takes_rest:
        return None
    found = dict(zip(names[:count], given.positional, strict=False))
    further = {}
    for name, value in given.keywords.items():
        if name in names and name not in found:
            found[name] = value
        elif takes_names:
            further[name] = value
        else:
            return None
    for name in names:
        if name not in found:
            if name not in defaults and given.exact:
                return None
            default = known(defaults[name]) if name in defaults else frozenset[Atom]()
            found[name] = joined(default, given.others, UNKNOWN) if given.others else default
    rest, any_other = given.positional[count:], joined(UNKNOWN, given.others)
    if takes_rest:
        items = Items(rest) if given.exact else Many(joined(any_other, *rest))
        found[more.pop(0)] = frozenset({items})
    if takes_names:
        every = joined(any_other, *further.values())
        found[more.pop(0)] = names_of(further, code) if given.exact else every
    return found
