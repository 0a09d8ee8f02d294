"""ResNet V2 in JAX and Flax linen, in the words of one article.

>>> from flax_resnetv2 import Architecture, create_model
>>> model = create_model(Architecture(units=(3, 6, 6, 3), ...))

Names are loaded when they are used: importing the package starts no JAX backend and
pulls in neither orbax nor tensorflow_datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax_resnetv2.analysis import activations, residual_ratios
    from flax_resnetv2.architecture import Architecture, Execution
    from flax_resnetv2.augment import AugmentConfig, Batch
    from flax_resnetv2.autoencoder import create_autoencoder
    from flax_resnetv2.checkpoint import Checkpointer
    from flax_resnetv2.config import Config
    from flax_resnetv2.counting import layer_table, receptive_field
    from flax_resnetv2.data import DataConfig, open_dataset
    from flax_resnetv2.errors import RunError, UsageError
    from flax_resnetv2.inference import Predictor
    from flax_resnetv2.loop import fit
    from flax_resnetv2.mirror import AutoencoderConfig
    from flax_resnetv2.model import (
        Head,
        ResidualLayer,
        ResidualStack,
        ResidualUnit,
        ResNetV2,
        Stem,
        create_model,
    )
    from flax_resnetv2.optimizers import TrainConfig
    from flax_resnetv2.planning import plan, plan_stack, plan_unit
    from flax_resnetv2.presets import PRESETS
    from flax_resnetv2.recipes import RECIPES
    from flax_resnetv2.semantics import (
        ARTICLE,
        ATIENZA,
        BIT,
        HE2016,
        KERAS,
        TIMM,
        Semantics,
    )
    from flax_resnetv2.training import (
        TrainState,
        create_train_state,
        make_eval_step,
        make_train_step,
    )
    from flax_resnetv2.weights import (
        NORMALISATION,
        from_bit,
        from_file,
        from_keras,
        from_timm,
        to_bit,
        to_keras,
        to_timm,
    )

# The runtime twin of the imports above; a test holds the two together.
_HOME = {
    "analysis": ("activations", "residual_ratios"),
    "architecture": ("Architecture", "Execution"),
    "augment": ("AugmentConfig", "Batch"),
    "autoencoder": ("create_autoencoder",),
    "checkpoint": ("Checkpointer",),
    "config": ("Config",),
    "counting": ("layer_table", "receptive_field"),
    "data": ("DataConfig", "open_dataset"),
    "errors": ("RunError", "UsageError"),
    "inference": ("Predictor",),
    "loop": ("fit",),
    "mirror": ("AutoencoderConfig",),
    "model": (
        "Head",
        "ResidualLayer",
        "ResidualStack",
        "ResidualUnit",
        "ResNetV2",
        "Stem",
        "create_model",
    ),
    "optimizers": ("TrainConfig",),
    "planning": ("plan", "plan_stack", "plan_unit"),
    "presets": ("PRESETS",),
    "recipes": ("RECIPES",),
    "semantics": ("ARTICLE", "ATIENZA", "BIT", "HE2016", "KERAS", "TIMM", "Semantics"),
    "training": (
        "TrainState",
        "create_train_state",
        "make_eval_step",
        "make_train_step",
    ),
    "weights": (
        "NORMALISATION",
        "from_bit",
        "from_file",
        "from_keras",
        "from_timm",
        "to_bit",
        "to_keras",
        "to_timm",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

# Written out, so that a type checker knows them as public.
__all__ = [
    "ARTICLE",
    "ATIENZA",
    "Architecture",
    "AugmentConfig",
    "AutoencoderConfig",
    "BIT",
    "Batch",
    "Checkpointer",
    "Config",
    "DataConfig",
    "Execution",
    "HE2016",
    "Head",
    "KERAS",
    "NORMALISATION",
    "PRESETS",
    "Predictor",
    "RECIPES",
    "ResNetV2",
    "ResidualLayer",
    "ResidualStack",
    "ResidualUnit",
    "RunError",
    "Semantics",
    "Stem",
    "TIMM",
    "TrainConfig",
    "TrainState",
    "UsageError",
    "activations",
    "create_autoencoder",
    "create_model",
    "create_train_state",
    "fit",
    "from_bit",
    "from_file",
    "from_keras",
    "from_timm",
    "layer_table",
    "make_eval_step",
    "make_train_step",
    "open_dataset",
    "plan",
    "plan_stack",
    "plan_unit",
    "receptive_field",
    "residual_ratios",
    "to_bit",
    "to_keras",
    "to_timm",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
