"""The steps leave Python: they lower for every platform."""

import jax
import numpy as np
import pytest

from flax_resnetv2 import TrainConfig, create_model, make_eval_step, make_train_step
from tests.support import tiny
from tests.training.test_step import PIXELS, batch_of, state_of

PLATFORMS = ("cpu", "cuda", "tpu")


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_the_steps_lower_for_cpu_cuda_and_tpu(kind):
    model = create_model(tiny.NET)
    config = TrainConfig(epochs=1, schedule="constant")
    state, batch = state_of(model, config), batch_of(4)
    if kind == "train":
        made = make_train_step(model, config, PIXELS, seed=0, steps_per_epoch=10)
        step, first = lambda params, batch: made(
            state.replace(params=params), batch
        )[1], state.params  # fmt: skip
    else:
        step, first = make_eval_step(model, PIXELS), state.variables()
    exported = jax.export.export(jax.jit(step), platforms=PLATFORMS)(first, batch)
    assert exported.platforms == PLATFORMS
    metrics, expected = exported.call(first, batch), jax.jit(step)(first, batch)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    assert int(metrics["count"]) == 4
