"""How a rule is declared: a function from a match to an action, made a rule."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

from ..errors import PatternError
from .actions import Action
from .declare import annotations_of, pattern_of, source_of
from .rule import Rule
from .values import Guard

M = TypeVar("M")


@overload
def rule(build: Callable[[M], Action], /) -> Rule[M]: ...
@overload
def rule(
    *,
    where: Iterable[Guard] = (),
    pattern: type[Any] | None = None,
    name: str | None = None,
    any_mode: bool = False,
    quiet: bool = False,
    last: bool = False,
) -> Callable[[Callable[[M], Action]], Rule[M]]: ...
def rule(
    build: Callable[[Any], Action] | None = None,
    /,
    *,
    where: Iterable[Guard] = (),
    pattern: type[Any] | None = None,
    name: str | None = None,
    any_mode: bool = False,
    quiet: bool = False,
    last: bool = False,
) -> Any:
    """Make a function from a match to an action a rule.

    >>> from torch import nn
    >>> import fxrewrite as fxr
    >>> Relu = fxr.chain(relu=nn.ReLU)
    >>> @fxr.rule(pattern=Relu)
    ... def relu_to_gelu(m):
    ...     return fxr.Replace(nn.GELU())
    >>> print(relu_to_gelu(Relu(relu=nn.ReLU())).module)
    GELU(approximate='none')

    Args:
        build: the function. It must not change what it is given, and runs without gradients.
        where: guards, asked in order; the first reason refuses the match.
        pattern: the pattern class; by default the annotation of the function's parameter.
        name: by default the function's name.
        any_mode: match modules in training mode too. By default the engine refuses those.
        quiet: for a rule whose anchor is common and seldom meant, as each product is for one that
            looks for constants: that it missed its chain is no finding of the report.
        last: wait until no other rule applies, of whatever set; for a rule that would take from
            others what they look for.

    Raises:
        PatternError: no pattern is given, or what is given is not one.
    """
    caller = sys._getframe(1).f_locals
    guards = tuple(where) if isinstance(where, Iterable) else (where,)
    if not isinstance(where, Iterable) or not all(map(callable, guards)):
        raise PatternError(f"where= takes a list of guards, which are functions; found {where!r}")

    def declare(build: Callable[[Any], Action]) -> Rule[Any]:
        return Rule(
            name=name or build.__name__,
            pattern=pattern_of(pattern or _annotated_pattern(build, caller)),
            build=build,
            guards=guards,
            any_mode=any_mode,
            quiet=quiet,
            last=last,
            doc=(build.__doc__ or "").strip().partition("\n")[0],
            source=source_of(build),
        )

    return declare if build is None else declare(build)


def _annotated_pattern(build: Callable[[Any], Action], local_names: dict[str, Any]) -> type[Any]:
    hints = annotations_of(build, local_names)
    hints.pop("return", None)
    if len(hints) != 1:
        raise PatternError(
            f"{build.__qualname__}: annotate its one parameter with the pattern class, "
            "or give pattern=... to the decorator"
        )
    annotated: type[Any] = next(iter(hints.values()))
    return annotated
