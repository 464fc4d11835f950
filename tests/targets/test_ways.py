"""On ways through a forward that were not seen, a module tree is right or raises GuardError."""

from __future__ import annotations

import itertools
import re
import sys
import types
from typing import Any

import nets
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from nets import X, bn, conv
from torch import nn

import fxrewrite as fxr
from fxrewrite.testing.written import compiled

# What a forward is called with: all of it is let loose on the model and on the rewritten one.
BATCHES = (X, X[:1])
WAYS = [
    {"flag": flag, "n": n, "mask": mask}
    for flag, n, mask in itertools.product([False, True], [1, 2], [None, 0.5])
]


class Part(nn.Module):
    """A convolution and a batch norm, under names and in a list, whose code is written later."""

    offset = torch.ones(1)

    def __init__(self, code: str, **members: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv(), bn(), nn.ReLU()
        self.layers = nn.ModuleList([conv(), bn()])
        self.seq = nn.Sequential(conv(), bn())
        self.both = [self.conv, self.bn]
        self.fixed, self.absent, self.sizes = True, None, [1, 2]
        self.kept = {"bn": 0}
        for name, member in members.items():
            setattr(self, name, member)
        self.code = code

    def extra_repr(self) -> str:
        return self.code


def made_of(code: str, **members: Any) -> Any:
    """A model whose methods are the functions of this code."""
    namespace: dict[str, Any] = {"torch": torch, "nn": nn, "__name__": "written"}
    compiled(code, namespace)
    methods = {k: v for k, v in namespace.items() if isinstance(v, types.FunctionType)}
    kind: Any = type("Written", (Part,), methods)
    return nets.randomise(kind(code, **members)).double().eval()


def forward(body: str, more: str = "") -> str:
    lines = "".join(f"    {line}\n" for line in body.strip("\n").splitlines())
    return f"def forward(self, x, flag=False, n=1, mask=None):\n{lines}{more}"


def outcome(model: nn.Module, x: torch.Tensor, way: dict[str, Any]) -> Any:
    """What the model gives or raises."""
    try:
        with torch.no_grad():
            return model(x.clone(), **way)
    except Exception as error:
        return type(error)


def guarded_ways(model: nn.Module, made: nn.Module) -> int:
    """On how many ways the guard raises; the two agree on all others that there are."""
    count = 0
    for x, way, training in itertools.product(BATCHES, WAYS, [False, True]):
        model.training = made.training = training  # of the model alone, not of its parts
        expected, found = outcome(model, x, way), outcome(made, x, way)
        if found is fxr.errors.GuardError:
            count += 1
        elif isinstance(expected, torch.Tensor):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        else:
            assert found == expected, way
    model.training = made.training = False
    return count


def rewritten(model: Any, applied: int, example: Any = None, guarded: bool = False) -> fxr.Report:
    made, report = fxr.rewrite(model, "conv_bn", example, into="modules")
    assert (guarded_ways(model, made) > 0) is guarded
    # In a model that is not traced, what nothing calls is a part by itself.
    idle = {"seq.1"} if report.stops and "self.seq" not in model.code else set()
    found = [each for each in report.applied if each.anchor not in idle]
    assert len(found) == applied, report
    return report


FOLDED = "y = self.bn(self.conv(x))\nif flag is True:\n    "
BY_NAME = (
    "for name in ('conv', 'bn'):\n    x = getattr(self, name)(x)\n"
    "    if name in self.kept:\n        return x\nreturn x"
)
# Ways on which the two calls are apart.
GUARDED = {
    "a return of something else": (
        "y = self.conv(x)\nif flag is True:\n    return x\ny = self.bn(y)\nreturn y"
    ),
    "an early return": "y = self.conv(x)\nif flag is True:\n    return y\nreturn self.bn(y)",
    "a branch without the norm": (
        "if mask is None:\n    y = self.conv(x)\nelse:\n    y = self.bn(self.conv(x))\nreturn y"
    ),
    "the batch size": (
        "y = self.conv(x)\nif flag is True and x.shape[0] == 1:\n    return y\nreturn self.bn(y)"
    ),
    "the mode": "y = self.conv(x)\nif self.training:\n    return y\nreturn self.bn(y)",
    "the norm on something else": "return self.bn(x if flag is True else self.conv(x))",
    "a loop": (
        "y = self.conv(x)\nfor _ in range(2 if flag is True else 1):\n    y = self.bn(y)\nreturn y"
    ),
    "a loop that is left": (
        "for layer in self.layers:\n    x = layer(x)\n    if flag is True:\n        break\nreturn x"
    ),
    "a lambda": "f = lambda t: self.conv(t)\n" + FOLDED + "y = f(y)\nreturn y",
    "a match": FOLDED + "match n:\n        case 1:\n            y = self.conv(y)\nreturn y",
    "an index": FOLDED + "y = self.both[0 if mask is None else 1](y)\nreturn y",
    "a computed name": FOLDED + "y = getattr(self, 'co' + 'nv')(y)\nreturn y",
    "a name that the caller computes": (
        FOLDED + "y = getattr(self, 'bn' if mask is None else 'conv')(y)\nreturn y"
    ),
    "a comprehension": FOLDED + "y = sum([m(y) for m in (self.conv, self.act)])\nreturn y",
    "all children": FOLDED + "y = list(self.children())[0](y)\nreturn y",
    "the part of a container": (
        "y = self.seq(x)\nif flag is True:\n    y = self.seq[0](y)\nreturn y"
    ),
    "an unknown function": FOLDED + "y = next(iter(self.modules())).conv(y)\nreturn y",
    "an attribute that is set": FOLDED + "self.other = self.conv\n    y = self.other(y)\nreturn y",
    "a key that is added": "if flag is True:\n    self.kept['conv'] = 1\n" + BY_NAME,
}
# What is not to be seen at run time.
REFUSED = {
    "a caught error": (
        "y = self.conv(x)\ntry:\n    if flag is True:\n        raise ValueError\n"
        "    y = self.bn(y)\nexcept ValueError:\n    pass\nreturn y"
    ),
    "both returned": "y = self.conv(x)\nreturn self.bn(y) + (y if flag is True else 0)",
    "a weight that is read": FOLDED + "y = y * self.conv.weight.mean()\nreturn y",
    "its type": "y = self.bn(self.conv(x))\nreturn y * isinstance(self.bn, nn.BatchNorm2d)",
    "all parameters": FOLDED + "y = y + sum(p.sum() for p in self.parameters())\nreturn y",
    "what an object is made of": FOLDED + "y = y + Holder(self.conv, 0).total\nreturn y",
}
HOLDER = (
    "class Holder:\n    def __init__(self, module, stride):\n"
    "        self.total = module.weight.sum() if stride == 0 else module.stride[0]\n"
)
# What the caller of a method decides, or the method itself when it calls itself.
GUARDED_IN_METHODS = {
    "a keyword that is taken out": (
        "return self.outer(x, flag, normed=True)",
        "def outer(self, x, flag, **options):\n    if flag is True:\n"
        "        options.pop('normed')\n    return self.inner(x, **options)\n"
        "def inner(self, x, normed=False):\n    y = self.conv(x)\n"
        "    return self.bn(y) if normed else y\n",
    ),
    "a key that is taken out": (
        "options = {'normed': True}\nif flag is True:\n    del options['normed']\n"
        "return self.inner(x, **options)",
        "def inner(self, x, normed=False):\n    y = self.conv(x)\n"
        "    return self.bn(y) if normed else y\n",
    ),
    "a method that calls itself": (
        "return self.bn(self.again(x, n))",
        "def again(self, x, n):\n    if n > 1:\n        x = self.again(x, n - 1)\n"
        "    return self.conv(x)\n",
    ),
    "a method that calls itself on what it made": (
        "return self.bn(self.again(x, n))",
        "def again(self, x, n):\n    y = self.conv(x)\n"
        "    return self.again(y, n - 1) if n > 1 else y\n",
    ),
    "an argument that may be the norm": (
        "modules = [self.bn] if flag is True else [self.act]\nreturn self.ends(x, *modules)",
        "def ends(self, x, last):\n    return last(self.bn(self.conv(x)))\n",
    ),
}


# With this line a forward can't be traced, and what it calls is seen in a run alone.
UNTRACED = "float(x.sum())\n"
# The example goes a way on which the two are apart.
CONTRADICTED = {"a branch without the norm"}


@pytest.mark.slow
@pytest.mark.parametrize("body", GUARDED.values(), ids=list(GUARDED))
def test_a_way_that_was_not_seen_is_right_or_guarded(body: str) -> None:
    """Whether the chain was traced or observed in a run, unless the run shows the two apart."""
    report = rewritten(made_of(forward(body, HOLDER)), 1, guarded=True)
    assert report.applied[-1].assurance == "guarded"
    is_seen = body not in map(GUARDED.get, CONTRADICTED)
    for more in ("", UNTRACED):
        model = made_of(forward(more + body, HOLDER))
        rewritten(model, int(is_seen), X, guarded=is_seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "methods"), GUARDED_IN_METHODS.values(), ids=list(GUARDED_IN_METHODS)
)
def test_a_way_through_methods_that_was_not_seen_is_guarded(body: str, methods: str) -> None:
    rewritten(made_of(forward(UNTRACED + body, methods)), 1, X, guarded=True)


@pytest.mark.parametrize("body", REFUSED.values(), ids=list(REFUSED))
def test_what_no_guard_can_see_stays(body: str) -> None:
    """Other readers of the value, or of the modules, in functions that the value goes through."""
    report = rewritten(made_of(forward(body, HOLDER)), applied=0)
    assert "<written" in report.refused[0].reason
    report = rewritten(made_of(forward(UNTRACED + body, HOLDER)), 0, X)
    assert report.stops[0].reason == "it makes a number of a value that only a real run has"


HELPER = "def helper(self, x, flag=False):\n    y = self.conv(x)\n"
APPLIED = {
    "in one branch": "if mask is None:\n    return x\nreturn self.bn(self.conv(x))",
    "a fixed attribute": (
        "y = self.conv(x)\nif self.absent is not None:\n    return y\n"
        "if self.fixed:\n    y = self.bn(y)\nreturn y"
    ),
    "a known loop": "for layer in self.layers:\n    x = layer(x)\nreturn x",
    "pairs": ("for c, b in zip(self.layers[:1], self.layers[1:]):\n    x = b(c(x)) + 1\nreturn x"),
    "by a fixed name": "for name in ('conv', 'bn'):\n    x = getattr(self, name)(x)\nreturn x",
    "keys of a dictionary": BY_NAME,
    "a pair on both sides": ("if mask is None:\n    return self.pair(x) * 2\nreturn self.pair(x)"),
    "whatever happens later": (
        "y = self.bn(self.conv(x))\ntry:\n    y = y + mask\nexcept TypeError:\n    pass\n"
        "return [y, y * 2][0] if flag is True else y"
    ),
}
APPLIED["a list that is copied and written to"] = (
    "sizes = self.sizes[:1]\nsizes[0] = 0\nmore = self.sizes.copy()\nmore[0] = 1\n"
    "return self.bn(self.conv(x))"
)
APPLIED |= {
    "by names of a dictionary": ("options = {'x': x, 'twice': flag}\nreturn self.named(**options)"),
    "arguments before those that nobody knows": "return self.among(self.conv(x), *[mask, flag])",
    "the type of parameters": (
        "y = x.to(next(self.parameters()).dtype)\nreturn self.bn(self.conv(y))"
    ),
    "which module it is": "y = self.bn(self.conv(x))\nreturn y * 2 if self.layers == self else y",
    "a tensor of the class": "y = self.bn(self.conv(x))\nreturn y + self.offset",
}
PAIR = "def pair(self, x):\n    return self.bn(self.conv(x))\n"
PAIR += "def among(self, x, *others):\n    return self.bn(x)\n"
PAIR += (
    "def named(self, x, twice):\n    return self.bn(self.conv(x)) * (2 if twice is True else 1)\n"
)
PAIR += HOLDER


@pytest.mark.parametrize("body", APPLIED.values(), ids=list(APPLIED))
def test_what_no_way_parts_is_rewritten(body: str) -> None:
    rewritten(made_of(forward(body, PAIR)), applied=1)
    is_called = body != APPLIED["in one branch"]
    rewritten(made_of(forward(UNTRACED + body, PAIR)), int(is_called), X)


LOOKED_AT = {
    "a convolution's padding": "x = x * self.conv.padding[0]\nreturn self.bn(self.conv(x))",
    "whether it is there": "return self.bn(self.conv(x)) if self.bn is not None else x",
    "its class": "return self.bn(self.conv(x)) if isinstance(self.conv, nn.Conv2d) else x",
    "the class of what is no module": (
        "x = x[0] if isinstance(x, list | tuple) or type(x) is list else x\n"
        "return self.bn(self.conv(x))"
    ),
    "a weight of what is not there": (
        "y = self.bn(self.conv(x))\nreturn y + self.gone.weight if flag is None else y"
    ),
    "by a function that is given it": "return self.bn(self.conv(padded(x, self.conv)))",
    "by one further in": "return self.bn(self.conv(handed(x, conv=self.conv)))",
}
IN_LAYERS = "for m in self.layers:\n    x = m(x) * 2 if {} else m(x)\nreturn x"
CHANGED = {
    "a norm's epsilon": "return self.bn(self.conv(x)) + self.bn.eps",
    "whether there is a bias": "return self.bn(self.conv(x)) + (self.conv.bias is None)",
    "an attribute that is set": (
        "if flag is True:\n    self.bn.eps = 1.0\nreturn self.bn(self.conv(x))"
    ),
    "an attribute that is counted up": (
        "if flag is True:\n    self.bn.eps += 1.0\nreturn self.bn(self.conv(x))"
    ),
    "a weight that is set": (
        "if flag is True:\n    self.conv.weight = nn.Parameter(self.conv.weight * 2)\n"
        "return self.bn(self.conv(x))"
    ),
    "a property": "return self.bn(self.conv(x)) + len(self.conv.state_dict())",
    "a weight in a list": "return self.bn(self.conv(x)) + self.both[0].weight.mean()",
    "a weight of a function's first argument": "return self.bn(first([self.conv], x))",
    "a weight in a list of a function": "return self.bn(self.conv(x)) * total([self.conv, x])",
    "a weight in a function": "return self.bn(self.conv(scaled(x, self.conv)))",
    "an epsilon in a function": "return self.bn(self.conv(near(x, self.bn)))",
    "a function that keeps it": "return self.bn(self.conv(kept(x, self.conv)))",
    "a function that takes any": "return self.bn(self.conv(whatever(x, conv=self.conv)))",
    "a function that calls itself": "return self.bn(self.conv(again(x, self.conv)))",
    "an unknown function": "return self.bn(self.conv(dict(p=padded)['p'](x, self.conv)))",
    "the norm's mode": "self.bn.train()\nreturn self.bn(self.conv(x))",
    "a mode of all": "self.eval()\nreturn self.bn(self.conv(x))",
    "an attribute of an item": "self.layers[1].eps = 1.0\nreturn self.layers[1](self.layers[0](x))",
    "an attribute of who knows what": (
        "for each in self.both:\n    each.eps = 1.0\nreturn self.bn(self.conv(x))"
    ),
    "a mode of who knows what": (
        "for each in self.both[:flag]:\n    each.train()\nreturn self.bn(self.conv(x))"
    ),
    "the type of who knows what": IN_LAYERS.format("type(m) is nn.BatchNorm2d"),
    "the class of who knows what": IN_LAYERS.format("m.__class__ is nn.Conv2d"),
    "types of a variable": "kinds = (nn.BatchNorm2d,)\n" + IN_LAYERS.format("isinstance(m, kinds)"),
    "types by another name": IN_LAYERS.format("isinstance(m, Norm)"),
    "what who knows what has": IN_LAYERS.format("hasattr(m, 'eps')"),
    "the type of a guarded convolution": (
        "return self.bn(self.conv(x)) * (2 if type(self.conv) is nn.Conv2d else 1)"
    ),
    "the norm's class": "return self.bn(self.conv(x)) * isinstance(self.bn, nn.BatchNorm2d)",
    "the type of what goes": "return self.bn(self.conv(x.to(self.bn.weight.dtype)))",
}
PADDED = """
def total(modules):
    return modules[0].weight.mean()
Norm = nn.BatchNorm2d
def near(x, norm):
    return x + norm.eps
def padded(x, conv):
    return x * (1 + conv.stride[0])
def handed(x, conv):
    return padded(x, conv)
def first(layers, x):
    x = x * layers[0].weight.mean()
    return layers[0](x)
def scaled(x, conv):
    return x * conv.weight.mean()
def kept(x, conv, known=[]):
    known.append(conv)
    return x
def whatever(x, **given):
    return x
def again(x, conv):
    return again(x, conv) if x is None else x
"""


@pytest.mark.parametrize("body", LOOKED_AT.values(), ids=list(LOOKED_AT))
def test_a_plain_attribute_may_be_read_that_stays_what_it_is(body: str) -> None:
    for more in ("", UNTRACED):
        rewritten(made_of(forward(more + body, PADDED)), 1, X)


@pytest.mark.parametrize("body", CHANGED.values(), ids=list(CHANGED))
def test_a_module_stays_whose_attribute_is_set_or_would_be_read_changed(body: str) -> None:
    for more in ("", UNTRACED):
        model = made_of(forward(more + body, PADDED))
        model.conv.bias = None
        rewritten(model, 0, X)


def test_a_forward_that_calls_itself() -> None:
    body = "if n > 1:\n    x = self.forward(x, flag, n - 1)\nreturn self.bn(self.conv(x))"
    rewritten(made_of(forward(body)), 1, X)


def test_a_value_goes_through_methods_that_take_and_return_it() -> None:
    body = "return self.bn(self.helper(x))"
    rewritten(made_of(forward(UNTRACED + body, HELPER + "    return y\n")), 1, X)
    kept = HELPER + "    self.kept = y\n    return y\n"
    report = rewritten(made_of(forward(UNTRACED + body, kept)), 0, X)
    assert "helper may also read it, at <written" in report.why("bn")


@pytest.mark.parametrize(
    ("body", "said"),
    {
        "y = self.conv(x)\ntry:\n    return self.bn(y)\nfinally:\n    self.last = y": "reads it",
        "y = z = self.conv(x)\nflag and (z := x)\nself.last = z\nreturn self.bn(y)": "read it",
        "try:\n    y = self.bn(self.conv(x))\nexcept* ValueError:\n    y = x\nreturn y": "follow",
    }.items(),
    ids=["finally", "a condition that need not be asked", "groups of errors"],
)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no except*")
def test_ways_that_are_easily_overlooked(body: str, said: str) -> None:
    assert said in rewritten(made_of(forward(UNTRACED + body)), 0, X).why("bn")


def test_without_source_only_what_goes_one_way_is_rewritten() -> None:
    namespace: dict[str, Any] = {}
    code = "def forward(self, x, flag=False, n=1, mask=None): {}return self.bn(self.conv(x))"
    exec(code.format(""), namespace)
    model = made_of("")
    type(model).forward = namespace["forward"]
    rewritten(model, applied=1)
    exec(code.format("float(x.sum()); "), namespace)
    model = made_of("")
    type(model).forward = namespace["forward"]
    assert "its source is not found, <string>:1" in rewritten(model, 0, X).why("bn")


def test_the_reason_names_the_other_reader() -> None:
    report = rewritten(made_of(forward(UNTRACED + REFUSED["both returned"])), 0, X)
    assert re.fullmatch(
        r"what conv gives may also go elsewhere: forward also reads it, at <written \d+>:4: "
        r"return self.bn\(y\) \+ \(y if flag is True else 0\)",
        str(report.refused[0].reason),
    )


# Forwards that are drawn: lines around calls of the convolution and the norm.

CONDITIONS = [
    "flag is True",
    "mask is None",
    "mask is not None and flag is True",
    "isinstance(mask, float)",
    "self.training",
    "self.fixed",
    "self.absent is not None",
    "not (flag is True)",
]
CALLS = [
    "self.conv({})",
    "self.bn({})",
    "self.bn(self.conv({}))",
    "self.bn(self.conv({}))",
    "self.layers[0]({})",
    "self.layers[1]({})",
    "self.layers[1](self.layers[0]({}))",
    "self.seq({})",
    "self.seq[0 if flag is True else 1]({})",
    "self.helper({}, flag)",
    "self.bn(self.helper({}, flag))",
    "self.act({})",
    "getattr(self, 'bn')({})",
    "(lambda t: self.conv(t))({})",
    "self.bn({0} if flag is True else self.conv({0}))",
    "{} + 1",
    "{} * self.conv.weight.mean()",
    "{} * self.conv.stride[0]",
    "self.helper(**{{'x': {}, 'flag': flag}})",
    "self.named({}, normed=flag is True)",
    "(self.forward({0}, flag, n - 1) if n > 1 else {0})",
    "{}",
]
# Further methods of drawn forwards.
NAMED = """
def named(self, x, **options):
    y = self.conv(x)
    if self.fixed is options.pop('normed', None):
        options['again'] = True
    return self.again(y, **options)
def again(self, y, again=False):
    return self.bn(y) if again else y
"""


@st.composite
def blocks(draw: Any, depth: int, conditions: list[str], loop: bool = False) -> list[str]:
    lines: list[str] = []
    variables = st.sampled_from(["x", "y", "y"])
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["set"] * 5 + ["if", "if", "return", "for", "layers", "try"]))
        target, read = draw(variables), draw(variables)
        call = draw(st.sampled_from(CALLS)).format(read)
        inner = [] if depth == 0 else draw(blocks(depth - 1, conditions, loop or kind == "for"))
        inner = [f"    {line}" for line in inner]
        condition = draw(st.sampled_from(conditions))
        if kind == "set" or depth == 0:
            lines.append(f"{target} = {call}")
        elif kind == "return":
            lines += [f"if {condition}:", f"    return {call}"]
        elif kind == "if":
            lines += [f"if {condition}:", *inner]
            if draw(st.booleans()):
                other = draw(blocks(depth - 1, conditions, loop))
                lines += ["else:", *[f"    {line}" for line in other]]
        elif kind == "for":
            lines += [f"for _ in range(2 if {condition} else 1):", *inner]
            if draw(st.booleans()):
                end = draw(st.sampled_from(["break", "continue"]))
                lines += [f"    if {draw(st.sampled_from(conditions))}:", f"        {end}"]
        elif kind == "layers":
            lines += ["for layer in self.layers:", f"    {target} = layer({target})"]
            if draw(st.booleans()):
                lines += [f"    if {condition}:", "        break"]
        else:
            lines += ["try:", *inner, f"    if {condition}:", "        raise ValueError"]
            caught = draw(st.sampled_from(["ValueError", "Exception"]))
            lines += [f"    {target} = {call}", f"except {caught}:"]
            lines += [f"    {draw(variables)} = {draw(variables)}"]
    return lines


@st.composite
def codes(draw: Any, conditions: list[str]) -> str:
    """The source of a forward and of a helper method."""
    helper = draw(blocks(1, CONDITIONS))
    body = draw(blocks(2, conditions))
    lines = ["def forward(self, x, flag=False, n=1, mask=None):", "    y = x"]
    lines += [f"    {line}" for line in body] + ["    return y"]
    lines += ["def helper(self, x, flag=False, mask=None):", "    y = x"]
    lines += [f"    {line.replace('self.helper(', 'self.end(')}" for line in helper]
    lines += ["    return y", "def end(self, x, flag=False):", "    return x + 1"]
    return "\n".join([*lines, NAMED])


EXAMPLES = 5_000 if settings.get_current_profile_name() == "long" else 80


def assert_right(model: Any, run: bool) -> None:
    """Rewritten with or without an example, it gives the same or the guard raises."""
    run = run and isinstance(outcome(model, X, {}), torch.Tensor)  # else no example would do
    try:
        made, report = fxr.rewrite(model, "conv_bn", X if run else None, into="modules")
    except fxr.errors.FxRewriteError:
        event("no fake tensor can do what it does")
        return
    raised = guarded_ways(model, made)
    event(f"applied {min(len(report.applied), 2)}, guarded {min(raised, 1)}")


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(codes(CONDITIONS), st.booleans(), st.booleans())
def test_a_forward_of_any_code_is_right_or_guarded(code: str, traced: bool, run: bool) -> None:
    """On every way through it."""
    untraced = code.replace("    y = x\n", f"    y = x; {UNTRACED}", 1)
    assert_right(made_of(code if traced else untraced), run)


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(
    codes(["flag", "n > 1", "x.shape[0] == 1", "x.sum() > 0", *CONDITIONS]),
    codes(CONDITIONS),
    st.booleans(),
)
def test_code_that_can_not_be_traced_is_right_or_guarded(outer: str, inner: str, run: bool) -> None:
    """Of a model of which only parts are traced, or the whole: data decide which way it goes."""
    part = made_of(inner)
    outer = outer.replace("self.act(", "self.part(").replace("self.seq[", "self.part.seq[")
    outer = outer.replace("self.layers", "self.part.layers")
    assert_right(made_of(outer, part=part), run)
