"""The README's picture: one image on its way through the net of the package.

python -m tests.support.maps docs/maps.png

Needs CIFAR-10. Shows the maps with the largest standard deviation after the stem and
after each stack (blue: negative, red: positive), and the probabilities.
"""

import sys

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from flax_resnetv2 import DataConfig, Predictor, activations, normalize, open_dataset

IMAGE = 84
"""Index of the test image."""
PARTS, ROWS, COLUMNS = ("stem", "stack1", "stack2", "stack3"), 3, 2
"""Rows and columns of maps shown for each part."""
TITLE = {"fontsize": 9, "y": 0.955}


def draw(file):
    """Write the picture as a PNG file."""
    net = Predictor.find("cifar10-resnet20")
    images = open_dataset(DataConfig(name="cifar10")).splits["test"].image
    image = images[IMAGE : IMAGE + 1]
    pixels = normalize(jnp.asarray(image), net.normalization, "float32")
    maps = activations(net.model, net.variables, pixels)
    (probabilities,) = net(image)

    figure = plt.figure(figsize=(11, 2.7), dpi=110)
    left, *parts, right = figure.subfigures(
        1, len(PARTS) + 2, width_ratios=[3, *[2.05] * len(PARTS), 2.4], wspace=0
    )
    axis = left.add_axes((0.02, 0.02, 0.94, 0.84))
    axis.imshow(image[0], interpolation="nearest")
    left.suptitle("image: 32 x 32 x 3", **TITLE)
    axis.axis("off")
    for part, panel in zip(PARTS, parts, strict=True):
        values = np.asarray(maps[part][0])
        size = " x ".join(map(str, values.shape))
        panel.suptitle(f"{part}: {size}", **TITLE)
        axes = panel.subplots(ROWS, COLUMNS)
        panel.subplots_adjust(0.04, 0.02, 0.96, 0.86, wspace=0.06, hspace=0.06)
        strongest = np.argsort(-values.std((0, 1)))
        for axis, k in zip(axes.ravel(), strongest, strict=False):
            limit = np.abs(values[..., k]).max()
            colors = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
            axis.imshow(values[..., k], **colors, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("0.85")
    axis = right.add_axes((0.06, 0.02, 0.9, 0.84))
    for row, k in enumerate(np.argsort(-probabilities)[:4]):
        axis.barh(row, probabilities[k], height=0.4, color="#3b7cb8")
        label = f"{net.class_names[k]}, {probabilities[k]:.1%}"
        axis.text(0, row - 0.28, label, fontsize=9)
    axis.set(xlim=(0, 1), ylim=(3.5, -0.6))
    right.suptitle("probabilities", **TITLE)
    axis.axis("off")
    figure.savefig(file, metadata={"Software": None}, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    draw(sys.argv[1])
