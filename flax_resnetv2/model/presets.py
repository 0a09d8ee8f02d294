"""Named architectures, each with its reference parameter count and where it is from.

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
    """An architecture under a name that says whose net it is."""

    architecture: Architecture
    parameters: int
    """Trainable numbers, for images of three channels."""
    source: str
    """Where the architecture and its parameter count come from."""


def _he2016(n: int) -> Architecture:
    """9n + 2 layers: three stacks of n bottleneck units, reduction 4, stem of 16."""
    return Architecture(units=(n, n, n), reduction=4, stem_width=16, semantics=HE2016)


def _atienza(n: int) -> Architecture:
    """9n + 2 layers; stack 1 has a quarter of its width inside, the others a half."""
    return Architecture(
        units=(n, n, n), reduction=(4, 2, 2), stem_width=16, semantics=ATIENZA
    )


def _basic(n: int) -> Architecture:
    """6n + 2 layers: three stacks of n basic units."""
    return Architecture(
        units=(n, n, n),
        widths=(16, 32, 64),
        reduction=1,
        unit="basic",
        stem_width=16,
        semantics=HE2016,
    )


def _imagenet(
    units: tuple[int, ...], semantics: Semantics, **more: Any
) -> Architecture:
    """Four stacks for images of 224x224 and 1000 classes, behind a 7x7 stem."""
    fields = {
        "widths": (256, 512, 1024, 2048),
        "strides": (1, 2, 2, 2),
        "reduction": 4,
        "stem_kernel": 7,
        "stem_stride": 2,
        "stem_pool": True,
        "num_classes": 1000,
    }
    return Architecture(units=units, semantics=semantics, **(fields | more))


def _keras(*units: int) -> Architecture:
    """The last unit of stacks 1 to 3 has the stride, stack 4 none."""
    return _imagenet(units, KERAS, strides=(2, 2, 2, 1))


def _basic_imagenet(units: tuple[int, ...], semantics: Semantics) -> Architecture:
    """Basic units have a projection only where shapes change."""
    semantics = replace(semantics, projection="when_needed")
    widths = (64, 128, 256, 512)
    return _imagenet(units, semantics, widths=widths, reduction=1, unit="basic")


def _bit(units: tuple[int, ...], times: int) -> Architecture:
    """Big Transfer's RnxM: every width M times as large; BiT-S has 1000 classes."""
    widths = tuple(times * width for width in (256, 512, 1024, 2048))
    return _imagenet(units, BIT, widths=widths, stem_width=64 * times)


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
_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Units in each stack of the nets for ImageNet, by their depth."""

PRESETS: dict[str, Preset] = {
    "article": Preset(Architecture(), 868_938, _ARTICLE),
    "article-56": Preset(Architecture(units=(6, 6, 6)), 1_712_970, _ARTICLE),
    "article-figure": Preset(
        Architecture(
            units=(3, 6, 6, 3), widths=(64, 128, 256, 512), strides=(1, 2, 2, 2)
        ),
        4_302_410,
        _ARTICLE,
    ),
    "article-4-stacks": Preset(
        Architecture(
            units=(3, 3, 3, 3),
            widths=(32, 64, 128, 256),
            strides=(1, 2, 2, 2),
            stem_width=32,
        ),
        879_402,
        _ARTICLE,
    ),
    "article-5-stacks": Preset(
        Architecture(
            units=(3, 3, 3, 3, 3),
            widths=(16, 32, 64, 128, 256),
            strides=(1, 2, 2, 2, 2),
            stem_width=16,
        ),
        881_882,
        _ARTICLE,
    ),
    "he2016-resnet20": Preset(_he2016(2), 219_482, _HE),
    "he2016-resnet56": Preset(_he2016(6), 590_426, _HE),
    "he2016-resnet110": Preset(_he2016(12), 1_146_842, _HE),
    "he2016-resnet164": Preset(_he2016(18), 1_703_258, _HE),
    "he2016-resnet1001": Preset(_he2016(111), 10_327_706, _HE),
    "he2016-resnet200": Preset(
        _imagenet(
            (3, 24, 36, 3),
            replace(
                HE2016,
                stem_norm=True,
                first_layer_exception=True,
                stride_layer=2,
            ),
        ),
        64_666_152,
        _HE200,
    ),
    "atienza-resnet20v2": Preset(_atienza(2), 570_602, _ATIENZA),
    "atienza-resnet29v2": Preset(_atienza(3), 843_786, _ATIENZA),
    "atienza-resnet56v2": Preset(_atienza(6), 1_663_338, _ATIENZA),
    "atienza-resnet110v2": Preset(_atienza(12), 3_302_442, _ATIENZA),
    "atienza-resnet164v2": Preset(_atienza(18), 4_941_546, _ATIENZA),
    "basic-resnet20": Preset(_basic(3), 272_282, _BASIC),
    "basic-resnet56": Preset(_basic(9), 855_578, _BASIC),
    "basic-resnet110": Preset(_basic(18), 1_730_522, _BASIC),
    "basic-resnet34": Preset(_basic_imagenet((3, 4, 6, 3), HE2016), 21_795_880, _BASIC),
    "keras-resnet50v2": Preset(_keras(*_DEPTHS[50]), 25_568_360, _KERAS),
    "keras-resnet101v2": Preset(_keras(*_DEPTHS[101]), 44_577_896, _KERAS),
    "keras-resnet152v2": Preset(_keras(*_DEPTHS[152]), 60_236_904, _KERAS),
    "timm-resnetv2-18": Preset(_basic_imagenet((2, 2, 2, 2), TIMM), 11_687_720, _TIMM),
    "timm-resnetv2-34": Preset(_basic_imagenet((3, 4, 6, 3), TIMM), 21_795_880, _TIMM),
    "timm-resnetv2-50": Preset(_imagenet(_DEPTHS[50], TIMM), 25_549_352, _TIMM),
    "timm-resnetv2-50d": Preset(
        _imagenet(
            _DEPTHS[50],
            replace(TIMM, shortcut_pool="average"),
            stem_deep=True,
            stem_kernel=3,
        ),
        25_568_584,
        _TIMM,
    ),
    "timm-resnetv2-101": Preset(_imagenet(_DEPTHS[101], TIMM), 44_541_480, _TIMM),
    "timm-resnetv2-152": Preset(_imagenet(_DEPTHS[152], TIMM), 60_185_128, _TIMM),
    "bit-r50x1": Preset(_bit(_DEPTHS[50], 1), 25_549_352, _BIT),
    "bit-r101x1": Preset(_bit(_DEPTHS[101], 1), 44_541_480, _BIT),
    "bit-r50x3": Preset(_bit(_DEPTHS[50], 3), 217_319_080, _BIT),
    "bit-r101x3": Preset(_bit(_DEPTHS[101], 3), 387_934_888, _BIT),
    "bit-r152x2": Preset(_bit(_DEPTHS[152], 2), 236_335_208, _BIT),
    "bit-r152x4": Preset(_bit(_DEPTHS[152], 4), 936_533_224, _BIT),
}
"""Every named architecture; names say whose net it is."""


def get_preset(name: str) -> Preset:
    """Give the preset called ``name``.

    Raises:
        UsageError: no preset has this name; a bare "resnet56" is three nets.
    """
    if name in PRESETS:
        return PRESETS[name]
    known = ", ".join(PRESETS)
    depth = name.lower().removeprefix("resnet").removesuffix("v2").strip("-_")
    if depth.isdecimal():
        raise UsageError(
            f"{name!r} means different nets: He's bottleneck net has reduction 4 and "
            "9n + 2 layers, the article's has reduction 2, others have basic units of "
            f"6n + 2 layers; say whose, one of: {known}"
        )
    raise UsageError(f"no preset is called {name!r}; choose one of: {known}")
