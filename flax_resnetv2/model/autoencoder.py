"""An autoencoder: a net with a latent head as encoder, and its mirror image as decoder.

Filling a latent space is the article's other use of a ResNet V2. A decoder trains the
net for it, by reconstructing the image from the latent vector. With
``Architecture.latent_variance`` it is a variational autoencoder (Kingma & Welling 2014,
arXiv 1312.6114).

>>> net = Architecture(head="latent", latent=64)
>>> model = create_autoencoder(net, (32, 32, 3))
>>> images = jnp.zeros([4, 32, 32, 3])
>>> variables = model.init(jax.random.key(0), images, train=False)
>>> model.apply(variables, images, train=False).image.shape
(4, 32, 32, 3)

The variables are those of the net, with ``decoder`` next to ``stem``, the stacks and
``head``. So ``create_model(net)`` accepts them too, and returns latent vectors only.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_resnetv2.model import modules
from flax_resnetv2.model.architecture import Architecture, Execution
from flax_resnetv2.model.decoder_plan import (
    AutoencoderConfig,
    DecoderPlan,
    plan_decoder,
)
from flax_resnetv2.model.planning import NetPlan


class Reconstruction(NamedTuple):
    """Output of an autoencoder."""

    image: jax.Array
    """[N, H, W, channels], normalized like the input images."""
    latent: jax.Array | modules.Latent
    """The head's output: [N, latent], or mean and log-variance."""


class Decoder(nn.Module):
    """Latent vectors [N, latent] -> images [N, H, W, channels].

    A fully connected layer fills the last maps, and the mirror images of the stacks
    follow on maps enlarged by bilinear interpolation.
    """

    plan: DecoderPlan
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, latent: jax.Array, *, train: bool) -> jax.Array:
        """Decode; latent vectors and images are in ``execution.param_dtype``."""
        p, e = self.plan, self.execution
        # Not the initializer of the semantics: zeros behind a latent layer of zeros
        # would never get a gradient.
        init = nn.initializers.he_normal()
        dtypes = {"dtype": e.param_dtype, "param_dtype": e.param_dtype}
        start = nn.Dense(math.prod(p.start), kernel_init=init, name="start", **dtypes)
        x = start(latent).reshape(-1, *p.start).astype(e.dtype)
        for number, (stack, size) in enumerate(zip(p.stacks, p.sizes, strict=True)):
            name = f"stack{len(p.stacks) - number}"
            module = modules.ResidualStack(stack, e, name=name)
            x = module(_enlarged(x, size), train=train)
        module = modules.ResidualLayer(p.last, e, name="image")
        x = module(_enlarged(x, p.image), train=train)
        return x.astype(e.param_dtype)


class Autoencoder(nn.Module):
    """A net and a decoder: images [N, H, W, channels] -> ``Reconstruction``."""

    plan: NetPlan
    """The net's plan."""
    decoder_plan: DecoderPlan
    execution: Execution = Execution()

    def setup(self) -> None:
        """Put the net's variables at the top level, with ``decoder`` next to them."""
        self.net = modules.ResNetV2(self.plan, self.execution)
        nn.share_scope(self, self.net)
        self.decoder = Decoder(self.decoder_plan, self.execution)

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool,
        residual_scale: jax.Array | None = None,
        noise: jax.Array | None = None,
    ) -> Reconstruction:
        """Encode images and decode them again.

        Args:
            images, train, residual_scale: as of ``ResNetV2``.
            noise: [N, latent] from N(0, 1), samples each latent vector from its
                distribution; None: decode the mean.
        """
        latent = self.net(images, train=train, residual_scale=residual_scale)
        vector = latent.mean if isinstance(latent, modules.Latent) else latent
        if noise is not None:
            vector = vector + jnp.exp(latent.log_variance / 2) * noise
        return Reconstruction(self.decode(vector, train=train), latent)

    def decode(self, latent: jax.Array, *, train: bool = False) -> jax.Array:
        """Decode latent vectors [N, latent] to images [N, H, W, channels]."""
        return self.decoder(latent, train=train)


def create_autoencoder(
    architecture: Architecture,
    image_shape: tuple[int, int, int],
    config: AutoencoderConfig = AutoencoderConfig(),
    execution: Execution = Execution(),
) -> Autoencoder:
    """Plan a net and its decoder, and return the module that executes both plans.

    Arguments and errors are as of ``create_model`` and ``plan_decoder``.
    """
    net = modules.create_model(architecture, execution, image_shape)
    decoder = plan_decoder(architecture, net.plan, image_shape, config)
    return Autoencoder(net.plan, decoder, execution)


def _enlarged(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Enlarge maps [N, h, w, C] to [N, *size, C]."""
    if x.shape[1:3] == size:
        return x
    return jax.image.resize(x, (x.shape[0], *size, x.shape[-1]), "bilinear")
