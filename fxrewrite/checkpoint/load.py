"""Load a rewritten model back, without the original's weights."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from ..errors import LoadError
from ..explain.report import Report
from ..module_utils.names import parent_name
from ..module_utils.torch_private import pytree
from ..pipeline.rewriting import Options, rewrite

_DIFFERENCES_SHOWN = 5
_REGISTRIES = ("_parameters", "_buffers", "_modules")


def load(
    build: Callable[[], nn.Module],
    options: Options,
    state: Mapping[str, torch.Tensor] | str | Path,
    report: Report | str | None = None,
    example_inputs: Any = None,
) -> Any:
    """What `Rewriter.load` does, with the options that the rewriter holds."""
    saved = json.loads(report.to_json() if isinstance(report, Report) else report or "{}")
    options = attrs.evolve(options, into=options.into or saved.get("into"))
    tensors = read_state(Path(state)) if isinstance(state, str | Path) else state

    def attempt(device: torch.device | None) -> Any:
        with device or contextlib.nullcontext():
            model = build().eval()
        inputs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(device or x), example_inputs)
        done = rewrite(model, inputs, options)
        if saved:
            _compare(saved, json.loads(done.report.to_json()))
        _assign(done.made, tensors)
        for name in _without_numbers(done.made):
            raise LoadError(f"neither the state dict nor build() gives the tensor {name}")
        return done.made

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
    for key, name in (("into", "into"), ("rule_sets", "the rules")):
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
            owner, attribute = parent_name(name)
            setattr(model.get_submodule(owner), attribute, model.get_parameter(first))


def _without_numbers(model: nn.Module) -> Iterator[str]:
    """The names of all tensors on the meta device, registered or not."""
    for name, module in model.named_modules():
        held = {**vars(module), **module._parameters, **module._buffers}
        for key, value in held.items():
            for leaf in pytree.tree_leaves(value) if key not in _REGISTRIES else ():
                if isinstance(leaf, torch.Tensor) and leaf.is_meta:
                    yield f"{name}.{key}".strip(".")
