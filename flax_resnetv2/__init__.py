"""ResNet V2 in JAX and Flax linen, in the words of one article.

>>> from flax_resnetv2 import Architecture, create_model
>>> model = create_model(Architecture(units=(3, 6, 6, 3), ...))

Names are loaded when they are used: importing the package starts no JAX backend and
pulls in neither orbax nor tensorflow_datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax_resnetv2.data.datasets import DataConfig, open_dataset
    from flax_resnetv2.errors import RunError, UsageError
    from flax_resnetv2.inference.predictor import Predictor
    from flax_resnetv2.model.architecture import Architecture, Execution
    from flax_resnetv2.model.autoencoder import create_autoencoder
    from flax_resnetv2.model.decoder_plan import AutoencoderConfig
    from flax_resnetv2.model.intermediates import activations, residual_ratios
    from flax_resnetv2.model.layer_table import layer_table, receptive_field
    from flax_resnetv2.model.modules import (
        Head,
        ResidualLayer,
        ResidualStack,
        ResidualUnit,
        ResNetV2,
        Stem,
        create_model,
    )
    from flax_resnetv2.model.planning import plan, plan_stack, plan_unit
    from flax_resnetv2.model.presets import PRESETS
    from flax_resnetv2.model.semantics import (
        ARTICLE,
        ATIENZA,
        BIT,
        HE2016,
        KERAS,
        TIMM,
        Semantics,
    )
    from flax_resnetv2.model.weights import (
        NORMALISATION,
        from_bit,
        from_file,
        from_keras,
        from_timm,
        to_bit,
        to_keras,
        to_timm,
    )
    from flax_resnetv2.run.checkpoint import Checkpointer
    from flax_resnetv2.run.config import Config
    from flax_resnetv2.run.loop import fit
    from flax_resnetv2.run.recipes import RECIPES
    from flax_resnetv2.training.augment import AugmentConfig, Batch
    from flax_resnetv2.training.optimizers import TrainConfig
    from flax_resnetv2.training.step import (
        TrainState,
        create_train_state,
        make_eval_step,
        make_train_step,
    )

# The runtime twin of the imports above; a test holds the two together.
_HOME = {
    "model.intermediates": ("activations", "residual_ratios"),
    "model.architecture": ("Architecture", "Execution"),
    "training.augment": ("AugmentConfig", "Batch"),
    "model.autoencoder": ("create_autoencoder",),
    "run.checkpoint": ("Checkpointer",),
    "run.config": ("Config",),
    "model.layer_table": ("layer_table", "receptive_field"),
    "data.datasets": ("DataConfig", "open_dataset"),
    "errors": ("RunError", "UsageError"),
    "inference.predictor": ("Predictor",),
    "run.loop": ("fit",),
    "model.decoder_plan": ("AutoencoderConfig",),
    "model.modules": (
        "Head",
        "ResidualLayer",
        "ResidualStack",
        "ResidualUnit",
        "ResNetV2",
        "Stem",
        "create_model",
    ),
    "training.optimizers": ("TrainConfig",),
    "model.planning": ("plan", "plan_stack", "plan_unit"),
    "model.presets": ("PRESETS",),
    "run.recipes": ("RECIPES",),
    "model.semantics": (
        "ARTICLE",
        "ATIENZA",
        "BIT",
        "HE2016",
        "KERAS",
        "TIMM",
        "Semantics",
    ),
    "training.step": (
        "TrainState",
        "create_train_state",
        "make_eval_step",
        "make_train_step",
    ),
    "model.weights": (
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
