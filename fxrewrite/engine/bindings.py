"""The match that a rule is given, made of what was found in the graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from ..ir.graph_view import GraphView
from ..ir.op_traits import traits_of
from ..module_utils.parametrization import without_parametrizations
from ..rules.actions import Call
from ..rules.spec import Pattern
from ..rules.values import Siblings, Value
from .match import Link, Site


class Shown(NamedTuple):
    """What a run showed of a tensor; its shape is None where other sizes are possible."""

    rank: int | None
    dtype: torch.dtype | None
    shape: tuple[int, ...] | None = None


def capture(site: Site, view: GraphView) -> Any:
    """The match that a rule is given: an instance of the pattern's class."""
    value = functools.partial(value_of, unknown=view.unknown)
    return _instance(site.pattern, site.links, site.input, view, value)


def capture_elsewhere(site: Site, view: GraphView, shown: Shown | None) -> Any:
    """The match as it would be where the chain is called on such a tensor, or on who knows what."""

    known = {} if shown is None else {site.input: shown}
    for link in site.links:  # of which many keep what they read, or the number of its dimensions
        before, traits = known.get(link.source), traits_of(link.node, link.module)
        if before is not None and traits.keeps == "metadata":
            known[link.node] = before
        elif before is not None and (traits.keeps or traits.layer):
            known[link.node] = Shown(before.rank, None)

    def value(node: fx.Node) -> Value:
        rank, dtype, shape = known.get(node, Shown(None, None))
        return Value(node.name, shape, dtype, rank, node, "no run can show what it may be")

    return _instance(site.pattern, site.links, site.input, view, value)


def _instance(
    pattern: Pattern,
    links: tuple[Link, ...],
    start: fx.Node,
    view: GraphView,
    value_at: Callable[[fx.Node], Value],
) -> Any:
    fields: dict[str, Any] = {}
    own = links[-1].branch
    for branch in pattern.branches:
        path = f"{own}{branch.name}."
        inner = tuple(each for each in links if each.branch.startswith(path))
        if inner:
            fields[branch.name] = _instance(branch.pattern, inner, start, view, value_at)
    trunk = [each for each in links if each.branch == own]
    for link in trunk:
        value = _captured(link, view, value_at)
        if link.step.repeats or link.step.siblings:
            value = (*fields.get(link.step.name, ()), value)
        fields[link.step.name] = value
    if pattern.is_group:
        fields[pattern.steps[0].name] = Siblings(fields[pattern.steps[0].name])
    for name, index in pattern.values:
        if index == 0:
            fields[name] = value_at(start)
            continue
        following = {step.name for step in pattern.steps[index:]}
        reads = (link.source for link in trunk if link.step.name in following)
        fields[name] = value_at(next(reads, trunk[-1].node))
    return pattern.cls(**fields)


def _captured(link: Link, view: GraphView, value_at: Callable[[fx.Node], Value]) -> Any:
    plain = None if link.module is None else without_parametrizations(link.module)
    if not link.step.captures_call:
        return plain
    kwargs = {
        name: fx.node.map_arg(value, lambda node: _resolved(node, view, value_at))
        for name, value in view.arguments(link.node).items()
        if name not in (link.takes if isinstance(link.takes, tuple) else (link.takes,))
    }
    function = link.node.target if plain is None else plain
    return Call.captured(function, kwargs, link.takes, link.node)


def _resolved(node: fx.Node, view: GraphView, value_at: Callable[[fx.Node], Value]) -> Any:
    if view.is_constant(node):
        value = view.constant(node)
        if isinstance(value, torch.Tensor | nn.Module):
            return value
    return value_at(node)


def value_of(node: fx.Node, unknown: str = "") -> Value:
    """A node's value as a rule sees it."""
    known = node.meta.get("val")
    if not isinstance(known, torch.Tensor):
        return Value(node.name, node=node, unknown=unknown)
    # A size that only data decides is a symbol, and no guard can go by it.
    is_known = all(isinstance(size, int) for size in known.shape)
    shape = tuple(known.shape) if is_known else None
    return Value(node.name, shape, known.dtype, len(known.shape), node, unknown)
