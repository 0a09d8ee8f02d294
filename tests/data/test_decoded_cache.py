"""The decoded data set on disk: used while it is whole and its source unchanged."""

import os
import shutil

import numpy as np
import pytest

from flax_resnetv2.data import decoded_cache, shapes, tfds_records
from flax_resnetv2.data.decoded_cache import read_dataset
from flax_resnetv2.data.prepare import write_tfds


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two small splits, prepared by TFDS's own writer."""
    root = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(0)

    def images(count):
        return rng.integers(0, 256, (count, 4, 4, 3), np.uint8), np.arange(count) % 10

    with pytest.MonkeyPatch.context() as patch:
        sizes = {"train": images(30), "test": images(10)}
        patch.setattr(shapes, "draw_shapes", lambda split: sizes[split])
        write_tfds.prepare_embedded(root)
    return tfds_records.find_prepared("embedded_shapes", root)


@pytest.fixture
def prepared(drawn, tmp_path, monkeypatch):
    """A copy that may be changed, and a user's cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "data" / drawn.parent.name / drawn.name
    shutil.copytree(drawn, directory)
    return directory


@pytest.fixture
def decodings(monkeypatch):
    """The splits that were really decoded."""
    calls = []

    def read_split(directory, split, *way):
        calls.append(split)
        return tfds_records.read_split(directory, split, *way)

    monkeypatch.setattr(decoded_cache, "read_split", read_split)
    return calls


def same(one, other):
    assert one[1] == other[1]
    for split in decoded_cache.SPLITS:
        for a, b in zip(one[0][split], other[0][split], strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def stored(directory):
    return directory.parent / f"decoded-{directory.name}.npz"


def test_a_data_set_is_decoded_once(prepared, decodings):
    first = read_dataset(prepared)
    assert decodings == ["train", "test"]
    assert stored(prepared).is_file()
    same(first, read_dataset(prepared))
    assert decodings == ["train", "test"]
    for split in decoded_cache.SPLITS:
        for ours, straight in zip(
            first[0][split], tfds_records.read_split(prepared, split), strict=True
        ):
            np.testing.assert_array_equal(ours, straight)
    assert first[1] == tfds_records.label_of(prepared).class_names


def test_what_is_kept_opens_without_tfds(prepared, monkeypatch):
    first = read_dataset(prepared)
    monkeypatch.setattr(decoded_cache, "read_split", None)
    monkeypatch.setattr(decoded_cache, "label_of", None)
    same(first, read_dataset(prepared))


def test_a_flipped_bit_is_seen(prepared, decodings):
    first = read_dataset(prepared)
    whole = stored(prepared).read_bytes()
    pixels = whole.index(first[0]["train"][0].tobytes())
    content = bytearray(whole)
    content[pixels + 7] ^= 1
    stored(prepared).write_bytes(content)
    same(first, read_dataset(prepared))
    assert len(decodings) == 4
    same(first, read_dataset(prepared))
    assert len(decodings) == 4, "it was not written again"


def test_no_flipped_bit_changes_what_is_read(prepared):
    first = read_dataset(prepared)
    whole = stored(prepared).read_bytes()
    for place in range(0, len(whole), 97):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        stored(prepared).write_bytes(content)
        same(first, read_dataset(prepared))


@pytest.mark.parametrize("length", [0, 100, -1])
def test_a_file_that_was_cut_off_is_seen(prepared, decodings, length):
    first = read_dataset(prepared)
    stored(prepared).write_bytes(stored(prepared).read_bytes()[:length])
    same(first, read_dataset(prepared))
    assert len(decodings) == 4


def test_a_changed_source_is_decoded_again(prepared, decodings):
    read_dataset(prepared)
    file = next(prepared.glob("*train*"))
    os.utime(file, ns=(1, 1))
    read_dataset(prepared)
    assert len(decodings) == 4
    # Other records of the same size and time under the same name are another size here.
    (prepared / "more.txt").write_text("more")
    read_dataset(prepared)
    assert len(decodings) == 6


def test_another_directory_is_another_source(prepared, decodings, tmp_path):
    read_dataset(prepared)
    other = tmp_path / "other" / prepared.parent.name
    shutil.copytree(prepared.parent, other)
    read_dataset(other / prepared.name)
    assert len(decodings) == 4


def test_a_directory_marked_read_only_stays_as_it_is(prepared, decodings, tmp_path):
    prepared.parent.chmod(0o555)
    first = read_dataset(prepared)
    same(first, read_dataset(prepared))
    assert decodings == ["train", "test"]
    assert sorted(p.name for p in prepared.parent.iterdir()) == [prepared.name]
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1
    prepared.parent.chmod(0o755)


def test_nowhere_to_keep_it_is_no_error(prepared, decodings, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    same(read_dataset(prepared), read_dataset(prepared))
    assert len(decodings) == 4
    assert [p.name for p in prepared.parent.iterdir()] == [prepared.name]
