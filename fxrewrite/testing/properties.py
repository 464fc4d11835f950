"""What must hold of any rewrite of any model, whatever the rules; one function asks for all."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from fxrewrite.api import plan, rewrite
from fxrewrite.dialects.lifting import any_is
from fxrewrite.dialects.op_table import spelling_of
from fxrewrite.engine.matcher import accepts
from fxrewrite.engine.report import Finding
from fxrewrite.errors import FxRewriteError, NotCopiedError, TraceError
from fxrewrite.explain.report import Report
from fxrewrite.ir.describe import name_of
from fxrewrite.ir.graph_view import GraphView
from fxrewrite.module_utils.state import bits
from fxrewrite.module_utils.torch_private import pytree
from fxrewrite.pipeline.layered import Layered
from fxrewrite.pipeline.rule_lists import leaf_types, rules_of, wanted_types
from fxrewrite.rules.registry import Rules, resolve
from fxrewrite.rules.rule import Rule
from fxrewrite.rules.spec import Pattern
from fxrewrite.tracing.parts import Parts
from fxrewrite.tracing.tracer import attempt
from fxrewrite.verification.compare import is_inexact, relative_error

from .observing import Record, Run, difference, run
from .written import Case, code_of


class UnsoundError(AssertionError):
    """A rule broke a property that every rule must have.

    `broken` is the property in a few words, `case` the model and arguments that show it.
    """

    def __init__(self, broken: str, found: str, rules: Rules, case: Case, report: Any = None):
        names = ", ".join(_named(rule) for rule in rules_of(resolve(rules)))
        lines = [f"{broken}: {found}", f"rules: {names}"]
        if report is not None:
            lines += ["sites:", *(f"  {each}" for each in report.findings)]
        lines += ["model:", *(f"  {line}" for line in repr(case).splitlines())]
        super().__init__("\n".join(lines))
        self.broken, self.found, self.case = broken, found, case


def check_model(
    rules: Rules,
    model: nn.Module,
    args: tuple[Any, ...],
    *,
    shapes: bool = False,
    into: Literal["graph", "modules"] | None = None,
    tolerance: float = 1e-9,
) -> Report:
    """Rewrite one model and hold the result to all properties; gives the report.

    Args:
        rules: what `rewrite` takes.
        model: the model, in any dtype.
        args: what to call it with.
        shapes: whether the rules are given the arguments as example inputs.
        into: where the rewrite goes, as in `rewrite`.
        tolerance: the largest error of an element, relative to the largest of its tensor; more is
            allowed where the model itself is as far from what it gives in another precision.

    Raises:
        UnsoundError: a property does not hold.
        TraceError: the model can't be traced.
        NotCopiedError: it can't be copied, which `into="modules"` does.
    """
    case, expected, before = Case(model, args), run(model, args), Record(model)
    options: dict[str, Any] = {"example_inputs": args if shapes else None, "into": into}
    try:
        made, report = rewrite(model, rules, **options)
    except FxRewriteError as error:
        if (change := before.change(versions=False)) is not None:
            broken = "a rewrite that fails leaves the model as it was"
            raise UnsoundError(broken, f"{change} is not", rules, case) from error
        if isinstance(error, TraceError | NotCopiedError):
            raise
        raise UnsoundError("a rule does what rules may do", str(error), rules, case) from error

    def must(broken: str, found: str | None) -> None:
        if found is not None:
            raise UnsoundError(broken, found, rules, case, report)

    # What the forward writes while it is traced is put back, which is one more write.
    versions = not shapes and not report.stops
    must("the model that is rewritten stays as it was", before.change(versions=versions))
    found, own = run(made, args), _state(model)
    shared = [name for name, tensor in _state(made).items() if own.get(name) is tensor]
    apart = difference(expected, found, tolerance, shared)
    if apart is not None:
        apart = difference(expected, found, max(tolerance, _rounding(case, expected)), shared)
    must("the outputs stay the same", apart and f"{apart}\nrewritten:\n{_indented(made)}")
    again, second = rewrite(model, rules, **options)
    must("the same rewrite gives the same result", _unlike(made, again, report, second))
    left = plan(made, rules, **options).applied
    must("a second rewrite finds nothing left to do", f"it applied {left[0]}" if left else None)
    must(
        "each anchor is accounted for",
        _unaccounted(rules_of(resolve(rules)), model, report, not shapes),
    )
    silent = [each for each in (*report.refused, *report.missed) if not each.reason]
    must("each refusal and miss has a reason", f"{silent[0].anchor} has none" if silent else None)
    return report


def _unlike(made: Any, again: Any, report: Report, second: Report) -> str | None:
    """How two results of the same rewrite differ."""
    if report.to_json() != second.to_json():
        return f"the report differs: {_first_apart(report.to_json(), second.to_json())}"
    if code_of(made) != code_of(again):
        return f"the code differs: {_first_apart(code_of(made), code_of(again))}"
    one, two = _state(made), _state(again)
    if list(one) != list(two):
        return "the state dict has other keys"
    apart = (name for name, t in one.items() if not torch.equal(bits(t), bits(two[name])))
    name = next(apart, None)
    return name and f"{name} holds other numbers, so the rule depends on more than its match"


def _unaccounted(
    rules: Sequence[Rule[Any]], model: nn.Module, report: Report, guesses: bool
) -> str | None:
    """An anchor of the model that the report says nothing of, or more than one thing."""
    if report.into == "modules":
        model = Layered(model, rules).copy
    # A quiet rule tells of those anchors only of which it has something to tell.
    loud = [rule for rule in rules if not rule.quiet]
    anchors = [rule.pattern.anchor_step for rule in loud]
    kinds = tuple(kind for step in anchors for kind in step.modules)
    spelt = tuple(kind for step in anchors if not step.captures_call for kind in step.modules)
    calls: Counter[str] = Counter()
    called: set[int] = set()
    functions = {each for rule in rules for each in _functions(rule.pattern)}
    for view in _views(rules, model, report.into, guesses):
        for node in view.graph.nodes:
            called.add(id(view.module(node)))
            name, own = view.shown(name_of(node)), view.shown(node.name)
            # Of calls in parts, and on guessed ways, one tells for all of which the same is said.
            shared = report.modules.get(name, name) if guesses or report.stops else None
            told = [e for e in report.findings if own in e.nodes or e.anchor == shared]
            looking = [rule for rule in loud if accepts(rule.pattern.anchor_step, node, view)]
            for rule in looking:
                if not _is_told_by(rule, told):
                    return f"nothing is said of {name} by {rule.name}"
            spelling = None if node.target in functions else spelling_of(node)
            means = spelling is not None and any_is(spelling.meaning.kinds, spelt)
            if means and not told:
                return f"nothing is said of {own}"
            calls[name] += bool(looking) or means
    for name, module in model.named_modules():
        if isinstance(module, kinds) and id(module) not in called:
            calls[name or type(module).__name__] += 1
            if not _is_told(report, name or type(module).__name__):
                return f"nothing is said of {name}, which is never called"
    names_of_loud = {rule.name for rule in loud}
    findings = [e for e in (*report.refused, *report.missed) if e.rule in names_of_loud]
    declined = Counter(each.anchor for each in findings)
    twice = [name for name in calls if declined[name] > calls[name]]
    if report.stops:  # of code that was not traced, a run shows further calls of modules
        same = Counter((each.anchor, each.nodes) for each in findings)
        again = {name for (name, _), count in same.items() if count > 1}
        twice = [name for name in twice if name in again or name not in report.modules]
    return f"{twice[0]} is declined {declined[twice[0]]} times" if twice else None


def _views(
    rules: Sequence[Rule[Any]], model: nn.Module, into: str, guesses: bool
) -> list[GraphView]:
    """The graphs that the rules were asked about: of the model, or of its parts."""
    leaves = leaf_types(rules)
    whole = attempt(model, leaves)
    wanted, is_tree = wanted_types(rules), into == "modules"
    found = Parts(
        model, whole, wanted, leaves, in_leaves=is_tree, guesses=is_tree and guesses
    ).parts
    return [GraphView(model, each.graph, each.constants, part=each.name) for each in found]


def _functions(pattern: Pattern) -> Iterator[Any]:
    """The functions that a rule is about as they are, whatever module their call stands for."""
    for step in pattern.steps:
        yield from () if step.modules else (*step.functions, *step.methods)
    for branch in pattern.branches:
        yield from _functions(branch.pattern)


def _is_told_by(rule: Rule[Any], told: Sequence[Finding]) -> bool:
    """Whether a rule's answer is among what is told of an anchor, or else that another applied."""
    said = (one.rule for each in told for one in (each, *each.others))
    return rule.name in said or any(each.outcome == "applied" for each in told)


def _is_told(report: Report, name: str) -> bool:
    """Whether a finding is about a module, or about one around it that was rewritten."""
    names = report.names(name)
    changed = [step for each in report.applied for _, step in each.steps]
    is_inside = any(each.startswith(f"{step}.") for each in names for step in changed)
    return is_inside or any(any(map(each.is_about, names)) for each in report.findings)


def _rounding(case: Case, expected: Run) -> float:
    """How large a relative error rounding may make, by the model's own in another precision.

    A badly conditioned model in float64 is off in float32 by 2**29 times what it is in float64. In
    a narrower type the model's own error is that against a run in float64.
    """
    leaves = pytree.tree_leaves((case.args, _state(case.model)))
    wide = any(t.dtype is torch.float64 for t in leaves if isinstance(t, torch.Tensor))
    other = torch.float32 if wide else torch.float64

    def cast(value: Any) -> Any:
        is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(other) if is_real else value

    try:
        found = run(copy.deepcopy(case.model).to(other), pytree.tree_map(cast, case.args))
    except Exception:  # not every model runs in another precision, and then nothing more is allowed
        return 0.0
    outputs = zip(*map(pytree.tree_leaves, (expected.output, found.output)), strict=True)
    errors = [
        relative_error(a, b)
        for a, b in outputs
        if is_inexact(a) and is_inexact(b) and a.shape == b.shape
    ]
    largest = max(filter(math.isfinite, errors), default=0.0)
    if not wide:
        return 8 * largest
    return 1e-6 * largest if largest < 1 else 0.0


def _state(model: nn.Module) -> dict[str, Any]:
    return dict(model.state_dict(keep_vars=True))


def _named(rule: Rule[Any]) -> str:
    return f"{rule.name} ({rule.source})" if rule.source else rule.name


def _indented(model: nn.Module) -> str:
    return "\n".join(f"  {line}" for line in code_of(model).splitlines())


def _first_apart(one: str, two: str) -> str:
    pairs = zip(one.splitlines(), two.splitlines(), strict=False)
    return next((f"{a.strip()!r}, then {b.strip()!r}" for a, b in pairs if a != b), "its length")
