"""Fold a norm into the layer that holds it, and calls it in a forward of its own."""

from __future__ import annotations

import fxrewrite as fxr

from . import norms
from .affine import out_channels, scaled_and_shifted
from .forward import alike, along_channels
from .norms import Norm
from .own_forward import ForwardedLayer, own_forward, without_norm


@fxr.pattern
class HoldsNorm:
    """A layer that defines a forward, which may call a norm that is inside the layer."""

    layer: ForwardedLayer
    made: fxr.Value


def calls_norm(m: HoldsNorm) -> str | fxr.Declined | None:
    """The forward must call a norm on what the layer makes, and do nothing else with that."""
    held = {name: each for name, each in m.layer.named_modules() if isinstance(each, Norm)}
    if not held:
        return fxr.Declined("it holds no norm", "missed")
    found = own_forward(m.layer)
    if isinstance(found, str):
        return f"whether it calls {next(iter(held))} on what it makes is not shown: {found}"
    if found.norm is None:
        return fxr.Declined("it calls no norm on what it makes", "missed")
    norm = held[found.norm]
    if norms.rest_of(norm) is not None:
        return f"its {found.norm} ends with an activation, which would have to stay"
    return along_channels(m.layer, norm, m.made, out_channels(m.layer)) or alike(m.layer, norm)


@fxr.rule(where=[calls_norm], quiet=True)
def fold_held_norm(m: HoldsNorm) -> fxr.Replace:
    """Scale the weight and shift the bias as the norm inside would, and leave an identity there."""
    found = own_forward(m.layer)
    assert not isinstance(found, str)
    assert found.norm is not None
    vectors = norms.vectors(m.layer.get_submodule(found.norm))
    assert not isinstance(vectors, str)
    return fxr.Replace(scaled_and_shifted(without_norm(m.layer, found.norm), *vectors))
