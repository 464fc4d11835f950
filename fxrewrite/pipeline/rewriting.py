"""One rewrite from end to end: trace, lift, drive, lower, write out, report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..engine.report import Finding
from ..engine.target import Target
from ..errors import InputError
from ..explain.report import Report
from ..ir.graph_view import GraphView
from ..module_utils.running import run_original
from ..rules.registry import Rules, RuleSet, resolve
from ..rules.rule import Rule
from ..targets.evidence import Evidence
from ..targets.exported_program import ExportedProgramTarget
from ..targets.graph_module import graph_module
from ..targets.graph_target import GraphTarget
from ..targets.guarded_modules import guarded
from ..targets.module_copy import copied
from ..targets.module_tree import Budget, ModuleTreeTarget
from ..targets.value_paths import Calls
from ..tracing.assumptions import Assumption
from ..tracing.leaves import checked_leaves, is_compiled
from ..tracing.optional_arguments import attempt_as_graph
from ..tracing.parts import Parts
from ..tracing.stops import Stop
from ..tracing.tracer import attempt
from .applying import apply
from .layered import Layered
from .recording import SEVERAL, record_shapes_of_inputs, record_shapes_of_parts
from .rule_lists import apart, leaf_types, rules_of, wanted_types

Into = Literal["graph", "modules"]
Trust = Literal["run"]


def _resolved(rules: Rules) -> tuple[RuleSet, ...]:
    return tuple(apart(resolve(rules)))


@attrs.frozen
class Options:
    """By which rules to rewrite, into what, how to trace, and what to trust."""

    rules: tuple[RuleSet, ...] = attrs.field(converter=_resolved)
    into: Into | None = attrs.field(default=None, kw_only=True)
    tracer: fx.Tracer | type[fx.Tracer] | None = attrs.field(default=None, kw_only=True)
    leaf_modules: tuple[type[nn.Module] | str, ...] = attrs.field(
        default=(), kw_only=True, converter=checked_leaves
    )
    trust: Trust | None = attrs.field(default=None, kw_only=True)

    @into.validator
    def _check(self, _: Any, into: Any) -> None:
        if into not in (None, "graph", "modules"):
            raise ValueError(f"into is 'graph', 'modules' or None, not {into!r}")

    @trust.validator
    def _check_trust(self, _: Any, trust: Any) -> None:
        if trust not in (None, "run"):
            raise ValueError(f"trust is 'run' or None, not {trust!r}")


@attrs.frozen(eq=False)
class Rewritten:
    """What was made of a model, with the report, and what it takes to do it again.

    `applied` are the sites in the order in which they were rewritten, each with its rule.
    """

    model: Any
    example_inputs: Any
    options: Options
    made: Any
    report: Report
    applied: Sequence[tuple[Rule[Any], Finding]]

    def again(self, model: Any, example_inputs: Any, limit: int | None = None) -> Rewritten:
        """The same rules applied to this or another model, at so many sites at most."""
        return rewrite(model, example_inputs, self.options, limit)


def rewrite(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    options: Options,
    limit: int | None = None,
) -> Rewritten:
    """Rewrite a model as the options say, at so many sites at most.

    The order is: trace; lift, drive and lower, which is `apply`; write out; report.

    Raises:
        InputError: a run is to be trusted, and there are no inputs to run the model on.
    """
    if options.trust == "run" and example_inputs is None:
        raise InputError(
            "trust='run' trusts a run on example_inputs, and there are none; give them"
        )
    apart: set[int] = set()
    layered: list[Layered | None] = []  # made where it is first asked for
    while True:
        traced = (
            model
            if isinstance(model, ExportedProgram)
            else _trace(model, options, example_inputs, layered)
        )
        # Weights made under inference mode could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            if isinstance(traced, ExportedProgram):
                job = _for_program(traced, options)
            elif traced.into == "graph":
                job = _for_graph(traced, example_inputs)
            else:
                try:
                    job = _for_modules(traced, example_inputs, apart, options.trust, limit)
                except InputError:  # it may be the layers in it that can't be called so
                    if not traced.instead:
                        raise
                    layered = [None]
                    continue
            most = None if job.into == "modules" else limit
            done = apply(job.targets, options.rules, job.modules, job.stops, most, ran=job.ran)
            if not (found := job.conflicts()):
                made = job.write_out()
                break
        apart |= found
    report = done.report(model, made, job.into)
    report = attrs.evolve(report, assumptions=job.assumptions, unknown_shapes=job.unknown_shapes)
    sites = done.sites
    if job.into == "modules":  # where further calls of the same modules are no sites of their own
        first: dict[Any, tuple[Rule[Any], Finding]] = {}
        for site in sites:
            first.setdefault((site[0], site[1].steps), site)
        sites = tuple(first.values())
    return Rewritten(model, example_inputs, options, made, report, sites)


@attrs.frozen
class _Traced:
    """A model's parts as graphs, and where their rewrite goes.

    In its module tree, layers of torch may stand for modules that compute the same; `instead` has
    these by the identity of the layers.
    """

    model: nn.Module
    parts: Parts
    into: Into
    is_whole: bool
    is_certain: bool
    assumptions: tuple[Assumption, ...]
    instead: Mapping[int, nn.Module] = attrs.field(factory=dict)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All modules of the model, by each of their qualified names."""
        return dict(self.model.named_modules(remove_duplicate=False))

    def views(self, modules: dict[str, nn.Module]) -> list[GraphView]:
        """The graphs of all parts as the engine edits them."""
        return [
            GraphView(self.model, part.graph, part.constants, modules, part.name)
            for part in self.parts.parts
        ]


@attrs.frozen
class _Job:
    """Graphs to rewrite, each with its target, and how to make a result of them afterwards."""

    into: Into
    targets: Mapping[GraphView, Target]
    modules: Mapping[str, nn.Module]
    write_out: Callable[[], Any]
    stops: Sequence[Stop] = ()
    assumptions: tuple[Assumption, ...] = ()
    conflicts: Callable[[], set[int]] = set
    unknown_shapes: str | None = None
    ran: bool = False


def _trace(
    model: nn.Module, options: Options, example_inputs: Any, layered: list[Layered | None]
) -> _Traced:
    """Trace a model, and decide where its rewrite goes.

    A module tree is that of its `layered` copy, where that can be traced as well.

    Raises:
        TraceError: not all of it can be traced, and the result is to be a graph.
    """
    rules = rules_of(options.rules)
    leaves = (*leaf_types(rules), *options.leaf_modules)
    if options.into == "graph":
        whole = attempt_as_graph(model, leaves, options.tracer, example_inputs)
    else:
        whole = attempt(model, leaves, options.tracer)
    is_graph = whole.is_whole and not whole.decides
    into = options.into or ("graph" if is_graph else "modules")
    if into == "graph" or is_compiled(model):  # of which no part is to be had either
        whole.check(model)
    is_told = whole.is_whole and (into == "graph" or options.into is None)
    assumptions = whole.assumptions if is_told else ()
    if into == "modules":
        whole = whole.unchecked()
    wanted = wanted_types(rules)
    is_tree = into == "modules"
    # What a run on inputs will show need not be guessed.
    guesses = is_tree and example_inputs is None
    parts = Parts(model, whole, wanted, leaves, options.tracer, in_leaves=is_tree, guesses=guesses)
    is_certain = whole.is_whole and not whole.assumptions
    traced = _Traced(model, parts, into, whole.is_whole, is_certain, assumptions)
    if not is_tree:
        return traced
    if not layered:
        layered.append(Layered(model, rules))
    if layered[0] is not None and layered[0].instead:
        within = attrs.evolve(options, into="modules")
        other = _trace(layered[0].copy, within, example_inputs, [None])
        if len(other.parts.stops) <= len(parts.stops):
            return attrs.evolve(other, assumptions=assumptions, instead=layered[0].instead)
    return traced


def _for_program(program: ExportedProgram, options: Options) -> _Job:
    if options.into == "modules":
        raise ValueError("an exported program has no modules; it can't be rewritten into='modules'")
    target = ExportedProgramTarget(program)
    view = target.view()
    return _Job("graph", {view: target}, view.modules, lambda: target.finished(view))


def _for_graph(traced: _Traced, example_inputs: Any) -> _Job:
    modules = traced.modules
    (view,) = traced.views(modules)
    unknown = record_shapes_of_inputs([view], example_inputs)
    if unknown is not None:  # it may be the model itself that takes no such inputs
        run_original(traced.model, example_inputs)
    targets = {view: GraphTarget(view)}
    return _Job(
        "graph",
        targets,
        modules,
        lambda: graph_module(view),
        assumptions=traced.assumptions,
        unknown_shapes=unknown,
    )


def _for_modules(
    traced: _Traced,
    example_inputs: Any,
    apart: Collection[int],
    trust: Trust | None,
    limit: int | None,
) -> _Job:
    model, parts, modules = traced.model, traced.parts, traced.modules
    views = traced.views(modules)
    unknown = record_shapes_of_inputs(views, example_inputs)
    unknown = unknown if traced.is_whole else None
    evidence = None
    if example_inputs is not None:
        evidence = Evidence(model, example_inputs, parts.keeps_whole, parts.inner)
        record_shapes_of_parts(views, evidence)
    calls: dict[GraphView, Calls] = dict(zip(views, parts.parts, strict=True))
    unseen = parts.unseen()
    observed = evidence.graph(unseen) if unseen and evidence is not None else None
    if observed is not None:
        seen = GraphView(model, observed.graph, {}, modules)
        seen.remarks.update(observed.remarks)
        seen.unknown = SEVERAL
        calls[seen] = observed
    homes: dict[int, list[ModuleTreeTarget]] = {}
    budget = Budget(limit)
    targets = {
        view: ModuleTreeTarget(
            view,
            how,
            evidence,
            is_certain=traced.is_certain and not view.part and how is not observed,
            trusts_run=trust == "run",
            budget=budget,
            homes=homes,
            apart=apart,
        )
        for view, how in calls.items()
    }
    for view, target in targets.items():
        called = unseen if calls[view] is observed else target.called
        for module in dict.fromkeys(called):
            homes.setdefault(id(module), []).append(target)

    def write_out() -> nn.Module:
        replaced = dict(traced.instead)
        replaced |= {k: new for tree in targets.values() for k, new in tree.replaced().items()}
        made = copied(model, replaced)
        pairs = [pair for tree in targets.values() for pair in tree.pairs]
        expected = {k: kinds for tree in targets.values() for k, kinds in tree.expected.items()}
        guarded(made, pairs, expected)
        return made

    stops = tuple(parts.stops.values())
    return _Job(
        "modules",
        targets,
        modules,
        write_out,
        stops,
        traced.assumptions,
        lambda: {key for target in targets.values() for key in target.conflicts()},
        unknown,
        ran=evidence is not None,
    )
