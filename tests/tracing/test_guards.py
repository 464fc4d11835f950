"""What a forward asks that a graph answers only once: the same as the model, or refused."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import threading
from typing import Any, Optional

import nets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fxrewrite as fxr
from fxrewrite.tracing.guard_modules import Expectation

X = nets.random_input((2, 4, 5, 5))
M = nets.random_input((2, 4, 5, 5), seed=1)


class Body(nn.Module):
    """A convolution and a batch norm; what a forward asks is up to what derives from it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nets.conv(), nets.bn()

    def body(self, x: Any) -> Any:
        return self.bn(self.conv(x))


class OptionalMask(Body):
    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        y = self.body(x)
        if mask is None:
            return y
        return y * mask


class RequiredMask(Body):
    def forward(self, x: Any, mask: Any) -> Any:
        y = self.body(x)
        return y if mask is None else y * mask


def exists(value: Any) -> bool:
    return value is not None


class AskedByAHelper(Body):
    def forward(self, x: Any, mask: Any = None) -> Any:
        y = self.body(x)
        return y * mask if exists(mask) else y


class AskedFarAway(Body):
    """The jump is so far that it takes two instructions."""

    def forward(self, x: Any, mask: Any = None) -> Any:
        y = self.body(x)
        if mask is not None:
            y = y + 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10 + 11 + 12 + 13 + 14 + 15 + 16 + 17 + 18
            y = y + 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10 + 11 + 12 + 13 + 14 + 15 + 16 + 17 + 18
            y = y + 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10 + 11 + 12 + 13 + 14 + 15 + 16 + 17 + 18
            y = y + 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10 + 11 + 12 + 13 + 14 + 15 + 16 + 17 + 18
            y = y + 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10 + 11 + 12 + 13 + 14 + 15 + 16 + 17 + 18
            y = y + 1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 + 10 + 11 + 12 + 13 + 14 + 15 + 16 + 17 + 18
        return y


class ListOrTensor(Body):
    def forward(self, x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            x = x[0] * 2
        return self.body(x)


class TensorOrNot(Body):
    def forward(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            x = x[0] * 2
        return self.body(x)


class IsTensor(Body):
    def forward(self, x: Any) -> Any:
        return self.body(x + 1 if torch.is_tensor(x) else x[0])


class ByType(Body):
    def forward(self, x: Any) -> Any:
        return self.body(x[0] if type(x) is list else x)


class IsTrue(Body):
    def forward(self, x: Any, flag: Any = False) -> Any:
        y = self.body(x)
        return y + 1 if flag is True else y


class Branching(Body):
    def forward(self, x: Any, scale: Any = 2.0, flag: Any = False, mode: Any = "same") -> Any:
        y = self.body(x) * scale
        if flag:
            y = y + 1
        return y if mode == "same" else y * 3


class InASet(Body):
    def forward(self, x: Any, mode: Any = "same") -> Any:
        y = self.body(x)
        return y * 3 if mode in {"triple", "thrice"} else y


class InADictionary(Body):
    def forward(self, x: Any, mode: Any = "same") -> Any:
        return self.body(x) * {"same": 1.0, "triple": 3.0}.get(mode, 2.0)


class PartOfAnArgument(Body):
    def forward(self, x: Any) -> Any:
        y = self.body(x["x"])
        if x["mask"] is None:
            return y
        return y * x["mask"]


class TwoThatMayBeOne(Body):
    def forward(self, x: Any, mask: Any) -> Any:
        y = self.body(x)
        return y * 2 if x is mask else y * mask


class Matching(Body):
    def forward(self, x: Any) -> Any:
        match x:
            case [first, *_]:
                return self.body(first)
            case _:
                return self.body(x)


class Outer(nn.Module):
    """What its submodule is asked is about an argument of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = OptionalMask(), ListOrTensor()

    def forward(self, x: Any, mask: Any = None) -> Any:
        return self.inner(self.other(x), mask=mask)


class ByModeOfDropout(Body):
    def forward(self, x: Any) -> Any:
        return F.dropout(self.body(x), training=self.training)


class ByMode(Body):
    def forward(self, x: Any) -> Any:
        y = self.body(x)
        return (y, x) if self.training else y


MODELS = [each for each in [*Body.__subclasses__(), Outer] if each.__module__ == __name__]
NO_GRAPH = (ByType, Matching)  # which ask what no step of a graph can
# Of each kind of argument; not all are what a model takes, and then it raises.
CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((X,), {}),
    ((X[:1],), {}),
    ((X, M), {}),
    ((X, None), {}),
    ((X,), {"mask": M}),
    ((X, X), {}),
    (([X],), {}),
    (((X, M),), {}),
    ((X, True), {}),
    ((X, 3.0), {}),
    ((X, 2.0, True), {}),
    ((X,), {"flag": True}),
    ((X,), {"mode": "triple"}),
    ((X, "triple"), {}),
    ((X, "other"), {}),
    (({"x": X, "mask": M},), {}),
    (({"x": X, "mask": None},), {}),
    ((None,), {}),
    ((nn.Parameter(X),), {}),
]


def model_of(kind: Any) -> nn.Module:
    return nets.randomise(kind()).double()


def outcome(model: Any, args: Any, kwargs: Any) -> Any:
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:
        return error


def is_right(expected: Any, found: Any) -> bool:
    """Whether a rewritten model did what the model does, or refused."""
    if isinstance(found, fxr.errors.SpecialisedError) or isinstance(expected, Exception):
        return isinstance(found, Exception)
    if type(expected) is not type(found):
        return False
    both = (expected, found) if isinstance(expected, tuple) else ((expected,), (found,))
    return all(torch.allclose(*each, atol=1e-9) for each in zip(*both, strict=True))


@pytest.mark.parametrize("into", ["graph", "modules", None])
@pytest.mark.parametrize("kind", MODELS)
def test_on_other_arguments_it_does_the_same_or_refuses(kind: Any, into: Any) -> None:
    """Whatever is passed, in either mode; and as the model is called by default, it runs."""
    model = model_of(kind)
    if into == "graph" and kind in NO_GRAPH:
        with pytest.raises(fxr.errors.TraceError, match=r"test_guards\.py"):
            fxr.rewrite(model, "conv_bn", into=into)
        return
    made, report = fxr.rewrite(model, "conv_bn", into=into)
    assert report.applied or kind is Branching  # which can't be traced as it is
    refused = 0
    for args, kwargs in CALLS:
        found = outcome(made, args, kwargs)
        assert is_right(outcome(model, args, kwargs), found), (args, kwargs, found)
        refused += isinstance(found, fxr.errors.SpecialisedError)
    assert refused == 0 or isinstance(made, fx.GraphModule)
    expected = outcome(model, (X,), {})
    if not isinstance(expected, Exception):
        assert torch.allclose(made(X), expected)


@pytest.mark.parametrize("kind", [ByModeOfDropout, ByMode])
@pytest.mark.parametrize("training", [False, True])
def test_a_graph_that_read_its_mode_refuses_the_other_one(kind: Any, training: bool) -> None:
    model = model_of(kind).train(training)
    made, report = fxr.rewrite(model, "conv_bn")
    assert report.into == "graph"
    assert "its mode is taken for granted" in str(report)
    model.bn.eval()
    made.eval() if training else made.train()
    with pytest.raises(fxr.errors.SpecialisedError, match=r"self\.training"):
        made(X)
    made.train(training)
    made(X)


@pytest.mark.parametrize("kind", [ByModeOfDropout, ByMode])
def test_a_module_tree_takes_either_mode(kind: Any) -> None:
    model = model_of(kind)
    made, _ = fxr.rewrite(model, "conv_bn", into="modules")
    for mode in (True, False):
        made.train(mode), model.train(mode).bn.eval()
        assert is_right(outcome(model, (X,), {}), outcome(made, (X,), {}))


def test_the_mode_of_a_part_alone_counts_too() -> None:
    made, _ = fxr.rewrite(nets.randomise(nn.Sequential(ByMode(), nn.Tanh())), "conv_bn")
    made.get_submodule("0").train()
    with pytest.raises(fxr.errors.SpecialisedError, match="this graph of ByMode"):
        made(X.float())


def test_a_check_of_a_part_that_a_leaf_contains_stands_outside_of_the_leaf() -> None:
    """The leaf is the model's own module, and gets no new member."""

    def forward(m: Any, x: Any) -> Any:
        return m.whole(x) + m.whole.inner(x)

    model = nets.Forward(forward, whole=nn.Sequential()).double()
    model.whole.add_module("inner", inner := model_of(ByModeOfDropout))
    made, report = fxr.Rewriter("conv_bn", into="graph", leaf_modules=["whole"]).rewrite(model)
    assert torch.allclose(made(X), model(X))
    assert not hasattr(inner, "expect")
    assert [each.check for each in report.assumptions] == ["expect"]
    made.train()
    with pytest.raises(fxr.errors.SpecialisedError):
        made(X)


class NeedsItsInput(Body):
    """All may be left out, but then it raises."""

    def forward(self, x: Any = None, flag: Any = None, more: Any = False) -> Any:
        if x is None:
            raise ValueError("x has to be given")
        flag = flag if flag is not None else False
        y = self.body(x)
        return (y, x) if flag or more else y


def test_what_a_model_does_not_run_without_is_not_left_out() -> None:
    model = model_of(NeedsItsInput)
    made, report = fxr.rewrite(model, "conv_bn", into="graph", expect={"conv_bn": 1})
    assert torch.allclose(made(X), model(X))
    assert {each.argument for each in report.assumptions} == {"x", "flag", "more"}
    for args in ((None,), (X, True), (X, None, True)):
        with pytest.raises(fxr.errors.SpecialisedError):
            made(*args)


def test_the_error_says_what_was_asked_where_and_what_to_do() -> None:
    made, report = fxr.rewrite(model_of(OptionalMask), "conv_bn", into="graph")
    with pytest.raises(fxr.errors.SpecialisedError) as error:
        made(X, M)
    line = OptionalMask.forward.__code__.co_firstlineno + 2
    said = str(error.value)
    assert "this graph of OptionalMask was traced where mask is None, its default" in said
    assert f"{__file__}:{line}: if mask is None:" in said
    assert "into='modules'" in said
    assert "mask is None, its default, at" in str(report)
    assert report.assumptions[0].argument == "mask"


def test_what_can_not_be_checked_is_an_error_that_says_where() -> None:
    with pytest.raises(fxr.errors.TraceError, match=r"x\[0\] if type\(x\) is list else x") as error:
        fxr.rewrite(model_of(ByType), "conv_bn", into="graph")
    assert "ByType can't be one graph because of ByType, at" in str(error.value)


def test_without_into_what_an_argument_decides_goes_into_the_module_tree() -> None:
    made, report = fxr.rewrite(model_of(OptionalMask), "conv_bn")
    assert (report.into, type(made)) == ("modules", OptionalMask)
    assert "asked for, so that the rules went into the module tree" in str(report)


class AsksOfItself(Body):
    """None of this depends on the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.parts = None, [None, 1]

    def forward(self, x: Any, scale: Any = 2.0) -> Any:
        if self.down is not None:
            x = self.down(x)
        y = self.body(x)
        features = [y, x]
        if isinstance(features, Tensor) or y is None or isinstance(self.conv, nn.Linear):
            return x
        for each in self.parts:
            y = y if each is None else y + each
        return y * scale if exists(self.bn) and hasattr(self, "bn") else y


def test_what_the_arguments_do_not_decide_needs_no_check() -> None:
    made, report = fxr.rewrite(model_of(AsksOfItself), "conv_bn")
    assert (report.into, report.assumptions) == ("graph", ())
    assert not any(isinstance(each, Expectation) for each in made.modules())
    assert torch.allclose(made(X, scale=3.0), made(X) * 1.5)


def test_an_argument_that_nothing_asks_of_is_free() -> None:
    """Only `flag` and `mode` decide the way, so `scale` may be given."""
    made, _ = fxr.rewrite(model_of(Branching), "conv_bn", into="graph")
    assert torch.allclose(made(X, 3.0), made(X) * 1.5)
    with pytest.raises(fxr.errors.SpecialisedError, match="flag is False, its default"):
        made(X, flag=True)


def refusals(made: Any) -> list[bool]:
    """Whether it refuses a mask, a list, and the other mode; called by default, it runs."""
    made(X)
    found = [isinstance(outcome(made, args, {}), Exception) for args in ((X, M), ([X],))]
    made.train()
    found.append(isinstance(outcome(made, (X,), {}), Exception))
    made.eval()
    return found


class Everything(Body):
    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        if isinstance(x, Tensor) and mask is None:
            x = x + 1
        return F.dropout(self.body(x), training=self.training)


def again(made: Any) -> Any:
    other, _ = fxr.rewrite(made, "conv_bn", expect={"conv_bn": 0})
    assert other.code == made.code
    return other


def without_dead_code(made: Any) -> Any:
    made.graph.eliminate_dead_code()
    made.recompile()
    return made


KEEP = {
    "copy": copy.deepcopy,
    "pickle": lambda made: pickle.loads(pickle.dumps(made)),
    "trace": fx.symbolic_trace,
    "rewrite": again,
    "dead code": without_dead_code,
    "script": torch.jit.script,
    "state dict": lambda made: made.load_state_dict(made.state_dict()) and made,
    "compile": functools.partial(torch.compile, backend="eager"),
    "inside a model": lambda made: fxr.rewrite(nn.Sequential(made).eval(), "conv_bn")[0],
}


@pytest.mark.parametrize("how", KEEP)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_the_checks_survive(how: str) -> None:
    made, _ = fxr.rewrite(model_of(Everything), "conv_bn", into="graph")
    assert refusals(made) == [True, True, True]
    assert refusals(KEEP[how](made)) == [True, True, True]


def test_a_graph_with_checks_can_be_exported() -> None:
    made, _ = fxr.rewrite(model_of(Everything), "conv_bn", into="graph")
    for strict in (True, False):
        program = torch.export.export(made, (X,), strict=strict)
        assert torch.allclose(program.module()(X), made(X))
        assert isinstance(outcome(program.module(), (X, M), {}), Exception)
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(X), made(X))


def test_a_trace_function_that_was_there_stays_and_hears_of_the_forward() -> None:
    heard = []

    def mine(frame: Any, event: str, value: Any) -> Any:
        heard.append((frame.f_code.co_name, event))
        return mine

    before = sys.gettrace()
    sys.settrace(mine)
    try:
        _, report = fxr.rewrite(model_of(OptionalMask), "conv_bn")
        assert sys.gettrace() is mine
    finally:
        sys.settrace(before)
    assert report.into == "modules"
    assert ("body", "line") in heard


def test_a_thread_that_traces_is_the_only_one_that_is_watched() -> None:
    """Another one's trace function is its own."""
    seen = []
    inner = OptionalMask.forward

    class Telling(OptionalMask):
        def forward(self, x: Any, mask: Any = None) -> Any:
            thread = threading.Thread(target=lambda: seen.append(sys.gettrace()))
            thread.start()
            thread.join()
            return inner(self, x, mask)

    fxr.rewrite(model_of(Telling), "conv_bn")
    assert set(seen) == {None}


class OptionalMaskInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = OptionalMask()

    def forward(self, x: Tensor, mask: Any = None) -> Tensor:
        return self.inner(x, mask)


class RunsForwards(fx.Tracer):
    """A tracer that runs the forward of what it traces through by itself."""

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)
        return m.forward(*args, **kwargs)


class MakesArguments(fx.Tracer):
    """A tracer that calls the forward without a word to the methods that FX has for it."""

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        def call(*_: Any) -> Any:
            proxies = [self.create_proxy("placeholder", name, (), {}) for name in ("x", "mask")]
            return type(root).forward(root, *proxies)

        self.create_args_for_root = lambda *_: (call, [])  # type: ignore[method-assign]
        return super().trace(root, concrete_args)


@pytest.mark.parametrize("tracer", [fx.Tracer, RunsForwards, MakesArguments])
def test_what_a_forward_asks_is_seen_whatever_the_tracer(tracer: type[fx.Tracer]) -> None:
    _, report = fxr.Rewriter("conv_bn", tracer=tracer).rewrite(model_of(OptionalMaskInside))
    assert report.into == "modules"


def test_what_fx_does_for_a_call_is_not_watched() -> None:
    """It asks nothing of a value, and would be several times slower."""
    seen = []

    class Telling(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            seen.append(sys.gettrace())
            return super().is_leaf_module(m, module_qualified_name)

    fxr.Rewriter("conv_bn", tracer=Telling).rewrite(model_of(OptionalMaskInside))
    assert set(seen) == {None}


class Scaled(nn.BatchNorm2d):
    """A norm whose forward is its own, so that nobody knows what it gives."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class AsksOfASize(Body):
    """As TensorFlow's padding of timm does: a size is a tensor in ONNX's export alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled(4)

    @staticmethod
    def half(size: Any) -> Any:
        return (size / 2).ceil() if isinstance(size, Tensor) else (size + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.scaled(self.body(x))
        height, width = y.size()[-2:]
        return y[..., : self.half(height), : self.half(y.shape[-1])] * width


@pytest.mark.parametrize("into", ["graph", "modules", None])
def test_a_size_is_no_tensor_whatever_it_is_the_size_of(into: Any) -> None:
    """Of what an unknown module gives, too."""
    model = model_of(AsksOfASize)
    made, report = fxr.rewrite(model, "conv_bn", X, into=into)
    assert len(report.applied) == 1
    torch.testing.assert_close(made(X), model(X), rtol=1e-4, atol=1e-5)


class AsksOfAnActivation(Body):
    """As timm's HRNet does: the head takes a list of features or one."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Any:
        y = self.act(self.body(x))
        return y[-1] if isinstance(y, list) else y


def test_what_an_activation_gives_is_a_tensor_in_place_or_not() -> None:
    """So the model is one graph by default, and nothing is taken for granted."""
    model = model_of(AsksOfAnActivation)
    made, report = fxr.rewrite(model, "conv_bn")
    assert (report.into, len(report.applied), report.assumptions) == ("graph", 1, ())
    torch.testing.assert_close(made(X), model(X), rtol=1e-4, atol=1e-5)


# A random forward is a few steps, each of which asks something of an argument or of the mode.
ASKING: dict[str, Any] = {
    "a is None": lambda m, y, a, b: y if a is None else y + 1,
    "b is not None": lambda m, y, a, b: y * 2 if b is not None else y,
    "a is True": lambda m, y, a, b: -y if a is True else y,
    "a is b": lambda m, y, a, b: y + 3 if a is b else y,
    "isinstance(a, Tensor)": lambda m, y, a, b: y + 5 if isinstance(a, Tensor) else y,
    "isinstance(b, (bool, int))": lambda m, y, a, b: y * 7 if isinstance(b, (bool, int)) else y,
    "isinstance(y, Tensor)": lambda m, y, a, b: y + 0.5 if isinstance(y, Tensor) else y,
    "type(a) is list": lambda m, y, a, b: y + 9 if type(a) is list else y,
    "a == 'up'": lambda m, y, a, b: y + 11 if isinstance(a, str) and a == "up" else y,
    "b in {...}": lambda m, y, a, b: y - 2 if isinstance(b, str) and b in {"up", "down"} else y,
    "if b": lambda m, y, a, b: y * 0.1 if b is not None and b is not False else y,
    "hasattr(a, 'shape')": lambda m, y, a, b: y + 13 if hasattr(a, "shape") else y,
    "exists(a)": lambda m, y, a, b: y + 17 if exists(a) else y,
    "[each]": lambda m, y, a, b: y + sum([1.0 for each in (a, b) if each is not None]),
    "training": lambda m, y, a, b: y + 19 if m.training else y,
    "a part": lambda m, y, a, b: m.inner(y, a),
    "a part, by name": lambda m, y, a, b: m.inner(y, mask=b),
    "add": lambda m, y, a, b: y + a if a is not None and b is None else y,
}
VALUES = [None, True, False, 1, 2.5, "up", "down", M, X, [M], (M,), {"a": M}]


def asking(steps: list[str], default: Any) -> nn.Module:
    """A model whose forward is made of these steps; it may be called without `a` and `b`."""

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.inner = nets.conv(), nets.bn(), OptionalMask()

        def forward(self, x: Any, a: Any = default, b: Any = None) -> Any:
            y = self.bn(self.conv(x))
            for step in steps:
                y = ASKING[step](self, y, a, b)
            return y

    return model_of(Asking)


@pytest.mark.slow
@given(
    st.lists(st.sampled_from([*ASKING]), min_size=1, max_size=4),
    st.sampled_from([None, False, 1, "up"]),
    st.lists(
        st.tuples(st.lists(st.sampled_from(VALUES), max_size=2), st.booleans()),
        min_size=3,
        max_size=8,
    ),
    st.sampled_from(["graph", "modules", None]),
)
def test_whatever_a_forward_asks_the_answer_is_not_silently_another(
    steps: list[str], default: Any, calls: list[Any], into: Any
) -> None:
    """Random forwards on random arguments, in eval and training mode."""
    model = asking(steps, default)
    try:
        made, _ = fxr.rewrite(model, "conv_bn", into=into)
    except fxr.errors.TraceError:
        assert into == "graph"
        return
    for args, training in [([], False), *calls]:
        model.train(training), made.train(training)
        for each in model.modules():
            if isinstance(each, nn.BatchNorm2d):
                each.eval()  # which is folded, and has no training mode afterwards
        for each in made.modules():
            if isinstance(each, nn.BatchNorm2d):
                each.eval()
        expected, found = (outcome(each, (X, *args), {}) for each in (model, made))
        assert is_right(expected, found), (steps, args, training, found)
        if not args and not training:  # as it is called by default, it runs
            assert isinstance(found, Exception) is isinstance(expected, Exception), found
