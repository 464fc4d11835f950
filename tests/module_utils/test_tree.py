"""The helpers for a module tree, which passes written by hand use too."""

import string

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import fx, nn

import fxrewrite as fxr

PART = st.text(alphabet=string.ascii_lowercase + string.digits + "_", min_size=1, max_size=4)
PATH = st.lists(PART, min_size=1, max_size=4)


def tree(paths):
    """A tree with a leaf at each path; where a path goes through a leaf, it becomes a container."""
    root = nn.Module()
    for path in paths:
        at = root
        for part in path:
            if part not in at._modules:
                assume(not hasattr(at, part))
                at.add_module(part, nn.Module())
            at = at._modules[part]
    return root


@given(st.text(alphabet="ab.", max_size=8))
def test_parent_and_name_put_together_are_the_name_again(target):
    parent, name = fxr._parent_name(target)
    assert "." not in name
    assert (f"{parent}." if "." in target else "") + name == target


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("a", ("", "a")),
        ("a.b", ("a", "b")),
        ("layer1.0.conv", ("layer1.0", "conv")),
        ("", ("", "")),
    ],
)
def test_parent_name_of_root_level_and_nested_names(target, expected):
    assert fxr._parent_name(target) == expected


@given(st.lists(PATH, min_size=1, max_size=5))
def test_every_module_is_found_by_its_qualified_name(paths):
    root = tree(paths)
    for name, module in root.named_modules():
        assert fxr.helpers.get_submodule(root, name) is module is root.get_submodule(name)


@given(st.lists(PATH, min_size=1, max_size=5), st.data())
def test_what_is_set_is_got_and_nothing_else_changes(paths, data):
    root = tree(paths)
    target = ".".join(data.draw(st.sampled_from(paths)))
    before, new = dict(root.named_modules()), nn.ReLU()
    fxr.helpers.set_submodule(root, target, new)
    assert fxr.helpers.get_submodule(root, target) is new
    after = dict(root.named_modules())
    gone = {name for name in before if name == target or name.startswith(f"{target}.")}
    assert after == {**{k: v for k, v in before.items() if k not in gone}, target: new}


@given(st.lists(PATH, min_size=1, max_size=5), st.data())
def test_what_is_deleted_is_gone_with_all_inside_and_nothing_else(paths, data):
    root = tree(paths)
    target = ".".join(data.draw(st.sampled_from(paths)))
    before = dict(root.named_modules())
    fxr.helpers.delete_submodule(root, target)
    assert dict(root.named_modules()) == {
        name: module
        for name, module in before.items()
        if name != target and not name.startswith(f"{target}.")
    }
    with pytest.raises(AttributeError):
        fxr.helpers.get_submodule(root, target)


def test_set_makes_a_new_name_and_takes_over_one_that_held_something_else():
    root = nn.Sequential(nn.Linear(2, 2))
    fxr.helpers.set_submodule(root, "0.act", nn.ReLU())
    assert type(root[0].act) is nn.ReLU
    root.plain = torch.relu
    fxr.helpers.set_submodule(root, "plain", nn.GELU())
    assert type(root.plain) is nn.GELU


@pytest.mark.parametrize(
    "target", ["nowhere", "0.nowhere", "0.nowhere.deep", "0.", ".0", "0.weight"]
)
def test_a_name_that_is_not_there_says_which_part_is_missing(target):
    root = nn.Sequential(nn.Linear(2, 2))
    missing = next(p for p in target.split(".") if p != "0" or target.startswith("."))
    for act in (fxr.helpers.get_submodule, fxr.helpers.delete_submodule):
        with pytest.raises(AttributeError, match=f"has no submodule '{missing}'"):
            act(root, target)


def test_a_parent_that_is_not_there_is_not_made():
    root = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AttributeError, match="Sequential has no submodule 'a'"):
        fxr.helpers.set_submodule(root, "a.b", nn.ReLU())
    assert list(root._modules) == ["0"]


def test_the_root_itself_is_got_and_neither_set_nor_deleted():
    root = nn.Sequential()
    assert fxr.helpers.get_submodule(root, "") is root
    with pytest.raises(ValueError, match="the root module itself can't be replaced"):
        fxr.helpers.set_submodule(root, "", nn.ReLU())
    with pytest.raises(ValueError, match="the root module itself can't be deleted"):
        fxr.helpers.delete_submodule(root, "")


@given(PART, st.sets(PART))
def test_a_fresh_name_is_not_taken_and_the_first_of_its_kind(base, taken):
    taken = taken | {base, f"{base}_1"}
    name = fxr.helpers.fresh_name(base, taken)
    assert name not in taken
    candidates = [base, *(f"{base}_{i}" for i in range(1, len(taken) + 2))]
    assert name == next(each for each in candidates if each not in taken)


def test_a_free_name_is_kept():
    assert fxr.helpers.fresh_name("layer.0.conv", ()) == "layer.0.conv"
    assert fxr.helpers.fresh_name("layer.0.conv", ["layer.0.conv"]) == "layer.0.conv_1"


def nested():
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    return fx.symbolic_trace(nn.Sequential(nn.Tanh(), inner).eval())


@pytest.mark.parametrize("target", ["0", "1.0", "1.1"])
@pytest.mark.parametrize("with_root", [True, False])
def test_replace_node_module_puts_the_new_module_into_tree_and_dict(target, with_root):
    traced = nested()
    modules = dict(traced.named_modules())
    if not with_root:
        del modules[""]
    node = next(each for each in traced.graph.nodes if each.target == target)
    others = {name: module for name, module in modules.items() if name != target}
    new = nn.Identity()
    fxr.helpers.replace_node_module(node, modules, new)
    assert traced.get_submodule(target) is modules[target] is new
    assert {name: module for name, module in modules.items() if name != target} == others
    traced.recompile()
    x = torch.linspace(-1, 1, 2)
    steps = [modules[name] if name != target else new for name in ("0", "1.0", "1.1")]
    assert torch.equal(traced(x), nn.Sequential(*steps)(x))


def test_replace_node_module_refuses_what_calls_no_module():
    traced = nested()
    placeholder = next(iter(traced.graph.nodes))
    with pytest.raises(ValueError, match="node 'input_1' is a placeholder, not a call_module"):
        fxr.helpers.replace_node_module(placeholder, {"": traced}, nn.ReLU())
    graph = fx.Graph()
    node = graph.call_module("a", (graph.placeholder("x"),))
    with pytest.raises(ValueError, match="neither `modules` nor its graph names a root module"):
        fxr.helpers.replace_node_module(node, {}, nn.ReLU())
