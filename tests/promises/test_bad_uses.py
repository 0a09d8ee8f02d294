"""Bad uses, as a person types them: what each is told, and that it changes nothing.

A row of ``CASES`` is a command line, what lies in the directory where it is given, the
words of the answer and the exit code. Nothing is trained or downloaded here.
"""

import contextlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from flax_resnetv2 import RECIPES
from flax_resnetv2.cli import predict as predict_command, tools, train as train_command
from flax_resnetv2.data import streaming
from flax_resnetv2.data.prepare import download, write_tfds
from flax_resnetv2.run import run_directory
from flax_resnetv2.system import memory
from tests.support import archives

SAME_RUN = (
    "--data.dir {data} --train.batch-size 8 --train.epochs 1 --architecture.units 1 1 "
    "--architecture.widths 4 8 --architecture.strides 1 2 --architecture.stem-width 4"
)
"""What the run of ``there`` was given."""


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A directory with a data set of 24 images, a run on it and its archive."""
    home = tmp_path_factory.mktemp("there")
    good = archives.write_tar(home / "good.tar.gz", archives.binary_members())
    archives.prepare(home / "data", archive=str(good))
    line = f"cifar10-article {SAME_RUN} --no-compilation-cache --workdir {{run}}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
        places = {"data": home / "data", "run": home / "run"}
        assert train_command.main(shlex.split(line.format(**places))) == 0
    return home


@pytest.fixture
def here(there, tmp_path, monkeypatch):
    """The working directory of a person with another home, and no network."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    for name in list(os.environ):
        if re.match("TFDS_|SLURM_|OMPI_|PMI", name):
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    for forbidden, name in ((download, "_open"), (write_tfds, "_write")):
        monkeypatch.setattr(forbidden, name, None)
    for name in ("home", "cache", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    old = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "here"
    jax.config.update("jax_compilation_cache_dir", old)


def run(line):
    """The exit code of a command line."""
    program, *words = shlex.split(line)
    commands = {
        "train.py": train_command.main,
        "predict.py": predict_command.main,
        "python": tools.main,
    }
    if program == "python":
        assert words[:2] == ["-m", "flax_resnetv2"]
        words = words[2:]
    try:
        return commands[program](words)
    except SystemExit as error:
        return error.code


def snapshot(*roots):
    """All that lies there. A lock is opened to be looked at, which leaves a time."""
    found = {}
    for root in roots:
        for path in (root, *root.rglob("*")):
            if path.name != ".lock":
                stat = path.lstat()
                content = path.read_bytes() if path.is_file() else None
                # A new run takes its place in runs/ for a moment.
                time = None if path.name == "here" else stat.st_mtime_ns
                found[path] = stat.st_mode, time, content
    return found


RULE_OR_REPAIR = (
    r"\b(must|needs?|choose|give|given|name|set|add|make|remove|convert|download|train|"
    r"restore|resume|bring|scale|leave|wait)\b"
)


def flat(text):
    """Without box, color and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


# What lies there


def file(name, content=b"hello"):
    def prepare(_):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)

    return prepare


def directories(*names):
    return lambda _: [Path(name).mkdir(parents=True) for name in names]


def archive(members=archives.binary_members, more=(), change=None):
    """An archive, and an empty directory to prepare it in."""

    def prepare(_):
        Path("d").mkdir()
        path = archives.write_tar(Path("a.tar.gz"), members() | dict(more))
        if change:
            changed(path, change)

    return prepare


def data(pattern, change):
    """A copy of the data set with one file changed, or removed."""

    def prepare(there):
        shutil.copytree(there / "data", "d")
        (path,) = Path("d/cifar10").glob(f"*/{pattern}")
        changed(path, change)

    return prepare


def changed(path, change):
    content = change(path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


def a_run(name=None, change=None):
    """A copy of the run with one file changed, or removed; and an image."""

    def prepare(there):
        shutil.copytree(there / "run", "r")
        Image.new("RGB", (9, 7)).save("a.png")
        if name:
            changed(Path("r") / name, change)

    return prepare


def gone(_):
    return None


def cut(content):
    return content[: len(content) // 3]


def fields(**new):
    """Other values of a JSON file."""
    return lambda content: json.dumps(json.loads(content) | new).encode()


def in_use(there):
    a_run()(there)
    return run_directory.locked(Path("r"))


def no_checkpoint(there):
    a_run()(there)
    shutil.rmtree("r/checkpoints")


def damaged_checkpoints(there):
    a_run()(there)
    for path in Path("r/checkpoints").glob("*/state/**/d/*"):
        path.write_bytes(path.read_bytes()[:10])


def image(name, mode, size):
    def prepare(there):
        a_run()(there)
        Image.new(mode, size).save(name)

    return prepare


def cut_image(there):
    a_run()(there)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save("b.png")
    changed(Path("b.png"), cut)


def beside_run(name, content):
    def prepare(there):
        a_run()(there)
        Path(name).write_bytes(content)

    return prepare


class Evil:
    """Unpickled by pickle, it would make a file."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def evil_members():
    evil = {"cifar-10-batches-py/test_batch": pickle.dumps(Evil(), 2)}
    return archives.python_members() | evil


def safetensors(there):
    from safetensors.numpy import save_file

    save_file({"stem.conv.weight": np.zeros(3, np.float32)}, "w.safetensors")


def h5(there, change=None):
    import h5py

    with h5py.File("w.h5", "w") as stored:
        stored["conv1_conv/conv1_conv/kernel:0"] = np.zeros((7, 7, 3, 64))
    if change:
        changed(Path("w.h5"), change)


def pixels(side):
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(*names, **contents):
    """Small images of these names, and files of these contents."""

    def prepare(_):
        for name in (*names, *contents):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(contents.get(name, pixels(5)))

    return prepare


@contextlib.contextmanager
def small_machine(there):
    pictures("f/train/cat/1.png", "f/train/dog/1.png", "f/test/dog/2.png")(there)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "machine_memory", lambda: 10**6)
        yield


@contextlib.contextmanager
def small_shared_memory(there):
    pictures("f/train/cat/1.png", "f/train/dog/1.png", "f/test/dog/2.png")(there)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "HELD", 10**12)
        yield


# The table


class Case(NamedTuple):
    """A bad use."""

    name: str
    line: str
    words: tuple[str, ...]
    """Each of them is in the answer."""
    prepare: Callable[..., Any] | None = None
    code: int = 2
    box: bool = False
    """tyro answers, in a box."""


def quickstart(name, flags, *words, **more):
    return Case(name, f"train.py quickstart {flags}", words, **more)


def article(name, flags, *words, prepare=None, **more):
    line = f"train.py cifar10-article --train.batch-size 8 {flags}"
    return Case(name, line, words, prepare, **more)


def again(name, flags, *words, prepare, **more):
    """The command of the run, once more."""
    line = f"train.py cifar10-article {SAME_RUN} --workdir r {flags}"
    return Case(name, line, words, prepare, **more)


def transfer(name, flags, *words, prepare=None, net="timm-resnetv2-50"):
    line = f"train.py cifar10-transfer-{net} --data.dir {{data}} --train.batch-size 8"
    return Case(name, f"{line} {flags}", words, prepare)


def folder(name, flags, *words, prepare=None):
    return Case(name, f"train.py folder {flags}", words, prepare)


def predict(name, typed, *words, prepare=None, **more):
    return Case(name, f"predict.py {typed}", words, prepare or a_run(), **more)


def package(name, typed, *words, **more):
    return Case(name, f"python -m flax_resnetv2 {typed}", words, **more)


ARCHIVE = "--data.dir d --data.archive a.tar.gz"
TRUSTED = f"{ARCHIVE} --data.accept-checksum"
TWO = "--coordinator h:1 --processes 2"

CASES = {
    "recipes and flags": [
        Case("no recipe", "train.py", tuple(RECIPES), box=True),
        Case("a net", "train.py resnet56", ("resnet56", *RECIPES), box=True),
        Case("a preset", "train.py article", ("article", *RECIPES), box=True),
        Case("a slip", "train.py quickstrat", ("quickstrat", *RECIPES), box=True),
        Case("no such depth", "train.py cifar10-article-57", ("-57",), box=True),
        Case("flag first", "train.py --seed 1", ("--seed", *RECIPES), box=True),
        quickstart("a word too many", "extra", "extra", box=True),
        quickstart("flag", "--train.lr 1", "--train.lr", box=True),
        quickstart(
            "slip in a flag",
            "--train.learningrate 1",
            *("--train.learningrate", "--train.learning-rate"),
            box=True,
        ),
        quickstart(
            "part of a number", "--train.epochs 1.5", "epochs", "'1.5'", "int", box=True
        ),
        quickstart("no value", "--train.epochs", "Missing value", "--train.", box=True),
        quickstart("a word for a number", "--seed one", "--seed", "'one'", box=True),
        quickstart("a value for a switch", "--train.nesterov yes", "yes", box=True),
        quickstart(
            "choice",
            "--train.schedule step",
            *("'step'", "train.schedule", "'steps', 'cosine', 'one_cycle', 'linear'"),
            box=True,
        ),
        quickstart(
            "dtype", "--execution.dtype float16", "'float16'", "'bfloat16'", box=True
        ),
        quickstart("executor", "--executor threads", "'pmap', 'jit'", box=True),
        quickstart(
            "stride layer",
            "--architecture.semantics.stride-layer 4",
            *("'4'", "('1', '2')"),
            box=True,
        ),
    ],
    "architectures": [
        quickstart(
            "reduction",
            "--architecture.reduction 3",
            "stack 1: reduction=3 does not divide width=32; choose one of 1, 2, 4, 8,",
        ),
        quickstart("no reduction", "--architecture.reduction 0", "reduction=0"),
        quickstart(
            "reductions of two stacks",
            "--architecture.reduction 2 2",
            "reduction=(2, 2) has 2 values, but units=(2, 2, 2) makes 3 stacks; give",
        ),
        quickstart(
            "central reduction",
            "--architecture.central-reduction 5",
            "central_reduction=5 does not divide width=32; choose one of 1, 2, 4, 8",
        ),
        quickstart("even kernel", "--architecture.kernel 4", "odd", "4", "1, 3, 5"),
        quickstart("even stem", "--architecture.stem-kernel 2", "stem_kernel", "odd"),
        quickstart(
            "kernels of two stacks", "--architecture.kernel 3 5", "kernel=(3, 5) has 2"
        ),
        quickstart("stride", "--architecture.strides 1 0 2", "strides", "0", "1"),
        quickstart(
            "strides of two stacks", "--architecture.strides 1 2", "strides=(1, 2)"
        ),
        quickstart(
            "strides for a larger image",
            "--architecture.strides 4 4 4",
            *("stride=4", "already 1x1", "image 32x32", "choose a stride of 1"),
        ),
        quickstart("no stack", "--architecture.units", "units=()", "1 to 5 stacks"),
        quickstart("no unit", "--architecture.units 0 1 1", "units", "0"),
        quickstart(
            "six stacks",
            "--architecture.units 1 1 1 1 1 1",
            "units=(1, 1, 1, 1, 1, 1) must be the numbers of units of 1 to 5 stacks",
        ),
        quickstart("width", "--architecture.widths 32 -64 128", "widths", "-64"),
        quickstart("bridges", "--architecture.bridge True True", "bridge=(True, True)"),
        quickstart(
            "basic units",
            "--architecture.unit basic",
            "a basic unit has no reduction; choose reduction=1, or unit='bottleneck'",
        ),
        quickstart(
            "latent head",
            "--architecture.head latent",
            "train.label_smoothing=0.1 has no use where architecture.head='latent'",
        ),
        quickstart(
            "no head",
            "--architecture.head none",
            "architecture.head='none' returns feature maps, which cannot be trained; "
            "choose 'classifier', or 'latent'",
        ),
        quickstart(
            "a classifier's decoder",
            "--autoencoder.units 2",
            "autoencoder=AutoencoderConfig(units=2, kl_weight=1.0) has no use where",
        ),
        quickstart(
            "divergence", "--autoencoder.kl-weight -1", "autoencoder.kl_weight=-1.0"
        ),
        quickstart(
            "head",
            "--architecture.head pooled",
            *("'pooled'", "('classifier', 'latent', 'none')"),
            box=True,
        ),
        quickstart("no class", "--architecture.num-classes 0", "num_classes", "0"),
        article(
            "classes",
            "--data.dir {data} --architecture.num-classes 4",
            "architecture.num_classes=4, but cifar10 has 10 classes; set "
            "--architecture.num_classes 10",
        ),
        quickstart("hidden", "--architecture.hidden 0", "hidden", "0"),
        quickstart(
            "deep stem",
            "--architecture.stem-deep --architecture.stem-kernel 7",
            *("stem_deep=True", "stem_kernel=7", "choose stem_kernel=3"),
        ),
        quickstart(
            "order",
            "--architecture.semantics.order post",
            "final_norm=True needs order='pre'",
        ),
        quickstart(
            "groups",
            "--architecture.semantics.norm group "
            "--architecture.semantics.norm-groups 5",
            "norm_groups=5 does not divide the 32 maps of stem; choose a divisor",
        ),
        quickstart(
            "nan", "--architecture.semantics.norm-epsilon nan", "norm_epsilon=nan"
        ),
        quickstart(
            "float64",
            "--execution.dtype float64",
            *("execution.dtype=float64", "JAX_ENABLE_X64=1, or choose float32"),
        ),
    ],
    "training numbers": [
        quickstart(
            "parts",
            "--train.accumulation-steps 0",
            "train.accumulation_steps=0",
            "from 1",
        ),
        quickstart(
            "parts of a batch",
            "--train.accumulation-steps 48",
            "train.batch_size=64 cannot be shared equally by 8 devices in "
            "train.accumulation_steps=48 parts each; choose a multiple of 384, as 384",
        ),
        quickstart(
            "stochastic depth",
            "--train.stochastic-depth 1",
            *("train.stochastic_depth=1.0", "in [0, 1)"),
        ),
        quickstart(
            "stochastic depth of nothing",
            "--train.stochastic-depth 0.2 --train.trainable classifier",
            "train.stochastic_depth=0.2 drops units in training, but train.trainable="
            "'classifier' trains none; leave out one of them",
        ),
        quickstart("target", "--target-accuracy 94", "target_accuracy=94.0", "or None"),
        quickstart("clip", "--train.clip-norm 0", "train.clip_norm=0.0", "or None"),
        quickstart("no epoch", "--train.epochs 0", "train.epochs=0", "1"),
        quickstart("epochs", "--train.epochs -1", "train.epochs=-1", "1"),
        quickstart("rate", "--train.learning-rate 0", "train.learning_rate=0.0", "0"),
        quickstart("nan", "--train.learning-rate nan", "train.learning_rate=nan"),
        quickstart("inf", "--train.learning-rate inf", "train.learning_rate=inf"),
        quickstart("decay", "--train.weight-decay -1", "train.weight_decay=-1.0"),
        quickstart("infinite decay", "--train.weight-decay inf", "weight_decay=inf"),
        quickstart("momentum", "--train.momentum 1", "train.momentum=1.0", "[0, 1)"),
        quickstart("ema", "--train.ema-decay 1.5", "train.ema_decay=1.5", "[0, 1)"),
        quickstart(
            "warm-up",
            "--train.warmup-epochs 8",
            *("train.warmup_epochs=8.0", "epochs=8"),
        ),
        quickstart(
            "falling drops",
            "--train.lr-drops 0.8 0.5",
            *("train.lr_drops=(0.8, 0.5)", "rising", "(0.5, 0.75)"),
        ),
        quickstart("smoothing", "--train.label-smoothing 1", "label_smoothing=1.0"),
        quickstart("no image", "--train.batch-size 0", "train.batch_size=0"),
        quickstart(
            "devices",
            "--train.batch-size 12",
            "train.batch_size=12 cannot be shared equally by 8 devices; choose a "
            "multiple of 8, as 8 or 16",
        ),
        article(
            "larger than the data set",
            "--data.dir {data} --train.batch-size 24",
            "train.batch_size=24 is more than the 20 training images of cifar10; "
            "choose one from 1 to 20",
        ),
        article(
            "all held out",
            "--data.dir {data} --data.validation 20",
            *("data.validation=20 must leave images to train on", "from 0 to 19"),
        ),
        quickstart("seed", "--seed 4294967296", "seed=4294967296", "4294967295"),
        quickstart("log", "--log-every 0", "log_every=0 must be a whole number"),
        quickstart(
            "kept", "--keep-checkpoints 0", "keep_checkpoints=0 must be a whole"
        ),
        quickstart("checkpoints", "--checkpoint-steps 0", "checkpoint_steps=0"),
        quickstart(
            "mean alone",
            "--augment.mean 0.5 0.5 0.5",
            "augment.mean=(0.5, 0.5, 0.5) and augment.std=None must be given together",
        ),
        quickstart(
            "gray mean",
            "--augment.mean 0.5 --augment.std 0.2",
            "augment.mean=(0.5,) must be 3 numbers, one for each channel of embedded",
        ),
        quickstart(
            "nan mean",
            "--augment.mean nan 0 0 --augment.std 1 1 1",
            "augment.mean=(nan, 0.0, 0.0)",
        ),
        quickstart(
            "no spread",
            "--augment.mean 0 0 0 --augment.std 0 1 1",
            "augment.std=(0.0, 1.0, 1.0)",
        ),
        quickstart(
            "nan spread",
            "--augment.mean 0 0 0 --augment.std 1 nan 1",
            "augment.std=(1.0, nan, 1.0)",
        ),
        quickstart("crop", "--augment.crop-padding -1", "augment.crop_padding=-1"),
        quickstart("resize", "--augment.resize 0", "augment.resize=0"),
        quickstart(
            "jitter",
            "--augment.color-jitter 1",
            *("augment.color_jitter=1.0", "in [0, 1)"),
        ),
        quickstart(
            "operations", "--augment.randaugment 15", "augment.randaugment=15", "to 14"
        ),
        quickstart(
            "magnitude",
            "--augment.randaugment-magnitude 31",
            *("augment.randaugment_magnitude=31", "0 to 30"),
        ),
        quickstart("cutout", "--augment.cutout 33", "augment.cutout=33", "0 to 32"),
        quickstart("mixup", "--augment.mixup 0", "augment.mixup=0.0", "from 0.001"),
        quickstart("cutmix", "--augment.cutmix -1", "augment.cutmix=-1.0", "or None"),
        quickstart(
            "axis",
            "--execution.batch-norm-axis x",
            "execution.batch_norm_axis='x' is set by fit; leave it out",
        ),
    ],
    "data directories": [
        article(
            "missing",
            "--data.dir nowhere",
            "data.dir=nowhere is not a directory; give a directory that holds",
            "create it first: mkdir -p nowhere",
        ),
        article(
            "a file", "--data.dir f", "data.dir=f is not a directory", prepare=file("f")
        ),
        article(
            "too long",
            f"--data.dir {300 * 'x'}",
            f"data.dir={300 * 'x'} is not a directory",
        ),
        article(
            "unwritable",
            "--data.dir d --data.archive {good} --data.accept-checksum",
            "cifar10 is not prepared in d, and cannot be written there (",
            "choose a writable --data.dir",
            prepare=file("d/downloads"),
        ),
        article(
            "something else in its place",
            "--data.dir d --data.archive {good} --data.accept-checksum",
            "d/cifar10/3.0.2 holds no dataset_info.json, so it is no data set; remove",
            prepare=directories("d/cifar10/3.0.2"),
        ),
        article(
            "damaged description",
            "--data.dir d",
            "d/cifar10/3.0.2/dataset_info.json is not a description of a data set (",
            "remove d/cifar10/3.0.2 to have it prepared again",
            prepare=data("dataset_info.json", cut),
        ),
        article(
            "another description",
            "--data.dir d",
            "dataset_info.json is not a description of a data set (",
            prepare=data("dataset_info.json", lambda _: b"[]"),
        ),
        article(
            "missing features",
            "--data.dir d",
            "d/cifar10/3.0.2 cannot be read (",
            prepare=data("features.json", gone),
        ),
        article(
            "missing shard",
            "--data.dir d",
            "d/cifar10/3.0.2 lacks 1 of 1 record files of the split 'train'; remove it",
            prepare=data("*-train.array_record*", gone),
        ),
        article(
            "truncated shard",
            "--data.dir d",
            "the split 'train' of d/cifar10/3.0.2 cannot be read (",
            "remove it to have the data set prepared again",
            prepare=data("*-train.array_record*", cut),
        ),
        article(
            "empty shard",
            "--data.dir d",
            "the split 'test' of d/cifar10/3.0.2 cannot be read (it has 0 records",
            prepare=data("*-test.array_record*", lambda _: b""),
        ),
        article(
            "TensorFlow's format",
            "--data.dir d",
            "d/cifar10/3.0.2 is in the format tfrecord, which only TensorFlow reads; "
            "array_record is needed: give an empty --data.dir",
            prepare=data("dataset_info.json", fields(fileFormat="tfrecord")),
        ),
        quickstart(
            "another data set",
            "--data.name nope --data.dir {data}",
            "data.name=nope is none of cifar10, cifar100, cifar100_coarse, mnist, ",
            "TFDS prepares it once, with TensorFlow, in an environment of its own: ",
            "tf/bin/tfds build nope --file_format=array_record --data_dir=",
        ),
        quickstart(
            "CelebA without TFDS",
            "--data.name celeba --data.image-size 64 --data.dir {data}",
            "tf/bin/tfds build celeb_a --file_format=array_record --data_dir=",
        ),
        quickstart(
            "no name",
            "--data.name '../x'",
            "data.name='../x' is no name of a data set; choose one of cifar10, ",
        ),
        quickstart(
            "no side",
            "--data.image-size 0",
            "data.image_size=0 must be",
            "from 1 to 1024",
        ),
        Case(
            "an archive of another set",
            "train.py cifar100-article --data.dir d --data.archive {good}",
            ("good.tar.gz has the SHA-256 ", "expected 58a81ae1", "accept-checksum"),
            directories("d"),
        ),
        Case(
            "an archive for files",
            "train.py mnist-article --data.dir d --data.archive {good}",
            (
                "good.tar.gz cannot be read (train-images-idx3-ubyte.gz: Not a direct",
                "give a directory with train-images-idx3-ubyte.gz, ",
            ),
            directories("d"),
        ),
        Case(
            "files that lack one",
            "train.py fashion-mnist-article --data.dir d --data.archive d",
            (
                "data.archive=d cannot be read (train-images-idx3-ubyte.gz: No such",
                "give a directory with train-images-idx3-ubyte.gz, ",
            ),
            directories("d"),
        ),
        Case(
            "files of the other set",
            "train.py fashion-mnist-article --data.dir d --data.archive f",
            ("f/train-images-idx3-ubyte.gz has the SHA-256 ", "expected 3aede38d"),
            lambda _: (
                Path("d").mkdir(),
                archives.write_files(Path("f"), archives.idx_files()),
            ),
        ),
        Case(
            "a damaged file, trusted",
            "train.py mnist-article --data.dir d --data.archive f "
            "--data.accept-checksum",
            ("train-labels-idx1-ubyte.gz is damaged or another file (Not a gzipped",),
            lambda _: (
                Path("d").mkdir(),
                archives.write_files(
                    Path("f"),
                    archives.idx_files() | {"train-labels-idx1-ubyte.gz": b"hello"},
                ),
            ),
        ),
        Case(
            "an archive of another set, trusted",
            "train.py cifar100-article --data.dir d --data.archive {good} "
            "--data.accept-checksum",
            ("damaged or no CIFAR-100 archive (it lacks test, train); give cifar-",),
            directories("d"),
        ),
    ],
    "folders": [
        folder(
            "missing",
            "--data.name folder:nowhere",
            "data.name=folder:nowhere names no folder; give folder:PATH of one in",
        ),
        folder("no path", "--data.name folder:", "data.name=folder: names no folder"),
        folder(
            "one class",
            "--data.name folder:f",
            "data.name=folder:f has 1 classes (cat); give a folder with two",
            prepare=pictures("f/cat/1.png", "f/cat/2.png"),
        ),
        folder(
            "an empty class",
            "--data.name folder:f",
            "data.name=folder:f has no image of dog; add some (.bmp",
            prepare=pictures("f/cat/1.png", "f/dog/a.txt"),
        ),
        folder(
            "nothing to test on",
            "--data.name folder:f",
            "folder:f has no image to test on; give ten of a class or more, or sub-fol",
            prepare=pictures("f/cat/1.png", "f/dog/1.png"),
        ),
        folder(
            "an image that is none",
            "--data.name folder:f",
            "f/test/dog/2.png is not an image; give a PNG or JPEG file",
            prepare=pictures(
                *("f/train/cat/1.png", "f/train/dog/1.png"),
                **{"f/test/dog/2.png": b"hello"},
            ),
        ),
        folder(
            "an image that is cut off",
            "--data.name folder:f",
            "f/train/dog/2.png cannot be read (",
            "give a whole PNG or JPEG file",
            prepare=pictures(
                *("f/train/cat/1.png", "f/train/dog/1.png", "f/test/dog/2.png"),
                **{"f/train/dog/2.png": pixels(40)[:1000]},
            ),
        ),
        folder(
            "a class that is only tested",
            "--data.name folder:f",
            "folder:f has cow to test on but not to train on; give both the same",
            prepare=pictures(
                "f/train/cat/1.png", "f/train/dog/1.png", "f/val/cow/1.png"
            ),
        ),
        folder(
            "no side",
            "--data.name folder:f --data.image-size None",
            "data.image_size=None must be a number for folder:f",
        ),
        folder(
            "an archive",
            "--data.name folder:f --data.archive {good}",
            "good.tar.gz: folder:f is read as it is and has no archive; leave it out",
            prepare=pictures(
                "f/train/cat/1.png", "f/train/dog/1.png", "f/val/cat/1.png"
            ),
        ),
        folder(
            "more than the memory",
            "--data.name folder:f --data.image-size 1024 --data.stream False",
            "data.name=folder:f has 3 images, which need 9.44 MB of memory, and this "
            "machine has 1 MB; add --data.stream True, or choose a smaller "
            "--data.image-size",
            prepare=small_machine,
        ),
        folder(
            "more than shared memory",
            "--data.name folder:f --train.batch-size 8 --data.stream True "
            "--data.workers 2",
            "data.workers=2 share their batches in /dev/shm, which has",
            "choose fewer, or --data.workers 0 to read in threads",
            prepare=small_shared_memory,
        ),
    ],
    "archives": [
        article(
            "missing",
            ARCHIVE,
            "data.archive=a.tar.gz cannot be read (No such file or directory); give a "
            "local copy of cifar-10-binary.tar.gz or cifar-10-python.tar.gz",
            prepare=directories("d"),
        ),
        article(
            "a directory",
            ARCHIVE,
            "data.archive=a.tar.gz cannot be read (it is not a plain file)",
            prepare=directories("d", "a.tar.gz"),
        ),
        article(
            "checksum",
            ARCHIVE,
            "a.tar.gz has the SHA-256 ",
            "; expected c4a38c50",
            "if you trust the file, add --data.accept-checksum",
            prepare=archive(),
        ),
        article(
            "checksum, into the default directory",
            "--data.archive {good}",
            *("has the SHA-256 ", "--data.accept-checksum"),
        ),
        article(
            "not gzip",
            TRUSTED,
            "a.tar.gz is damaged or no CIFAR-10 archive (Not a gzipped file",
            "give cifar-10-binary.tar.gz or cifar-10-python.tar.gz, fetched again",
            prepare=archive(change=lambda _: b"hello"),
        ),
        article(
            "cut off",
            TRUSTED,
            "a.tar.gz is damaged or no CIFAR-10 archive (Compressed file ended before",
            prepare=archive(change=cut),
        ),
        article(
            "a member above it",
            TRUSTED,
            "it holds '../../evil', which leads out of it",
            prepare=archive(more={"../../evil": b"x"}),
        ),
        article(
            "a member of the system",
            TRUSTED,
            "it holds '/etc/evil', which leads out of it",
            prepare=archive(more={"/etc/evil": b"x"}),
        ),
        article(
            "a pickle that runs code",
            TRUSTED,
            "no CIFAR-10 archive (test_batch: ValueError: it asks for 'posix mkdir')",
            prepare=archive(evil_members),
        ),
        article(
            "half an image",
            TRUSTED,
            "a.tar.gz is damaged or no CIFAR-10 archive (test_batch: ValueError: 100 "
            "bytes are no whole number of records of 3073 bytes)",
            prepare=archive(more={"cifar-10-batches-bin/test_batch.bin": bytes(100)}),
        ),
        article(
            "a missing batch",
            TRUSTED,
            "a.tar.gz is damaged or no CIFAR-10 archive (it lacks test_batch); give",
            prepare=archive(lambda: archives.binary_members(archives.BATCHES[:-1])),
        ),
        article(
            "two sources",
            f"{ARCHIVE} --data.url http://localhost/x",
            "data.archive=a.tar.gz and data.url=http://localhost/x are two sources",
            prepare=archive(),
        ),
        article(
            "no address",
            "--data.dir d --data.url file:///x",
            "data.url=file:///x is no address to download from; give one that begins "
            "with http:// or https://",
            prepare=directories("d"),
        ),
        quickstart(
            "of what is drawn",
            "--data.archive a.tar.gz",
            "data.archive=a.tar.gz: embedded_shapes is drawn and has no archive; leave",
        ),
    ],
    "weights": [
        transfer(
            "missing",
            "",
            "weights=model.safetensors cannot be opened (No such file or directory); "
            "give the path of a file; name it by --weights FILE",
        ),
        transfer(
            "a directory",
            "--weights w.npz",
            "weights=w.npz cannot be opened (Is a directory)",
            prepare=directories("w.npz"),
        ),
        transfer(
            "suffix",
            "--weights w.bin",
            "weights=w.bin must be a file .keras or .h5 or .safetensors or .npz",
            prepare=file("w.bin"),
        ),
        transfer(
            "a pickle",
            "--weights w.pth",
            "weights=w.pth must be a file .keras",
            "a .pth is a pickle, which may run code; convert it",
            prepare=file("w.pth"),
        ),
        transfer(
            "not safetensors",
            "--weights w.safetensors",
            "w.safetensors is damaged, or not in the format of its suffix (",
            "download it again",
            prepare=file("w.safetensors"),
        ),
        transfer(
            "another net",
            "--weights w.safetensors",
            "w.safetensors holds another net than the model (names of timm); ",
            "nothing was loaded; choose the preset of this file",
            prepare=safetensors,
        ),
        transfer(
            "truncated",
            "--weights w.h5",
            "w.h5 is damaged, or not in the format of its suffix (",
            prepare=lambda there: h5(there, cut),
            net="keras-resnet50v2",
        ),
        transfer(
            "another Keras net",
            "--weights w.h5",
            "w.h5 holds another net than the model (names of Keras); ",
            prepare=h5,
            net="keras-resnet50v2",
        ),
        transfer(
            "of another library",
            "--weights w.npz",
            "w.npz is damaged, or not in the format of its suffix (",
            prepare=file("w.npz"),
            net="bit-r50x1",
        ),
    ],
    "run directories": [
        article(
            "a file",
            "--data.dir {data} --workdir f",
            "workdir=f cannot be written or created; choose another --workdir",
            prepare=file("f"),
        ),
        article(
            "below a file",
            "--data.dir {data} --workdir f/g",
            "workdir=f/g cannot be written or created; choose another --workdir",
            prepare=file("f"),
        ),
        article(
            "too long",
            f"--data.dir {{data}} --workdir {300 * 'x'}",
            f"workdir={300 * 'x'} cannot be written or created",
        ),
        article(
            "bytes that are no UTF-8",
            "--data.dir {data} --workdir caf\udce9",
            "workdir=caf\\udce9 must be UTF-8 in its whole path",
        ),
        article(
            "an address",
            "--data.dir {data} --workdir gs://bucket/run",
            "workdir=gs:/bucket/run must be a directory of this machine",
        ),
        article("empty", "--workdir ''", "workdir='' names no directory; give"),
        again(
            "more epochs",
            "--train.epochs 2",
            "r holds a run of another configuration (train.epochs: 1 -> 2); give the "
            "same flags to resume it, or another --workdir",
            prepare=a_run(),
        ),
        again(
            "two fields",
            "--seed 3 --train.learning-rate 0.2",
            "(train.learning_rate: 0.4 -> 0.2; seed: 0 -> 3)",
            prepare=a_run(),
        ),
        again(
            "in use",
            "",
            f"workdir=r is in use by process {os.getpid()} on ",
            "wait for it, or choose another --workdir",
            prepare=in_use,
        ),
        again(
            "damaged config.json",
            "",
            "r/config.json cannot be used (not a configuration in JSON: ",
            "restore it from a copy, or give another directory",
            prepare=a_run("config.json", cut),
        ),
        again(
            "empty config.json",
            "",
            "r/config.json cannot be used (",
            prepare=a_run("config.json", lambda _: b""),
        ),
        again(
            "config.json that is no text",
            "",
            "r/config.json cannot be used (",
            prepare=a_run("config.json", lambda _: b"\xff\xfe\x00"),
        ),
        again(
            "config.json of another time",
            "",
            "r/config.json cannot be used (schema=99 of a configuration, but this "
            "version reads only 2; use the version that wrote it, or train again)",
            prepare=a_run("config.json", fields(schema=99)),
        ),
        again(
            "unknown field",
            "",
            "r/config.json cannot be used (unknown field 'color'",
            prepare=a_run("config.json", fields(color=1)),
        ),
        again(
            "a number for a part",
            "",
            "r/config.json cannot be used (",
            prepare=a_run("config.json", fields(train=3)),
        ),
        again(
            "damaged environment.json",
            "",
            "r/environment.json is damaged (",
            "remove it and resume the run",
            prepare=a_run("environment.json", cut),
        ),
        again(
            "all checkpoints damaged",
            "",
            *("failed: all checkpoints of ", "/r/checkpoints are dam", "restore"),
            prepare=damaged_checkpoints,
            code=1,
        ),
    ],
    "profiles": [
        quickstart(
            "one number",
            "--profile 30",
            "profile='30' must be FIRST:END, two step numbers, as 20:30",
        ),
        quickstart("empty", "--profile ''", "profile='' must be FIRST:END"),
        quickstart(
            "backwards",
            "--profile 30:20",
            "profile='30:20' must be FIRST:END, FIRST below END, as 20:30",
        ),
        article(
            "after the end",
            "--data.dir {data} --profile 5:900000",
            "profile=5:900000 must be FIRST:END with 0 <= FIRST < END <= 60",
        ),
        again(
            "of a finished run",
            "--profile 0:1",
            "profile=0:1: this run is finished and has no step left to trace; give",
            prepare=a_run(),
        ),
    ],
    "several processes": [
        quickstart(
            "coordinator alone",
            "--coordinator h:1 --workdir w",
            "coordinator=h:1, processes=None and process=None must be set together; "
            "set all three, or only --distributed",
        ),
        quickstart(
            "processes alone", "--processes 2 --workdir w", "coordinator=None, proces"
        ),
        quickstart(
            "no directory",
            "--distributed",
            "workdir=None: several processes need one directory that all of them "
            "see; give --workdir DIR",
        ),
        quickstart(
            "one too high",
            f"{TWO} --process 2 --workdir w",
            "process=2 must be a whole number (int) from 0 to 1",
        ),
        quickstart(
            "below 0",
            f"{TWO} --process -1 --workdir w",
            "process=-1 must be a whole number (int) from 0 to 1",
        ),
        quickstart(
            "none",
            "--coordinator h:1 --processes 0 --process 0 --workdir w",
            "processes=0 must be a whole number (int) from 1 to",
        ),
        quickstart(
            "no port",
            "--coordinator h --processes 2 --process 0 --workdir w",
            "coordinator=h must be HOST:PORT",
            "as 10.0.0.1:1234",
        ),
        quickstart(
            "no such port",
            "--coordinator h:65536 --processes 2 --process 0 --workdir w",
            "coordinator=h:65536 must be HOST:PORT with a PORT from 1 to 65535",
        ),
        quickstart(
            "no cluster",
            "--distributed --workdir w",
            "no cluster environment was found (",
            "give --coordinator HOST:PORT --processes N --process K",
        ),
    ],
    "predict.py": [
        predict("nothing", "", "A run directory of train.py", box=True),
        predict("no image", "r", "no image given; name at least one PNG or JPEG file"),
        predict("no such run", "nowhere a.png", "nowhere is not a run directory, an "),
        predict("a file", "a.png a.png", "a.png cannot be read (", "a whole .safe"),
        predict("batches", "r a.png --batch-size 0", "batch_size=0 must be"),
        predict("latents", "r a.png --latents l.txt", "latents=l.txt must be an .npz"),
        predict("nowhere", "r a.png --latents no/l.npz", "in a directory that can be "),
        predict("no run", ". a.png", "give one that train.py made, as runs/quickst"),
        predict("too long", f"{300 * 'x'} a.png", "is not a run directory"),
        predict("top", "r a.png --top 0", "top=0 must be"),
        predict("a word", "r a.png --top all", "--top", "'all'", "int", box=True),
        predict("a slip", "r a.png --tpo 1", "--tpo", "--top INT", box=True),
        predict(
            "best, never evaluated",
            "r a.png --checkpoint best",
            "r has no best checkpoint, because it has no split 'validation'; "
            "choose the newest, or train with --data.validation",
        ),
        predict(
            "checkpoint",
            "r a.png --checkpoint oldest",
            *("'oldest'", "('newest', 'best')"),
            box=True,
        ),
        predict(
            "none yet",
            "r a.png",
            "r holds no checkpoint yet; train at least one epoch",
            prepare=no_checkpoint,
        ),
        predict(
            "all checkpoints damaged",
            "r a.png",
            *("failed: all checkpoints of ", "/r/checkpoints are dam", "restore"),
            prepare=damaged_checkpoints,
            code=1,
        ),
        predict(
            "damaged config.json",
            "r a.png",
            "r/config.json cannot be used (not a configuration in JSON: ",
            prepare=a_run("config.json", cut),
        ),
        predict(
            "missing dataset.json",
            "r a.png",
            "r has no dataset.json; resume the run to write it",
            prepare=a_run("dataset.json", gone),
        ),
        predict(
            "damaged dataset.json",
            "r a.png",
            *("r/dataset.json is damaged (", "remove it and resume the run"),
            prepare=a_run("dataset.json", cut),
        ),
        predict(
            "a list for dataset.json",
            "r a.png",
            "r/dataset.json is damaged (a list instead of a dict)",
            prepare=a_run("dataset.json", lambda _: b"[]"),
        ),
        predict(
            "dataset.json without a shape",
            "r a.png",
            "r/dataset.json is damaged (class_names=[",
            prepare=a_run("dataset.json", fields(image_shape=None)),
        ),
        predict(
            "dataset.json of another data set",
            "r a.png",
            "r/dataset.json names 1 classes, but the net has 10; bring back",
            prepare=a_run("dataset.json", fields(class_names=["a"])),
        ),
    ],
    "images": [
        predict("missing", "r b.png", "b.png cannot be read (No such file or director"),
        predict("a folder without", "r r", "r holds no image (.bmp .gif"),
        predict(
            "text",
            "r b.png",
            "b.png is not an image; give a PNG or JPEG file",
            prepare=beside_run("b.png", b"hello"),
        ),
        predict(
            "empty",
            "r b.png",
            "b.png is not an image; give a PNG or JPEG file",
            prepare=beside_run("b.png", b""),
        ),
        predict(
            "truncated",
            "r b.png",
            *("b.png cannot be read (", "truncated", "give a whole PNG or JPEG file"),
            prepare=cut_image,
        ),
        predict(
            "bomb",
            "r b.png",
            "b.png is too large (Image size (180000000 pixels) exceeds limit of ",
            "scale it down",
            prepare=image("b.png", "1", (20_000, 9_000)),
        ),
        predict(
            "narrow bomb",
            "r b.png",
            "b.png is 65536x1 pixels; the limit of a side is 65535; scale it down",
            prepare=image("b.png", "L", (65_536, 1)),
        ),
    ],
    "show and doctor": [
        package(
            "nothing",
            "",
            "{show, doctor, find-rate, sweep, ",
            box=True,
        ),
        package("command", "paint", "paint", "show, doctor", box=True),
        package("no preset", "show", "for example article-figure", box=True),
        package(
            "three nets",
            "show resnet56",
            "'resnet56' means different nets",
            "choose one of: article, article-56",
        ),
        package(
            "preset",
            "show he2016-resnet165",
            "no preset is called 'he2016-resnet165'; choose one of: article",
        ),
        package(
            "drawing",
            "show article --svg nowhere/net.svg",
            "svg=nowhere/net.svg cannot be written (No such file or directory); choose",
        ),
        package(
            "drawing over a directory",
            "show article --svg .",
            "svg=. cannot be written (Is a directory); choose another",
        ),
        package("no height", "show article --image-shape 0 32 3", "image_shape", "0"),
        package(
            "too small",
            "show article --image-shape 1 1 3",
            "stride=2 at stack2/unit1/layer1: the map is already 1x1 there",
        ),
        package(
            "two sides",
            "show article --image-shape 32 32",
            *("--image-shape", "'32', '32'", "3"),
            box=True,
        ),
        package("rate of nothing", "find-rate", *RECIPES, box=True),
        package("rate of a recipe", "find-rate nope", "nope", *RECIPES, box=True),
        package(
            "steps of a rate",
            "find-rate quickstart --steps 5",
            *("steps=5 must be", "from 10"),
        ),
        package(
            "highest rate", "find-rate quickstart --highest 0", "highest=0.0 must be"
        ),
        package(
            "rates into a run",
            "find-rate quickstart --workdir {run}",
            *("holds a run, which find-rate does not change", "another --workdir"),
        ),
        package("nowhere for rates", "find-rate quickstart --workdir ''", "workdir=''"),
        package("doctor's recipe", "doctor nope", "nope", *RECIPES, box=True),
        package("doctor's flag", "doctor --nope 1", "--nope", box=True),
    ],
}


@pytest.mark.parametrize(
    "case",
    [
        # By default the first three of each group, of which each is another check.
        pytest.param(
            case,
            id=f"{group}: {case.name}",
            marks=[pytest.mark.exhaustive] if number >= 3 else [],
        )
        for group, cases in CASES.items()
        for number, case in enumerate(cases)
    ],
)
def test_a_bad_use_is_told_in_a_line_and_changes_nothing(
    case, there, here, monkeypatch, capsys
):
    if "--distributed" in case.line:
        # Other tests of this process have used JAX, which refuses to begin again.
        from jax._src import xla_bridge

        monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    guard = case.prepare(there) if case.prepare else None
    places = {name: there / name for name in ("data", "run")}
    line = case.line.format(**places, good=there / "good.tar.gz")
    with guard if hasattr(guard, "__exit__") else contextlib.nullcontext():
        before = snapshot(there, here.parent)
        capsys.readouterr()
        code = run(line)
        output = capsys.readouterr()
    assert snapshot(there, here.parent) == before
    assert code == case.code, output
    said = flat(output.err)
    for word in case.words:
        assert word in said
    assert "Traceback" not in output.out + output.err
    if not case.box:
        assert output.err.count("\n") == 1
        assert output.err.startswith("error: " if code == 2 else "failed: ")
        assert re.search(RULE_OR_REPAIR, said)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--train.epochs 0", "train.epochs=0"),
        ("--profile 3", "profile='3' must be FIRST:END"),
        ("--data.dir nowhere", "data.dir=nowhere is not a directory"),
        (
            "--weights w.npz",
            "weights=w.npz cannot be opened (No such file or directory)",
        ),
    ],
)
def test_the_doctor_finds_what_would_be_refused(flags, words, here, capsys):
    before = snapshot(here.parent)
    assert run(f"python -m flax_resnetv2 doctor {flags}") == 1
    found = [x for x in capsys.readouterr().out.splitlines() if x.startswith("problem")]
    assert words in found[0]
    assert snapshot(here.parent) == before


def test_the_table_is_a_table():
    assert sum(map(len, CASES.values())) >= 150
    for cases in CASES.values():
        assert len({case.name for case in cases}) == len(cases)
        assert all(case.words for case in cases)
