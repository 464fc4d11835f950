"""The rule sets that gather others: all that folds, and all that makes a model cheaper to run."""

from __future__ import annotations

import fxrewrite as fxr

from .backward import fold_constant_before, fold_norm_before
from .cleanup import cleanup
from .forward import fold_constant, fold_norm
from .held_norm import fold_held_norm
from .products import multiply_conv, multiply_linear
from .reparam import reparam
from .standardised import bake_weight
from .through import fold_norm_moved

# A norm or constant between two layers goes into the one before it: that rule comes first.
affine = fxr.RuleSet(
    "affine",
    [
        bake_weight,
        fold_norm,
        fold_held_norm,
        fold_constant,
        fold_norm_before,
        fold_norm_moved,
        fold_constant_before,
        multiply_linear,
        multiply_conv,
    ],
    doc="Fold norms and constants into the layers beside them, and layers into one another.",
)

# A zero that is added is left out before it could be folded as a constant.
inference = fxr.RuleSet(
    "inference",
    dict.fromkeys([*reparam.rules, *affine.rules, *cleanup.rules]),
    doc="All that is exact and never slower: affine, reparam and cleanup.",
)
