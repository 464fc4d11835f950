"""Qualified names: the parent of one, and one that nothing has yet."""

from __future__ import annotations

from collections.abc import Container


def parent_name(target: str) -> tuple[str, str]:
    """Split a qualified name into its parent's name and the name below it.

    >>> parent_name("layer1.0.conv"), parent_name("conv")
    (('layer1.0', 'conv'), ('', 'conv'))
    """
    parent, _, name = target.rpartition(".")
    return parent, name


def fresh_name(base: str, taken: Container[str]) -> str:
    """The base name, or else the first of `base_1`, `base_2`, ... that is not taken.

    >>> fresh_name("conv", {"conv", "conv_1"})
    'conv_2'
    """
    name, count = base, 0
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name
