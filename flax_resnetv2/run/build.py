"""The net and objective of a run, as a classifier or as an autoencoder.

Only this module decides between the two, by ``architecture.head``.
"""

from flax_resnetv2.model.autoencoder import Autoencoder, create_autoencoder
from flax_resnetv2.model.decoder_plan import decoder_table
from flax_resnetv2.model.layer_table import LayerRow, layer_table
from flax_resnetv2.model.modules import ResNetV2, create_model
from flax_resnetv2.run.config import Config
from flax_resnetv2.training.objective import Autoencoding, Objective, classification


def create_net(
    config: Config, image_shape: tuple[int, int, int]
) -> ResNetV2 | Autoencoder:
    """Plan and create the net, or the autoencoder, that a run trains.

    ``config.architecture.num_classes`` is filled in, and ``image_shape`` is the
    (height, width, channels) of stored images.

    Raises:
        UsageError: the architecture breaks a rule, or does not fit the images.
    """
    a, shape = config.architecture, config.augment.input_shape(image_shape)
    if a.head == "latent":
        return create_autoencoder(a, shape, config.autoencoder, config.execution)
    return create_model(a, config.execution, shape)


def create_objective(config: Config, model: ResNetV2 | Autoencoder) -> Objective:
    """Create the objective of a net from ``create_net``."""
    a = config.architecture
    if a.head == "latent":
        weight = config.autoencoder.kl_weight if a.latent_variance else None
        return Autoencoding(a.latent, model.execution.param_dtype, weight)
    return classification(model, config.augment, config.train.label_smoothing)


def net_layers(
    model: ResNetV2 | Autoencoder, input_shape: tuple[int, int, int]
) -> list[LayerRow]:
    """List all layers, a decoder's included, for an input (height, width, channels)."""
    rows = layer_table(model.plan, input_shape)
    if isinstance(model, Autoencoder):
        rows += decoder_table(model.decoder_plan, model.plan.head.features)
    return rows


def count_parameters(config: Config, image_shape: tuple[int, int, int]) -> int:
    """Count the parameters that a run trains; arguments as of ``create_net``."""
    shape = config.augment.input_shape(image_shape)
    rows = net_layers(create_net(config, image_shape), shape)
    return sum(row.parameters for row in rows)
