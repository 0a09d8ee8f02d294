"""A run as a page, runs side by side, and lines for TensorBoard."""

import base64
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from scipy import stats
from tensorboardX.proto.event_pb2 import Event

from flax_resnetv2 import RECIPES, Predictor
from flax_resnetv2.cli import tools, train as train_command
from flax_resnetv2.data.datasets import describe
from flax_resnetv2.data.decoding import to_png
from flax_resnetv2.inference import modelcard, modelfile, scores
from flax_resnetv2.reports import compare_runs, reconstruction, run_page
from flax_resnetv2.run import loop, validate
from flax_resnetv2.run.build import count_parameters, create_net
from flax_resnetv2.run.run_directory import read_metrics
from tests.support import tiny


def train(directory, dataset=None, **changes):
    """Two epochs, then the page on them."""
    dataset = dataset or tiny.dataset()
    with pytest.MonkeyPatch.context() as patch:
        tiny.patch_dataset(patch, dataset)
        for module in (run_page, reconstruction):
            patch.setattr(module, "open_dataset", lambda _: dataset)
        config = tiny.replace(
            tiny.config(), **{"architecture": tiny.SMALL, "log_every": 4} | changes
        )
        loop.fit(config, directory, devices=jax.devices()[:1], tensorboard=True)
        run_page.write_page(directory)
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "a <run>")


class Parser(HTMLParser):
    """All that a page shows and asks for."""

    def __init__(self):
        super().__init__()
        self.sources, self.open, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [attributes[n] for n in ("src", "href") if n in attributes]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(directory):
    parser = Parser()
    text = (directory / "report.html").read_text()
    parser.feed(text)
    assert parser.open == []
    return text, parser.sources, " ".join(parser.texts)


def test_a_page_needs_nothing_else(run):
    text, sources, _ = read(run)
    assert sources
    assert all(re.match("data:image/(png|svg.xml);base64,", x) for x in sources)
    assert "<script" not in text
    assert "http" not in re.sub(r'src="data:[^"]*"', "", text)


def test_a_page_says_what_the_run_found(run):
    _, sources, words = read(run)
    last = read_metrics(run)[-1]
    assert f"Test accuracy {last['accuracy']:.2%} (23 images)" in words
    assert "a <run>" in words
    for part in ("Training", "Classes", "Calibration", "Most confident errors", "Net"):
        assert part in words
    wrong = 23 - round(last["accuracy"] * 23)
    pictures = [x for x in sources if x.startswith("data:image/png")]
    assert len(pictures) == min(wrong, run_page.MISTAKES) > 0
    assert '"commit"' in words
    assert '"batch_size": 8' in words


def test_its_numbers_are_those_of_every_test_image(run):
    dataset = tiny.dataset()
    net = run_page.restore(run)
    split = dataset.splits["test"]
    probabilities, labels = run_page.predict_split(net, split)
    np.testing.assert_array_equal(labels, split.label)
    expected = Predictor.find(run)(split.image)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)
    correct = (probabilities.argmax(1) == labels).mean()
    assert correct == pytest.approx(read_metrics(run)[-1]["accuracy"])


def test_the_same_run_gives_the_same_bytes(run, monkeypatch):
    before = (run / "report.html").read_bytes()
    monkeypatch.setattr(run_page, "open_dataset", lambda _: tiny.dataset())
    assert tools.main(["report", str(run)]) == 0
    assert (run / "report.html").read_bytes() == before


def test_many_classes_are_a_list(run, monkeypatch):
    monkeypatch.setattr(run_page, "MATRIX", 3)
    monkeypatch.setattr(run_page, "open_dataset", lambda _: tiny.dataset())
    copy = run.with_name("many")
    shutil.copytree(run, copy)
    run_page.write_page(copy)
    assert "true class predicted class images" in " ".join(read(copy)[2].split())


HOSTILE = ("$x_{$", "caf\udce9", "\x1b[31m<b>", "漢字 [red]:cat:")
SHOWN = ("$x_{$", "caf\\udce9", "\\x1b[31m<b>", "漢字 [red]:cat:")
"""Names of classes and runs: a formula, a byte that is no UTF-8, an escape sequence,
characters that matplotlib's own font lacks, markup and an emoji's code."""


def test_names_are_shown_as_they_are(run, tmp_path, monkeypatch):
    copy = tmp_path / "漢字 $x_{$"
    shutil.copytree(run, copy)
    summary = json.loads((copy / "dataset.json").read_text())
    summary["class_names"] = HOSTILE
    (copy / "dataset.json").write_text(json.dumps(summary))
    monkeypatch.setattr(run_page, "open_dataset", lambda _: tiny.dataset())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_page.write_page(copy)
        record = compare_runs.read_run(copy)
        picture = compare_runs.draw_runs([record])
    assert picture.startswith(b"\x89PNG")
    _, sources, words = read(copy)
    drawings = [
        " ".join(ElementTree.fromstring(base64.b64decode(x.split(",")[1])).itertext())
        for x in sources
        if x.startswith("data:image/svg")
    ]
    for name in SHOWN:
        assert name in words
        assert any(name in drawing for drawing in drawings)
    assert copy.name in words


def test_a_matplotlibrc_changes_no_figure(run):
    record = compare_runs.read_run(run)
    expected = compare_runs.draw_runs([record])
    with mpl.rc_context({"text.usetex": True, "font.size": 30}):
        assert compare_runs.draw_runs([record]) == expected


def test_a_backend_that_is_none_draws_all_the_same():
    code = (
        "from flax_resnetv2.reports import formats\n"
        "with formats.plain_style():\n"
        "    print(len(formats.encode(formats.new_figure(1, 1), 'png')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MPLBACKEND": "nonsense"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert int(done.stdout) > 100, done.stderr


def test_an_autoencoder_has_its_images_in_the_page(tmp_path):
    net = tiny.replace(tiny.SMALL, head="latent", latent=4)
    _, sources, words = read(train(tmp_path / "encoder", architecture=net))
    assert "Reconstructions" in words
    assert "Classes" not in words
    assert "Test squared error" in words
    assert sum(x.startswith("data:image/png") for x in sources) == 1


def test_a_page_that_cannot_be_made_fails_no_run(tmp_path, monkeypatch, capsys):
    result = {"accuracy": 0.5, "count": 2, "seconds": 1.0}
    monkeypatch.setattr(loop, "fit", lambda *_, **__: result)
    assert train_command.main(["quickstart", "--workdir", str(tmp_path / "none")]) == 0
    out, err = capsys.readouterr()
    assert "test accuracy 0.5000 of 2 images" in out
    assert f"report.html was not written (UsageError: {tmp_path}/none is" in err
    assert err.count("\n") == 1
    words = ["quickstart", "--workdir", str(tmp_path / "none"), "--no-report"]
    assert train_command.main(words) == 0
    assert capsys.readouterr().err == ""


# Side by side


def test_runs_are_laid_side_by_side(run, tmp_path, capsys):
    other = tmp_path / "other|run"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    config["seed"] = 7
    (other / "config.json").write_text(json.dumps(config))
    picture = tmp_path / "curves.png"
    words = ["compare", str(run), str(other), "--png", str(picture)]
    assert tools.main(words) == 0
    head, _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert [len(x.split(" | ")) for x in (head, first, second)] == [9, 9, 9]
    assert "(reference)" in first
    assert "seed: 0 -> 7" in second
    last = read_metrics(run)[-1]
    low, high = scores.wilson(last["accuracy"] * 23, 23)
    score = f"{last['accuracy']:.2%} ({100 * low:.2f} to {100 * high:.2f})"
    assert score in first
    assert score in second
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert compare_runs.draw_runs([compare_runs.read_run(run)]).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no run given; name run directories"),
        ("nowhere", "nowhere is not a run directory"),
        ("RUN --png no/such.png", "png=no/such.png cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_refused(run, words, message, capsys):
    arguments = [str(run) if word == "RUN" else word for word in words.split()]
    assert tools.main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err


# TensorBoard


def events(directory):
    """The numbers in TensorBoard's files: {(name, step): value}."""
    found = {}
    for path in directory.glob("events.*"):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            for value in event.summary.value:
                assert (value.tag, event.step) not in found
                found[value.tag, event.step] = value.simple_value
            at += 16 + length
    return found


def test_tensorboard_has_every_number_once(run):
    found = events(run / "tensorboard")
    lines = read_metrics(run)
    for line in lines:
        split, step = line["split"], line["step"]
        for name in ("loss", "accuracy", "seconds"):
            assert found.pop((f"{split}/{name}", step)) == pytest.approx(line[name])
    ratio = [x for x in lines if x["split"] == "test"][-1]["residual_ratio"]["stack2"]
    assert found["test/residual_ratio/stack2/unit1", 12] == pytest.approx(ratio[0])
    assert found["train/gradient_norm/stem", 12] > 0


def test_a_run_that_goes_on_has_each_step_once_there_too(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints/12")
    train(again)
    assert events(again / "tensorboard").keys() == events(run / "tensorboard").keys()


# Numbers


@pytest.mark.parametrize(("correct", "count"), [(0, 5), (5, 5), (8646, 10_000), (3, 7)])
def test_the_interval_is_wilsons(correct, count):
    expected = stats.binomtest(correct, count).proportion_ci(0.95, "wilson")
    assert scores.wilson(correct, count) == pytest.approx(tuple(expected), abs=1e-6)


def test_confusions_are_counted():
    probabilities = np.eye(3)[[0, 1, 1, 2, 0]]
    labels = np.array([0, 1, 2, 2, 1])
    expected = [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    np.testing.assert_array_equal(scores.confusion(probabilities, labels), expected)


def test_calibration_is_the_mean_difference_over_the_images():
    # Two bins: two images at 0.6 of which one is right, two at 0.9, both right.
    sure = np.array([0.6, 0.6, 0.9, 0.9])
    probabilities = np.stack([sure, 1 - sure], axis=1)
    found = scores.calibration(probabilities, np.array([0, 1, 0, 0]), bins=10)
    assert found.error == pytest.approx((2 * 0.1 + 2 * 0.1) / 4)
    assert found.images.tolist() == [0, 0, 0, 0, 0, 0, 2, 0, 0, 2]
    assert found.accuracy[6] == 0.5
    assert np.isnan(found.accuracy[0])


def test_the_most_confident_errors_come_first():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])
    labels = np.array([0, 0, 0, 1])
    assert scores.worst(probabilities, labels, 2).tolist() == [2, 3]


def test_pictures_hold_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 1), dtype=np.uint8)
    image = run_page._image(to_png(pixels), "noise")
    content = base64.b64decode(image.partition(",")[2].partition('"')[0])
    found = np.asarray(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(found, pixels[..., 0])


@pytest.mark.parametrize(
    ("target", "held_out", "words"),
    [
        (None, 0, "Nothing was selected on the test images."),
        (0.9, 0, "end at 90.00% on these images, so this result was selected on them."),
        (0.9, 10, "set to end at 90.00% on held-out validation images."),
    ],
)
def test_a_card_says_what_its_result_was_selected_by(target, held_out, words):
    net = modelfile.load(modelfile.locate("cifar10-resnet20"))
    data = replace(net.config.data, validation=held_out)
    changed = replace(net.config, target_accuracy=target, data=data)
    assert words in modelcard.card(net._replace(config=changed), "x")


def test_parameters_of_an_autoencoder_have_the_decoder():
    config = RECIPES["quickstart-vae"].config
    config = validate.fill_in_classes(config, describe(config.data))
    net = create_net(config, (32, 32, 3))
    shapes = jax.eval_shape(
        lambda: net.init(jax.random.key(0), jnp.zeros([1, 32, 32, 3]), train=False)
    )
    total = sum(x.size for x in jax.tree.leaves(shapes["params"]))
    assert count_parameters(config, (32, 32, 3)) == total
