"""Whether a subclass behaves as its base does, and families of types that may grow."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

# A subclass may define these and still behave as its base does.
_HARMLESS = frozenset(
    "__init__ __doc__ __module__ __qualname__ __annotations__ __annotate__ __annotate_func__ "
    "__annotations_cache__ __abstractmethods__ _abc_impl __dict__ __weakref__ __constants__ "
    "__parameters__ __orig_bases__ __firstlineno__ __static_attributes__ __repr__ extra_repr "
    "_get_name reset_parameters".split()
)

_ADDITIONS = (classmethod, staticmethod, bool, int, float, str, tuple)


def overridden(found: type[nn.Module], base: type[nn.Module]) -> str | None:
    """The name of something of its base's behaviour that a subclass overrides, or None.

    What it adds under names of its own changes nothing, and neither does what it is built with.

    >>> overridden(nn.ReLU6, nn.Hardtanh)
    >>> overridden(nn.BatchNorm2d, nn.BatchNorm1d.__base__)
    '_check_input_dim'
    """
    stated = {name for cls in base.__mro__ for name in inspect.get_annotations(cls)}
    for cls in found.__mro__[: found.__mro__.index(base)]:
        for name, value in vars(cls).items():
            is_new = not hasattr(base, name) and name not in stated
            adds = callable(value) or isinstance(value, _ADDITIONS)
            if name not in _HARMLESS and not (is_new and adds):
                return name
    return None


def differs(module: nn.Module, wanted: tuple[type[nn.Module], ...]) -> str | None:
    """How a module of a subclass of one of the wanted types behaves differently, or None.

    >>> class Doubled(nn.ReLU):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> differs(Doubled(), (nn.ReLU, nn.GELU))
    'is a Doubled, whose forward is not that of ReLU'
    """
    kind: Any = type(module)  # mypy takes the hash of a class for that of its instances
    reason = _differs(kind, wanted, FamilyType.additions)
    families: Any = [each for each in wanted if isinstance(each, FamilyType)]
    proof = next((each.proof for each in families if each.proof), None)
    why = None if reason is None or proof is None else proof(module)
    return reason if proof is None else why and f"{reason}: {why}"


@functools.lru_cache(maxsize=4096)
def _differs(
    found: type[nn.Module], wanted: tuple[type[nn.Module], ...], additions: int
) -> str | None:
    plain = found.__bases__[0] if found.__module__ == parametrize.__name__ else found
    bases = [_member(base, plain) for base in wanted if issubclass(plain, base)]
    reasons = [_differs_from(plain, base) for base in bases if base is not None]
    return None if None in reasons else reasons[0]


def _member(base: Any, found: type[nn.Module]) -> Any:
    """Whose behaviour a type must have: of a family, its nearest member's, which it may lack."""
    return base.member(found) if isinstance(base, FamilyType) else base


def _differs_from(found: type[nn.Module], base: type[nn.Module]) -> str | None:
    if base.forward is nn.Module.forward:  # an abstract family, whose members differ by intent
        return None
    name = overridden(found, base)
    return name and f"is a {found.__name__}, whose {name} is not that of {base.__name__}"


class FamilyType(type):
    """The type of a family: `isinstance` and `issubclass` ask for membership.

    `additions` counts those to all families, so that what was learned of one may be forgotten.
    A `proof` gives the reason why a module that overrides something may not stand for its base.
    """

    additions = 0
    proof: Callable[[Any], str | None] | None = None

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        """A family of its own, without members."""
        super().__init__(name, bases, namespace)
        cls._members: dict[type[nn.Module] | str, Any] = {}

    def add(cls, member: type[nn.Module] | str, known: Any = True) -> None:
        """Take in a module type, and each subclass that is no member by itself.

        It is given itself or by its full name, with what `known_of` is to give back.
        """
        cls._members[member] = known
        FamilyType.additions += 1

    def member(cls, kind: type[Any]) -> type[nn.Module] | None:
        """The nearest of a type's bases, itself included, that was added; or None."""
        return next((base for base in kind.__mro__ if cls._key(base) is not None), None)

    def known_of(cls, module: nn.Module) -> Any:
        """What the family knows of a module's type; raises KeyError for what is no member."""
        kind = type(module)
        return cls._members[cls._key(cls.member(kind) or kind) or kind]

    def __str__(cls) -> str:
        """The family's name in words, and a member's; nothing if it stands for no others."""
        first = next(iter(cls._members), "")
        name = str(getattr(first, "__name__", first)).rpartition(".")[2]
        words = re.sub("(?<=[a-z])(?=[A-Z])", " ", cls.__name__).lower()
        return f"{words} such as {name}" if name else "" if cls.proof else words

    def __instancecheck__(cls, instance: Any) -> bool:
        """Whether a module's type, or a base of it, was added."""
        return cls.member(type(instance)) is not None

    def __subclasscheck__(cls, kind: type[Any]) -> bool:
        """Whether a type, or a base of it, was added; a family is a subclass of itself."""
        return cls in kind.__mro__ or cls.member(kind) is not None

    def _key(cls, kind: type[Any]) -> type[nn.Module] | str | None:
        name = f"{kind.__module__}.{kind.__qualname__}"
        return kind if kind in cls._members else name if name in cls._members else None


class Family(nn.Module, metaclass=FamilyType):
    """A step's type that stands for any of its members.

    Members are added at any time, also by name, so that a rule can speak of a library's modules
    and leave it to others to import the library. As with a plain type, a subclass of a member
    matches if it overrides nothing of the member's behaviour.

    >>> class Gate(Family):
    ...     "Modules that squash their input."
    >>> Gate.add(nn.Sigmoid)
    >>> Gate.add("some_library.layers.HardGate")
    >>> isinstance(nn.Sigmoid(), Gate), isinstance(nn.ReLU(), Gate)
    (True, False)
    """
