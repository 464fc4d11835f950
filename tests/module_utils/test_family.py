"""Families of module types: steps that match types which join later."""

import nets
import pytest
from torch import nn

import fxrewrite as fxr


class Known(fxr.Family):
    """Modules that this test knows of."""


def drop_known():
    pattern = fxr.chain(known=Known)
    return fxr.rule(pattern=pattern, name="drop_known")(lambda m: fxr.Bypass())


class Once(nn.Module):
    def forward(self, x):
        return x * 1


def test_a_family_grows_by_type_and_by_name():
    class Renamed(Once):
        def extra_repr(self):
            return "renamed"

    class Differs(Once):
        def forward(self, x):
            return x * 2

    model = nn.Sequential(Renamed(), Differs(), nn.ReLU()).eval()
    assert not fxr.plan(model, drop_known()).findings
    Known.add(f"{__name__}.Once")
    report = fxr.plan(model, drop_known())
    assert [each.outcome for each in report.findings] == ["applied", "refused"]
    assert report.refused[0].reason == "1 is a Differs, whose forward is not that of Once"
    Known.add(Differs, "told")
    assert Known.known_of(Differs()) == "told"
    fxr.rewrite(model, drop_known(), expect={"drop_known": 2})
    with pytest.raises(KeyError):
        Known.known_of(nn.ReLU())


def test_what_is_made_of_a_family_itself_is_refused():
    """It is no member of the family, so nothing tells how it behaves."""

    class PaddedConv(nn.Conv2d, fxr.Family):
        """A convolution that pads otherwise."""

    @fxr.rule(pattern=fxr.chain(conv=nn.Conv2d | PaddedConv, bn=nn.BatchNorm2d))
    def fold(m):
        return fxr.Replace(m.conv, slot="conv")

    report = fxr.plan(nets.randomise(nn.Sequential(PaddedConv(4, 4, 1), nets.bn())), fold)
    assert "0 is a PaddedConv, whose _members is not that of Conv2d" in report.why("1")
