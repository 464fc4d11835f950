"""Whether two models give the same, and which site is to blame if they do not."""

from .bisect import Guilty, Localisation
from .compare import TensorCheck
from .inputs import random_inputs
from .verify import Verification, verify

__all__ = [
    "Guilty",
    "Localisation",
    "TensorCheck",
    "Verification",
    "random_inputs",
    "verify",
]
