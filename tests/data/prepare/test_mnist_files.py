"""The four files of MNIST: read, and what is wrong or hostile is refused."""

import gzip
import tracemalloc

import numpy as np
import pytest

from flax_resnetv2 import UsageError
from flax_resnetv2.data.prepare.mnist_files import FASHION_MNIST, MNIST
from tests.support.archives import digits, idx, idx_files, write_files

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize("form", [MNIST, FASHION_MNIST], ids=["mnist", "fashion"])
def test_the_files_give_the_images_in_their_order(tmp_path, form):
    paths = form.find(str(write_files(tmp_path / "a", idx_files())))
    for split, stem in (("train", "train"), ("test", "t10k")):
        images, labels = form.read(paths)[split]
        expected, numbers = digits(stem)
        np.testing.assert_array_equal(images, expected[..., None])
        np.testing.assert_array_equal(labels["label"], numbers)
        assert (images.dtype, labels["label"].dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"\(train-images-idx3-ubyte.gz: No such file or directory\); give a"),
        ({IMAGES: b""}, r"\(train-labels-idx1-ubyte.gz: No such"),
    ],
)
def test_what_a_directory_lacks_is_named(tmp_path, files, message):
    directory = write_files(tmp_path / "a", files)
    with pytest.raises(UsageError, match=rf"data.archive={directory} .*{message}"):
        MNIST.find(str(directory))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/no/such", "No such file"),
        ("/dev/null", "Not a directory"),
        ("", "No such file"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_is_no_directory_is_named(path, reason):
    message = rf"^data.archive={path} cannot be read \(train-im\S* {reason}.*; give a "
    with pytest.raises(UsageError, match=message + ".*gz of Fashion-MNIST$"):
        FASHION_MNIST.find(path)


def packed(*header, count=12 * 28 * 28):
    return gzip.compress(bytes(header) + bytes(count), 1)


IMAGE_HEADER = (0, 0, 8, 3, 0, 0, 0, 12, 0, 0, 0, 28, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, b"hello", "Not a gzipped file"),
        (IMAGES, b"", "it does not begin as one of 3 axes of bytes"),
        (IMAGES, gzip.compress(b""), "it does not begin as one of 3 axes"),
        (IMAGES, idx_files()[LABELS], "it does not begin as one of 3 axes"),
        (LABELS, idx_files()[IMAGES], "it does not begin as one of 1 axes"),
        (LABELS, gzip.compress(bytes([0, 0, 8, 1, 0])), "does not begin as one of 1"),
        (IMAGES, packed(0, 0, 13, *IMAGE_HEADER[3:], 28), "it does not begin as one"),
        (IMAGES, idx_files()[IMAGES][:-9], "ended before the end"),
        (IMAGES, packed(*IMAGE_HEADER, 29), r"9408 bytes for the shape \[12, 28, 29\]"),
        # A shape whose product overflows 64 bits to the right number is none.
        (IMAGES, packed(0, 0, 8, 3, *[255] * 12), r"9408 bytes for the shape \[42949"),
        (IMAGES, packed(*IMAGE_HEADER, 28, count=9409), "9409 bytes for the shape"),
        (IMAGES, idx(np.zeros((12, 28, 27))), r"images of \[28, 27\] pixels"),
        (LABELS, idx(np.zeros(11)), "11 labels of 12 images"),
        (LABELS, idx([10] * 12), "the label 10; MNIST has 0 to 9"),
    ],
    # gzip writes the time down, and the names of tests must not change.
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_a_wrong_file_is_one_clear_line(tmp_path, name, content, message):
    directory = write_files(tmp_path / "a", idx_files() | {name: content})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=rf"{name} .*{message}.*fetch it again") as e:
        MNIST.read(MNIST.find(str(directory)))
    assert "\n" not in str(e.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_images_at_all_are_refused(tmp_path):
    empty = {IMAGES: idx(np.zeros((0, 28, 28))), LABELS: idx([])}
    directory = write_files(tmp_path / "a", idx_files() | empty)
    with pytest.raises(UsageError, match=rf"{LABELS} .*labels uint8 \[0\]"):
        MNIST.read(MNIST.find(str(directory)))


def test_a_bomb_takes_no_memory(tmp_path):
    bomb = gzip.compress(bytes(64 << 20), 1) * 9
    directory = write_files(tmp_path / "a", idx_files() | {LABELS: bomb})
    paths = MNIST.find(str(directory))
    tracemalloc.start()
    with pytest.raises(UsageError, match="more than 67,108,864 bytes, the limit"):
        MNIST.read(paths)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 << 20
