"""Which nodes write in place, and which hand on storage they were given."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from .view import GraphView

_IN_PLACE_OPERATORS = {getattr(operator, f"i{name}") for name in (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul",
    "and", "or", "xor", "lshift", "rshift",
) if hasattr(operator, f"i{name}")}
