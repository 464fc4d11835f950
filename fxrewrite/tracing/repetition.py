"""Whether a forward that is traced once more gives the same graph."""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping
from itertools import zip_longest
from types import FrameType
from typing import Any

import torch
from torch import fx

from ..module_utils.state import bits
from .forward_code import is_of_a_forward, is_torchs_own, line_of
from .stops import NotInGraphError

Constants = Mapping[str, Any]


def first_difference(
    one: fx.Graph,
    other: fx.Graph,
    constants: Constants,
    others: Constants,
    passed_by: Container[object] = (),
) -> tuple[fx.Node, str] | None:
    """The first node of a graph that another trace of the same forward gave otherwise, and how.

    Its tensors are compared bit for bit, by the names of the constants that they are in. Nodes
    whose target is `passed_by` do not count.
    """
    graphs = [
        [each for each in graph.nodes if each.target not in passed_by] for graph in (one, other)
    ]
    place = {node: i for nodes in graphs for i, node in enumerate(nodes)}
    for mine, theirs in zip_longest(*graphs):
        if mine is None or theirs is None:
            return (mine or theirs), "one trace of it makes more calls than the next"
        if mine.op != theirs.op or _called(mine) != _called(theirs):
            return mine, f"one trace of it has {mine.name}, and the next {theirs.name}"
        given = [*zip_longest(_leaves(mine), _leaves(theirs))]
        if mine.op == "get_attr" and mine.target in constants:
            given.append((constants[str(mine.target)], others[str(mine.target)]))
        for before, now in given:
            if not _same(_place(before, place), _place(now, place)):
                was, then = f"{before!r:.40}", f"{now!r:.40}"
                return mine, f"{mine.name} is given {was} in one trace, and {then} in the next"
    return None


def note_lines(tracer: fx.Tracer) -> dict[str, str]:
    """The line of the forward that each node comes from, by its name, as a tracer makes them.

    Args:
        tracer: a tracer of our own. It is changed in place.
    """
    lines: dict[str, str] = {}
    create_node = tracer.create_node

    def create(*args: Any, **kwargs: Any) -> fx.Node:
        node = create_node(*args, **kwargs)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not _is_of_a_user(frame):
            frame = frame.f_back
        lines[node.name] = "" if frame is None else line_of(frame)
        return node

    tracer.create_node = create  # type: ignore[method-assign]
    return lines


def not_repeated(how: str, line: str) -> NotInGraphError:
    """The error for a forward of which two traces are not the same."""
    return NotInGraphError(f"it is not the same each time that it is traced: {how}", line)


def _is_of_a_user(frame: FrameType) -> bool:
    return is_of_a_forward(frame.f_code) and not is_torchs_own(frame.f_code)


def _called(node: fx.Node) -> Any:
    """What a node calls; of a function made anew each time, how it is called."""
    return getattr(node.target, "__qualname__", node.target)


def _leaves(node: fx.Node) -> list[Any]:
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), found.append)
    return found


def _place(value: Any, places: Mapping[fx.Node, int]) -> Any:
    return f"node {places[value]}" if isinstance(value, fx.Node) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.layout is not torch.strided or one.is_quantized:
            return one.layout == other.layout
        return one.shape == other.shape and torch.equal(bits(one), bits(other))
    if isinstance(one, bool | int | float | complex | str):  # the text tells 0.0 from -0.0
        return type(one) is type(other) and repr(one) == repr(other)
    return type(one) is type(other)
