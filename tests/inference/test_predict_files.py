"""``predict.py`` on files, folders and a stream; a net in one file; exports."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flax_resnetv2 import Predictor, UsageError
from flax_resnetv2.cli import predict as predict_command, tools
from flax_resnetv2.inference import modelcard, modelfile
from flax_resnetv2.inference.export import to_stablehlo
from flax_resnetv2.run import loop
from flax_resnetv2.run.trained import restore
from flax_resnetv2.training.augment import AugmentConfig
from tests.support import tiny

ROOT = Path(predict_command.__file__).parents[2]


def train(directory, **changes):
    with pytest.MonkeyPatch.context() as patch:
        tiny.patch_dataset(patch, tiny.dataset())
        config = tiny.replace(tiny.config(epochs=1), log_every=100, **changes)
        loop.fit(config, directory, devices=jax.devices()[:1])
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    return train(directory, architecture=tiny.replace(tiny.SMALL, hidden=(6,)))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    net = tiny.replace(tiny.SMALL, head="latent", latent=5, latent_variance=True)
    return train(tmp_path_factory.mktemp("encoder"), architecture=net)


@pytest.fixture
def pictures(tmp_path):
    """A folder of three pictures in two levels, a text, and a damaged one beside it."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (9, 9)), ("b.PNG", (20, 7)), ("more/c.png", (8, 8))):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, "PNG")
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.png").write_text("what macOS leaves beside a.png")
    (tmp_path / "damaged.png").write_bytes((folder / "a.png").read_bytes()[:60])
    return folder


def run_predict(capsys, words):
    code = predict_command.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_a_folder_is_answered_with_all_below_it(run, pictures, capsys):
    code, lines, _ = run_predict(capsys, [run, pictures, "--json", "--top", 4])
    assert code == 0
    answers = [json.loads(line) for line in lines]
    paths = [pictures / name for name in ("a.png", "b.PNG", "more/c.png")]
    assert [a["path"] for a in answers] == [str(path) for path in paths]
    predictor = Predictor.find(run)
    expected = predictor(np.stack([predictor.load(path) for path in paths]))
    for answer, row in zip(answers, expected, strict=True):
        found = {c["class"]: c["probability"] for c in answer["classes"]}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        np.testing.assert_allclose([found[x] for x in "abcd"], row, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 64])
def test_answers_do_not_depend_on_the_batches(run, pictures, capsys, size):
    _, expected, _ = run_predict(capsys, [run, pictures])
    assert run_predict(capsys, [run, pictures, "--batch-size", size])[1] == expected
    assert len(expected) == 3


def test_an_image_on_standard_input_is_answered(run, pictures, capsys, monkeypatch):
    path = pictures / "a.png"
    stream = SimpleNamespace(buffer=io.BytesIO(path.read_bytes()))
    monkeypatch.setattr(sys, "stdin", stream)
    _, (line,), _ = run_predict(capsys, [run, "-"])
    _, (expected,), _ = run_predict(capsys, [run, path])
    assert line == expected.replace(str(path), "standard input")


def test_standard_input_that_is_closed_is_one_line(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    code, lines, err = run_predict(capsys, [run, "-"])
    assert (code, lines) == (2, [])
    assert err == "error: - is standard input, which is closed; name a file\n"


def test_what_a_folder_leaves_out_is_said(run, pictures, capsys, monkeypatch):
    (pictures / "broken.png").symlink_to("nowhere")
    (pictures / "linked").symlink_to(pictures / "more")
    code, lines, err = run_predict(capsys, [run, pictures])
    assert (code, len(lines)) == (1, 3)
    assert "linked is a link to a folder" in err
    assert "left out: " in err and "broken.png cannot be read" in err
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("more"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    code, lines, err = run_predict(capsys, [run, pictures])
    assert (code, lines) == (2, [])
    assert "more cannot be read (Permission denied); make it readable" in err


def test_a_pipe_is_read_like_a_file(run, pictures, capsys, tmp_path):
    """As in predict.py NET <(command)."""
    content = (pictures / "a.png").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content])
    writer.start()
    words = [run, tmp_path / "pipe", pictures / "a.png", "--json"]
    code, lines, _ = run_predict(capsys, words)
    writer.join()
    one, other = map(json.loads, lines)
    assert (code, one["classes"]) == (0, other["classes"])


def test_a_damaged_file_loses_none_of_the_others(run, pictures, capsys):
    damaged = pictures.parent / "damaged.png"
    code, lines, err = run_predict(capsys, [run, damaged, pictures])
    assert (code, len(lines)) == (1, 3)
    assert f"left out: {damaged} cannot be read" in err
    assert (
        "failed: 1 of 4 images could not be read; the lines above are complete" in err
    )
    code, lines, err = run_predict(capsys, [run, damaged, damaged])
    assert (code, lines) == (2, [])
    assert "none of the 2 images could be read" in err


def test_names_that_cannot_be_shown_lose_no_answer(run, pictures):
    """Bytes that are no UTF-8, an escape sequence and an encoding without the rest."""
    content = (pictures / "a.png").read_bytes()
    shutil.rmtree(pictures)
    pictures.mkdir()
    for name in (b"caf\xe9.png", b"\x1b[31m.png", "漢字[red]:cat:.png".encode()):
        (pictures / os.fsdecode(name)).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "predict.py", str(run), str(pictures)],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = [line.partition(": ")[0] for line in done.stdout.splitlines()]
    shown = "\\x1b[31m.png", "caf\\udce9.png", "\\u6f22\\u5b57[red]:cat:.png"
    assert sorted(names) == sorted(f"{pictures}/{name}" for name in shown)


def test_latents_are_what_the_classifier_reads(run, pictures, tmp_path, capsys):
    path = tmp_path / "latents.npz"
    code, _, err = run_predict(
        capsys, [run, pictures, "--latents", path, "--batch-size", 2]
    )
    assert code == 0
    assert f"3 x 6 numbers written to {path}" in err
    written = np.load(path)
    assert [p.rsplit("/", 1)[1] for p in written["path"]] == ["a.png", "b.PNG", "c.png"]
    predictor = Predictor.find(run)
    layer = predictor.variables["params"]["head"]["classifier"]
    logits = written["latent"] @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
    pixels = np.stack([predictor.load(p) for p in written["path"]])
    np.testing.assert_allclose(jax.nn.softmax(logits), predictor(pixels), rtol=1e-4)


def test_an_encoder_gives_its_vectors(encoder, pictures, tmp_path, capsys):
    path = tmp_path / "latents.npz"
    code, lines, _ = run_predict(
        capsys, [encoder, pictures, "--json", "--latents", path]
    )
    assert code == 0
    written = np.load(path)["latent"]
    np.testing.assert_array_equal(
        [np.float32(json.loads(line)["latent"]) for line in lines], written
    )
    predictor = Predictor.find(encoder)
    pixels = np.stack([predictor.load(json.loads(line)["path"]) for line in lines])
    a = predictor.normalization
    normalized = ((pixels / 255 - np.array(a.mean)) / np.array(a.std)).astype("float32")
    net = restore(encoder)
    outputs = net.model.apply(net.variables, normalized, train=False)
    np.testing.assert_allclose(outputs.latent.mean, written, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="encoder, which has no classes"):
        predictor(pixels)


def test_a_flip_can_be_asked_for(run, pictures):
    plain, flipped = (Predictor.find(run, test_flip=flip) for flip in (None, True))
    pixels = plain.load(pictures / "a.png")[None]
    both = np.log(plain(pixels)) + np.log(plain(pixels[:, :, ::-1]))
    np.testing.assert_allclose(
        flipped(pixels), jax.nn.softmax(both / 2), rtol=1e-4, atol=1e-6
    )


# A net in one file


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "net.safetensors"
    assert tools.main(["export", str(run), "--to", str(path)]) == 0
    return path


def test_a_file_has_the_bits_of_its_run(run, exported, pictures, capsys):
    old, new = restore(run), modelfile.load(exported)
    jax.tree.map(np.testing.assert_array_equal, old.variables, new.variables)
    assert new.config == old.config
    assert new.test == old.test
    assert new.environment == old.environment
    assert new.summary["class_names"] == ["a", "b", "c", "d"]
    assert run_predict(capsys, [exported, pictures]) == run_predict(
        capsys, [run, pictures]
    )


def test_a_file_does_not_say_where_the_images_lay(run):
    net = restore(run)
    data = tiny.replace(net.config.data, dir="/home/me/data", archive="/home/me/a.gz")
    hidden = modelfile.pack(net._replace(config=tiny.replace(net.config, data=data)))
    assert b"/home/me" not in hidden


def changed(exported, tmp_path, record=None, tensors=None, **metadata):
    """The file with other metadata or tensors."""
    with safe_open(exported, "numpy") as file:
        metadata = metadata or file.metadata()
    if record:
        known = json.loads(metadata[modelfile.KEY])
        record(known)
        metadata = {modelfile.KEY: json.dumps(known)}
    arrays = load_file(exported)
    if tensors:
        tensors(arrays)
    path = tmp_path / "changed.safetensors"
    save_file(arrays, path, metadata)
    return path


KERNEL = "params/stem/conv/kernel"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"other": "x"}, "was not written by python -m flax_resnetv2 export"),
        ({"record": lambda r: r["config"].update(schema=99)}, "schema=99"),
        ({"record": lambda r: r.pop("dataset")}, "'dataset'"),
        (
            {"record": lambda r: r["config"]["architecture"].update(units=[1, 0])},
            "units",
        ),
        (
            {"tensors": lambda t: t.pop(KERNEL)},
            r"missing: \[\('params/stem/conv/kernel', .*unknown: \[\]",
        ),
        (
            {"tensors": lambda t: t.update({KERNEL: t[KERNEL].astype("float16")})},
            "missing: .*float32.*unknown: .*float16",
        ),
    ],
    ids=["foreign", "schema", "record", "architecture", "missing", "kind"],
)
def test_a_file_that_is_not_whole_is_refused(exported, tmp_path, change, words):
    path = changed(exported, tmp_path, **change)
    with pytest.raises(UsageError, match=words) as caught:
        modelfile.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 7, 500, -1])
def test_a_truncated_file_is_refused(exported, tmp_path, length):
    path = tmp_path / "short.safetensors"
    path.write_bytes(exported.read_bytes()[:length])
    with pytest.raises(UsageError, match=r"cannot be read .* give a whole"):
        modelfile.load(path)


# The nets that come with the package


@pytest.mark.parametrize("name", modelfile.shipped())
def test_a_net_of_the_package_answers_and_its_card_is_its_own(name, tmp_path, capsys):
    path = modelfile.locate(name)
    assert path.stat().st_size < 2**20
    card = path.with_suffix(".md").read_text()
    assert card == modelcard.card(modelfile.load(path), name)
    Image.new("RGB", (40, 30), (90, 140, 250)).save(tmp_path / "sky.png")
    code, (line,), _ = run_predict(capsys, [name, tmp_path / "sky.png", "--json"])
    assert code == 0
    assert json.loads(line)["classes"][0]["class"] in Predictor.find(name).class_names


def test_there_is_a_net_in_the_package():
    assert "cifar10-resnet20" in modelfile.shipped()


# Programs

ELSEWHERE = """
import sys

import jax
import numpy as np

assert "flax_resnetv2" not in sys.modules
try:
    import flax_resnetv2
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is there")
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
images = np.load(sys.argv[2])
answers = [program.call(images[:1]), program.call(images[1:])]
np.save(sys.argv[3], np.concatenate(answers))
print(*program.platforms)
"""


@pytest.mark.parametrize("kind", ["run", "encoder"])
def test_a_program_runs_where_the_package_is_not(kind, request, tmp_path):
    directory = request.getfixturevalue(kind)
    path = tmp_path / "net.stablehlo"
    assert tools.main(["export", str(directory), "--to", str(path)]) == 0
    images = tiny.dataset().splits["test"].image[:6]
    np.save(tmp_path / "images.npy", images)
    files = [path, tmp_path / "images.npy", tmp_path / "answers.npy"]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, files)],
        cwd=tmp_path,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu", "cuda", "rocm", "tpu"]
    probabilities, latents = Predictor.find(directory).predict(images)
    expected = latents if probabilities is None else probabilities
    np.testing.assert_allclose(np.load(files[2]), expected, rtol=1e-4, atol=1e-5)


def test_an_image_is_scaled_inside_the_program_too(tmp_path, run):
    net = restore(run)
    larger = AugmentConfig(resize=12, mean=(0.5,) * 3, std=(0.25,) * 3)
    config = tiny.replace(net.config, augment=larger)
    content = to_stablehlo(net._replace(config=config))
    program = jax.export.deserialize(bytearray(content))
    images = tiny.dataset().splits["test"].image[:3]
    expected = Predictor.from_net(net._replace(config=config))(images)
    np.testing.assert_allclose(program.call(images), expected, rtol=1e-4, atol=1e-5)
