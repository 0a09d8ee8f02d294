"""What a training run needs of a device, known before anything is compiled.

Counted from the plan: parameters, FLOPs, and the memory that the backward pass finds
kept. ``Needs.check`` refuses a run that cannot fit, and says what would.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.architecture import LAYERS, Architecture, Execution
from flax_resnetv2.model.layer_table import LayerRow, layer_table

PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 61.5e12,
}
"""Dense half-precision FLOP/s by a part of a device's kind, the first that fits: the
makers' data sheets of the SXM variants (bfloat16; V100: float16), and of TPU chips (v3:
of a core, half a chip, which is JAX's device)."""

_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Needs:
    """What one training step takes."""

    parameters: int
    """Numbers that are learned."""
    flops: float
    """Of one image: six for each multiply-add of the forward pass."""
    image_bytes: int
    """Kept of one image until the backward pass has used it."""
    fixed_bytes: int
    """On each device whatever the batch: gradients and, once known, state and data."""
    execution: Execution
    """The way of running that this is for."""
    parts: int = 1
    """Of a batch, one after the other (``train.accumulate``): one's images are kept."""

    def beside(self, *trees: Any) -> "Needs":
        """The same with arrays (or shapes) that lie on each device all the time."""
        return replace(self, fixed_bytes=self.fixed_bytes + size_of(trees))

    def bytes(self, share: int) -> int:
        """Predict the memory of a device that takes ``share`` images of a batch.

        A lower bound: what the compiler needs between operations comes on top.
        """
        return self.fixed_bytes + share // self.parts * self.image_bytes

    def check(self, batch: int, devices: int, limit: int | None) -> None:
        """Refuse a batch that cannot fit.

        Args:
            batch: of all devices together.
            devices: that share it.
            limit: bytes of one of them; None: unknown, and nothing is refused.

        Raises:
            UsageError: with the largest batch that would fit.
        """
        needed = self.bytes(batch // devices)
        if limit is None or needed <= limit:
            return
        raise UsageError(
            f"train.batch_size={batch} needs at least {amount(needed, 'B')} on each of "
            f"{devices} devices, which have {amount(limit, 'B')}; choose "
            f"{self._repair(batch // devices, devices, limit)}"
        )

    def _repair(self, share: int, devices: int, limit: int) -> str:
        """What would make it fit."""
        if limit <= self.fixed_bytes:
            return "a smaller net, or a device with more memory"
        ways = []
        if fits := (limit - self.fixed_bytes) // self.image_bytes:
            images = fits * devices * self.parts
            ways.append(f"--train.batch-size {images} or less")
            enough = (n for n in range(1, share + 1) if share % n == 0)
            parts = next(n for n in enough if share // n <= fits)
            ways.append(f"--train.accumulate {parts}")
        ways.append("more devices")
        if self.execution.dtype != "bfloat16":
            ways.append("--execution.dtype bfloat16")
        if self.execution.remat != "units":
            ways.append("--execution.remat units")
        return ", or ".join(ways)

    def describe(self, batch: int, devices: int, limit: int | None) -> str:
        """Say in one line what a step takes; arguments as of ``check``."""
        needed = self.bytes(batch // devices)
        return (
            f"a step: {amount(self.flops * batch, 'FLOP')}, at least "
            f"{amount(needed, 'B')} of memory on each device"
            + (f", which has {amount(limit, 'B')}" if limit else "")
        )


def needs(
    architecture: Architecture,
    execution: Execution,
    image_shape: tuple[int, int, int],
    parts: int = 1,
    more: Sequence[LayerRow] = (),
) -> Needs:
    """Count what training takes, whatever state and data lie beside it.

    Args:
        architecture, execution: the net and how it is run.
        image_shape: (height, width, channels).
        parts: of a batch, one after the other.
        more: layers beside the net's own, as a decoder's.
    """
    rows = [*layer_table(architecture, image_shape), *more]
    parameters = sum(row.parameters for row in rows)
    kept = [row for row in rows if _kept(row, architecture, execution)]
    return Needs(
        parameters=parameters,
        flops=6.0 * sum(row.multiply_adds for row in rows),
        image_bytes=sum(math.prod(row.shape) for row in kept) * _BYTES[execution.dtype],
        # The gradients are as large as the parameters; so is the sum of several.
        fixed_bytes=parameters * _BYTES[execution.param_dtype] * min(parts, 2),
        execution=execution,
        parts=parts,
    )


def _kept(row: LayerRow, architecture: Architecture, execution: Execution) -> bool:
    """Whether a layer's output waits for the backward pass.

    A convolution's does. A shortcut's and a bridge's end in a sum, which stands for the
    output of the unit's last layer. What BN -> ReLU gives is computed again, or kept
    too; of a unit that is computed again only its output stays.
    """
    *place, last = row.name.split("/")
    if last in ("shortcut", "bridge"):
        return False
    if execution.remat == "units" and any(part.startswith("stack") for part in place):
        return row.name.endswith(f"layer{LAYERS[architecture.unit]}/conv")
    if last.startswith("norm"):
        again = execution.remat == "norms" and execution.derivatives == "by_hand"
        return not again and execution.remat != "units"
    return True


def size_of(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of what ``jax.eval_shape`` gives for them."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory_limit(device: jax.Device) -> int | None:
    """Give the bytes that a device may use; None where neither it nor the system says.

    On a CPU: its share of the machine's memory.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    whole = machine_memory()
    return whole and whole // len(jax.local_devices(backend="cpu"))


def machine_memory() -> int | None:
    """Give the bytes of the machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def check_images(name: str, images: int, size: int, device: jax.Device) -> None:
    """Refuse images that cannot lie in memory, here and whole on the device.

    Args:
        name: of the data set.
        images: how many.
        size: bytes of all, decoded.
        device: one of those that train.

    Raises:
        UsageError: with what would help.
    """
    for place, limit in (
        ("this machine", machine_memory()),
        (f"each device ({device.device_kind})", memory_limit(device)),
    ):
        if limit is not None and size > limit:
            raise UsageError(
                f"data.name={name} has {images:,} images, which need "
                f"{amount(size, 'B')} of memory, and {place} has {amount(limit, 'B')}; "
                "add --data.stream True, or choose a smaller --data.size"
            )


def peak_flops(device: jax.Device) -> float | None:
    """Half-precision FLOP/s of a device of a known kind; None for others."""
    for part, flops in PEAK_FLOPS.items():
        if part in device.device_kind:
            return flops
    return None


def amount(value: float, unit: str) -> str:
    """Three digits and an SI prefix: 1,610,612,736 and "B" -> "1.61 GB"."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    power = 0
    while value >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {prefixes[power]}{unit}"
