"""Rule sets that are known by name: registered, or shipped by an installed package."""

from __future__ import annotations

import importlib
import sys

import pytest
from torch import nn

import fxrewrite as fxr
from fxrewrite.rules import registry

MODEL = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.ReLU()).eval()


@fxr.rule(pattern=fxr.chain(relu=nn.ReLU))
def to_gelu(m):
    return fxr.Replace(nn.GELU())


@pytest.fixture
def empty_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


def test_a_registered_set_is_found_by_name(empty_registry):
    mine = fxr.RuleSet("mine", [to_gelu])
    assert fxr.register(mine) is mine
    assert fxr.register(mine) is mine
    assert fxr.get_rule_set("mine") is mine
    assert {"conv_bn", "mine"} <= set(fxr.rule_set_names())
    assert fxr.rule_set_names() == sorted(fxr.rule_set_names())
    fxr.rewrite(MODEL, "mine", expect={"mine": 2})


def test_a_name_is_registered_once(empty_registry):
    fxr.register(fxr.RuleSet("mine", []))
    for name, how in {"mine": "registered", "conv_bn": "installed"}.items():
        with pytest.raises(ValueError, match=f"'{name}' is {how} already"):
            fxr.register(fxr.RuleSet(name, []))


def test_an_unknown_name_lists_the_known_ones(empty_registry):
    fxr.register(fxr.RuleSet("zzz", []))
    with pytest.raises(
        fxr.errors.UnknownRuleSetError, match=r"'con_bn'; there are: .*conv_bn.*, zzz"
    ):
        fxr.rewrite(MODEL, "con_bn")


def test_rules_come_as_name_set_rule_or_list_of_those(empty_registry):
    mine = fxr.register(fxr.RuleSet("mine", [to_gelu]))
    assert registry.resolve("mine") == registry.resolve(mine) == registry.resolve(["mine"])
    (alone,) = registry.resolve(to_gelu)
    assert (alone.name, alone.rules) == ("to_gelu", (to_gelu,))
    given = registry.resolve(["mine", [to_gelu, (mine,)], (each for each in ["conv_bn"])])
    assert [each.name for each in given] == ["mine", "to_gelu", "mine", "conv_bn"]
    assert registry.resolve([]) == ()


@pytest.mark.parametrize("wrong", [None, 3, len, nn.ReLU, [None], [["conv_bn"], 3], b"conv_bn"])
def test_anything_else_is_refused(wrong):
    with pytest.raises(
        fxr.errors.PatternError, match="expected a rule set, its name, a rule, or a list"
    ):
        fxr.rewrite(MODEL, wrong)


SHIPPED = """
import fxrewrite as fxr
from torch import nn

@fxr.rule(pattern=fxr.chain(relu=nn.ReLU))
def relu_to_gelu(m):
    return fxr.Replace(nn.GELU())

shipped = fxr.RuleSet("shipped", [relu_to_gelu], doc="One rule.")
number = 3
"""


REGISTERED = """
import fxrewrite as fxr

rules = fxr.register(fxr.RuleSet("registered", []))
"""


ENTRY_POINTS = """
[fxrewrite.rule_sets]
shipped = shipped_rules:shipped
registered = eager_rules:rules
number = shipped_rules:number
nothing = shipped_rules:nothing
broken = broken_rules:rules
absent = absent_rules:rules
"""


@pytest.fixture
def installed(tmp_path, monkeypatch, empty_registry):
    """Another package, installed as pip would install it."""
    info = tmp_path / "shipped_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shipped-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "shipped_rules.py").write_text(SHIPPED)
    (tmp_path / "eager_rules.py").write_text(REGISTERED)
    (tmp_path / "broken_rules.py").write_text("raise RuntimeError('it can not start')\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield
    for name in ("shipped_rules", "eager_rules", "broken_rules"):
        sys.modules.pop(name, None)


def test_an_installed_package_ships_a_rule_set_which_is_loaded_when_asked_for(installed):
    assert {"conv_bn", "shipped", "broken"} <= set(fxr.rule_set_names())
    assert "shipped_rules" not in sys.modules
    assert fxr.get_rule_set("shipped").doc == "One rule."
    assert fxr.get_rule_set("shipped") is fxr.get_rule_set("shipped")
    fxr.rewrite(MODEL, "shipped", expect={"shipped": 2})


def test_a_shipped_module_may_register_its_set_too(installed):
    assert fxr.get_rule_set("registered").rules == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"'broken' can't be loaded from broken_rules:rules: .*it can not start"),
        ("absent", r"'absent' can't be loaded from absent_rules:rules: ModuleNotFoundError"),
        ("nothing", r"'nothing' can't be loaded from shipped_rules:nothing: AttributeError"),
        ("number", r"'number': shipped_rules:number is a int, no RuleSet"),
    ],
)
def test_a_shipped_set_that_is_broken_says_so_and_spoils_no_other(installed, name, message):
    with pytest.raises(fxr.errors.UnknownRuleSetError, match=message):
        fxr.get_rule_set(name)
    fxr.fuse(MODEL)
