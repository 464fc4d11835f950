"""Models around a pattern: its chain, as any of its spellings, among what rewriters trip over."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st
from torch import fx, nn

from fxrewrite.module_utils.torch_private import HOOKS
from fxrewrite.rules.declare import pattern_of
from fxrewrite.rules.spec import Pattern, Step

from .drafts import REFUSALS, Draft, Placed, join, place
from .layers import ANY_RANK, kinds_of, maker_of, ranks_of
from .observing import run
from .situations import AFTERWARDS, WHILE_WRITING
from .tensors import randomise
from .written import Case

SIZES = (4, 3, 5, 2)


@st.composite
def models_around(draw: st.DrawFn, pattern: type[Any] | Pattern, *, plain: bool = False) -> Case:
    """Models that hold the chain of a pattern once or more, with arguments to call them with.

    Modules are drawn from the strategies registered for their types, or by their constructors'
    signatures; steps that may be absent or repeat are so at random; a call step is spelt as any of
    its functions, methods or modules. Around the chain is what rewriters trip over: second readers,
    shared modules, aliases, ties, hooks, training mode, writes in place, views, containers.

    >>> import fxrewrite as fxr
    >>> case = models_around(fxr.chain(conv=nn.Conv2d, act=nn.ReLU)).example()  # doctest: +SKIP

    Args:
        pattern: a pattern's class, or what `pattern_of` gives for it.
        plain: only the chain, with nothing around it.
    """
    declared = pattern if isinstance(pattern, Pattern) else pattern_of(pattern)
    draft = Draft(draw)
    steps = _present(draw, declared)
    start = _first_steps(draw, declared) if declared.branches else steps
    value = first = draft.input(_shape(draw, start), indices=_reads_indices(start[0]))
    prefix = draw(st.sampled_from(["", "", "", "block.", "block.deep."]))
    chain = write_pattern(draft, declared, value, prefix, steps)
    draft.outputs = [chain[-1].makes]
    if declared.is_group:
        draft.outputs = [read(draft, each.makes) for each in chain]
    if not plain:
        for situation in draw(st.lists(st.sampled_from(WHILE_WRITING), max_size=2)):
            situation(draft, chain, steps, first)
    model, args = draft.model()
    randomise(model, draw(st.integers(0, 2**16)))
    model.double()
    if not plain:
        for afterwards in draw(st.lists(st.sampled_from(AFTERWARDS), max_size=1)):
            afterwards(draw, model, chain)
        if draw(st.integers(0, 3)) == 0 and not any(map(_has_hook, model.modules())):
            model = graph_module(model, tuple(k for s in declared.steps for k in s.modules))
    try:
        run(model, args)
    except Exception as error:
        REFUSALS.append(str(error))
        reject()
    return Case(model, args)


def write_chain(draft: Draft, steps: Sequence[Step], value: str, prefix: str = "") -> list[Placed]:
    """Write these steps one after the other, the first reading a value of the draft."""
    chain: list[Placed] = []
    for step in steps:
        chain.append(place(draft, step, value, prefix))
        value = chain[-1].makes
    return chain


def write_pattern(
    draft: Draft,
    pattern: Pattern,
    value: str,
    prefix: str = "",
    steps: Sequence[Step] | None = None,
) -> list[Placed]:
    """Write the branches of a pattern, what joins them, and its further steps."""
    steps = _present(draft.draw, pattern) if steps is None else steps
    if pattern.is_group:
        return write_group(draft, pattern.steps[0], value, prefix)
    if not pattern.branches:
        return write_chain(draft, steps, value, prefix)
    ends: list[str] = []
    before: list[Placed] = []
    for branch in pattern.branches:
        end = value
        if not branch.optional or draft.draw(st.booleans()):
            before += write_pattern(draft, branch.pattern, value, f"{prefix}{branch.name}_")
            end = before[-1].makes
        ends.append(end)
    joined = join(draft, steps[0], ends)
    return [*before, joined, *write_chain(draft, steps[1:], joined.makes, prefix)]


def write_group(draft: Draft, step: Step, value: str, prefix: str = "") -> list[Placed]:
    """Write some calls that are siblings, or nearly so; something else may stand between them."""
    placed = [place(draft, step, value, prefix)]
    for _ in range(draft.draw(st.sampled_from([1, 2, 2, 3]))):
        if draft.draw(st.integers(0, 3)) == 0:
            placed.append(place(draft, step, value, prefix))
            continue
        module = copy.deepcopy(draft.members[placed[0].module])
        name = draft.member(prefix + step.name, module)
        placed.append(Placed(step, value, draft.write(f"self.{name}({value})"), name))
    return placed


def read(draft: Draft, value: str) -> str:
    """Something that reads a value, which mostly can't tell how it lies in memory."""
    lines = [
        *_BLIND,
        *_BLIND,
        "{}",
        "{}.relu_()",
        "{}.view(-1)",
        "{}.reshape(-1)",
        "{}.unsqueeze(0)",
    ]
    line = draft.draw(st.sampled_from(lines))
    return value if line == "{}" else draft.write(line.format(value))


_BLIND = ["F.relu({})", "{} * 0.5", "{}.transpose(0, -1) + 1", "{}.flatten(1).sum(-1)"]


def _first_steps(draw: st.DrawFn, pattern: Pattern) -> list[Step]:
    """The steps of the first branch that is always there, down to a chain."""
    while pattern.branches:
        pattern = next(each.pattern for each in pattern.branches if not each.optional)
    return [step for step in pattern.steps if not step.optional]


def graph_module(model: nn.Module, leaves: tuple[type[nn.Module], ...]) -> fx.GraphModule:
    """The model's graph, with modules of these types, their subclasses included, as leaves."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, leaves) or super().is_leaf_module(m, module_qualified_name)

    return fx.GraphModule(model, Tracer().trace(model))


def _present(draw: st.DrawFn, pattern: Pattern) -> list[Step]:
    """The steps that the chain has this time."""
    steps: list[Step] = []
    for step in pattern.steps:
        most = 2 if step.repeats else 1
        times = draw(st.integers(0, most)) if step.optional else 1
        steps += [step] * times
    return steps


def _shape(draw: st.DrawFn, steps: Sequence[Step]) -> tuple[int, ...]:
    """The shape of the chain's input: of a rank that its steps can take, if there is one."""
    ranks = [_ranks(step) for step in steps]
    common = [rank for rank in (1, 2, 3, 4, 5) if all(rank in each for each in ranks)]
    rank = draw(st.sampled_from(common or sorted(ranks[0])))
    batch = draw(st.sampled_from([2, 1, 3]))
    return (batch, *(draw(st.sampled_from(SIZES)) for _ in range(rank - 1)))[:rank]


def _ranks(step: Step) -> set[int]:
    ranks = {r for declared in step.modules for k in kinds_of(declared) for r in ranks_of(k)}
    for call in (*step.functions, *step.methods):
        maker = maker_of(call)
        ranks.update(ANY_RANK if maker is None else maker.ranks)
    return ranks


def _reads_indices(step: Step) -> bool:
    makers = [maker_of(k) for declared in step.modules for k in kinds_of(declared)]
    makers += map(maker_of, (*step.functions, *step.methods))
    return bool(makers) and all(maker is not None and maker.indices for maker in makers)


def _has_hook(module: nn.Module) -> bool:
    return any(map(module.__dict__.get, HOOKS))
