"""Without a private name of torch nothing goes wrong in silence."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.passes import shape_prop
from torch.nn import functional as F
from torch.nn.modules import module as nn_module

import fxrewrite as fxr
from fxrewrite import patterns
from fxrewrite.ir import aliases, op_traits
from fxrewrite.ir import arguments as ir_arguments
from fxrewrite.ir.graph_view import GraphView
from fxrewrite.ir.shape_inference import record_shapes
from fxrewrite.module_utils import torch_private
from fxrewrite.module_utils.state import Snapshot

PACKAGE = Path(fxr.__file__).parent
FILE = Path(torch_private.__file__)
# Documented by torch as places of its own, or not private at all but names of operators.
ALLOWED = {
    *("_parameters", "_buffers", "_modules", "_forward_pre_hooks"),
    *("_native_batch_norm_legit_no_training", "_to_copy", "_unsafe_view"),
}
# It reads what `nn.Module.__call__` does, and the next version of this package is without it.
LEFT_OUT = PACKAGE / "targets" / "reading"


def conv_bn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()).eval()


def loaded() -> ModuleType:
    """The file once more, as if nobody had imported it yet."""
    spec = importlib.util.spec_from_file_location("torch_private_again", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def take_away(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Delete what has that qualified name, in torch."""
    holder, _, name = place.rpartition(".")
    if holder == "torch.nn.Module" and name != "_compiled_call_impl":
        init: Any = nn.Module.__init__

        def without(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            del self.__dict__[name]

        monkeypatch.setattr(nn.Module, "__init__", without)
        return
    owner: Any = None
    parts = holder.split(".")
    for i in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            owner = getattr(owner, part)
        break
    monkeypatch.delitem(sys.modules, place, raising=False)
    if isinstance(owner, ModuleType):
        monkeypatch.setattr(owner, "__getattr__", gone, raising=False)
    monkeypatch.delattr(owner, name)


def gone(name: str) -> Any:
    raise AttributeError(name)


@pytest.mark.parametrize("place", torch_private.NEEDED)
def test_what_is_needed_is_named_by_the_error(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "torch.utils._pytree":  # it is imported as a module
        monkeypatch.setitem(sys.modules, place, None)
        monkeypatch.delattr(torch.utils, "_pytree")
    else:
        take_away(monkeypatch, place)
    with pytest.raises(ImportError, match=rf"torch \S+ does not have: .*{place.split('.')[-1]}"):
        loaded()


@pytest.mark.parametrize("place", torch_private.NEEDED_TO_COMPILE)
def test_what_is_needed_to_compile_is_asked_for_then(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_away(monkeypatch, place)
    module = loaded()
    with pytest.raises(ImportError, match=place.split(".")[-1]):
        getattr(module, place.rpartition(".")[2].lstrip("_"))


def test_the_rest_has_no_such_name() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_sort"):
        torch_private.nothing_of_the_sort  # type: ignore[attr-defined] # noqa: B018


def _global_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of the registries is gone, nothing is folded."""
    assert len(fxr.plan(conv_bn(), "conv_bn").applied) == 1
    for name in GLOBAL_HOOKS:
        with monkeypatch.context() as patch:
            patch.delattr(nn_module, name)
            report = fxr.plan(conv_bn(), "conv_bn")
        assert not report.applied
        assert "does not tell whether there are global module hooks" in str(report)


GLOBAL_HOOKS = [
    each for each in dir(nn_module) if re.fullmatch("_global_.*ward(_pre)?_hooks", each)
]


def _tensor_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor counts as one with a hook."""
    assert not torch_private.has_tensor_hook(torch.ones(1))
    monkeypatch.setattr(torch_private, "TENSOR_HOOKS", ("_hooks_of_another_name",))
    report = fxr.plan(conv_bn(), "conv_bn")
    assert not report.applied
    assert "a tensor with a hook" in str(report)


def _version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor counts as written to."""

    class Unversioned:
        def is_inference(self) -> bool:
            return False

    tensor: Any = Unversioned()
    assert torch_private.version_of(tensor) != torch_private.version_of(tensor)
    monkeypatch.setattr("fxrewrite.module_utils.state.version_of", lambda _: object())
    assert Snapshot([torch.ones(1)], contents=False).difference() == "the tensor Tensor"


def _schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator counts as writing to all that it reads."""
    op_traits.traits_of_function.cache_clear()
    graph = fx.Graph()
    added = graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),))
    graph.output(added)
    view = GraphView(nn.Module(), graph, {})
    assert not aliases.written_by(added, view)

    class WithoutSchema:
        pass

    operator: Any = WithoutSchema()
    assert torch_private.written_arguments(operator) is None
    op_traits.traits_of_function.cache_clear()
    monkeypatch.setattr(op_traits, "written_arguments", lambda _: None)
    assert aliases.written_by(added, view) == list(added.all_input_nodes)
    op_traits.traits_of_function.cache_clear()


def _boolean_dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such calls have arguments without names, and nothing takes them for a step."""
    take_away(monkeypatch, "torch._jit_internal.boolean_dispatched")
    known = loaded().boolean_dispatched
    assert not known
    ir_arguments._signatures.cache_clear()
    monkeypatch.setattr(ir_arguments, "boolean_dispatched", known)
    graph = fx.Graph()
    pooled = graph.call_function(F.max_pool2d, (graph.placeholder("x"), 2))
    assert "input" not in ir_arguments.arguments(pooled, F.max_pool2d)
    assert not ir_arguments.is_default(F.max_pool2d, "return_indices", False)
    ir_arguments._signatures.cache_clear()


def _tensor_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new node has no such metadata, rather than that of the node before it."""
    for is_there in (True, False):
        traced = fx.symbolic_trace(conv_bn())
        x = torch.ones(1, 3, 4, 4)
        shape_prop.ShapeProp(traced).propagate(x)
        record_shapes(traced, [x])
        if not is_there:
            monkeypatch.delattr(shape_prop, "_extract_tensor_metadata")
        folded, _ = fxr.rewrite(traced, "conv_bn", expect={"conv_bn": 1})
        (conv,) = (node for node in folded.graph.nodes if "0" in str(node.target))
        assert ("tensor_meta" in conv.meta) is is_there


def _erased(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is searched for the node."""
    graph = fx.Graph()
    kept, erased = graph.placeholder("kept"), graph.placeholder("erased")
    graph.erase_node(erased)

    class Unmarked:
        def __init__(self, node: fx.Node) -> None:
            self.graph = node.graph

    unmarked: Any = Unmarked(erased)
    for each in (erased, unmarked):
        assert torch_private.is_erased(each)
    assert not torch_private.is_erased(kept)


def _tracer_cls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result has torch's usual tracer, as have graphs that were not traced."""
    graph = fx.symbolic_trace(conv_bn()).graph
    assert torch_private.tracer_class(graph) is not None
    del graph._tracer_cls
    assert torch_private.tracer_class(graph) is None


def _fx_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a forward made counts as its change of the model, which is not traced then."""

    class Adding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones(2)

    assert fxr.plan(Adding(), "conv_bn").stops == ()
    monkeypatch.setattr("fxrewrite.tracing.tracer.FX_CONSTANTS", ("_by_another_name",))
    with pytest.raises(fxr.errors.TraceError, match="its forward changes _tensor_constant0"):
        fxr.rewrite(Adding(), "conv_bn", into="graph")


def _non_persistent_buffers_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state dict is asked."""
    module = nn.Module()
    module.register_buffer("saved", torch.ones(1))
    module.register_buffer("left_out", torch.ones(1), persistent=False)
    module.__dict__.pop("_non_persistent_buffers_set")
    # torch itself would read it as well
    monkeypatch.setattr(module, "state_dict", lambda: {"saved": module.saved})
    assert torch_private.unsaved_buffers(module) == {"left_out"}


def _orig_mod(monkeypatch: pytest.MonkeyPatch) -> None:
    """The type tells as well."""
    compiled = torch.compile(conv_bn())
    assert isinstance(compiled, nn.Module)
    assert torch_private.is_torch_compiled(compiled)
    compiled._modules["renamed"] = compiled._modules.pop("_orig_mod")
    assert torch_private.is_torch_compiled(compiled)


def _static_input_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer is an input like any other, which rules are not given as a constant."""
    node = fx.Graph().placeholder("running_mean")
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "guarded"}
    assert torch_private.is_static_input(node)
    node.meta["tensor_dict"] = {"by_another_name": "guarded"}
    assert not torch_private.is_static_input(node)


REPLACED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    **{f"torch.nn.modules.module.{name}": _global_hooks for name in GLOBAL_HOOKS},
    "torch.Tensor._backward_hooks": _tensor_hooks,
    "torch.Tensor._post_accumulate_grad_hooks": _tensor_hooks,
    "torch.Tensor._version": _version,
    "torch._ops.OpOverload._schema": _schema,
    "torch._jit_internal.boolean_dispatched": _boolean_dispatched,
    "torch.fx.passes.shape_prop._extract_tensor_metadata": _tensor_metadata,
    "torch.fx.Node._erased": _erased,
    "torch.fx.Graph._tracer_cls": _tracer_cls,
    "torch.fx.Tracer._tensor_constant": _fx_constants,
    "torch.fx.Tracer._torchbind_obj": _fx_constants,
    "torch.nn.Module._non_persistent_buffers_set": _non_persistent_buffers_set,
    "torch._dynamo.OptimizedModule._orig_mod": _orig_mod,
    "torch._dynamo._dynamo_static_input_type": _static_input_type,
}


@pytest.mark.parametrize("place", torch_private.REPLACED)
def test_what_is_replaced_works_or_refuses(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    REPLACED[place](monkeypatch)


def test_a_new_kind_of_hook_counts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks are found by what their registries are called."""
    init: Any = nn.Module.__init__

    def with_more(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.__dict__["_sideways_hooks"] = {}

    monkeypatch.setattr(nn.Module, "__init__", with_more)
    assert "_sideways_hooks" in loaded().HOOKS


def private_names(path: Path) -> Iterator[str]:
    """The private names of torch in a file, as far as they can be told from the file's own."""
    tree = ast.parse(path.read_text())
    known = {part for place in torch_private.NAMES for part in place.split(".")}
    for each in (nn.Module(), torch.Tensor, fx.Node, fx.Graph(), fx.Tracer(), nn_module):
        known.update(dir(each))
    for each in ast.walk(tree):
        if isinstance(each, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in each.names]
            names += [each.module or ""] if isinstance(each, ast.ImportFrom) else []
            is_torch = any(name.partition(".")[0] == "torch" for name in names)
            parts = [part for name in names for part in name.split(".")]
            yield from (part for part in parts if is_torch and is_private(part))
        elif isinstance(each, ast.Attribute) and is_private(each.attr):
            is_own = isinstance(each.value, ast.Name) and each.value.id in ("self", "cls")
            whole = ast.unparse(each)
            if whole.startswith(("torch.", "nn.", "fx.", "F.")) or (
                each.attr in known and not is_own
            ):
                yield each.attr
        elif isinstance(each, ast.Constant) and each.value in known and is_private(each.value):
            yield str(each.value)


def is_private(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.startswith("_")
        and not name.startswith("__")
        and name.isidentifier()
    )


FILES = [
    each
    for folder in (PACKAGE, Path(patterns.__file__).parent)
    for each in sorted(folder.rglob("*.py"))
    if LEFT_OUT not in each.parents
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_private_names_stand_in_one_file(path: Path) -> None:
    found = set(private_names(path))
    listed = {part for name in torch_private.NAMES for part in name.split(".")}
    assert found <= (listed if path == FILE else ALLOWED)
