"""Archives of CIFAR: either is read, and what is wrong or hostile is refused."""

import gzip
import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from flax_resnetv2 import UsageError
from flax_resnetv2.data.prepare import cifar_archive
from tests.support.archives import (
    BATCHES,
    COARSE,
    FINE,
    MEMBERS,
    MEMBERS100,
    batch,
    binary100_members,
    binary_members,
    pixels100,
    python100_members,
    python_members,
    write_tar,
)


def images_of(name):
    return batch(name)[0].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("kind", MEMBERS)
def test_either_archive_gives_the_batches_in_their_order(tmp_path, kind):
    splits = cifar_archive.CIFAR10.read([write_tar(tmp_path / "a", MEMBERS[kind]())])
    for split, names in (("train", BATCHES[:5]), ("test", BATCHES[5:])):
        images, labels = splits[split]
        expected = np.concatenate([images_of(name) for name in names])
        np.testing.assert_array_equal(images, expected)
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(
            labels["label"], np.concatenate([batch(n)[1] for n in names])
        )


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_python_3_may_have_pickled_it(tmp_path, protocol):
    path = write_tar(tmp_path / "a", python_members(protocol))
    images, _ = cifar_archive.CIFAR10.read([path])["test"]
    np.testing.assert_array_equal(images, images_of("test_batch"))


@pytest.mark.parametrize("kind", MEMBERS100)
def test_either_archive_of_cifar100_gives_both_labels(tmp_path, kind):
    path = write_tar(tmp_path / "a", MEMBERS100[kind]())
    for split, (images, labels) in cifar_archive.CIFAR100.read([path]).items():
        count = {"train": 12, "test": 4}[split]
        planes = images.transpose(0, 3, 1, 2).reshape(count, -1)
        np.testing.assert_array_equal(planes, pixels100(split))
        assert list(labels) == ["coarse_label", "label"]
        np.testing.assert_array_equal(labels["label"], FINE[:count])
        np.testing.assert_array_equal(labels["coarse_label"], COARSE[:count])


def test_the_batch_of_the_official_archive_is_within_the_limits():
    # A label is one instruction, and a file name two: it is kept for a second use.
    for form, images in (
        (cifar_archive.CIFAR10, 10_000),
        (cifar_archive.CIFAR100, 50_000),
    ):
        assert images * (2 + len(form.keys)) * 1.2 < form.instructions
        # Python 3 writes bytes for Python 2 as text: up to two bytes for one.
        assert images * 3073 * 1.5 < form.largest_member


def test_another_checksum_is_refused_naming_the_flag(tmp_path):
    path = write_tar(tmp_path / "a", binary_members())
    received = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UsageError, match=f"{received}.*c4a38c50.*accept-checksum"):
        cifar_archive.CIFAR10.check({"a": path})


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/no/such", "No such file or directory"),
        ("/", "it is not a plain file"),
        ("/dev/null", "it is not a plain file"),
        ("/dev/null/a", "Not a directory"),
        ("~no-such-user/a", "No such file or directory"),
        ("", "it is not a plain file"),
    ],
)
def test_what_is_no_file_is_named_with_the_cause(path, reason):
    message = rf"^data.archive={path} cannot be read \({reason}\); give .*of CIFAR-10$"
    with pytest.raises(UsageError, match=message):
        cifar_archive.CIFAR10.find(path)


def test_what_the_system_refuses_is_not_called_damage():
    # A plain file that even its owner cannot read from the start.
    path = Path("/proc/self/mem")
    for read in (
        lambda path: cifar_archive.CIFAR10.read([path]),
        lambda path: cifar_archive.CIFAR10.check({"a": path}),
    ):
        with pytest.raises(UsageError, match=r"mem cannot be read \(.*error\)"):
            read(path)


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
    return write_tar(tmp_path / "a", members), "data_batch_2: .* no whole number"


def a_label_too_high(tmp_path):
    members = binary_members()
    name = "cifar-10-batches-bin/data_batch_1.bin"
    members[name] = b"\x0b" + members[name][1:]
    return write_tar(tmp_path / "a", members), "the label 11; CIFAR-10 has 0 to 9"


def a_flipped_bit(tmp_path):
    path = write_tar(tmp_path / "a", binary_members())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path, "damaged or no CIFAR-10 archive"


def a_batch_twice(tmp_path):
    members = binary_members() | python_members()
    return write_tar(tmp_path / "a", members), "it holds data_batch_1 twice"


def no_batch_at_all(tmp_path):
    members = binary_members()
    members["cifar-10-batches-bin/test_batch.bin"] = b""
    return write_tar(tmp_path / "a", members), "test_batch: .* 0 bytes"


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
    return first_pickle(tmp_path, content), "data_batch_1: ValueError: .*the encoding"


class Evil:
    def __reduce__(self):
        return print, ("this must never run",)


def a_pickle_of_a_list(tmp_path):
    content = pickle.dumps([1, 2], protocol=2)
    return first_pickle(tmp_path, content), "data_batch_1: AttributeError"


def pickled_labels_within_labels(tmp_path):
    # 2 ** 40 numbers in a hundred bytes, if NumPy made an array of it.
    labels = 1
    for _ in range(40):
        labels = [labels, labels]
    values = {b"data": batch("data_batch_1")[0], b"labels": labels}
    content = pickle.dumps(values, protocol=2)
    return first_pickle(tmp_path, content), "its labels are no list of numbers"


def pickled_labels_as_an_array(tmp_path):
    values = {b"data": batch("data_batch_1")[0], b"labels": np.zeros((2, 2), np.uint8)}
    content = pickle.dumps(values, protocol=2)
    return first_pickle(tmp_path, content), "its labels are no list of numbers"


def pickled_pixels_as_fractions(tmp_path):
    values = {b"data": [[0.5] * 3072] * 2, b"labels": [1, 2]}
    content = pickle.dumps(values, protocol=2)
    return first_pickle(tmp_path, content), "its data is no array"


def a_pickle_without_images(tmp_path):
    values = {b"data": np.zeros((0, 3072), np.uint8), b"labels": []}
    content = pickle.dumps(values, protocol=3)
    return first_pickle(tmp_path, content), r"labels float64 \[0\]"


def a_pickle_with_an_array_of_no_labels(tmp_path):
    nothing = np.zeros(0, np.uint8)
    values = {b"data": nothing.reshape(0, 3072), b"labels": nothing}
    content = pickle.dumps(values, protocol=3)
    return first_pickle(tmp_path, content), "its labels are no list of numbers"


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
        a_batch_twice,
        no_batch_at_all,
        a_pickled_label_below_zero,
        pickled_labels_that_are_fractions,
        a_damaged_pickle,
        a_pickle_of_a_list,
        pickled_labels_within_labels,
        pickled_labels_as_an_array,
        pickled_pixels_as_fractions,
        a_pickle_without_images,
        a_pickle_with_an_array_of_no_labels,
        a_pickle_with_a_call,
    ],
)
def test_a_wrong_archive_is_one_clear_line(tmp_path, make, capsys):
    path, message = make(tmp_path)
    refused(path, message)
    assert "must never run" not in capsys.readouterr().out


def refused(path, message, form=cifar_archive.CIFAR10):
    """One line, and nothing is written anywhere near."""
    before = sorted(path.parent.rglob("*")), sorted(Path.cwd().iterdir())
    with pytest.raises(UsageError, match=message) as caught:
        form.read([path])
    assert "\n" not in str(caught.value)
    assert (sorted(path.parent.rglob("*")), sorted(Path.cwd().iterdir())) == before


# Hostile archives: all but one member are those of CIFAR-10.


def with_header(path, header, content=b"", members=binary_members):
    """An archive that begins with this header, written as it is."""
    rest = gzip.decompress(write_tar(path, members()).read_bytes())
    content += bytes(-len(content) % tarfile.BLOCKSIZE)
    path.write_bytes(gzip.compress(header + content + rest, 1))
    return path


def member(name="cifar-10-batches-bin/other", size=0, **fields):
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize(
    "name",
    ["../data_batch_1.bin", "/tmp/data_batch_1.bin", "a/../../other", "..", "/x"],
)
def test_names_that_lead_out_are_refused(tmp_path, name):
    header = member(name).tobuf()
    refused(with_header(tmp_path / "a", header), "which leads out of it")


@pytest.mark.parametrize("name", ["data_batch_1.bin", "other"])
@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.GNUTYPE_SPARSE,
        b"Z",
    ],
)
def test_links_devices_and_the_like_are_refused(tmp_path, name, kind):
    header = member(name, type=kind, linkname="/etc/passwd").tobuf()
    refused(with_header(tmp_path / "a", header), "neither a plain file nor")


@pytest.mark.parametrize(
    "fields",
    [
        {"GNU.sparse.size": "4096", "GNU.sparse.map": "0,512"},
        # tarfile would read this map from the content, however long.
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        {"size": str(1 << 40)},
        {"size": "-2048"},
    ],
)
def test_an_extended_header_cannot_change_how_a_member_is_read(tmp_path, fields):
    header = member(pax_headers=fields).tobuf(tarfile.PAX_FORMAT)
    refused(with_header(tmp_path / "a", header), "changes the size of a member")


def test_extended_headers_that_change_no_size_are_skipped(tmp_path):
    header = member("n" * 120, pax_headers={"mtime": "1.5"})
    path = tmp_path / "a"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        splits = cifar_archive.CIFAR10.read([with_header(path, header.tobuf(form))])
        np.testing.assert_array_equal(splits["test"][0], images_of("test_batch"))


@pytest.mark.parametrize("name", ["data_batch_1.bin", "other"])
@pytest.mark.parametrize("size", [(64 << 20) + 1, 1 << 60, -512, -1])
def test_a_member_of_an_impossible_size_is_refused(tmp_path, name, size):
    header = member(name, size).tobuf(tarfile.GNU_FORMAT)
    message = rf"{name}' of {size:,} bytes; the limit is 67,108,864"
    refused(with_header(tmp_path / "a", header), message)


@pytest.mark.parametrize(
    "kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME]
)
def test_a_large_extended_header_is_refused(tmp_path, kind):
    header = member(size=16385, type=kind).tobuf()
    path = with_header(tmp_path / "a", header, bytes(16385))
    refused(path, "of 16,385 bytes; the limit is 16,384")


def test_very_many_members_are_refused(tmp_path):
    header = member().tobuf() * 101
    refused(with_header(tmp_path / "a", header), "more than 100 members")


def test_headers_without_end_are_refused(tmp_path):
    header = member(size=1, type=tarfile.GNUTYPE_LONGNAME).tobuf() + bytes(512)
    refused(with_header(tmp_path / "a", header * 5000), "more than 100 members")


@pytest.mark.parametrize("place", ["within", "behind"])
def test_a_bomb_as_a_whole_is_refused(tmp_path, monkeypatch, place):
    monkeypatch.setattr(cifar_archive, "LARGEST_CONTENT", 8 << 20)
    path = tmp_path / "a"
    if place == "within":
        header = member(size=16 << 20).tobuf()
        with_header(path, header, bytes(16 << 20))
    else:  # the end of the tar is read only for its checksum
        write_tar(path, binary_members())
        path.write_bytes(path.read_bytes() + gzip.compress(bytes(16 << 20), 1))
    refused(path, "decompressed it has more than 8,388,608 bytes, the limit")


def test_a_bomb_takes_no_memory(tmp_path):
    import tracemalloc

    path = write_tar(tmp_path / "a", binary_members())
    bomb = gzip.compress(bytes(64 << 20), 1)
    path.write_bytes(path.read_bytes() + bomb * 9)
    tracemalloc.start()
    refused(path, "more than 536,870,912 bytes")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20


def test_no_flipped_bit_of_a_header_is_a_traceback(tmp_path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member(pax_headers={"comment": "abc", "mtime": "1.5"}))
        tar.addfile(member("n" * 120))
    content = whole.getvalue()
    path = tmp_path / "a"
    for place in range(0, 3 * 512):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(gzip.compress(flipped, 1))
        refused(path, "CIFAR-10 archive")


# CIFAR-100: two label bytes before an image, one batch a split


def changed100(path, split, content):
    members = python100_members() if content[:1] == b"\x80" else binary100_members()
    (name,) = [n for n in members if Path(n).stem == split]
    return write_tar(path, members | {name: content})


def record100(coarse, fine):
    return bytes([coarse, fine]) + bytes(3072)


def pickled100(**values):
    batch = {"data": np.zeros((2, 3072), np.uint8), "fine_labels": [1, 2]}
    batch |= {"coarse_labels": [1, 2]} | values
    return pickle.dumps({k.encode(): v for k, v in batch.items()}, 2)


@pytest.mark.parametrize(
    ("split", "content", "message"),
    [
        ("train", record100(20, 0), "coarse_label 20; CIFAR-100 has 0 to 19"),
        ("test", record100(0, 100), "the label 100; CIFAR-100 has 0 to 99"),
        ("test", record100(0, 0)[1:], "3073 bytes .* of records of 3074 bytes"),
        ("train", b"", "train: ValueError: 0 bytes"),
        ("train", pickled100(coarse_labels=[1]), r"data \[2, 3072\] for 1 labels"),
        ("test", pickled100(fine_labels=[-1, 2]), "the label -1; CIFAR-100 has"),
        (
            "test",
            pickled100(fine_labels=[[1], [2]]),
            "its labels are no list of numbers",
        ),
        ("train", pickle.dumps({b"data": 1}, 2), "train: KeyError: b'coarse_labels'"),
        ("train", pickle.dumps(Evil(), 2), "asks for .*print"),
    ],
)
def test_a_wrong_archive_of_cifar100_is_one_clear_line(
    tmp_path, split, content, message
):
    path = changed100(tmp_path / "a", split, content)
    refused(path, message, cifar_archive.CIFAR100)


def test_the_limits_of_cifar100_are_its_own(tmp_path):
    header = member("cifar-100-binary/train.bin", (320 << 20) + 1).tobuf()
    path = with_header(tmp_path / "a", header, members=binary100_members)
    refused(path, "the limit is 335,544,320", cifar_archive.CIFAR100)
    for name, message in (("../train.bin", "leads out"), ("x" * 120, "neither")):
        link = member(name, type=tarfile.SYMTYPE, linkname="/etc/passwd").tobuf()
        path = with_header(tmp_path / "a", link, members=binary100_members)
        refused(path, message, cifar_archive.CIFAR100)


@pytest.mark.parametrize(
    ("members", "form", "message"),
    [
        (
            binary_members,
            cifar_archive.CIFAR100,
            r"no CIFAR-100 archive \(it lacks test, tr",
        ),
        (
            binary100_members,
            cifar_archive.CIFAR10,
            r"no CIFAR-10 archive \(it lacks data_batc",
        ),
    ],
)
def test_the_archive_of_another_set_is_named(tmp_path, members, form, message):
    refused(write_tar(tmp_path / "a", members()), message, form)
