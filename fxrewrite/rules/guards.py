"""Guards for rules that are right for some shapes only."""

from __future__ import annotations

from typing import Any

from .values import Guard


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
                return f"the {what} of {value.name} is not known; {value.unknown}"
            if getattr(value, what) is None:
                return f"the {what} of {value.name} is not known, since it depends on data"
        return None

    guard.__name__ = f"known_{what}"
    return guard
