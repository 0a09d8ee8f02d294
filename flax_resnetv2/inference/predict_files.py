"""The work of ``predict.py``: predictions of image files, as lines of text or JSON."""

import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Annotated

import numpy as np

from flax_resnetv2.data.folder import SUFFIXES
from flax_resnetv2.errors import RunError, UsageError
from flax_resnetv2.inference.predictor import Prediction, Predictor
from flax_resnetv2.run.trained import CheckpointChoice
from flax_resnetv2.system.files import printable, write_whole
from flax_resnetv2.validation import Count, Range, check_arguments

_logger = logging.getLogger(__name__)


def predict(
    net: str,
    images: Sequence[str],
    *,
    top: Count = 3,
    as_json: bool = False,
    latents: str | None = None,
    batch_size: Annotated[int, Range(1, 65_536)] = 64,
    test_flip: bool | None = None,
    checkpoint: CheckpointChoice = "newest",
) -> Iterator[str]:
    """Yield one line per image; arguments as of ``predict.py``.

    Raises:
        UsageError: the net or all images are unreadable, or a value is out of range.
        RunError: some images are unreadable, after the lines of the others.
    """
    check_arguments(predict, {"top": top, "batch_size": batch_size})
    if not images:
        raise UsageError("no image given; name at least one PNG or JPEG file")
    if latents is not None and (
        not latents.endswith(".npz") or not os.access(Path(latents).parent, os.W_OK)
    ):
        raise UsageError(
            f"latents={latents} must be an .npz file in a directory that can be "
            "written, for example latents.npz"
        )
    files = list(_image_files(images))
    predictor = Predictor.find(net, checkpoint, test_flip)
    all_names, vectors, failed = [], [], 0
    for first in range(0, len(files), batch_size):
        names, pixels = [], []
        for file in files[first : first + batch_size]:
            try:
                pixels.append(predictor.load(file))
                names.append(getattr(file, "name", file))
            except UsageError as error:
                if len(files) == 1:
                    raise
                _logger.warning("left out: %s", error)
                failed += 1
        batch = np.array(pixels, np.uint8).reshape(-1, *predictor.image_shape)
        prediction = predictor.predict(batch, batch_size)
        yield from _lines(predictor, names, prediction, top, as_json)
        if latents is not None:
            all_names += names
            vectors.append(prediction.latents)
    if failed == len(files):
        raise UsageError(
            f"none of the {len(files)} images could be read; give whole PNG or JPEG "
            "files"
        )
    if latents is not None:
        file, vectors = io.BytesIO(), np.concatenate(vectors)
        np.savez(file, path=np.array(all_names), latent=vectors)
        write_whole(Path(latents), file.getvalue())
        shape = " x ".join(map(str, vectors.shape))
        _logger.info("%s numbers written to %s", shape, latents)
    if failed:
        raise RunError(
            f"{failed} of {len(files)} images could not be read; the lines above are "
            "complete for the others"
        )


def _lines(
    predictor: Predictor, names: list[str], found: Prediction, top: int, as_json: bool
) -> Iterator[str]:
    """Yield one line per image, of its best classes or of an encoder's latents."""
    for k, path in enumerate(names):
        if found.probabilities is None:
            vector = [float(x) for x in found.latents[k]]
            record = {"path": path, "latent": vector}
            text = " ".join(f"{x:.4g}" for x in vector)
        else:
            best = predictor.top_classes(found.probabilities[k], top)
            classes = [{"class": name, "probability": p} for name, p in best]
            record = {"path": path, "classes": classes}
            text = ", ".join(f"{name} {p:.1%}" for name, p in best)
        yield json.dumps(record) if as_json else printable(f"{path}: {text}")


def _image_files(images: Sequence[str]) -> Iterator[str | IO[bytes]]:
    """Yield the image files, with those of a folder in the order of their paths."""
    for image in images:
        if image == "-":
            if sys.stdin is None:
                raise UsageError("- is standard input, which is closed; name a file")
            stream = io.BytesIO(sys.stdin.buffer.read())
            stream.name = "standard input"
            yield stream
        elif os.path.isdir(image):
            found = sorted(_images_below(image))
            if not found:
                raise UsageError(
                    f"{image} holds no image ({' '.join(sorted(SUFFIXES))}); name a "
                    "folder that holds some, or files"
                )
            yield from map(str, found)
        elif os.path.exists(image) and not os.path.isfile(image):  # a pipe
            stream = io.BytesIO(Path(image).read_bytes())
            stream.name = image
            yield stream
        else:
            yield image


def _images_below(folder: str) -> Iterator[Path]:
    """Yield the image files of a folder at any depth, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise UsageError(
            f"{error.filename} cannot be read ({error.strerror}); make it readable"
        )

    for parent, folders, names in os.walk(folder, onerror=refuse):
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                _logger.warning("left out: %s/%s is a link to a folder", parent, name)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            # A link that leads nowhere is said when it is read.
            wanted = path.is_file() or path.is_symlink()
            if wanted and path.suffix.lower() in SUFFIXES and name[0] != ".":
                yield path
