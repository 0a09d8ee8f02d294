"""Named architectures, each with its reference parameter count and where it is from.

>>> PRESETS["he2016-resnet164"].parameters
1703258
"""

from dataclasses import dataclass

from flax_resnetv2.architecture import Architecture
from flax_resnetv2.errors import UsageError
from flax_resnetv2.semantics import HE2016


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


_ARTICLE = "the article; count derived by hand in docs/architecture.md"
_HE = (
    "He et al. 2016, arXiv 1603.05027; count of resnet-pre-act.lua, "
    "github.com/KaimingHe/resnet-1k-layers"
)

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
