"""A folder of images: what is a class, what is an image, and what is refused."""

import os
import sys

import numpy as np
import pytest
from PIL import Image

from flax_resnetv2 import UsageError
from flax_resnetv2.data import folder
from flax_resnetv2.data.folder import list_folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def image(path, brightness=0, size=(6, 5), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, brightness).convert(mode).save(path)


def fill(root, counts, suffix=".png"):
    """Images by class, the k-th of the n-th class as bright as 20n + k."""
    for n, (name, count) in enumerate(counts.items()):
        for k in range(count):
            image(root / name / f"{k:03}{suffix}", 20 * n + k)
    return root


def names(found, split):
    return {str(path.relative_to(found.root)) for path, _ in found.files[split]}


def test_every_tenth_image_of_a_class_is_a_test_image(tmp_path):
    root = fill(tmp_path / "a", {"dog": 20, "cat": 9})
    found = list_folder(str(root))
    assert found.class_names == ("cat", "dog")
    assert names(found, "test") == {"dog/009.png", "dog/019.png"}
    assert len(found.files["train"]) == 27
    assert not names(found, "train") & names(found, "test")
    assert "every tenth image of a class is tested on" in found.notes[0]


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_sub_folders_say_what_is_tested_on(tmp_path, test):
    root = tmp_path / "a"
    fill(root / "train", {"cat": 3, "dog": 2})
    fill(root / test, {"cat": 1, "dog": 2})
    image(root / "spare" / "x.png")
    found = list_folder(str(root))
    assert names(found, "test") == {
        f"{test}/{x}" for x in ("cat/000.png", "dog/000.png", "dog/001.png")
    }
    assert len(found.files["train"]) == 5
    assert found.notes == (
        "left out next to train and test: spare",
        "2 classes: cat, dog",
    )


def test_the_better_word_is_tested_on_where_both_are_there(tmp_path):
    for name in ("train", "val", "test"):
        fill(tmp_path / "a" / name, {"cat": 1, "dog": 1})
    found = list_folder(str(tmp_path / "a"))
    assert {name.split("/")[0] for name in names(found, "test")} == {"test"}
    assert found.notes[0] == "left out next to train and test: val"


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("Train", "Test"),
        ("TRAIN", "Valid"),
        ("images/train", "images/val"),
        ("Data/Training", "Data/Testing"),
    ],
)
def test_splits_are_found_in_their_usual_spellings(tmp_path, train, test):
    """And never taken for classes."""
    root = tmp_path / "a"
    fill(root / train, {"cat": 3, "dog": 2})
    fill(root / test, {"cat": 1, "dog": 2})
    image(root / "spare" / "x.png")
    found = list_folder(str(root))
    assert found.class_names == ("cat", "dog")
    assert {name.rpartition("/")[0] for name in names(found, "test")} == {
        f"{test}/{name}" for name in ("cat", "dog")
    }
    assert len(found.files["train"]) == 5
    assert "left out next to train and test: spare" in found.notes


def test_sub_folders_that_repeat_are_warned_of(tmp_path):
    """They may be the classes, and what lies above them something else."""
    root = tmp_path / "a"
    for season in ("summer", "winter"):
        fill(root / season, {"cat": 10, "dog": 10})
    fill(root / "summer", {"bird": 1})
    assert (
        "every class has sub-folders cat, dog; if those are the classes, name the "
        "folder that they lie in"
    ) in list_folder(str(root)).notes


def test_the_classes_are_said(tmp_path):
    root = fill(tmp_path / "a", {f"{k:02}": 10 for k in range(21)})
    shown = ", ".join(f"{k:02}" for k in range(20))
    assert list_folder(str(root)).notes[-1] == f"21 classes: {shown}, …"


def test_images_lie_deeper_too_and_other_files_are_counted(tmp_path):
    root = fill(tmp_path / "a", {"cat": 10, "dog": 10})
    image(root / "cat" / "more" / "deep.JPG")
    (root / "cat" / "notes.txt").write_text("x")
    (root / "dog" / "LICENCE").write_text("x")
    (root / "dog" / ".DS_Store").write_text("x")
    (root / "dog" / "._000.png").write_text("x")
    os.mkfifo(root / "dog" / "pipe.png")  # reading it would wait
    (root / ".git").mkdir()
    (root / "beside.txt").write_text("x")
    found = list_folder(str(root))
    assert "cat/more/deep.JPG" in names(found, "train") | names(found, "test")
    assert found.notes[1] == (
        "left out as no images: 1 .txt, 1 without a suffix, 1 .png"
    )


def test_the_order_mixes_the_classes_and_is_the_same_elsewhere(tmp_path):
    orders = []
    for place in ("a", "b"):
        root = fill(tmp_path / place, {"cat": 30, "dog": 30})
        found = list_folder(str(root))
        orders.append([(p.relative_to(root), k) for p, k in found.files["train"]])
    assert orders[0] == orders[1]
    last = [label for _, label in orders[0][-20:]]
    assert set(last) == {0, 1}


def test_images_are_read_once_and_again_when_one_changes(tmp_path, monkeypatch):
    root = fill(tmp_path / "a", {"cat": 10, "dog": 10})
    found = list_folder(str(root))
    arrays, class_names = found.read(4)
    images, labels = arrays["train"]
    assert (images.shape, images.dtype) == ((18, 4, 4, 3), np.uint8)
    assert (labels.dtype, class_names) == (np.int32, ("cat", "dog"))
    # The brightness says which image it is.
    assert {int(x) for x in images[labels == 1].ravel()} == set(range(20, 29))
    for (path, label), pixels in zip(found.files["train"], images, strict=True):
        assert (pixels == 20 * label + int(path.stem)).all()
    read = folder.read_squares
    calls = []
    monkeypatch.setattr(folder, "read_squares", lambda *a: calls.append(a) or read(*a))
    assert found.cache(4).find().is_file()
    assert found.cache(5).find() is None
    found.read(4)
    assert not calls
    image(root / "cat" / "000.png", 99)
    os.utime(root / "cat" / "000.png", ns=(1, 1))
    again, _ = list_folder(str(root)).read(4)
    assert len(calls) == 2
    assert 99 in again["train"][0]
    assert sorted(path.name for path in root.iterdir()) == ["cat", "dog"]


def nothing(root):
    root.mkdir()


def only_files(root):
    image(root / "a.png")


def one_class(root):
    fill(root, {"cat": 20})


def an_empty_class(root):
    fill(root, {"cat": 20})
    (root / "dog").mkdir()


def a_class_of_text(root):
    an_empty_class(root)
    (root / "dog" / "a.txt").write_text("x")


def few(root):
    fill(root, {"cat": 9, "dog": 9})


def a_strange_test_class(root):
    fill(root / "train", {"cat": 2, "dog": 2})
    fill(root / "test", {"cat": 1, "cow": 1})


def no_test_image(root):
    fill(root / "train", {"cat": 2, "dog": 2})
    (root / "test").mkdir()


def a_link_out(root):
    fill(root, {"cat": 10, "dog": 10})
    image(root.parent / "outside.png")
    (root / "cat" / "x.png").symlink_to(root.parent / "outside.png")


def a_broken_link(root):
    fill(root, {"cat": 10, "dog": 10})
    (root / "cat" / "x.png").symlink_to("/no/such.png")


def a_linked_class(root):
    fill(root, {"cat": 10, "dog": 10})
    (root / "cow").symlink_to(root / "cat")


def a_circle(root):
    fill(root, {"cat": 10, "dog": 10})
    (root / "cat" / "up").symlink_to(root)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, r"has 0 classes \(\); give a folder with two sub-folders"),
        (only_files, "has 0 classes"),
        (one_class, r"has 1 classes \(cat\)"),
        (an_empty_class, r"has no image of dog; add some \(.bmp .gif"),
        (a_class_of_text, "has no image of dog"),
        (few, "has no image to test on; give ten of a class or more"),
        (a_strange_test_class, "has cow to test on but not to train on"),
        (no_test_image, "has no image to test on"),
        (a_link_out, "x.png is a link that leads out of .*a; copy the image there"),
        (a_broken_link, "x.png is a link that leads out"),
        (a_linked_class, "cow is a link to a folder; copy what is in it"),
        (a_circle, "up is a link to a folder"),
    ],
)
def test_a_folder_that_will_not_do_is_one_clear_line(tmp_path, make, message):
    make(tmp_path / "a")
    with pytest.raises(UsageError, match=message) as caught:
        list_folder(str(tmp_path / "a"))
    assert "\n" not in str(caught.value)


def test_a_link_within_the_folder_is_an_image(tmp_path):
    root = fill(tmp_path / "a", {"cat": 10, "dog": 10})
    (root / "cat" / "x.png").symlink_to(root / "cat" / "000.png")
    assert len(list_folder(str(root)).files["train"]) == 19


@pytest.mark.parametrize("said", ["", "/no/such", "/dev/null", "x" * 300])
def test_what_is_no_folder_is_named(said):
    with pytest.raises(UsageError, match=f"data.name=folder:{said} names no folder"):
        list_folder(said)


def test_a_damaged_image_is_named(tmp_path):
    root = fill(tmp_path / "a", {"cat": 10, "dog": 10})
    path = root / "cat" / "003.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UsageError, match=r"cat/003.png cannot be read \(.*truncated"):
        list_folder(str(root)).read(4)


def test_an_image_that_vanishes_meanwhile_is_named(tmp_path):
    root = fill(tmp_path / "a", {"cat": 10, "dog": 10})
    found = list_folder(str(root))
    (root / "dog" / "004.png").unlink()
    with pytest.raises(UsageError, match=r"dog/004.png cannot be read \(No such file"):
        found.read(4)


# macOS refuses to write such a name, and Windows has no bytes in names.
@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes: Linux")
def test_a_name_may_be_of_any_bytes(tmp_path):
    root = fill(tmp_path / "a", {"cat": 10, "dog": 10})
    (root / "cat" / "003.png").rename(root / "cat" / os.fsdecode(b"caf\xe9.png"))
    for _ in range(2):  # decoded, and then as it was kept
        arrays, _ = list_folder(str(root)).read(4)
        assert len(arrays["train"][1]) == 18
