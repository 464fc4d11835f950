"""Ask a rule what to do with a match, and hold it to its promises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from ..errors import RuleError
from ..ir.graph_view import GraphView
from ..module_utils.state import Snapshot
from ..module_utils.tensors import is_finite, named_tensors
from ..module_utils.torch_private import pytree
from ..rules.actions import Action, Call, Split
from ..rules.rule import Rule
from ..rules.values import Declined
from .bindings import Shown, capture, capture_elsewhere
from .match import Site


def evaluate(
    rule: Rule[Any],
    site: Site,
    view: GraphView,
    elsewhere: Sequence[Shown | None] = (),
    *,
    exactly: bool = True,
) -> Action | Declined:
    """The action that a rule wants for a site, and `elsewhere` as well, or why it declines.

    What it is given is compared afterwards: bit for bit if `exactly`, and else by identity and
    version, by which numbers that were overwritten can't be put back.

    Raises:
        RuleError: a guard or the rule raised, changed what it was given, or returned something
            that is neither.
    """
    answer = _watched(rule, site, capture(site, view), exactly=exactly)
    for shown in elsewhere:
        if isinstance(answer, Declined):
            break
        other = _watched(rule, site, capture_elsewhere(site, view, shown), exactly=exactly)
        if isinstance(other, Declined) or not answer.is_like(other):
            answer = Declined(_undecided(shown, other))
    return answer


def failure(rule: Rule[Any], site: Site | str, what: str) -> RuleError:
    """The error for a rule that breaks its contract: which, where, and what it did."""
    declared = f" ({rule.source})" if rule.source else ""
    return RuleError(f"rule {rule.name!r}{declared} at {site}: {what}")


def _watched(rule: Rule[Any], site: Site, match: Any, *, exactly: bool) -> Action | Declined:
    """Ask a rule and compare afterwards what it was given."""
    given = list(_given(match))
    before = Snapshot(given, contents=exactly)
    with before, before:  # Ctrl-C may come while the inner one is putting things back
        answer = _asked(rule, site, match)
        if (changed := before.difference()) is not None:
            lost = "" if exactly else "; numbers that it overwrote can't be put back"
            what = f"it changed {changed}; a rule must build new modules and tensors{lost}"
            raise failure(rule, site, what)
    if isinstance(answer, Action) and (reason := _not_finite(answer, given)) is not None:
        return Declined(reason)
    return answer


def _asked(rule: Rule[Any], site: Site, match: Any) -> Action | Declined:
    """The first reason of a guard, or else what the rule returns."""
    for guard in rule.guards:
        name = getattr(guard, "__name__", None) or repr(guard)
        try:
            reason = guard(match)
        except Exception as error:
            raise failure(rule, site, f"its guard {name} raised {error!r}") from error
        if isinstance(reason, str | Declined):
            return Declined(reason) if isinstance(reason, str) else reason
        if reason is not None:
            what = f"its guard {name} returned {reason!r}, not None or a reason"
            raise failure(rule, site, what)
    try:
        action = rule.build(match)
    except Exception as error:
        raise failure(rule, site, f"it raised {error!r}") from error
    if not isinstance(action, Action) or isinstance(action, Split) is not rule.pattern.is_group:
        wanted = "Split" if rule.pattern.is_group else "Replace or Revise or Call or Bypass"
        what = f"it returned {action!r}, not a {wanted}; to decline, use a guard"
        raise failure(rule, site, what)
    if (wrong := action.misuse(rule.pattern, [link.name for link in site.links])) is not None:
        raise failure(rule, site, wrong)
    return action


def _undecided(shown: Shown | None, other: Action | Declined) -> str:
    """Why a rule can't have its way where it would not have it at another call."""
    said = other if isinstance(other, Declined) else "the rule asks for something else there"
    if shown is None or shown.shape is None:
        what = "nobody knows what" if shown is None else f"a tensor of {shown.rank} dimensions"
        return f"it may also be called on {what}: {said}"
    return f"it is also called on a tensor of shape {shown.shape}: {said}"


def _given(match: Any) -> Iterator[Any]:
    """The modules and tensors that a match gives to a rule."""
    for field in attrs.fields(type(match)):
        captured = getattr(match, field.name)
        for each in captured if isinstance(captured, tuple) else (captured,):
            if hasattr(type(each), "__fxrewrite_pattern__"):
                yield from _given(each)
            elif isinstance(each, Call):
                yield each.function
                yield from pytree.tree_leaves(dict(each.kwargs))
            else:
                yield each


def _not_finite(action: Action, given: Sequence[Any]) -> str | None:
    """The reason to refuse an action whose new tensors hold infinities or NaN."""
    for name, tensor in action.tensors():
        if not is_finite(tensor) and not any(tensor is each for each in _tensors_of(given)):
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"the new {name} would not be finite in {dtype}"
    return None


def _tensors_of(given: Sequence[Any]) -> Iterator[torch.Tensor]:
    for each in given:
        held = named_tensors(each) if isinstance(each, nn.Module) else [("", each)]
        yield from (tensor for _, tensor in held if isinstance(tensor, torch.Tensor))
