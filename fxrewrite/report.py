"""What a report is made of."""

from .engine.report import Finding, Outcome
from .explain.near_misses import NearMiss
from .explain.report import Report
from .explain.state_dict_map import StateDictMap, TensorFate
from .tracing.assumptions import Assumption
from .tracing.stops import Stop

__all__ = [
    "Assumption",
    "Finding",
    "NearMiss",
    "Outcome",
    "Report",
    "StateDictMap",
    "Stop",
    "TensorFate",
]
