"""What a training step costs a device, predicted before anything is compiled.

Parameters, FLOPs and the memory kept for the backward pass are counted from the plan.
``StepCost.check`` refuses a run that cannot fit, and says what would.
"""

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import jax

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.architecture import Execution
from flax_resnetv2.model.autoencoder import Autoencoder
from flax_resnetv2.model.layer_table import LayerRow
from flax_resnetv2.model.modules import ResNetV2
from flax_resnetv2.run.build import net_layers

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
"""Dense half-precision FLOP/s, keyed by a part of the device kind; the first match
counts. From the makers' data sheets: SXM variants in bfloat16 (V100: float16), and TPU
chips (v3: per core, half a chip, which is one JAX device)."""

_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class StepCost:
    """What one training step costs."""

    parameters: int
    """Number of trainable parameters."""
    flops: float
    """Per image: six for each multiply-add of the forward pass."""
    image_bytes: int
    """Memory per image, kept until the backward pass has used it."""
    fixed_bytes: int
    """Memory on each device whatever the batch: gradients, and what ``plus_resident``
    added."""
    execution: Execution
    """The execution that this was counted for."""
    parts: int = 1
    """Parts of a batch, computed one after the other (``train.accumulation_steps``)."""

    def plus_resident(self, *trees: Any) -> "StepCost":
        """Add arrays (or their shapes) that stay on each device all the time."""
        return replace(self, fixed_bytes=self.fixed_bytes + size_of(trees))

    def bytes(self, share: int) -> int:
        """Predict the memory of a device that computes ``share`` images of a batch.

        This is a lower bound: the compiler's work space comes on top.
        """
        return self.fixed_bytes + share // self.parts * self.image_bytes

    def check(self, batch: int, devices: int, limit: int | None) -> None:
        """Refuse a batch that cannot fit.

        Args:
            batch: images per step, over all devices.
            devices: the number of devices that share it.
            limit: memory of one device in bytes; None: unknown, nothing is refused.

        Raises:
            UsageError: names the largest batch that would fit, and other ways.
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
        """Say what would make it fit."""
        if limit <= self.fixed_bytes:
            return "a smaller net, or a device with more memory"
        ways = []
        if fits := (limit - self.fixed_bytes) // self.image_bytes:
            images = fits * devices * self.parts
            ways.append(f"--train.batch-size {images} or less")
            enough = (n for n in range(1, share + 1) if share % n == 0)
            parts = next(n for n in enough if share // n <= fits)
            ways.append(f"--train.accumulation-steps {parts}")
        ways.append("more devices")
        if self.execution.dtype != "bfloat16":
            ways.append("--execution.dtype bfloat16")
        if self.execution.remat != "units":
            ways.append("--execution.remat units")
        return ", or ".join(ways)

    def describe(self, batch: int, devices: int, limit: int | None) -> str:
        """Return one line about what a step costs; arguments as of ``check``."""
        needed = self.bytes(batch // devices)
        return (
            f"a step: {amount(self.flops * batch, 'FLOP')}, at least "
            f"{amount(needed, 'B')} of memory on each device"
            + (f", which has {amount(limit, 'B')}" if limit else "")
        )


def step_cost(
    model: ResNetV2 | Autoencoder, input_shape: tuple[int, int, int], parts: int = 1
) -> StepCost:
    """Count what a training step costs, without the state and data on the device.

    Args:
        model: what is trained.
        input_shape: (height, width, channels) of its input.
        parts: parts of a batch, computed one after the other.
    """
    rows, execution = net_layers(model, input_shape), model.execution
    last_layer = f"layer{len(model.plan.stacks[0].units[0].layers)}/conv"
    kept = [row for row in rows if _is_kept(row, execution, last_layer)]
    parameters = sum(row.parameters for row in rows)
    return StepCost(
        parameters=parameters,
        flops=6.0 * sum(row.multiply_adds for row in rows),
        image_bytes=sum(math.prod(row.shape) for row in kept) * _BYTES[execution.dtype],
        # The gradients are as large as the parameters; so is the sum over parts.
        fixed_bytes=parameters * _BYTES[execution.param_dtype] * min(parts, 2),
        execution=execution,
        parts=parts,
    )


def _is_kept(row: LayerRow, execution: Execution, last_layer: str) -> bool:
    """Whether a layer's output is kept for the backward pass.

    The outputs of convolutions are. Those of shortcuts and bridges go into a sum that
    replaces the output of the unit's last layer. The output of BN-ReLU is kept unless
    it is recomputed; a unit that is recomputed keeps only its own output.
    """
    *parents, last = row.name.split("/")
    if last in ("shortcut", "bridge"):
        return False
    if execution.remat == "units" and any(p.startswith("stack") for p in parents):
        return row.name.endswith(last_layer)
    if last.startswith("norm"):
        recomputed = execution.remat == "norms" and execution.backward == "custom"
        return not recomputed and execution.remat != "units"
    return True


def size_of(tree: Any) -> int:
    """Return the bytes of all arrays, or jax.ShapeDtypeStructs, of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory_limit(device: jax.Device) -> int | None:
    """Return the memory that a device may use, in bytes; None if unknown.

    A CPU device gets its share of the machine's memory.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    whole = machine_memory()
    return whole and whole // len(jax.local_devices(backend="cpu"))


def machine_memory() -> int | None:
    """Return the machine's memory in bytes; None if the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def check_images(name: str, images: int, size: int, device: jax.Device) -> None:
    """Refuse a data set that does not fit into host and device memory.

    Args:
        name: of the data set.
        images: their number.
        size: bytes of all images, decoded.
        device: one of those that train.

    Raises:
        UsageError: says what would help.
    """
    for place, limit in (
        ("this machine", machine_memory()),
        (f"each device ({device.device_kind})", memory_limit(device)),
    ):
        if limit is not None and size > limit:
            raise UsageError(
                f"data.name={name} has {images:,} images, which need "
                f"{amount(size, 'B')} of memory, and {place} has {amount(limit, 'B')}; "
                "add --data.stream True, or choose a smaller --data.image-size"
            )


def peak_flops(device: jax.Device) -> float | None:
    """Return a device's half-precision FLOP/s; None if its kind is unknown."""
    for part, flops in PEAK_FLOPS.items():
        if part in device.device_kind:
            return flops
    return None


def amount(value: float, unit: str) -> str:
    """Format with three digits and an SI prefix: 1,610,612,736 "B" -> "1.61 GB"."""
    prefixes = ["", "k", "M", "G", "T", "P"]
    power = 0
    while value >= 999.5 and power < len(prefixes) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {prefixes[power]}{unit}"
