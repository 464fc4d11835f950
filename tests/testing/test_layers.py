"""What the registered strategies draw."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fxrewrite.testing.layers import maker_of


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
@given(st.data())
def test_a_norm_of_the_last_dimensions_leaves_out_batch_and_channels(
    kind: type[Any], data: st.DataObject
) -> None:
    """It could not run on another batch, or would be one of all channels."""
    maker = maker_of(kind)
    assert maker is not None
    assert data.draw(maker.draw((2, 3, 4, 5))).normalized_shape in [(5,), (4, 5)]
    assert data.draw(maker.draw((2, 3))).normalized_shape == (3,)
