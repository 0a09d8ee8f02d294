"""A trained run names new images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from flax_resnetv2 import Checkpointer, Predictor, UsageError, cli, create_model, loop
from flax_resnetv2.rundir import load_config
from tests import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run with moving averages, trained for one epoch."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "open_dataset", lambda _: tiny.dataset())
        config = tiny.replace(
            tiny.config(epochs=1, ema=0.5), architecture=tiny.SMALL, log_every=100
        )
        loop.fit(config, directory, devices=jax.devices()[:1])
    return directory


def test_probabilities_are_those_of_the_averaged_net(run):
    images = tiny.dataset().splits["test"].image[:5]
    config = load_config(run)
    model = create_model(config.architecture)
    predictor = Predictor.from_run(run)
    probabilities = predictor(images)
    assert probabilities.shape == (5, 4)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    pixels = (images / 255 - np.array(config.augment.mean)) / np.array(
        config.augment.std
    )
    with Checkpointer(run / "checkpoints") as checkpoints:
        saved = checkpoints._manager.restore(checkpoints.latest())["state"]
    logits = model.apply(saved["ema"], jnp.asarray(pixels, jnp.float32), train=False)
    np.testing.assert_allclose(probabilities, jax.nn.softmax(logits), rtol=1e-3)


def test_the_command_names_files_of_any_size(run, tmp_path, capsys):
    path = tmp_path / "a.png"
    Image.new("L", (31, 17), 200).save(path)
    assert cli.predict([str(run), str(path), "--top", "2"]) == 0
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{path}: ")
    assert line.count("%") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/no/such", "a.png"], "/no/such is not a run directory"),
        (["RUN", "/no/such.png"], "/no/such.png cannot be read"),
        (["RUN", "NOT"], "is not an image"),
        (["RUN"], "no image given"),
    ],
)
def test_bad_use_is_one_line_and_exit_code_2(run, tmp_path, capsys, words, message):
    (tmp_path / "text").write_text("hello")
    names = {"RUN": str(run), "NOT": str(tmp_path / "text")}
    assert cli.predict([names.get(word, word) for word in words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_images_of_another_shape_are_refused(run):
    predictor = Predictor.from_run(run)
    with pytest.raises(UsageError, match=r"uint8 \['N', 8, 8, 3\]; got float32"):
        predictor(np.zeros((1, 9, 8, 3), np.float32))


def test_a_run_without_a_checkpoint_is_refused(run, tmp_path):
    for name in ("config.json", "dataset.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with pytest.raises(UsageError, match="holds no checkpoint yet"):
        Predictor.from_run(tmp_path)
