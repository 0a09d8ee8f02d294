"""Where published versions of ResNet V2 disagree: one field each, one row a version.

``Architecture`` says how large a net is; ``Semantics`` says whose net it is. A preset
names a row, an experimenter overrides a field of it:
``dataclasses.replace(ARTICLE, stride_layer=2)``. Data only; ``plan`` reads it.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from flax_resnetv2.validation import Range, Share

Position = Literal["stem", "layer1", "layer2", "layer3", "shortcut"]
Initializer = Literal[
    "he_normal",
    "he_normal_fan_out",
    "uniform_fan_in",
    "glorot_uniform",
    "normal_0.01",
    "zeros",
]
VARIANCE_SCALING = {
    "he_normal": (2.0, "fan_in", "truncated_normal"),
    "he_normal_fan_out": (2.0, "fan_out", "normal"),
    "uniform_fan_in": (1 / 3, "fan_in", "uniform"),
    "glorot_uniform": (1.0, "fan_avg", "uniform"),
}
"""The initializers that scale a kernel's variance: variance times fan, the fan, the
distribution."""
Kernel = Annotated[int, Range(1, 255, odd=True)]
Size = Annotated[int, Range(1, 2**20)]
"""Of maps, classes, groups: so many that no array's size passes 64 bits."""
Epsilon = Annotated[float, Range(1e-12, 1)]
"""Below, the derivative of 1 / sqrt(variance) leaves float32 where a map is constant.
"""


@dataclass(frozen=True)
class Semantics:
    """One version of the residual unit and of what stands around it."""

    order: Literal["pre", "post"] = "pre"
    """pre: BN -> ReLU -> convolution, and nothing after the sum. post: version 1,
    convolution -> BN -> ReLU, the last ReLU after the sum, and a BN behind the
    shortcut's convolution."""
    stride_layer: Literal[1, 2] = 1
    """The layer of a bottleneck unit that carries the stride: 1 (1x1, the article, He)
    or 2 (3x3, most later code). A basic unit has it on layer 1."""
    strided_unit: Literal["first", "last"] = "first"
    """The unit of a stack that carries its stride."""
    shortcut_input: Literal["raw", "preactivated"] = "raw"
    """What a shortcut with a convolution reads: the unit's raw input (the article's
    side track) or the output of the BN-ReLU that it then shares with layer 1."""
    projection: Literal["when_needed", "every_stack"] = "when_needed"
    """Unit 1 has a shortcut convolution when shapes differ, or in every stack."""
    strided_shortcut: Literal["convolution", "selection"] = "convolution"
    """Where a unit has a stride, but keeps the width: a convolution, or every second
    pixel of the raw input."""
    shortcut_pool: Literal["none", "average"] = "none"
    """What carries a shortcut's stride: its convolution, or a 2x2 average before it
    (ResNet-D)."""
    shortcut_kernel: Kernel = 1
    """Kernel of that convolution (odd)."""
    padding: Literal["same", "symmetric"] = "same"
    """Padding of a strided convolution with a kernel above 1: "same" puts the odd
    pixel at the end; "symmetric" is (k - 1) / 2 on both sides, as in PyTorch."""
    biases: tuple[Position, ...] = ()
    """The convolutions that have a bias."""
    norm: Literal["batch", "group"] = "batch"
    """Normalization over the batch, or over groups of maps of each image."""
    norm_groups: Size = 32
    """Groups of maps in group normalization."""
    norm_epsilon: Epsilon = 1e-5
    """Added to the variance in normalization."""
    norm_momentum: Share = 0.9
    """The share of the running statistics that a step keeps."""
    standardize_epsilon: Epsilon | None = None
    """Kernels are used with mean 0 and variance 1 for each map they make, this added to
    the variance; None: as they are."""
    stem_norm: bool = True
    """The stem ends in BN-ReLU."""
    first_layer_exception: bool = True
    """Behind such a stem, layer 1 of unit 1 of stack 1 is a convolution only."""
    final_norm: bool = True
    """BN-ReLU between the last stack and the pooling."""
    pool_padding: Literal["lowest", "zero"] = "lowest"
    """What the stem's max-pool pads with: minus infinity or 0."""
    kernel_init: Initializer = "he_normal"
    """Initial values of the convolutions."""
    dense_init: Initializer = "he_normal"
    """Initial values of the head's fully connected layers."""
    zero_init_last: bool = False
    """Start each unit's last convolution at zero, so that a unit starts as its
    shortcut."""


ARTICLE = Semantics()
"""The article, "ResNet basics II". What it leaves open: epsilon, the share kept by the
statistics, no convolution biases, the final BN-ReLU and He-normal initialization
(truncated, fan-in) are fixed here."""

HE2016 = Semantics(
    shortcut_input="preactivated",
    padding="symmetric",
    stem_norm=False,
    first_layer_exception=False,
    kernel_init="he_normal_fan_out",
    dense_init="uniform_fan_in",
)
"""He et al. 2016, arXiv 1603.05027, as in ``resnet-pre-act.lua`` of
github.com/KaimingHe/resnet-1k-layers: the stem is a convolution, unit 1's BN-ReLU
follows it and feeds the shortcut convolution too."""

ATIENZA = Semantics(
    projection="every_stack",
    biases=("stem", "layer1", "layer2", "layer3", "shortcut"),
    norm_epsilon=1e-3,
    norm_momentum=0.99,
)
"""Atienza's ``resnet-cifar10-2.2.1.py`` (Advanced Deep Learning with Keras), the source
of Keras's CIFAR-10 example: every convolution has a bias, normalization has Keras's
defaults."""

KERAS = Semantics(
    stride_layer=2,
    strided_unit="last",
    shortcut_input="preactivated",
    projection="every_stack",
    strided_shortcut="selection",
    padding="symmetric",
    biases=("stem", "layer3", "shortcut"),
    norm_epsilon=1.001e-5,
    norm_momentum=0.99,
    stem_norm=False,
    first_layer_exception=False,
    pool_padding="zero",
    kernel_init="glorot_uniform",
    dense_init="glorot_uniform",
)
"""``keras.applications.ResNet50V2`` and its deeper ones: the last unit of a stack has
the stride, and every second pixel of its raw input as a shortcut."""

TIMM = Semantics(
    stride_layer=2,
    shortcut_input="preactivated",
    projection="every_stack",
    padding="symmetric",
    stem_norm=False,
    first_layer_exception=False,
    kernel_init="he_normal_fan_out",
    dense_init="normal_0.01",
)
"""timm's ``resnetv2_*`` with batch normalization. Its running variance is unbiased:
what is imported is exact, what trains on differs by N / (N - 1)."""

BIT = replace(
    TIMM,
    norm="group",
    standardize_epsilon=1e-10,
    pool_padding="zero",
    dense_init="zeros",
)
"""Big Transfer, Kolesnikov et al. 2020, arXiv 1912.11370, as published with its
weights: group normalization, standardized kernels. (timm adds 1e-8 to their variance.)
"""

SEMANTICS = {
    "ARTICLE": ARTICLE,
    "HE2016": HE2016,
    "ATIENZA": ATIENZA,
    "KERAS": KERAS,
    "TIMM": TIMM,
    "BIT": BIT,
}
