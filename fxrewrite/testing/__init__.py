"""A toolkit for those who write rules: is a rule sound, on models drawn around its pattern?

It needs hypothesis: `pip install "fxrewrite[testing]"`.
"""

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError(
        "fxrewrite.testing draws models with hypothesis, which is not installed; "
        'pip install "fxrewrite[testing]"'
    ) from error

from .around import graph_module, models_around
from .checking import check_rule
from .layers import register_strategy
from .observing import Record
from .properties import UnsoundError, check_model
from .tensors import random_tensor, randomise
from .written import Case, written

__all__ = [
    "Case",
    "Record",
    "UnsoundError",
    "check_model",
    "check_rule",
    "graph_module",
    "models_around",
    "random_tensor",
    "randomise",
    "register_strategy",
    "written",
]
