"""Images that stay on disk: which they are, what is cut out, and a run on them."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from flax_resnetv2 import RunError, UsageError
from flax_resnetv2.data import streaming
from flax_resnetv2.data.batch import Split
from flax_resnetv2.data.datasets import Dataset
from flax_resnetv2.data.decoding import center_crop, random_resized_crop
from flax_resnetv2.data.streaming import EvaluationRow, TrainingRow, batches
from flax_resnetv2.data.tfds_records import Records, label_of, stored_splits
from flax_resnetv2.errors import Stopped
from flax_resnetv2.run import run_directory
from flax_resnetv2.run.validate import validate_static
from flax_resnetv2.training.augment import AugmentConfig
from tests.support import tiny
from tests.support.prepared import prepare
from tests.support.runs import (
    CONFIG,
    run_fit,
    stop_after,
    untimed,
)

SHAPE = (8, 8, 3)


def prepare_tiny(root):
    """``tiny.dataset`` as records: TFDS shuffles them."""
    splits = {
        name: list(zip(*split, strict=True))
        for name, split in tiny.dataset(train=59).splits.items()
    }
    return prepare(root, "tiny", splits, classes=4, shape=SHAPE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return prepare_tiny(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def streamed(directory):
    return streamed_from(directory)


def streamed_from(directory):
    splits = of(directory, SHAPE)
    splits["validation"] = splits["train"].take(50, 9)
    splits["train"] = splits["train"].take(0, 50)
    return Dataset("tiny", tuple("abcd"), splits)


def of(directory, shape):
    label = label_of(directory)
    stored = stored_splits(directory)
    return {k: Records(directory, s, label, shape) for k, s in stored.items()}


@pytest.fixture(scope="module")
def in_memory(streamed):
    def read(records):
        rows = [records.read(k, center_crop(8)) for k in range(records.num_images)]
        return Split(*map(np.stack, zip(*rows, strict=True)))

    return replace(streamed, splits={k: read(s) for k, s in streamed.splits.items()})


def read(row, share, first, last, **more):
    reader = batches(row, share, first, last, **({"workers": 0} | more))
    found = list(reader)
    reader.close()
    return found


def assert_equal(some, others):
    jax.tree.map(np.testing.assert_array_equal, some, others)


# What is cut out


def gradient(width, height):
    """Red says how far to the right, green how far down."""
    from PIL import Image

    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)
    image[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(image)


def test_the_square_is_central_and_its_pixels_averages():
    small = np.asarray(center_crop(2)(gradient(200, 100)), float)
    # Left and right half of the columns 50 to 149; rows 0 to 99 likewise.
    np.testing.assert_allclose(small[0, :, 0], [74.5, 124.5], atol=4)
    np.testing.assert_allclose(small[:, 0, 1], [24.5, 74.5], atol=4)
    small = np.asarray(center_crop(2, 0.5)(gradient(200, 100)), float)
    np.testing.assert_allclose(small[0, :, 0], [87, 112], atol=4)


def test_an_image_of_the_size_stays_as_it_is():
    image = gradient(32, 32)
    np.testing.assert_array_equal(np.asarray(center_crop(32)(image)), np.asarray(image))


def test_a_random_part_covers_the_share_that_is_said():
    image, shares, proportions = gradient(240, 160), [], []
    for seed in range(300):
        draw = np.random.default_rng(seed)
        part = np.asarray(random_resized_crop(64, (0.2, 0.6), draw)(image), float)
        # Both gradients are straight lines: their slopes say how large the part was.
        width = np.polyfit(np.arange(8, 56), part[32, 8:56, 0], 1)[0] * 64
        height = np.polyfit(np.arange(8, 56), part[8:56, 32, 1], 1)[0] * 64
        shares.append(width * height / (240 * 160))
        proportions.append(width / height)
    assert 0.18 < min(shares) < 0.22 and 0.57 < max(shares) < 0.63
    assert abs(np.mean(shares) - 0.4) < 0.02
    assert 0.72 < min(proportions) < 0.8 and 1.25 < max(proportions) < 1.4


def test_a_narrow_image_is_seen_whole():
    part = random_resized_crop(8, (1.0, 1.0), np.random.default_rng(0))(
        gradient(200, 20)
    )
    np.testing.assert_array_equal(
        np.asarray(part), np.asarray(center_crop(8)(gradient(200, 20)))
    )


# Which images, in which order


def test_an_epoch_has_each_image_once_but_the_tail(streamed, in_memory):
    found = read(TrainingRow(streamed.splits["train"], 8, 3), 8, 0, 12)
    assert [batch[0].shape for batch in found] == [(8, *SHAPE)] * 12
    known = {image.tobytes() for image in in_memory.splits["train"].image}
    epochs = [[image.tobytes() for b in half for image in b[0]] for half in
              (found[:6], found[6:])]  # fmt: skip
    for epoch in epochs:
        assert len(set(epoch)) == 48 and set(epoch) < known
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_their_step_alone(streamed, workers):
    row = TrainingRow(streamed.splits["train"], 8, 3, scale=(0.1, 1.0))
    whole = read(row, 8, 0, 9)
    assert_equal(read(row, 8, 4, 9, workers=workers), whole[4:])
    halves = [read(row, 4, 0, 9, part=(k, 2)) for k in range(2)]
    joined = [
        tuple(map(np.concatenate, zip(*two, strict=True)))
        for two in zip(*halves, strict=True)
    ]
    assert_equal(joined, whole)


def die(_):
    """As a worker whose shared memory is full."""
    os.kill(os.getpid(), signal.SIGBUS)


def test_a_worker_that_is_killed_is_one_line():
    with pytest.raises(RunError, match=r"was killed \(exit code -7\); .*/dev/shm"):
        next(batches(die, 2, 0, 3, workers=1))


def test_shared_memory_that_is_too_small_is_known_before(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SHARED_MEMORY", tmp_path)
    free = shutil.disk_usage(tmp_path).free
    streaming.check_shared_memory(2, free // 16)
    streaming.check_shared_memory(0, free)
    with pytest.raises(UsageError, match=r"data.workers=2 .* MB free of the .* MB"):
        streaming.check_shared_memory(2, free)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="cannot be written; choose"):
        streaming.check_shared_memory(2, 1)
    monkeypatch.setattr(streaming, "SHARED_MEMORY", tmp_path / "no such")
    streaming.check_shared_memory(2, free)


def test_an_evaluation_has_each_image_once(streamed, in_memory):
    found = read(EvaluationRow(streamed.splits["test"]), 10, 0, 3)
    image, label, mask = map(np.concatenate, zip(*found, strict=True))
    assert mask.tolist() == [True] * 23 + [False] * 7
    assert_equal((image[mask], label[mask]), tuple(in_memory.splits["test"]))
    assert label.dtype == np.int32


# Runs


@pytest.fixture(scope="module")
def config(in_memory):
    mean, std = in_memory.channel_statistics()
    augment = replace(CONFIG.augment, mean=mean, std=std)
    return replace(CONFIG, augment=augment)


def test_a_run_is_the_same_from_disk_and_from_memory(
    config, streamed, in_memory, tmp_path
):
    memory = run_fit(tmp_path / "memory", config, dataset=in_memory)
    disk = run_fit(tmp_path / "disk", config, dataset=streamed)
    assert untimed(disk[1]) == untimed(memory[1])
    assert_equal(disk[2], memory[2])


def test_a_streamed_run_goes_on_exactly(config, streamed, tmp_path, monkeypatch):
    config = replace(config, augment=AugmentConfig(crop_scale=(0.3, 1.0)))
    whole = run_fit(tmp_path / "whole", config, dataset=streamed)
    for steps in (5, 3):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            with pytest.raises(Stopped):
                run_fit(tmp_path / "parts", config, dataset=streamed)
    rest = run_fit(tmp_path / "parts", config, dataset=streamed)
    assert untimed(rest[1]) == untimed(whole[1])
    assert_equal(rest[2], whole[2])


def test_statistics_of_few_images_are_those_of_all(streamed, in_memory):
    assert streamed.channel_statistics() == in_memory.channel_statistics()


def test_other_files_are_other_images(streamed):
    records = streamed.splits["train"]
    assert records.checksum() != records.take(1, 49).checksum()


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_does_not_grow_with_the_data_set(tmp_path, workers):
    """Of 236 MB of images few are in memory at once."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    images = [(np.tile(noise, (16, 16, 1)), 0)] * 1200
    directory = prepare(
        tmp_path, "large", {"train": images}, classes=1, encoding="jpeg"
    )
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from tests.data.test_streaming import of\n"
        "from flax_resnetv2.data.streaming import TrainingRow, batches\n"
        "def peak(who):\n"
        "    return resource.getrusage(who).ru_maxrss >> 10\n"
        "if __name__ == '__main__':\n"
        "    records = of(Path(sys.argv[1]), (256, 256, 3))['train']\n"
        "    row = TrainingRow(records, 8, 0, (0.1, 1.0))\n"
        "    reader = batches(row, 8, 0, 135, workers=int(sys.argv[2]))\n"
        "    next(reader)\n"
        "    before = peak(resource.RUSAGE_SELF)\n"
        "    seen = sum(len(batch[0]) for batch in reader)\n"
        "    reader.close()\n"
        "    print(seen, before, peak(resource.RUSAGE_SELF))\n"
        "    print(peak(resource.RUSAGE_CHILDREN))\n"
    )
    script = tmp_path / "read.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script, directory, str(workers)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen, before, after, child = map(int, done.stdout.split())
    assert seen == 1072
    assert after - before < 60
    # A child holds Python, TFDS and a few batches: no more than its parent did.
    assert child < before + 60


def test_a_damaged_image_is_named(tmp_path):
    directory = prepare(
        tmp_path,
        "bad",
        {"train": [(np.zeros((8, 8, 3), np.uint8), 0)] * 10},
        classes=1,
    )
    row = TrainingRow(of(directory, (8, 8, 3))["train"], 8, 0)
    (directory / "bad-train.array_record-00000-of-00001").write_bytes(b"x" * 999)
    with pytest.raises(UsageError, match="of the split 'train' of"):
        read(row, 8, 0, 1)


def test_by_size_or_as_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = replace(
        tiny.config(), architecture=replace(tiny.SMALL, num_classes=10), log_every=9
    )

    def streams(limit, stream=None):
        asked = replace(config, data=replace(config.data, stream=stream))
        return validate_static(asked, tmp_path / "run", 2, limit)[0].data.stream

    # 12,000 images of 3,072 bytes: a quarter of 147 MB.
    assert streams(None) is streams(148_000_000) is streams(147_000_000, False) is False
    assert streams(147_000_000) is streams(None, True) is True


def test_a_run_stays_where_it_began(config, streamed, tmp_path, monkeypatch):
    """On a device with more memory too."""
    config = replace(config, data=replace(config.data, stream=True))
    run_fit(tmp_path, replace(config, train=replace(config.train, epochs=1)),
            dataset=streamed)  # fmt: skip
    open_ended = replace(config, data=replace(config.data, stream=None))
    assert run_directory.fill_in_from_run(tmp_path, open_ended).data.stream is True


def test_crops_of_images_in_memory_are_refused(config, in_memory, tmp_path):
    config = replace(config, augment=replace(config.augment, test_crop=0.875))
    with pytest.raises(UsageError, match=r"test_crop=0.875 .* --data.stream True"):
        run_fit(tmp_path / "run", config, dataset=in_memory)
    assert not (tmp_path / "run").exists()
