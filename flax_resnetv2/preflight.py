"""What a training run needs of a device, known before anything is compiled.

Counted from the plan: parameters, FLOPs, and the memory that the backward pass finds
kept. ``Needs.check`` refuses a run that cannot fit, and says what would.
"""

import math
import os
from dataclasses import dataclass

import jax

from flax_resnetv2.analysis import LayerRow, layer_table
from flax_resnetv2.architecture import LAYERS, Architecture, Execution
from flax_resnetv2.errors import UsageError

PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v4": 275e12,
    "TPU v3": 123e12,
}
"""Dense half-precision FLOP/s by a part of a device's kind: the makers' data sheets of
the SXM variants (bfloat16; V100: float16), and of chips (TPU v3: 123 a chip)."""


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
    """On each device whatever the batch: state, gradients, data set."""

    def bytes(self, share: int) -> int:
        """Predict the memory of a device that takes ``share`` images of a batch.

        A lower bound: what the compiler needs between operations comes on top.
        """
        return self.fixed_bytes + share * self.image_bytes

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
        fits = max(limit - self.fixed_bytes, 0) // self.image_bytes * devices
        repair = "a smaller net" if fits == 0 else f"--train.batch-size {fits} or less"
        raise UsageError(
            f"train.batch_size={batch} needs at least {amount(needed, 'B')} on each of "
            f"{devices} devices, which have {amount(limit, 'B')}; choose {repair}, "
            "more devices, --execution.dtype bfloat16, or --execution.remat units"
        )


def needs(
    architecture: Architecture,
    e: Execution,
    image_shape: tuple[int, int, int],
    state_bytes: int,
    data_bytes: int,
) -> Needs:
    """Count what training takes.

    Args:
        architecture, e: the net and how it is run.
        image_shape: (height, width, channels).
        state_bytes: of parameters, statistics, optimiser and averages.
        data_bytes: of all that lies on a device besides.
    """
    rows = layer_table(architecture, image_shape)
    parameters = sum(row.parameters for row in rows)
    kept = sum(math.prod(row.shape) for row in rows if _kept(row, architecture, e))
    return Needs(
        parameters=parameters,
        flops=6.0 * sum(row.multiply_adds for row in rows),
        image_bytes=kept * _BYTES[e.dtype],
        # The gradients are as large as the parameters.
        fixed_bytes=state_bytes + parameters * _BYTES[e.param_dtype] + data_bytes,
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
    if execution.remat == "units" and place[0].startswith("stack"):
        return row.name.endswith(f"layer{LAYERS[architecture.unit]}/conv")
    if last.startswith("norm"):
        again = execution.remat == "norms" and execution.derivatives == "by_hand"
        return not again and execution.remat != "units"
    return True


def memory_limit(device: jax.Device) -> int | None:
    """Give the bytes that a device may use; None where neither it nor the system says.

    On a CPU: the machine's memory.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


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
