"""The fuzzer: random module trees, rewritten by the built-in rules, against themselves."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import fuzz
import pytest
import torch
from fxrewrite.patterns.merge_siblings import of_any_size
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import nn

import fxrewrite as fxr
from fxrewrite.targets.module_copy import NotCopiedError
from fxrewrite.testing import Case, check_model

# The long profile, by hand: see docs/testing.md.
MODELS = 4_000 if settings.get_current_profile_name() == "long" else 100


@fxr.pattern
class LayerAct:
    """A layer, and what may write in place to what it makes."""

    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
    act: nn.ReLU | nn.LeakyReLU | nn.Hardtanh | nn.Sigmoid | nn.Tanh


def is_new(m: LayerAct) -> str | None:
    """Once is enough."""
    return "it is in one already" if hasattr(m.layer, "is_in_one") else None


@fxr.rule(where=[is_new], quiet=True)
def keep_in_one(m: LayerAct) -> fxr.Replace:
    """Layer and activation as one module."""
    layer = fxr.evolve(m.layer)
    layer.is_in_one = True
    return fxr.Replace(nn.Sequential(layer, m.act), slot="layer")


# Siblings are merged however large they are, since the limits of `merge_siblings` need shapes.
SETS = ("conv_bn", "affine", "cleanup", "inference", "reparam", of_any_size, keep_in_one)
# One set, or several in any order.
rules = st.sampled_from(SETS).map(lambda name: [name]) | st.permutations(SETS).flatmap(
    lambda names: st.integers(2, len(SETS)).map(lambda count: list(names[:count]))
)


@pytest.mark.slow
@settings(max_examples=MODELS)
@given(
    fuzz.cases(),
    rules,
    st.sampled_from([None, None, "modules"]),
    st.integers(0, 2).map(lambda n: n == 2),
)
def test_a_random_model(
    case: Case, rules: list[Any], into: Literal["modules"] | None, shapes: bool
) -> None:
    """Same outputs, arguments and state; the original untouched; all accounted for; repeatable.

    Or the guard raises, unless a run has shown the way that is gone.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.no_grad():
                case.model(*[each.clone() for each in case.args])
    except Exception as error:
        event(f"does not run: {type(error).__name__}")
        assume(False)
    dtype = case.args[0].dtype
    tolerance = 1e-9 if dtype in (torch.float64, torch.complex128) else 200 * torch.finfo(dtype).eps
    try:
        report = check_model(
            rules, case.model, case.args, shapes=shapes, into=into, tolerance=tolerance
        )
    except (fxr.errors.TraceError, NotCopiedError) as error:
        event(f"declined: {type(error).__name__}")
        return
    except fxr.errors.GuardError:  # nobody has seen the way that these inputs go; a run shows it
        event("guarded")
        report = check_model(
            rules, case.model, case.args, shapes=True, into=into, tolerance=tolerance
        )
    event(f"applied {min(len(report.applied), 3)}")
    for rule in {each.rule for each in report.applied}:
        event(f"applied by {rule}")
