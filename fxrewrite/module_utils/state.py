"""What modules and tensors hold at one moment, to compare with later and to put back."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import compress
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn

from .torch_private import TENSOR_HOOKS, FakeTensor, version_of

_ABSENT = object()
_ATOMS = frozenset({bool, int, float, str, type(None)})
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
# Where every module keeps its parameters, buffers, children and hooks.
REGISTRIES = tuple(k for k, v in nn.Module().__dict__.items() if isinstance(v, dict | set))
_registries_of: Callable[[dict[str, Any]], tuple[Any, ...]] = operator.itemgetter(*REGISTRIES)
_UNNAMED = frozenset({"_parameters", "_buffers", "_modules"})
_ATTRIBUTES = ("requires_grad", "grad", *(n for n in TENSOR_HOOKS if hasattr(torch.Tensor, n)))
_attributes_of = operator.attrgetter(*_ATTRIBUTES)

_Path: TypeAlias = "tuple[_Path, str] | None"
_Part = TypeVar("_Part", bound="_Container | _Tensor")


class Snapshot:
    """All that is reached from some modules and tensors: attributes, registries, contents.

    As a context, it puts everything back when an error leaves it. It is entered twice where Ctrl-C
    may come while it does so.

    >>> layer = nn.Linear(2, 2)
    >>> before = Snapshot([layer])
    >>> layer.weight.data.zero_().sum()
    tensor(0.)
    >>> before.difference()
    'the tensor Linear.weight'
    >>> before.restore()
    ['Linear.weight']

    Args:
        things: modules, tensors and containers of them; by name, or else each by its type's name.
        skipped: those of a module's registries, such as `_parameters`, whose tensors stay unseen.
        contents: whether to compare numbers and put them back. Without, which takes microseconds,
            a tensor has changed where torch counts a write; it counts none by `.data` or NumPy.
    """

    def __init__(
        self,
        things: Iterable[Any] | Mapping[str, Any],
        *,
        skipped: Collection[str] = (),
        contents: bool = True,
    ) -> None:
        self._skipped, self._contents = skipped, contents
        self._parts: list[_Container | _Tensor] = []
        self._seen: dict[int, Any] = {}
        pairs = ((type(each).__name__, each) for each in things)
        for name, each in things.items() if isinstance(things, Mapping) else pairs:
            self._visit((None, name), each)

    def _visit(self, path: _Path, value: Any) -> None:
        if type(value) in _ATOMS or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, nn.Module):
            self._visit_module(path, value)
        elif isinstance(value, torch.Tensor):
            self._parts.append(tensor := _Tensor(path, value, self._contents))
            for each in (*tensor.attributes, None if tensor.is_bare else value.__dict__):
                self._visit(path, each)
        elif isinstance(value, dict):
            self._parts.append(_Container(path, value))
            for key, each in value.items():
                self._visit((path, str(key)), each)
        elif isinstance(value, tuple | list | set | deque):
            if not isinstance(value, tuple):
                self._parts.append(_Container(path, value))
            if not _ATOMS.issuperset(map(type, value)):
                for each in value:
                    self._visit(path, each)

    def _visit_module(self, path: _Path, module: nn.Module) -> None:
        state = module.__dict__
        self._parts.append(_Module(path, module))
        for key in compress(REGISTRIES, _registries(state)):
            if key in self._skipped:
                self._parts.append(_Container(path, state[key]))
            else:
                self._visit(path if key in _UNNAMED else (path, key), state[key])
        for key, each in state.items():
            if key in _OF_EVERY_MODULE or type(each) in _ATOMS:
                continue
            if type(each) is not tuple or not _ATOMS.issuperset(map(type, each)):
                self._visit((path, key), each)

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self.restore()

    def restore(self) -> list[str]:
        """Put everything back as it was, and name what was changed, or at least written to."""
        found = []
        for part, name in changes(self._parts):
            found.append(name)
            part.restore()
        return found

    def difference(self, *, versions: bool = True) -> str | None:
        """The first thing that has changed since, in words, or None.

        Args:
            versions: whether a tensor that was written to, and holds what it held, has changed.
        """
        for part, name in changes(self._parts, versions):
            return f"the tensor {name}" if isinstance(part, _Tensor) else name
        return None


def changes(parts: Iterable[_Part], versions: bool = True) -> Iterator[tuple[_Part, str]]:
    """The parts that have changed, and what has changed of each, by name."""
    for part in parts:
        if (key := part.change(versions)) is not None:
            yield part, ".".join(filter(None, _keys((part.path, key))))


def _keys(path: _Path) -> list[str]:
    return [] if path is None else [*_keys(path[0]), path[1]]


class _Container:
    """The entries of a dictionary, list, set or deque."""

    __slots__ = ("before", "now", "path")

    def __init__(self, path: _Path, container: Any) -> None:
        self.path, self.now, self.before = path, container, container.copy()

    def change(self, versions: bool) -> str | None:
        """The first key whose entry is not the same object any more; empty for what has no keys."""
        now, before = self.now, self.before
        if isinstance(now, dict):
            if list(now) == list(before) and all(map(operator.is_, now.values(), before.values())):
                return None
            keys = {**before, **now}
            others = (k for k in keys if before.get(k, _ABSENT) is not now.get(k, _ABSENT))
            return next(map(str, others), "")
        if isinstance(now, set):
            return None if now == before else ""
        return None if len(now) == len(before) and all(map(operator.is_, now, before)) else ""

    def restore(self) -> None:
        self.now.clear()
        add = self.now.update if isinstance(self.now, dict | set) else self.now.extend
        add(self.before)


class _Module(_Container):
    """A module's type and attributes, and which of its registries are filled."""

    __slots__ = ("filled", "module", "type")

    def __init__(self, path: _Path, module: nn.Module) -> None:
        state = module.__dict__
        self.path, self.now, self.before = path, state, state.copy()
        self.module, self.type = module, type(module)
        self.filled = [*filter(None, _registries(state))]

    def change(self, versions: bool) -> str | None:
        if type(self.module) is not self.type:
            return "__class__"
        changed = _Container.change(self, versions)
        if changed is None and len([*filter(None, _registries(self.now))]) > len(self.filled):
            return self._newly_filled()[0]
        return changed

    def restore(self) -> None:
        object.__setattr__(self.module, "__class__", self.type)
        super().restore()
        for name in self._newly_filled():
            self.now[name].clear()

    def _newly_filled(self) -> list[str]:
        was_filled = set(map(id, self.filled))
        pairs = zip(REGISTRIES, _registries(self.now), strict=True)
        return [name for name, each in pairs if each and id(each) not in was_filled]


def _registries(state: dict[str, Any]) -> tuple[Any, ...]:
    try:
        return _registries_of(state)
    except KeyError:  # what torch.jit made of a module lacks some
        return tuple(map(state.get, REGISTRIES))


class _Tensor:
    """A tensor's place in memory, what it holds, its gradient and its hooks."""

    __slots__ = ("attributes", "copy", "data", "is_bare", "path", "place", "tensor", "version")

    def __init__(self, path: _Path, tensor: torch.Tensor, contents: bool) -> None:
        self.path, self.tensor = path, tensor
        self.attributes, self.is_bare = _attributes_of(tensor), not tensor.__dict__
        self.version = version_of(tensor)
        self.place = _place(tensor) if contents and _is_dense(tensor) else None
        # A detached tensor keeps the storage when the original is given another one.
        self.data = tensor.detach() if contents else None
        self.copy = self.data.clone() if self.data is not None else None

    def change(self, versions: bool) -> str | None:
        now, place = self.tensor, self.place
        if (
            all(map(operator.is_, _attributes_of(now), self.attributes))
            and not (self.is_bare and now.__dict__)
            # Of other layouts torch tells nothing but that it wrote to them.
            and (version_of(now) == self.version or not (versions or place is None))
            and (place is None or _place(now) == place)
            and (place is None or self.copy is None or torch.equal(bits(now), bits(self.copy)))
        ):
            return None
        return ""

    def restore(self) -> None:
        if self.data is not None and self.copy is not None:
            self.tensor.data = self.data
            self.tensor.data.copy_(self.copy)
        if self.is_bare:
            self.tensor.__dict__.clear()
        for name, before in zip(_ATTRIBUTES, self.attributes, strict=True):
            if getattr(self.tensor, name) is not before:
                setattr(self.tensor, name, before)


def _is_dense(tensor: torch.Tensor) -> bool:
    has_data = not tensor.is_meta and not isinstance(tensor, FakeTensor)
    is_plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested
    return has_data and is_plain


def _place(tensor: torch.Tensor) -> Any:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor holds as bytes, so that NaN equals itself, and 0.0 is not -0.0."""
    if tensor.is_meta:
        return torch.empty(0)
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.flatten().contiguous().view(torch.uint8)
