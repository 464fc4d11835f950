"""The errors this package raises; each message says what, where, and what to do."""

from __future__ import annotations

from typing import Any


class FxRewriteError(Exception):
    """Base of every error that fxrewrite raises on purpose."""


class PatternError(FxRewriteError, TypeError):
    """A pattern or a rule is declared wrongly."""


class UnknownRuleSetError(FxRewriteError, LookupError):
    """No rule set of the given name is registered."""


class UnknownNameError(FxRewriteError, LookupError):
    """A report is asked of a module or node that the model does not have."""


class TraceError(FxRewriteError):
    """The model can't be traced into a graph."""


class NotCopiedError(FxRewriteError):
    """A model holds something that a copy of it could not have one of its own."""


class SpecialisedError(FxRewriteError):
    """A graph is run on what it was not traced for: another kind of argument, another mode."""


class GuardError(FxRewriteError):
    """Modules that were rewritten as one were called apart."""


class RuleError(FxRewriteError):
    """A rule raised, mutated its match, returned the wrong thing, or never came to an end."""


class ExpectationError(FxRewriteError, AssertionError):
    """A rewrite applied its rules another number of times than `expect` says."""


class LoadError(FxRewriteError):
    """A model or its weights can't be found, built or read, or do not go together."""


class InputError(FxRewriteError):
    """The original model can't be run on the given inputs."""


class VerificationError(FxRewriteError, AssertionError):
    """A rewritten model does not give what its original gives.

    `localisation`, a `verification.Localisation`, has the comparison and the sites to blame.
    """

    def __init__(self, message: str, localisation: Any = None) -> None:
        super().__init__(message)
        self.localisation = localisation
