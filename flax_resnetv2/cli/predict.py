"""The command ``predict.py NET IMAGE ...``."""

import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from flax_resnetv2.cli.exits import guarded
from flax_resnetv2.inference.predict_files import predict
from flax_resnetv2.run.trained import CheckpointChoice
from flax_resnetv2.system.files import expand_home


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``predict.py``: print the most probable classes of images."""
    words = expand_home(sys.argv[1:] if arguments is None else arguments)
    # Standard output is for the predictions alone.
    return guarded(
        lambda: tyro.cli(_predict, prog="predict.py", args=words),
        log=Console(stderr=True),
    )


def _predict(
    net: str,
    images: tuple[str, ...],
    /,
    top: int = 3,
    json: bool = False,
    latents: str | None = None,
    batch_size: int = 64,
    test_flip: bool | None = None,
    checkpoint: CheckpointChoice = "newest",
) -> None:
    """Classify images, or encode them into latent vectors.

    Args:
        net: A run directory of train.py, a .safetensors file that python -m
            flax_resnetv2 export wrote, or the name of a net in the package.
        images: Image files, folders (searched with their sub-folders), or - to read
            one image from standard input.
        top: Number of classes to print for each image.
        json: Print one JSON object per line.
        latents: Also write the vectors that the classifier reads, or an encoder's
            latent vectors, to this .npz file (arrays path and latent).
        batch_size: Images computed at once.
        test_flip: Average the prediction with that for the mirrored image; None does
            as the run did.
        checkpoint: Checkpoint of a run directory: the newest, or the best on the
            split "validation".
    """
    for line in predict(
        net,
        images,
        top=top,
        as_json=json,
        latents=latents,
        batch_size=batch_size,
        test_flip=test_flip,
        checkpoint=checkpoint,
    ):
        print(line)
