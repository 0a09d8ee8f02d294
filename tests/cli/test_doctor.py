"""The doctor: what it finds where something is broken, and that it only looks."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from flax_resnetv2 import RECIPES
from flax_resnetv2.cli import doctor, installed, tools
from flax_resnetv2.cli.train import TrainCommand
from flax_resnetv2.data import tfds_records
from flax_resnetv2.data.decoded_cache import read_dataset
from flax_resnetv2.data.prepare import write_tfds
from flax_resnetv2.run.config import to_json
from flax_resnetv2.system import memory

ROOT = Path(installed.__file__).parents[2]
QUICKSTART = RECIPES["quickstart"].config
CIFAR10 = RECIPES["cifar10-article"].config


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A user without any files, who stands in an empty directory."""
    for name in ("TFDS_DATA_DIR", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # What the machine of the tests has beside its CPU is not the matter.
    monkeypatch.setattr(doctor.devices, "__defaults__", (tmp_path / "dev",))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    # Commands that other tests ran in this process may have set it.
    old = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", old)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A directory with 160 and 24 images, prepared by TFDS's own writer."""
    root = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(0)
    sizes = {"train": 160, "test": 24}

    def draw(split):
        count = sizes[split]
        images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        return images, np.arange(count) % 10

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_tfds.shapes, "draw_shapes", draw)
        write_tfds.prepare_embedded(root)
    return root


@pytest.fixture
def prepared(drawn, home):
    """A copy that may be broken, and the configuration that names it."""
    shutil.copytree(drawn, home / "data")
    data = replace(QUICKSTART.data, dir=str(home / "data"))
    return home / "data", replace(QUICKSTART, data=data)


def texts(findings, level=None):
    return [f.text for f in findings if level in (None, f.level)]


def examined(config, **options):
    command = TrainCommand(config=config, **options)
    return list(doctor.examine(command, "train.py it"))


def last(config, **options):
    *_, finding = examined(config, **options)
    assert finding.about == "run"
    return finding


def test_a_sound_machine_has_no_problem_and_keeps_its_files(home, capsys):
    before = sorted(home.rglob("*"))
    assert tools.main(["doctor"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "no problem"
    assert out[-2].startswith("ok       run          train.py quickstart: 148,906 para")
    assert (
        "8 epochs of 156 steps, 64 images per step, 8 on each of 8 devices" in out[-2]
    )
    assert sorted(home.rglob("*")) == before


def test_flags_and_recipes_are_those_of_training(capsys):
    assert tools.main(["doctor", "--train.epochs", "3"]) == 0
    assert "train.py quickstart --train.epochs 3: 148,906" in capsys.readouterr().out
    assert tools.main(["doctor", "cifar10-article", "--train.batch-size", "12"]) == 1
    out = capsys.readouterr().out
    assert "--train.batch-size 12 would be refused: train.batch_size=12" in out
    assert "8 or 16" in out
    with pytest.raises(SystemExit, match="2"):
        tools.main(["doctor", "nope"])


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0.9.9", "is not in the tested range >=0.10.2,<0.13"),
        ("0.13.0", 'pip install "jax>=0.10.2,<0.13"'),
        (None, "is not installed"),
    ],
)
def test_a_package_outside_its_range_is_a_problem(version, words, monkeypatch):
    real = metadata.version

    def changed(name):
        if name == "jax" and version is None:
            raise metadata.PackageNotFoundError(name)
        return version if name == "jax" else real(name)

    monkeypatch.setattr(metadata, "version", changed)
    [problem] = texts(installed.packages(), "problem")
    assert problem.startswith("jax ")
    assert words in problem


def test_a_package_that_a_run_does_without_is_a_note(monkeypatch):
    monkeypatch.setattr(installed, "requirements", lambda: ["h5py<1"])
    [finding] = installed.packages()
    assert finding.level == "note"


@pytest.mark.parametrize(
    ("version", "ranges", "within"),
    [
        ("2.0.0", ">=2,<3", True),
        ("2", ">=2.0", True),
        ("0.10.2", ">=0.10.2,<0.13", True),
        ("0.9", ">=0.10", False),
        ("3.0", "<3", False),
        ("2.9rc1", "<3,>=2.5", True),
    ],
)
def test_ranges(version, ranges, within):
    assert installed._within(version, ranges) is within


def test_the_ranges_are_read_whole():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = [line for line in lines if not line.startswith("#")]
    assert installed.requirements() == names
    for line in names:
        assert re.fullmatch(r"[\w-]+((>=|<)[\d.]+,?)+", line)
    project = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = "{installed.PYTHON}"' in project


def test_an_installed_package_knows_its_ranges(tmp_path, monkeypatch):
    monkeypatch.setattr(installed, "ROOT", tmp_path)
    monkeypatch.setattr(metadata, "requires", lambda name: ["jax<0.13, >=0.10.2"])
    assert installed.requirements() == ["jax<0.13,>=0.10.2"]


@pytest.mark.parametrize("package", ["tyro", "flax", "rich"])
def test_a_package_that_does_not_load_is_a_line(package, home):
    (home / "broken" / package).mkdir(parents=True)
    (home / "broken" / package / "__init__.py").write_text("raise OSError('no')")
    done = subprocess.run(
        [sys.executable, "-m", "flax_resnetv2", "doctor"],
        env={"PYTHONPATH": f"{home / 'broken'}:{ROOT}", "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(rf"problem  packages     {package} .*OSError: no", done.stdout)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("nvidia0", ["an NVIDIA GPU", 'pip install --upgrade "jax[cuda13]>=0.10.2']),
        ("accel0", ["a TPU", '"jax[tpu]>=0.10.2,<0.13"']),
    ],
)
def test_an_accelerator_that_is_not_used_is_a_problem(file, words, home):
    (home / file).touch()
    [problem] = texts(doctor.devices(home), "problem")
    for word in (*words, "JAX computes on the CPU"):
        assert word in problem


def test_an_accelerator_that_was_hidden_is_a_note(home, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (home / "nvidia0").touch()
    used, hidden = doctor.devices(home)
    assert (used.level, hidden.level) == ("ok", "note")
    assert "because of CUDA_VISIBLE_DEVICES=;" in hidden.text


def test_a_machine_without_accelerators_is_sound(home):
    [finding] = doctor.devices(home)
    assert finding.text.startswith("8 cpu, ")


def test_devices_that_fail_are_a_problem(monkeypatch):
    def fail():
        raise RuntimeError("the driver is gone\nand more")

    monkeypatch.setattr(doctor.jax, "local_devices", fail)
    found = examined(QUICKSTART)
    [problem] = [f.text for f in found if f.about == "devices"]
    assert "RuntimeError: the driver is gone;" in problem
    assert found[-1].text == "train.py it would not start: see devices above"


def test_a_cache_that_cannot_be_written_is_said(home):
    (home / "cache").write_text("a file")
    [programs] = doctor.programs(True)
    assert programs.level == "note"
    assert "cannot be written, so every run compiles again" in programs.text
    [problem] = texts(doctor.data(QUICKSTART.data), "problem")
    assert "cannot be written; choose another --data.dir" in problem


def test_a_missing_data_set_is_announced(home):
    note, room = doctor.data(CIFAR10.data)
    assert note.level == "note"
    assert f"is not in {home / 'home' / 'tensorflow_datasets'}: the run" in note.text
    assert f"downloads 170 MB from {write_tfds.SOURCES['cifar10'].url}" in note.text
    assert room.text.startswith("cifar10: up to 539 MB")
    note, _ = doctor.data(replace(CIFAR10.data, url="http://mirror/a.tar.gz"))
    assert "from http://mirror/a.tar.gz" in note.text
    note, _ = doctor.data(QUICKSTART.data)
    assert "the run draws it" in note.text


def test_a_full_disk_is_a_problem(monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    [problem] = texts(doctor.data(CIFAR10.data), "problem")
    assert "1 kB are free; make room" in problem


def test_a_folder_is_counted(home, tmp_path):
    for name in ("train/cat/1", "train/dog/1", "train/dog/2", "val/dog/3"):
        path = tmp_path / "pets" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 7)).save(path)
    config = RECIPES["folder"].config
    name = f"folder:{tmp_path / 'pets'}"
    config = replace(config, data=replace(config.data, name=name))
    ok, *notes, room = doctor.data(config.data)
    assert ok.text == f"{tmp_path / 'pets'}: 2 classes; images: 3 train, 1 test"
    assert {note.text for note in notes} == {
        "2 classes: cat, dog",
        "the images will be decoded once",
    }
    assert room.text.startswith("the decoded images: up to 49.2 kB")
    assert "train.batch_size=64 is more than the 3 training images" in last(config).text
    small = replace(config, train=replace(config.train, batch_size=8))
    problem = [f.text for f in examined(small) if f.about == "run"]
    assert "choose one from 1 to 3" in problem[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dir": "/no/such/place"}, "is not a directory"),
        ({"archive": "/no/such.tar.gz"}, "cannot be read"),
        ({"url": "ftp://mirror"}, "is no address"),
        ({"validation": 50_000}, "must leave images to train on"),
    ],
)
def test_what_the_data_set_cannot_come_from_is_a_problem(change, words):
    config = replace(CIFAR10, data=replace(CIFAR10.data, **change))
    [problem] = [f.text for f in examined(config) if f.about == "data"]
    assert words in problem
    assert last(config).text == "train.py it would not start: see data above"


def test_a_prepared_data_set_is_found(prepared):
    root, config = prepared
    found, note = doctor.data(config.data)
    assert "embedded_shapes/1.0.0: array_record; images: 160 train, 24 t" in found.text
    assert "decoded once" in note.text
    read_dataset(tfds_records.find_prepared("embedded_shapes", root))
    _, kept = doctor.data(config.data)
    assert kept.level == "ok"
    assert f"{root}/embedded_shapes/decoded-1.0.0.npz" in kept.text
    assert "8 epochs of 2 steps" in last(config).text


def break_description(directory):
    (directory / "dataset_info.json").write_text("{")


def break_format(directory):
    path = directory / "dataset_info.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({**old, "fileFormat": "tfrecord"}))


def break_files(directory):
    next(directory.glob("*train*")).unlink()


def break_place(directory):
    (directory / "dataset_info.json").unlink()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (break_description, "is not a description of a data set"),
        (break_format, "is in the format tfrecord"),
        (break_files, "lacks 1 of 1 record files"),
        (break_place, "holds no dataset_info.json"),
    ],
)
def test_a_broken_data_directory_is_a_problem(prepared, harm, words):
    root, config = prepared
    harm(root / "embedded_shapes" / "1.0.0")
    [problem] = [f for f in examined(config) if f.about == "data"]
    assert problem.level == "problem"
    assert words in problem.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 80_000}, "is more than the 50000 training images"),
        ({"batch_size": 12}, "cannot be shared equally by 8 devices"),
        ({"ema_decay": 2.0}, "train.ema_decay=2.0"),
    ],
)
def test_a_run_that_would_be_refused_is_a_problem(change, words):
    finding = last(replace(CIFAR10, train=replace(CIFAR10.train, **change)))
    assert finding.level == "problem"
    assert finding.text.startswith("train.py it would be refused: ")
    assert words in finding.text


def test_a_batch_that_the_memory_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(doctor, "memory_limit", lambda _: 10**9)
    finding = last(replace(CIFAR10, train=replace(CIFAR10.train, batch_size=40_000)))
    assert re.search(r"refused: .* choose --train.batch-size \d+ or less", finding.text)


def test_memory_that_others_use_is_a_problem(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 10**6)
    [problem] = texts(examined(QUICKSTART), "problem")
    assert "; 1 MB are free; end other programs" in problem


def test_a_run_directory_is_looked_at(home):
    (home / "run").mkdir()
    (home / "run" / "config.json").write_text(to_json(QUICKSTART))
    same = last(QUICKSTART, workdir=str(home / "run"))
    assert "resuming the run there" in same.text
    other = last(replace(QUICKSTART, seed=1), workdir=str(home / "run"))
    assert "holds a run of another configuration (seed: 0 -> 1)" in other.text
    (home / "file").touch()
    problems = texts(examined(QUICKSTART, workdir=str(home / "file")), "problem")
    assert problems == [f"{home / 'file'} cannot be written; choose another --workdir"]


def test_whatever_a_part_raises_is_a_finding(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(doctor.datasets, "prepared_directory", fail)
    [problem] = [f.text for f in examined(QUICKSTART) if f.about == "data"]
    assert "cannot be checked (ZeroDivisionError)" in problem


def test_images_that_stay_on_disk_take_no_memory(tmp_path):
    config = replace(
        QUICKSTART,
        augment=replace(QUICKSTART.augment, crop_scale=(0.3, 1.0)),
        data=replace(QUICKSTART.data, stream=True),
    )
    command = TrainCommand(config=config, workdir=str(tmp_path))
    findings = {f.about: f for f in doctor.run(command, "train.py")}
    assert findings["run"].level == "ok", findings["run"].text
    assert "memory" in findings
