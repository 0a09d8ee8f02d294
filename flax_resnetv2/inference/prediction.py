"""What ``predict.py`` does: files, folders or a stream of images in, lines out."""

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np

from flax_resnetv2.data.folder import SUFFIXES
from flax_resnetv2.errors import RunError, UsageError
from flax_resnetv2.inference.predictor import Answer, Predictor
from flax_resnetv2.run.trained import CheckpointChoice
from flax_resnetv2.system.files import write_whole
from flax_resnetv2.validation import Count, Range, check_arguments

BatchSize = Annotated[int, Range(1, 65_536)]


def predict(
    net: str,
    images: Sequence[str],
    *,
    top: Count = 3,
    as_json: bool = False,
    latents: str | None = None,
    batch_size: BatchSize = 64,
    test_flip: bool | None = None,
    checkpoint: CheckpointChoice = "newest",
) -> None:
    """Print what a net says of images; arguments are those of ``predict.py``.

    Raises:
        UsageError: the net or no image could be read, or a value is out of its range.
        RunError: some images could not be read; what was said of the others stays.
    """
    check_arguments(predict, {"top": top, "batch_size": batch_size})
    if not images:
        raise UsageError("no image given; name at least one PNG or JPEG file")
    if latents is not None and (
        not latents.endswith(".npz") or not os.access(Path(latents).parent, os.W_OK)
    ):
        raise UsageError(
            f"latents={latents} must be an .npz file in a directory that can be "
            "written, as latents.npz"
        )
    files = list(_files(images))
    predictor = Predictor.find(net, checkpoint, test_flip)
    names, vectors, failed = [], [], []
    for paths, answer, errors in predictor.read(files, batch_size):
        if len(files) == 1 and errors:
            raise errors[0]
        for error in errors:
            print(f"left out: {error}", file=sys.stderr)
        failed += errors
        for line in _lines(predictor, paths, answer, top, as_json):
            print(line)
        if latents is not None:
            names += paths
            vectors.append(answer.latents)
    if len(failed) == len(files):
        raise UsageError(
            f"none of the {len(files)} images could be read; give whole PNG or JPEG "
            "files"
        )
    if latents is not None:
        file = io.BytesIO()
        np.savez(file, path=np.array(names), latent=np.concatenate(vectors))
        write_whole(Path(latents), file.getvalue())
        shape = " x ".join(map(str, (len(names), vectors[0].shape[1])))
        print(f"{shape} numbers written to {latents}", file=sys.stderr)
    if failed:
        raise RunError(
            f"{len(failed)} of {len(files)} images could not be read; what is above "
            "stands without them"
        )


def _lines(
    predictor: Predictor, paths: list[str], answer: Answer, top: int, as_json: bool
) -> Iterator[str]:
    """A line for each image."""
    for k, path in enumerate(paths):
        said: dict[str, Any] = {"path": path}
        if answer.probabilities is None:
            said["latent"] = [float(x) for x in answer.latents[k]]
        else:
            row = answer.probabilities[k]
            said["classes"] = [
                {"class": predictor.class_names[c], "probability": float(row[c])}
                for c in np.argsort(-row, kind="stable")[:top]
            ]
        if as_json:
            yield json.dumps(said)
        elif "latent" in said:
            yield f"{path}: " + " ".join(f"{x:.4g}" for x in said["latent"])
        else:
            best = (f"{c['class']} {c['probability']:.1%}" for c in said["classes"])
            yield f"{path}: " + ", ".join(best)


def _files(images: Sequence[str]) -> Iterator[str | IO[bytes]]:
    """The files that are meant; those of a folder in the order of their names."""
    for image in images:
        if image == "-":
            stream = io.BytesIO(sys.stdin.buffer.read())
            stream.name = "standard input"
            yield stream
        elif os.path.isdir(image):
            found = sorted(
                path
                for path in Path(image).rglob("*")
                if path.suffix.lower() in SUFFIXES and path.is_file()
            )
            if not found:
                raise UsageError(
                    f"{image} holds no image ({' '.join(sorted(SUFFIXES))}); name a "
                    "folder that does, or files"
                )
            yield from map(str, found)
        else:
            yield image
