"""What a rule is: a pattern, its guards, and the function that builds the replacement."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import attrs
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..errors import PatternError
from .actions import Action
from .guards import Guard
from .spec import Pattern

M = TypeVar("M")


@attrs.frozen(eq=False)
class Rule(Generic[M]):
    """A pattern, guards, and a pure function from a match to an action; made by `rule`.

    Calling it calls that function, so a rule is tested without any graph.
    """

    name: str
    pattern: Pattern = attrs.field(repr=str)
    build: Callable[[M], Action] = attrs.field(repr=False)
    guards: tuple[Guard, ...] = attrs.field(default=(), repr=False)
    any_mode: bool = False
    quiet: bool = attrs.field(default=False, repr=False)
    last: bool = attrs.field(default=False, repr=False)
    doc: str = ""
    source: str = ""

    def __call__(self, match: M) -> Action:
        """The action for a match."""
        return self.build(match)


def _as_tuple(rules: Any) -> Any:
    return tuple(rules) if isinstance(rules, Iterable) else rules


@attrs.frozen(eq=False)
class RuleSet:
    """An ordered, named group of rules; at each anchor the earlier ones are tried first.

    Called with a graph module, it is a pass of `torch.fx`.

    >>> RuleSet("nothing", [], doc="No rules at all.").rules
    ()
    """

    name: str
    rules: tuple[Rule[Any], ...] = attrs.field(converter=_as_tuple)
    doc: str = attrs.field(default="", kw_only=True)

    @rules.validator
    def _check(self, _: Any, rules: Any) -> None:
        if not isinstance(rules, tuple):
            raise PatternError(f"rule set {self.name!r}: expected a list of rules, found {rules!r}")
        for each in rules:
            if not isinstance(each, Rule):
                raise PatternError(f"rule set {self.name!r}: expected rules, found {each!r}")
        names = [each.name for each in rules]
        if len(set(names)) < len(names):
            raise PatternError(f"rule set {self.name!r}: two of its rules share a name: {names}")

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Apply the rules as a pass of `torch.fx.passes`.

        >>> import fxrewrite as fxr
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
        >>> result = fxr.get_rule_set("conv_bn")(fx.symbolic_trace(model))
        >>> result.modified, len(result.graph_module.graph.nodes)
        (True, 3)

        Args:
            graph_module: is left as it is. The result has a new graph module if a rule was applied,
                and this one otherwise.
        """
        from ..api import rewrite  # which is made of rule sets itself

        made, report = rewrite(graph_module, self)
        return PassResult(made, True) if report.applied else PassResult(graph_module, False)
