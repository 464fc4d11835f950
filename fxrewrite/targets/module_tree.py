"""A rewrite into the model's own module tree: what may land there, and what is made."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import attrs
import torch
from torch import fx, nn
from typing_extensions import override

from ..engine.bindings import Shown, value_of
from ..engine.editing import Edit
from ..engine.legality import written_meanwhile
from ..engine.match import Link, Site
from ..engine.report import Assurance
from ..ir.aliases import hands_on
from ..ir.describe import describe, name_of
from ..ir.graph_view import GraphView
from ..module_utils.names import parent_name
from .evidence import Evidence
from .graph_target import GraphTarget
from .guard import Pair
from .module_reads import read_flaw
from .value_paths import Calls, ValuePaths

_ELSEWHERE = "into='graph' can rewrite it"


@attrs.define
class Budget:
    """How many sites may still be rewritten; further calls of modules that changed are free."""

    left: int | None = None


class ModuleTreeTarget(GraphTarget):
    """The model's own module tree, whose forward code stays: modules give way to modules.

    Where the chain was, the new module stands in the slot's place and `nn.Identity` in the place of
    the others, so that names, indices and code that mentions them stay valid.
    """

    def __init__(
        self,
        view: GraphView,
        calls: Calls,
        evidence: Evidence | None = None,
        *,
        is_certain: bool,
        trusts_run: bool = False,
        budget: Budget | None = None,
        homes: Mapping[int, Sequence[ModuleTreeTarget]],
        apart: Collection[int] = (),
    ) -> None:
        """Of a view, how values get from call to call, and what a run showed.

        `is_certain` says that the modules can't be called otherwise than in the graph. `homes` has,
        by a module's identity, the graphs that call it. Those that are `apart` stay as they are.
        It `trusts_run` where what the run showed is taken for all that there is.
        """
        super().__init__(view)
        self._evidence, self._is_certain = evidence, is_certain
        self._trusts = evidence if trusts_run else None
        self._trusted: set[str] = set()
        self._budget = budget or Budget()
        self._homes, self._apart = homes, apart
        self._changed: set[nn.Module] = set()
        self._paths = ValuePaths(view, calls, is_certain)
        self._modules, count = self._paths.modules, self._paths.count
        # What reads an attribute of a module, or calls it as a part of another, needs it as it is.
        self._used_otherwise = {id(each) for each in count if view.users(each) != count[each]}
        self._gone: set[int] = set()
        self._idle = {id(each) for each in view.modules.values() if hands_on(each)}
        self._kinds: dict[str, frozenset[Shown]] = {}
        self.pairs: list[Pair] = []
        self.expected: dict[str, frozenset[Shown]] = {}

    @override
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
            if not any(self._is_called_alone(self._original(each)) for each in changed):
                return f"what it calls is used elsewhere too, and stays; {_ELSEWHERE}"
        if len(edit.reads) > 1:
            return (
                "its replacement reads further values, which the forward would have to pass to it; "
                f"{_ELSEWHERE}"
            )
        own = [self._original(link) for link in changed if not _stays(link)]
        if len(set(own)) < len(own):
            return f"it calls one module more than once, and all calls stay; {_ELSEWHERE}"
        homes = set[tuple[ModuleTreeTarget, ...]]()
        for link in changed:
            if _stays(link):
                continue
            found = tuple(self._others(self._original(link)))
            homes.add(found if self in found else (self,))
            if not self._may_change(self._original(link), found):
                return (
                    f"{name_of(link.node)} is used elsewhere too, and one module can't be both "
                    f"what it was and what it becomes; {_ELSEWHERE}"
                )
        if len(homes) > 1:
            return f"of what it calls, not all is called by the same code; {_ELSEWHERE}"
        for call in () if edit.revises else edit.calls:
            reason = written_meanwhile(site, call.node, view, [site.input])
            if reason is not None:
                return reason
        return self._parted(site, changed, edit)

    @override
    def elsewhere(self, site: Site) -> Sequence[Shown | None]:
        """What the run showed of other calls; of calls that it did not show, nothing is known."""
        called = [link for link in site.links if self._is_called(link)]
        if not called or self._is_certain:
            return ()
        if self._evidence is None or called[0] is not site.links[0]:
            return [None] if value_of(site.input).rank is not None else ()
        shown = self._evidence.shown(self._original(called[0]), self._gone | self._idle)
        if None in shown or not shown:
            return [None]
        # Of calls that were not seen, the guard sees to it that they are of such a rank and type.
        kinds = dict.fromkeys(Shown(each.rank, each.dtype) for each in shown if each is not None)
        self._kinds[called[0].node.name] = frozenset(kinds)
        here = value_of(site.input)
        others = dict.fromkeys(e for e in shown if e != (here.rank, here.dtype, here.shape))
        return [*others, *kinds]

    @override
    def assurance(self, site: Site) -> Assurance:
        """Whether the model's code might call its modules in another way, or is trusted not to."""
        if site.links[0].node.name in self._trusted:
            return "trusted"
        watched = not self._is_certain and any(map(self._is_called, site.links))
        return "guarded" if watched else "proved"

    def _parted(self, site: Site, changed: Sequence[Link], edit: Edit) -> str | None:
        """Why the model's code, on some way that was not traced, needs a module as it is."""
        new = {call.slot: call.module for call in edit.calls}
        gone = [link for link in changed if link not in new]
        chain = [self._original(link) for link in site.links if not _is_idle(link)]
        if self._evidence is not None:
            firsts = self._paths.firsts(chain)
            reason = self._evidence.refusal(chain, self._gone | self._idle, firsts)
            if reason is not None:
                return reason
        path = self._paths.of(site)
        if path is None:
            return "it is not known how its values get from one call to the next"
        stays = [link.node for link in site.links if link not in gone]
        # Through a function the guard can't follow a value, so nothing else may come between.
        late = any(each not in self._paths.modules for each in path)
        late = late or any(link.node < node for link in gone for node in stays)
        becomes = {link: new.get(link) or nn.Identity() for link in changed if not _stays(link)}
        # What is idle stays so only where nobody sets its mode.
        idle = {link: self._original(link) for link in changed if _stays(link)}
        reason = self._unproved(path, {**becomes, **idle}, late)
        if reason is not None:
            if self._trusts is None or not all(self._trusts.shown(each, ()) for each in chain):
                return reason
            self._trusted.add(path[0])
        is_watched = not self._is_certain and (len(path) > 1 or path[0] in self._kinds)
        made_by_torch = (fx.GraphModule, torch.jit.ScriptModule)  # each has a class of its own
        if is_watched and any(isinstance(each, made_by_torch) for each in becomes.values()):
            return (
                "the model's code may call its modules otherwise, which a GraphModule or a "
                "ScriptModule can't notice; let the rule give a module of a plain class"
            )
        now = {self._original(each) for each in (becomes if edit.steps else changed)}
        if not all(any(e in t._changed for t in (self, *self._others(e))) for e in now):
            if self._budget.left == 0:
                return "as many sites were rewritten as may be"
            self._budget.left = None if self._budget.left is None else self._budget.left - 1
        if not self._is_certain:
            self.pairs += self._paths.pairs(path, reason is None, late, self._is_called_once)
        if path[0] in self._kinds:
            self.expected[self._modules[path[0]]] = self._kinds[path[0]]
        self._changed |= now
        self._gone |= {id(self._original(link)) for link in gone}
        self._paths.gone |= {link.node.name for link in gone}
        return None

    def _unproved(
        self, path: Sequence[str], becomes: Mapping[Link, nn.Module], late: bool
    ) -> str | None:
        """What the functions where the calls stand may do with the value, or with the modules."""
        if (reason := self._paths.flaw(path, late)) is not None:
            return reason
        passages = dict.fromkeys(self._paths.passages(path))
        for link, after in becomes.items():
            reason = read_flaw(self._owners(link), passages, self._original(link), after)
            if reason is not None:
                return reason
        return None

    def _is_called_once(self, name: str) -> bool:
        module = self._view.modules[name]
        seen = [] if self._evidence is None else self._evidence.shown(module, ())
        return max(len(seen), self._paths.count[module]) <= 1

    def _may_change(self, module: nn.Module, homes: Sequence[ModuleTreeTarget]) -> bool:
        """Whether all calls of a module may be those of another one, in each graph that has some.

        Whether they are in the end is seen when all sites have been rewritten: `conflicts`.
        """
        return self._is_called_alone(module) and (
            self in homes
            or all(module not in each._changed and each._is_called_alone(module) for each in homes)
        )

    def _others(self, module: nn.Module) -> Sequence[ModuleTreeTarget]:
        return self._homes.get(id(module), ())

    def _is_called_alone(self, module: nn.Module) -> bool:
        """Whether nothing but calls uses a module in this graph, and it may become another."""
        return id(module) not in self._used_otherwise and id(module) not in self._apart

    def conflicts(self) -> Iterator[int]:
        """The modules that changed here, and not in all calls, or not to one and the same."""
        view, now = self._view, self._called()
        several = [view.modules[view.first_name(n)] for n in now - view.modules.keys()]
        # A new module may hold the old one, which is no call of that.
        stay = {id(view.module(node)) for node in view.graph.find_nodes(op="call_module")}
        for module in self._changed:
            homes = self._others(module)
            elsewhere = self in homes and any(module not in each._changed for each in homes)
            if elsewhere or module in several or id(module) in stay:
                yield id(module)

    def _is_called(self, link: Link) -> bool:
        """Whether a link is a call of a module of the model."""
        return link.module is not None and self._first_name(link) in self._view.modules

    def _first_name(self, link: Link) -> str:
        return self._view.first_name(name_of(link.node))

    def _owners(self, link: Link) -> Iterator[nn.Module]:
        """The modules that contain what a link calls."""
        name = self._first_name(link)
        while name:
            name, _ = parent_name(name)
            yield self._view.modules[name]

    def _original(self, link: Link) -> nn.Module:
        return self._view.modules[self._first_name(link)]

    @property
    def called(self) -> list[nn.Module]:
        """The modules that the graph calls."""
        return [self._view.modules[name] for name in self._modules.values()]

    def replaced(self) -> dict[int, nn.Module]:
        """What stands in the place of each of the model's modules that changed, by identity."""
        view, now = self._view, self._called()
        new = {name: view.placed[name] for name in now if name in view.placed}
        gone = {
            name: nn.Identity().train(view.modules[name].training)
            for name in self._modules.values()
            if name not in now
        }
        return {id(view.modules[name]): module for name, module in {**gone, **new}.items()}

    def _called(self) -> set[str]:
        return {str(node.target) for node in self._view.graph.find_nodes(op="call_module")}


def _is_idle(link: Link) -> bool:
    """Whether a link is no module, or one that does nothing where it is."""
    return link.module is None or hands_on(link.module)


def _stays(link: Link) -> bool:
    """Whether a matched module may stay, since it does nothing where it is."""
    return hands_on(link.module) and link.module is not None and not link.module.training
