"""The command ``predict.py NET IMAGE ...``."""

from collections.abc import Sequence
from typing import Literal

from flax_resnetv2.cli.exits import guarded


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``predict.py``: print the likeliest classes of images."""
    import tyro

    def predict_images(
        net: tyro.conf.Positional[str],
        images: tyro.conf.Positional[tuple[str, ...]],
        top: int = 3,
        json: bool = False,
        latents: str | None = None,
        batch_size: int = 64,
        test_flip: bool | None = None,
        checkpoint: Literal["newest", "best"] = "newest",
    ) -> None:
        """Say what is on images.

        Args:
            net: A run directory that train.py made, a file that python -m flax_resnetv2
                export wrote, or a net that comes with the package.
            images: Image files, folders of such (with all below them), or - for an
                image on standard input.
            top: How many classes to print for each.
            json: Print a JSON object a line instead.
            latents: Write the vectors that the classifier reads, or the latent vectors
                of an encoder, into this .npz file (arrays path and latent).
            batch_size: Images at once.
            test_flip: Answer by an image and its mirror image; without: as in training.
            checkpoint: Of a run directory the newest, or the best on the split
                "validation".
        """
        from flax_resnetv2.inference.prediction import predict

        predict(
            net,
            images,
            top=top,
            as_json=json,
            latents=latents,
            batch_size=batch_size,
            test_flip=test_flip,
            checkpoint=checkpoint,
        )

    return guarded(lambda: tyro.cli(predict_images, prog="predict.py", args=arguments))
