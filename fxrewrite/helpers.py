"""Helpers for rules and passes: for a module tree, and what a module's forward does."""

from .module_utils.names import fresh_name, parent_name
from .module_utils.tree import delete_submodule, get_submodule, replace_node_module, set_submodule
from .tracing.ways import ways

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
    "ways",
]
