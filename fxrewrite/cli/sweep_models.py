"""Which models a sweep goes through, how each is built, and which inputs it may take."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import nn

from ..errors import FxRewriteError, LoadError
from ..module_utils.running import SEED
from .loading import build_model
from .randomising import random_input

# Images of these sides are tried in turn, and the first that a model takes is used.
_SIDES = (64, 96, 128, 224, 256, 299, 384)
_LIBRARIES = ("torchvision", "timm")


class SourceError(FxRewriteError):
    """What a sweep should go through can't be found or read."""


@attrs.frozen
class Subject:
    """A model of a sweep: `torchvision/NAME`, `timm/NAME` or `package.module:callable`.

    `shapes` describes its inputs as on the command line; without, some are tried.
    """

    name: str
    shapes: tuple[str, ...] = ()

    @property
    def collection(self) -> str:
        """The collection whose name for the model this is, or nothing."""
        library, slash, _ = self.name.partition("/")
        return library if slash and library in _LIBRARIES and ":" not in self.name else ""


def subjects(source: str, patterns: Sequence[str] = ()) -> list[Subject]:
    """The models of a library, or those that a file has one a line of, each named once.

    >>> [each.name for each in subjects("torchvision", ["resnet1*"])]
    ['torchvision/resnet101', 'torchvision/resnet152', 'torchvision/resnet18']

    Args:
        source: `torchvision`, `timm`, or a file. In each line of that stands a model and after it,
            where a single image won't do, its inputs, such as `models.py:net 1,16:int64`; empty
            lines and those that begin with `#` don't count.
        patterns: keep only names that match one of these, as file names match `resnet*`.

    Raises:
        SourceError: there is no such library or file, or it has no such model.
    """
    if source in _LIBRARIES:
        found = [Subject(f"{source}/{name}") for name in _names(source)]
    else:
        found = list(_in_file(Path(source)))
    unique = list({each.name: each for each in found}.values())
    kept = [each for each in unique if not patterns or _matches(each.name, patterns)]
    if not kept:
        chosen = f" that matches {' or '.join(patterns)}" if patterns else ""
        raise SourceError(f"{source} has no model{chosen}")
    return kept


def build(subject: Subject) -> nn.Module:
    """The model in eval mode and with random weights from a fixed seed; nothing is downloaded.

    Raises:
        LoadError: it can't be built.
    """
    if not subject.collection:
        return build_model(subject.name)
    name = subject.name.partition("/")[2]
    torch.manual_seed(SEED)
    make = _from_timm if subject.collection == "timm" else _from_torchvision
    try:
        return make(name).eval()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise LoadError(f"{subject.name} can't be built: {said}") from error


def inputs_to_try(subject: Subject, model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Inputs to try, small ones first; the first that the model takes is the one to use."""
    if subject.shapes:
        yield tuple(random_input(each, model) for each in subject.shapes)
        return
    for shapes in _shapes(subject, model):
        made = tuple(random_input(",".join(map(str, shape)), model) for shape in shapes)
        yield ([made[0][0].sigmoid()],) if _category(subject) == "detection" else made


def _names(library: str) -> list[str]:
    try:
        if library == "timm":
            import timm

            return list(timm.list_models())
        from torchvision import models  # type: ignore[import-untyped]

        return list(models.list_models())
    except ModuleNotFoundError as error:
        raise SourceError(f"{error.name} is missing; pip install {library}") from error


def _in_file(path: Path) -> Iterator[Subject]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{path} is neither {' nor '.join(_LIBRARIES)} nor a text file with a model per line"
        ) from error
    for line in lines:
        name, *shapes = line.split() or ["#"]
        if not name.startswith("#"):
            yield Subject(name, tuple(shapes))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    short = name.partition("/")[2] or name
    return any(fnmatch.fnmatch(each, pattern) for each in (name, short) for pattern in patterns)


def _from_timm(name: str) -> nn.Module:
    import timm

    made: nn.Module = timm.create_model(name, pretrained=False)
    return made


def _from_torchvision(name: str) -> nn.Module:
    from torchvision import models

    make = models.get_model_builder(name)
    given: dict[str, Any] = {}
    if "weights_backbone" in inspect.signature(make).parameters:
        given["weights_backbone"] = None
    if _category_of(make) == "detection":
        # With random weights nothing scores above the usual thresholds, and the output is empty.
        prefix = "box_" if "rcnn" in name else ""
        given |= {f"{prefix}score_thresh": 0.0, f"{prefix}detections_per_img": 10}
        if "ssd" not in name:
            given |= {"min_size": 128, "max_size": 128}
    made: nn.Module = make(weights=None, **given)
    return made


def _category(subject: Subject) -> str:
    if subject.collection != "torchvision":
        return ""
    from torchvision import models

    return _category_of(models.get_model_builder(subject.name.partition("/")[2]))


def _category_of(make: Callable[..., Any]) -> str:
    """The kind of a torchvision model: the package that its builder is in, such as `detection`."""
    return make.__module__.removeprefix("torchvision.models.").partition(".")[0]


def _shapes(subject: Subject, model: nn.Module) -> Iterator[tuple[tuple[int, ...], ...]]:
    category = _category(subject)
    if category == "detection":
        yield ((1, 3, 128, 128),)
    elif category == "video":
        yield from (((1, 3, frames, s, s),) for frames, s in ((8, 64), (16, 112), (16, 224)))
    elif category == "optical_flow":
        yield ((1, 3, 128, 128), (1, 3, 128, 128))
    else:
        config = getattr(model, "pretrained_cfg", None) or {}
        channels, *usual = config.get("input_size") or (3, 224, 224)
        if not config.get("fixed_input_size"):
            least = min(config.get("min_input_size") or (0,))
            yield from (((1, channels, s, s),) for s in _SIDES if least <= s < max(usual))
        yield ((1, channels, *usual),)
