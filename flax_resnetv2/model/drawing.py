"""A net as a picture in the manner of the article's figures: SVG, from the plan.

>>> picture = draw_net(plan(Architecture(), (32, 32, 3)), (32, 32, 3))
>>> Path("net.svg").write_text(picture, encoding="utf-8")
"""

from collections.abc import Iterator
from itertools import groupby
from xml.sax.saxutils import escape

from flax_resnetv2.model import planning
from flax_resnetv2.model.layer_table import layer_table

WIDTH, LEFT, RIGHT = 800, 150, 640
"""Width of the picture; where a unit's input enters, and where its branches add up."""
MIDDLE = (LEFT + RIGHT) // 2
ROW = 112
"""Height of a unit."""
TIMES = "\N{MULTIPLICATION SIGN}"
STYLE = """
text { font: 13px sans-serif; fill: #1d2733; text-anchor: middle; }
.small { font-size: 11px; fill: #52606d; }
.left { text-anchor: start; } .right { text-anchor: end; }
.title { font-weight: bold; text-anchor: start; }
rect { fill: #fff; stroke: #52606d; rx: 4px; }
.stack { fill: #f3f6f9; stroke: #c5d0da; rx: 8px; }
.layer { fill: #dcebfa; stroke: #3b7cb8; }
.special { fill: #fde6cf; stroke: #c97a2b; }
.outer { fill: #e6efe2; stroke: #5f8a4c; }
.arrow { fill: none; stroke: #1d2733; stroke-width: 1.4; marker-end: url(#tip); }
.carried { stroke: #7b8794; stroke-width: 2; }
.other { stroke: #c97a2b; stroke-width: 2; }
.bridge { stroke: #8a4c86; stroke-width: 2; }
circle { fill: #fff; stroke: #1d2733; stroke-width: 1.4; }
"""


def draw_net(net: planning.NetPlan, image_shape: tuple[int, int, int]) -> str:
    """Draw stem, stacks, units, layers, shortcuts, bridges and head as SVG.

    Equal units in sequence are drawn once, with their number. Shortcuts that change
    their input (the article's "special shortcut connection") are orange.
    ``image_shape`` is (height, width, channels) of the net's input.
    """
    shapes = {row.name: row.shape for row in layer_table(net, image_shape)}
    pieces = [_text(MIDDLE, 20, f"image {_shape(image_shape)}")]
    y = 20
    for suffix, conv, norm in net.stem.layers() if net.stem else ():
        words = f"stem: {_conv(conv)}" + (" · norm · ReLU" if norm else "")
        y = _outer(pieces, y, words, _shape(shapes[f"stem/conv{suffix}"]))
    if net.stem and net.stem.pool:
        y = _outer(pieces, y, f"stem: max-pool 3{TIMES}3 /2")
    for number, stack in enumerate(net.stacks, start=1):
        layers = len(stack.units[-1].layers)
        last = f"stack{number}/unit{len(stack.units)}/layer{layers}/conv"
        y = _stack(pieces, y, stack, f"stack {number}", _shape(shapes[last]))
    height, body = _head(pieces, y, net.head) + 16, "\n".join(pieces)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}">\n<style>{STYLE}</style>\n'
        '<defs><marker id="tip" markerUnits="userSpaceOnUse" markerWidth="8" '
        'markerHeight="8" refX="7" refY="4" orient="auto">'
        '<path d="M0,1 L7,4 L0,7 z" style="fill:#1d2733"/>'
        "</marker></defs>\n"
        f'<rect width="{WIDTH}" height="{height}" style="stroke:none"/>\n'
        f"{body}\n</svg>\n"
    )


def _stack(
    pieces: list[str], y: int, stack: planning.StackPlan, name: str, shape: str
) -> int:
    """Draw a stack below ``y``; return its bottom edge."""
    runs = [(unit, len(list(same))) for unit, same in groupby(stack.units)]
    # A bridge passes on the left, with its name above.
    top = y + (24 if stack.bridge is None else 46)
    inner = top + 30
    bottom = inner + ROW * len(runs)
    units = len(stack.units)
    title = f"{name}: {units} {'unit' if units == 1 else 'units'}"
    box = _box(60, top, WIDTH - 120, bottom - top, "stack")
    pieces.append(_arrow(f"M{MIDDLE},{y + 8} V{top - 2}"))
    pieces.append(box + _text(74, top + 20, title, "title"))
    pieces.append(_text(WIDTH - 74, top + 20, shape, "right"))
    number = 1
    for k, (unit, count) in enumerate(runs):
        names = f"unit {number}"
        if count > 1:
            names = f"units {number} to {number + count - 1}"
        pieces.append("".join(_unit(unit, names, count, inner + ROW * k)))
        number += count
    if stack.bridge is not None:
        words = "identity" if stack.bridge == "identity" else _conv(stack.bridge)
        line = f"M{MIDDLE},{top - 10} H40 V{bottom + 10} H{MIDDLE - 2}"
        label = _text(44, top - 15, f"bridge: {words}", "small left")
        pieces.append(_arrow(line, "bridge") + label)
    return bottom


def _unit(unit: planning.UnitPlan, names: str, count: int, y: int) -> Iterator[str]:
    """Draw the layers from left to right, the shortcut below them, and the sum."""
    line, low, split = y + 24, y + 76, LEFT + 8
    step = (RIGHT - LEFT - 40) // len(unit.layers)
    yield _text(74, line + 4, names, "small left")
    x = LEFT
    for number, layer in enumerate(unit.layers):
        start = LEFT + 20 + number * step
        yield _arrow(f"M{x},{line} H{start - 2}")
        yield _layer(layer, start, line - 20, step - 24)
        x = start + step - 24
    yield _arrow(f"M{x},{line} H{RIGHT - 11}")
    special = unit.shortcut is not None or unit.select > 1
    carried = f"M{split},{line} V{low} H{RIGHT} V{line + 12}"
    yield _arrow(carried, "other" if special else "carried")
    middle = (split + RIGHT) // 2
    if unit.shortcut is None:
        side = f"{unit.select}{TIMES}{unit.select}"
        words = f"one pixel of {side}" if special else "identity"
        yield _text(middle, low - 6, words, "small")
    else:
        words = _conv(unit.shortcut)
        if unit.average > 1:
            words = f"average {unit.average}{TIMES}{unit.average} · {words}"
        if unit.shortcut_norm is not None:
            words += " · norm"
        if unit.shared_preactivation:
            words = f"norm · ReLU of layer 1 · {words}"
        wide = 7 * len(words) + 24
        yield _box(middle - wide // 2, low - 14, wide, 28, "special")
        yield _text(middle, low + 4, words)
    yield f'<circle cx="{RIGHT}" cy="{line}" r="11"/>'
    yield _text(RIGHT, line + 5, "+")
    if unit.relu:
        yield _text(RIGHT + 40, line - 14, "ReLU", "small")
    yield _arrow(f"M{RIGHT + 11},{line} H{RIGHT + 44}")
    if count > 1:
        yield _text(RIGHT + 70, line + 5, f"{TIMES} {count}")


def _layer(layer: planning.LayerPlan, x: int, y: int, width: int) -> str:
    """Draw a box with the convolution, and its norm above or below."""
    lines = [(_conv(layer.conv), "")]
    if layer.norm is not None:
        norm = "norm · ReLU" if layer.norm.relu else "norm"
        lines.insert(layer.norm_last, (norm, "small"))
    first = y + (25 if layer.norm is None else 16)
    return _box(x, y, width, 40, "layer") + "".join(
        _text(x + width // 2, first + 17 * k, words, kind)
        for k, (words, kind) in enumerate(lines)
    )


def _head(pieces: list[str], y: int, head: planning.HeadPlan) -> int:
    """Draw the head below ``y``; return its bottom edge."""
    output = {"classifier": "logits", "latent": "latent", "none": "maps"}[head.kind]
    steps = ["norm · ReLU"] if head.norm else []
    if head.kind != "none":
        steps.append("average" if head.pooled else "flatten")
        steps += [f"FC {features} · ReLU" for features in head.hidden]
        steps.append(f"FC → {head.features} {output}")
        if head.variance:
            steps.append("log-variance")
    return _outer(pieces, y, "head: " + " · ".join(steps or [output]))


def _outer(pieces: list[str], y: int, words: str, shape: str = "") -> int:
    """Draw a box outside the stacks below ``y``; return its bottom edge."""
    top = y + 26
    piece = _arrow(f"M{MIDDLE},{y + 8} V{top - 2}")
    piece += _box(LEFT + 20, top, RIGHT - LEFT - 40, 30, "outer")
    piece += _text(MIDDLE, top + 20, words)
    if shape:
        piece += _text(WIDTH - 74, top + 20, shape, "right")
    pieces.append(piece)
    return top + 30


def _conv(conv: planning.ConvPlan) -> str:
    stride = f" /{conv.stride}" if conv.stride > 1 else ""
    return f"{conv.kernel}{TIMES}{conv.kernel} → {conv.width}{stride}"


def _shape(shape: tuple[int, ...]) -> str:
    return TIMES.join(map(str, shape))


def _text(x: int, y: int, words: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(words)}</text>'


def _box(x: int, y: int, width: int, height: int, kind: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" class="{kind}"/>'


def _arrow(line: str, kind: str = "") -> str:
    return f'<path d="{line}" class="arrow {kind}"/>'
