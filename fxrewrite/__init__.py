"""fxrewrite: rules from a matched chain of a model's steps to its replacement, made sound.

A rule is a small pure function from a match to a replacement. The engine finds the matches in a
`torch.fx` graph, refuses those that are not safe, says why, and leaves the model it was given as
it was.
"""

from .actions import Action, Bypass, Replace, Revise, Split
from .api import fuse, localise, plan, rewrite
from .compiling import backend, inductor_pass
from .declare import call, chain, pattern, pattern_of, siblings
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
from .family import Family
from .guards import Missed, known_rank, known_shape
from .modules import (
    _parent_name,
    delete_submodule,
    evolve,
    fresh_name,
    get_submodule,
    replace_node_module,
    set_submodule,
)
from .proof.comparing import TensorCheck
from .proof.inputs import random_inputs
from .proof.localising import Guilty, Localisation
from .proof.verifying import Verification, verify
from .registry import get_rule_set, register, rule_set_names
from .report import Finding, Report
from .restoring import load
from .ruleset import Guard, Rule, RuleSet, rule
from .steps import Call, Pattern, Siblings, Step, Value

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
    "Missed",
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
