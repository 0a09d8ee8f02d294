"""What a run trains, from its configuration: a classifier, or an autoencoder.

The one place where ``architecture.head`` decides between the two.
"""

from dataclasses import replace

from flax_resnetv2.model.autoencoder import (
    Autoencoder,
    Autoencoding,
    create_autoencoder,
)
from flax_resnetv2.model.decoder_plan import decoder_table
from flax_resnetv2.model.layer_table import LayerRow, layer_table
from flax_resnetv2.model.modules import ResNetV2, create_model
from flax_resnetv2.run.config import Config
from flax_resnetv2.run.cost import Needs, needs
from flax_resnetv2.training.objective import Objective
from flax_resnetv2.training.step import classification


def create_net(
    config: Config, image_shape: tuple[int, int, int], axis_name: str | None = None
) -> ResNetV2 | Autoencoder:
    """Make what is trained.

    Args:
        config: of the run; ``config.architecture.num_classes`` is filled in.
        image_shape: (height, width, channels) of stored images.
        axis_name: the mapped axis over which batch statistics are taken.

    Raises:
        UsageError: the architecture breaks a rule, or does not fit the images.
    """
    shape = config.augment.input_shape(image_shape)
    execution = replace(config.execution, batch_norm_axis=axis_name)
    if config.architecture.head == "latent":
        return create_autoencoder(
            config.architecture, shape, config.autoencoder, execution
        )
    return create_model(config.architecture, execution, shape)


def create_objective(config: Config, model: ResNetV2 | Autoencoder) -> Objective:
    """Make what ``model``, of ``create_net``, is trained for."""
    a = config.architecture
    if a.head == "latent":
        weight = config.autoencoder.kl_weight if a.latent_variance else None
        return Autoencoding(a.latent, model.execution.param_dtype, weight)
    return classification(model, config.augment, config.train.label_smoothing)


def count_needs(config: Config, image_shape: tuple[int, int, int]) -> Needs:
    """Count what training takes of a device; arguments as of ``create_net``."""
    shape, a = config.augment.input_shape(image_shape), config.architecture
    more = _decoder(config, image_shape)
    return needs(a, config.execution, shape, config.train.accumulate, more)


def count_parameters(config: Config, image_shape: tuple[int, int, int]) -> int:
    """Count all that learns, a decoder included; arguments as of ``create_net``."""
    net = layer_table(config.architecture, config.augment.input_shape(image_shape))
    return sum(row.parameters for row in [*net, *_decoder(config, image_shape)])


def _decoder(config: Config, image_shape: tuple[int, int, int]) -> list[LayerRow]:
    a, shape = config.architecture, config.augment.input_shape(image_shape)
    return decoder_table(a, shape, config.autoencoder) if a.head == "latent" else []
