"""Paths as people write them."""

import pytest

from flax_resnetv2.cli import predict, tools, train
from flax_resnetv2.system.files import expand_home


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
