"""The functions that apply rules to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import fx, nn

from .copying import copied
from .destination import IntoGraph, IntoModules
from .engine import Engine
from .reach import out_of_reach
from .registry import Rules, resolve
from .renaming import renamed
from .report import Report
from .result import graph_module
from .ruleset import apart
from .shapes import record_shapes
from .tracing import LeafModules, checked_leaves, trace
from .view import GraphView

Into = Literal["graph", "modules"]


def rewrite(
    model: nn.Module,
    rules: Rules,
    example_inputs: Any = None,
    *,
    into: Into | None = None,
    expect: Mapping[str, int] | None = None,
    tracer: fx.Tracer | type[fx.Tracer] | None = None,
    leaf_modules: LeafModules = (),
) -> tuple[Any, Report]:
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
        into: "graph" gives a GraphModule. "modules" gives a copy of the model, same class,
            attributes and forward code, in which new modules stand where old ones stood.
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
    if into not in (None, "graph", "modules"):
        raise ValueError(f"into is 'graph', 'modules' or None, not {into!r}")
    rule_sets = apart(resolve(rules))
    unique = list(dict.fromkeys(rule for rule_set in rule_sets for rule in rule_set.rules))
    named = [kind for rule in unique for kind in rule.pattern.module_types]
    graph, constants = trace(model, (*named, *checked_leaves(leaf_modules)), tracer)
    # Weights made under inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        view = GraphView(model, graph, constants)
        if example_inputs is not None:
            record_shapes(graph_module(view), _as_tuple(example_inputs))
        nodes = frozenset(node.name for node in graph.nodes)
        not_called = out_of_reach(view, unique)
        tree = IntoModules(view) if into == "modules" else None
        engine = Engine(view, unique, tree or IntoGraph())
        findings = (*engine.run(), *not_called)
        bystanders = engine.bystanders()
        made = copied(model, tree.replaced()) if tree else graph_module(view)
    names: dict[str, dict[str, None]] = {}
    for each in rule_sets:
        names.setdefault(each.name, {}).update(dict.fromkeys(rule.name for rule in each.rules))
    of_sets = {name: tuple(rules) for name, rules in names.items()}
    became = {name: found.became for found in findings if found.became for _, name in found.steps}
    report = Report(
        findings,
        of_sets,
        view.aliases,
        nodes,
        bystanders,
        into or "graph",
        renamed(model, made, became),
    )
    report.check(expect or {})
    return made, report


def plan(
    model: nn.Module,
    rules: Rules,
    example_inputs: Any = None,
    *,
    into: Into | None = None,
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
    return rewrite(
        model, rules, example_inputs, into=into, tracer=tracer, leaf_modules=leaf_modules
    )[1]


def fuse(model: nn.Module, into: Into | None = None) -> Any:
    """Fold each batch norm into the convolution before it: `rewrite` with the set `conv_bn`.

    >>> import fxrewrite as fxr
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    >>> fxr.fuse(model)
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
    )
    """
    return rewrite(model, "conv_bn", into=into)[0]


def _as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    is_many = isinstance(example_inputs, tuple | list)
    return tuple(example_inputs) if is_many else (example_inputs,)
