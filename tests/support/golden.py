"""The golden parameter trees: ``python -m tests.support.golden`` writes them anew."""

import json
import re
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp

from flax_resnetv2 import PRESETS, create_model

DIRECTORY = Path(__file__).parents[1] / "golden"


@cache
def variable_shapes(architecture):
    """Shapes of all variables for 32x32 images, without computing any."""
    model = create_model(architecture)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    init = lambda x: model.init(jax.random.key(0), x, train=False)  # noqa: E731
    return jax.eval_shape(init, images)


def tree(architecture):
    """{"params": {path: shape}, ...}; equal units in a row share a line of their own.

    Paths of units 2 to 18 become "stack1/unit2..18/..." if their shapes agree.
    """
    return {
        collection: _collapse(
            {
                "/".join(key.key for key in path): list(leaf.shape)
                for path, leaf in jax.tree.leaves_with_path(shapes)
            }
        )
        for collection, shapes in variable_shapes(architecture).items()
    }


def _collapse(shapes):
    units, rest = {}, {}
    for path, shape in shapes.items():
        if found := re.fullmatch(r"(stack\d+)/unit(\d+)/(.+)", path):
            stack, number, inner = found.groups()
            units.setdefault(stack, {}).setdefault(int(number), {})[inner] = shape
        else:
            rest[path] = shape
    for stack, by_number in units.items():
        first = 1
        for number in range(1, len(by_number) + 1):
            if by_number.get(number + 1) != by_number[number]:
                span = str(number) if first == number else f"{first}..{number}"
                for inner, shape in by_number[number].items():
                    rest[f"{stack}/unit{span}/{inner}"] = shape
                first = number + 1
    return dict(sorted(rest.items()))


def write():
    """Write one JSON file a preset."""
    DIRECTORY.mkdir(exist_ok=True)
    for name, preset in PRESETS.items():
        text = json.dumps(tree(preset.architecture), indent=1)
        # A shape on one line.
        text = re.sub(r"\[\s+([\d,\s]+?)\s+\]", _one_line, text)
        (DIRECTORY / f"{name}.json").write_text(text + "\n")


def _one_line(found):
    return "[" + ", ".join(re.findall(r"\d+", found.group(1))) + "]"


if __name__ == "__main__":
    write()
