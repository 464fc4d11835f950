"""fxrewrite: rules from a matched chain of a model's steps to its replacement, made sound.

A rule is a small pure function from a match to a replacement. The engine finds the matches in a
`torch.fx` graph, refuses those that are not safe, says why, and leaves the model it was given as
it was.
"""

from .actions import Action, Bypass, Replace, Revise
from .api import fuse, plan, rewrite
from .declare import call, chain, pattern, pattern_of
from .errors import (
    ExpectationError,
    FxRewriteError,
    PatternError,
    RuleError,
    TraceError,
    UnknownRuleSetError,
)
from .family import Family
from .guards import known_rank, known_shape
from .modules import (
    _parent_name,
    delete_submodule,
    evolve,
    fresh_name,
    get_submodule,
    replace_node_module,
    set_submodule,
)
from .registry import get_rule_set, register, rule_set_names
from .report import Finding, Report
from .ruleset import Guard, Rule, RuleSet, rule
from .steps import Call, Pattern, Step, Value

__all__ = [
    "Action",
    "Bypass",
    "Call",
    "ExpectationError",
    "Family",
    "Finding",
    "FxRewriteError",
    "Guard",
    "Pattern",
    "PatternError",
    "Replace",
    "Report",
    "Revise",
    "Rule",
    "RuleError",
    "RuleSet",
    "Step",
    "TraceError",
    "UnknownRuleSetError",
    "Value",
    "_parent_name",
    "call",
    "chain",
    "delete_submodule",
    "evolve",
    "fresh_name",
    "fuse",
    "get_rule_set",
    "get_submodule",
    "known_rank",
    "known_shape",
    "pattern",
    "pattern_of",
    "plan",
    "register",
    "replace_node_module",
    "rewrite",
    "rule",
    "rule_set_names",
    "set_submodule",
]
