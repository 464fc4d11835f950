"""Record in graphs what example inputs, and a run on them, show of the shapes of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ir.graph_view import GraphView
from ..module_utils.running import arguments_of
from ..targets.evidence import Evidence, in_order
from ..targets.graph_module import graph_module

SEVERAL = "the run on the example_inputs shows no shape that it always has"


def record_shapes_of_inputs(views: Sequence[GraphView], example_inputs: Any) -> str | None:
    """Record the shapes that values of the model's own graph, the first, have for these inputs.

    Gives why some of them are not known, or None.
    """
    if example_inputs is None or not views or views[0].part:
        return None
    given = in_order(*arguments_of(example_inputs), _names_of_inputs(views[0]))
    unknown = _record_shapes(views[0], given)
    views[0].unknown = f"the example_inputs do not show it: {unknown or 'it is no tensor'}"
    return unknown


def record_shapes_of_parts(views: Sequence[GraphView], evidence: Evidence) -> None:
    """Record the shapes of values in parts, as far as a run showed what the parts are given."""
    for view in (each for each in views if each.part):
        given = evidence.inputs(view.part, _names_of_inputs(view))
        if given is not None:
            _record_shapes(view, given)
        view.unknown = SEVERAL


def _names_of_inputs(view: GraphView) -> list[str]:
    return [str(node.target) for node in view.graph.find_nodes(op="placeholder")]


def _record_shapes(view: GraphView, inputs: tuple[Any, ...]) -> str | None:
    from ..ir.shape_inference import record_shapes  # with sympy, which takes long to import

    return record_shapes(graph_module(view), inputs)
