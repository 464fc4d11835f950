"""The errors this package raises; each message says what, where, and what to do."""


class FxRewriteError(Exception):
    """Base of every error that fxrewrite raises on purpose."""


class PatternError(FxRewriteError, TypeError):
    """A pattern or a rule is declared wrongly."""


class UnknownRuleSetError(FxRewriteError, LookupError):
    """No rule set of the given name is registered."""


class TraceError(FxRewriteError):
    """The model can't be traced into a graph."""


class RuleError(FxRewriteError):
    """A rule raised, mutated its match, returned the wrong thing, or never came to an end."""


class ExpectationError(FxRewriteError, AssertionError):
    """A rewrite applied its rules another number of times than `expect` says."""
