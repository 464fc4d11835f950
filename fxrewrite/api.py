"""The functions that apply rules to a model, and `Rewriter`, which holds what they share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn
from torch.export import ExportedProgram

from .checkpoint.load import load
from .errors import InputError
from .explain.report import Report
from .pipeline import rewriting
from .pipeline.rewriting import Into, Options, Trust
from .rules.registry import Rules
from .verification.bisect import Localisation, check_rewrite, localised
from .verification.verify import Progress


@attrs.frozen
class Rewriter(Options):
    """Rules, and how to apply them: what `rewrite`, `plan`, `localise` and `load` have in common.

    >>> import fxrewrite as fxr
    >>> rewriter = fxr.Rewriter("conv_bn", into="modules")
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> fused, report = rewriter.rewrite(model, expect={"conv_bn": 1})
    >>> fused
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
      (1): Identity()
      (2): ReLU()
    )

    Args:
        rules: a rule set or its name, a rule, or a list of those; earlier ones are tried first.
        into: "graph" gives a GraphModule. "modules" gives a copy of the model, same class,
            attributes and forward code, in which new modules stand where old ones stood; it
            needs only parts of the model to be traceable. By default "graph" where the whole model
            can be traced, and else "modules"; `report.into` says which.
        tracer: a tracer, or its class, to use instead of `torch.fx.Tracer`.
        leaf_modules: modules that tracing must keep whole, by type or qualified name. The types
            that the rules name are kept whole anyway.
        trust: "run" also rewrites, in a module tree, what one run on the example inputs shows and
            the model's source does not. The report calls such a site "trusted".

    Raises:
        UnknownRuleSetError: no rule set has the given name.
        TypeError: `leaf_modules` has something that is no module type and no name.
        ValueError: `into` or `trust` is none of those.
    """

    def rewrite(
        self,
        model: nn.Module | ExportedProgram,
        example_inputs: Any = None,
        *,
        expect: Mapping[str, int] | None = None,
        verify: Any = None,
        trials: int = 1,
        progress: Progress | None = None,
    ) -> tuple[Any, Report]:
        """Apply the rules wherever they are sound; gives a new model and a report.

        >>> import fxrewrite as fxr
        >>> class Half(nn.Module):
        ...     def forward(self, x):
        ...         return x / 2 if x.sum() > 0 else x
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), Half()).eval()
        >>> rewriter = fxr.Rewriter("conv_bn", leaf_modules=[Half])
        >>> made, report = rewriter.rewrite(model, verify=torch.ones(1, 3, 4, 4))
        >>> report.into, len(report.applied)
        ('graph', 1)

        Args:
            model: as in the function `rewrite`, like the arguments that follow.
            example_inputs: what the model is called with.
            expect: how often rules or rule sets, by name, must apply.
            verify: inputs to verify the result on, or True for the example inputs.
            trials: on how many inputs to verify.
            progress: told how far verifying is.

        Raises:
            FxRewriteError: as in the function `rewrite`.
        """
        if verify is True and example_inputs is None:
            raise InputError("verify=True takes the example inputs, and there are none; give them")
        done = rewriting.rewrite(model, example_inputs, self)
        done.report.check(expect or {})
        if verify is not None and verify is not False:
            check_rewrite(done, example_inputs if verify is True else verify, progress, trials)
        return done.made, done.report

    def plan(self, model: nn.Module | ExportedProgram, example_inputs: Any = None) -> Report:
        """What `rewrite` would do, and why; changes nothing.

        >>> import fxrewrite as fxr
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
        >>> print(fxr.Rewriter("conv_bn", leaf_modules=["0"]).plan(model).why("1"))
        1: applied by fold_conv_bn: 0 -> 1 became 0

        Args:
            model: as in the function `rewrite`.
            example_inputs: as in the function `rewrite`.

        Raises:
            FxRewriteError: as in the function `rewrite`.
        """
        return rewriting.rewrite(model, example_inputs, self).report

    def localise(
        self,
        model: nn.Module | ExportedProgram,
        inputs: Any,
        example_inputs: Any = None,
        *,
        most: int = 3,
        trials: int = 1,
        progress: Progress | None = None,
    ) -> Localisation:
        """Rewrite a model, verify the result, and name the rules and sites that make a difference.

        >>> import fxrewrite as fxr
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
        >>> fxr.Rewriter("conv_bn").localise(model, torch.ones(1, 3, 4, 4)).guilty
        ()

        Args:
            model: the model, which is never changed.
            inputs: what to compare on, in one of the forms that `verify` takes.
            example_inputs: as in the function `rewrite`.
            most: how many guilty sites to name at most.
            trials: on how many inputs to compare; the search is on the first that shows a
                difference.
            progress: told how far the search is, as in `verify`.

        Raises:
            InputError: the model raises on these inputs.
            FxRewriteError: as in the function `rewrite`.
        """
        done = rewriting.rewrite(model, example_inputs, self)
        return localised(done, inputs, most=most, trials=trials, progress=progress)

    def load(
        self,
        build: Callable[[], nn.Module],
        state: Mapping[str, torch.Tensor] | str | Path,
        report: Report | str | None = None,
        *,
        example_inputs: Any = None,
    ) -> Any:
        """Build a model's architecture, rewrite it as it was before, and load what was saved.

        The architecture is built and rewritten on the meta device, where no tensor has numbers. If
        that can't be done, or leaves a tensor without numbers since no state dict holds it (a
        buffer that is not persistent, a constant of the forward), it is done once more with the
        numbers of `build`.

        >>> import fxrewrite as fxr
        >>> def build():
        ...     return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        >>> rewriter = fxr.Rewriter("conv_bn")
        >>> fused, report = rewriter.rewrite(build().eval())
        >>> again = rewriter.load(build, fused.state_dict(), report.to_json())
        >>> torch.equal(again(torch.ones(1, 3, 4, 4)), fused(torch.ones(1, 3, 4, 4)))
        True

        Args:
            build: makes the original model, of the same architecture; its weights don't matter. It
                is called once or twice.
            state: the rewritten model's state dict, or a file of it (.safetensors, or what
                torch.save wrote). Its tensors become the model's own, with their dtypes and
                devices.
            report: the report of that rewrite, or its JSON, to compare this rewrite with. It also
                says whether the rewrite was into a graph, where the rewriter doesn't.
            example_inputs: as in the function `rewrite`.

        Returns:
            The rewritten model in eval mode.

        Raises:
            LoadError: the file can't be read, the rewrite is another one than the report tells of,
                or the state dict does not fit; nothing is loaded in part.
        """
        return load(build, self, state, report, example_inputs)


def rewrite(
    model: nn.Module | ExportedProgram,
    rules: Rules,
    example_inputs: Any = None,
    *,
    into: Into | None = None,
    trust: Trust | None = None,
    expect: Mapping[str, int] | None = None,
    verify: Any = None,
    trials: int = 1,
    progress: Progress | None = None,
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
        rules: as in `Rewriter`, which has further options.
        example_inputs: what the model is called with, a tensor, a tuple of arguments, or a mapping
            of those by name. Rules that need shapes or dtypes learn them from it, as far as they
            can be found. Into a graph, optional arguments that are given are traced as given; and
            nothing is computed, but where shapes can't be found, to see whether the model takes the
            inputs. For a module tree a copy of the model runs on them once, hooks and all, as a
            check on what its code says; of parts that are called with other shapes each time, none
            is learnt.
        into: "graph" or "modules", as in `Rewriter`.
        trust: None or "run", as in `Rewriter`.
        expect: how often rules or rule sets, by name, must apply.
        verify: inputs, in one of the forms that `verify` takes, or True for the example inputs. The
            result is verified against the model, and where they differ, the sites that are to
            blame are searched for.
        trials: on how many inputs to verify: these, and from the second on random ones like them.
        progress: told how far verifying is, as in `verify`.

    Raises:
        TraceError: the model can't be traced as a whole, and into is "graph".
        NotCopiedError: the model holds something that no copy of it can have, and into is not
            "graph".
        RuleError: a rule raised, changed what it was given, returned the wrong thing, or rules
            feed each other forever. The model is as it was.
        UnknownRuleSetError: no rule set has the given name.
        ExpectationError: `expect` does not hold.
        InputError: the model does not take the example inputs, or those that it should be verified
            on; or a run is to be trusted and there are no example inputs.
        VerificationError: the result differs from the model; the error names rules and sites.
    """
    return Rewriter(rules, into=into, trust=trust).rewrite(
        model, example_inputs, expect=expect, verify=verify, trials=trials, progress=progress
    )


def plan(
    model: nn.Module | ExportedProgram,
    rules: Rules,
    example_inputs: Any = None,
    *,
    into: Into | None = None,
    trust: Trust | None = None,
) -> Report:
    """What `rewrite` would do, and why; changes nothing. The arguments are those of `rewrite`.

    >>> import fxrewrite as fxr
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    >>> print(fxr.plan(model, "conv_bn"))
    rule            applied  refused  missed
    fold_conv_bn          1        0       0
    fold_held_norm        0        0       0
    """
    return Rewriter(rules, into=into, trust=trust).plan(model, example_inputs)


def fuse(model: nn.Module, into: Into | None = None) -> Any:
    """Fold each batch norm into the convolution before it: `rewrite` with the set `conv_bn`.

    It warns where there was nothing to fold; `plan(model, "conv_bn").why(name)` tells why.

    >>> import fxrewrite as fxr
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    >>> fxr.fuse(model)
    Sequential(
      (0): Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
    )
    """
    made, report = rewrite(model, "conv_bn", into=into)
    if not report.applied:
        declined = (*report.refused, *report.missed)
        said = f": {declined[0]}" if declined else ""
        warnings.warn(
            f"fuse folded none of {len(declined)} batch norms of {type(model).__name__}{said}. "
            "The rule set 'inference' folds more.",
            stacklevel=2,
        )
    return made
