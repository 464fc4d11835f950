"""The functions that apply rules to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import attrs
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from .copying import copied
from .destination import IntoGraph, IntoModules
from .engine import Engine
from .errors import InputError
from .exported import Program
from .lifting import Lifting
from .localising import Localisation, Rewrite, check_rewrite, localised
from .lowering import lower
from .reach import not_lifted, out_of_reach
from .registry import Rules, resolve
from .renaming import renamed
from .replaying import Script
from .report import Report
from .result import graph_module
from .ruleset import RuleSet, apart
from .shapes import record_shapes
from .tracing import LeafModules, checked_leaves, trace
from .verifying import Progress
from .view import GraphView

Into = Literal["graph", "modules"]


def rewrite(
    model: nn.Module | ExportedProgram,
    rules: Rules,
    example_inputs: Any = None,
    *,
    into: Into | None = None,
    expect: Mapping[str, int] | None = None,
    verify: Any = None,
    progress: Progress | None = None,
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
            the result. A GraphModule's graph is taken as it is, and so is that of a program of
            `torch.export`, which gives a program again; anything else is traced.
        rules: a rule set or its name, a rule, or a list of those; earlier ones are tried first.
        example_inputs: what the model is called with, a tensor or a tuple of arguments. Rules that
            need shapes or dtypes learn them from it; nothing is computed.
        into: "graph" gives a GraphModule. "modules" gives a copy of the model, same class,
            attributes and forward code, in which new modules stand where old ones stood.
        expect: how often rules or rule sets, by name, must apply.
        verify: inputs, in one of the forms that `verify` takes, or True for the example inputs. The
            result is verified against the model, and where they differ, the sites that are to
            blame are searched for.
        progress: told how far verifying is, as in `verify`.
        tracer: a tracer, or its class, to use instead of `torch.fx.Tracer`.
        leaf_modules: modules that tracing must keep whole, by type or qualified name. The types
            that the rules name are kept whole anyway.

    Raises:
        TraceError: the model can't be traced.
        RuleError: a rule raised, changed what it was given, returned the wrong thing, or rules
            feed each other forever. The model is as it was.
        UnknownRuleSetError: no rule set has the given name.
        ExpectationError: `expect` does not hold.
        InputError: the model does not take the inputs that it should be verified on.
        VerificationError: the result differs from the model; the error names rules and sites.
    """
    if into not in (None, "graph", "modules"):
        raise ValueError(f"into is 'graph', 'modules' or None, not {into!r}")
    if into == "modules" and isinstance(model, ExportedProgram):
        raise ValueError("an exported program has no modules; it can't be rewritten into='modules'")
    if verify is True and example_inputs is None:
        raise InputError("verify=True takes the example inputs, and there are none; give them")
    rewriter = _Rewriter(apart(resolve(rules)), into, tracer, leaf_modules)
    script = Script()
    made, report = rewriter(model, example_inputs, script)
    report.check(expect or {})
    if verify is not None and verify is not False:
        inputs = example_inputs if verify is True else verify
        one, other = model, made
        if isinstance(model, ExportedProgram):
            one, other = model.module(), made.module()
        pair = Rewrite(cast(nn.Module, one), other, script, example_inputs, rewriter)
        check_rewrite(pair, inputs, progress)
    return made, report


def plan(
    model: nn.Module | ExportedProgram,
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


def localise(
    model: nn.Module,
    rules: Rules,
    inputs: Any,
    example_inputs: Any = None,
    *,
    most: int = 3,
    progress: Progress | None = None,
    into: Into | None = None,
    tracer: fx.Tracer | type[fx.Tracer] | None = None,
    leaf_modules: LeafModules = (),
) -> Localisation:
    """Rewrite a model, verify the result, and name the rules and sites that make a difference.

    >>> import fxrewrite as fxr
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    >>> fxr.localise(model, "conv_bn", torch.ones(1, 3, 4, 4)).guilty
    ()

    Args:
        model: the model, which is never changed.
        rules: as in `rewrite`.
        inputs: what to compare on, in one of the forms that `verify` takes.
        example_inputs: as in `rewrite`.
        most: how many guilty sites to name at most.
        progress: told how far the search is, as in `verify`.
        into: as in `rewrite`.
        tracer: as in `rewrite`.
        leaf_modules: as in `rewrite`.

    Raises:
        InputError: the model raises on these inputs.
        FxRewriteError: what `rewrite` raises.
    """
    rewriter = _Rewriter(apart(resolve(rules)), into, tracer, leaf_modules)
    script = Script()
    made, _ = rewriter(model, example_inputs, script)
    rewrite = Rewrite(model, made, script, example_inputs, rewriter)
    return localised(rewrite, inputs, most=most, progress=progress)


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


@attrs.frozen
class _Rewriter:
    """By which rules to rewrite, into what, and how to trace."""

    rule_sets: Sequence[RuleSet]
    into: Into | None
    tracer: fx.Tracer | type[fx.Tracer] | None
    leaf_modules: LeafModules

    def __call__(self, model: Any, example_inputs: Any, script: Script) -> tuple[Any, Report]:
        """The rewritten model and the report; what is asked and done is in the script."""
        unique = list(dict.fromkeys(rule for rule_set in self.rule_sets for rule in rule_set.rules))
        named = [kind for rule in unique for kind in rule.pattern.module_types]
        leaves = (*named, *checked_leaves(self.leaf_modules))
        program = Program(model) if isinstance(model, ExportedProgram) else None
        # Weights made under inference mode could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            view = (
                program.view() if program else GraphView(model, *trace(model, leaves, self.tracer))
            )
            if program is None and example_inputs is not None:
                record_shapes(graph_module(view), _as_tuple(example_inputs))
            nodes = frozenset(node.name for node in view.graph.nodes)
            tree = IntoModules(view) if self.into == "modules" else None
            lifting = Lifting(view, unique)
            owners = lifting.owners
            not_called = out_of_reach(view, unique, owners)
            engine = Engine(view, unique, program or tree or IntoGraph(), script)
            findings = (*engine.run(), *not_lifted(lifting, unique), *not_called)
            bystanders = engine.bystanders()
            lowered = lower(view, lifting)
            if program is not None:
                made: Any = program.finished(view)
            else:
                made = copied(model, tree.replaced()) if tree else graph_module(view)
        names: dict[str, dict[str, None]] = {}
        for each in self.rule_sets:
            names.setdefault(each.name, {}).update(dict.fromkeys(rule.name for rule in each.rules))
        of_sets = {name: tuple(rules) for name, rules in names.items()}
        became = {
            name: found.became for found in findings if found.became for _, name in found.steps
        }
        # From the layer whose tensors a call reads to that call, and from there back to a layer.
        ends = {*lowered.values()}
        became = {k: v for k, v in {**owners, **became}.items() if k not in ends} | lowered
        return made, Report(
            findings,
            of_sets,
            {**view.aliases, **owners},
            nodes,
            bystanders,
            self.into or "graph",
            renamed(model, made, became),
        )


def _as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    is_many = isinstance(example_inputs, tuple | list)
    return tuple(example_inputs) if is_many else (example_inputs,)
