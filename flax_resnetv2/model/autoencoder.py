"""A net with a latent head as the encoder of an autoencoder, and its mirrored decoder.

The article names filling a latent space as the other use of a ResNet V2. Here the net
learns to: a decoder, the net's mirror image, makes the image again from the latent
vector. With ``Architecture.latent_variance`` it is a variational autoencoder (Kingma &
Welling 2014, arXiv 1312.6114).

>>> net = Architecture(head="latent", latent=64)
>>> model = create_autoencoder(net, (32, 32, 3))
>>> images = jnp.zeros([4, 32, 32, 3])
>>> variables = model.init(jax.random.key(0), images, train=False)
>>> model.apply(variables, images, train=False).image.shape
(4, 32, 32, 3)

The variables are those of the net, with ``decoder`` beside ``stem``, the stacks and
``head``; so ``create_model(net)`` reads them too, and gives the latent vectors alone.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_resnetv2.model.architecture import Architecture, Execution
from flax_resnetv2.model.decoder_plan import (
    AutoencoderConfig,
    DecoderPlan,
    plan_decoder,
)
from flax_resnetv2.model.modules import (
    Latent,
    ResidualLayer,
    ResidualStack,
    ResNetV2,
    create_model,
)
from flax_resnetv2.model.planning import NetPlan
from flax_resnetv2.training.augment import Batch, draw_keys
from flax_resnetv2.training.objective import Question, Sums

NOISE = 7
"""The use of an image's key for where its latent vector is drawn, beside those of its
pixels and of stochastic depth."""


class Reconstruction(NamedTuple):
    """What an autoencoder gives."""

    image: jax.Array
    """[N, H, W, channels], normalised as the one that went in."""
    latent: jax.Array | Latent
    """What the head gave."""


class Decoder(nn.Module):
    """Latent vectors [N, latent] -> images [N, H, W, channels].

    A fully connected layer fills the last maps; then the mirror image of each stack,
    last stack first, on maps enlarged by bilinear interpolation.
    """

    plan: DecoderPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, latent: jax.Array, *, train: bool) -> jax.Array:
        """Apply the decoder, in ``execution.param_dtype`` at both ends."""
        p, e = self.plan, self.execution
        # Drawn whatever the version's dense layers begin with: behind a latent layer
        # of zeros, zeros would never learn.
        init = nn.initializers.he_normal()
        dtypes = {"dtype": e.param_dtype, "param_dtype": e.param_dtype}
        x = nn.Dense(math.prod(p.start), kernel_init=init, name="start", **dtypes)(
            latent
        )
        x = x.reshape(-1, *p.start).astype(e.dtype)
        for number, (stack, size) in enumerate(zip(p.stacks, p.sizes, strict=True)):
            name = f"stack{len(p.stacks) - number}"
            x = ResidualStack(stack, e, name=name)(_enlarged(x, size), train=train)
        x = ResidualLayer(p.last, e, name="image")(_enlarged(x, p.image), train=train)
        return x.astype(e.param_dtype)


class Autoencoder(nn.Module):
    """A net with a latent head, and a decoder behind it.

    Images [N, H, W, channels] -> ``Reconstruction``.
    """

    plan: NetPlan
    """Of the net."""
    decoder_plan: DecoderPlan
    execution: Execution = Execution()

    def setup(self) -> None:
        """Put the net's own variables at the top, ``decoder`` beside them."""
        self.net = ResNetV2(self.plan, self.execution)
        nn.share_scope(self, self.net)
        self.decoder = Decoder(self.decoder_plan, self.execution)

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        keep: jax.Array | None = None,
        noise: jax.Array | None = None,
    ) -> Reconstruction:
        """Encode images and decode them again.

        Args:
            images, train, keep: as of ``ResNetV2``; ``keep`` is for the net's units.
            noise: N(0, 1) [N, latent]: where of its distribution each latent vector is
                taken; None: the mean.
        """
        latent = self.net(images, train=train, keep=keep)
        place = latent.mean if isinstance(latent, Latent) else latent
        if noise is not None:
            place = place + jnp.exp(latent.log_variance / 2) * noise
        return Reconstruction(self.decode(place, train=train), latent)

    def decode(self, latent: jax.Array, *, train: bool = False) -> jax.Array:
        """Make images [N, H, W, channels] from latent vectors [N, latent] alone."""
        return self.decoder(latent, train=train)

    @nn.nowrap
    def init_in_one_draw(
        self, key: jax.Array, image_shape: tuple[int, int, int]
    ) -> dict[str, Any]:
        """As ``ResNetV2.init_in_one_draw``, with the decoder's by linen's ``init``."""
        of_net, of_decoder = jax.random.split(key)
        net = ResNetV2(self.plan, self.execution)
        variables = net.init_in_one_draw(of_net, image_shape)
        decoder = Decoder(self.decoder_plan, self.execution)
        vector = jnp.zeros((1, self.plan.head.features), self.execution.param_dtype)
        more = jax.jit(lambda key: decoder.init(key, vector, train=False))(of_decoder)
        for kind, tree in more.items():
            variables[kind] = {**variables.get(kind, {}), "decoder": tree}
        return variables


@dataclass(frozen=True)
class Autoencoding:
    """The objective of an autoencoder.

    Of an image of n values x, normalised: ``squared_error``, the mean of (x - y)^2;
    ``loss``, half of it; with a variance also ``kl``, the divergence of the latent
    distribution from N(0, 1) in nats, of which ``kl_weight / n`` is added to the loss:
    n times the loss is then the negative evidence lower bound, but for a constant.
    """

    latent: int
    dtype: str
    """Of the noise."""
    kl_weight: float | None
    """None: there is no variance."""

    def pose(
        self, images: jax.Array, batch: Batch, keys: jax.Array, axis_name: str | None
    ) -> Question:
        """Ask for what the net sees."""
        inputs = {}
        if self.kl_weight is not None:
            inputs["noise"] = jax.vmap(
                lambda key: jax.random.normal(key, (self.latent,), self.dtype)
            )(draw_keys(keys, NOISE))
        return Question(images, images, inputs)

    def score(self, outputs: Reconstruction, target: jax.Array, batch: Batch) -> Sums:
        """Compare with ``target``."""
        error = jnp.square(outputs.image - target).mean((1, 2, 3))
        found = {"loss": error / 2, "squared_error": error}
        if self.kl_weight is not None:
            mean, log_variance = outputs.latent
            apart = jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance
            found["kl"] = apart.sum(1) / 2
            found["loss"] += self.kl_weight * found["kl"] / math.prod(target.shape[1:])
        return {
            name: jnp.where(batch.mask, values, 0).sum()
            for name, values in found.items()
        }

    def examine(self, outputs: Reconstruction, images: jax.Array, batch: Batch) -> Sums:
        """The same, of what is decoded from the mean of each image's distribution."""
        return self.score(outputs, images, batch)


def create_autoencoder(
    architecture: Architecture,
    image_shape: tuple[int, int, int],
    config: AutoencoderConfig = AutoencoderConfig(),
    execution: Execution = Execution(),
) -> Autoencoder:
    """Plan a net and its mirror image, and give the module that runs both.

    Args:
        architecture: with ``head="latent"``.
        image_shape: (height, width, channels).
        config: of the decoder.
        execution: how both are run.

    Raises:
        UsageError: as ``create_model``, or there is no latent head, or the mirror image
            breaks a rule.
    """
    net = create_model(architecture, execution, image_shape)
    decoder = plan_decoder(architecture, image_shape, config)
    return Autoencoder(net.plan, decoder, execution)


def _enlarged(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """[N, h, w, C] -> [N, *size, C]."""
    if x.shape[1:3] == size:
        return x
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "bilinear")
