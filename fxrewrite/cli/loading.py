"""Build the model that a command line names, and load weights into it."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import operator
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..checkpoint.load import read_state
from ..errors import LoadError
from ..module_utils.names import fresh_name
from ..module_utils.running import SEED


def build_model(spec: str) -> nn.Module:
    """The model that a callable without arguments builds, in eval mode and from a fixed seed.

    >>> build_model("torch.nn:Identity")
    Identity()

    Args:
        spec: `package.module:callable` or `path/file.py:callable`.

    Raises:
        LoadError: there is no such callable, or it builds no model.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise LoadError(
            f"{spec!r} names no callable; write package.module:callable or file.py:callable"
        )
    module = _from_file(where) if where.endswith(".py") else _from_package(where)
    try:
        build = operator.attrgetter(name)(module)
    except AttributeError as error:
        raise LoadError(f"{where} has no {name!r}") from error
    if not isinstance(build, nn.Module):
        _check_callable(spec, build)
    torch.manual_seed(SEED)
    try:
        model = build if isinstance(build, nn.Module) else build()
        if isinstance(model, nn.Module):
            return model.eval()
    except (Exception, SystemExit) as error:
        raise LoadError(f"{spec} can't be built: {_said(error)}") from error
    raise LoadError(f"{spec} built no nn.Module but a value of type {type(model).__name__}")


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of weights, as `read_state` reads it, into a model.

    Raises:
        LoadError: the file can't be read, or does not fit the model.
    """
    state = read_state(path)
    try:
        model.load_state_dict(state)
    except Exception as error:
        raise LoadError(f"weights file {path} does not fit the model: {error}") from error


def _from_file(where: str) -> ModuleType:
    path = Path(where).resolve()
    if not path.is_file():
        raise LoadError(f"there is no file {where}")
    sys.path.insert(0, str(path.parent))
    name = fresh_name(path.stem, sys.modules)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Under its name pickle finds the file's classes when the model is saved.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise LoadError(f"{where} can't be imported: {_said(error)}") from error
    return module


def _from_package(where: str) -> ModuleType:
    # As `python -m` does, so that a package in the present folder is found.
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(where)
    except (Exception, SystemExit) as error:
        raise LoadError(f"{where} can't be imported: {_said(error)}") from error


def _check_callable(spec: str, build: Any) -> None:
    if not callable(build):
        kind = type(build).__name__
        raise LoadError(f"{spec} is of type {kind}, not a callable that builds a model")
    try:
        inspect.signature(build).bind()
    except TypeError as error:
        raise LoadError(f"{spec} can't be called without arguments: {error}") from error
    except ValueError:
        pass  # some built-in callables don't tell their arguments


def _said(error: BaseException) -> str:
    """An error and, where it came from somebody's own code, the last line of that."""
    ours = ("<frozen", str(Path(__file__).parent.parent), str(Path(importlib.__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [each for each in frames if not each.filename.startswith(ours)]
    at = f" ({Path(theirs[-1].filename).name}:{theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {error}{at}"
