"""What a net is and how it is run: the two frozen dataclasses that a person fills in.

``Architecture`` is hashable and JSON-able, and ``plan`` turns it into layers.
``Execution`` never changes the parameter tree. What a field may be is said by its type
hint; that, and the rules between fields, ``check_architecture`` holds an architecture
to. ``plan`` calls it first.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.semantics import ARTICLE, SEMANTICS, Kernel, Semantics, Size
from flax_resnetv2.validation import Range, check_dataclass, shown

MAX_STACKS = 5
UnitKind = Literal["bottleneck", "basic"]
Units = Annotated[int, Range(1, 10_000)]
"""Of a stack: fifty times the deepest published one, and still quick to plan."""
Stride = Annotated[int, Range(1, 64)]
Reduction = Size | Literal["previous"]
LAYERS = {"bottleneck": 3, "basic": 2}
"""Residual layers of each kind of unit."""


@dataclass(frozen=True)
class Architecture:
    """What a ResNet V2 is. Without arguments: the article's net for 32x32 images.

    A field for each stack takes one value for all of them, or one value a stack.
    """

    units: tuple[Units, ...] = (3, 3, 3)
    """Residual units in each stack; its length is the number of stacks, 1 to 5."""
    widths: tuple[Size, ...] = (64, 128, 256)
    """Maps that each unit of a stack gives out (the article's nF)."""
    strides: tuple[Stride, ...] = (1, 2, 2)
    """Stride of each stack: of its unit 1, or of the unit that semantics names."""
    reduction: Reduction | tuple[Reduction, ...] = 2
    """Layer 1 of a bottleneck unit has width / reduction maps (the article's p);
    "previous": as many as the stack before gives out. A basic unit takes 1."""
    central_reduction: Reduction | tuple[Reduction, ...] | None = None
    """The same for layer 2 (the article's q); None: as reduction."""
    kernel: Kernel | tuple[Kernel, ...] = 3
    """Central kernel of the units (odd)."""
    unit: UnitKind = "bottleneck"
    """bottleneck: three layers, 1x1, kernel, 1x1. basic: two layers of the kernel."""
    bridge: bool | tuple[bool, ...] = False
    """A shortcut around a whole stack, added to the stack's output."""
    stem: bool = True
    """False: the image itself enters stack 1."""
    stem_width: Size = 64
    """Maps that the stem gives out."""
    stem_kernel: Kernel = 3
    """Kernel of the stem's convolution (odd): 3 and 7 are the usual ones."""
    stem_stride: Stride = 1
    """Its stride."""
    stem_second_stride: Stride | None = None
    """Stride of a second, 3x3 convolution that reduces resolution; None: not there."""
    stem_deep: bool = False
    """Three 3x3 convolutions in place of the one, the first two of half the width, the
    first with the stride (ResNet-D)."""
    stem_pool: bool = False
    """A 3x3 max-pool of stride 2 at the stem's end."""
    head: Literal["classifier", "latent", "none"] = "classifier"
    """classifier: logits. latent: a vector, for encoders. none: the last maps."""
    head_input: Literal["pooled", "flattened"] = "pooled"
    """What classifier and latent read: the maps' averages, or all their values."""
    num_classes: Size | None = 10
    """Logits of the classifier; None: as many as the data set has classes (a run fills
    the number in)."""
    hidden: tuple[Size, ...] = ()
    """Widths of fully connected hidden layers (with ReLU) before logits or latent."""
    latent: Size = 64
    """Size of the latent vector."""
    latent_variance: bool = False
    """The latent head gives a mean and a log-variance."""
    semantics: Semantics = ARTICLE
    """Whose ResNet V2 it is; see ``flax_resnetv2.model.semantics``."""

    @property
    def depth(self) -> int:
        """Main-path convolutions and one fully connected layer, as He counts."""
        deep = 3 if self.stem_deep else 1
        second = self.stem_second_stride is not None
        convolutions = (deep + second) if self.stem else 0
        return convolutions + sum(self.units) * LAYERS[self.unit] + 1

    def per_stack(self, field: str) -> tuple:
        """Give a field's values, one a stack.

        Raises:
            UsageError: a tuple of another length than ``units``.
        """
        value = getattr(self, field)
        if not isinstance(value, tuple):
            return (value,) * len(self.units)
        if len(value) != len(self.units):
            raise UsageError(
                f"{field}={shown(value)} has {len(value)} values, but units="
                f"{self.units} makes {len(self.units)} stacks; give one value, or one "
                "for each stack"
            )
        return value


@dataclass(frozen=True)
class Execution:
    """How a net is run. Never changes the parameter tree."""

    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of the computation. Parameters and outputs stay float32 (float64 with float64,
    which needs jax_enable_x64)."""
    remat: Literal["nothing", "norms", "units"] = "norms"
    """What the backward pass computes again instead of keeping it: nothing; every
    BN-ReLU (half the memory); a unit's whole inside."""
    backward: Literal["custom", "automatic"] = "custom"
    """custom: the fast ones, in reverse mode, once. automatic: the textbook operations
    as JAX differentiates them, for forward mode and second derivatives; slower."""
    batch_norm_axis: str | None = None
    """Name of the mapped axis over which batch statistics are taken together."""

    @property
    def param_dtype(self) -> Literal["float32", "float64"]:
        """Of parameters, statistics and outputs."""
        return "float64" if self.dtype == "float64" else "float32"


def check_architecture(a: Architecture) -> None:
    """The rules that do not need a stack's input width.

    Raises:
        UsageError: naming the field, its value, what is legal.
    """
    if isinstance(a, Architecture):  # First: it names the rows to choose from.
        check_semantics(a.semantics)
    check_dataclass(a, Architecture)
    if not 1 <= len(a.units) <= MAX_STACKS:
        raise UsageError(
            f"units={shown(a.units)} must give 1 to {MAX_STACKS} stacks their number "
            "of residual units, as units=(3, 3, 3)"
        )
    if a.stem_deep and (a.stem_kernel != 3 or a.stem_width % 2):
        raise UsageError(
            f"stem_deep=True makes 3x3 convolutions of half of stem_width="
            f"{a.stem_width} with stem_kernel={a.stem_kernel}; choose stem_kernel=3 "
            "and an even stem_width"
        )


def check_semantics(s: Semantics) -> None:
    """The rules of a version alone; units planned by hand are held to them too."""
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
                    "post-activation units begin with no BN-ReLU and end in a ReLU; "
                    f"choose {field}={needed!r}"
                )
