"""ResNet V2 in JAX and Flax linen, in the words of one article.

>>> from flax_resnetv2 import Architecture, create_model
>>> model = create_model(Architecture(units=(3, 6, 6, 3), ...))

Names are imported when they are first used: importing the package starts no JAX backend
and loads neither orbax nor tensorflow_datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax_resnetv2.data.batch import (
        Batch as Batch,
        Split as Split,
        epoch_order as epoch_order,
        evaluation_order as evaluation_order,
        gather_batch as gather_batch,
    )
    from flax_resnetv2.data.datasets import (
        DataConfig as DataConfig,
        Dataset as Dataset,
        open_dataset as open_dataset,
    )
    from flax_resnetv2.data.shapes import (
        SHAPE_CLASSES as SHAPE_CLASSES,
        draw_shapes as draw_shapes,
    )
    from flax_resnetv2.errors import (
        RunError as RunError,
        UsageError as UsageError,
    )
    from flax_resnetv2.inference.predictor import Predictor as Predictor
    from flax_resnetv2.model.architecture import (
        Architecture as Architecture,
        Execution as Execution,
    )
    from flax_resnetv2.model.autoencoder import (
        create_autoencoder as create_autoencoder,
    )
    from flax_resnetv2.model.decoder_plan import AutoencoderConfig as AutoencoderConfig
    from flax_resnetv2.model.drawing import draw_net as draw_net
    from flax_resnetv2.model.initial import init_in_one_draw as init_in_one_draw
    from flax_resnetv2.model.intermediates import (
        activations as activations,
        residual_ratios as residual_ratios,
    )
    from flax_resnetv2.model.layer_table import (
        layer_table as layer_table,
        receptive_field as receptive_field,
    )
    from flax_resnetv2.model.modules import (
        Head as Head,
        ResidualLayer as ResidualLayer,
        ResidualStack as ResidualStack,
        ResidualUnit as ResidualUnit,
        ResNetV2 as ResNetV2,
        Stem as Stem,
        create_model as create_model,
    )
    from flax_resnetv2.model.planning import (
        plan as plan,
        plan_stack as plan_stack,
        plan_unit as plan_unit,
    )
    from flax_resnetv2.model.presets import PRESETS as PRESETS
    from flax_resnetv2.model.semantics import (
        ARTICLE as ARTICLE,
        ATIENZA as ATIENZA,
        BIT as BIT,
        HE2016 as HE2016,
        KERAS as KERAS,
        TIMM as TIMM,
        Semantics as Semantics,
    )
    from flax_resnetv2.model.weights import (
        from_bit as from_bit,
        from_file as from_file,
        from_keras as from_keras,
        from_timm as from_timm,
        to_bit as to_bit,
        to_keras as to_keras,
        to_timm as to_timm,
    )
    from flax_resnetv2.run.checkpoint import Checkpointer as Checkpointer
    from flax_resnetv2.run.config import Config as Config
    from flax_resnetv2.run.loop import fit as fit
    from flax_resnetv2.run.recipes import RECIPES as RECIPES
    from flax_resnetv2.system.runtime import tune as tune
    from flax_resnetv2.training.augment import (
        NORMALIZATION as NORMALIZATION,
        AugmentConfig as AugmentConfig,
        normalize as normalize,
    )
    from flax_resnetv2.training.evaluation import make_eval_step as make_eval_step
    from flax_resnetv2.training.objective import Autoencoding as Autoencoding
    from flax_resnetv2.training.optimizers import TrainConfig as TrainConfig
    from flax_resnetv2.training.step import (
        TrainState as TrainState,
        create_train_state as create_train_state,
        make_train_step as make_train_step,
    )

_HOME = {
    "data.batch": "Batch Split epoch_order evaluation_order gather_batch",
    "data.datasets": "DataConfig Dataset open_dataset",
    "data.shapes": "SHAPE_CLASSES draw_shapes",
    "errors": "RunError UsageError",
    "inference.predictor": "Predictor",
    "model.architecture": "Architecture Execution",
    "model.autoencoder": "create_autoencoder",
    "model.decoder_plan": "AutoencoderConfig",
    "model.drawing": "draw_net",
    "model.initial": "init_in_one_draw",
    "model.intermediates": "activations residual_ratios",
    "model.layer_table": "layer_table receptive_field",
    "model.modules": "Head ResNetV2 ResidualLayer ResidualStack ResidualUnit Stem "
    "create_model",
    "model.planning": "plan plan_stack plan_unit",
    "model.presets": "PRESETS",
    "model.semantics": "ARTICLE ATIENZA BIT HE2016 KERAS TIMM Semantics",
    "model.weights": "from_bit from_file from_keras from_timm to_bit to_keras to_timm",
    "run.checkpoint": "Checkpointer",
    "run.config": "Config",
    "run.loop": "fit",
    "run.recipes": "RECIPES",
    "system.runtime": "tune",
    "training.augment": "NORMALIZATION AugmentConfig normalize",
    "training.evaluation": "make_eval_step",
    "training.objective": "Autoencoding",
    "training.optimizers": "TrainConfig",
    "training.step": "TrainState create_train_state make_train_step",
}
"""The public names of each module; a test compares them with the imports above."""
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
