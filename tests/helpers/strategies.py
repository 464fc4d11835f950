"""Hypothesis strategies: random convolutions with batch norms, and random models around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import nets
import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import fx, nn

from fxrewrite.testing import Case

seeds = st.integers(0, 2**31 - 1)


@attrs.frozen
class Pair:
    """A convolution and the batch norm behind it, in a Sequential, with an input that fits."""

    model: nn.Sequential
    x: torch.Tensor = attrs.field(repr=lambda x: str(tuple(x.shape)))
    seed: int

    @property
    def conv(self) -> Any:
        return self.model[0]

    @property
    def bn(self) -> Any:
        return self.model[-1]


@st.composite
def channels(draw: Any) -> tuple[int, int, int]:
    """In- and out-channels and groups: dense, grouped, or depthwise."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    per_group = draw(st.integers(1, 3))
    multiplier = draw(st.integers(1, 3))
    if draw(st.booleans()):
        per_group = 1  # depthwise, where there is more than one group
    return groups * per_group, groups * multiplier, groups


@st.composite
def pairs(
    draw: Any, dtype: torch.dtype = torch.float64, decades: float = 4.0, between: bool = False
) -> Pair:
    """Any convolution that torch can run, then a batch norm; decades as in `randomise`."""
    rank = draw(st.sampled_from([1, 2, 3]))

    def per_dim(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(values) for _ in range(rank))

    kernel, dilation = per_dim(st.integers(1, 3)), per_dim(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    padding: Any = draw(st.sampled_from(["same", "valid", None]))
    stride = (1,) * rank if padding == "same" else per_dim(st.integers(1, 3))
    padding = per_dim(st.integers(0, 2)) if padding is None else padding
    inputs, outputs, groups = draw(channels())
    options: dict[str, Any] = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": mode,
    }
    affine: dict[str, Any] = draw(
        st.sampled_from([{"affine": True}, {"affine": True, "bias": False}, {"affine": False}])
    )
    affine = {**affine, "eps": draw(st.sampled_from([1e-5, 1e-3, 1e-12, 1.0]))}
    conv, bn = (
        nets.CONVS[rank](inputs, outputs, **options),
        nets.BATCH_NORMS[rank](outputs, **affine),
    )
    middle = draw(st.lists(st.sampled_from(BETWEEN[rank]), max_size=2)) if between else []
    seed = draw(seeds)
    model = nets.randomise(nn.Sequential(conv, *(make() for make in middle), bn), seed, decades)
    # Each side is as long as the dilated kernel at least, and longer than any padding.
    least = [max(d * (k - 1) + 1, 3) for d, k in zip(dilation, kernel, strict=True)]
    size = [n + draw(st.integers(0, 3)) for n in least]
    x = nets.random_input((draw(st.integers(1, 2)), inputs, *size), seed + 1)
    return Pair(model.to(dtype), x.to(dtype), seed)


BETWEEN: dict[int, list[Callable[[], nn.Module]]] = {
    rank: [nn.Identity, nn.Dropout, lambda: nn.Dropout(inplace=True), nn.AlphaDropout, channelwise]
    for rank, channelwise in {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}.items()
}


_CHANNELS, _SIDE = 4, 3


@st.composite
def members(draw: Any) -> dict[str, nn.Module]:
    """Convolutions and batch norms by name, some of them under two names or in a container too."""
    rank = draw(st.sampled_from([1, 2, 3]))

    def conv() -> nn.Module:
        return nets.CONVS[rank](_CHANNELS, _CHANNELS, 3, padding=1, bias=draw(st.booleans()))

    def bn() -> nn.Module:
        return nets.BATCH_NORMS[rank](_CHANNELS, affine=draw(st.booleans()))

    named: dict[str, nn.Module] = {
        "conv": conv(),
        "bn": bn(),
        "block.conv": conv(),
        "block.deep.bn": bn(),
        "drop": nn.Dropout(),
        "same": nn.Identity(),
        "pair": nn.Sequential(conv(), bn()),
        "stat_free": nets.BATCH_NORMS[rank](_CHANNELS, track_running_stats=False),
        "unused": bn(),
    }
    if draw(st.booleans()):
        named |= {"alias.conv": named["conv"], "alias.bn": named["bn"]}
    if draw(st.booleans()):
        named["mixed"] = nn.Sequential(named["conv"], bn())
    return named


@st.composite
def steps(draw: Any, named: dict[str, nn.Module]) -> list[nets.Step]:
    """A program over the members; most chains are conv -> bn, and all may be read elsewhere."""
    made: list[nets.Step] = []
    containers = [name for name, m in named.items() if isinstance(m, nn.Sequential)]
    convs = [name for name, m in named.items() if isinstance(m, nets.ANY_CONV)]
    bns = [n for n, m in named.items() if isinstance(m, nets.ANY_BATCH_NORM) and n != "unused"]

    def where() -> int:
        return draw(st.one_of(st.just(len(made)), st.just(len(made)), st.integers(0, len(made))))

    def call_one_of(names: list[str]) -> None:
        how = draw(st.sampled_from([nets.call, nets.call, nets.call_by_keyword]))
        made.append((how, draw(st.sampled_from(names)), where()))

    for _ in range(draw(st.integers(1, 4))):
        kind = draw(
            st.sampled_from(
                ["chain", "chain", "chain", "one", "add", "constant", "read", "container"]
            )
        )
        if kind == "chain":
            call_one_of(convs)
            for name in draw(st.lists(st.sampled_from(["drop", "same"]), max_size=1)):
                made.append((nets.call, name, len(made)))
            for _ in range(draw(st.integers(1, 2))):
                call_one_of(bns)
        elif kind == "one":
            made.append((draw(st.sampled_from(nets.ON_ONE_VALUE)), where()))
        elif kind == "add":
            made.append((nets.add, where(), where()))
        elif kind == "constant":
            made.append((nets.add_constant, where()))
        elif kind == "read":
            made.append((nets.read_weight, draw(st.sampled_from(convs)), where()))
        else:
            made.append((nets.call, draw(st.sampled_from(containers)), where()))
    return made


@st.composite
def models(draw: Any) -> tuple[nn.Module, torch.Tensor]:
    """A random model in float64, as a class or as a GraphModule, and an input for it."""
    named = draw(members())
    program = draw(steps(named))
    last = len(program)
    outputs = [last, *draw(st.lists(st.integers(0, last), max_size=1))]
    net = nets.randomise(nets.Net(named, program, outputs), draw(seeds)).double()
    for name in draw(st.lists(st.sampled_from(["bn", "drop", "block.deep.bn"]), max_size=1)):
        net.get_submodule(name).train(draw(st.booleans()))
    rank = named["conv"].weight.dim() - 2  # type: ignore[union-attr, operator]
    x = nets.random_input((2, _CHANNELS, *[_SIDE] * rank), draw(seeds))
    if draw(st.booleans()):
        return _graph_module(net, draw), x
    for name in draw(st.lists(st.sampled_from([*named, "block", ""]), max_size=1)):
        draw(st.sampled_from(nets.HOOKS))(net.get_submodule(name))
    return net, x


def _graph_module(net: nets.Net, draw: Any) -> fx.GraphModule:
    """The model's graph; unlike a trace, it may call one module by different names."""
    graph = fx.Tracer().trace(net)
    names = {"conv": "alias.conv", "bn": "alias.bn"} if hasattr(net, "alias") else {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target in names and draw(st.booleans()):
            node.target = names[node.target]
    return fx.GraphModule(net, graph)


@st.composite
def branches(draw: Any) -> Case:
    """A sum of two to four branches over one value: convolutions of any geometry, norms, x."""
    dims = draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2]))
    channels = groups * draw(st.integers(1, 2))
    outputs = draw(st.sampled_from([channels, channels, 2 * groups]))
    stride = draw(st.sampled_from([1, 1, 2]))
    dilation = draw(st.sampled_from([1, 1, 2]))
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "circular", "replicate"]))

    def conv() -> nn.Module:
        kernel = tuple(draw(st.sampled_from([1, 3, 2])) for _ in range(dims))
        by = draw(st.sampled_from([dilation, dilation, 1]))
        fitting = tuple(by * (k - 1) // 2 for k in kernel)
        padding = draw(st.sampled_from([fitting, fitting, fitting, 1, "valid"]))
        if stride == 1 and draw(st.booleans()):
            padding = "same"
        return nets.CONVS[dims](
            channels,
            outputs,
            kernel,
            stride=stride,
            padding=padding,
            dilation=by,
            groups=draw(st.sampled_from([groups, groups, groups, 1])),
            bias=draw(st.booleans()),
            padding_mode=draw(st.sampled_from([mode, mode, "zeros"])),
        )

    def branch() -> nn.Module:
        kind = draw(st.sampled_from(["conv", "conv", "conv", "conv_bn", "bn", "same"]))
        if kind == "same":
            return nn.Identity()
        norm = nets.BATCH_NORMS[dims]
        if kind == "bn":
            return norm(channels, affine=draw(st.booleans()))
        return conv() if kind == "conv" else nn.Sequential(conv(), norm(outputs))

    sides = {f"side{i}": branch() for i in range(draw(st.integers(2, 4)))}
    sides = dict(draw(st.permutations([*sides.items(), ("first", conv())])))
    model = nets.Forward(lambda m, x: sum(m.get_submodule(name)(x) for name in sides), **sides)
    x = nets.random_input((draw(st.integers(1, 2)), channels, *[draw(st.integers(5, 6))] * dims))
    nets.randomise(model, draw(st.integers(0, 99))).double()
    try:
        model(x)
    except RuntimeError:
        reject()  # outputs of sizes that can't be added
    return Case(model, (x,))
