"""What became of each key of a model's state dict."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import attrs
from torch import nn

from ..module_utils.names import parent_name
from ..module_utils.torch_private import unsaved_buffers

How = Literal["same", "changed", "moved", "folded", "gone"]


@attrs.frozen
class TensorFate:
    """What became of a tensor of the model, and under which keys the result has it.

    `same`: the same tensor under the same key. `changed`: another tensor under the same key.
    `moved`: the same tensor under another key. `folded`: the tensors of these keys were computed
    with it, as far as the rule used it. `gone`: nothing of the result was made with it.
    """

    how: How
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        """In words."""
        words = {"moved": "moved to ", "folded": "folded into "}.get(self.how, "")
        return f"{words}{', '.join(self.keys)}" if words else self.how


class StateDictMap(Mapping[str, TensorFate]):
    """For each key of the model's state dict, what became of it in the result.

    It is told apart when it is asked for; what both state dicts have is noted at once.

    >>> model = nn.Sequential(nn.ReLU(), nn.Linear(1, 1, bias=False))
    >>> print(StateDictMap(model, nn.Sequential(*model[1:]), {})["1.weight"])
    moved to 0.weight

    Args:
        model: the model.
        made: the result.
        rewritten: the names of the modules that were matched, with what each became.
    """

    def __init__(self, model: Any, made: Any, rewritten: Mapping[str, str]) -> None:
        self._before, self._now = _saved(model), _saved(made)
        self._rewritten = rewritten

    def __getitem__(self, key: str) -> TensorFate:
        return self._became[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._before)

    def __len__(self) -> int:
        return len(self._before)

    @functools.cached_property
    def _became(self) -> dict[str, TensorFate]:
        now = self._now
        keys_of: dict[int, list[str]] = {}
        for key, tensor in now.items():
            keys_of.setdefault(tensor, []).append(key)
        of_module: dict[str, list[str]] = {}
        for key in now:
            owner, _ = parent_name(key)
            while owner:
                of_module.setdefault(owner, []).append(key)
                owner, _ = parent_name(owner)
        result = {}
        for key, tensor in self._before.items():
            if now.get(key) == tensor:
                result[key] = TensorFate("same", (key,))
            elif key in now:
                result[key] = TensorFate("changed", (key,))
            elif tensor in keys_of:
                result[key] = TensorFate("moved", tuple(keys_of[tensor]))
            else:
                owner, _ = parent_name(key)
                keys = tuple(of_module.get(_end(owner, self._rewritten), ()))
                result[key] = TensorFate("folded", keys) if keys else TensorFate("gone")
        return result


def _end(name: str, became: Mapping[str, str]) -> str:
    """Where the chain of rewrites that starts with a module of that name came to an end."""
    while name and name not in became:  # a tensor of a part of what was matched, or of none
        name, _ = parent_name(name)
    seen: set[str] = set()
    while name in became and name not in seen:
        seen.add(name)
        name = became[name]
    return name


def _saved(model: Any) -> dict[str, int]:
    """Each key that a state dict has, by whatever number of names, and its tensor's identity."""
    if not isinstance(model, nn.Module):  # an exported program
        return {key: id(tensor) for key, tensor in model.state_dict.items()}
    found: dict[str, int] = {}

    def add(module: nn.Module, prefix: str) -> None:
        for key, tensor in module._parameters.items():
            if tensor is not None:
                found[prefix + key] = id(tensor)
        unsaved = unsaved_buffers(module) if module._buffers else ()
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in unsaved:
                found[prefix + key] = id(buffer)
        for key, child in module._modules.items():
            if child is not None:
                add(child, f"{prefix}{key}.")

    add(model, "")
    return found
