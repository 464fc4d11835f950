"""What must hold of any rewrite of any model, whatever the rules; one function asks for all."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fxrewrite.api import plan, rewrite
from fxrewrite.errors import RuleError, TraceError
from fxrewrite.matching import accepts
from fxrewrite.registry import Rules, resolve
from fxrewrite.report import Report
from fxrewrite.ruleset import Rule
from fxrewrite.sites import name_of
from fxrewrite.tracing import trace
from fxrewrite.view import GraphView

from .observing import Record, bits, difference, relative_error, run
from .written import Case, code_of


class UnsoundError(AssertionError):
    """A rule broke a property that every rule must have.

    `broken` is the property in a few words, `case` the model and arguments that show it.
    """

    def __init__(self, broken: str, found: str, rules: Rules, case: Case, report: Any = None):
        names = ", ".join(_named(rule) for rule in rules_of(rules))
        lines = [f"{broken}: {found}", f"rules: {names}"]
        if report is not None:
            lines += ["sites:", *(f"  {each}" for each in report.findings)]
        lines += ["model:", *(f"  {line}" for line in repr(case).splitlines())]
        super().__init__("\n".join(lines))
        self.broken, self.found, self.case = broken, found, case


def check_rewrite(
    rules: Rules, model: nn.Module, args: tuple[Any, ...], *, shapes: bool, tolerance: float
) -> Report:
    """Rewrite one model and hold the result to all properties; gives the report.

    Args:
        rules: what `rewrite` takes.
        model: the model, in float64 or complex128 where `tolerance` is to mean something.
        args: what to call it with.
        shapes: whether the rules are given the arguments as example inputs.
        tolerance: the largest error of an element, relative to the largest of its tensor; more is
            allowed where the model itself is badly conditioned.

    Raises:
        UnsoundError: a property does not hold.
        TraceError: the model can't be traced.
    """
    case = Case(model, args)
    expected = run(model, args)
    before = Record(model)
    examples = args if shapes else None
    try:
        made, report = rewrite(model, rules, examples)
    except (RuleError, TraceError) as error:
        if (change := before.change(versions=False)) is not None:
            raise UnsoundError(
                "a rewrite that fails leaves the model as it was",
                f"{change} is not, after {error}",
                rules,
                case,
            ) from error
        if isinstance(error, TraceError):
            raise
        raise UnsoundError("a rule does what rules may do", str(error), rules, case) from error

    def must(broken: str, found: str | None) -> None:
        if found is not None:
            raise UnsoundError(broken, found, rules, case, report)

    must("the model that is rewritten stays as it was", before.change(versions=not shapes))
    own = _state(model)
    shared = [name for name, tensor in _state(made).items() if own.get(name) is tensor]
    found = run(made, args)
    apart = difference(expected, found, tolerance, shared)
    if apart is not None:
        allowed = max(tolerance, 1e-6 * _noise(model, args, expected))
        apart = difference(expected, found, allowed, shared)
    must("the outputs stay the same", apart and f"{apart}\nrewritten:\n{_indented(made)}")
    must(
        "the same rewrite gives the same result",
        _rewritten_again(rules, model, examples, made, report),
    )
    must("a second rewrite finds nothing left to do", _left(rules, made, examples))
    must("each anchor is accounted for", _unaccounted(rules_of(rules), model, report))
    must("each refusal and miss has a reason", _without_reason(report))
    return report


def rules_of(rules: Rules) -> list[Rule[Any]]:
    """The rules in what a caller may give as rules, each once."""
    return list(dict.fromkeys(rule for each in resolve(rules) for rule in each.rules))


def _rewritten_again(
    rules: Rules, model: nn.Module, examples: Any, made: fx.GraphModule, report: Report
) -> str | None:
    again, second = rewrite(model, rules, examples)
    if report.to_json() != second.to_json():
        return f"the report differs: {_first_apart(report.to_json(), second.to_json())}"
    if made.code != again.code:
        return f"the code differs: {_first_apart(made.code, again.code)}"
    one, two = _state(made), _state(again)
    if list(one) != list(two):
        return "the state dict has other keys"
    apart = (name for name, t in one.items() if not torch.equal(bits(t), bits(two[name])))
    name = next(apart, None)
    return name and f"{name} holds other numbers, so the rule depends on more than its match"


def _left(rules: Rules, made: fx.GraphModule, examples: Any) -> str | None:
    applied = plan(made, rules, examples).applied
    return f"it applied {applied[0]}" if applied else None


def _unaccounted(rules: Sequence[Rule[Any]], model: nn.Module, report: Report) -> str | None:
    """An anchor of the model that the report says nothing of, or more than one thing."""
    anchors = [rule.pattern.steps[rule.pattern.anchor] for rule in rules]
    kinds = tuple(kind for step in anchors for kind in step.modules)
    leaves = [kind for rule in rules for step in rule.pattern.steps for kind in step.modules]
    graph, constants = trace(model, leaves)
    view = GraphView(model, graph, constants)
    within = {node for each in report.applied for node in each.nodes}
    nodes = [n for n in graph.nodes if any(accepts(step, n, view) for step in anchors)]
    calls = Counter(name_of(node) for node in nodes)
    found = Counter(finding.anchor for finding in report.findings)
    for node in nodes:
        if not found[name_of(node)] and node.name not in within:
            return f"nothing is said of {name_of(node)}"
    declined = Counter(each.anchor for each in (*report.refused, *report.missed))
    called = {id(view.module(node)) for node in graph.nodes}
    for name, module in model.named_modules():
        if isinstance(module, kinds) and id(module) not in called:
            calls[name or type(module).__name__] += 1
            if not declined[name or type(module).__name__]:
                return f"nothing is said of {name}, which is never called"
    twice = [name for name, count in declined.items() if count > calls[name]]
    return f"{twice[0]} is declined {declined[twice[0]]} times" if twice else None


def _without_reason(report: Report) -> str | None:
    silent = [each for each in (*report.refused, *report.missed) if not each.reason]
    return f"{silent[0].anchor} has none" if silent else None


def _noise(model: nn.Module, args: tuple[Any, ...], expected: Any) -> float:
    """The largest relative error of the model itself in float32: how badly conditioned it is."""

    def narrow(tensor: Any) -> Any:
        is_wide = isinstance(tensor, torch.Tensor) and tensor.dtype is torch.float64
        return tensor.float() if is_wide else tensor

    try:
        found = run(copy.deepcopy(model).float(), tuple(map(narrow, args)))
    except Exception:  # not every model runs in float32, and then nothing more is allowed
        return 0.0
    pairs = zip(
        torch.utils._pytree.tree_leaves(expected.output),
        torch.utils._pytree.tree_leaves(found.output),
        strict=True,
    )
    errors = [
        relative_error(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and a.shape == b.shape
    ]
    return max((error for error in errors if error < 1.0), default=0.0)


def _state(model: nn.Module) -> dict[str, Any]:
    return dict(model.state_dict(keep_vars=True))


def _named(rule: Rule[Any]) -> str:
    return f"{rule.name} ({rule.source})" if rule.source else rule.name


def _indented(model: nn.Module) -> str:
    return "\n".join(f"  {line}" for line in code_of(model).splitlines())


def _first_apart(one: str, two: str) -> str:
    pairs = zip(one.splitlines(), two.splitlines(), strict=False)
    return next((f"{a.strip()!r}, then {b.strip()!r}" for a, b in pairs if a != b), "its length")
