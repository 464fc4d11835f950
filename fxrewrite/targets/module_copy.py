"""Copy a model with other submodules in places, sharing every tensor that it holds."""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import NotCopiedError
from ..module_utils.torch_private import HOOK_STATE

# copy.deepcopy() hands these on as they are, or they hold nothing that could matter here.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type, types.ModuleType, range)
_ABSENT = object()


def copied(model: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """A copy of a model, in which other modules stand wherever some of its own stood.

    Class, attributes, hooks and methods are those of the model; what refers to a module of the
    model, under whatever name, from a list or from a bound method, refers to the copy's. Tensors
    are shared, and so is what can't be copied at all, such as a lock.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> made = copied(model, {id(model[1]): nn.GELU()})
    >>> made[1], made[0].weight is model[0].weight, made[0] is model[0]
    (GELU(approximate='none'), True, False)

    Args:
        model: the model, which is left as it is.
        replaced: by the identity of a module of the model, what stands in its place.

    Raises:
        NotCopiedError: something in the model refers to its modules in a way that no copy can
            follow, or has a copy function of its own that raises.
    """
    reached = _Reached(model, *replaced.values())
    memo: dict[int, Any] = dict(reached.shared)
    # New modules may hold old ones, which are copied as they were, even where they are replaced.
    made = {key: copy.deepcopy(new, memo) for key, new in replaced.items()}
    for each in reached.functions:
        memo[id(each)] = _with_empty_cells(each)
    memo |= made
    try:
        result: nn.Module = copy.deepcopy(model, memo)
        for each in reached.functions:
            _fill_cells(each, memo)
        for graph_module in filter(_is_graph_module, model.modules()):
            _copy_hooks(graph_module, memo)
    except Exception as error:
        raise NotCopiedError(f"{type(model).__name__} can't be copied: {error}") from error
    return result


def _is_graph_module(module: nn.Module) -> bool:
    return isinstance(module, fx.GraphModule)


def _copy_hooks(module: nn.Module, memo: dict[int, Any]) -> None:
    """Give the copy of a GraphModule the hooks that torch's own copying leaves out."""
    made = memo.get(id(module))
    if made is not None:  # otherwise it stood inside what was replaced
        for name in HOOK_STATE:
            made.__dict__[name] = copy.deepcopy(module.__dict__.get(name), memo)


class _Reached:
    """What is found by going through a model's attributes: `shared` is not to be copied.

    `functions` close over the model's modules, and would go on to call those in a copy.
    """

    def __init__(self, *roots: nn.Module) -> None:
        self.shared: dict[int, Any] = {}
        self.functions: list[types.FunctionType] = []
        self._modules = {id(each) for root in roots for each in root.modules()}
        self._seen: dict[int, Any] = {}
        pending: list[tuple[str, Any]] = [("", root) for root in roots]
        while pending:
            name, value = pending.pop()
            if id(value) not in self._seen and not isinstance(value, _PLAIN):
                self._seen[id(value)] = value  # kept, so that no other gets its id
                pending += [
                    (f"{name}.{key}".strip("."), each) for key, each in self._inside(name, value)
                ]

    def _inside(self, name: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, torch.Tensor):
            self.shared[id(value)] = value
            return
        if isinstance(value, DistributedDataParallel):
            raise NotCopiedError(
                f"{name or 'the model'} is wrapped in DistributedDataParallel, whose process group "
                "can't be copied; rewrite the module in it, then wrap the result"
            )
        if isinstance(value, dict):
            yield from ((str(key), each) for key, each in value.items())
        elif isinstance(value, list | tuple | set | frozenset):
            yield from ((str(i), each) for i, each in enumerate(value))
        elif isinstance(value, types.MethodType):
            yield "__self__", value.__self__
        elif isinstance(value, types.FunctionType):
            yield from self._of_function(value)
        elif isinstance(value, weakref.ReferenceType):
            if id(value()) in self._modules:
                raise NotCopiedError(
                    f"{name} is a weak reference to a module of the model, which a copy would "
                    "not follow; take it off before the rewrite, and set it anew afterwards"
                )
        elif _can_be_copied(value):
            yield from getattr(value, "__dict__", {}).items()
            for cls in type(value).__mro__:
                slots = cls.__dict__.get("__slots__", ())
                for slot in (slots,) if isinstance(slots, str) else slots:
                    if (held := getattr(value, slot, _ABSENT)) is not _ABSENT:
                        yield slot, held
        else:
            self.shared[id(value)] = value

    def _of_function(self, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        held = [
            value for cell in function.__closure__ or () if (value := _content(cell)) is not _ABSENT
        ]
        held += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        if any(map(self._refers, held)):
            self.functions.append(function)
            yield from (("", each) for each in held)

    def _refers(self, value: Any, depth: int = 3) -> bool:
        """Whether a value that a function holds is, or holds, a module of the model."""
        if isinstance(value, nn.Module):
            return id(value) in self._modules
        if isinstance(value, types.MethodType):
            return self._refers(value.__self__, depth)
        if not depth:
            return False
        if isinstance(value, types.FunctionType):
            return any(self._refers(_content(cell), depth - 1) for cell in value.__closure__ or ())
        if isinstance(value, dict):
            return any(self._refers(each, depth - 1) for each in value.values())
        if isinstance(value, list | tuple | set):
            return any(self._refers(each, depth - 1) for each in value)
        return False


def _can_be_copied(value: Any) -> bool:
    if hasattr(type(value), "__deepcopy__") or isinstance(value, nn.Module):
        return True
    try:
        value.__reduce_ex__(4)
    except Exception:
        return False
    return True


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return _ABSENT


def _with_empty_cells(function: types.FunctionType) -> types.FunctionType:
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    new = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, None, cells
    )
    new.__qualname__, new.__module__ = function.__qualname__, function.__module__
    new.__doc__, new.__annotations__ = function.__doc__, function.__annotations__
    new.__dict__.update(function.__dict__)
    return new


def _fill_cells(function: types.FunctionType, memo: dict[int, Any]) -> None:
    new = memo[id(function)]
    new.__defaults__ = copy.deepcopy(function.__defaults__, memo)
    new.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
    for old, cell in zip(function.__closure__ or (), new.__closure__ or (), strict=True):
        if (value := _content(old)) is not _ABSENT:
            cell.cell_contents = copy.deepcopy(value, memo)
