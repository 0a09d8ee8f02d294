"""Whole runs on tiny data: how to start and stop them, and what they leave."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from flax_resnetv2.data.batch import Split
from flax_resnetv2.run import loop, trainer
from flax_resnetv2.system import signals
from flax_resnetv2.training import optimizers, step
from tests.support import tiny

TIMES = {"seconds", "images_per_second"}


def data(train=50, validation=0, test=23):
    whole = tiny.dataset(train + validation, test)
    images = whole.splits["train"]
    splits = {**whole.splits, "train": Split(*(x[:train] for x in images))}
    if validation:
        splits["validation"] = Split(*(x[train:] for x in images))
    return replace(whole, splits=splits)


def configuration(**train):
    return replace(tiny.config(**train), architecture=tiny.SMALL)


CONFIG = replace(configuration(ema_decay=0.9), log_every=4)
"""Two epochs of six steps, with a line every four."""
EVERY_5 = replace(CONFIG, checkpoint_steps=5, keep_checkpoints=9)
VALIDATED = data(validation=9)


def ready_state(model, train, key, image_shape, steps_per_epoch, _):
    """``create_train_state`` with constants, which need no compilation."""
    dtype = jax.numpy.dtype(model.execution.param_dtype)
    variables = jax.tree.map(lambda x: x.astype(dtype), tiny.variables_of(model))
    optimizer = optimizers.make_optimizer(train, steps_per_epoch)
    return step.TrainState(
        jax.numpy.int32(0),
        *(variables["params"], variables["batch_stats"]),
        optimizer.init(variables["params"]),
        jax.tree.map(jax.numpy.copy, variables) if train.ema_decay else None,
    )


def run_fit(directory, config, devices=2, dataset=None, create=None, profile=None):
    """Run ``fit`` on a data set in memory; return result, lines and last state."""
    dataset, states, evaluate = dataset or data(), [], loop._Training._evaluate

    def keep(self, *rest):
        states.append(jax.tree.map(shards, self.state))
        return evaluate(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        tiny.patch_dataset(patch, dataset)
        patch.setattr(loop._Training, "_evaluate", keep)
        if create:
            patch.setattr(trainer, "create_train_state", create)
        result = loop.fit(
            config, directory, devices=jax.devices()[:devices], profile=profile
        )
    return result, lines_of(directory), states[-1] if states else None


def stop_after(monkeypatch, steps):
    """Simulate a signal after this many steps of this process."""

    class Stop(signals.Stop):
        count = 0

        def listen(self):
            self.count += 1
            if self.count == steps:
                self.requested = "SIGTERM"

    monkeypatch.setattr(loop, "Stop", Stop)


class Chunked(trainer.Trainer):
    """A trainer that does several steps at once, as on accelerators."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        assert self.one_by_one
        self.one_by_one = False


def shards(leaf):
    """Return each device's copy of an array."""
    return [np.asarray(shard.data) for shard in leaf.addressable_shards]


def differing(state):
    """Return the paths of arrays that differ in any bit between devices."""
    leaves = jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, list))
    return [
        jax.tree_util.keystr(path)
        for path, (first, *others) in leaves
        if any(first.tobytes() != other.tobytes() for other in others)
    ]


def lines_of(directory):
    text = (directory / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def untimed(lines):
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def losses(lines):
    return [line["loss"] for line in lines if line["split"] == "train"]
