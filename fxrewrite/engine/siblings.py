"""Find the siblings of a call, and those among them that are fit to become one with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from torch import fx, nn

from ..ir.aliases import is_fresh
from ..ir.describe import Seen, describe, name_of
from ..ir.graph_view import GraphView
from ..ir.tensor_metadata import strides_observable
from ..module_utils.parametrization import without_parametrizations
from ..rules.rule import Rule
from ..rules.spec import Pattern, Step
from ..rules.values import Declined
from .evaluation import failure
from .legality import refusal
from .match import Alone, Link, Site
from .matcher import calls


def siblings_of(
    rule: Rule[Any], anchor: fx.Node, view: GraphView, left_out: dict[fx.Node, str]
) -> Site | Declined:
    """The siblings that may become one with an anchor, or why there are none.

    `left_out` has why calls had to be left out when their siblings became one; more are noted.
    """
    try:
        found = _group(rule.pattern, view, anchor)
    except Exception as error:
        raise failure(rule, name_of(anchor), f"its alike= raised {error!r}") from error
    if isinstance(found, Site):
        found, others = _fit(found, anchor, view, any_mode=rule.any_mode)
        left_out.update(others)
    if isinstance(found, Declined) and anchor in left_out:
        return Declined(left_out[anchor])
    return found


def _group(pattern: Pattern, view: GraphView, anchor: fx.Node) -> Site | Declined:
    """A call with its siblings, or why there are none."""
    step, links, others = pattern.steps[0], [], []
    source = next(iter(view.inputs(anchor).values()), anchor)
    known = _in_common(step, view.module(anchor))
    for reader in source.users:
        module = view.module(reader)
        entry = next(iter(view.inputs(reader).items()), None)
        if module is None or entry is None or entry[1] is not source:
            continue
        if not calls(step, reader, view):
            continue
        found = known if reader is anchor else _in_common(step, module)
        if found == known:
            links.append(Link(step, reader, module, entry[0], (source,)))
        else:
            others.append((Seen.of(reader, view), found))
    if len(links) < 2:
        return Declined(Alone(step, Seen.of(source, view), known, tuple(others)), "missed")
    return _numbered(pattern, links)


def _fit(
    site: Site, anchor: fx.Node, view: GraphView, *, any_mode: bool
) -> tuple[Site | Declined, dict[fx.Node, str]]:
    """The siblings that may become one with an anchor, or why it must stay; and why others must.

    The one that they become reads their value where the first of them does.
    """
    kept: list[Link] = []
    left_out: dict[fx.Node, str] = {}
    modules: set[int] = set()
    for link in sorted(site.links, key=lambda link: link.node is not anchor):
        reason = _unfit(site.pattern, link, view, any_mode=any_mode)
        if reason is not None and link.node is anchor:
            return Declined(reason), {}
        first, last = sorted((link.node, anchor))
        if reason is None and (at := view.write_between(first, last, [site.input])) is not None:
            reason = (
                f"{describe(at, view)} writes in place to what siblings read, "
                f"between {describe(first, view)} and {describe(last, view)}"
            )
        if reason is None and id(link.module) in modules:
            reason = f"{describe(link.node, view)} is called twice on one value"
        if reason is None:
            modules.add(id(link.module))
            kept.append(link)
        else:
            left_out[link.node] = reason
    if len(kept) < 2:
        why = next(iter(left_out.values()))
        return Declined(f"it has no sibling that may change: {why}"), {}
    return _numbered(site.pattern, kept), left_out


def _numbered(pattern: Pattern, links: list[Link]) -> Site:
    ordered = enumerate(sorted(links, key=lambda link: link.node))
    return Site(pattern, tuple(attrs.evolve(link, sibling=i) for i, link in ordered))


def _in_common(step: Step, module: nn.Module | None) -> Mapping[str, Any]:
    if step.alike is None or module is None:
        return {}
    return dict(step.alike(without_parametrizations(module)))


def _unfit(pattern: Pattern, link: Link, view: GraphView, *, any_mode: bool) -> str | None:
    """Why this sibling must stay as it is, whatever the others are."""
    reason = refusal(Site(pattern, (link,)), view, any_mode=any_mode)
    if reason is not None:
        return reason
    if not is_fresh(link.node, view):
        return f"{describe(link.node, view)} may return what it was given"
    return strides_observable(link.node, view, link.step.dim, link.step.keeps_sizes)
