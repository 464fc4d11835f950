"""A rewrite into the model's own module tree: what may land there, and what is made."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..engine.bindings import Shown, value_of
from ..engine.editing import Edit
from ..engine.legality import written_meanwhile
from ..engine.match import Link, Site
from ..ir.aliases import hands_on
from ..ir.describe import describe, name_of
from ..ir.graph_view import GraphView
from .evidence import Witness
from .graph_target import GraphTarget
from .reading.flows import Flows

_ELSEWHERE = "into='graph' can rewrite it"


class ModuleTreeTarget(GraphTarget):
    """The model's own module tree, whose forward code stays: modules give way to modules.

    Where the chain was, the new module stands in the slot's place and `nn.Identity` in the place of
    the others, so that names, indices and code that mentions them stay valid.
    """

    def __init__(self, view: GraphView, flows: Flows, witness: Witness | None = None) -> None:
        """Of a view, what the model's code may do with its modules, and what a run of it did."""
        super().__init__(view)
        self._flows = flows
        self._witness = witness
        self._before = self._called()
        self._gone: set[int] = set()
        self._idle = {id(each) for each in view.modules.values() if hands_on(each)}

    def refusal(self, site: Site, edit: Edit) -> str | None:
        """The forward calls what it calls, each module once; only what it calls may change."""
        view = self._view
        if edit.parts:
            return f"siblings become one call, which the forward would have to split; {_ELSEWHERE}"
        kept = {each.link for each in edit.kept}
        changed = [link for link in site.links if link not in kept]
        for link in changed:
            if not self._is_called(link) or len(link.sources) > 1:
                return (
                    f"{describe(link.node, view)} is written out in the forward, which stays as "
                    f"it is in a module tree; {_ELSEWHERE}"
                )
        if not edit.steps:
            if edit.nodes or edit.result is not site.input:
                return f"it becomes calls that the forward would have to spell; {_ELSEWHERE}"
            if all(type(each.module) is nn.Identity for each in changed):
                return "it is an Identity already, and something has to stand there"
            if not any(each.module and view.only_user(each.module) for each in changed):
                return f"what it calls is used elsewhere too, and stays; {_ELSEWHERE}"
        if len(edit.reads) > 1:
            return (
                "its replacement reads further values, which the forward would have to pass to it; "
                f"{_ELSEWHERE}"
            )
        for link in changed:
            if link.module is not None and not view.only_user(link.module) and not _stays(link):
                return (
                    f"{name_of(link.node)} is used elsewhere too, and one module can't be both "
                    f"what it was and what it becomes; {_ELSEWHERE}"
                )
        for call in () if edit.revises else edit.calls:
            if (reason := written_meanwhile(site, call.node, view)) is not None:
                return reason
        return self._parted(site, changed, edit)

    def elsewhere(self, site: Site) -> Sequence[Shown | None]:
        """What the run showed of other calls; of calls that it did not show, nothing is known."""
        called = [link for link in site.links if self._is_called(link)]
        if not called:
            return ()
        module, shown = self._original(called[0]), []
        if self._witness is not None and called[0] is site.links[0]:
            shown = self._witness.shown(module, self._gone | self._idle)
        most = self._flows.most_calls(module)
        reads_more = most != 1 and any(link.step.captures_call for link in site.links)
        if most != max(1, len(shown)) or reads_more:  # the trace shows one call in any case
            shown.append(None)
        traced = value_of(site.input)
        here = None if traced.rank is None else (traced.shape, traced.dtype)
        return [each for each in dict.fromkeys(shown) if each != here]

    def notes(self, site: Site, edit: Edit) -> Sequence[str]:
        """As for a graph, and where code is trusted to call only what it is given."""
        called = (self._original(link) for link in site.links if self._is_called(link))
        places = dict.fromkeys(filter(None, map(self._flows.handed, called)))
        trusted = [f"trusted to call only what it is given: {where}" for where in places]
        return [*super().notes(site, edit), *trusted]

    def _parted(self, site: Site, changed: Sequence[Link], edit: Edit) -> str | None:
        """Why the model's code, on some way that was not traced, needs a module as it is."""
        new = {call.slot: call.module for call in edit.calls}
        gone = [link for link in changed if link not in new]
        stays = [link.node for link in site.links if link not in gone]
        chain = [self._original(link) for link in site.links if not _is_idle(link)]
        reason = self._flows.refusal(
            chain,
            {
                self._original(link): new.get(link) or nn.Identity()
                for link in changed
                if not _stays(link)
            },
            self._gone,
            late=any(link.node < node for link in gone for node in stays),
        )
        if reason is None and self._witness is not None:
            reason = self._witness.refusal(chain, self._gone | self._idle)
        if reason is None:
            self._gone |= {id(self._original(link)) for link in gone}
        return reason

    def _is_called(self, link: Link) -> bool:
        """Whether a link is a call of a module of the model."""
        return link.module is not None and name_of(link.node) in self._view.modules

    def _original(self, link: Link) -> nn.Module:
        return self._view.modules[name_of(link.node)]

    def replaced(self) -> dict[int, nn.Module]:
        """What stands in the place of each of the model's modules that changed, by identity."""
        view, now = self._view, self._called()
        new = {name: view.placed[name] for name in now if name in view.placed}
        gone = {
            name: nn.Identity().train(view.modules[name].training)
            for name in self._before
            if name not in now
        }
        return {id(view.modules[name]): module for name, module in {**gone, **new}.items()}

    def _called(self) -> dict[str, None]:
        calls = (node for node in self._view.graph.nodes if node.op == "call_module")
        return dict.fromkeys(str(node.target) for node in calls)


def _is_idle(link: Link) -> bool:
    """Whether a link is no module, or one that does nothing where it is."""
    return link.module is None or hands_on(link.module)


def _stays(link: Link) -> bool:
    """Whether a matched module may stay, since it does nothing where it is."""
    return hands_on(link.module) and link.module is not None and not link.module.training
