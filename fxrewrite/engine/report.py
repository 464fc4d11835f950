"""What became of one anchor, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import attrs

from ..engine.match import Alone, Miss
from ..ir.describe import in_one_line

Outcome = Literal["applied", "refused", "missed"]
Assurance = Literal["proved", "guarded", "trusted"]
OUTCOMES: tuple[Outcome, ...] = ("applied", "refused", "missed")


@attrs.frozen(eq=False)
class Finding:
    """What became of one anchor, a node or module of the kind that a rule looks for first.

    `anchor` is its qualified name (or the node's own, where it calls no module). `steps` pairs
    each step that matched with what it calls, `nodes` are those nodes' names, or that of the anchor
    alone where no chain matched; `became` is what stands there now, and `notes` is what else there
    is to know. What was applied is "proved" to be sound, "guarded" where the model's code might
    call its modules in another way, which raises GuardError, or "trusted" where a run alone shows
    it. Where nothing was applied, `others` are what other rules said of the anchor.
    """

    anchor: str
    outcome: Outcome
    rule: str
    steps: tuple[tuple[str, str], ...] = ()
    nodes: tuple[str, ...] = ()
    became: str = ""
    notes: tuple[str, ...] = ()
    assurance: Assurance | None = None
    cause: str | Miss | Alone = attrs.field(default="", repr=False)
    others: tuple[Finding, ...] = attrs.field(default=(), repr=False)

    @property
    def reason(self) -> str:
        """Why it was refused or missed; put into words only when asked for."""
        return str(self.cause)

    def renamed(self, shown: Callable[[str], str]) -> Finding:
        """The finding with other names for what takes part in it."""
        return attrs.evolve(
            self,
            anchor=shown(self.anchor),
            steps=tuple((step, shown(name)) for step, name in self.steps),
            nodes=tuple(map(shown, self.nodes)),
            others=tuple(each.renamed(shown) for each in self.others),
        )

    def is_about(self, name: str) -> bool:
        """Whether a module or node of that name takes part in it."""
        became = self.became.split(", ")
        own = (self.anchor, *became, *self.nodes, *(to for _, to in self.steps))
        return name in own or any(each.is_about(name) for each in self.others)

    def __str__(self) -> str:
        """The finding as a sentence."""
        if self.outcome != "applied":
            return f"{self.anchor}: {self.outcome} by {self.rule}: {self.reason}"
        chain = in_one_line(self.steps)
        notes = self.notes if self.assurance == "proved" else (*self.notes, str(self.assurance))
        became = "; ".join((self.became or "nothing", *notes))
        return f"{self.anchor}: applied by {self.rule}: {chain} became {became}"

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain data."""
        told = attrs.asdict(self, filter=lambda at, _: at.name not in ("cause", "others"))
        others = [each.to_dict() for each in self.others]
        return {**told, "reason": self.reason, "others": others}
