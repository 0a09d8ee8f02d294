"""The accuracy of a linear model on the drawn shapes: softmax regression.

    python -m benchmarks.linear_baseline

Trains by L-BFGS on the normalized pixels of the whole training split until the loss
falls by less than 0.001 nats in 20 iterations, and adds one line to
``benchmarks/results/``.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import RESULTS, append, provenance

WINDOW = 20
"""Iterations over which the fall of the loss is measured."""
FLAT = 1e-3
"""Training ends when the loss falls by less than this in a window, in nats."""


def softmax_regression(
    train_images: np.ndarray,
    train_labels: np.ndarray,
    test_images: np.ndarray,
    test_labels: np.ndarray,
    most: int = 1000,
) -> dict[str, float]:
    """Fit logits linear in the pixels, images uint8 [N, H, W, C], labels [N].

    Returns:
        Final accuracies on both splits, the best test accuracy during training,
        iterations, the loss, and its fall in the last window.
    """
    mean, std = train_images.mean((0, 1, 2)), train_images.std((0, 1, 2))

    def flat(images: np.ndarray) -> jax.Array:
        pixels = (images - mean) / std
        return jnp.asarray(pixels.reshape(len(images), -1), jnp.float32)

    x, y, tx = flat(train_images), jnp.asarray(train_labels), flat(test_images)
    ty, classes = jnp.asarray(test_labels), int(train_labels.max()) + 1

    def logits(params: dict, x: jax.Array) -> jax.Array:
        return x @ params["kernel"] + params["bias"][None]

    def loss(params: dict) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
        return losses.mean()

    optimizer = optax.lbfgs()

    @jax.jit
    def iterate(params: dict, state: optax.OptState) -> tuple:
        value, gradient = optax.value_and_grad_from_state(loss)(params, state=state)
        updates, state = optimizer.update(
            gradient, state, params, value=value, grad=gradient, value_fn=loss
        )
        params = optax.apply_updates(params, updates)
        right = logits(params, tx).argmax(-1) == ty
        return params, state, value, right.mean()

    params = {
        "kernel": jnp.zeros([x.shape[1], classes]),
        "bias": jnp.zeros([classes]),
    }
    state, losses, best = optimizer.init(params), [], 0.0
    change = float("inf")
    while len(losses) < most:
        params, state, value, accuracy = iterate(params, state)
        losses.append(float(value))
        best = max(best, float(accuracy))
        if len(losses) > WINDOW:
            change = losses[-1 - WINDOW] - losses[-1]
            if change < FLAT:
                break
    return {
        "train_accuracy": float((logits(params, x).argmax(-1) == y).mean()),
        "test_accuracy": float(accuracy),
        "best_test_accuracy": best,
        "iterations": len(losses),
        "train_loss": losses[-1],
        "fall_in_last_window": change,
    }


def main() -> None:
    """Measure it on the embedded data set; add a row to ``results/``, and print it."""
    from flax_resnetv2.data import shapes

    began = time.perf_counter()
    result = softmax_regression(
        *shapes.draw_shapes("train"), *shapes.draw_shapes("test")
    )
    seconds = round(time.perf_counter() - began, 1)
    about = {"benchmark": "linear_baseline", "dataset": shapes.NAME}
    row = {**about, **result, "seconds": seconds, **provenance()}
    append(RESULTS / "linear_baseline.jsonl", row)


if __name__ == "__main__":
    main()
