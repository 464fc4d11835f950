"""Hooks that a module carries, and tensors that are nothing but tensors."""

from __future__ import annotations

import torch
from torch import nn

from .parametrization import is_of_old_norms, is_of_parametrizations, is_parametrized
from .torch_private import HOOKS

PLAIN_TENSORS = (nn.Parameter, torch.Tensor, nn.Buffer)


def has_hooks(module: nn.Module, *, ignoring_norms: bool = False) -> str | None:
    """The kind of hook that a module carries, in words, or None.

    Those of parametrizations never count, and those by which torch's older `weight_norm` and
    `spectral_norm` compute a weight do not while `ignoring_norms`.
    """
    state = module.__dict__
    if not any(map(state.get, HOOKS)):
        return None
    for name in HOOKS:
        for hook in (state.get(name) or {}).values():
            ours = is_of_parametrizations(hook) or (ignoring_norms and is_of_old_norms(hook))
            if not (ours and is_parametrized(module)):
                return f"a {name.strip('_').removesuffix('s').replace('_', ' ')}"
    return None


def runs_its_forward_alone(module: nn.Module) -> bool:
    """Whether nothing but the forward of its type sees what a module reads."""
    return has_hooks(module) is None and "forward" not in module.__dict__
