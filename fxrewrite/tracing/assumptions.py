"""What a graph takes for granted, since a forward asked for it while it was traced."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen
class Assumption:
    """Something that a forward asks and that a graph answers once and for all.

    `name` is the qualified name of the module whose forward asks, empty for the model itself, and
    `argument` is the argument of the model that it asks of, if it is one. `check` is the qualified
    name of the step by which the graph makes sure of the answer, None where there can't be one.
    `is_mode` says that it asks for the mode, training or not, and not what a value is.
    """

    name: str
    kind: str
    line: str
    reason: str
    argument: str | None = None
    check: str | None = None
    is_mode: bool = False

    def __str__(self) -> str:
        """What is taken for granted, and the line."""
        return f"{self.reason}, at {self.line}"

    def to_dict(self) -> dict[str, Any]:
        """The assumption as plain data."""
        return attrs.asdict(self)

    def advice(self, kind: str) -> str:
        """What to tell somebody who asked for one graph of a model of this kind."""
        keep = f"keep that module as one node by Rewriter(rules, leaf_modules=[{self.name!r}]), "
        return (
            f"{kind} can't be one graph because of {self.kind}, at\n  {self.line}\n"
            f"of which a graph can't make sure: {self.reason}.\n"
            f"Leave out into='graph' to keep the forward as it is; or else "
            f"{keep if self.name else ''}give Rewriter a tracer= or pass your own GraphModule."
        )


def message(kind: str, reason: str, line: str) -> str:
    """What to tell somebody who runs a graph where it is otherwise."""
    return (
        f"this graph of {kind} was traced where {reason}, which the forward asks at\n"
        f"  {line}\n"
        "and a graph goes one way only; rewrite(..., into='modules') keeps the forward as it is."
    )
