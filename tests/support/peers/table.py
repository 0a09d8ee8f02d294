"""Print how far our nets are from their peers: the table of docs/weights.md.

python -m tests.support.peers.table
"""

from dataclasses import replace

import jax

from tests.promises import test_parity as parity

PARTS = ("stack1", "stack2", "stack3", "stack4", "logits")


def main() -> None:
    """A line for each preset and size of images; last, the worst part in float32.

    Below, one training step: the worst tensor of each kind.
    """
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
    with jax.enable_x64(True):
        apart = parity.training_differences()
    for kind in ("statistics", "gradient"):
        found = {name: x for name, x in apart.items() if name.startswith(kind)}
        worst = max(found, key=found.get)
        print(f"{parity.SHALLOWEST}, one training step: {worst} {found[worst]:.1e}")


if __name__ == "__main__":
    main()
