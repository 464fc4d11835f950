"""Rules as a pass of `torch.fx.passes`."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..api import Rewriter
from ..rules.registry import Rules


def fx_pass(rules: Rules) -> Callable[[fx.GraphModule], PassResult]:
    """Rules as a function that takes a graph module, as a `PassManager` of `torch.fx` wants it.

    The graph module that it is given stays as it is. The result has a new graph module if a rule
    was applied, and the given one otherwise.

    >>> import fxrewrite as fxr
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval()
    >>> result = fxr.integrations.fx_pass("conv_bn")(fx.symbolic_trace(model))
    >>> result.modified, len(result.graph_module.graph.nodes)
    (True, 3)

    Args:
        rules: as in `rewrite`.

    Raises:
        UnknownRuleSetError: no rule set has the given name.
    """
    rewriter = Rewriter(rules)

    def run(graph_module: fx.GraphModule) -> PassResult:
        made, report = rewriter.rewrite(graph_module)
        return PassResult(made, True) if report.applied else PassResult(graph_module, False)

    return run
