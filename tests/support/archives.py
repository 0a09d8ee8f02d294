"""Small official files, in each form there is, and a server for them."""

import gzip
import http.server
import io
import pickle
import tarfile
import time

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from flax_resnetv2.data.catalog import DATASETS
from flax_resnetv2.data.prepare import write_tfds
from flax_resnetv2.data.tfds_records import find_prepared

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


def python_members(protocol=2):
    members = {"cifar-10-batches-py/batches.meta": b""}
    for name in BATCHES:
        pixels, labels = batch(name)
        values = {b"data": pixels, b"labels": labels.tolist(), b"filenames": [b"a"]}
        content = pickle.dumps(values, protocol)
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


FINE, COARSE = np.arange(0, 100, 9), np.arange(12) % 20
"""Labels of the training images of CIFAR-100 here; the test set has the first four."""


def pixels100(split):
    count = {"train": 12, "test": 4}[split]
    return np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)


def binary100_members():
    members = {"cifar-100-binary/fine_label_names.txt": b"apple"}
    for split in ("train", "test"):
        pixels = pixels100(split)
        labels = np.stack([COARSE, FINE], axis=1)[: len(pixels)].astype(np.uint8)
        records = np.concatenate([labels, pixels], axis=1)
        members[f"cifar-100-binary/{split}.bin"] = records.tobytes()
    return members


def python100_members():
    members = {"cifar-100-python/meta": b"", "cifar-100-python/file.txt~": b""}
    for split in ("train", "test"):
        pixels = pixels100(split)
        values = {
            b"filenames": [b"a"] * len(pixels),
            b"batch_label": b"training batch 1 of 1",
            b"fine_labels": FINE[: len(pixels)].tolist(),
            b"coarse_labels": COARSE[: len(pixels)].tolist(),
            b"data": pixels,
        }
        members[f"cifar-100-python/{split}"] = pickle.dumps(values, 2)
    return members


MEMBERS100 = {"binary": binary100_members, "python": python100_members}


def digits(split):
    """Images [count, 28, 28] and labels as MNIST has them."""
    count = {"train": 12, "t10k": 4}[split]
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count) % 10


def idx(values):
    """An array of bytes as the format IDX has it, compressed."""
    values = np.asarray(values, np.uint8)
    header = bytes([0, 0, 8, values.ndim])
    shape = b"".join(length.to_bytes(4, "big") for length in values.shape)
    return gzip.compress(header + shape + values.tobytes(), 1)


def idx_files():
    """The four files by name."""
    files = {}
    for split in ("train", "t10k"):
        images, labels = digits(split)
        files[f"{split}-images-idx3-ubyte.gz"] = idx(images)
        files[f"{split}-labels-idx1-ubyte.gz"] = idx(labels)
    return files


def write_files(directory, files):
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def prepare(root, name="cifar10", **where):
    """Prepare a data set from whatever checksum, and find it."""
    root.mkdir(exist_ok=True)
    write_tfds.prepare(name, root, accept_checksum=True, **where)
    return find_prepared(name, root)


def write_prepared(root, name, version, features, splits):
    """Have TFDS write records of any kind, as array_record."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Given records."""

        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: enumerate(records) for split, records in splits.items()}

        def _generate_examples(self):
            raise AssertionError("the splits are given as they are")

    Builder.name, Builder.pkg_dir_path = name, None
    tfds.disable_progress_bar()
    Builder(data_dir=root, file_format="array_record").download_and_prepare()
    return root / name / version


def encoded(shape, seed=0, kind="JPEG"):
    """An open image file of noise, as TFDS takes it without TensorFlow."""
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if shape[2] == 1 else pixels).save(buffer, kind)
    buffer.seek(0)
    return buffer


def write_celeba(root, train=12, test=5):
    """A small CelebA with the features that TFDS's own builder gives it."""
    names = DATASETS["celeba"].class_names
    marks = [f"{part}_{axis}" for part in ("lefteye", "nose") for axis in "xy"]
    features = {
        "image": tfds.features.Image(shape=(218, 178, 3), encoding_format="jpeg"),
        "landmarks": dict.fromkeys(marks, np.int64),
        "attributes": dict.fromkeys(reversed(names), np.bool_),
        "identity": {"Identity_No": np.int64},
    }

    def records(count, first):
        for k in range(first, first + count):
            yield {
                "image": encoded((218, 178, 3), k),
                "landmarks": dict.fromkeys(marks, k),
                "attributes": {n: celeba_bit(k, j) for j, n in enumerate(names)},
                "identity": {"Identity_No": k},
            }

    splits = {
        "train": records(train, 0),
        "validation": records(3, train),
        "test": records(test, train + 3),
    }
    return write_prepared(root, "celeb_a", "2.1.0", features, splits)


def celeba_bit(image, attribute):
    """Whether an image has an attribute, so that rows and columns all differ."""
    return bool((image * 37 + 1) >> (attribute % 7) & 1) != (attribute % 3 == 0)


class Server(http.server.ThreadingHTTPServer):
    """Serves files by name, and one under every other name; can break off, ignore
    ranges, and take its time."""

    def __init__(self, content, files=None):
        self.content, self.ranges, self.sent = content, True, 0
        self.files = files or {}
        self.break_at, self.asked, self.delay = None, [], 0.0
        self.kind = "application/gzip"
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
        content = s.files.get(self.path.rpartition("/")[2], s.content)
        start = int(asked[len("bytes=") : -1]) if s.ranges else 0
        self.send_response(206 if s.ranges else 200)
        self.send_header("Content-Type", s.kind)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start : s.break_at]
        s.sent += len(body)
        self.wfile.write(body)

    def log_message(self, *_):
        pass
