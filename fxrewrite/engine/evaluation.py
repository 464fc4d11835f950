"""Ask a rule what to do with a match, and hold it to its promises."""

from __future__ import annotations

import cmath
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import nn

from ..errors import RuleError
from ..module_utils.evolve import same_module
from ..module_utils.state import Snapshot
from ..module_utils.torch_private import pytree
from ..rules.actions import Action, Bypass, Replace, Revise, Split
from ..rules.rules import Rule
from ..rules.values import Call
from .match import Site


def decide(rule: Rule[Any], site: Site, match: Any) -> Action | str:
    """The action that a rule wants for a match, or the reason why it is refused.

    Raises:
        RuleError: a guard or the rule raised, changed what it was given, or returned something
            that is neither. What it changed is put back first.
    """
    answer = _asked(rule, site, match) if rule.pure else _watched(rule, site, match)
    return answer if isinstance(answer, str) else _not_finite(answer, match) or answer


def failure(rule: Rule[Any], site: Site | str, what: str) -> RuleError:
    """The error for a rule that breaks its contract: which, where, and what it did."""
    declared = f" ({rule.source})" if rule.source else ""
    return RuleError(f"rule {rule.name!r}{declared} at {site}: {what}")


def same_action(one: Action, other: Action) -> bool:
    """Whether two actions put modules that are alike into the same steps, and read nothing else."""
    if isinstance(one, Bypass) and isinstance(other, Bypass):
        return True
    if isinstance(one, Replace) and isinstance(other, Replace):
        alone = not one.inputs and not other.inputs
        return alone and one.slot == other.slot and same_module(one.module, other.module)
    if isinstance(one, Split) and isinstance(other, Split):
        return one.sizes == other.sizes and same_module(one.module, other.module)
    if isinstance(one, Revise) and isinstance(other, Revise):
        pairs = [(module, other.steps.get(name)) for name, module in one.steps.items()]
        return one.steps.keys() == other.steps.keys() and all(
            a is b or (a is not None and b is not None and same_module(a, b)) for a, b in pairs
        )
    return False


def _watched(rule: Rule[Any], site: Site, match: Any) -> Action | str:
    """Ask a rule and compare afterwards what it was given."""
    before = Snapshot(_held(match))
    with before, before:  # Ctrl-C may come while the inner one is putting things back
        answer = _asked(rule, site, match)
        if (changed := before.difference()) is not None:
            raise failure(
                rule, site, f"it changed {changed}; a rule must build new modules and tensors"
            )
    return answer


def _asked(rule: Rule[Any], site: Site, match: Any) -> Action | str:
    """The first reason of a guard, or else what the rule returns."""
    for guard in rule.guards:
        try:
            reason = guard(match)
        except Exception as error:
            raise failure(rule, site, f"its guard {_name(guard)} raised {error!r}") from error
        if isinstance(reason, str):
            return reason
        if reason is not None:
            what = f"its guard {_name(guard)} returned {reason!r}, not None or a reason"
            raise failure(rule, site, what)
    try:
        action = rule.build(match)
    except Exception as error:
        raise failure(rule, site, f"it raised {error!r}") from error
    wanted = (Split,) if rule.pattern.is_group else (Replace, Revise, Call, Bypass)
    if not isinstance(action, wanted):
        names = " or ".join(each.__name__ for each in wanted)
        raise failure(rule, site, f"it returned {action!r}, not a {names}; to decline, use a guard")
    if isinstance(action, Revise):
        _check_steps(rule, site, action)
    if isinstance(action, Replace | Split) and not isinstance(action.module, nn.Module):
        what = f"{type(action).__name__}({action.module!r})"
        raise failure(rule, site, f"it returned {what}, which is not a module")
    if isinstance(action, Split) and len(action.sizes) != len(site.links):
        count = len(site.links)
        raise failure(rule, site, f"it returned {len(action.sizes)} sizes for {count} siblings")
    return action


def _name(guard: Any) -> str:
    return str(getattr(guard, "__name__", repr(guard)))


def _check_steps(rule: Rule[Any], site: Site, action: Revise) -> None:
    known = {step.name: step for step in rule.pattern.steps}
    for name, module in action.steps.items():
        if name not in known:
            steps = ", ".join(known)
            raise failure(rule, site, f"it revised {name!r}; the pattern's steps are {steps}")
        if module is not None and not isinstance(module, nn.Module):
            raise failure(rule, site, f"it returned Revise({name}={module!r}), which is no module")
        if module is not None and known[name].repeats:
            raise failure(rule, site, f"it gave a module to {name!r}, which may be many steps")


def _held(match: Any) -> Iterator[Any]:
    """The modules and tensors that a match gives to a rule."""
    for field in attrs.fields(type(match)):
        captured = getattr(match, field.name)
        for each in captured if isinstance(captured, tuple) else (captured,):
            if hasattr(type(each), "__fxrewrite_pattern__"):
                yield from _held(each)
            elif isinstance(each, Call):
                yield each.function
                yield from pytree.tree_leaves(dict(each.kwargs))
            else:
                yield each


def _not_finite(action: Action, match: Any) -> str | None:
    """The reason to refuse an action whose new tensors hold infinities or NaN."""
    if isinstance(action, Bypass):
        return None
    broken = [(name, each) for name, each in _tensors_of(action) if not _is_finite(each)]
    for name, tensor in broken:
        if all(tensor is not given for given in _tensors_given(match)):
            return (
                f"the new {name} would not be finite in {str(tensor.dtype).removeprefix('torch.')}"
            )
    return None


def _tensors_given(match: Any) -> Iterator[torch.Tensor]:
    for each in _held(match):
        if isinstance(each, nn.Module):
            yield from (*each.parameters(), *each.buffers())
        elif isinstance(each, torch.Tensor):
            yield each


def _tensors_of(action: Replace | Revise | Split | Call) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(action, Call):
        leaves = pytree.tree_leaves((action.args, dict(action.kwargs)))
        yield from (("constant", leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))
    elif isinstance(action, Replace | Split):
        yield from _tensors_in(action.module)
    else:
        for module in action.steps.values():
            yield from () if module is None else _tensors_in(module)


def _tensors_in(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    if not module._modules:  # named_parameters() and named_buffers() cost more than the check
        held = (*module._parameters.items(), *module._buffers.items())
        yield from ((name, tensor) for name, tensor in held if tensor is not None)
    else:
        yield from (*module.named_parameters(), *module.named_buffers())


def _is_finite(tensor: torch.Tensor) -> bool:
    if tensor.is_meta or tensor.is_nested or tensor.layout is not torch.strided:
        return True
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    # A sum shows any infinity or NaN at a fourth of the cost, but it may overflow by itself.
    if tensor.dtype.itemsize > 1 and cmath.isfinite(tensor.sum().item()):
        return True
    return bool(torch.isfinite(tensor.to(torch.complex128)).all())
