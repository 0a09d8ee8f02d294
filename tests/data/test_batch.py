"""From a data set to a batch: orders, padding, statistics, directories."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnetv2 import DataConfig, UsageError, open_dataset
from flax_resnetv2.data import datasets
from flax_resnetv2.data.batch import (
    PADDING,
    Split,
    epoch_order,
    evaluation_order,
    gather_batch,
)
from flax_resnetv2.data.datasets import Dataset
from flax_resnetv2.training.augment import positions


def numbered(count):
    """Images that all carry their own number."""
    label = np.arange(count, dtype=np.int32)
    image = np.broadcast_to(label[:, None, None, None], (count, 2, 2, 3))
    return Split(image.astype(np.uint8), label)


def test_an_epoch_takes_each_image_at_most_once_and_drops_the_tail():
    order = epoch_order(50, 8, seed=0, epoch=0)
    assert (order.dtype, order.shape) == (np.int32, (48,))
    assert len(set(order)) == 48
    assert set(order) <= set(range(50))
    assert sorted(epoch_order(48, 8, seed=0, epoch=0)) == list(range(48))


def test_the_order_is_a_function_of_seed_and_epoch():
    orders = {
        tuple(epoch_order(30, 10, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4
    assert tuple(epoch_order(30, 10, 1, 1)) in orders


@pytest.mark.parametrize("batch", [1, 7, 8, 23, 24, 100])
def test_evaluation_counts_each_image_once(batch):
    order = evaluation_order(23, batch)
    assert order.dtype == np.int32
    assert len(order) % batch == 0
    assert len(order) - batch < 23
    assert sorted(order[order != PADDING]) == list(range(23))


def test_fetch_gathers_and_masks_the_padding():
    split, order = numbered(5), jnp.asarray(evaluation_order(5, 4))
    batch = gather_batch(Split(*map(jnp.asarray, split)), order, 4 + positions(4, None))
    np.testing.assert_array_equal(batch.mask, [True, False, False, False])
    assert batch.label[0] == 4
    assert (batch.image[0] == 4).all()
    assert (batch.image.dtype, batch.label.dtype) == (jnp.uint8, jnp.int32)


def test_batches_of_an_epoch_are_the_images_in_its_order():
    split, order = Split(*map(jnp.asarray, numbered(20))), epoch_order(20, 5, 3, 2)
    labels = [
        gather_batch(split, jnp.asarray(order), start + positions(5, None)).label
        for start in range(0, 20, 5)
    ]
    np.testing.assert_array_equal(np.concatenate(labels), order)


def test_channel_statistics_are_those_of_the_training_split():
    image = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3)).astype(np.uint8)
    image[..., 1] //= 2
    train, test = Split(image, np.zeros(40, np.int32)), numbered(9)
    dataset = Dataset("x", ("a",), {"train": train, "test": test})
    mean, std = dataset.channel_statistics()
    values = image.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, values.std(0), rtol=1e-12)
    assert all(type(number) is float for number in mean + std)
    assert dataset.image_shape == (4, 4, 3)


@pytest.fixture
def prepared(monkeypatch, tmp_path):
    """A prepared data set of 30 training and 10 test images, and its directory."""
    sizes = {"train": 30, "test": 10}
    monkeypatch.setattr(datasets, "find_prepared", lambda name, root: Path(root))
    splits = {name: numbered(size) for name, size in sizes.items()}
    monkeypatch.setattr(datasets, "read_dataset", lambda *_: (splits, ("a", "b")))
    return str(tmp_path)


def test_the_validation_images_are_the_last_training_images(prepared):
    splits = open_dataset(DataConfig(dir=prepared, validation=4)).splits
    assert list(splits["train"].label) == list(range(26))
    assert list(splits["validation"].label) == [26, 27, 28, 29]
    assert list(splits["test"].label) == list(range(10))
    np.testing.assert_array_equal(splits["validation"].image[:, 0, 0, 0], range(26, 30))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"archive": "/no/such"}, "data.archive=/no/such"),
        ({"url": "http://a/b"}, "data.url=http://a/b"),
        ({"accept_checksum": True}, "data.accept_checksum"),
        (
            {"archive": "a", "accept_checksum": True},
            "data.archive=a and data.accept_checksum",
        ),
        ({}, None),
    ],
)
def test_a_source_that_is_not_needed_is_told(prepared, caplog, given, said):
    with caplog.at_level("INFO", "flax_resnetv2"):
        open_dataset(DataConfig(dir=prepared, **given))
    expected = [f"{prepared} is prepared already; not used: {said}"] if said else []
    assert caplog.messages == expected


@pytest.mark.parametrize("name", ["cifar10", "embedded_shapes"])
def test_two_sources_are_refused(prepared, name):
    config = DataConfig(name=name, dir=prepared, archive="a", url="http://b")
    message = r"data.archive=a and data.url=http://b are two sources; give one of them$"
    with pytest.raises(UsageError, match=message):
        open_dataset(config)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"archive": "a"}, "data.archive=a"),
        ({"url": ""}, "data.url="),
        ({"accept_checksum": True}, "data.accept_checksum"),
    ],
)
def test_what_is_drawn_has_no_source(prepared, given, said):
    config = DataConfig(name="embedded_shapes", dir=prepared, **given)
    with pytest.raises(
        UsageError, match=f"^{said}: embedded_shapes is drawn .* cifar10"
    ):
        open_dataset(config)


@pytest.mark.parametrize("name", ["celeba", "folder:x", "oxford_flowers102"])
def test_what_is_only_read_has_no_source(prepared, name):
    config = DataConfig(name=name, dir=prepared, image_size=8, url="http://b")
    with pytest.raises(UsageError, match=f"http://b: {name} is read as it is and has"):
        open_dataset(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"archive": "/no/such"}, "data.archive=/no/such cannot be read"),
        ({"url": ""}, "data.url= is no address"),
        ({"url": "file:///etc/passwd"}, "data.url=file:///etc/passwd is no address"),
    ],
)
def test_a_wrong_source_is_named_before_anything_is_written(tmp_path, given, message):
    with pytest.raises(UsageError, match=message):
        open_dataset(DataConfig(dir=str(tmp_path), **given))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("said", ["", "~no-such-user/data"])
def test_what_is_no_directory_at_all_is_named(said):
    with pytest.raises(UsageError, match=f"data.dir={said} is not a directory"):
        open_dataset(DataConfig(dir=said))


def test_an_empty_variable_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="cannot be read"):
        open_dataset(DataConfig(archive="/no/such"))


def test_there_is_no_validation_split_unless_asked_for(prepared):
    assert set(open_dataset(DataConfig(dir=prepared)).splits) == {"train", "test"}


@pytest.mark.parametrize("count", [-1, 30, 31])
def test_validation_must_leave_images_to_train_on(prepared, count):
    with pytest.raises(UsageError, match=rf"validation={count} .* has 30; .* 0 to 29"):
        open_dataset(DataConfig(dir=prepared, validation=count))


def test_a_missing_directory_is_named(tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(UsageError, match=rf"data\.dir={missing} .*mkdir -p {missing}"):
        open_dataset(DataConfig(dir=str(missing)))
    assert not missing.exists()


def test_a_missing_directory_of_the_environment_is_named(tmp_path, monkeypatch):
    missing = tmp_path / "nowhere"
    monkeypatch.setenv("TFDS_DATA_DIR", str(missing))
    with pytest.raises(UsageError, match=rf"TFDS_DATA_DIR={missing} is not a dir"):
        open_dataset(DataConfig())


def test_a_file_is_not_a_directory(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="is not a directory"):
        open_dataset(DataConfig(dir=str(file)))


def test_the_directory_that_was_said_goes_before_the_environment(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/nowhere")
    assert open_dataset(DataConfig(dir=prepared)).name == "cifar10"


def test_an_unknown_data_set_is_refused_with_the_choices(tmp_path):
    with pytest.raises(UsageError, match=r"nope is none of cifar10.*tfds build nope"):
        open_dataset(DataConfig(name="nope", dir=str(tmp_path)))
    assert not any(tmp_path.iterdir())


def has_cifar10():
    root = os.environ.get("TFDS_DATA_DIR")
    return root is not None and any(Path(root).glob("cifar10/*/dataset_info.json"))


# The README's users run the tests without CIFAR-10, which is no dependency that can be
# installed; `.ci/run` has it.
@pytest.mark.skipif(
    not has_cifar10(), reason="needs TFDS_DATA_DIR, a directory with cifar10 prepared"
)
def test_cifar10_is_cifar10():
    dataset = open_dataset(DataConfig())
    for split, each in (("train", 5000), ("test", 1000)):
        image, label = dataset.splits[split]
        assert (image.shape, image.dtype) == ((10 * each, 32, 32, 3), np.uint8)
        assert label.dtype == np.int32
        np.testing.assert_array_equal(np.bincount(label), [each] * 10)
    mean, std = dataset.channel_statistics()
    np.testing.assert_allclose(mean, [0.49140, 0.48216, 0.44653], atol=5e-6)
    np.testing.assert_allclose(std, [0.24703, 0.24349, 0.26159], atol=5e-6)
    assert dataset.class_names[0] == "airplane"
    assert dataset.class_names[9] == "truck"
