"""What a rewrite did: one finding for every anchor, and why."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import attrs

from ..engine.report import OUTCOMES, Finding, Outcome
from ..errors import ExpectationError, UnknownNameError
from ..tracing.assumptions import Assumption
from ..tracing.stops import Stop
from .near_misses import NearMiss
from .state_dict_map import TensorFate

_LINES_PER_OUTCOME = 20


@attrs.frozen(eq=False)
class Report:
    """All findings of one rewrite, in the order of the graph; printed, it is a compact table.

    `rule_sets` names the rules of each set, `modules` all modules of the model, each with the first
    of its names, `calls` for each layer the calls of functions that are given its tensors, and
    `nodes` the nodes that were looked at. `near_misses` has what is no anchor, took part in
    nothing, and might have; `unreached` says of modules why no call of them was looked at. `into`
    is "graph" or "modules", what the result is; `stops` has each module that could not be traced,
    and why. `assumptions` has what a forward asks that a graph answers once: a graph checks it, and
    a module tree need not. `unknown_shapes` is why example inputs did not show the shapes of all
    values. `parameter_names` has for each key of the model's state dict what became
    of it.

    >>> import fxrewrite as fxr
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    >>> report = fxr.plan(model, "conv_bn")
    >>> report.counts["fold_conv_bn"]
    {'applied': 1, 'refused': 0, 'missed': 0}
    >>> print(report.why("1"))
    1: applied by fold_conv_bn: 0 -> 1 became 0
    """

    findings: tuple[Finding, ...]
    rule_sets: Mapping[str, tuple[str, ...]]
    modules: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    calls: Mapping[str, tuple[str, ...]] = attrs.field(factory=dict, repr=False)
    nodes: frozenset[str] = attrs.field(default=frozenset(), repr=False)
    near_misses: Mapping[str, tuple[NearMiss, ...]] = attrs.field(factory=dict, repr=False)
    unreached: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    into: str = "graph"
    stops: tuple[Stop, ...] = ()
    parameter_names: Mapping[str, TensorFate] = attrs.field(factory=dict, repr=False)
    assumptions: tuple[Assumption, ...] = ()
    unknown_shapes: str | None = None

    @property
    def applied(self) -> tuple[Finding, ...]:
        """The sites that were rewritten."""
        return self._with("applied")

    @property
    def refused(self) -> tuple[Finding, ...]:
        """The anchors where a chain matched, and a guard or an invariant said no."""
        return self._with("refused")

    @property
    def missed(self) -> tuple[Finding, ...]:
        """The anchors whose chain was not found, with the step where it stopped."""
        return self._with("missed")

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """For each rule, how many anchors it applied to, was refused at, and missed at."""
        rules = dict.fromkeys(rule for names in self.rule_sets.values() for rule in names)
        counts = {rule: dict.fromkeys(OUTCOMES, 0) for rule in rules}
        for finding in self.findings:
            counts[finding.rule][finding.outcome] += 1
        return {rule: {str(k): n for k, n in each.items()} for rule, each in counts.items()}

    def why(self, name: str) -> str:
        """What became of a module or node of the original model, and why.

        Of an anchor at which nothing was applied, this is the answer of each rule that looks for
        such an anchor. Of any other module or node, it is the match that it takes part in; or the
        step where the chain of each rule stopped that it might have been part of.

        Args:
            name: a module's qualified name or a node's name; a container's name tells of all
                anchors inside it.

        Raises:
            UnknownNameError: the model has nothing of that name.
        """
        names = self.names(name)
        found = list(self.findings)
        if name:
            found = [f for f in found if any(map(f.is_about, names))]
            near = [one for each in names for one in self.near_misses.get(each, ())]
            if not found and near:
                return _in_words(name, near)
            inside = self._inside(name)
            found = found or [f for f in self.findings if inside(f.anchor)]
        if found:
            return "\n".join(str(each) for one in found for each in (one, *one.others))
        if name not in self.modules and name not in self.nodes:
            like = difflib.get_close_matches(name, sorted({*self.modules, *self.nodes}))
            hint = f"; there are {', '.join(like)}" if like else ""
            raise UnknownNameError(f"the model has no module and no node named {name!r}{hint}")
        reason = next((self.unreached[each] for each in names if each in self.unreached), None)
        if name and reason is not None:
            return f"{name}: {reason}"
        around = [each for each in self.near_misses if name and inside(each)]
        if around:
            shown = f"{', '.join(around[:3])}{' and others' if len(around) > 3 else ''}"
            return f"{name}: no match includes anything of it; there might have been one at {shown}"
        kind = "module" if name in self.modules else "node"
        return f"{name}: no rule looks for a {kind} of this kind, and no match includes it"

    def names(self, name: str) -> list[str]:
        """A module's qualified names, the one given first, and calls; or a node's name alone."""
        known = self.modules.get(name, name)
        aliases = (k for k, first in self.modules.items() if first == known)
        return list(dict.fromkeys((name, known, *aliases, *self.calls.get(known, ()))))

    def _inside(self, name: str) -> Callable[[str], bool]:
        """Whether a name is that of something inside a container, whatever that is called."""
        below = {first for k, first in self.modules.items() if k.startswith(f"{name}.")}
        below.update(call for first in [*below] for call in self.calls.get(first, ()))
        return lambda each: each.startswith(f"{name}.") or self.modules.get(each, each) in below

    def check(self, expected: Mapping[str, int]) -> None:
        """Raise ExpectationError unless each rule or rule set applied as often as expected.

        >>> import fxrewrite as fxr
        >>> from torch import nn
        >>> fxr.plan(nn.Identity(), "conv_bn").check({"conv_bn": 0})
        """
        wrong = []
        for name, count in expected.items():
            rules = self.rule_sets.get(name, (name,))
            if not set(rules) <= self.counts.keys():
                known = ", ".join({**dict.fromkeys(self.rule_sets), **self.counts})
                raise ExpectationError(
                    f"expect: no rule or rule set {name!r} ran; there are {known}"
                )
            found = sum(self.counts[rule]["applied"] for rule in rules)
            if found != count:
                wrong.append(f"{name} should apply {count} times and applied {found} times")
        if wrong:
            raise ExpectationError("; ".join(wrong) + "\n" + str(self))

    def to_json(self) -> str:
        """The report as JSON; the same rewrite gives the same text."""
        data = {
            "version": 1,
            "rule_sets": {name: list(rules) for name, rules in self.rule_sets.items()},
            "counts": self.counts,
            "into": self.into,
            "stops": [each.to_dict() for each in self.stops],
            "assumptions": [each.to_dict() for each in self.assumptions],
            "parameter_names": {k: str(each) for k, each in self.parameter_names.items()},
            "unknown_shapes": self.unknown_shapes,
            "findings": [finding.to_dict() for finding in self.findings],
        }
        return json.dumps(data, indent=2)

    def __str__(self) -> str:
        """A table of counts, then each refusal and miss with its reason."""
        width = max([4, *map(len, self.counts)])
        lines = [f"{'rule':{width}}  applied  refused  missed"]
        for rule, each in self.counts.items():
            lines.append(
                f"{rule:{width}}  {each['applied']:7}  {each['refused']:7}  {each['missed']:6}"
            )
        if self.stops:
            stops = [(each.name or each.kind, each.summary) for each in self.stops]
            lines += _listing("not traced, so that the rules went into the module tree", stops)
        asked = [(a.name or a.kind, str(a)) for a in self.assumptions if not a.is_mode]
        if self.into == "graph":
            lines += _listing("taken for granted, which the graph checks", asked)
            if any(each.is_mode for each in self.assumptions):
                lines += ["", "its mode is taken for granted, which the graph checks"]
        else:
            lines += _listing("asked for, so that the rules went into the module tree", asked)
        lines += self._assured()
        if self.unknown_shapes is not None:
            lines += ["", f"the shapes of some values are not known: {self.unknown_shapes}"]
        noted = [f for f in self.applied if f.notes]
        lines += _listing("noted", [(f.anchor, "; ".join(f.notes)) for f in noted])
        lines += _listing("refused", [(f.anchor, f.reason) for f in self.refused])
        lines += _listing("missed", [(f.anchor, f.reason) for f in self.missed])
        return "\n".join(lines)

    def _assured(self) -> list[str]:
        """How many sites are sound only as far as the model's code does what was seen."""
        counts = Counter(finding.assurance for finding in self.applied)
        lines = []
        if guarded := counts["guarded"]:
            lines += ["", f"guarded: {guarded}, where the model raises GuardError if its code ever"]
            lines += ["calls their modules in another way than was seen"]
        if trusted := counts["trusted"]:
            lines += ["", f"trusted: {trusted}, where one run alone shows that it may be done"]
        return lines

    def _with(self, outcome: Outcome) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.outcome == outcome)


def _in_words(name: str, near_misses: Sequence[NearMiss]) -> str:
    """What rules say of a node, each reason once."""
    roles: dict[str, dict[str, None]] = {}
    for each in near_misses:
        roles.setdefault(str(each.miss), {})[each.role] = None
    lines = []
    for reason, found in ((reason, list(each)) for reason, each in roles.items()):
        several = f"{', '.join(found[:-1])} or {found[-1]}" if len(found) > 1 else found[0]
        lines.append(f"{name}: it could be {several}, but {reason}")
    return "\n".join(lines)


def _listing(title: str, rows: list[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    shown = rows[:_LINES_PER_OUTCOME]
    width = max(len(name) for name, _ in shown)
    lines = ["", f"{title}:", *(f"  {name:{width}}  {reason}" for name, reason in shown)]
    if len(rows) > len(shown):
        lines.append(f"  ... and {len(rows) - len(shown)} more, in `findings`")
    return lines
