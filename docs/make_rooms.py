"""Draw the packages of fxrewrite as its import contract layers them: `python docs/make_rooms.py`.

The layers come from the contract that import-linter checks, the words from each package's
docstring, so the picture says what is enforced. A test fails where it is out of date.
"""

from __future__ import annotations

import ast
import html
import re
import textwrap
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "rooms.svg"
_WIDTH, _MARGIN, _GAP, _LINE, _CHARACTER = 860, 20, 10, 16, 6.3


def layers() -> list[list[str]]:
    """The packages of each layer of the contract, the highest layer first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contract: dict[str, Any] = next(c for c in settings["contracts"] if c["type"] == "layers")
    rows = [re.split(r"[|:]", str(layer)) for layer in contract["layers"]]
    return [[name.strip(" ()").removeprefix("fxrewrite.") for name in row] for row in rows]


def sentence(package: str) -> str:
    """What a package, or a file at the top, is for: the first sentence of its docstring."""
    folder = ROOT / "patterns" if package == "patterns" else ROOT / "fxrewrite" / package
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    said = ast.get_docstring(ast.parse(file.read_text())) or ""
    return re.split(r"(?<=\.)\s", " ".join(said.split()))[0]


def picture(rows: list[list[str]]) -> str:
    """The layers as SVG, one row each."""
    parts, y = [], _MARGIN
    for row in rows:
        width = (_WIDTH - 2 * _MARGIN - _GAP * (len(row) - 1)) / len(row)
        texts = [textwrap.wrap(sentence(name), int((width - 20) / _CHARACTER)) for name in row]
        height = (max(map(len, texts)) + 1) * _LINE + 14
        for i, (name, lines) in enumerate(zip(row, texts, strict=True)):
            parts += _box(_MARGIN + i * (width + _GAP), y, width, height, name, lines)
        y += height + _GAP
    size = f'width="{_WIDTH}" height="{y + _MARGIN - _GAP:.0f}"'
    style = 'font-family="DejaVu Sans, Arial, sans-serif" font-size="11"'
    title = "<title>The packages of fxrewrite; each imports only those below it</title>"
    background = '<rect width="100%" height="100%" fill="white"/>'
    body = "\n".join([title, background, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'


def _box(x: float, y: float, width: float, height: float, name: str, lines: list[str]) -> list[str]:
    box = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    parts = [f'<rect {box} rx="6" fill="#eef3fa" stroke="#5b7ba6"/>']
    for i, line in enumerate([name, *lines]):
        weight = ' font-weight="bold" font-size="13"' if not i else ""
        at = f'x="{x + 10:.1f}" y="{y + 20 + i * _LINE:.1f}"'
        parts.append(f"<text {at}{weight}>{html.escape(line)}</text>")
    return parts


if __name__ == "__main__":
    PICTURE.write_text(picture(layers()))
    print(f"wrote {PICTURE.relative_to(ROOT)}")
