"""The examples of docs/weights.md, run as they stand there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from flax_resnetv2 import create_model, from_timm
from tests.support import peers

TEXT = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What is defined after the examples, in a directory with the file they read."""
    directory = tmp_path_factory.mktemp("weights")
    tensors = {
        name: peers.fill(name, shape).astype("float32")
        for name, shape in peers.shapes("timm-resnetv2-18").items()
    }
    file = directory / "resnetv2_18.safetensors"
    save_file(tensors, file)
    rng = np.random.default_rng(0)
    names = {
        "images": jnp.asarray(rng.normal(size=(6, 32, 32, 3)), "float32"),
        "labels": jnp.asarray([0, 1, 2, 0, 1, 2]),
        "stored": from_timm(file, create_model("timm-resnetv2-18")),
    }
    section = TEXT.split("## In your own code")[1].split("\n## ")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        assert len(blocks) == 2
        exec(blocks[0], names)
        names["optimizer_state"] = names["state"]
        exec(blocks[1], names)
    return names


def test_features_have_the_shape_that_is_said(names):
    assert names["features"].shape == (6, 4, 4, 128)


def test_a_frozen_backbone_stays_and_the_head_learns(names):
    params, state, values = names["params"], names["optimizer_state"], []
    for _ in range(20):
        params, state, value = names["step"](params, state)
        values.append(float(value))
    assert values[-1] < 0.7 * values[0]
    classifier = params["head"].pop("classifier")["kernel"]
    assert not np.array_equal(
        classifier, names["variables"]["params"]["head"]["classifier"]["kernel"]
    )
    stored = dict(names["stored"]["params"])
    stored["head"] = {"norm": stored["head"]["norm"]}
    jax.tree.map(np.testing.assert_array_equal, params, stored)


def test_nnx_computes_the_same(names):
    expected = names["model"].apply(names["variables"], names["images"], train=False)
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-4, atol=1e-4)
