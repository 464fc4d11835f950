"""Find the sites that are to blame where a rewritten model differs from its original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import attrs
from torch import nn
from torch.export import ExportedProgram

from ..engine.report import Finding
from ..errors import FxRewriteError, InputError, VerificationError
from ..ir.describe import in_one_line
from ..module_utils.nested import mapped
from ..module_utils.running import in_float64, widened
from ..rules.rule import Rule
from .compare import usual_error
from .verify import Progress, Verification, inputs_of_trial, verify

# In float64 a right rewrite agrees with its original to about this, relatively.
_EXACT = 1e-9
_SEARCHING = "searching for the site to blame"
_NOT_THE_SAME = "the model is not traced the same way twice, so no rewrite of it can be done again"

Sites: TypeAlias = Sequence[tuple[Rule[Any], Finding]]
"""Sites in the order in which they were rewritten, each with its rule."""


class Rewrite(Protocol):
    """What the search needs of a rewrite that was done: the sites, and a way to do it again."""

    @property
    def model(self) -> Any:
        """The model or exported program."""

    @property
    def example_inputs(self) -> Any:
        """The example inputs that rules learnt shapes from."""

    @property
    def made(self) -> Any:
        """What became of the model."""

    @property
    def applied(self) -> Sites:
        """The sites in the order in which they were rewritten."""

    def again(self, model: Any, example_inputs: Any, limit: int | None = None) -> Rewrite:
        """The same rules applied to a model, at so many sites at most."""


def upto(rewrite: Rewrite, sites: int) -> nn.Module:
    """The model of a rewrite with only the first sites rewritten.

    Raises:
        FxRewriteError: the model gave another graph this time.
    """
    again = rewrite.again(rewrite.model, rewrite.example_inputs, sites)
    if _told(again.applied) != _told(rewrite.applied[:sites]):
        raise FxRewriteError(_NOT_THE_SAME)
    return _runnable(again.made)


@attrs.frozen(eq=False)
class Guilty:
    """A rewritten site that makes the models differ, and the rule that rewrote it.

    `adds_up` says that the site is only the one where many small differences came to be too much.
    """

    rule: Rule[Any]
    finding: Finding
    adds_up: bool = False

    def __str__(self) -> str:
        """Rule and site in words."""
        source = f" ({self.rule.source})" if self.rule.source else ""
        became = self.finding.became or "nothing"
        chain = in_one_line(self.finding.steps)
        return f"rule {self.rule.name!r}{source} at {chain}, which became {became}"


@attrs.frozen(eq=False)
class Localisation:
    """How a rewritten model compares with its original, and which sites are to blame if it differs.

    `exact` compares a float64 copy of the model with what the same rules make of that; it is None
    where there was no need of it, or no way. `guilty` is in the order in which the sites were
    rewritten, and empty where the models are the same, or differ before any rule is applied.
    `may_be_more` says that the search ended after the sites that are named, `obstacle` why there
    could be none.
    """

    verification: Verification
    exact: Verification | None = None
    guilty: tuple[Guilty, ...] = ()
    may_be_more: bool = False
    obstacle: str = ""

    def __str__(self) -> str:
        """The verdict in words, then the guilty sites."""
        if self.verification.same:
            return f"the rewritten model gives what the original gives: {self.verification}"
        lines = [f"the rewritten model differs from the original: {self.verification}"]
        if self.exact is not None and self.exact.same:
            lines.append(
                "the same rules are right on a float64 copy of the model, so this is rounding, or "
                "a rule that is wrong for this dtype only"
            )
        elif self.exact is not None:
            said = self.exact.mismatch or self.exact.worst
            lines.append(f"so it does in float64, where rounding hides nothing: {said}")
        for each in self.guilty:
            what = "many sites add to it, the last is" if each.adds_up else "to blame is"
            lines.append(f"{what} {each}")
        if self.obstacle:
            lines.append(f"the sites to blame can't be searched for: {self.obstacle}")
        elif not self.guilty:
            lines.append("no rule is to blame; the traced graph differs before any is applied")
        if self.may_be_more:
            lines.append("there may be more; the search ended here")
        return "\n".join(lines)


def check_rewrite(
    rewrite: Rewrite, inputs: Any, progress: Progress | None, trials: int = 1
) -> None:
    """Raise VerificationError, with the guilty sites, unless both models give the same."""
    found = localised(rewrite, inputs, trials=trials, progress=progress)
    if not found.verification.same:
        raise VerificationError(str(found), found)


def localised(
    rewrite: Rewrite,
    inputs: Any,
    *,
    most: int = 3,
    trials: int = 1,
    progress: Progress | None = None,
) -> Localisation:
    """Verify a rewrite, and if the models differ, search for the sites that are to blame.

    In float64 a right site differs by next to nothing. So where the model can run in it, a float64
    copy of it is rewritten, and searched first.
    """
    verification = verify(
        _runnable(rewrite.model), _runnable(rewrite.made), inputs, trials=trials, progress=progress
    )
    if verification.same:
        return Localisation(verification)
    inputs = inputs_of_trial(inputs, verification.trial)
    exact, search = _in_float64(rewrite, inputs, progress)
    try:
        if search is not None and (guilty := search.guilty(most)):
            return Localisation(verification, exact, guilty, search.may_be_more)
        search = _Search(rewrite, inputs, progress)
        guilty = search.guilty(most)
    except FxRewriteError as error:
        return Localisation(verification, exact, obstacle=str(error))
    return Localisation(verification, exact, guilty, search.may_be_more)


def _in_float64(
    rewrite: Rewrite, inputs: Any, progress: Progress | None
) -> tuple[Verification | None, _Search | None]:
    """How the rewritten float64 copy compares, and a search in it, if it differs."""
    try:
        wide = in_float64(rewrite.model, inputs)
        if wide is None:
            return None, None
        again = rewrite.again(wide[0], mapped(widened, rewrite.example_inputs))
        exact = verify(again.model, again.made, wide[1], rtol=_EXACT)
    except Exception:  # whatever stands in the way, there is the model's own dtype to search in
        return None, None
    if exact.same:
        return exact, None
    # A rule may round to the model's dtype by itself, which is no mistake.
    tensors = (*rewrite.model.parameters(), *rewrite.model.buffers())
    rounding = max((usual_error(each.dtype) for each in tensors), default=_EXACT)
    apart = max((each.difference for each in exact.tensors), default=rounding)
    rtol = max(_EXACT, min(rounding, apart / 10))
    return exact, _Search(again, wide[1], progress, rtol)


class _Search:
    """Bisects the sites of a rewrite, comparing the model with the first so many rewritten.

    Rules are pure, so the rewrite is done again as far as some site.
    """

    def __init__(
        self,
        rewrite: Rewrite,
        inputs: Any,
        progress: Progress | None,
        rtol: float | None = None,
    ) -> None:
        self.may_be_more = False
        self._rewrite = rewrite
        self._inputs = inputs
        self._progress = progress
        self._rtol = rtol
        self._sites = len(rewrite.applied)
        self._models: dict[int, nn.Module] = {self._sites: _runnable(rewrite.made)}
        self._compared = 0
        self._expected = 0

    def guilty(self, most: int) -> tuple[Guilty, ...]:
        """The sites that make a difference, the first ones in the order of the rewrite."""
        # For each site found, a bisection and three more comparisons.
        self._expected = 1 + most * (self._sites.bit_length() + 3)
        found: list[Guilty] = []
        done = 0
        if self._same(_runnable(self._rewrite.model), self._upto(0)):
            # From a guilty site on, the comparison is with what that site made of the model.
            while self._differs_after(done):
                if len(found) == most or (done and not self._tells(done)):
                    self.may_be_more = True
                    break
                done = self._first_after(done)
                rule, finding = self._rewrite.applied[done - 1]
                alone = None if self._rtol is None else self._rtol / self._sites
                adds_up = self._same(self._upto(done - 1), self._upto(done), alone)
                found.append(Guilty(rule, finding, adds_up))
        if self._progress is not None:
            self._progress(_SEARCHING, self._expected, self._expected)
        return tuple(found)

    def _differs_after(self, done: int) -> bool:
        """Whether the sites after these make a difference, too."""
        return done < self._sites and not self._same(self._upto(done), self._upto(self._sites))

    def _tells(self, done: int) -> bool:
        """Whether a model gives anything that another could be compared with."""
        return self._same(self._upto(done), self._upto(done))

    def _first_after(self, done: int) -> int:
        """How many sites it takes to make a difference to what the first `done` give."""
        good, bad = done, self._sites
        while bad - good > 1:
            middle = (good + bad) // 2
            if self._same(self._upto(done), self._upto(middle)):
                good = middle
            else:
                bad = middle
        return bad

    def _upto(self, sites: int) -> nn.Module:
        if sites not in self._models:
            self._models[sites] = upto(self._rewrite, sites)
        return self._models[sites]

    def _same(self, one: nn.Module, other: nn.Module, rtol: float | None = None) -> bool:
        if self._progress is not None:
            self._progress(_SEARCHING, min(self._compared, self._expected), self._expected)
        self._compared += 1
        try:
            return verify(one, other, self._inputs, rtol=rtol or self._rtol).same
        except InputError:  # a guilty site may leave a model that raises
            return False


def _told(sites: Sites) -> list[tuple[Any, ...]]:
    """What makes sites of two rewrites the same: rule, nodes, and what became of them."""
    return [(rule, each.anchor, each.nodes, each.became) for rule, each in sites]


def _runnable(model: Any) -> nn.Module:
    module: nn.Module = model.module() if isinstance(model, ExportedProgram) else model
    return module
