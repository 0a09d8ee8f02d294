"""Prepared data sets: found, read whole, or refused in one line."""

import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from flax_resnetv2 import DataConfig, UsageError, open_dataset
from flax_resnetv2.data import decoded_cache, shapes
from flax_resnetv2.data.catalog import DATASETS
from flax_resnetv2.data.datasets import describe
from flax_resnetv2.data.decoding import (
    center_crop,
    read_image,
    strict_pillow,
    to_png,
)
from flax_resnetv2.data.prepare import write_tfds
from flax_resnetv2.data.tfds_records import find_prepared, label_of, read_split, reading
from tests.support.archives import celeba_bit, encoded, write_celeba, write_prepared


def write(root, files, labels=None):
    """Prepare a data set of these image files, by the writer of the project."""
    labels = np.arange(len(files)) if labels is None else labels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "draw_shapes", lambda split: (files, labels))
        patch.setattr(write_tfds, "to_png", lambda file: file)
        write_tfds.prepare_embedded(root)
    return find_prepared(shapes.NAME, root)


def png(mode="RGB", size=(4, 4), kind="PNG", color=None):
    buffer = io.BytesIO()
    Image.new(mode, size, color or 0).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Ten images of noise: as many bytes as pixels."""
    rng = np.random.default_rng(0)
    images = [to_png(rng.integers(0, 256, (32, 32, 3), np.uint8))] * 10
    return write(tmp_path_factory.mktemp("whole"), images)


@pytest.fixture
def prepared(whole, tmp_path, monkeypatch):
    """A copy that may be damaged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(whole, tmp_path / "data" / whole.parent.name / whole.name)


def records_of(directory, split="train"):
    (path,) = directory.glob(f"*-{split}.array_record*")
    return path


def refused(directory, message):
    """However it is opened: one line that names what is wrong."""
    with pytest.raises(UsageError, match=message) as caught:
        decoded_cache.read_dataset(find_prepared(shapes.NAME, directory.parents[1]))
    assert "\n" not in str(caught.value)


def test_a_lost_record_file_is_named(prepared):
    records_of(prepared).unlink()
    refused(prepared, r"lacks 1 of 1 record files .* 'train'")


@pytest.mark.parametrize("length", [0, 1, 1000, 65_536, 100_000, -1])
def test_a_record_file_that_was_cut_off_is_named(prepared, length):
    path = records_of(prepared)
    path.write_bytes(path.read_bytes()[:length])
    refused(prepared, r"^the split 'train' of .* cannot be read \(.*remove it")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_flipped_bit_is_refused_or_changes_nothing(prepared, split):
    path, good = records_of(prepared, split), read_split(prepared, split)
    content = path.read_bytes()
    seen = 0
    for place in range(0, len(content), len(content) // 40):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = read_split(prepared, split)
        except UsageError as error:
            assert "cannot be read" in str(error) and "\n" not in str(error)
            seen += 1
        else:
            for ours, theirs in zip(found, good, strict=True):
                np.testing.assert_array_equal(ours, theirs)
    assert seen > 5


def test_no_damage_of_the_descriptions_is_a_traceback(prepared):
    for name in ("dataset_info.json", "features.json", "label.labels.txt"):
        path = prepared / name
        content = path.read_bytes()
        for place in range(0, len(content), 7):
            for damaged in (
                content[:place],
                content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :],
            ):
                path.write_bytes(damaged)
                try:
                    directory = find_prepared(shapes.NAME, prepared.parents[1])
                    read_split(directory, "train")
                    label_of(directory)
                except UsageError as error:
                    assert "\n" not in str(error)
        path.write_bytes(content)


@pytest.mark.parametrize(
    "text", ["{", "[]", "1", '{"splits": [{}]}', '{"splits": 1}', '{"splits": [1]}']
)
def test_a_broken_description_is_named(prepared, text):
    (prepared / "dataset_info.json").write_text(text)
    refused(prepared, r"dataset_info.json is not a description of a data set \(")


def test_a_directory_that_vanishes_is_named(prepared):
    shutil.rmtree(prepared)
    for read in (
        decoded_cache.read_dataset,
        label_of,
        lambda directory: read_split(directory, "train"),
    ):
        with pytest.raises(UsageError, match=r"1.0.0 cannot be read \(No such file"):
            read(prepared)


def test_a_directory_that_vanishes_meanwhile_is_named(prepared, monkeypatch):
    read = decoded_cache.read_split

    def once(*arguments):
        found = read(*arguments)
        shutil.rmtree(arguments[0])
        return found

    monkeypatch.setattr(decoded_cache, "read_split", once)
    refused(prepared, r"1.0.0 cannot be read \(No such file or directory: .*--data.dir")


def test_gray_images_have_one_channel(tmp_path):
    directory = write(tmp_path, [png("L", color=9), png("L", color=200)])
    images, labels = read_split(directory, "train")
    assert (images.shape, images.dtype) == ((2, 4, 4, 1), np.uint8)
    assert dict(zip(labels, images[:, 0, 0, 0], strict=True)) == {0: 9, 1: 200}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([png(), png(size=(5, 4))], r"RGB of .x4 pixels, the first RGB of .x4 pixels"),
        ([png(), png("L")], "all must be alike, of mode L or RGB"),
        ([png("P")] * 2, "image 0 is P of 4x4 pixels"),
        ([png("RGBA")] * 2, "image 0 is RGBA of 4x4 pixels"),
        ([png("LA")] * 2, "image 0 is LA of 4x4 pixels"),
        ([png("1")] * 2, "image 0 is 1 of 4x4 pixels"),
        ([png("I;16")] * 2, "image 0 is I;16 of 4x4 pixels"),
        ([png("CMYK", kind="JPEG")] * 2, "image 0 is CMYK of 4x4 pixels"),
        ([png("1", size=(10_000, 9_000))], r"90000000 pixels\) exceeds limit"),
        ([png("1", size=(20_000, 9_000))], r"180000000 pixels\) exceeds limit"),
        ([png("RGB", (32, 32))[:60]], "cannot be read"),
        ([b"no image"], "cannot identify image file"),
    ],
)
def test_images_that_are_not_alike_are_refused(tmp_path, files, message):
    directory = write(tmp_path, files)
    with pytest.raises(UsageError, match=message) as caught:
        read_split(directory, "train")
    assert "\n" not in str(caught.value)


def test_a_label_without_a_class_is_refused(prepared):
    features = prepared / "features.json"
    content = features.read_text()
    features.write_text(content.replace('"numClasses": "10"', '"numClasses": "7"'))
    assert features.read_text() != content
    (prepared / "label.labels.txt").write_text("\n".join("abcdefg"))
    refused(prepared, "the label 7 of 7 classes")


def test_a_description_that_counts_less_records_is_refused(prepared):
    path = prepared / "dataset_info.json"
    content = path.read_text()
    path.write_text(content.replace('"10"', '"9"', 1))
    assert path.read_text() != content
    refused(prepared, "it has 10 records, described as 9")


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


# Data sets that TFDS itself prepared


def test_celeba_has_forty_labels_an_image(tmp_path):
    directory = write_celeba(tmp_path)
    names = DATASETS["celeba"].class_names
    assert label_of(directory) == ("attributes", names, True)
    assert (len(names), list(names)) == (40, sorted(names))
    expected = {}
    with strict_pillow():
        for k in range(12):
            pixels = read_image(encoded((218, 178, 3), k), "it", 3, center_crop(16))
            expected[pixels.tobytes()] = [celeba_bit(k, j) for j in range(40)]
    images, labels = read_split(directory, "train", size=16)
    assert (labels.shape, labels.dtype) == ((12, 40), np.uint8)
    for pixels, row in zip(images, labels, strict=True):
        assert expected.pop(pixels.tobytes()) == row.tolist()
    assert not expected
    images, labels = read_split(directory, "test")
    assert (images.shape, labels.shape) == ((5, 218, 178, 3), (5, 40))
    dataset = open_dataset(DataConfig(name="celeba", dir=str(tmp_path), image_size=8))
    assert dataset.multi_label
    assert dataset.image_shape == (8, 8, 3)


def other(root, splits, shape=(None, None, 3), sizes=((9, 7), (8, 20)), **features):
    """A data set as TFDS has many: places in a split are labels."""

    seeds = itertools.count()

    def records(count):
        for k in range(count):
            size = sizes[k % len(sizes)]
            yield {
                "image": encoded((*size, shape[2]), next(seeds), "PNG"),
                "label": k % 5,
            }

    return write_prepared(
        root,
        "other",
        "1.0.0",
        {
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(names=list("abcde")),
        }
        | features,
        {split: records(count) for split, count in splits.items()},
    )


def config(root, **fields):
    return DataConfig(name="other", dir=str(root), **fields)


@pytest.mark.parametrize(
    ("splits", "sizes", "note"),
    [
        ({"train": 23}, {"train": 21, "test": 2}, "every tenth record is tested on"),
        (
            {"train": 6, "validation": 4},
            {"train": 6, "test": 4},
            "the split validation is tested on",
        ),
        ({"train": 6, "validation": 4, "test": 3}, {"train": 6, "test": 3}, None),
    ],
)
def test_any_set_of_tfds_is_read_by_its_name(tmp_path, caplog, splits, sizes, note):
    other(tmp_path, splits)
    summary = describe(config(tmp_path, image_size=6))
    assert summary.num_images == sizes
    assert summary.image_shape == (6, 6, 3)
    with caplog.at_level("INFO", "flax_resnetv2"):
        dataset = open_dataset(config(tmp_path, image_size=6))
    assert dataset.class_names == summary.class_names == tuple("abcde")
    assert {k: len(s.label) for k, s in dataset.splits.items()} == sizes
    assert dataset.image_shape == (6, 6, 3)
    assert (f"other: {note}" in caplog.text) if note else not caplog.text
    # Every image is in one split only.
    images = [x.tobytes() for split in dataset.splits.values() for x in split.image]
    assert len(set(images)) == sum(sizes.values())


def test_what_is_decoded_for_a_size_is_kept_for_that_size(tmp_path):
    other(tmp_path, {"train": 5, "test": 5})
    for size in (4, 6, 4):
        dataset = open_dataset(config(tmp_path, image_size=size))
        assert dataset.image_shape == (size, size, 3)
    kept = {path.name for path in (tmp_path / "other").glob("decoded*")}
    assert kept == {"decoded-1.0.0-4.npz", "decoded-1.0.0-6.npz"}


def test_images_of_one_size_need_none(tmp_path):
    other(tmp_path, {"train": 5, "test": 5}, (6, 7, 1), [(6, 7)])
    dataset = open_dataset(config(tmp_path))
    assert dataset.image_shape == describe(config(tmp_path)).image_shape == (6, 7, 1)
    assert open_dataset(config(tmp_path, image_size=5)).image_shape == (5, 5, 1)


def test_images_of_many_sizes_need_a_size(tmp_path):
    other(tmp_path, {"train": 5, "test": 5})
    with pytest.raises(
        UsageError, match=r"data.image_size=None must be a number for other"
    ):
        describe(config(tmp_path))


def test_a_set_without_training_images_is_named(tmp_path):
    other(tmp_path, {"corrupted": 5})
    with pytest.raises(UsageError, match="no split 'train'; it has 'corrupted'"):
        open_dataset(config(tmp_path, image_size=4))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"image": tfds.features.Text()}, "no feature 'image' of 1 or 3 channels"),
        ({"label": tfds.features.Text()}, "no feature 'label' of one class and no"),
    ],
)
def test_a_set_that_is_not_for_classification_is_named(tmp_path, features, message):
    record = {"image": encoded((4, 4, 3), kind="PNG"), "label": 0}
    record |= dict.fromkeys(features, "text")
    given = {
        "image": tfds.features.Image(shape=(4, 4, 3)),
        "label": tfds.features.ClassLabel(num_classes=2),
    }
    records = {"train": [record], "test": [record]}
    write_prepared(tmp_path, "other", "1.0.0", given | features, records)
    with pytest.raises(UsageError, match=message) as caught:
        describe(config(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError(), ImportError("no PIL")])
def test_a_data_set_is_not_blamed_for_everything(error):
    with pytest.raises(type(error)), reading(Path("/data/x/1.0.0")):
        raise error
