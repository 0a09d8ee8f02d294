"""Paths as people write them."""

import os
import tempfile
from pathlib import Path

import pytest

from flax_resnetv2.cli import predict, tools, train
from flax_resnetv2.system import files
from flax_resnetv2.system.files import expand_home, printable, user_cache


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--workdir=~/runs", "--workdir=/home/me/runs"),
        ("--data.name=folder:~/pets", "--data.name=folder:/home/me/pets"),
        ("folder:~", "folder:/home/me"),
        ("~/a/~b", "/home/me/a/~b"),
        ("--to=a~/b", "--to=a~/b"),
        ("--vary=--weights=~/w", "--vary=--weights=~/w"),  # expanded when it is read
        ("--train.epochs", "--train.epochs"),
        ("~nobody-of-this-name/a", "~nobody-of-this-name/a"),
    ],
)
def test_a_tilde_is_the_home_directory_after_an_equals_sign_too(
    monkeypatch, word, expected
):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home([word]) == [expected]


@pytest.mark.parametrize(
    ("main", "line"),
    [
        (train.main, "quickstart --weights=~/w.npz"),
        (train.main, "quickstart --workdir=~/w.npz"),
        (tools.main, "export ~/w.npz --to=~/a.onnx"),
        (predict.main, "~/w.npz a.png"),
    ],
)
def test_every_command_expands_it(main, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    if "workdir=~" in line:
        (tmp_path / "w.npz").write_text("no directory")
    assert main(line.split()) == 2
    assert f"{tmp_path}/w.npz" in capsys.readouterr().err
    assert not (tmp_path / "~").exists()


# Users without a home, and names without an encoding


def test_without_a_home_caches_are_temporary(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(files.Path, "home", lambda: Path("/no/such"))
    monkeypatch.setattr(files, "writable", lambda _: False)
    found = user_cache()
    assert found == tmp_path / f"flax_resnetv2-{os.getuid()}"
    found.mkdir()
    assert user_cache() == found
    # Another user has made it, perhaps with programs in it.
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    found.rename(tmp_path / "flax_resnetv2-54321")
    assert user_cache() == Path("/no/such/.cache/flax_resnetv2")


def test_why_a_file_cannot_be_opened(tmp_path):
    (tmp_path / "a").touch()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait
    assert files.unreadable(tmp_path / "a") is None
    assert files.unreadable(tmp_path / "pipe") == "no regular file"
    assert files.unreadable(tmp_path) == "Is a directory"
    assert files.unreadable(tmp_path / "b") == "No such file or directory"
    assert files.unreadable("a\0b") == "no name of a file"


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="directory") as caught:
        files.write_whole(tmp_path / "a", "text")
    assert caught.value.filename == str(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("caf\u00e9 \u6f22\u5b57 $x$ [red]:cat:", None),
        ("caf\udce9", r"caf\udce9"),
        ("\x1b[31m\n\t", r"\x1b[31m\n\t"),
    ],
)
def test_names_can_do_nothing_to_a_terminal(name, shown):
    assert printable(name) == (name if shown is None else shown)
    assert printable(name).encode()
