"""The picture of the packages is the one that the import contract gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_rooms", DOCS / "make_rooms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_up_to_date() -> None:
    """`python docs/make_rooms.py` draws it anew."""
    rooms = script()
    assert rooms.PICTURE.read_text() == rooms.picture(rooms.layers())


def test_every_package_is_in_the_picture() -> None:
    shown = {name for layer in script().layers() for name in layer}
    root = DOCS.parent / "fxrewrite"
    packages = {each.parent.name for each in root.glob("*/__init__.py")}
    assert packages <= shown
