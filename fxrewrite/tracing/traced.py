"""What tracing a model gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from torch import fx, nn

from ..errors import TraceError
from .assumptions import Assumption
from .passages import Passages
from .stops import Stop


@attrs.frozen(eq=False)
class Traced:
    """A graph, the constants that tracing found, by name, and what could not be traced.

    A submodule that could not is one node of the graph; where the model itself could not, there is
    no graph, but the `fragment` that was traced before the forward raised. `passages` are there if
    they were asked for, and the `lines` of nodes where tracing was precise. It `asks` if a forward
    asked what a value is, or an argument was left out.
    """

    graph: fx.Graph | None
    constants: dict[str, Any] = attrs.field(factory=dict)
    stops: tuple[Stop, ...] = ()
    reads_buffers: bool = False
    assumptions: tuple[Assumption, ...] = ()
    fragment: fx.Graph | None = None
    passages: Passages | None = None
    lines: Mapping[str, str] = attrs.field(factory=dict)
    asks: bool = False

    @property
    def seen(self) -> fx.Graph | None:
        """The graph, or what there is of one."""
        return self.fragment if self.graph is None else self.graph

    @property
    def is_whole(self) -> bool:
        """Whether all of the model was traced."""
        return self.graph is not None and not self.stops

    def check(self, model: nn.Module) -> None:
        """Raise TraceError where not all of the model was traced."""
        if not self.is_whole:
            first = self.stops[0]
            raise TraceError(first.advice(type(model).__name__)) from first.error
        for each in self.assumptions:
            if each.check is None:
                raise TraceError(each.advice(type(model).__name__))

    @property
    def decides(self) -> bool:
        """Whether what the arguments are decided the graph, or what else a forward asked."""
        return any(not each.is_mode for each in self.assumptions)

    def unchecked(self) -> Traced:
        """The same without the steps that check what the graph takes for granted."""
        checks = {each.check for each in self.assumptions if each.check is not None}
        if self.seen is not None:
            for node in self.seen.find_nodes(op="call_module"):
                if node.target in checks:
                    self.seen.erase_node(node)
        kept = {name: each for name, each in self.constants.items() if name not in checks}
        return attrs.evolve(self, constants=kept)
