"""Which nodes write in place, and which may hand on the storage they were given."""

from __future__ import annotations

from torch import fx, nn

from ..module_utils.hooks import runs_its_forward_alone
from ..module_utils.subclassing import overridden
from .op_traits import ALL, FIRST, traits_of, traits_of_module
from .overlay import Overlay


def written_by(node: fx.Node, view: Overlay) -> list[fx.Node]:
    """The values that a node writes to in place."""
    if node.op == "call_module":
        return node.all_input_nodes[:1] if writes_in_place(view.module(node)) else []
    written: list[fx.Node] = []
    if "out" in node.kwargs:
        fx.node.map_arg(node.kwargs["out"], written.append)
    traits = traits_of(node, None)
    if not traits.writes:
        return written
    needs_names = traits.writes != (FIRST,) or traits.writes_if is not None
    given = view.arguments(node) if needs_names else {}
    if "0" in given or ALL in traits.writes:  # no signature fits, or torch does not tell
        return node.all_input_nodes
    for name in traits.written(given):  # the first argument may be a list of values
        first = node.args[:1] or node.all_input_nodes[:1]
        fx.node.map_arg(first if name is FIRST else given.get(name), written.append)
    return list(dict.fromkeys(written))


def lends(node: fx.Node, view: Overlay) -> list[fx.Node]:
    """The values whose storage a node's output may share."""
    if is_fresh(node, view):
        return []
    return written_by(node, view) if traits_of(node, None).hands_on else node.all_input_nodes


def is_fresh(node: fx.Node, view: Overlay) -> bool:
    """Whether a node's output is sure to share no storage with its inputs."""
    if node.op == "call_module":
        return is_fresh_module(view.module(node))
    if node.op in ("call_function", "call_method"):
        return traits_of(node, None).fresh and not written_by(node, view)
    return True


def is_fresh_module(module: nn.Module | None) -> bool:
    """Whether a module's output is sure to share no storage with its input."""
    return any(traits_of_module(e).fresh and not _is_in_place(e) for e in _steps(module))


def hands_on(module: nn.Module | None) -> bool:
    """Whether a module in eval mode is sure to return its very input."""
    return traits_of_module(module).hands_on


def writes_in_place(module: nn.Module | None) -> bool:
    """Whether a module, or one in it, may write to its input."""
    steps = _steps(module)
    decides = (e for e in steps if _is_in_place(e) or traits_of_module(e).fresh)
    return _is_in_place(next(decides, None))


def _steps(module: nn.Module | None) -> list[nn.Module | None]:
    """What a module calls one after the other, in a plain Sequential; of any other, itself."""
    if not isinstance(module, nn.Sequential) or overridden(type(module), nn.Sequential):
        return [module]
    is_plain = all(map(runs_its_forward_alone, module.modules()))
    return [step for each in module for step in _steps(each)] if is_plain else [module]


def _is_in_place(module: nn.Module | None) -> bool:
    """Whether a module, or one in it, says that it writes in place."""
    modules = () if module is None else module.modules()
    return any(each.__dict__.get("inplace") is True for each in modules)
