"""The published versions of ResNet V2: one field for each point where they differ.

``Architecture`` says how large a net is, ``Semantics`` which version it is. For an
experiment, replace a field: ``dataclasses.replace(ARTICLE, stride_layer=2)``.
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
"""Initializers with variance / fan: the variance, the fan, the distribution."""
Kernel = Annotated[int, Range(1, 255, odd=True)]
Size = Annotated[int, Range(1, 2**20)]
"""A number of maps, classes or groups; no array's size can overflow 64 bits."""
Epsilon = Annotated[float, Range(1e-12, 1)]
"""Below 1e-12, 1 / sqrt(variance) of a constant map has no derivative in float32."""


@dataclass(frozen=True)
class Semantics:
    """One version of the residual unit, the stem and the head."""

    order: Literal["pre", "post"] = "pre"
    """pre: BN -> ReLU -> convolution. post (version 1): convolution -> BN -> ReLU, the
    last ReLU after the sum, and a BN after the shortcut's convolution."""
    stride_layer: Literal[1, 2] = 1
    """Layer of a bottleneck unit that has the stride: 1 (1x1, the article and He) or 2
    (3x3, most later code). In a basic unit it is always layer 1."""
    strided_unit: Literal["first", "last"] = "first"
    """Unit of a stack that has the stack's stride."""
    shortcut_input: Literal["raw", "preactivated"] = "raw"
    """Input of a shortcut's convolution. raw: the unit's input (the article's side
    track). preactivated: the output of layer 1's BN-ReLU."""
    projection: Literal["when_needed", "every_stack"] = "when_needed"
    """Unit 1 has a convolution on its shortcut if shapes differ, or in every stack."""
    strided_shortcut: Literal["convolution", "selection"] = "convolution"
    """Shortcut of a unit with a stride and equal widths: a strided convolution, or a
    selection of the unit's input pixels at that stride."""
    shortcut_pool: Literal["none", "average"] = "none"
    """none: a shortcut's convolution has the stride. average: average pooling before
    the convolution has it (ResNet-D)."""
    shortcut_kernel: Kernel = 1
    """Kernel size of a shortcut's convolution in pixels (odd)."""
    padding: Literal["same", "symmetric"] = "same"
    """Padding of a strided convolution with a kernel above 1. same: an odd pixel goes
    to the end. symmetric: (k - 1) / 2 pixels on both sides, as in PyTorch."""
    biases: tuple[Position, ...] = ()
    """Convolutions that have a bias."""
    norm: Literal["batch", "group"] = "batch"
    """Normalize over the batch, or over groups of maps in each image."""
    norm_groups: Size = 32
    """Number of groups in group normalization."""
    norm_epsilon: Epsilon = 1e-5
    """Value added to the variance in normalization."""
    norm_momentum: Share = 0.9
    """Share of the running statistics that is kept at each step."""
    standardize_epsilon: Epsilon | None = None
    """Standardize kernels to mean 0 and variance 1 per output map, with this value
    added to the variance; None: do not standardize."""
    stem_norm: bool = True
    """End the stem's convolutions with BN-ReLU."""
    first_layer_exception: bool = True
    """Leave out the very first layer's BN-ReLU if the stem ends with one."""
    final_norm: bool = True
    """Apply BN-ReLU between the last stack and the pooling."""
    pool_padding: Literal["lowest", "zero"] = "lowest"
    """Padding value of the stem's max-pool: minus infinity or 0."""
    kernel_init: Initializer = "he_normal"
    """Initializer of the convolutions' kernels."""
    dense_init: Initializer = "he_normal"
    """Initializer of the kernels in the head's fully connected layers."""
    zero_init_last: bool = False
    """Start units as their shortcuts: initialize their last convolutions to zero."""


ARTICLE = Semantics()
"""The article, "ResNet basics II". It leaves open epsilon, momentum, biases, the final
BN-ReLU and initialization (here He-normal: truncated, fan-in)."""

HE2016 = Semantics(
    shortcut_input="preactivated",
    padding="symmetric",
    stem_norm=False,
    first_layer_exception=False,
    kernel_init="he_normal_fan_out",
    dense_init="uniform_fan_in",
)
"""He et al. 2016, arXiv 1603.05027, as in ``resnet-pre-act.lua`` of
github.com/KaimingHe/resnet-1k-layers: the stem is only a convolution, and the BN-ReLU
of unit 1 feeds the shortcut's convolution too."""

ATIENZA = Semantics(
    projection="every_stack",
    biases=("stem", "layer1", "layer2", "layer3", "shortcut"),
    norm_epsilon=1e-3,
    norm_momentum=0.99,
)
"""Atienza's ``resnet-cifar10-2.2.1.py`` (Advanced Deep Learning with Keras), the source
of Keras's CIFAR-10 example: all convolutions have biases, and normalization has Keras's
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
"""``keras.applications.ResNet50V2``, ``101V2`` and ``152V2``: a stack's last unit has
the stride, and its shortcut selects every second pixel."""

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
"""timm's ``resnetv2_*`` with batch normalization. timm's running variance is unbiased,
ours is not: in further training they differ by N / (N - 1)."""

BIT = replace(
    TIMM,
    norm="group",
    standardize_epsilon=1e-10,
    pool_padding="zero",
    dense_init="zeros",
)
"""Big Transfer, Kolesnikov et al. 2020, arXiv 1912.11370, as of its published weights:
group normalization and standardized kernels (timm adds 1e-8 to their variance)."""

SEMANTICS = dict(
    ARTICLE=ARTICLE, HE2016=HE2016, ATIENZA=ATIENZA, KERAS=KERAS, TIMM=TIMM, BIT=BIT
)
