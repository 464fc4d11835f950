"""fxrewrite: rules from a matched chain of a model's steps to its replacement, made sound.

A rule is a small pure function from a match to a replacement. The engine finds the matches in a
`torch.fx` graph, refuses those that are not safe, says why, and leaves the model it was given as
it was.
"""

from .api import fuse, localise, plan, rewrite
from .checkpoint.load import load
from .engine.report import Finding
from .errors import (
    ExpectationError,
    FxRewriteError,
    InputError,
    LoadError,
    PatternError,
    RuleError,
    SpecialisedError,
    TraceError,
    UnknownNameError,
    UnknownRuleSetError,
    VerificationError,
)
from .explain.report import Report
from .integrations.dynamo_backend import backend, inductor_pass
from .module_utils.evolve import evolve
from .module_utils.subclassing import Family
from .module_utils.tree import (
    _parent_name,
    delete_submodule,
    fresh_name,
    get_submodule,
    replace_node_module,
    set_submodule,
)
from .rules.actions import Action, Bypass, Call, Replace, Revise, Split
from .rules.declare import call, chain, pattern, pattern_of, siblings
from .rules.declare_rule import rule
from .rules.guards import Declined, Guard, known_rank, known_shape
from .rules.registry import get_rule_set, register, rule_set_names
from .rules.rule import Rule, RuleSet
from .rules.spec import Pattern, Step
from .rules.values import Siblings, Value
from .verification.bisect import Guilty, Localisation
from .verification.compare import TensorCheck
from .verification.inputs import random_inputs
from .verification.verify import Verification, verify

__all__ = [
    "Action",
    "Bypass",
    "Call",
    "ExpectationError",
    "Family",
    "Finding",
    "FxRewriteError",
    "Guard",
    "Guilty",
    "InputError",
    "LoadError",
    "Localisation",
    "Declined",
    "Pattern",
    "PatternError",
    "Replace",
    "Report",
    "Revise",
    "Rule",
    "RuleError",
    "RuleSet",
    "Siblings",
    "SpecialisedError",
    "Split",
    "Step",
    "TensorCheck",
    "TraceError",
    "UnknownNameError",
    "UnknownRuleSetError",
    "Value",
    "Verification",
    "VerificationError",
    "_parent_name",
    "backend",
    "call",
    "chain",
    "delete_submodule",
    "evolve",
    "fresh_name",
    "fuse",
    "get_rule_set",
    "get_submodule",
    "inductor_pass",
    "known_rank",
    "known_shape",
    "load",
    "localise",
    "pattern",
    "pattern_of",
    "plan",
    "random_inputs",
    "register",
    "replace_node_module",
    "rewrite",
    "rule",
    "rule_set_names",
    "set_submodule",
    "siblings",
    "verify",
]
