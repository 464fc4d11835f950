"""What a guard notices, and that it is in nobody's way."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any, ClassVar

import pytest
import torch
from nets import X, bn, conv, randomise
from torch import fx, nn
from torch.nn.utils import parametrize

import fxrewrite as fxr
from fxrewrite.errors import GuardError
from fxrewrite.targets.guard import Pair
from fxrewrite.targets.guarded_modules import guarded

ERRORS = {"raise": ZeroDivisionError, "interrupt": KeyboardInterrupt}


class Block(nn.Module):
    """A convolution and a norm, of which either may be called alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.way = conv(), bn(), "both"
        self.other: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way in ERRORS:
            self.conv(x)
            raise ERRORS[self.way]
        if self.way == "other":
            return self.other(x)
        y = self.conv(x)
        if x.sum() < -1e9 or self.way == "conv":
            return y
        return self.bn(x if self.way == "norm" else y)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return randomise(nn.Sequential(Block(), nn.ReLU(), Block())).double().eval()


@pytest.fixture
def made(model: nn.Module) -> Any:
    made, report = fxr.rewrite(model, "conv_bn", X, expect={"conv_bn": 2})
    assert all(each.assurance == "guarded" for each in report.applied)
    with torch.no_grad():
        torch.testing.assert_close(made(X), model(X), rtol=1e-9, atol=1e-9)
    return made


@pytest.mark.parametrize(
    ("way", "said"),
    {
        "conv": "what 2.conv gave was not given to 2.bn",
        "norm": "2.bn was called on something else than 2.conv gave",
        "other": "what 2.conv gave was not given to 2.bn",
    }.items(),
)
def test_it_names_both_modules_and_where_they_are_called(made: Any, way: str, said: str) -> None:
    made[2].way, made[2].other = way, made[2].conv.forward
    with pytest.raises(GuardError) as error:
        made(X)
    assert str(error.value).startswith(said)
    assert f"2.conv is called at {__file__}:" in str(error.value)
    assert ": y = self.conv(x)" in str(error.value)
    made[2].way = "both"
    made(X)


def test_a_call_outside_of_the_model_is_noticed_at_the_next_one(made: Any) -> None:
    """While somebody still has what the first module gave."""
    kept = made[0].conv(X)
    with pytest.raises(GuardError, match=r"0.conv was called twice, and 0.bn not in between"):
        made[0](X)
    del kept
    with pytest.raises(GuardError, match=r"0.bn was called on something else"):
        made[0].bn(X)
    made[0](X)


@pytest.mark.parametrize("way", ERRORS)
def test_a_forward_that_raises_leaves_nothing_pending(made: Any, way: str) -> None:
    """And what is called apart afterwards is noticed, after Ctrl-C as well."""
    made[2].way = way
    with pytest.raises(ERRORS[way]):
        made(X)
    made[2].way = "both"
    made(X)
    made[2].way = "conv"
    with pytest.raises(GuardError, match="was not given"):
        made(X)


def test_it_is_noticed_while_another_error_is_handled(made: Any) -> None:
    made[2].way = "conv"
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        with pytest.raises(GuardError, match="was not given"):
            made(X)


class Catches(nn.Module):
    """Goes another way if a part of it raises."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> Any:
        try:
            return self.part(x)
        except Exception:
            return x


def test_an_error_that_the_model_catches_is_raised_in_the_end() -> None:
    model = randomise(Catches(Block())).double().eval()
    made, _ = fxr.rewrite(model, "conv_bn", X, into="modules", expect={"conv_bn": 1})
    made(X)
    made.part.way = "norm"
    with pytest.raises(GuardError, match="was called on something else"):
        made(X)
    made.part.way = "both"
    made(X)


@fxr.pattern
class Act:
    """An activation, and what it reads."""

    x: fxr.Value
    act: nn.ReLU


@fxr.rule(where=[fxr.known_rank("x")])
def tanh(m: Act) -> fxr.Replace:
    """A rule that asks for a rank."""
    return fxr.Replace(nn.Tanh())


def test_so_is_one_of_a_tensor_that_was_not_expected() -> None:
    made, _ = fxr.rewrite(Catches(nn.ReLU()).eval(), tanh, X, into="modules", expect={"tanh": 1})
    made(X)
    with pytest.raises(GuardError, match="part was called on a tensor of 3 dimensions"):
        made(X[0])


def test_hooks_that_are_added_later_work(made: Any) -> None:
    """What a hook puts in the place of the value is not what was given."""
    seen = []
    hook = made[0].conv.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = made(X)
    assert len(seen) == 1
    hook.remove()
    hook = made[0].bn.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with pytest.raises(GuardError, match="was called on something else"):
        made(X)
    hook.remove()
    assert torch.equal(made(X), expected)


class Listed(nn.Conv2d):
    """A convolution that knows its subclasses, and has state that it does not pickle."""

    known: ClassVar[list[str]] = []

    def __init_subclass__(cls) -> None:
        Listed.known.append(cls.__name__)

    def __getstate__(self) -> Any:
        return {**self.__dict__, "pickled": True}


def test_a_guarded_module_is_what_it_was() -> None:
    """An instance of its type, which has no further subclass; and it pickles as its type says."""
    made: Any = nn.Sequential(Listed(4, 4, 1), nn.Identity()).double()
    expected = made(X)
    guarded(made, [Pair("0", "1", ("", ""))], {})
    assert isinstance(made[0], Listed)
    assert isinstance(made[1], nn.Identity)
    assert not Listed.known
    other = pickle.loads(pickle.dumps(made))
    assert other[0].pickled
    assert torch.equal(other(X), expected)
    with pytest.raises(GuardError):
        other[1](X)
    plain: Any = fxr.unguarded(other)
    assert [*map(type, plain)] == [Listed, nn.Identity]


def test_a_guarded_module_may_be_parametrized(made: Any) -> None:
    expected = made(X)
    parametrize.register_parametrization(made[0].conv, "weight", nn.Identity())
    assert torch.equal(copy.deepcopy(made)(X), expected)
    assert torch.equal(fxr.unguarded(made)(X), expected)
    made[0].way = "conv"
    fxr.unguarded(made)(X)
    with pytest.raises(GuardError):
        made(X)


def test_each_thread_has_its_own(made: Any) -> None:
    expected, found = made(X), []

    def run() -> None:
        found.extend(torch.equal(made(X), expected) for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [True] * 80


@pytest.mark.parametrize(
    "kind",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: copy.deepcopy(m).to(torch.float32).to(torch.float64),
    ],
    ids=["deepcopy", "pickle", "to"],
)
def test_a_copy_is_guarded_by_itself(made: Any, model: Any, kind: Any) -> None:
    """And its state dict has nothing of it."""
    other = kind(made)
    other(X)
    other[0].way = "conv"
    with pytest.raises(GuardError):
        other(X)
    made(X)
    expected = {k for k in model.state_dict() if ".bn." not in k}
    assert other.state_dict().keys() == expected


def test_it_is_not_in_what_is_exported_or_compiled(made: Any) -> None:
    with torch.no_grad():
        graphs = [
            torch.compile(made[0].conv, backend="eager", fullgraph=True),
            torch.export.export(made[0].conv, (X,)).module(),
        ]
        expected = fxr.unguarded(made)[0].conv(X)
        for each in graphs:
            torch.testing.assert_close(each(X), expected)


def test_without_guard_the_modules_are_plain(made: Any) -> None:
    """What was guarded stays so."""
    plain = fxr.unguarded(made)
    assert torch.equal(plain(X), made(X))
    plain[0].way = made[0].way = "conv"
    plain(X)
    with pytest.raises(GuardError):
        made(X)
    assert plain[0].conv.weight is made[0].conv.weight
    torch.jit.script(plain[0].conv)


def test_a_change_in_place_is_seen_where_the_code_may_make_one() -> None:
    """Torch counts writes; in inference mode it does not, so that the guard can't tell."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        if x.sum() < -1e9:
            y = m.act(y)
        return m.bn(y)  # type: ignore[no-any-return]

    from nets import Forward

    model = Forward(forward, conv=conv(), bn=bn(), act=nn.ReLU(inplace=True)).double()
    made, _ = fxr.rewrite(model, "conv_bn", X, expect={"conv_bn": 1})
    with torch.no_grad():
        made(X)
        with pytest.raises(GuardError, match="what conv gave was changed in place before bn"):
            made(X - 1e9)
    with torch.inference_mode(), pytest.raises(GuardError, match="counts no writes in inference"):
        made(X.clone())


class Detour(nn.Module):
    """Calls its convolution at a further place, whose value may go elsewhere as well."""

    way = "seen"

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv(), bn()

    def forward(self, x: torch.Tensor) -> Any:
        if x.sum() < -1e9:
            return x
        if self.way == "alone":
            return self.bn(self.conv(x))
        if self.way == "read":
            y = self.conv(x)
            return self.bn(y) + y
        if self.way == "handed on":
            y = self.conv(x)
            return self.norm(y) + y
        if self.way == "by another":
            return self.norm(self.conv(x))
        return self.bn(self.conv(x))

    def norm(self, y: torch.Tensor) -> Any:
        return self.bn(y)


COPIES = [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]


class Through(nn.Module):
    """Calls a function between convolution and norm, and without a mask something else."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.bn, self.way = conv(), bn(), way

    def forward(self, x: torch.Tensor, mask: Any = None) -> Any:
        y = self.conv(x)
        if self.way == "another call" and mask is None:
            return self.bn(x)
        if self.way == "a method" and mask is None:
            return self.norm(x)
        if self.way == "another value" and mask is None:
            y = x
        y = y.contiguous()
        if self.way == "another value behind it" and mask is None:
            y = x
        return self.bn(y)

    def norm(self, x: torch.Tensor) -> Any:
        return self.bn(x)


@pytest.mark.parametrize(
    "way", ["", "another call", "a method", "another value", "another value behind it"]
)
@pytest.mark.parametrize("inputs", [None, (X, X)], ids=["", "example inputs"])
def test_what_goes_through_a_function_must_be_next_on_each_way(way: str, inputs: Any) -> None:
    """The guard can't follow a value through it."""
    model = randomise(Through(way)).double().eval()
    made, _ = fxr.rewrite(model, "conv_bn", inputs, into="modules")
    for given in ((X,), (X, X)):
        torch.testing.assert_close(made(*given), model(*given), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", ["read", "handed on", "by another"])
@pytest.mark.parametrize("how", COPIES, ids=["itself", "copied", "pickled"])
def test_at_a_place_not_seen_the_value_must_go_nowhere_else(way: str, how: Any) -> None:
    """Where the function there shows so, the result is the same; else the guard raises."""
    model = randomise(Detour()).double().eval()
    made = how(fxr.rewrite(model, "conv_bn", X, expect={"conv_bn": 1})[0])
    for safe in ("seen", "alone"):
        model.way = made.way = safe
        torch.testing.assert_close(made(X), model(X), rtol=1e-9, atol=1e-9)
    made.way = way
    with pytest.raises(GuardError, match="what conv gave at a place not seen may go elsewhere"):
        made(X)


@fxr.pattern
class Chain:
    """A convolution and its norm."""

    conv: nn.Conv2d
    bn: nn.BatchNorm2d


@fxr.rule
def becomes_a_graph(m: Chain) -> fxr.Replace:
    """A rule whose new module has a class that torch writes to."""
    return fxr.Replace(fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 1).double())))


def test_what_can_not_be_guarded_is_refused() -> None:
    _, report = fxr.rewrite(Block().double().eval(), becomes_a_graph, X)
    assert "which a GraphModule or a ScriptModule can't notice" in str(report.refused[0].reason)
    model = nn.Sequential(conv(), bn()).double().eval()
    fxr.rewrite(model, becomes_a_graph, into="modules", expect={"becomes_a_graph": 1})


def test_what_was_traced_as_a_whole_and_asks_nothing_has_no_guard() -> None:
    model = randomise(nn.Sequential(conv(), bn(), nn.ReLU()))
    made, report = fxr.rewrite(model, "conv_bn", into="modules", expect={"conv_bn": 1})
    assert not any(each.assurance == "guarded" for each in report.applied)
    assert type(made[0]) is nn.Conv2d
    assert not any(each._forward_hooks for each in made.modules())
