"""fxrewrite: rules from a matched chain of a model's steps to its replacement, made sound.

A rule is a small pure function from a match to a replacement. The engine finds the matches in a
`torch.fx` graph, refuses those that are not safe, says why, and leaves the model it was given as
it was.

Here is what nearly everybody needs; the rest is in the modules `errors`, `helpers`, `integrations`,
`report`, `testing` (which needs hypothesis) and `verification`.
"""

from importlib.metadata import version

from . import errors, helpers, integrations, report, verification
from .api import Rewriter, fuse, plan, rewrite
from .explain.report import Report
from .helpers import _parent_name
from .module_utils.evolve import evolve
from .module_utils.subclassing import Family
from .rules.actions import Bypass, Call, Replace, Revise, Split
from .rules.declare import call, chain, pattern, pattern_of, siblings
from .rules.declare_rule import rule
from .rules.guards import known_rank, known_shape
from .rules.registry import RuleSet, get_rule_set, register, rule_set_names
from .rules.rule import Rule
from .rules.values import Declined, Siblings, Value
from .targets.guarded_modules import unguarded
from .verification import verify

__version__ = version("fxrewrite")

__all__ = [
    "Bypass",
    "Call",
    "Declined",
    "Family",
    "Replace",
    "Report",
    "Revise",
    "Rewriter",
    "Rule",
    "RuleSet",
    "Siblings",
    "Split",
    "Value",
    "__version__",
    "_parent_name",
    "call",
    "chain",
    "errors",
    "evolve",
    "fuse",
    "get_rule_set",
    "helpers",
    "integrations",
    "known_rank",
    "known_shape",
    "pattern",
    "pattern_of",
    "plan",
    "register",
    "report",
    "rewrite",
    "rule",
    "rule_set_names",
    "siblings",
    "unguarded",
    "verification",
    "verify",
]
