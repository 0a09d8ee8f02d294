"""The folders of the package and what they import, read from the syntax trees.

``python -m tests.repository.test_docs`` draws them into ``docs/structure.svg``.
"""

import ast
from collections import Counter
from pathlib import Path

import flax_resnetv2

PACKAGE = Path(flax_resnetv2.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

FOLDERS = {
    "errors": "",
    "validation": "",
    "system": "jax numpy absl",
    "model": "jax flax numpy h5py safetensors",
    "data": "jax numpy tensorflow_datasets array_record grain PIL rich absl",
    "training": "jax flax optax",
    "run": "jax numpy orbax rich tensorboardX matplotlib",
    "inference": "jax flax numpy safetensors PIL jax2onnx",
    "reports": "jax numpy matplotlib PIL",
    "cli": "jax numpy rich tyro",
}
"""Folders and files of the package from bottom to top, each with the third-party
packages that it may import. A folder imports itself and those above it in this list."""


def folder_of(path):
    """Return the folder of a file, or the file itself if it is in no folder."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def tree_of(path):
    return ast.parse(path.read_text())


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports(node):
    """Yield the dotted name of everything imported below ``node`` at run time."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            yield child.module
        yield from imports(child)


def arrows():
    """Count the imports between folders: {(importing, imported): number}."""
    found = Counter()
    for path in FILES:
        if path.parent == PACKAGE and path.stem.startswith("__"):
            continue
        for name in imports(tree_of(path)):
            package, *rest = name.split(".")
            if package == "flax_resnetv2" and rest[0] != folder_of(path):
                found[folder_of(path), rest[0]] += 1
    return found


# The drawing has the folders on a diagonal, the lowest at the bottom left. A folder's
# imports leave its box to the left and turn down to the boxes that they import.

STEP_X, STEP_Y, WIDTH, HEIGHT, LEFT, TOP = 78, 54, 96, 34, 16, 16
STYLE = """
text { font: 14px sans-serif; fill: #1d2733; }
.name { font-weight: bold; text-anchor: middle; }
.packages { font-size: 12px; fill: #52606d; }
.count { font-size: 12px; text-anchor: middle; }
.box { fill: #dcebfa; stroke: #3b7cb8; rx: 5px; }
.line { stroke: #9aa8b5; stroke-width: 1.3; fill: none; }
.down { marker-end: url(#tip); }
circle { fill: #fff; stroke: #3b7cb8; }
"""


def draw():
    """Return the folders and the arrows between them as SVG."""
    names, counts = list(FOLDERS), arrows()
    x = {name: LEFT + WIDTH // 2 + STEP_X * k for k, name in enumerate(names)}
    y = {name: TOP + HEIGHT // 2 + STEP_Y * k for k, name in enumerate(names[::-1])}
    lines, dots, boxes = [], [], []
    for name in names:
        imported = [other for other in names if counts[name, other]]
        importing = [other for other in names if counts[other, name]]
        if imported:
            start, end = x[name] - WIDTH // 2, min(x[other] for other in imported)
            lines.append(f'<path class="line" d="M{start} {y[name]}H{end}"/>')
        if importing:
            start, end = min(y[other] for other in importing), y[name] - HEIGHT // 2
            lines.append(f'<path class="line down" d="M{x[name]} {start}V{end}"/>')
        for other in imported:
            at = f'cx="{x[other]}" cy="{y[name]}" r="12"'
            dots.append(f"<circle {at}/>")
            dots.append(_text("count", x[other], y[name] + 4, counts[name, other]))
        left, top = x[name] - WIDTH // 2, y[name] - HEIGHT // 2
        size = f'width="{WIDTH}" height="{HEIGHT}"'
        boxes.append(f'<rect class="box" x="{left}" y="{top}" {size}/>')
        boxes.append(_text("name", x[name], y[name] + 5, name))
        right = x[name] + WIDTH // 2 + 10
        boxes.append(_text("packages", right, y[name] + 4, FOLDERS[name]))
    width, height = 960, TOP * 2 + HEIGHT + STEP_Y * (len(names) - 1)
    size = f'width="{width}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
            f'viewBox="0 0 {width} {height}">',
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" '
            'orient="auto"><path d="M0 0L8 4L0 8z" fill="#52606d"/></marker></defs>',
            f'<rect {size} fill="#fff"/>',
            *(lines + dots + boxes),
            "</svg>\n",
        ]
    )


def _text(kind, x, y, text):
    return f'<text class="{kind}" x="{x}" y="{y}">{text}</text>'
