"""The functions that apply rules to a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import fx, nn

from .engine import Engine
from .errors import PatternError
from .matching import describe
from .registry import Rules, resolve
from .report import Finding, Report
from .result import graph_module
from .ruleset import Rule, RuleSet
from .shapes import record_shapes
from .soundness import has_hooks
from .tracing import LeafModules, checked_leaves, trace
from .view import GraphView


def rewrite(
    model: nn.Module,
    rules: Rules,
    example_inputs: Any = None,
    *,
    expect: Mapping[str, int] | None = None,
    tracer: fx.Tracer | type[fx.Tracer] | None = None,
    leaf_modules: LeafModules = (),
) -> tuple[fx.GraphModule, Report]:
    """Apply rules to a model wherever they are sound; gives a new model and a report.

    >>> import fxrewrite as fxr
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> fused, report = fxr.rewrite(model, "conv_bn", expect={"conv_bn": 1})
    >>> [type(module).__name__ for module in fused.children()]
    ['Conv2d', 'ReLU']

    Args:
        model: the model, which is never changed; tensors that are not rewritten are shared with
            the result. A GraphModule's graph is taken as it is, anything else is traced.
        rules: a rule set or its name, a rule, or a list of those; earlier ones are tried first.
        example_inputs: what the model is called with, a tensor or a tuple of arguments. Rules that
            need shapes or dtypes learn them from it; nothing is computed.
        expect: how often rules or rule sets, by name, must apply.
        tracer: a tracer, or its class, to use instead of `torch.fx.Tracer`.
        leaf_modules: modules that tracing must keep whole, by type or qualified name. The types
            that the rules name are kept whole anyway.

    Raises:
        TraceError: the model can't be traced.
        RuleError: a rule raised, changed what it was given, returned the wrong thing, or rules
            feed each other forever. The model is as it was.
        UnknownRuleSetError: no rule set has the given name.
        ExpectationError: `expect` does not hold.
    """
    rule_sets = _apart(resolve(rules))
    unique = list(dict.fromkeys(rule for rule_set in rule_sets for rule in rule_set.rules))
    named = [kind for rule in unique for step in rule.pattern.steps for kind in step.modules]
    graph, constants = trace(model, (*named, *checked_leaves(leaf_modules)), tracer)
    # Weights made under inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        view = GraphView(model, graph, constants)
        if example_inputs is not None:
            record_shapes(graph_module(view), _as_tuple(example_inputs))
        nodes = frozenset(node.name for node in graph.nodes)
        out_of_reach = _out_of_reach(view, unique)
        engine = Engine(view, unique)
        findings = (*engine.run(), *out_of_reach)
        bystanders = engine.bystanders()
        made = graph_module(view)
    names: dict[str, dict[str, None]] = {}
    for each in rule_sets:
        names.setdefault(each.name, {}).update(dict.fromkeys(rule.name for rule in each.rules))
    of_sets = {name: tuple(rules) for name, rules in names.items()}
    report = Report(findings, of_sets, view.aliases, nodes, bystanders)
    report.check(expect or {})
    return made, report


def plan(
    model: nn.Module,
    rules: Rules,
    example_inputs: Any = None,
    *,
    tracer: fx.Tracer | type[fx.Tracer] | None = None,
    leaf_modules: LeafModules = (),
) -> Report:
    """What `rewrite` would do, and why; changes nothing. The arguments are those of `rewrite`.

    >>> import fxrewrite as fxr
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    >>> print(fxr.plan(model, "conv_bn"))
    rule          applied  refused  missed
    fold_conv_bn        1        0       0
    """
    return rewrite(model, rules, example_inputs, tracer=tracer, leaf_modules=leaf_modules)[1]


def fuse(model: nn.Module) -> fx.GraphModule:
    """Fold each batch norm into the convolution before it: `rewrite` with the set `conv_bn`.

    >>> import fxrewrite as fxr
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    >>> fxr.fuse(model)
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
    )
    """
    return rewrite(model, "conv_bn")[0]


def _apart(rule_sets: Sequence[RuleSet]) -> list[RuleSet]:
    """The rule sets with rules of one name told apart by the names of their sets."""
    rules = dict.fromkeys(rule for rule_set in rule_sets for rule in rule_set.rules)
    uses = Counter(rule.name for rule in rules)
    renamed = {
        rule: attrs.evolve(rule, name=f"{rule_set.name}.{rule.name}")
        for rule_set in rule_sets
        for rule in rule_set.rules
        if uses[rule.name] > 1
    }
    names = Counter(rule.name for rule in renamed.values())
    for name, count in names.items():
        if count > 1:
            raise PatternError(f"{count} different rules are called {name}; give each its own name")
    return [
        attrs.evolve(rule_set, rules=[renamed.get(rule, rule) for rule in rule_set.rules])
        if any(rule in renamed for rule in rule_set.rules)
        else rule_set
        for rule_set in rule_sets
    ]


def _as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    is_many = isinstance(example_inputs, tuple | list)
    return tuple(example_inputs) if is_many else (example_inputs,)


def _out_of_reach(view: GraphView, rules: Sequence[Rule[Any]]) -> list[Finding]:
    """A finding for each module of an anchor's type that no node of the graph calls."""
    called: set[int] = set()
    inside: dict[int, str] = {}
    for node in view.graph.nodes:
        module = view.module(node)
        if module is not None:
            called.add(id(module))
            if module._modules:
                hook = has_hooks(module)
                because = f", since it carries {hook}" if hook else ""
                whole = f"{describe(node, view)}, which is kept whole{because}"
                inside.update((id(each), whole) for each in module.modules())
    findings = []
    for name, module in view.modules.items():
        if id(module) not in called:
            called.add(id(module))
            for rule in rules:
                if isinstance(module, rule.pattern.steps[rule.pattern.anchor].modules):
                    reason = "no call of it is in the traced graph"
                    if id(module) in inside:
                        reason = f"it is inside {inside[id(module)]}"
                    if not name:
                        reason = "it is the model itself, which is traced through; wrap it"
                    anchor = name or type(module).__name__
                    findings.append(Finding(anchor, "missed", rule.name, cause=reason))
                    break
    return findings
