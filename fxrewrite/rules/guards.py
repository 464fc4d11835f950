"""What a guard may answer, and guards for rules that are right for some shapes only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import attrs

Guard: TypeAlias = "Callable[[Any], str | Declined | None]"
"""A check on a match: None when the rule may go on, or the reason why it may not."""


@attrs.frozen
class Declined:
    """Why a rule is not applied: its chain is there and may not change, or is not there at all.

    A guard that returns a reason refuses the match. One that returns `Declined(reason, "missed")`
    says that the match is not what the rule is about; of a `quiet` rule that is no finding.

    >>> import torch
    >>> import fxrewrite as fxr
    >>> ToFloat = fxr.chain(to=fxr.call("to", side_inputs=False))
    >>> def to_float(m):
    ...     if torch.float32 not in m.to.kwargs.values():
    ...         return fxr.Declined("to another type", "missed")
    >>> print(to_float(ToFloat(to=fxr.Call("to", dtype=torch.float64))))
    to another type

    Args:
        cause: the reason, or what gives it as its `str()`.
        outcome: "refused" or "missed".
    """

    cause: Any
    outcome: Literal["refused", "missed"] = "refused"

    def __str__(self) -> str:
        """The reason."""
        return str(self.cause)


def known_rank(*fields: str) -> Guard:
    """A guard that refuses where the rank of a captured value is not known.

    >>> from torch import nn
    >>> import fxrewrite as fxr
    >>> @fxr.pattern
    ... class Flat:
    ...     x: fxr.Value
    ...     flatten: nn.Flatten
    >>> fxr.known_rank("x")(Flat(x=fxr.Value("x"), flatten=nn.Flatten()))
    'the rank of x is not known; example_inputs would decide it'

    Args:
        fields: names of fields of the pattern whose type is `Value`.
    """
    return _known("rank", fields)


def known_shape(*fields: str) -> Guard:
    """A guard that refuses where the shape of a captured value is not known.

    >>> from torch import nn
    >>> import fxrewrite as fxr
    >>> @fxr.pattern
    ... class Flat:
    ...     x: fxr.Value
    ...     flatten: nn.Flatten
    >>> fxr.known_shape("x")(Flat(x=fxr.Value("x", rank=2), flatten=nn.Flatten()))
    'the shape of x is not known, since it depends on data'

    Args:
        fields: names of fields of the pattern whose type is `Value`.
    """
    return _known("shape", fields)


def _known(what: str, fields: tuple[str, ...]) -> Guard:
    def guard(match: Any) -> str | None:
        for name in fields:
            value = getattr(match, name)
            if getattr(value, what) is None and value.rank is None:
                return f"the {what} of {value.name} is not known; example_inputs would decide it"
            if getattr(value, what) is None:
                return f"the {what} of {value.name} is not known, since it depends on data"
        return None

    guard.__name__ = f"known_{what}"
    return guard
