"""Tensors that a module computes from others, and a plain copy with their present values."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.weight_norm import WeightNorm

from .evolve import evolve
from .torch_private import HOOKS

# The older weight_norm and spectral_norm set the weight in a hook, before each call.
_OLD_NORMS = (WeightNorm, SpectralNorm)
_OF_OLD_NORMS = (*_OLD_NORMS, SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook)
_OF_PARAMETRIZATIONS = nn.utils.parametrizations.__name__


def is_parametrized(module: nn.Module) -> bool:
    """Whether some tensor of the module is computed from others, by torch's own means.

    Those are `torch.nn.utils.parametrize`, and the `weight_norm` and `spectral_norm` before it.
    """
    if "parametrizations" in module._modules and parametrize.is_parametrized(module):
        return True
    hooks = module._forward_pre_hooks
    return bool(hooks) and any(isinstance(hook, _OLD_NORMS) for hook in hooks.values())


def is_of_parametrizations(hook: object) -> bool:
    """Whether `torch.nn.utils.parametrizations` put this hook on a module, to read checkpoints."""
    return getattr(_function(hook), "__module__", "") == _OF_PARAMETRIZATIONS


def is_of_old_norms(hook: object) -> bool:
    """Whether the older `weight_norm` or `spectral_norm` put this hook on a module."""
    return isinstance(_function(hook), _OF_OLD_NORMS)


def _function(hook: object) -> object:
    return getattr(hook, "hook", hook)


def without_parametrizations(module: nn.Module) -> nn.Module:
    """A plain copy of a parametrized module, the present value of each such tensor baked in.

    A module without parametrizations is returned as it is.
    """
    if not is_parametrized(module):
        return module
    plain = evolve(module)
    for hooks in map(plain.__dict__.__getitem__, HOOKS):
        for key in [k for k, h in hooks.items() if is_of_parametrizations(h) or is_of_old_norms(h)]:
            del hooks[key]
    plain.__class__ = parametrize.type_before_parametrizations(module)
    parametrized = plain._modules.pop("parametrizations", None)
    for name, each in parametrized.named_children() if parametrized is not None else ():
        originals = list(each.parameters(recurse=False))
        value = getattr(module, name).detach()
        if originals:
            needs_grad = any(each.requires_grad for each in originals)
            plain._parameters[name] = nn.Parameter(value, needs_grad)
        else:
            plain._buffers[name] = value
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, _OLD_NORMS):
            _bake_in(hook, module, plain)
    return plain


def _bake_in(norm: WeightNorm | SpectralNorm, module: nn.Module, plain: nn.Module) -> None:
    if isinstance(norm, SpectralNorm):
        value = norm.compute_weight(module, do_power_iteration=False)
    else:
        value = norm.compute_weight(module)
    needs_grad = False
    for part in ("g", "v") if isinstance(norm, WeightNorm) else ("orig", "u", "v"):
        original = plain._parameters.pop(f"{norm.name}_{part}", None)
        plain._buffers.pop(f"{norm.name}_{part}", None)
        needs_grad = needs_grad or (original is not None and original.requires_grad)
    plain.__dict__.pop(norm.name, None)
    plain._parameters[norm.name] = nn.Parameter(value.detach(), needs_grad)
