"""Find the sites that are to blame where a rewritten model differs from its original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import attrs
from torch import nn

from .comparing import usual_error
from .errors import VerificationError
from .nested import mapped
from .replaying import Replay, Script
from .report import Finding, Report
from .ruleset import Rule
from .running import in_float64, widened
from .verifying import Progress, Verification, verify

# In float64 a right rewrite agrees with its original to about this, relatively.
_EXACT = 1e-9


Rewriter: TypeAlias = Callable[[nn.Module, Any, Script], tuple[Any, Report]]
"""Makes the rewritten model out of a model, example inputs and a script."""


@attrs.frozen(eq=False)
class Rewrite:
    """A rewrite that was done, with what it takes to do it again."""

    model: nn.Module
    made: nn.Module
    script: Script
    example_inputs: Any
    again: Rewriter

    def upto(self, sites: int) -> nn.Module:
        """The model with only the first sites rewritten, in the order in which they were."""
        made: nn.Module = self.again(self.model, self.example_inputs, Replay(self.script, sites))[0]
        return made

    def of(self, model: nn.Module, example_inputs: Any) -> Rewrite:
        """The same rules applied to another model."""
        script = Script()
        made, _ = self.again(model, example_inputs, script)
        return Rewrite(model, made, script, example_inputs, self.again)


@attrs.frozen(eq=False)
class Guilty:
    """A rewritten site that makes the model's outputs differ, and the rule that rewrote it.

    `adds_up` says that the site is only the one where many small differences came to be too much.
    """

    rule: Rule[Any]
    finding: Finding
    adds_up: bool = False

    def __str__(self) -> str:
        """Rule and site in words."""
        source = f" ({self.rule.source})" if self.rule.source else ""
        chain = " -> ".join(to for _, to in self.finding.steps)
        became = self.finding.became or "nothing"
        return f"rule {self.rule.name!r}{source} at {chain}, which became {became}"


@attrs.frozen(eq=False)
class Localisation:
    """How a rewritten model compares with its original, and which sites are to blame if it differs.

    `guilty` is in the order in which the sites were rewritten, and empty where the models are the
    same, or differ before any rule is applied. `may_be_more` says that the search stopped after
    the sites named, and `in_float64` that it was done in a float64 copy of the model.
    """

    verification: Verification
    guilty: tuple[Guilty, ...] = ()
    may_be_more: bool = False
    in_float64: bool = False

    def __str__(self) -> str:
        """The verdict in words, with the guilty sites in a list."""
        if self.verification.same:
            return f"the rewritten model gives what the original gives: {self.verification}"
        lines = [f"the rewritten model differs from the original: {self.verification}"]
        if not self.guilty:
            lines.append("no rule is to blame; the traced graph differs before any is applied")
        for each in self.guilty:
            what = "the differences add up until" if each.adds_up else "to blame is"
            lines.append(f"{what} {each}")
        if self.in_float64:
            lines.append("found in float64, where rounding hides nothing")
        if self.may_be_more:
            lines.append("there may be more; the search ended here")
        return "\n".join(lines)


def check_rewrite(rewrite: Rewrite, inputs: Any, progress: Progress | None) -> None:
    """Raise VerificationError, with the guilty sites, unless both models give the same."""
    found = localised(rewrite, inputs, progress=progress)
    if not found.verification.same:
        raise VerificationError(str(found), found)


def localised(
    rewrite: Rewrite, inputs: Any, *, most: int = 3, progress: Progress | None = None
) -> Localisation:
    """Verify a rewrite, and if the models differ, search for the sites that are to blame.

    In float64 a right site differs by next to nothing, so where the model can run in it, its
    float64 copy is rewritten and searched first.
    """
    verification = verify(rewrite.model, rewrite.made, inputs, progress=progress)
    if verification.same:
        return Localisation(verification)
    exact = _exact_search(rewrite, inputs, progress)
    if exact is not None and (guilty := exact.guilty(most)):
        return Localisation(verification, guilty, exact.may_be_more, in_float64=True)
    search = _Search(rewrite, inputs, progress)
    return Localisation(verification, search.guilty(most), search.may_be_more)


def _exact_search(rewrite: Rewrite, inputs: Any, progress: Progress | None) -> _Search | None:
    """A search in the float64 copy of the model, if it can run and differs there too."""
    try:
        wide = in_float64(rewrite.model, inputs)
        if wide is None:
            return None
        exact = rewrite.of(wide[0], mapped(widened, rewrite.example_inputs))
        apart = verify(exact.model, exact.made, wide[1], rtol=_EXACT)
    except Exception:  # whatever stands in the way, there is the model's own dtype to search in
        return None
    if apart.same:
        return None
    # A rule may round to the model's dtype by itself, which is no mistake.
    tensors = (*rewrite.model.parameters(), *rewrite.model.buffers())
    rounding = max((usual_error(each.dtype) for each in tensors), default=_EXACT)
    apart_by = max((each.difference for each in apart.tensors), default=rounding)
    rtol = max(_EXACT, min(rounding, apart_by / 10))
    return _Search(exact, wide[1], progress, rtol)


class _Search:
    """Bisects the sites of a rewrite, comparing the model with the first so many rewritten.

    The decisions of the rewrite are replayed; no rule is asked again.
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
        self._sites = len(rewrite.script.applied)
        self._models: dict[int, nn.Module] = {self._sites: rewrite.made}
        self._compared = 0

    def guilty(self, most: int) -> tuple[Guilty, ...]:
        """The sites that make a difference, the first ones in the order of the rewrite."""
        if not self._same(self._rewrite.model, self._upto(0)):
            return ()
        found: list[Guilty] = []
        done, last = 0, self._sites
        # From a guilty site on, the comparison is with what that site made of the model.
        while not self._same(self._upto(done), self._upto(last)):
            if len(found) == most or (done and not self._same(self._upto(done), self._upto(done))):
                self.may_be_more = True
                break
            good, bad = done, last
            while bad - good > 1:
                middle = (good + bad) // 2
                if self._same(self._upto(done), self._upto(middle)):
                    good = middle
                else:
                    bad = middle
            rule, finding = self._rewrite.script.applied[bad - 1]
            alone = None if self._rtol is None else self._rtol / self._sites
            adds_up = self._same(self._upto(bad - 1), self._upto(bad), alone)
            found.append(Guilty(rule, finding, adds_up))
            done = bad
        return tuple(found)

    def _upto(self, sites: int) -> nn.Module:
        if sites not in self._models:
            self._models[sites] = self._rewrite.upto(sites)
        return self._models[sites]

    def _same(self, one: nn.Module, other: nn.Module, rtol: float | None = None) -> bool:
        self._compared += 1
        if self._progress is not None:
            expected = self._compared + self._sites.bit_length()
            self._progress("searching for the site", self._compared, expected)
        return verify(one, other, self._inputs, rtol=rtol or self._rtol).same
