"""CIFAR-10 from its archives, local and over HTTP, into directories that TFDS opens."""

import hashlib
import http.server
import io
import json
import os
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


def python2_members():
    """As the official archive is: pickled by Python 2, spelt out here."""
    members = {}
    for name in BATCHES:
        pixels, labels = batch(name)
        content = b"\x80\x02}(U\x06labels]("
        content += b"".join(b"K" + bytes([label]) for label in labels)
        content += b"eU\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        content += b"K\x00\x85U\x01b\x87R(K\x01K" + bytes([len(labels)])
        content += b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
        content += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        content += pixels.size.to_bytes(4, "little") + pixels.tobytes() + b"tbu."
        members[f"cifar-10-batches-py/{name}"] = content
    return members


MEMBERS = {
    "binary": binary_members,
    "python": python_members,
    "python2": python2_members,
}


@pytest.fixture
def binary(tmp_path):
    return write_tar(tmp_path / "binary.tar.gz", binary_members())


def prepare(root, **where):
    root.mkdir(exist_ok=True)
    preparation.prepare_cifar10(root, accept_checksum=True, **where)
    return find_prepared("cifar10", root)


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
    assert class_names(directory)[::3] == ("airplane", "cat", "frog", "truck")
    assert len(read_split(directory, "test")[1]) == 4


def test_another_checksum_is_refused_naming_the_flag(tmp_path, binary):
    received = hashlib.sha256(binary.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match=f"{received}.*c4a38c50.*accept_checksum"):
        preparation.prepare_cifar10(tmp_path, archive=str(binary))


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"data.archive=/no/such is not a file"):
        prepare(tmp_path, archive="/no/such")


def start(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


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


def a_flipped_bit(tmp_path):
    path = write_tar(tmp_path / "a", binary_members())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path, "damaged or no CIFAR-10 archive"


def first_pickle(tmp_path, content):
    members = python_members()
    members["cifar-10-batches-py/data_batch_1"] = content
    return write_tar(tmp_path / "a", members)


def a_pickled_label_below_zero(tmp_path):
    values = {b"data": batch("data_batch_1")[0], b"labels": [0, 1, -1, 2]}
    return first_pickle(tmp_path, pickle.dumps(values, protocol=2)), "label -1"


def pickled_labels_that_are_fractions(tmp_path):
    values = {b"data": batch("data_batch_1")[0], b"labels": [0.5, 1, 2, 3]}
    content = pickle.dumps(values, protocol=2)
    return first_pickle(tmp_path, content), "labels float64"


def a_damaged_pickle(tmp_path):
    content = python_members()["cifar-10-batches-py/data_batch_1"]
    content = content.replace(b"latin1", b"latinX")
    return first_pickle(tmp_path, content), "data_batch_1 .* not a batch.*LookupError"


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def a_pickle_with_a_call(tmp_path):
    content = pickle.dumps(Evil(), protocol=2)
    return first_pickle(tmp_path, content), "asks for .*print"


@pytest.mark.parametrize(
    "make",
    [
        without_a_batch,
        cut_short,
        no_archive,
        half_a_record,
        a_label_too_high,
        a_flipped_bit,
        a_pickled_label_below_zero,
        pickled_labels_that_are_fractions,
        a_damaged_pickle,
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
    """Serves one file; can break off, ignore ranges, and take its time."""

    def __init__(self, content):
        self.content, self.ranges, self.sent = content, True, 0
        self.break_at, self.asked, self.delay = None, [], 0.0
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/cifar-10-binary.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        s = self.server
        asked = self.headers.get("Range", "bytes=0-")
        s.asked.append(asked)
        time.sleep(s.delay)
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
        threading.Thread(target=s.serve_forever, args=(0.01,), daemon=True).start()
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


def test_a_name_that_is_looked_up_for_long_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "TIMEOUT", 0.1)
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: released.wait(5) and [])
    with pytest.raises(RunError, match=r"no answer within 0.2 s\).*--data.archive"):
        prepare(tmp_path, url="http://slow.invalid/x.tar.gz")
    released.set()


@pytest.mark.parametrize(
    ("answer", "message", "kept"),
    [
        (b"", "timed out", 0),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\nabc", "timed out.*3 bytes", 3),
        (b"garbage\r\n\r\n", r"\(garbage\)", 0),
        (b"HTTP/1.0 404 Not Found\r\n\r\n", "Not Found", 0),
    ],
    ids=["silent", "stalls", "garbage", "404"],
)
def test_a_server_that_fails_is_left(tmp_path, monkeypatch, answer, message, kept):
    monkeypatch.setattr(preparation, "TIMEOUT", 0.3)

    def serve():
        connection, _ = listening.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(answer)
            done.wait(5)

    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/x.tar.gz"
        with pytest.raises(RunError, match=message) as caught:
            prepare(tmp_path, url=url)
        done.set()
        thread.join()
    assert "\n" not in str(caught.value)
    partial = list((tmp_path / "downloads").glob("*.partial"))
    assert sum(path.stat().st_size for path in partial) == kept


def test_what_is_no_address_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"data.url=mirror is no address.*https://"):
        prepare(tmp_path, url="mirror")


def test_a_damaged_download_is_fetched_again(tmp_path, server):
    whole = server.content
    server.content = b"not an archive"
    with pytest.raises(UsageError, match="no CIFAR-10 archive"):
        prepare(tmp_path / "data", url=server.url)
    server.content = whole
    assert prepare(tmp_path / "data", url=server.url).is_dir()


def test_two_processes_share_one_download(tmp_path, server):
    server.delay = 0.5
    code = f"""
from pathlib import Path
from flax_resnetv2 import preparation
root = Path({str(tmp_path)!r})
preparation.prepare_cifar10(root, url={server.url!r}, accept_checksum=True)
"""
    both = [start(code) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(server.asked) == 1
    assert len(read_split(find_prepared("cifar10", tmp_path), "train")[1]) == 20


# What is prepared


def test_the_embedded_set_is_what_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "PER_CLASS", {"train": 3, "test": 2})
    preparation.prepare_embedded(tmp_path)
    directory = find_prepared(embedded.NAME, tmp_path)
    assert class_names(directory) == embedded.CLASSES
    for split in ("train", "test"):
        drawn, labels = embedded.draw(split)
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
    unfinished = tmp_path / "cifar10" / "incomplete.AB12_9.0.0"
    unfinished.mkdir()
    (unfinished / "dataset_info.json").write_text(json.dumps(info))
    assert find_prepared("cifar10", tmp_path).name == "3.0.10"
    assert find_prepared("cifar100", tmp_path) is None


def test_no_step_needs_tensorflow(tmp_path, binary):
    # Installed for all to see, but nothing may import it.
    trap = tmp_path / "installed" / "tensorflow"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise AssertionError('TensorFlow imported')")
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
    process = start(code, PYTHONPATH=str(trap.parent))
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert "(20, 32, 32, 3)" in said
