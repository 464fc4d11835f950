"""Whether a subclass behaves as its base does."""

from __future__ import annotations

import inspect

from torch import nn

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
