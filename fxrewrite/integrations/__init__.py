"""Rules for other people's pipelines: dynamo backends, inductor passes, passes of torch.fx."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..pipeline.rule_lists import apart
from ..rules.registry import Rules, resolve
from .dynamo_backend import backend
from .fx_pass import fx_pass

if TYPE_CHECKING:
    from .inductor import InductorPass

__all__ = ["backend", "fx_pass", "inductor_pass"]


def inductor_pass(rules: Rules) -> InductorPass:
    """Rules for one of inductor's hooks, such as `config.post_grad_custom_pre_pass`.

    >>> import fxrewrite as fxr
    >>> from torch._inductor import config
    >>> with config.patch(post_grad_custom_pre_pass=fxr.integrations.inductor_pass("conv_bn")):
    ...     pass  # what is compiled here goes through the rules

    Args:
        rules: as in `rewrite`.

    Raises:
        UnknownRuleSetError: no rule set has the given name.
    """
    from .inductor import InductorPass  # inductor takes seconds to import

    return InductorPass(apart(resolve(rules)))
