"""CIFAR-10 from its archives, local and over HTTP, into directories that TFDS opens."""

import functools
import hashlib
import http.server
import io
import json
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from flax_resnetv2 import RunError, UsageError, embedded, preparation
from flax_resnetv2.records import class_names, find_prepared, read_split

BATCHES = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]


def batch(name, count=4):
    """Planes [count, 3072] and labels of one batch."""
    rng = np.random.default_rng(BATCHES.index(name))
    pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    return pixels, rng.integers(0, 10, count, dtype=np.uint8)


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def binary_members(names=BATCHES):
    members = {"cifar-10-batches-bin/readme.html": b"<html>"}
    for name in names:
        pixels, labels = batch(name)
        records = np.concatenate([labels[:, None], pixels], axis=1)
        members[f"cifar-10-batches-bin/{name}.bin"] = records.tobytes()
    return members


def python_members():
    members = {"cifar-10-batches-py/batches.meta": b""}
    for name in BATCHES:
        pixels, labels = batch(name)
        values = {b"data": pixels, b"labels": labels.tolist(), b"filenames": [b"a"]}
        content = pickle.dumps(values, protocol=2)
        members[f"cifar-10-batches-py/{name}"] = content
    return members


@pytest.fixture
def binary(tmp_path):
    return write_tar(tmp_path / "binary.tar.gz", binary_members())


def prepare(root, **where):
    root.mkdir(exist_ok=True)
    preparation.prepare_cifar10(root, accept_checksum=True, **where)
    return find_prepared("cifar10", root)


@pytest.mark.parametrize("kind", ["binary", "python"])
def test_either_archive_gives_the_images_and_tfds_opens_them(tmp_path, kind):
    members = binary_members() if kind == "binary" else python_members()
    archive = write_tar(tmp_path / "any-name", members)
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
    assert class_names(directory)[3] == "cat"
    assert len(read_split(directory, "test")[1]) == 4


def test_another_checksum_is_refused_naming_the_flag(tmp_path, binary):
    received = hashlib.sha256(binary.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match=f"{received}.*c4a38c50.*accept_checksum"):
        preparation.prepare_cifar10(tmp_path, archive=str(binary))


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"data.archive=/no/such is not a file"):
        prepare(tmp_path, archive="/no/such")


def without_a_batch(tmp_path):
    return write_tar(tmp_path / "a", binary_members(BATCHES[:5])), "lacks test_batch"


def cut_short(tmp_path):
    path = write_tar(tmp_path / "a", binary_members())
    path.write_bytes(path.read_bytes()[:-3000])
    return path, "damaged or no CIFAR-10 archive"


def no_archive(tmp_path):
    (tmp_path / "a").write_bytes(b"hello")
    return tmp_path / "a", "damaged or no CIFAR-10 archive"


def half_a_record(tmp_path):
    members = binary_members()
    members["cifar-10-batches-bin/data_batch_2.bin"] += b"x"
    return write_tar(tmp_path / "a", members), "data_batch_2 .* no whole number"


def a_label_too_high(tmp_path):
    members = binary_members()
    name = "cifar-10-batches-bin/data_batch_1.bin"
    members[name] = b"\x0b" + members[name][1:]
    return write_tar(tmp_path / "a", members), "label 11"


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def a_pickle_with_a_call(tmp_path):
    members = python_members()
    members["cifar-10-batches-py/data_batch_1"] = pickle.dumps(Evil(), protocol=2)
    return write_tar(tmp_path / "a", members), "asks for .*print"


@pytest.mark.parametrize(
    "make",
    [
        without_a_batch,
        cut_short,
        no_archive,
        half_a_record,
        a_label_too_high,
        a_pickle_with_a_call,
    ],
)
def test_a_wrong_archive_is_one_clear_line(tmp_path, make, capsys):
    archive, message = make(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        prepare(tmp_path / "data", archive=str(archive))
    assert "\n" not in str(caught.value)
    assert "must never run" not in capsys.readouterr().out
    assert find_prepared("cifar10", tmp_path / "data") is None


# Over HTTP


class Server(http.server.ThreadingHTTPServer):
    """Serves one file; can break off, and can ignore ranges."""

    def __init__(self, content):
        self.content, self.ranges, self.sent = content, True, 0
        self.break_at, self.asked = None, []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/cifar-10-binary.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        s = self.server
        asked = self.headers.get("Range", "bytes=0-")
        s.asked.append(asked)
        start = int(asked[len("bytes=") : -1]) if s.ranges else 0
        self.send_response(206 if s.ranges else 200)
        self.send_header("Content-Length", str(len(s.content) - start))
        self.end_headers()
        body = s.content[start : s.break_at]
        s.sent += len(body)
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(binary):
    with Server(binary.read_bytes()) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield s
        s.shutdown()


def test_a_download_that_broke_off_goes_on(tmp_path, server):
    server.break_at = len(server.content) // 2
    with pytest.raises(RunError, match=r"broke off at .*--data.archive"):
        prepare(tmp_path / "data", url=server.url)
    server.break_at = None
    prepare(tmp_path / "data", url=server.url)
    assert server.asked == ["bytes=0-", f"bytes={len(server.content) // 2}-"]
    assert server.sent == len(server.content)
    assert not list((tmp_path / "data" / "downloads").glob("cifar*"))


def test_a_server_without_ranges_is_asked_from_the_start(tmp_path, server):
    server.break_at, server.ranges = 1000, False
    with pytest.raises(RunError, match="broke off"):
        prepare(tmp_path / "data", url=server.url)
    server.break_at = None
    assert prepare(tmp_path / "data", url=server.url).is_dir()


def test_another_checksum_from_a_mirror_is_refused_and_removed(tmp_path, server):
    with pytest.raises(UsageError, match="accept_checksum"):
        preparation.prepare_cifar10(tmp_path, url=server.url)
    assert not list((tmp_path / "downloads").glob("cifar*"))


def test_no_network_is_one_clear_line_soon(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x.tar.gz"
        began = time.monotonic()
        with pytest.raises(RunError) as caught:
            prepare(tmp_path, url=url)
    assert time.monotonic() - began < 20
    for way in ("--data.archive", "--data.url", "--data.dir", "quickstart"):
        assert way in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_stalls_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x.tar.gz"
        with pytest.raises(RunError, match="timed out"):
            prepare(tmp_path, url=url)


# What is prepared


def test_the_embedded_set_is_what_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "PER_CLASS", {"train": 3, "test": 2})
    preparation.prepare_embedded(tmp_path)
    directory = find_prepared(embedded.NAME, tmp_path)
    assert class_names(directory) == embedded.CLASSES
    for split in ("train", "test"):
        drawn, labels = embedded.draw(split)
        stored, stored_labels = read_split(directory, split)
        assert sorted(image.tobytes() for image in drawn) == sorted(
            image.tobytes() for image in stored
        )
        assert sorted(labels) == sorted(stored_labels)


def test_a_damaged_directory_is_named(tmp_path, binary):
    directory = prepare(tmp_path / "data", archive=str(binary))
    (lost,) = directory.glob("*-train.array_record*")
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(UsageError, match=r"lacks 1 of 1 record files .* 'train'"):
        find_prepared("cifar10", tmp_path / "data")
    lost.write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=r"'train' of .* cannot be read"):
        read_split(find_prepared("cifar10", tmp_path / "data"), "train")
    (directory / "dataset_info.json").write_text("{")
    with pytest.raises(UsageError, match=r"is not a description of a data set"):
        find_prepared("cifar10", tmp_path / "data")


def test_tfrecord_is_named_with_the_way_on(tmp_path):
    directory = tmp_path / "cifar10" / "3.0.2"
    directory.mkdir(parents=True)
    info = {"name": "cifar10", "version": "3.0.2", "fileFormat": "tfrecord"}
    (directory / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UsageError, match=r"tfrecord.*TensorFlow.*array_record"):
        find_prepared("cifar10", tmp_path)


def test_the_newest_version_is_taken(tmp_path):
    for version in ("3.0.2", "3.0.10"):
        directory = tmp_path / "cifar10" / version
        directory.mkdir(parents=True)
        info = {"name": "cifar10", "version": version, "fileFormat": "array_record"}
        (directory / "dataset_info.json").write_text(json.dumps(info))
    assert find_prepared("cifar10", tmp_path).name == "3.0.10"
    assert find_prepared("cifar100", tmp_path) is None


def test_no_step_needs_tensorflow(tmp_path, binary):
    code = f"""
import sys
from pathlib import Path
from flax_resnetv2 import preparation, records
root = Path({str(tmp_path)!r})
preparation.prepare_cifar10(root, archive={str(binary)!r}, accept_checksum=True)
images, labels = records.read_split(records.find_prepared("cifar10", root), "train")
print(images.shape)
assert "tensorflow" not in sys.modules
"""
    root = Path(__file__).parents[1]
    run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=root)
    assert "(20, 32, 32, 3)" in run([sys.executable, "-c", code], check=True).stdout
