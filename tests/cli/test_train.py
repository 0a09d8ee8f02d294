"""The commands: what reaches ``fit``, what is refused and how, what --help lists."""

import ast
import dataclasses
import inspect
import itertools
import os
import re
import typing
from pathlib import Path

import pytest

from flax_resnetv2 import RECIPES, Config, RunError
from flax_resnetv2.cli import tools, train as train_command
from flax_resnetv2.run import loop, validate
from flax_resnetv2.run.run_directory import new_workdir


@pytest.fixture(autouse=True)
def _flags(monkeypatch):
    """Keep what a command adds to XLA_FLAGS from other tests."""
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))


@pytest.fixture
def captured(monkeypatch, tmp_path):
    """The calls of ``fit`` that a command leads to; nothing is trained."""
    calls = []

    def fit(config, workdir, profile=None, executor="pmap", tensorboard=False):
        calls.append((config, workdir))
        calls.extend([profile] if profile else [])
        return {"accuracy": 0.5, "count": 2000, "seconds": 12.0}

    monkeypatch.setattr(loop, "fit", fit)
    monkeypatch.chdir(tmp_path)
    return calls


def run(arguments):
    """The exit code of train.py."""
    try:
        return train_command.main(arguments)
    except SystemExit as error:
        return error.code


def flat(text):
    """Without box, color and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_alone_is_its_configuration(captured, name):
    assert run([name]) == 0
    [(config, workdir)] = captured
    assert config == RECIPES[name].config
    assert type(config) is Config
    assert Path(workdir) == Path("runs") / f"{name}-1"


def test_flags_reach_fit(captured, capsys):
    flags = (
        "--architecture.reduction 4 2 2 --architecture.semantics.stride-layer 2 "
        "--architecture.bridge True False True --architecture.hidden 5 "
        "--train.epochs 3 --train.optimizer adam_l2 --train.no-nesterov --seed 1 "
        "--train.lr-drops 0.3 0.6 --data.validation 7 --augment.no-flip "
        "--augment.mean 0.5 0.4 0.3 --execution.dtype bfloat16 --workdir a/b"
    )
    assert run(["quickstart", *flags.split()]) == 0
    [(config, workdir)] = captured
    old, new = RECIPES["quickstart"].config, dataclasses.replace
    a, t = old.architecture, old.train
    assert config == new(
        old,
        architecture=new(
            a,
            reduction=(4, 2, 2),
            semantics=new(a.semantics, stride_layer=2),
            bridge=(True, False, True),
            hidden=(5,),
        ),
        train=new(
            t, epochs=3, optimizer="adam_l2", nesterov=False, lr_drops=(0.3, 0.6)
        ),
        seed=1,
        data=new(old.data, validation=7),
        augment=new(old.augment, flip=False, mean=(0.5, 0.4, 0.3)),
        execution=new(old.execution, dtype="bfloat16"),
    )
    assert workdir == "a/b"
    out = capsys.readouterr().out
    assert "in a/b" in out
    assert "test accuracy 0.5000 of 2,000 images; 12 s; in a/b" in out


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["2"], 2),
        (["previous"], "previous"),
        (["4", "2", "2"], (4, 2, 2)),
        (["previous", "2", "4"], ("previous", 2, 4)),
    ],
)
def test_a_reduction_is_one_value_or_one_a_stack(captured, values, expected):
    assert run(["quickstart", "--architecture.reduction", *values]) == 0
    assert captured[0][0].architecture.reduction == expected


def test_underscores_are_hyphens(captured):
    assert run(["cifar10-article", "--data.accept_checksum", "--log_every", "7"]) == 0
    assert captured[0][0].data.accept_checksum
    assert captured[0][0].log_every == 7
    assert run(["cifar10_article"]) == 0
    assert captured[1][1] == Path("runs") / "cifar10-article-1"


def test_a_value_that_is_called_like_a_recipe_is_a_value(captured):
    assert run(["cifar10-article", "--workdir", "quickstart"]) == 0
    assert captured[0][1] == "quickstart"


def test_a_new_run_takes_a_new_directory(captured, tmp_path):
    (tmp_path / "runs" / "quickstart-1").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart-2").mkdir()
    assert run(["quickstart"]) == 0
    assert captured[0][1] == Path("runs") / "quickstart-3"


def test_two_runs_that_start_together_take_two_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_workdir("a") as first, new_workdir("a") as second:
        assert (first.is_dir(), second.is_dir()) == (True, True)
        assert (first.name, second.name) == ("a-1", "a-2")
        (second / "config.json").touch()
    assert [path.name for path in Path("runs").iterdir()] == ["a-2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nope", ["nope", "quickstart", "cifar10-article", "-resnet1001-paper"]),
        ("", ["quickstart", "cifar10-he2016-resnet20"]),
        ("quickstart --nope 1", ["--nope"]),
        ("quickstart --train.epoch 1", ["--train.epoch", "--train.epochs"]),
        ("quickstart --train.epochs x", ["--train.epochs", "'x'", "int"]),
        ("quickstart --train.learning-rate fast", ["learning-rate", "fast", "float"]),
        ("quickstart --seed", ["--seed"]),
        ("quickstart --architecture.unit b", ["'b'", "bottleneck", "basic"]),
        ("quickstart --train.optimizer lion", ["lion", "sgd", "adamw", "adam_l2"]),
        (
            "quickstart --data.name nope",
            ["data.name=nope", "cifar10", "tfds build nope"],
        ),
        (
            "quickstart --architecture.reduction 3",
            ["reduction=3", "width=32", "stack 1", "1, 2, 4, 8, 16, 32", "'previous'"],
        ),
        (
            "cifar10-article --data.dir /no/such/directory",
            ["data.dir=/no/such/directory", "is not a directory", "mkdir -p"],
        ),
        (
            "quickstart --train.batch-size 12",
            ["train.batch_size=12", "8 devices", "8 or 16"],
        ),
        (
            "quickstart --architecture.units 1 1 1 1 1 1",
            ["units=(1, 1, 1, 1, 1, 1)", "1 to 5 stacks"],
        ),
        (
            "quickstart --architecture.widths 32 64",
            ["widths=(32, 64)", "2 values", "3 stacks"],
        ),
        (
            "quickstart --architecture.strides 8 8 8",
            ["stride=8", "stack3/unit1/layer1", "already 1x1", "32x32"],
        ),
        ("quickstart --architecture.kernel 2", ["kernel", "odd", "2", "1, 3, 5"]),
        ("quickstart --train.ema-decay 1", ["train.ema_decay=1", "[0, 1)"]),
        ("quickstart --log-every 0", ["log_every=0", "from 1 to"]),
        ("quickstart --seed -1", ["seed=-1", "0 to 4294967295"]),
        ("quickstart --architecture.head latent", ["'latent'", "another head"]),
    ],
)
def test_bad_use_ends_with_2_and_a_letter(
    arguments, words, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    assert run(arguments.split()) == 2
    output = capfd.readouterr()
    for word in words:
        assert word in flat(output.out + output.err)
    assert "Traceback" not in output.out + output.err
    assert not any(tmp_path.iterdir()), "something was written before the check"


def test_a_directory_that_cannot_be_made_is_bad_use(tmp_path, monkeypatch, capsys):
    from tests.support import tiny

    (tmp_path / "file").touch()
    data = tiny.dataset(train=64)
    monkeypatch.setattr(validate, "open_dataset", lambda *_: data)
    flags = ["--architecture.num-classes", "4", "--workdir", str(tmp_path / "file")]
    assert run(["quickstart", *flags]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_steps_to_profile_reach_fit(captured):
    assert run(["quickstart", "--profile", "20:30"]) == 0
    assert captured[1] == (20, 30)


@pytest.mark.parametrize("steps", ["20", "20:x", "20-30", ":30", "1:2:3"])
def test_what_are_no_steps_to_profile_is_refused(captured, capsys, steps):
    assert run(["quickstart", "--profile", steps]) == 2
    assert f"profile='{steps}' must be FIRST:END" in capsys.readouterr().err
    assert not captured


def test_a_run_that_fails_ends_with_1(captured, monkeypatch, capsys):
    def fit(*_, **__):
        raise RunError("no network")

    monkeypatch.setattr(loop, "fit", fit)
    assert run(["quickstart"]) == 1
    assert capsys.readouterr().err == "failed: no network\n"


def test_help_lists_every_recipe_in_a_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert run(["--help"]) == 0
    text = flat(capsys.readouterr().out)
    for name, recipe in RECIPES.items():
        assert f"{name} {recipe.description}" in text


def fields_of(kind, prefix=""):
    """Yield (flag, type, help text) of every field, those of parts included."""
    hints, texts = typing.get_type_hints(kind), {}
    body = ast.parse(inspect.getsource(kind)).body[0].body
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign):
            texts[node.target.id] = below.value.value
    for field in dataclasses.fields(kind):
        flag = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[field.name]):
            yield from fields_of(hints[field.name], f"{flag}.")
        else:
            yield flag, hints[field.name], " ".join(texts[field.name].split())


def test_the_help_of_a_recipe_lists_every_field_with_its_docstring(
    capsys, monkeypatch
):  # R23
    monkeypatch.setenv("COLUMNS", "100")
    assert run(["quickstart", "--help"]) == 0
    text = flat(capsys.readouterr().out)
    kinds = (Config, train_command.RuntimeOptions, train_command.ProcessOptions)
    found = [field for kind in kinds for field in fields_of(kind)]
    assert len(found) > 70
    for flag, kind, about in found:
        assert f"--{flag} " in text or f"--{flag}," in text
        if kind is bool:
            *before, last = flag.split(".")
            assert ".".join([*before, f"no-{last}"]) in text
        assert about in text, flag
    assert "--workdir " in text


def test_the_help_begins_with_what_is_changed_most(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert run(["quickstart", "--help"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    titles = re.findall(r"^\W*((?:[\w.-]+ )?options)\W*$", text, re.M)
    assert [title.removesuffix("options").strip() for title in titles] == [
        *("", "train", "data", "augment", "architecture", "architecture.semantics"),
        *("execution", "autoencoder", "runtime", "multi-process"),
    ]


def described(arguments):
    try:
        return tools.main(["show", *arguments])
    except SystemExit as error:
        return error.code


def test_a_preset_is_described_and_drawn(tmp_path, capsys):
    drawing = tmp_path / "net.svg"
    assert described(["he2016-resnet164", "--svg", str(drawing)]) == 0
    said = flat(capsys.readouterr().out)
    assert "164 layers; He et al. 2016" in said
    assert "stack1/unit2..18 32 x 32 x 64 3 1 77,248" in said
    assert "total 1,703,258 244,500,992" in said
    assert "stack3: sees 255 x 255 pixels, one value every 4" in said
    assert drawing.read_text().startswith("<svg")


def test_the_commands_of_the_package_are_listed(capsys):
    with pytest.raises(SystemExit, match="0"):
        tools.main(["--help"])
    said = flat(capsys.readouterr().out)
    assert "show Show the units, sizes and costs of a preset net" in said
    assert "doctor Check what train.py would find and do" in said
    assert "find-rate Suggest a learning rate" in said
    assert "sweep Train a recipe under each override and seed, and compare" in said


def test_the_help_of_a_command_is_its_docstring(capsys):
    with pytest.raises(SystemExit, match="0"):
        tools.main(["export", "--help"])
    said = flat(capsys.readouterr().out)
    assert "usage: python -m flax_resnetv2 export" in said
    assert "Write a trained net to one file" in said
    assert "--to STR The file; its suffix chooses the format" in said


def test_layers_of_a_preset_are_listed(capsys):
    assert described(["keras-resnet50v2", "--layers"]) == 0
    said = flat(capsys.readouterr().out)
    assert "stack1/unit1/shortcut 56 x 56 x 256" in said
    assert "stack4/unit3/layer3/conv 7 x 7 x 2048" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet56"], "means different nets"),
        (["article", "--image-shape", "0", "32", "3"], "image_shape=("),
        (["article", "--svg", "nowhere/net.svg"], "svg=nowhere/net.svg cannot be"),
    ],
)
def test_what_cannot_be_described_is_bad_use(arguments, words, capsys):
    assert described(arguments) == 2
    assert words in capsys.readouterr().err
