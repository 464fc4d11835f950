"""What a graph expects to find when it runs, since tracing took it for granted."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..errors import SpecialisedError


class Expectation(nn.Module):
    """A check that a graph carries as a step of its own: it returns nothing, and may raise.

    It is a module, so that it survives copying, pickling and another trace. It has no tensors.
    """

    _is_impure = True  # for FX: not dead code, though nothing reads what it returns

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message

    def __call__(self, *values: Any) -> Any:
        """Check the values; while FX traces, be recorded instead."""
        tracer: Any = next((each.tracer for each in values if isinstance(each, fx.Proxy)), None)
        if tracer is None:
            return super().__call__(*values)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), values, {})

    def extra_repr(self) -> str:
        """What is expected."""
        return self.message.partition("\n")[0]


class NotNone(Expectation):
    """Expects a value that is not None."""

    def forward(self, value: torch.Tensor | None) -> None:
        """Raise SpecialisedError where it is."""
        if value is None:
            raise SpecialisedError(self.message)


class LeftOut(Expectation):
    """Expects None."""

    def forward(self, value: torch.Tensor | None) -> None:
        """Raise SpecialisedError where it is anything else."""
        if value is not None:
            raise SpecialisedError(self.message)


class Equal(Expectation):
    """Expects a bool, a number or a string, of that type and value."""

    def __init__(self, message: str, expected: Any) -> None:
        super().__init__(message)
        self.expected = expected

    def forward(self, value: Any) -> None:
        """Raise SpecialisedError where it is anything else."""
        if type(value) is not type(self.expected) or value != self.expected:
            raise SpecialisedError(self.message)


class NotSame(Expectation):
    """Expects two values, or a value and a constant, not to be the same object."""

    def forward(self, value: Any, other: Any) -> None:
        """Raise SpecialisedError where they are."""
        if value is other:
            raise SpecialisedError(self.message)


class OfType(Expectation):
    """Expects a value that is, or is not, an instance of some types."""

    def __init__(self, message: str, types: Any, answer: bool) -> None:
        super().__init__(message)
        self.types, self.answer = types, answer
        self.is_tensor = answer is issubclass(torch.Tensor, types)

    def forward(self, value: Any) -> None:
        """Raise SpecialisedError where it is otherwise."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            if isinstance(value, torch.Tensor) != self.is_tensor:
                raise SpecialisedError(self.message)
        elif isinstance(value, self.types) is not self.answer:
            raise SpecialisedError(self.message)


class Mode(Expectation):
    """Expects to be in the mode, training or not, that it is made in.

    Its argument is not looked at. By that it is seen when a graph is traced again.
    """

    def __init__(self, message: str, training: bool) -> None:
        super().__init__(message)
        self.expected = training
        self.train(training)

    def forward(self, value: Any) -> None:
        """Raise SpecialisedError where the mode has changed."""
        if self.training != self.expected:
            raise SpecialisedError(self.message)


class GradMode(Expectation):
    """Expects gradients to be enabled, or disabled. Its argument is not looked at, as in `Mode`."""

    def __init__(self, message: str, enabled: bool) -> None:
        super().__init__(message)
        self.expected = enabled

    def forward(self, value: Any) -> None:
        """Raise SpecialisedError where it is otherwise."""
        if torch.is_grad_enabled() != self.expected:
            raise SpecialisedError(self.message)
