"""Each data set all the way: its official form, prepared, trained on, predicted."""

import json
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from flax_resnetv2 import Predictor
from flax_resnetv2.cli import predict as predict_command, train as train_command
from flax_resnetv2.data.catalog import DATASETS
from flax_resnetv2.data.folder import list_folder
from tests.support import archives

SMALL = (
    "--architecture.units 1 1 --architecture.widths 4 8 --architecture.strides 1 2 "
    "--architecture.stem-width 4 --train.batch-size 8 --train.eval-batch-size 8 "
    "--train.epochs 1 --train.warmup-epochs 0 --log-every 1 --no-compilation-cache"
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A directory, and a user's cache, of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path


def train(recipe, flags):
    assert train_command.main([recipe, *shlex.split(SMALL), *shlex.split(flags)]) == 0


def summary(run):
    return json.loads((run / "dataset.json").read_text())


def test_cifar100_from_its_archive(home, capsys):
    archives.write_tar(home / "a.tar.gz", archives.binary100_members())
    name = "cifar100_coarse"
    where = f"--data.name {name} --data.dir data --workdir run"
    source = "--data.archive a.tar.gz --data.accept-checksum"
    train("cifar100-article", f"{where} {source}")
    names = list(DATASETS[name].class_names)
    assert summary(home / "run")["class_names"] == names
    assert summary(home / "run")["num_images"] == {"train": 12, "test": 4}
    config = json.loads((home / "run" / "config.json").read_text())
    # Left to the data set, and stored as what it was then.
    assert config["architecture"]["num_classes"] == len(names)
    # The same command goes on, and finds the run done.
    train("cifar100-article", where)
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save("a.png")
    capsys.readouterr()
    assert predict_command.main(["run", "a.png", "--top", "1"]) == 0
    assert capsys.readouterr().out.split()[1] in names


def test_celeba_as_tfds_prepared_it(home, capsys):
    archives.write_celeba(home / "data", train=16)
    where = "--data.dir data --data.image-size 16 --workdir run"
    train("celeba-article", where)
    found = summary(home / "run")
    assert found["class_names"] == list(DATASETS["celeba"].class_names)
    assert found["multi_label"] is True
    assert found["num_images"] == {"train": 16, "test": 5}
    lines = (home / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(0 <= json.loads(line)["accuracy"] <= 1 for line in lines)
    train("celeba-article", where)
    Image.new("RGB", (178, 218), (200, 100, 50)).save("a.png")
    predictor = Predictor.find("run")
    [row] = predictor(predictor.load("a.png")[None])
    assert row.shape == (40,)
    # Not shares of one: each attribute is there or not, as far as one can know.
    assert row.sum() > 5
    assert ((row >= 0) & (row <= 1)).all()
    capsys.readouterr()
    assert predict_command.main(["run", "a.png", "--top", "2"]) == 0
    best = int(row.argmax())
    assert f"{predictor.class_names[best]} {row[best]:.1%}" in capsys.readouterr().out


def noise(path, size, mode, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def test_a_folder_of_images_of_many_kinds(home, capsys):
    kinds = [
        ("jpg", "RGB"),
        ("png", "P"),
        ("png", "RGBA"),
        ("tif", "L"),
        ("webp", "RGB"),
    ]
    for seed in range(30):
        suffix, mode = kinds[seed % len(kinds)]
        path = home / "pets" / ("cat", "dog", "newt")[seed % 3] / f"{seed}.{suffix}"
        noise(path, (20 + 3 * seed % 17, 9 + seed), mode, seed)
    (home / "pets" / "cat" / "notes.txt").write_text("x")
    where = "--data.name folder:pets --data.image-size 8 --workdir run"
    train("folder", f"{where} --checkpoint-steps 1")
    said = capsys.readouterr().out
    assert "folder:pets: every tenth image of a class is tested on" in said
    assert "folder:pets: left out as no images: 1 .txt" in said
    found = summary(home / "run")
    assert found["class_names"] == ["cat", "dog", "newt"]
    assert found["num_images"] == {"train": 27, "test": 3}
    assert found["image_shape"] == [8, 8, 3]

    def finished(run):
        lines = (home / run / "metrics.jsonl").read_text().splitlines()
        return [x for x in map(json.loads, lines) if x["split"] == "test"][-1]["loss"]

    # Stopped on the way and gone on with, a run comes to the same.
    shutil.copytree("run", "again")
    for step in ("2", "3"):
        shutil.rmtree(f"again/checkpoints/{step}", ignore_errors=True)
    train("folder", where.replace("run", "again") + " --checkpoint-steps 1")
    assert finished("again") == finished("run")
    capsys.readouterr()
    assert predict_command.main(["run", "pets/dog/1.png", "pets/cat/0.jpg"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert {word for word in first.split() if word in found["class_names"]} == {
        *("cat", "dog", "newt")
    }
    # The pixels are those that it was trained on.
    arrays, _ = list_folder("pets").read(8)
    path, place = next(
        (path, k)
        for k, (path, _) in enumerate(list_folder("pets").files["train"])
        if path.name == "1.png"
    )
    loaded = Predictor.find("run").load(path)
    np.testing.assert_array_equal(loaded, arrays["train"][0][place])
    # Another image in the folder is another data set.
    noise(home / "pets" / "dog" / "new.png", (9, 9), "RGB", 99)
    again = [*shlex.split(SMALL), *shlex.split(where), "--checkpoint-steps", "1"]
    assert train_command.main(["folder", *again]) == 2
    assert "the images of folder:pets are not those that" in capsys.readouterr().err


def test_mnist_from_its_files(home, capsys):
    archives.write_files(home / "files", archives.idx_files())
    where = "--data.dir data --workdir run --data.validation 4"
    train("mnist-article", f"{where} --data.archive files --data.accept-checksum")
    found = summary(home / "run")
    assert found["image_shape"] == [28, 28, 1]
    assert found["num_images"] == {"train": 8, "test": 4, "validation": 4}
    config = json.loads((home / "run" / "config.json").read_text())
    assert len(config["augment"]["mean"]) == len(config["augment"]["std"]) == 1
    # A color image is seen in gray.
    Image.new("RGB", (40, 30), (255, 0, 0)).save("red.png")
    Image.new("L", (40, 30), 76).save("gray.png")
    capsys.readouterr()
    assert predict_command.main(["run", "red.png", "gray.png", "--top", "10"]) == 0
    red, gray = capsys.readouterr().out.splitlines()
    assert red.removeprefix("red.png") == gray.removeprefix("gray.png")
