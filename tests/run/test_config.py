"""Recipes, their JSON form, and what is refused."""

import json
import re
from dataclasses import replace

import pytest

from flax_resnetv2 import (
    PRESETS,
    RECIPES,
    Architecture,
    Config,
    Execution,
    UsageError,
    plan,
)
from flax_resnetv2.data.catalog import DATASETS
from flax_resnetv2.data.datasets import known_shape
from flax_resnetv2.run.config import check_config, differences, from_json, to_json
from flax_resnetv2.training.augment import AugmentConfig


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_sound_and_survives_json(name):
    config = RECIPES[name].config
    check_config(config)
    architecture = config.architecture
    # Only some recipes leave the number to their data set, which need not be here.
    plan(replace(architecture, num_classes=5), known_shape(config.data))
    assert from_json(to_json(config)) == config
    assert RECIPES[name].description


def test_every_preset_of_ten_classes_has_a_recipe():
    ten = {n for n, p in PRESETS.items() if p.architecture.num_classes == 10}
    others = "transfer|autoencoder|vae|fast|accurate|cpu-hour"
    scratch = {n for n in RECIPES if re.match(f"cifar10-(?!{others})", n)}
    trained = {re.sub("-(paper|book|adamw)$", "", name) for name in scratch}
    assert trained == {f"cifar10-{name}" for name in ten}


def test_every_data_set_has_a_recipe():
    assert {recipe.config.data.name for recipe in RECIPES.values()} == {
        *DATASETS,
        "imagenet2012",
        "folder:images",
    }


def test_uneven_fields_survive_json():
    architecture = Architecture(
        reduction=("previous", 2, 4), bridge=(True, False, True)
    )
    config = Config(architecture=architecture, augment=AugmentConfig(mean=(0.1, 0.2)))
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(color=1), r"unknown field 'color' .* architecture"),
        (
            lambda d: d["train"].update(lr=1),
            r"unknown field 'train.lr' .* momentum",
        ),
        (lambda d: d.update(schema=99), r"schema=99 .* reads only 2"),
    ],
)
def test_a_file_from_elsewhere_is_refused(change, message):
    values = json.loads(to_json(Config()))
    change(values)
    with pytest.raises(UsageError, match=message):
        from_json(json.dumps(values))


def test_what_is_not_json_is_refused():
    with pytest.raises(UsageError, match="not a configuration in JSON"):
        from_json("{")


def test_differences_are_named():
    old = Config()
    new = replace(old, seed=4, train=replace(old.train, epochs=3))
    assert list(differences(old, new).values()) == [
        "train.epochs: 200 -> 3",
        "seed: 0 -> 4",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, r"seed=-1 must be .* from 0"),
        ({"log_every": 0}, r"log_every=0 must be .* from 1"),
        ({"keep_checkpoints": 0}, r"keep_checkpoints=0 must be .* from 1"),
        (
            {"augment": AugmentConfig(crop_padding=-1)},
            r"crop_padding=-1 must .* 0 to 32",
        ),
        (
            {"augment": AugmentConfig(mean=(0.5,))},
            r"mean=\(0.5,\) and augment.std=None",
        ),
        (
            {"augment": AugmentConfig(mean=(0.5, 0.5), std=(0.2, 0.2))},
            r"augment.mean=\(0.5, 0.5\) must be 3 numbers, one for each channel",
        ),
        (
            {"augment": AugmentConfig(mean=(0.5,) * 3, std=(0.2, 0.0, 0.2))},
            r"augment.std=\(0.2, 0.0, 0.2\) must .* from 1e-06",
        ),
        (
            {"execution": Execution(batch_norm_axis="i")},
            r"execution.batch_norm_axis='i' is set by fit; .*no-sync-batch-norm",
        ),
        (
            {"architecture": Architecture(head="none")},
            r"head='none' returns feature maps",
        ),
    ],
)
def test_a_field_out_of_range_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        check_config(Config(**changes))
