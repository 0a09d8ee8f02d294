"""Run Keras's own nets, and keep what the tests compare with.

    pip install 'keras>=3.15,<4'
    python -m tests.support.peers.make_keras

Writes for each preset NAME.json (tensors and shapes) and, for the shallowest and the
deepest, NAME.npz: for each size of images "stack1" ... "stack4" (``sample`` of the last
unit's maps), their "std", and "logits"; for the shallowest also one training step at
64x64: the moving statistics after it and the gradient of mean(logits^2), a ``digest``
of each tensor.

Everything in float64. Keras 3 casts batch normalization and means to float32 even then
(its promotion of "float64" with "float32" gives "float32"): ``result_type`` is mended
here first. Agreement to 1e-9 with another implementation shows that nothing else is in
float32: unmended, logits are 7e-7 apart.
"""

import json
import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["JAX_ENABLE_X64"] = "1"

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras.src import backend
from keras.src.backend.common import dtypes
from keras.src.layers.normalization import batch_normalization

from tests.support import peers

NETS = {
    "keras-resnet50v2": "ResNet50V2",
    "keras-resnet101v2": "ResNet101V2",
    "keras-resnet152v2": "ResNet152V2",
}
SHALLOWEST, DEEPEST = "keras-resnet50v2", "keras-resnet152v2"


def mend_promotion() -> None:
    """Have Keras compute in float64 what is float64."""
    plain = dtypes.result_type

    def result_type(*kinds: object) -> str:
        return "float64" if "float64" in map(str, kinds) else plain(*kinds)

    class Backend:
        def __getattr__(self, name: str) -> object:
            return result_type if name == "result_type" else getattr(backend, name)

    dtypes.result_type = result_type
    batch_normalization.backend = Backend()


def digest(tensor: object) -> np.ndarray:
    """Norm, first and last number."""
    flat = np.asarray(tensor, np.float64).ravel()
    return np.asarray([np.linalg.norm(flat), flat[0], flat[-1]])


def main() -> None:
    """Write all files."""
    mend_promotion()
    keras.backend.set_floatx("float64")
    for preset, name in NETS.items():
        kept = {}
        for side in peers.SIDES:
            keras.utils.clear_session()
            model = getattr(keras.applications, name)(
                weights=None, input_shape=(side, side, 3), classifier_activation=None
            )
            shapes = {}
            for layer in model.layers:
                for variable in layer.weights:
                    key = f"{layer.name}/{variable.name}"
                    shapes[key] = list(variable.shape)
                    variable.assign(peers.fill(key, variable.shape))
            last = {}
            for layer in model.layers:
                if layer.name.endswith("_out"):
                    last[layer.name.split("_")[0]] = layer.output
            probe = keras.Model(model.input, [*last.values(), model.output])
            *stacks, logits = probe(peers.images(side), training=False)
            for number, maps in enumerate(stacks, start=1):
                kept[f"{side}/stack{number}"] = peers.sample(maps)
                kept[f"{side}/stack{number}/std"] = np.std(np.asarray(maps))
            kept[f"{side}/logits"] = np.asarray(logits)
            if preset == SHALLOWEST and side == peers.SIDES[0]:
                kept |= train_once(model, side)
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in shapes.items()]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        (peers.HERE / f"{preset}.json").write_text(text)
        if preset in (SHALLOWEST, DEEPEST):
            np.savez_compressed(peers.HERE / f"{preset}.npz", **kept)
        print(preset, "written")


def train_once(model: keras.Model, side: int) -> dict[str, np.ndarray]:
    """Moving statistics after one step in training mode, and one gradient."""
    trainable = [v.value for v in model.trainable_variables]
    rest = [v.value for v in model.non_trainable_variables]

    def loss(trainable: list) -> tuple:
        logits, rest_now = model.stateless_call(
            trainable, rest, jnp.asarray(peers.images(side)), training=True
        )
        return jnp.square(logits).mean(), rest_now

    gradient, statistics = jax.grad(loss, has_aux=True)(trainable)
    names = {
        id(variable): f"{layer.name}/{variable.name}"
        for layer in model.layers
        for variable in layer.weights
    }
    pairs = [*zip(model.trainable_variables, gradient, strict=True)]
    kept = {f"gradient/{names[id(v)]}": digest(g) for v, g in pairs}
    pairs = [*zip(model.non_trainable_variables, statistics, strict=True)]
    return kept | {f"statistics/{names[id(v)]}": digest(s) for v, s in pairs}


if __name__ == "__main__":
    main()
