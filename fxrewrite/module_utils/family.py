"""Families of module types that may grow, and name types that nothing has imported."""

from __future__ import annotations

from typing import Any

from torch import nn


class FamilyType(type):
    """The type of a family: `isinstance` and `issubclass` ask for membership.

    `additions` counts those to all families, so that what was learned of one may be forgotten.
    """

    additions = 0

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> None:
        """A family of its own, without members."""
        super().__init__(name, bases, namespace)
        cls._members: dict[type[nn.Module] | str, Any] = {}

    def add(cls, member: type[nn.Module] | str, known: Any = True) -> None:
        """Take in a module type, and with it each subclass that is no member by itself.

        Args:
            member: the type, or its name with that of the module that defines it.
            known: what the family knows of it, which `known_of` gives back.
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
        """The family's name, with that of a member."""
        first = next(iter(cls._members), None)
        name = (
            first.rpartition(".")[2] if isinstance(first, str) else getattr(first, "__name__", "")
        )
        return f"{cls.__name__} such as {name}" if name else cls.__name__

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
