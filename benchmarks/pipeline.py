"""The speed of reading images from disk, and its parts.

    python -m benchmarks.pipeline
    python -m benchmarks.pipeline --table

There is no training. TFDS writes a data set of JPEG images in the size of photographs
(500 x 375), and random parts of them are read as 224 x 224. One row has the times of
the parts of reading one image in one thread; the others have the images/s of the whole
pipeline, in threads and in processes, which take turns. Rows go to
``benchmarks/results/pipeline.jsonl``.
"""

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks.measure import RESULTS, append, provenance, read_rows, usable_cores
from flax_resnetv2.data.decoding import random_resized_crop
from flax_resnetv2.data.streaming import TrainingRow, batches
from flax_resnetv2.data.tfds_records import Records, label_of, stored_splits
from tests.support.prepared import prepare

SIDE = 224
SCALE = (0.08, 1.0)


@dataclass(frozen=True)
class Options:
    """What to measure."""

    images: int = 1000
    """Images in the data set that is written."""
    batch: int = 64
    """Images per batch."""
    batches: int = 30
    """Batches per round for each way of reading."""
    rounds: int = 5
    """Rounds, in which the ways of reading take turns."""
    workers: tuple[int, ...] = ()
    """Numbers of processes to try; an empty tuple means 1 and one per core."""
    out: Path = RESULTS / "pipeline.jsonl"
    """File for the rows."""
    table: bool = False
    """Only print the table of the existing rows."""


def photographs(count: int) -> Iterator[tuple[np.ndarray, int]]:
    """Make images of smooth colors and noise, 70 kB as JPEG, about as ImageNet's."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375)), np.int16)
        noisy = smooth + rng.integers(-12, 13, smooth.shape)
        yield noisy.clip(0, 255).astype(np.uint8), number % 10


def time_parts(records: Records, count: int = 300) -> dict[str, float]:
    """Return median milliseconds per image of each part of reading, in one thread."""
    import tensorflow_datasets as tfds
    from PIL import Image

    source = tfds.builder_from_directory(records.directory).as_data_source(
        records.part.split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    seconds: dict[str, list[float]] = {"record": [], "decode": [], "cut and scale": []}
    for number in range(count):
        times = [time.perf_counter()]
        file = source[number]["image"]
        times.append(time.perf_counter())
        image = Image.open(io.BytesIO(file)).convert("RGB")
        times.append(time.perf_counter())
        rng = np.random.default_rng(number)
        np.asarray(random_resized_crop(SIDE, SCALE, rng)(image))
        times.append(time.perf_counter())
        for part, spent in zip(seconds.values(), np.diff(times), strict=True):
            part.append(spent)
    return {part: 1e3 * statistics.median(spent) for part, spent in seconds.items()}


def time_ways(records: Records, options: Options) -> dict[int, list[float]]:
    """Return images/s of each round by the number of processes (0 means threads)."""
    row = TrainingRow(records, options.batch, seed=0, scale=SCALE)
    ways = (0, *(options.workers or sorted({1, usable_cores()})))
    rates: dict[int, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            last = 2 + way + options.batches
            reader = batches(row, options.batch, 0, last, workers=way)
            for _ in range(2 + way):  # what was ready before the clock runs
                next(reader)
            began = time.perf_counter()
            for _ in range(options.batches):
                next(reader)
            spent = time.perf_counter() - began
            rates[way].append(options.batches * options.batch / spent)
            reader.close()
    return rates


def main() -> int:
    """Measure, or print the table."""
    options = tyro.cli(Options, prog="python -m benchmarks.pipeline")
    if not options.table:
        with tempfile.TemporaryDirectory() as root:
            images = {"train": photographs(options.images)}
            kind = {"classes": 10, "encoding": "jpeg"}
            directory = prepare(Path(root), "photographs", images, **kind)
            stored = stored_splits(directory)["train"]
            records = Records(directory, stored, label_of(directory), (SIDE, SIDE, 3))
            where = provenance()
            append(options.out, {"milliseconds": time_parts(records)} | where)
            for way, rates in time_ways(records, options).items():
                row = {
                    "workers": way,
                    "batch": options.batch,
                    "images_per_second": statistics.median(rates),
                    "per_core": statistics.median(rates) / usable_cores(),
                    "rounds": [round(rate, 1) for rate in rates],
                }
                append(options.out, row | where)
    for row in read_rows(options.out):
        if "milliseconds" in row:
            told = ", ".join(f"{k} {v:.2f} ms" for k, v in row["milliseconds"].items())
            print(f"one image in one thread: {told}")
        else:
            way = f"{row['workers']} processes" if row["workers"] else "threads"
            print(
                f"{way}: {row['images_per_second']:.0f} images/s, "
                f"{row['per_core']:.0f} a core"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
