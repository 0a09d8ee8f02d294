"""CIFAR-10 and the embedded shapes, written into directories that TFDS opens."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from flax_resnetv2 import RunError, UsageError
from flax_resnetv2.data import shapes
from flax_resnetv2.data.catalog import DATASETS
from flax_resnetv2.data.prepare import write_tfds
from flax_resnetv2.data.tfds_records import find_prepared, label_of, read_split
from tests.support.archives import (
    BATCHES,
    COARSE,
    FINE,
    MEMBERS,
    MEMBERS100,
    Server,
    batch,
    digits,
    idx_files,
    pixels100,
    prepare,
    write_files,
    write_tar,
)


@pytest.mark.parametrize("kind", MEMBERS)
def test_either_archive_gives_the_images_and_tfds_opens_them(tmp_path, kind):
    archive = write_tar(tmp_path / "any-name", MEMBERS[kind]())
    directory = prepare(tmp_path / "data", archive=str(archive))
    assert directory == tmp_path / "data" / "cifar10" / "3.0.2"
    images, labels = read_split(directory, "train")
    # TFDS shuffles; the identifiers say which is which.
    source = tfds.data_source("cifar10", split="train", data_dir=tmp_path / "data")
    assert len(source) == 20
    for index, record in enumerate(source):
        identifier = record["id"]
        identifier = getattr(identifier, "decode", lambda s=identifier: s)()
        number = int(identifier.removeprefix("train_"))
        pixels, expected = batch(BATCHES[number // 4])
        image = pixels[number % 4].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(record["image"], image)
        assert np.array_equal(images[index], image)
        assert record["label"] == labels[index] == expected[number % 4]
    theirs = tfds.builder("cifar10", data_dir=tmp_path / "elsewhere").info
    # From the directory: a builder by name knows its description without the data.
    ours = tfds.builder_from_directory(directory).info
    for field in ("citation", "homepage", "supervised_keys", "version"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert label_of(directory).class_names[::3] == ("airplane", "cat", "frog", "truck")
    assert len(read_split(directory, "test")[1]) == 4


@pytest.mark.parametrize("kind", MEMBERS100)
def test_cifar100_is_written_as_tfds_writes_it(tmp_path, kind):
    archive = write_tar(tmp_path / "any-name", MEMBERS100[kind]())
    directory = prepare(tmp_path / "data", "cifar100", archive=str(archive))
    assert directory == tmp_path / "data" / "cifar100" / "3.0.2"
    source = tfds.data_source("cifar100", split="train", data_dir=tmp_path / "data")
    images, fine = read_split(directory, "train")
    _, coarse = read_split(directory, "train", "coarse_label")
    for index, record in enumerate(source):
        number = int(record["id"].decode().removeprefix("train_"))
        pixels = pixels100("train")[number].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(record["image"], pixels)
        assert np.array_equal(images[index], pixels)
        assert record["label"] == fine[index] == FINE[number]
        assert record["coarse_label"] == coarse[index] == COARSE[number]
    theirs = tfds.builder("cifar100", data_dir=tmp_path / "elsewhere").info
    ours = tfds.builder_from_directory(directory).info
    for field in ("citation", "homepage", "supervised_keys", "version"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert set(ours.features) == set(theirs.features)
    for name in ("cifar100", "cifar100_coarse"):
        names = DATASETS[name].class_names
        assert label_of(directory, DATASETS[name].label).class_names == names


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("where", ["here", "downloaded"])
def test_mnist_is_written_as_tfds_writes_it(tmp_path, name, where):
    files = write_files(tmp_path / "files", idx_files())
    if where == "here":
        directory = prepare(tmp_path / "data", name, archive=str(files))
    else:
        with serving(Server(b"", idx_files())) as server:
            url = server.url.rpartition("/")[0]
            directory = prepare(tmp_path / "data", name, url=url)
            assert len(server.asked) == 4
        assert not list((tmp_path / "data" / "downloads").glob("*mnist*"))
    assert directory == tmp_path / "data" / name / "3.0.1"
    images, labels = read_split(directory, "train")
    assert (images.shape, images.dtype) == ((12, 28, 28, 1), np.uint8)
    written, expected = digits("train")
    assert pairs(images, labels) == pairs(written, expected)
    source = tfds.data_source(name, split="train", data_dir=tmp_path / "data")
    for index, record in enumerate(source):
        assert np.array_equal(record["image"], images[index])
        assert record["label"] == labels[index]
    theirs = tfds.builder(name, data_dir=tmp_path / "elsewhere").info
    ours = tfds.builder_from_directory(directory).info
    for field in ("homepage", "supervised_keys", "version"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert set(ours.features) == set(theirs.features)
    assert ours.features["label"].names == theirs.features["label"].names
    assert label_of(directory).class_names == DATASETS[name].class_names


def test_a_wrong_file_among_four_is_fetched_again(tmp_path):
    files = idx_files()
    with serving(Server(b"", files)) as server:
        url = server.url.rpartition("/")[0]
        name = "t10k-labels-idx1-ubyte.gz"
        whole, files[name] = files[name], files["t10k-images-idx3-ubyte.gz"]
        with pytest.raises(UsageError, match=r"t10k-labels.* is damaged or another fi"):
            prepare(tmp_path / "data", "mnist", url=url)
        with pytest.raises(
            UsageError, match=r"/train-images\S* has the SHA-256 .* 440f"
        ):
            write_tfds.prepare("mnist", tmp_path / "data", url=url)
        files[name] = whole
        assert prepare(tmp_path / "data", "mnist", url=url).is_dir()


def test_the_classes_of_cifar100_are_as_many_and_in_order():
    fine, coarse = DATASETS["cifar100"].classes["label"], DATASETS["cifar100_coarse"]
    assert (len(fine), len(coarse.class_names)) == (100, 20)
    # The official lists are in the order of the alphabet.
    assert sorted(set(fine)) == list(fine)
    assert sorted(set(coarse.class_names)) == list(coarse.class_names)


def start(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def binary(tmp_path):
    return write_tar(tmp_path / "binary.tar.gz", MEMBERS["binary"]())


@contextlib.contextmanager
def serving(server):
    with server as s:
        threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
        yield s
        s.shutdown()


@pytest.fixture
def server(binary):
    with serving(Server(binary.read_bytes())) as s:
        yield s


def test_two_processes_share_one_download(tmp_path, server):
    server.delay = 0.5
    code = f"""
from pathlib import Path
from flax_resnetv2.data.prepare import write_tfds
root = Path({str(tmp_path)!r})
write_tfds.prepare("cifar10", root, url={server.url!r}, accept_checksum=True)
"""
    both = [start(code) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(server.asked) == 1
    assert len(read_split(find_prepared("cifar10", tmp_path), "train")[1]) == 20
    assert not lock(tmp_path).exists()


def lock(root):
    return root / "downloads" / ".cifar10.lock"


def test_a_lock_that_its_holder_removed_is_not_held(tmp_path):
    """A waits for B; B removes the lock, C makes a new one: A must wait for C, too."""
    path = tmp_path / "lock"
    holders = [write_tfds._locked(path, "")]
    got = []

    def work():
        with write_tfds._locked(path, "waiting") as file:
            got.append(os.path.samestat(os.fstat(file.fileno()), path.stat()))

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.2)
    path.unlink()
    holders.append(write_tfds._locked(path, ""))
    holders[0].close()
    time.sleep(0.2)
    assert not got
    holders[1].close()
    thread.join(5)
    assert got == [True]


# What the system refuses


@pytest.mark.parametrize("limit", [1000, 60_000])
def test_no_room_is_one_line_and_leaves_nothing(tmp_path, limit):
    # A file may have so many bytes: writing more fails as on a full disk.
    code = f"""
import resource
import tensorflow_datasets
from pathlib import Path
from flax_resnetv2 import RunError
from flax_resnetv2.data import shapes
from flax_resnetv2.data.prepare import write_tfds
shapes.PER_CLASS = {{"train": 3, "test": 1}}
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    write_tfds.prepare_embedded(Path({str(tmp_path)!r}))
except RunError as error:
    print("one line:", error)
"""
    process = start(code)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    line = said.splitlines()[-1]
    assert line.startswith(
        f"one line: embedded_shapes cannot be prepared in {tmp_path}"
    )
    assert "no room" in line and "File too large" in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list(tmp_path.glob("*/*incomplete*"))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("place", ["downloads", "embedded_shapes", "1.0.0"])
def test_what_cannot_be_written_is_one_line(tmp_path, monkeypatch, number, place):
    mkdir = os.mkdir

    def refuse(path, *rest, **named):
        if place in os.fspath(path):
            raise OSError(number, os.strerror(number), path)
        mkdir(path, *rest, **named)

    monkeypatch.setattr(os, "mkdir", refuse)
    monkeypatch.setattr(shapes, "PER_CLASS", {"train": 3, "test": 1})
    kind = RunError if number == errno.EDQUOT else UsageError
    message = (
        rf"embedded_shapes .* in {tmp_path}.*\({os.strerror(number)}\).*--data.dir$"
    )
    with pytest.raises(kind, match=message):
        write_tfds.prepare_embedded(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_in_the_place_of_a_directory_is_named(tmp_path):
    (tmp_path / "downloads").touch()
    with pytest.raises(UsageError, match=r"cannot be written there \(.*\)"):
        write_tfds.prepare_embedded(tmp_path)


def test_a_wrong_archive_leaves_no_lock(tmp_path):
    (tmp_path / "a").write_bytes(b"hello")
    with pytest.raises(UsageError, match="no CIFAR-10 archive"):
        prepare(tmp_path / "data", archive=str(tmp_path / "a"))
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert (tmp_path / "a").exists()


def test_another_checksum_is_refused(tmp_path, binary):
    with pytest.raises(UsageError, match="accept-checksum"):
        write_tfds.prepare("cifar10", tmp_path, archive=str(binary))
    assert find_prepared("cifar10", tmp_path) is None


# What is prepared


def test_the_embedded_set_is_what_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "PER_CLASS", {"train": 3, "test": 2})
    write_tfds.prepare_embedded(tmp_path)
    directory = find_prepared(shapes.NAME, tmp_path)
    assert label_of(directory).class_names == shapes.SHAPE_CLASSES
    for split in ("train", "test"):
        drawn, labels = shapes.draw_shapes(split)
        stored, stored_labels = read_split(directory, split)
        assert pairs(drawn, labels) == pairs(stored, stored_labels)


def pairs(images, labels):
    """Images with their labels, in an order of their own: TFDS shuffles."""
    return sorted(
        (image.tobytes(), int(label))
        for image, label in zip(images, labels, strict=True)
    )


def test_a_killed_run_does_not_hinder_the_next(tmp_path, binary):
    left = tmp_path / "data" / "cifar10" / "incomplete.ABCDEF_3.0.2"
    left.mkdir(parents=True)
    (left / "cifar10-train.array_record-00000-of-00001").write_bytes(b"half")
    assert prepare(tmp_path / "data", archive=str(binary)).name == "3.0.2"


def test_what_is_prepared_is_not_written_again(tmp_path, binary):
    directory = prepare(tmp_path / "data", archive=str(binary))
    before = [path.stat().st_mtime_ns for path in sorted(directory.iterdir())]
    prepare(tmp_path / "data", archive=str(binary))
    assert before == [path.stat().st_mtime_ns for path in sorted(directory.iterdir())]


def test_an_occupied_place_is_named(tmp_path, binary):
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"3\.0\.2 holds no dataset_info.json"):
        prepare(tmp_path, archive=str(binary))


def test_no_step_needs_tensorflow(tmp_path, binary):
    # Installed for all to see, but nothing may import it.
    trap = tmp_path / "installed" / "tensorflow"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise AssertionError('TensorFlow imported')")
    code = f"""
import sys
import threading
import time
from pathlib import Path
from flax_resnetv2.data.prepare import write_tfds
from flax_resnetv2.data.tfds_records import find_prepared, read_split
root = Path({str(tmp_path)!r})
write_tfds.prepare("cifar10", root, archive={str(binary)!r}, accept_checksum=True)
images, labels = read_split(find_prepared("cifar10", root), "train")
print(images.shape)
assert "tensorflow" not in sys.modules
"""
    process = start(code, PYTHONPATH=str(trap.parent))
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "(20, 32, 32, 3)" in said
