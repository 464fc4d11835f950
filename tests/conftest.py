"""Hypothesis profiles and what every test starts from.

`ci`, the default, is derandomised: a run on a fresh machine tests the same cases every time, so a
red run is about the change at hand. `pytest --hypothesis-profile=long` looks for new cases.
"""

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# The first convolution of a process can take seconds, so a deadline would only report that.
# Building a random model is slow by nature, and says nothing about the test.
_COMMON = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", _COMMON, max_examples=40, derandomize=True, database=None)
settings.register_profile("long", _COMMON, max_examples=2000, derandomize=False)
settings.load_profile("ci")

if "PYTEST_XDIST_WORKER" in os.environ:  # each of which would take all cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """What a test draws from torch's global generator is the same in every run and order."""
    torch.manual_seed(0)


@pytest.fixture(params=["graph", "modules"])
def into(request: pytest.FixtureRequest) -> Any:
    """A test of what a rewrite gives is done with either."""
    return request.param
