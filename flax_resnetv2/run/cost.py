"""The memory and FLOPs of a training step, predicted before anything is compiled.

Parameters, FLOPs and the memory kept for the backward pass are counted from the plan.
``StepCost.check`` refuses a run that cannot fit, and names what would fit.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.architecture import Execution
from flax_resnetv2.model.autoencoder import Autoencoder
from flax_resnetv2.model.layer_table import LayerRow
from flax_resnetv2.model.modules import ResNetV2
from flax_resnetv2.run.build import net_layers
from flax_resnetv2.system import memory

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
"""Dense half-precision FLOP/s by a part of the device kind; the first match counts.
From the data sheets: SXM variants in bfloat16 (V100: float16), and TPU chips (v3: per
core, half a chip, which is one JAX device)."""


@dataclass(frozen=True)
class StepCost:
    """Size, FLOPs and memory of one training step."""

    parameters: int
    """Number of trainable parameters."""
    flops: float
    """Per image: six for each multiply-add of the forward pass."""
    image_bytes: int
    """Memory per image, kept until the backward pass has used it."""
    fixed_bytes: int
    """Memory on each device that does not depend on the batch."""
    execution: Execution
    """The execution that this was counted for."""
    parts: int = 1
    """Parts of a batch, computed one after the other (``train.accumulation_steps``)."""

    def plus_resident(self, *trees: Any) -> "StepCost":
        """Add arrays (or their shapes) that stay on each device all the time."""
        return replace(self, fixed_bytes=self.fixed_bytes + size_of(trees))

    def bytes(self, share: int) -> int:
        """Predict memory for ``share`` images, without the compiler's work space."""
        return self.fixed_bytes + share // self.parts * self.image_bytes

    def check(self, batch: int, devices: int, limit: int | None) -> None:
        """Raise ``UsageError`` if a number of devices cannot share a batch.

        ``limit`` is the memory of one device in bytes, or None if unknown. The message
        names the largest batch that would fit, and alternatives.
        """
        share = batch // devices
        needed = self.bytes(share)
        if limit is None or needed <= limit:
            return
        ways = ["a smaller net, or a device with more memory"]
        if limit > self.fixed_bytes:
            ways = []
            if fits := (limit - self.fixed_bytes) // self.image_bytes:
                images = fits * devices * self.parts
                ways.append(f"--train.batch-size {images} or less")
                divisors = (n for n in range(1, share + 1) if share % n == 0)
                parts = next(n for n in divisors if share // n <= fits)
                ways.append(f"--train.accumulation-steps {parts}")
            ways.append("more devices")
            if self.execution.dtype != "bfloat16":
                ways.append("--execution.dtype bfloat16")
            if self.execution.remat != "units":
                ways.append("--execution.remat units")
        raise UsageError(
            f"train.batch_size={batch} needs at least {amount(needed, 'B')} on each of "
            f"{devices} devices, which have {amount(limit, 'B')}; choose "
            + ", or ".join(ways)
        )

    def describe(self, batch: int, devices: int, limit: int | None) -> str:
        """Return one line about a step; arguments as of ``check``."""
        needed = self.bytes(batch // devices)
        return (
            f"a step: {amount(self.flops * batch, 'FLOP')}, at least "
            f"{amount(needed, 'B')} of memory on each device"
            + (f", which has {amount(limit, 'B')}" if limit else "")
        )


def step_cost(
    model: ResNetV2 | Autoencoder, input_shape: tuple[int, int, int], parts: int = 1
) -> StepCost:
    """Predict the cost of a training step, without the state and data on the device.

    ``input_shape`` is (height, width, channels); ``parts`` as in ``StepCost``.
    """
    rows, execution = net_layers(model, input_shape), model.execution
    last_layer = f"layer{len(model.plan.stacks[0].units[0].layers)}/conv"
    kept = [row for row in rows if _is_kept(row, execution, last_layer)]
    parameters = sum(row.parameters for row in rows)
    size = [jnp.dtype(d).itemsize for d in (execution.dtype, execution.param_dtype)]
    return StepCost(
        parameters=parameters,
        flops=6.0 * sum(row.multiply_adds for row in rows),
        image_bytes=sum(math.prod(row.shape) for row in kept) * size[0],
        # Gradients are as large as the parameters, and so is their sum over parts.
        fixed_bytes=parameters * size[1] * min(parts, 2),
        execution=execution,
        parts=parts,
    )


def _is_kept(row: LayerRow, execution: Execution, last_layer: str) -> bool:
    """Whether a layer's output is kept for the backward pass.

    The outputs of convolutions are. Those of shortcuts and bridges go into a sum that
    replaces the output of the unit's last layer. The output of BN-ReLU is kept unless
    it is recomputed. A unit that is recomputed keeps only its own output.
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
    """Return the bytes of all arrays, or jax.ShapeDtypeStructs, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory_limit(device: jax.Device) -> int | None:
    """Return the memory that a device may use, in bytes; None if unknown.

    A CPU device gets its share of the memory that this process may use.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    whole = memory.machine_memory()
    return whole and whole // len(jax.local_devices(backend="cpu"))


def peak_flops(device: jax.Device) -> float | None:
    """Return a device's half-precision FLOP/s; None if its kind is unknown."""
    found = (flops for part, flops in PEAK_FLOPS.items() if part in device.device_kind)
    return next(found, None)


def amount(value: float, unit: str) -> str:
    """Format with three digits and an SI prefix: 1,610,612,736 "B" -> "1.61 GB"."""
    power = 0
    while value >= 999.5 and power < 5:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}"
