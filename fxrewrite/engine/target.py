"""Where a rewrite goes: what the engine asks of it before it commits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..engine.bindings import Shown
from ..engine.match import Link, Site
from ..ir.aliases import Effects
from ..rules.actions import Action


class Target(Protocol):
    """What a graph is rewritten for; the engine asks it before it commits."""

    def refusal(
        self, site: Site, action: Action, slot: Link | None, effects: Effects
    ) -> str | None:
        """Why the outcome of this site can't be had there, or None."""

    def elsewhere(self, site: Site) -> Sequence[Shown | None]:
        """What else the chain may be called on than in the graph; None for who knows what."""

    def notes(self, site: Site) -> Sequence[str]:
        """What a user would want to know of a site that may land there."""
