"""What models take and give, however it is nested: look into it, and make it anew."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs

from .torch_private import pytree


@attrs.frozen
class Container:
    """Stands for a container among what it holds: its type, and the paths to what is in it."""

    kind: type[Any]
    inside: tuple[str, ...]

    def __str__(self) -> str:
        """The container in words."""
        shown = ", ".join(self.inside[:8]) + (", ..." if len(self.inside) > 8 else "")
        return f"a {self.kind.__qualname__} with {shown}" if shown else f"no {self.kind.__name__}"


def flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every leaf with its path, and before what is in a container a `Container` that stands for it.

    >>> [path for path, _ in flatten({"boxes": (1, 2)}, "output")]
    ['output', "output['boxes']", "output['boxes'][0]", "output['boxes'][1]"]
    """
    inside = _contents(value)
    if inside is None:
        yield path, value
        return
    yield path, Container(type(value), tuple(inside))
    for key, each in inside.items():
        yield from flatten(each, path + key)


def mapped(
    function: Callable[[Any], Any], value: Any, is_leaf: Callable[[Any], bool] = lambda _: False
) -> Any:
    """The same structure anew, with what the function makes of each leaf.

    >>> mapped(str, {"boxes": (1, 2)})
    {'boxes': ('1', '2')}
    """

    def inner(each: Any) -> Any:
        return mapped(function, each, is_leaf)

    if isinstance(value, type) or is_leaf(value):
        return function(value)
    leaves, spec = _one_level(value)
    if not _is(leaves, value):
        return pytree.tree_unflatten(map(inner, leaves), spec)
    if isinstance(value, dict):  # its own class knows how an item is set
        made = copy.copy(value)
        for key, each in value.items():
            made[key] = inner(each)
        return made
    if (fields := _fields(value)) is not None:
        made = copy.copy(value)
        for name in fields:
            object.__setattr__(made, name, inner(getattr(value, name)))
        return made
    if isinstance(value, tuple | list):
        return type(value)(map(inner, value))
    return function(value)


def _contents(value: Any) -> dict[str, Any] | None:
    """What a container holds, each by the path to it from there; None for a leaf."""
    if isinstance(value, type):
        return None
    fields = _fields(value)
    if fields is not None or isinstance(value, Mapping):
        # A Hugging Face ModelOutput is both; its fields may all be read as attributes.
        names = {f".{name}": getattr(value, name) for name in fields or ()}
        items = dict(value) if isinstance(value, Mapping) else {}
        return names | {
            f"[{key!r}]": each for key, each in items.items() if key not in (fields or ())
        }
    if _is_named_tuple(value):
        return {f".{name}": getattr(value, name) for name in value._fields}
    if isinstance(value, tuple | list):
        return {f"[{i}]": each for i, each in enumerate(value)}
    leaves, _ = _one_level(value)
    return None if _is(leaves, value) else {f"[{i}]": each for i, each in enumerate(leaves)}


def _fields(value: Any) -> list[str] | None:
    """The names of the fields of a dataclass's or an attrs class's instance."""
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return [each.name for each in dataclasses.fields(value)]
    return [each.name for each in attrs.fields(type(value))] if attrs.has(type(value)) else None


def _one_level(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """What torch's pytree knows to be right in a value; the value itself where it knows nothing."""
    return pytree.tree_flatten(value, is_leaf=lambda each: each is not value)


def _is(leaves: list[Any], value: Any) -> bool:
    return len(leaves) == 1 and leaves[0] is value


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")
