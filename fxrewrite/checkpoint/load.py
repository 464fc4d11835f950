"""Load a rewritten model back, without the original's weights."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from ..api import rewrite
from ..errors import LoadError
from ..explain.report import Report
from ..module_utils.torch_private import pytree
from ..module_utils.tree import _parent_name
from ..pipeline.rewriting import Into
from ..rules.registry import Rules
from ..tracing.tracer import LeafModules

_DIFFERENCES_SHOWN = 5
_REGISTRIES = ("_parameters", "_buffers", "_modules")


def load(
    build: Callable[[], nn.Module],
    rules: Rules,
    state: Mapping[str, torch.Tensor] | str | Path,
    report: Report | str | None = None,
    *,
    into: Into | None = None,
    example_inputs: Any = None,
    tracer: fx.Tracer | type[fx.Tracer] | None = None,
    leaf_modules: LeafModules = (),
) -> Any:
    """Build a model's architecture, rewrite it as it was rewritten before, and load what was saved.

    The architecture is built and rewritten on the meta device, where no tensor has numbers. If that
    can't be done, or leaves a tensor without numbers since no state dict holds it (a buffer that is
    not persistent, a constant of the forward), it is done once more with the numbers of `build`.

    >>> import fxrewrite as fxr
    >>> def build():
    ...     return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    >>> fused, report = fxr.rewrite(build().eval(), "conv_bn")
    >>> again = fxr.load(build, "conv_bn", fused.state_dict(), report.to_json())
    >>> torch.equal(again(torch.ones(1, 3, 4, 4)), fused(torch.ones(1, 3, 4, 4)))
    True

    Args:
        build: makes the original model, of the same architecture; its weights don't matter. It is
            called once or twice.
        rules: the rules that the saved model was rewritten by, as `rewrite` takes them.
        state: the rewritten model's state dict, or a file of it (.safetensors, or what torch.save
            wrote). Its tensors become the model's own, with their dtypes and devices.
        report: the report of that rewrite, or its JSON, to compare this rewrite with.
        into: as for `rewrite`, like the arguments that follow; by default what the report says.

    Returns:
        The rewritten model in eval mode.

    Raises:
        LoadError: the file can't be read, the rewrite is another one than the report tells of, or
            the state dict does not fit; nothing is loaded in part.
    """
    saved = json.loads(report.to_json() if isinstance(report, Report) else report or "{}")
    tensors = read_state(Path(state)) if isinstance(state, str | Path) else state

    def attempt(device: torch.device | None) -> Any:
        with device or contextlib.nullcontext():
            model = build().eval()
        inputs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device or x), example_inputs)
        made, now = rewrite(
            model,
            rules,
            inputs,
            into=into or saved.get("into"),
            tracer=tracer,
            leaf_modules=leaf_modules,
        )
        if saved:
            _compare(saved, json.loads(now.to_json()))
        _assign(made, tensors)
        for name in _without_numbers(made):
            raise LoadError(f"neither the state dict nor build() gives the tensor {name}")
        return made

    # What goes wrong without numbers may be right with them; if not, that error is the better one.
    with contextlib.suppress(Exception):
        return attempt(torch.device("meta"))
    return attempt(None)


def read_state(path: Path) -> Mapping[str, torch.Tensor]:
    """The state dict in a file, by torch (`weights_only=True`) or, by suffix, safetensors.

    A checkpoint that holds the state dict under the key `state_dict` will do too.

    Raises:
        LoadError: there is no such file, or it can't be read.
    """
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch

            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise LoadError("safetensors is missing; pip install safetensors") from error
    except FileNotFoundError as error:
        raise LoadError(f"there is no weights file {path}") from error
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"weights file {path} is broken or holds more than tensors; save model.state_dict()"
        ) from error
    except Exception as error:
        raise LoadError(
            f"weights file {path} can't be read: {type(error).__name__}: {error}"
        ) from error
    if isinstance(state, Mapping) and "state_dict" in state:
        state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise LoadError(
            f"weights file {path} holds no state dict but a value of type {type(state).__name__}"
        )
    return state


def _compare(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise LoadError unless two reports tell of the same rewrite."""
    for key, name in (("into", "the destination"), ("rule_sets", "the rules")):
        if key in saved and saved[key] != now[key]:
            raise LoadError(f"{name} was {saved[key]!r} when the model was saved, not {now[key]!r}")
    before, after = _applied(saved), _applied(now)
    outcomes = {each["anchor"]: each for each in now["findings"]}
    differences = []
    for site in (each for each in before if each not in after):
        found = outcomes.get(site[0], {"outcome": "not there", "reason": "no such module"})
        reason = f" ({found['reason']})" if found["outcome"] != "applied" else ""
        differences.append(
            f"{_said(site)} when it was saved, and now is {found['outcome']}{reason}"
        )
    for site in (each for each in after if each not in before):
        differences.append(f"{_said(site)} now, and not when it was saved")
    if differences:
        shown = differences[:_DIFFERENCES_SHOWN]
        more = len(differences) - len(shown)
        raise LoadError(
            "this is not the rewrite that the report tells of:\n  "
            + "\n  ".join([*shown, *([f"... and {more} more"] if more else [])])
        )


def _applied(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (f["anchor"], f["rule"], " -> ".join(to for _, to in f["steps"]), f["became"])
        for f in report["findings"]
        if f["outcome"] == "applied"
    ]


def _said(site: tuple[str, str, str, str]) -> str:
    anchor, rule, chain, became = site
    return f"{anchor}: {rule} made {became or 'nothing'} of {chain}"


def _assign(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Make the tensors of a state dict the model's own; what was one tensor stays one."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    tied = [each for each in names.values() if len(each) > 1]
    whole = dict(state)
    for group in tied:  # some formats hold only one of them
        there = [name for name in group if name in whole]
        whole.update({name: whole[there[0]] for name in group if there})
    try:
        model.load_state_dict(whole, strict=True, assign=True)
    except RuntimeError as error:
        raise LoadError(f"the state dict does not fit the rewritten model: {error}") from error
    for first, *others in tied:
        for name in others:
            owner, attribute = _parent_name(name)
            setattr(model.get_submodule(owner), attribute, model.get_parameter(first))


def _without_numbers(model: nn.Module) -> Iterator[str]:
    """The names of all tensors on the meta device, registered or not."""
    for name, module in model.named_modules():
        held = {**vars(module), **module._parameters, **module._buffers}
        for key, value in held.items():
            for leaf in pytree.tree_leaves(value) if key not in _REGISTRIES else ():
                if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                    yield f"{name}.{key}".strip(".")
