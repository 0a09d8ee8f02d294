"""ONNX graphs, by ONNX Runtime: needs what ``export.INSTALL`` says, and onnxruntime.

Not among the tests that everybody runs, for jax2onnx stands in no requirements file:
``python -m pytest tests/inference/onnx_export.py``, as CI does.
"""

import numpy as np
import onnxruntime
import pytest

from flax_resnetv2 import Predictor
from flax_resnetv2.cli import tools
from tests.inference.test_predict_files import encoder, run  # noqa: F401  fixtures
from tests.support import tiny


@pytest.mark.parametrize("kind", ["run", "encoder"])
def test_a_graph_computes_what_the_net_computes(kind, request, tmp_path):
    directory = request.getfixturevalue(kind)
    path = tmp_path / "net.onnx"
    assert tools.main(["export", str(directory), "--to", str(path)]) == 0
    session = onnxruntime.InferenceSession(path)
    images = tiny.dataset().splits["test"].image[:6]
    probabilities, latents = Predictor.find(directory).predict(images)
    expected = latents if probabilities is None else probabilities
    for part in (slice(0, 1), slice(0, 6)):
        (found,) = session.run(None, {"images": images[part]})
        np.testing.assert_allclose(found, expected[part], rtol=1e-4, atol=1e-5)
