"""Rewrite one site: check it, ask the rule, prepare what it wants, check that, and commit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
from torch import fx, nn

from ..ir.aliases import written_by
from ..ir.describe import name_of
from ..ir.graph_view import GraphView
from ..ir.inplace_activations import make_out_of_place
from ..module_utils.parametrization import is_parametrized
from ..rules.actions import Action
from ..rules.rule import Rule
from ..rules.values import Declined
from .alias_checks import alias_refusal
from .editing import Edit, NewCall, commit, discard, prepare
from .evaluation import evaluate, failure
from .legality import refusal
from .match import Site
from .metadata_readers import metadata_refusal
from .report import Assurance
from .target import Target

Modules = tuple[nn.Module | None, ...]


@attrs.frozen(eq=False)
class Applied:
    """What stands where a site was: its nodes in order, those of them that the chain had, notes."""

    nodes: list[fx.Node]
    kept: set[fx.Node]
    became: str
    notes: tuple[str, ...]
    assurance: Assurance


@attrs.frozen(eq=False)
class _Placed:
    """New modules that further sites of the same modules share, and where they are.

    `made_from` keeps those modules alive, since they are known by identity.
    """

    action: Action
    targets: tuple[tuple[str, nn.Module], ...]
    made_from: Modules


class SiteRewriter:
    """Rewrites sites of one graph; sites that share all their modules share the new ones."""

    def __init__(self, view: GraphView, target: Target) -> None:
        self._view = view
        self._target = target
        self._shared: dict[tuple[Any, ...], _Placed] = {}
        self._compared: set[Rule[Any]] = set()

    def apply(self, rule: Rule[Any], site: Site) -> Applied | Declined:
        """Rewrite a site by a rule, or say why it stays as it is."""
        view = self._view
        reason = refusal(site, view, any_mode=rule.any_mode)
        if reason is not None:
            return Declined(reason)
        modules = tuple([link.module for link in site.links])
        shared = self._shared_by(rule, modules)
        decided = self._decide(rule, site, shared)
        if isinstance(decided, Declined):
            return decided
        if shared is not None:
            shared = shared if shared.action.is_like(decided) else None
            decided = shared.action if shared is not None else decided
        try:
            edit = prepare(decided, view, site)
        except Exception as error:
            raise failure(rule, site, f"it asked for what can't be made: {error}") from error
        reason = (
            alias_refusal(site, view, edit)
            or metadata_refusal(site, view, edit)
            or self._target.refusal(site, edit)
        )
        if reason is not None:
            discard(view, edit)
            return Declined(reason)
        targets = (
            [target for target, _ in shared.targets]
            if shared is not None
            else self._names(rule, decided, edit, modules)
        )
        for call in edit.calls:
            self._adopt(call.module, modules)
        return self._commit(rule, site, edit, targets)

    def _shared_by(self, rule: Rule[Any], modules: Modules) -> _Placed | None:
        """What the same rule made of the same modules elsewhere, unless it is gone from there."""
        shared = self._shared.get((rule, *map(id, modules)))
        placed = () if shared is None else shared.targets
        # Where it was, it may have been rewritten once more.
        return shared if all(self._view.placed.get(at) is now for at, now in placed) else None

    def _decide(self, rule: Rule[Any], site: Site, shared: _Placed | None) -> Action | Declined:
        """What the rule wants, which it need not be asked again where it sees modules alone."""
        sees_more = rule.pattern.values or any(link.step.captures_call for link in site.links)
        if shared is not None and not sees_more:
            return shared.action
        elsewhere = self._target.elsewhere(site) if sees_more else ()
        exactly = rule not in self._compared
        decided = evaluate(rule, site, self._view, elsewhere, exactly=exactly)
        if isinstance(decided, Action):
            self._compared.add(rule)
        return decided

    def _names(
        self, rule: Rule[Any], action: Action, edit: Edit, modules: Modules
    ) -> Sequence[str]:
        """Names for new modules, noted for sites to come unless one is a slot's own."""
        named = [self._name(call) for call in edit.calls]
        if named and not any(is_own for _, is_own in named):
            placed = [(name, c.module) for (name, _), c in zip(named, edit.calls, strict=True)]
            self._shared[(rule, *map(id, modules))] = _Placed(action, tuple(placed), modules)
        return [name for name, _ in named]

    def _name(self, call: NewCall) -> tuple[str, bool]:
        """The name for a new module, and whether it is the slot's own."""
        if call.slot is None:
            return self._view.free_name(type(call.module).__name__.lower()), False
        old, name = call.slot.module, name_of(call.slot.node)
        if old is call.module or (old is not None and self._view.users(old) == 1):
            return name, True
        return self._view.name_beside(name), False

    def _adopt(self, module: nn.Module, matched: Modules) -> None:
        """Give a new module the mode of those it replaces."""
        training = any(old.training for old in matched if old is not None)
        for each in module.modules() if module._modules else (module,):
            if each.training != training and id(each) not in self._view.ids:
                each.training = training

    def _commit(self, rule: Rule[Any], site: Site, edit: Edit, targets: Sequence[str]) -> Applied:
        view = self._view
        notes = [*_notes(site), *self._out_of_place_readers(site, edit)]
        notes += self._target.notes(site, edit)
        try:
            nodes = commit(view, site, edit, targets)
            self._target.record(nodes)
        except Exception as error:
            raise failure(rule, site, f"it asked for what can't be made: {error}") from error
        became = " -> " if edit.revises else ", "
        new = nodes[:1] if edit.parts else nodes
        kept = {each.node for each in edit.kept}
        assurance = self._target.assurance(site)
        return Applied(nodes, kept, became.join(map(name_of, new)), tuple(notes), assurance)

    def _out_of_place_readers(self, site: Site, edit: Edit) -> list[str]:
        """Let no reader of siblings write to what will be a part of one tensor."""
        values = [link.node for link in site.links] if edit.parts else []
        readers = [(user, value) for value in values for user in value.users]
        notes = []
        for user in (user for user, value in readers if value in written_by(user, self._view)):
            make_out_of_place(user, self._view)
            self._view.forget_write(user)
            notes.append(f"{name_of(user)} no longer writes in place")
        return notes


def _notes(site: Site) -> Iterator[str]:
    """What a user would want to know of a site that is rewritten."""
    for link in site.links:
        if link.module is not None and is_parametrized(link.module):
            yield f"the parametrized tensors of {name_of(link.node)} are baked in as they are now"
