"""Helpers for a module tree, as passes over `torch.fx` graphs written by hand use them."""

from .module_utils.names import fresh_name, parent_name
from .module_utils.tree import delete_submodule, get_submodule, replace_node_module, set_submodule

_parent_name = parent_name
"""The name under which passes know `parent_name` from torch."""

__all__ = [
    "_parent_name",
    "delete_submodule",
    "fresh_name",
    "get_submodule",
    "parent_name",
    "replace_node_module",
    "set_submodule",
]
