"""Print how far our nets are from their peers: the table of docs/weights.md.

python -m tests.peers.table
"""

from dataclasses import replace

import jax

from tests import test_parity as parity

PARTS = ("stack1", "stack2", "stack3", "stack4", "logits")


def main() -> None:
    """A line for each preset and size of images; last, the worst part in float32."""
    print(
        "| preset | images | stack 1 | stack 2 | stack 3 | stack 4 | logits | float32 |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for preset, side in parity.CASES:
        with jax.enable_x64(True):
            apart = parity.differences(preset, side)
            variables = parity.variables_of(preset)
        model = parity.net(preset)
        single = model.clone(execution=replace(model.execution, dtype="float32"))
        narrow = jax.tree.map(lambda x: x.astype("float32"), variables)
        less = parity.differences(preset, side, single, narrow)
        cells = [f"{apart[part]:.1e}" for part in PARTS] + [f"{max(less.values()):.1e}"]
        print(f"| {preset} | {side} x {side} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
