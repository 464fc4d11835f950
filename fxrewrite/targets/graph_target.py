"""Where the result is a graph, or is seen as one."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import fx, nn
from typing_extensions import override

from ..engine.editing import Edit
from ..engine.match import Site
from ..engine.target import Target
from ..ir.fake_values import renew
from ..ir.graph_view import GraphView


class GraphTarget(Target):
    """A graph, which takes whatever an edit says; targets of other kinds refuse some of it."""

    def __init__(self, view: GraphView) -> None:
        self._view = view

    @override
    def record(self, nodes: Sequence[fx.Node]) -> None:
        """Keep fake tensors true that the graph has for its values."""
        renew(self._view, nodes)

    @override
    def notes(self, site: Site, edit: Edit) -> Sequence[str]:
        """Where modules no longer share a parameter."""
        if not self._ties:
            return ()
        stays = [each.link.module for each in edit.kept] + [call.module for call in edit.calls]
        kept = {id(e) for each in stays if each is not None for e in each.parameters()}
        modules = (link.module for link in site.links if link.module is not None)
        read = (id(parameter) for each in modules for parameter in each._parameters.values())
        ended = (self._ties[key] for key in read if key in self._ties and key not in kept)
        return [f"the tie of {' and '.join(names)} ends here" for names in ended]

    @functools.cached_property
    def _ties(self) -> dict[int, tuple[str, ...]]:
        """The qualified names of each parameter that several modules hold, by its identity."""

        first: dict[int, nn.Module] = {}
        shared = {
            id(parameter)
            for module in self._view.modules.values()
            for parameter in module._parameters.values()
            if parameter is not None and first.setdefault(id(parameter), module) is not module
        }
        holders: dict[int, dict[int, str]] = {each: {} for each in shared}
        for name, module in self._view.modules.items() if shared else ():
            for key, parameter in module._parameters.items():
                if id(parameter) in shared:
                    full = f"{name}.{key}".lstrip(".")
                    holders[id(parameter)].setdefault(id(module), full)
        return {each: tuple(names.values()) for each, names in holders.items()}
