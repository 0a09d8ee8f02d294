"""Named architectures, each with its reference parameter count and its source.

>>> PRESETS["he2016-resnet164"].parameters
1703258
"""

from dataclasses import dataclass, replace
from typing import Any

from flax_resnetv2.errors import UsageError
from flax_resnetv2.model.architecture import Architecture
from flax_resnetv2.model.semantics import ATIENZA, BIT, HE2016, KERAS, TIMM, Semantics


@dataclass(frozen=True)
class Preset:
    """A named architecture."""

    architecture: Architecture
    parameters: int
    """Number of trainable parameters, for images with three channels."""
    source: str
    """Source of the architecture and of its parameter count."""


def _article(*units: int, width: int = 64) -> Architecture:
    """The article's net with other stacks; widths begin with the stem's and double."""
    widths = tuple(width << k for k in range(len(units)))
    strides = (1, *(2 for _ in units[1:]))
    return Architecture(units, widths, strides, stem_width=width)


def _bottleneck(n: int, **fields: Any) -> Architecture:
    """9n + 2 layers: a stem of 16 maps and three stacks of n bottleneck units."""
    fields = {"reduction": 4, "semantics": HE2016} | fields
    return Architecture((n, n, n), stem_width=16, **fields)


def _atienza(n: int) -> Architecture:
    return _bottleneck(n, reduction=(4, 2, 2), semantics=ATIENZA)


def _basic(n: int) -> Architecture:
    """6n + 2 layers: a stem of 16 maps and three stacks of n basic units."""
    return _bottleneck(n, widths=(16, 32, 64), reduction=1, unit="basic")


def _imagenet(
    units: tuple[int, ...], semantics: Semantics, width: int = 256, **fields: Any
) -> Architecture:
    """Four stacks after a 7x7 stem, for images of 224x224 and 1000 classes."""
    stem = {"stem_kernel": 7, "stem_stride": 2, "stem_pool": True}
    defaults = stem | {"strides": (1, 2, 2, 2), "reduction": 4, "num_classes": 1000}
    widths = tuple(width << k for k in range(4))
    return Architecture(units, widths, semantics=semantics, **(defaults | fields))


def _keras(units: tuple[int, ...]) -> Architecture:
    """Stacks 1 to 3 have the stride in their last unit, and stack 4 has none."""
    return _imagenet(units, KERAS, strides=(2, 2, 2, 1))


def _basic_imagenet(units: tuple[int, ...], semantics: Semantics) -> Architecture:
    """Basic units have a projection only where shapes differ."""
    semantics = replace(semantics, projection="when_needed")
    return _imagenet(units, semantics, 64, reduction=1, unit="basic")


def _bit(units: tuple[int, ...], times: int) -> Architecture:
    """Big Transfer's RnxM with M = ``times`` multiplying every width."""
    return _imagenet(units, BIT, 256 * times, stem_width=64 * times)


_ARTICLE = "the article; count derived by hand in docs/architecture.md"
_HE = (
    "He et al. 2016, arXiv 1603.05027; count of resnet-pre-act.lua, "
    "github.com/KaimingHe/resnet-1k-layers"
)

_ATIENZA = (
    "R. Atienza, Advanced Deep Learning with Keras, resnet-cifar10-2.2.1.py "
    "(version 2); count: Keras's summary of that code, trainable"
)
_BASIC = (
    "He et al. 2016, arXiv 1603.05027, basic units with 1x1 projections; count by "
    "formula"
)
_KERAS = "keras.applications.resnet_v2 (Keras 3.15); count: its summary, trainable"
_TIMM = (
    "timm, resnetv2.py; count by formula, which timm's table of results gives in "
    "millions"
)
_BIT = (
    "Kolesnikov et al. 2020, arXiv 1912.11370, with ILSVRC-2012 head; count by "
    "formula, which timm's table of results gives in millions"
)
_HE200 = (
    "He et al. 2016, preresnet.lua of github.com/facebookarchive/fb.resnet.torch; "
    "count by formula"
)
_R50, _R101, _R152 = (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3)
"""Units in each stack of the nets for ImageNet."""
_HE_IMAGENET = replace(
    HE2016, stem_norm=True, first_layer_exception=True, stride_layer=2
)
_TIMM_D = replace(TIMM, shortcut_pool="average")

PRESETS: dict[str, Preset] = {
    "article": Preset(_article(3, 3, 3), 868_938, _ARTICLE),
    "article-56": Preset(_article(6, 6, 6), 1_712_970, _ARTICLE),
    "article-figure": Preset(_article(3, 6, 6, 3), 4_302_410, _ARTICLE),
    "article-4-stacks": Preset(_article(3, 3, 3, 3, width=32), 879_402, _ARTICLE),
    "article-5-stacks": Preset(_article(3, 3, 3, 3, 3, width=16), 881_882, _ARTICLE),
    "he2016-resnet20": Preset(_bottleneck(2), 219_482, _HE),
    "he2016-resnet56": Preset(_bottleneck(6), 590_426, _HE),
    "he2016-resnet110": Preset(_bottleneck(12), 1_146_842, _HE),
    "he2016-resnet164": Preset(_bottleneck(18), 1_703_258, _HE),
    "he2016-resnet1001": Preset(_bottleneck(111), 10_327_706, _HE),
    "he2016-resnet200": Preset(
        _imagenet((3, 24, 36, 3), _HE_IMAGENET), 64_666_152, _HE200
    ),
    "atienza-resnet20v2": Preset(_atienza(2), 570_602, _ATIENZA),
    "atienza-resnet29v2": Preset(_atienza(3), 843_786, _ATIENZA),
    "atienza-resnet56v2": Preset(_atienza(6), 1_663_338, _ATIENZA),
    "atienza-resnet110v2": Preset(_atienza(12), 3_302_442, _ATIENZA),
    "atienza-resnet164v2": Preset(_atienza(18), 4_941_546, _ATIENZA),
    "basic-resnet20": Preset(_basic(3), 272_282, _BASIC),
    "basic-resnet56": Preset(_basic(9), 855_578, _BASIC),
    "basic-resnet110": Preset(_basic(18), 1_730_522, _BASIC),
    "basic-resnet34": Preset(_basic_imagenet(_R50, HE2016), 21_795_880, _BASIC),
    "keras-resnet50v2": Preset(_keras(_R50), 25_568_360, _KERAS),
    "keras-resnet101v2": Preset(_keras(_R101), 44_577_896, _KERAS),
    "keras-resnet152v2": Preset(_keras(_R152), 60_236_904, _KERAS),
    "timm-resnetv2-18": Preset(_basic_imagenet((2, 2, 2, 2), TIMM), 11_687_720, _TIMM),
    "timm-resnetv2-34": Preset(_basic_imagenet(_R50, TIMM), 21_795_880, _TIMM),
    "timm-resnetv2-50": Preset(_imagenet(_R50, TIMM), 25_549_352, _TIMM),
    "timm-resnetv2-50d": Preset(
        _imagenet(_R50, _TIMM_D, stem_deep=True, stem_kernel=3), 25_568_584, _TIMM
    ),
    "timm-resnetv2-101": Preset(_imagenet(_R101, TIMM), 44_541_480, _TIMM),
    "timm-resnetv2-152": Preset(_imagenet(_R152, TIMM), 60_185_128, _TIMM),
    "bit-r50x1": Preset(_bit(_R50, 1), 25_549_352, _BIT),
    "bit-r101x1": Preset(_bit(_R101, 1), 44_541_480, _BIT),
    "bit-r50x3": Preset(_bit(_R50, 3), 217_319_080, _BIT),
    "bit-r101x3": Preset(_bit(_R101, 3), 387_934_888, _BIT),
    "bit-r152x2": Preset(_bit(_R152, 2), 236_335_208, _BIT),
    "bit-r152x4": Preset(_bit(_R152, 4), 936_533_224, _BIT),
}
"""All named architectures. A name begins with the author of the net."""


def get_preset(name: str) -> Preset:
    """Return the preset of this name.

    Raises:
        UsageError: no preset has this name. "resnet56" alone would mean three nets.
    """
    if name in PRESETS:
        return PRESETS[name]
    known = ", ".join(PRESETS)
    depth = name.lower().removeprefix("resnet").removesuffix("v2").strip("-_")
    if depth.isdecimal():
        raise UsageError(
            f"{name!r} means different nets: He's bottleneck net has reduction 4 and "
            "9n + 2 layers, the article's has reduction 2, others have basic units of "
            f"6n + 2 layers; choose one of: {known}"
        )
    raise UsageError(f"no preset is called {name!r}; choose one of: {known}")
