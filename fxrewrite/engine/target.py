"""Where a rewrite goes: what the engine asks of it before it commits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from .bindings import Shown
from .editing import Edit
from .match import Site
from .report import Assurance


class Target:
    """Where a rewrite goes. This one takes whatever a graph can say; others refuse some of it."""

    def refusal(self, site: Site, edit: Edit) -> str | None:
        """Why an edit that was prepared can't be had there, or None."""
        return None

    def elsewhere(self, site: Site) -> Sequence[Shown | None]:
        """What else the chain may be called on than in the graph; None for who knows what."""
        return ()

    def notes(self, site: Site, edit: Edit) -> Sequence[str]:
        """What a user would want to know of an edit that may land there."""
        return ()

    def assurance(self, site: Site) -> Assurance:
        """What it rests on that an edit which may land there is sound."""
        return "proved"

    def record(self, nodes: Sequence[fx.Node]) -> None:
        """Keep what is recorded of the graph's values true for nodes that were made."""
