"""`check_rule`: hold a rule to what must hold of every rule, on models given or drawn."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeAlias

import hypothesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import FailedHealthCheck, Unsatisfiable
from torch import nn

from fxrewrite.explain.report import Report
from fxrewrite.pipeline.rule_lists import rules_of
from fxrewrite.rules.registry import Rules, resolve

from .around import models_around
from .drafts import REFUSALS
from .properties import check_model
from .written import Case

Models: TypeAlias = "nn.Module | Iterable[nn.Module | Case] | st.SearchStrategy[Case]"


def check_rule(
    rules: Rules,
    models: Models | None = None,
    inputs: Any = None,
    *,
    tolerance: float = 1e-9,
    max_examples: int | None = None,
    must_apply: bool = True,
    reproduce: tuple[str, bytes] | None = None,
) -> None:
    """Assert that a rule, or a rule set, is sound.

    On each model it is asserted that the rewritten model gives the same outputs and does the same
    to its arguments and state, that the model it was made from is untouched, that a second rewrite
    finds nothing left to do, that the same rewrite gives the same result, and that each anchor is
    accounted for with a reason.

    >>> import fxrewrite as fxr
    >>> @fxr.rule(pattern=fxr.chain(idle=nn.Identity))
    ... def drop_identity(m):
    ...     return fxr.Bypass()
    >>> check_rule(drop_identity, max_examples=5)

    Args:
        rules: a rule, a rule set or its name, or a list of those.
        models: a model or several, or a hypothesis strategy of `Case`s. By default models are
            drawn around the pattern of each rule; see `models_around`. Models are checked in
            float64, in copies of their own.
        inputs: for given models, what to call them with: a tensor, or a tuple of arguments.
        tolerance: the largest error of an element, relative to the largest of its tensor.
        max_examples: how many models to draw for each rule; by default what hypothesis' settings
            say.
        must_apply: whether a rule that applied in no model at all fails the check.
        reproduce: what a failure said to give here, in order to run its model alone.

    Raises:
        UnsoundError: an AssertionError that names the property that does not hold, the rule, the
            sites, and the model.
    """
    counts = _Counts(rules)
    if models is not None and not isinstance(models, st.SearchStrategy):
        for case in _cases(models, inputs):
            for shapes in (False, True):
                counts.add(
                    check_model(rules, case.model, case.args, shapes=shapes, tolerance=tolerance)
                )
    else:
        for rule in rules_of(resolve(rules)):
            drawn = models_around(rule.pattern) if models is None else models

            def check(case: Case, shapes: bool) -> None:
                counts.add(
                    check_model(rules, case.model, case.args, shapes=shapes, tolerance=tolerance)
                )

            _for_all(check, drawn, max_examples, reproduce, str(rule.pattern))
            if models is not None:
                break
    if must_apply and reproduce is None:
        counts.assert_applied()


def _for_all(
    check: Any,
    cases: st.SearchStrategy[Case],
    max_examples: int | None,
    reproduce: tuple[str, bytes] | None,
    pattern: str,
) -> None:
    current = settings()
    examples = current.max_examples if max_examples is None else max_examples
    # Building a model is slow by nature; that torch refuses too many of them is still reported.
    chosen = settings(
        current,
        max_examples=examples,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.nested_given],
    )
    test = chosen(given(cases, st.booleans())(check))
    if reproduce is not None:
        test = hypothesis.reproduce_failure(*reproduce)(test)
    REFUSALS.clear()
    try:
        test()
    except (FailedHealthCheck, Unsatisfiable) as error:
        raise AssertionError(
            f"no model could be built around {pattern}: torch refuses nearly all that are drawn; "
            "say with fxrewrite.testing.register_strategy how its modules and calls are made. "
            "Lately:\n" + "\n".join(REFUSALS)
        ) from error
    except AssertionError as error:
        blob = re.search(r"@reproduce_failure\((.*)\)", "\n".join(getattr(error, "__notes__", ())))
        if blob is not None:
            error.__notes__ = [f"to run this model alone: check_rule(..., reproduce=({blob[1]}))"]
        raise


def _cases(models: Any, inputs: Any) -> Iterable[Case]:
    given = [models] if isinstance(models, nn.Module) else models
    args = inputs if isinstance(inputs, tuple) else () if inputs is None else (inputs,)
    wide = tuple(_wide(each) for each in args)
    for each in given:
        model, own = (each.model, each.args) if isinstance(each, Case) else (each, wide)
        # Copied one and all, since a rule that is wrong may change what it is given.
        yield Case(copy.deepcopy(model).double(), tuple(map(_wide, own)))


def _wide(argument: Any) -> Any:
    is_real = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.double() if is_real else argument


class _Counts:
    """How often rules applied, and why they did not."""

    def __init__(self, rules: Rules) -> None:
        self.applied: Counter[str] = Counter({rule.name: 0 for rule in rules_of(resolve(rules))})
        self.reasons: dict[str, Counter[str]] = {rule: Counter() for rule in self.applied}

    def add(self, report: Report) -> None:
        for finding in report.findings:
            if finding.outcome == "applied":
                self.applied[finding.rule] += 1
            elif finding.outcome == "refused":
                self.reasons.setdefault(finding.rule, Counter())[finding.reason] += 1

    def assert_applied(self) -> None:
        for rule, count in self.applied.items():
            if not count:
                common = [f"  {n} times: {why}" for why, n in self.reasons[rule].most_common(3)]
                raise AssertionError(
                    "\n".join([f"{rule} applied in no model, so nothing is proven", *common])
                )
