"""What code that has an object can get at through it, and with whom code comes."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .values import PLAIN

_SITES = frozenset({"site-packages", "dist-packages"})


def reached(root: Any) -> Iterator[nn.Module]:
    """The modules that an object is, holds or closes over."""
    seen: dict[int, Any] = {}
    pending = [root]
    while pending:
        obj = pending.pop()
        if isinstance(obj, PLAIN) or id(obj) in seen:
            continue
        seen[id(obj)] = obj
        if isinstance(obj, nn.Module):
            yield obj
        pending += _held(obj)


def is_of_library(function: Any) -> bool:
    """Whether a function comes with torch or Python, and so knows nothing of the model."""
    if isinstance(function, types.FunctionType):  # whose `__module__` a decorator may have set
        return is_library(function.__globals__.get("__name__") or "somebody's")
    return is_library(getattr(function, "__module__", None) or "")


@functools.lru_cache(maxsize=4096)
def is_library(name: str) -> bool:
    """Whether a module of that name comes with torch or Python."""
    top = name.partition(".")[0]
    return top in ("torch", "numpy", "math", "builtins", "") or top in sys.stdlib_module_names


@functools.lru_cache(maxsize=4096)
def is_installed(package: str) -> bool:
    """Whether a library is installed from elsewhere, and is no folder that somebody works in."""
    try:
        spec = importlib.util.find_spec(package) if package else None
    except (ImportError, ValueError):
        return False
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    return any(_SITES & set(Path(each).parts) for each in places if each)


def _held(obj: Any) -> list[Any]:
    """What an object holds in such a way that code which has the object can get at it."""
    if isinstance(obj, torch.Tensor | type | types.ModuleType):
        return []
    if isinstance(obj, dict):
        return list(obj.values())
    if isinstance(obj, list | tuple | set | frozenset):
        return list(obj)
    if isinstance(obj, types.MethodType):
        return [obj.__self__, obj.__func__]
    if isinstance(obj, weakref.ReferenceType):
        return [obj()]
    if isinstance(obj, types.FunctionType):
        cells = [each.cell_contents for each in obj.__closure__ or () if _is_set(each)]
        held = [*cells, *(obj.__defaults__ or ()), *(obj.__kwdefaults__ or {}).values()]
        if not is_of_library(obj):
            mentioned = (obj.__globals__.get(name) for name in obj.__code__.co_names)
            held += [e for e in mentioned if isinstance(e, nn.Module | types.FunctionType)]
        return held
    if isinstance(obj, types.BuiltinMethodType):
        return [obj.__self__]
    if isinstance(obj, functools.partial):
        return [obj.func, obj.args, obj.keywords]
    if isinstance(obj, super):
        return [obj.__self__]  # type: ignore[attr-defined]
    held = list(getattr(obj, "__dict__", {}).values())
    for cls in type(obj).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            held.append(getattr(obj, slot, None))
    return held


def _is_set(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
