"""From a model to its rewritten form: trace, apply rules, make what was asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import attrs
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..engine.target import Target
from ..errors import FxRewriteError
from ..explain.report import Report
from ..ir.graph_view import GraphView
from ..rules.rule import RuleSet
from ..targets.evidence import Witness
from ..targets.exported_program import Program
from ..targets.graph_module import graph_module
from ..targets.module_copy import copied
from ..targets.module_tree import IntoModules
from ..targets.reading.flows import Flows
from ..tracing.optional_arguments import attempt_as_graph
from ..tracing.parts import Parts
from ..tracing.tracer import LeafModules, attempt, checked_leaves, is_compiled
from .applying import Applied, apply, apply_to_parts
from .rule_lists import leaf_types, wanted_types

Into = Literal["graph", "modules"]


@attrs.frozen
class Rewriter:
    """By which rules to rewrite, into what, and how to trace."""

    rule_sets: Sequence[RuleSet]
    into: Into | None
    tracer: fx.Tracer | type[fx.Tracer] | None
    leaf_modules: LeafModules

    def __call__(
        self, model: Any, example_inputs: Any, limit: int | None = None
    ) -> tuple[Any, Report, Applied]:
        """The rewritten model, the report, and what was done, at so many sites at most."""
        rules = list(dict.fromkeys(rule for rule_set in self.rule_sets for rule in rule_set.rules))
        leaves = (*leaf_types(rules), *checked_leaves(self.leaf_modules))
        if isinstance(model, ExportedProgram):
            return self._program(model, limit)
        start = attempt_as_graph if self.into == "graph" else attempt
        whole = start(model, leaves, self.tracer)
        is_graph = whole.is_whole and not whole.decides
        into = self.into or ("graph" if is_graph else "modules")
        if into == "graph" or is_compiled(model):  # of which no part is to be had either
            whole.check(model)
        if into == "modules":
            whole = whole.unchecked()
        wanted = wanted_types(rules)
        parts = Parts(model, whole, wanted, leaves, self.tracer, in_leaves=into == "modules")
        # Weights made under inference mode could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            modules = dict(model.named_modules(remove_duplicate=False))
            views = [
                GraphView(model, part.graph, part.constants, modules, part.name)
                for part in parts.parts
            ]
            if example_inputs is not None and whole.is_whole:
                from ..ir.shape_inference import (
                    record_shapes,  # with sympy, which takes long to import
                )

                record_shapes(graph_module(views[0]), _as_tuple(example_inputs))
            if into == "graph":
                applied = apply(views[0], self.rule_sets, Target(), limit)
                made: nn.Module = graph_module(views[0])
            else:
                is_run, witness = example_inputs is not None, None
                flows = Flows(model, parts.keeps_whole, is_run=is_run)
                if example_inputs is not None:
                    witness = Witness(model, example_inputs, parts.keeps_whole, parts.inner)
                    _record_shapes_of_parts(parts, views, witness)
                if unseen := parts.unseen():
                    graph, remarks = flows.outline(unseen)
                    views.append(GraphView(model, graph, {}, modules))
                    views[-1].remarks.update(remarks)
                trees = {view: IntoModules(view, flows, witness) for view in views}
                stops = tuple(parts.stops.values())
                applied = apply_to_parts(modules, trees, self.rule_sets, stops, limit)
                replaced = {k: new for tree in trees.values() for k, new in tree.replaced().items()}
                made = copied(model, replaced)
        report = applied.report(model, made, into)
        if whole.is_whole and (into == "graph" or self.into is None):
            report = attrs.evolve(report, assumptions=whole.assumptions)
        return made, report, applied

    def _program(self, model: ExportedProgram, limit: int | None) -> tuple[Any, Report, Applied]:
        with torch.inference_mode(False), torch.no_grad():
            program = Program(model)
            view = program.view()
            applied = apply(view, self.rule_sets, program, limit)
            made = program.finished(view)
        return made, applied.report(model, made, "graph"), applied


def _record_shapes_of_parts(parts: Parts, views: Sequence[GraphView], witness: Witness) -> None:
    """Record the shapes of values in parts, as far as a run showed what the parts are given."""
    from ..ir.shape_inference import record_shapes

    for part, view in zip(parts.parts, views, strict=True):
        names = [str(node.target) for node in part.graph.find_nodes(op="placeholder")]
        given = witness.inputs(part.name, names) if part.name else None
        if given is not None:
            with contextlib.suppress(FxRewriteError):  # what a fake tensor can't do, a part may
                record_shapes(graph_module(view), given)


def _as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    """The positional arguments that example inputs stand for."""
    is_many = isinstance(example_inputs, tuple | list)
    return tuple(example_inputs) if is_many else (example_inputs,)
