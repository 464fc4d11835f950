"""The functions that apply rules to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from .errors import InputError
from .explain.report import Report
from .pipeline.rewriting import Into, Rewriter
from .pipeline.rule_lists import apart
from .rules.registry import Rules, resolve
from .tracing.tracer import LeafModules
from .verification.bisect import Localisation, Rewrite, check_rewrite, localised
from .verification.verify import Progress


def rewrite(
    model: nn.Module | ExportedProgram,
    rules: Rules,
    example_inputs: Any = None,
    *,
    into: Into | None = None,
    expect: Mapping[str, int] | None = None,
    verify: Any = None,
    trials: int = 1,
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
            need shapes or dtypes learn them from it. For a graph nothing is computed. For a module
            tree a copy of the model runs on them once, hooks and all, as a check on what its code
            says; of parts that are called with other shapes each time, none is learnt.
        into: "graph" gives a GraphModule. "modules" gives a copy of the model, same class,
            attributes and forward code, in which new modules stand where old ones stood; it
            needs only parts of the model to be traceable. By default "graph" where the whole model
            can be traced, and else "modules"; `report.into` says which.
        expect: how often rules or rule sets, by name, must apply.
        verify: inputs, in one of the forms that `verify` takes, or True for the example inputs. The
            result is verified against the model, and where they differ, the sites that are to
            blame are searched for.
        trials: on how many inputs to verify: these, and from the second on random ones like them.
        progress: told how far verifying is, as in `verify`.
        tracer: a tracer, or its class, to use instead of `torch.fx.Tracer`.
        leaf_modules: modules that tracing must keep whole, by type or qualified name. The types
            that the rules name are kept whole anyway.

    Raises:
        TraceError: the model can't be traced as a whole, and into is "graph".
        NotCopiedError: the model holds something that no copy of it can have, and into is not
            "graph".
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
    rewriter = Rewriter(apart(resolve(rules)), into, tracer, leaf_modules)
    made, report, applied = rewriter(model, example_inputs)
    report.check(expect or {})
    if verify is not None and verify is not False:
        inputs = example_inputs if verify is True else verify
        done = Rewrite(model, made, applied.sites, example_inputs, rewriter)
        check_rewrite(done, inputs, progress, trials)
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
    model: nn.Module | ExportedProgram,
    rules: Rules,
    inputs: Any,
    example_inputs: Any = None,
    *,
    most: int = 3,
    trials: int = 1,
    progress: Progress | None = None,
    into: Into | None = None,
    tracer: fx.Tracer | type[fx.Tracer] | None = None,
    leaf_modules: LeafModules = (),
) -> Localisation:
    """Rewrite a model, verify the result, and name the rules and sites that make a difference.

    >>> import torch
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
        trials: on how many inputs to compare, as in `rewrite`; the search is on the first that
            shows a difference.
        progress: told how far the search is, as in `verify`.
        into: as in `rewrite`.
        tracer: as in `rewrite`.
        leaf_modules: as in `rewrite`.

    Raises:
        InputError: the model raises on these inputs.
        FxRewriteError: what `rewrite` raises.
    """
    rewriter = Rewriter(apart(resolve(rules)), into, tracer, leaf_modules)
    made, _, applied = rewriter(model, example_inputs)
    rewrite = Rewrite(model, made, applied.sites, example_inputs, rewriter)
    return localised(rewrite, inputs, most=most, trials=trials, progress=progress)


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
