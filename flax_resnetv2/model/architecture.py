"""What a net is (``Architecture``) and how it is run (``Execution``).

An ``Architecture`` can be hashed and written as JSON; ``plan`` turns it into layers.
``Execution`` never changes the parameter tree. Type hints define the legal values of
each field.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.semantics import ARTICLE, SEMANTICS, Kernel, Semantics, Size
from flax_resnetv2.validation import Range, check_dataclass, shown

MAX_STACKS = 5
UnitKind = Literal["bottleneck", "basic"]
Units = Annotated[int, Range(1, 10_000)]
"""Number of units in a stack; the deepest published net has 111."""
Stride = Annotated[int, Range(1, 64)]
Reduction = Size | Literal["previous"]


@dataclass(frozen=True)
class Architecture:
    """What a ResNet V2 is. Without arguments: the article's net for 32x32 images.

    Fields of stacks take one value for all stacks, or a tuple with one value per stack.
    """

    units: tuple[Units, ...] = (3, 3, 3)
    """Residual units in each stack; its length is the number of stacks, 1 to 5."""
    widths: tuple[Size, ...] = (64, 128, 256)
    """Output maps of each stack's units (the article's nF)."""
    strides: tuple[Stride, ...] = (1, 2, 2)
    """Stride of each stack in pixels."""
    reduction: Reduction | tuple[Reduction, ...] = 2
    """Layer 1 of a bottleneck unit has width / reduction maps (the article's p);
    "previous": the number of maps that enter the stack. Basic units need 1."""
    central_reduction: Reduction | tuple[Reduction, ...] | None = None
    """Layer 2 of a bottleneck unit has width / central_reduction maps (the article's
    q); None: the same number as layer 1."""
    kernel: Kernel | tuple[Kernel, ...] = 3
    """Size of the central kernel in each stack's units in pixels (odd)."""
    unit: UnitKind = "bottleneck"
    """bottleneck: three layers (1x1, kernel, 1x1). basic: two layers of the kernel."""
    bridge: bool | tuple[bool, ...] = False
    """Add a shortcut around the whole stack."""
    stem: bool = True
    """Put a stem before stack 1; False: stack 1 reads the image."""
    stem_width: Size = 64
    """Output maps of the stem."""
    stem_kernel: Kernel = 3
    """Kernel size of the stem's convolution in pixels (odd), usually 3 or 7."""
    stem_stride: Stride = 1
    """Stride of the stem's convolution in pixels."""
    stem_second_stride: Stride | None = None
    """Stride of a second, 3x3 convolution in the stem; None: no second convolution."""
    stem_deep: bool = False
    """Use three 3x3 convolutions in the stem instead of one (ResNet-D): the first two
    have half of stem_width maps, and the first has the stride."""
    stem_pool: bool = False
    """End the stem with a 3x3 max-pool of stride 2."""
    head: Literal["classifier", "latent", "none"] = "classifier"
    """classifier: logits. latent: a vector, for encoders. none: the last maps."""
    head_input: Literal["pooled", "flattened"] = "pooled"
    """Input of a classifier or latent head: the mean of each map, or all values."""
    num_classes: Size | None = 10
    """Number of classes; None: as many as the data set has (only in a run)."""
    hidden: tuple[Size, ...] = ()
    """Widths of hidden fully connected layers (with ReLU) before logits or latent."""
    latent: Size = 64
    """Size of the latent vector."""
    latent_variance: bool = False
    """Return a mean and a log-variance from the latent head."""
    semantics: Semantics = ARTICLE
    """Version of ResNet V2; see ``flax_resnetv2.model.semantics``."""

    @property
    def depth(self) -> int:
        """Main-path convolutions plus one fully connected layer, as He et al. count."""
        stem = (3 if self.stem_deep else 1) + (self.stem_second_stride is not None)
        layers = 3 if self.unit == "bottleneck" else 2
        return stem * self.stem + sum(self.units) * layers + 1

    def per_stack(self, field: str) -> tuple:
        """Return a field's values, one per stack; refuse a tuple of another length."""
        value = getattr(self, field)
        if not isinstance(value, tuple):
            return (value,) * len(self.units)
        if len(value) != len(self.units):
            raise UsageError(
                f"{field}={shown(value)} has {len(value)} values, but units="
                f"{self.units} makes {len(self.units)} stacks; give one value, or one "
                "per stack"
            )
        return value


@dataclass(frozen=True)
class Execution:
    """How a net is run. Never changes the parameter tree."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Data type of the computation. Parameters and outputs are float32; float64, which
    needs jax_enable_x64, makes them float64."""
    remat: Literal["nothing", "norms", "units"] = "norms"
    """What the backward pass recomputes instead of storing it: nothing, every BN-ReLU
    (half the memory), or the inside of every unit."""
    backward: Literal["custom", "automatic"] = "custom"
    """custom: fast derivatives, for reverse mode and first order only. automatic: JAX
    differentiates textbook operations, in any mode and order; slower."""
    batch_norm_axis: str | None = None
    """Mapped axis over which batch statistics are synchronized; None: no axis."""

    @property
    def param_dtype(self) -> Literal["float32", "float64"]:
        """Data type of parameters, statistics and outputs."""
        return "float64" if self.dtype == "float64" else "float32"


def check_architecture(a: Architecture) -> None:
    """Refuse an illegal field, or a rule broken between fields."""
    if isinstance(a, Architecture):  # First, because its message names the versions.
        check_semantics(a.semantics)
    check_dataclass(a, Architecture)
    if not 1 <= len(a.units) <= MAX_STACKS:
        raise UsageError(
            f"units={shown(a.units)} must be the numbers of units of 1 to {MAX_STACKS} "
            "stacks; for example units=(3, 3, 3)"
        )
    if a.stem_deep and (a.stem_kernel != 3 or a.stem_width % 2):
        raise UsageError(
            f"stem_deep=True needs 3x3 kernels and an even width, but got stem_kernel="
            f"{a.stem_kernel} and stem_width={a.stem_width}; choose stem_kernel=3 and "
            "an even stem_width"
        )


def check_semantics(s: Semantics) -> None:
    """Refuse an illegal field of a version, or a rule broken between fields."""
    if not isinstance(s, Semantics):
        raise UsageError(
            f"semantics={shown(s)} must be a Semantics; choose one of "
            f"{', '.join(SEMANTICS)}, or replace a field of it"
        )
    check_dataclass(s, Semantics, "semantics.")
    if s.order == "post":
        for field, needed in (("shortcut_input", "raw"), ("final_norm", False)):
            if getattr(s, field) != needed:
                raise UsageError(
                    f"semantics.{field}={getattr(s, field)!r} needs order='pre': "
                    "post-activation units start without BN-ReLU and end with ReLU; "
                    f"choose {field}={needed!r}"
                )
