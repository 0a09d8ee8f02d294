"""A run that starts from weights of others."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from flax_resnetv2 import (
    NORMALIZATION,
    TIMM,
    Predictor,
    UsageError,
    create_model,
    from_file,
    to_timm,
)
from flax_resnetv2.cli import train as train_command
from flax_resnetv2.data.datasets import DataConfig
from flax_resnetv2.run import loop, validate
from flax_resnetv2.run.recipes import RECIPES
from flax_resnetv2.run.run_directory import load_config
from flax_resnetv2.training import step
from flax_resnetv2.training.random_streams import initial_key
from tests.support import tiny

NET = replace(tiny.SMALL, semantics=TIMM, stem_kernel=7, stem_stride=2, stem_pool=True)
CLASSIFIER = ("params", "head", "classifier")


@pytest.fixture
def start(tmp_path):
    """A file of a net with seven classes, and its variables."""
    model = create_model(replace(NET, num_classes=7))
    variables = tiny.variables_of(model)
    save_file(to_timm(variables, model), tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors", variables


def config(path, **train):
    base = tiny.config(**train)
    augment = replace(base.augment, resize=16)
    return replace(base, architecture=NET, augment=augment, weights=str(path))


def fit(monkeypatch, config, workdir):
    """Run ``fit``; give the variables that the run ends with."""
    states, save = [], loop.Checkpointer.save

    def keep(self, step, state, *rest):
        states.append(flatten_dict(jax.device_get(state.variables())))
        save(self, step, state, *rest)

    with monkeypatch.context() as patch:
        tiny.patch_dataset(patch, tiny.dataset())
        patch.setattr(loop.Checkpointer, "save", keep)
        loop.fit(config, workdir, devices=jax.devices()[:1])
    return states[-1] if states else None


def test_a_classifier_learns_on_a_backbone_that_stays(start, monkeypatch, tmp_path):
    path, came = start
    run = config(path, trainable="classifier", weight_decay=0.1)
    ended = fit(monkeypatch, run, tmp_path / "a")
    came = flatten_dict(came)
    assert ended.keys() == came.keys()
    for leaf, array in came.items():
        if leaf[:3] != CLASSIFIER:
            np.testing.assert_array_equal(ended[leaf], array, err_msg=leaf)
    # The classifier begins as the seed draws it, and moves.
    model = create_model(NET)
    drawn = from_file(path, model, classifier="leave", key=initial_key(run.seed))
    kernel = drawn["params"]["head"]["classifier"]["kernel"]
    assert ended[(*CLASSIFIER, "kernel")].shape == kernel.shape == (8, 4)
    assert np.abs(ended[(*CLASSIFIER, "kernel")] - kernel).max() > 1e-3
    # Only what learns has a momentum.
    shapes = step.train_state_shapes(model, run.train, (16, 16, 3))
    assert sum(x.size for x in jax.tree.leaves(shapes.opt_state)) < 100


def test_all_learns_from_the_weights(start, monkeypatch, tmp_path):
    path, came = start
    slow = config(path, learning_rate=1e-6)
    ended = fit(monkeypatch, slow, tmp_path / "a")
    kernel = ("params", "stem", "conv", "kernel")
    moved = np.abs(ended[kernel] - flatten_dict(came)[kernel]).max()
    assert 0 < moved < 1e-3
    statistic = ("batch_stats", "head", "norm", "mean")
    assert (ended[statistic] != flatten_dict(came)[statistic]).all()


def test_the_images_are_those_of_the_weights(start, monkeypatch, tmp_path):
    run = config(start[0], epochs=1)
    fit(monkeypatch, run, tmp_path / "a")
    stored = load_config(tmp_path / "a").augment
    assert (stored.mean, stored.std) == (NORMALIZATION.mean, NORMALIZATION.std)
    predictor = Predictor.find(tmp_path / "a")
    images = tiny.dataset().splits["test"].image
    assert predictor(images).shape == (len(images), 4)


def test_a_run_resumes_without_the_file(start, monkeypatch, tmp_path):
    path, _ = start
    whole = fit(monkeypatch, config(path), tmp_path / "whole")
    with monkeypatch.context() as patch:
        # Stopped after the first of two epochs.
        evaluate = loop._Training._evaluate

        def stop(self, *rest):
            if self.done > self.trainer.steps_per_epoch:
                raise KeyboardInterrupt
            return evaluate(self, *rest)

        patch.setattr(loop._Training, "_evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(monkeypatch, config(path), tmp_path / "a")
    path.unlink()
    resumed = fit(monkeypatch, config(path), tmp_path / "a")
    for leaf, array in whole.items():
        np.testing.assert_array_equal(resumed[leaf], array, err_msg=leaf)


def test_a_file_that_is_not_there_is_named_before_anything_is_made(tmp_path):
    missing = tmp_path / "none.npz"
    with pytest.raises(
        UsageError, match=r"^weights=.*none\.npz cannot be opened.*FILE$"
    ):
        loop.fit(config(missing), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", [n for n in RECIPES if "transfer" in n])
def test_the_recipes_ask_for_the_published_file(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_command.main([name]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert RECIPES[name].config.weights in said
    assert not list(tmp_path.iterdir())


def test_weights_are_for_images_of_three_channels(start, tmp_path):
    run = replace(config(start[0]), data=DataConfig(name="mnist"))
    with pytest.raises(
        UsageError,
        match=r"x\.safetensors are for images of 3 channels, and those of mnist have 1",
    ):
        validate.validate(run, tmp_path / "run", 1, None)
    assert not (tmp_path / "run").exists()
