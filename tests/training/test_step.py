"""Schedules, optimizers, the pure step, and its equality over device counts."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_resnetv2 import (
    ARTICLE,
    BIT,
    KERAS,
    Execution,
    Predictor,
    TrainConfig,
    TrainState,
    UsageError,
    create_model,
    create_train_state,
    make_eval_step,
    make_train_step,
)
from flax_resnetv2.data.batch import Batch
from flax_resnetv2.training import objective, optimizers, step
from flax_resnetv2.training.augment import AugmentConfig
from flax_resnetv2.training.random_streams import image_keys
from tests.support import tiny

PIXELS = AugmentConfig(crop_padding=1, mean=(0.5,) * 3, std=(0.25,) * 3)
PLAIN = replace(PIXELS, crop_padding=0, flip=False)


def batch_of(count, seed=0, padding=0):
    rng = np.random.default_rng(seed)
    return Batch(
        jnp.asarray(rng.integers(0, 256, (count, *tiny.SHAPE), dtype=np.uint8)),
        jnp.asarray(rng.integers(0, 4, count, dtype=np.int32)),
        jnp.arange(count) < count - padding,
    )


def state_of(model, config):
    """A state with parameters unlike their start."""
    state = create_train_state(model, config, jax.random.key(0), tiny.SHAPE, 10)
    variables = tiny.variables_of(model)
    averages = None if state.ema is None else jax.tree.map(jnp.copy, variables)
    return state.replace(
        params=variables["params"], batch_stats=variables["batch_stats"], ema=averages
    )


@pytest.fixture(scope="module")
def model():
    return create_model(tiny.NET)


def sums_of(logits, target, batch):
    """Return the loss and the number of correct answers of a classification."""
    classification = objective.Classification(4, "float32", PLAIN)
    sums = classification.train_metrics(logits, target, batch)
    return sums["loss"], sums["correct"]


# Schedules


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"schedule": "constant"}, {0: 1.0, 99: 1.0}),
        ({"schedule": "cosine"}, {0: 1.0, 50: 0.5, 100: 0.0}),
        ({"schedule": "linear"}, {0: 1.0, 25: 0.75, 100: 0.0}),
        (
            {"schedule": "linear", "warmup_epochs": 2},
            {0: 0.0, 10: 0.5, 20: 1.0, 60: 0.5},
        ),
        ({"schedule": "cosine", "warmup_epochs": 2}, {10: 0.5, 20: 1.0, 60: 0.5}),
        ({"schedule": "steps"}, {0: 1.0, 49: 1.0, 51: 0.1, 76: 0.01, 99: 0.01}),
        ({"schedule": "steps", "warmup_epochs": 1}, {0: 0.1, 9: 0.1, 10: 1.0}),
        (
            {"schedule": "exponential", "warmup_epochs": 2},
            {9: 1e-3, 14: 10**-1.5, 19: 1.0, 60: 1.0},
        ),
        ({"schedule": "one_cycle"}, {0: 0.04, 30: 1.0, 100: 4e-6}),
        ({"schedule": "one_cycle", "warmup_epochs": 2}, {0: 0.04, 20: 1.0}),
    ],
)
def test_schedules(changes, rates):
    config = TrainConfig(epochs=10, learning_rate=1.0, **changes)
    # optax's one-cycle schedule mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        schedule = optimizers.make_schedule(config, steps_per_epoch=10)
        for step, rate in rates.items():
            assert float(schedule(step)) == pytest.approx(rate, rel=1e-4, abs=1e-6)


# Optimizers


PARAMS = {"conv": {"kernel": np.array([1.0, -2.0]), "bias": np.array([0.5])}}
GRADIENT = {"conv": {"kernel": np.array([0.1, 0.3]), "bias": np.array([-0.2])}}


def steps_of(optimizer, gradient_of, count=3):
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for _ in range(count):
        # optax's Adam raises a float to a whole number.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient_of(params), state, params)
        params = optax.apply_updates(params, updates)
    return params["conv"]


def given(_):
    return jax.tree.map(jnp.asarray, GRADIENT)


def made(**changes):
    config = TrainConfig(
        epochs=1, schedule="constant", learning_rate=0.1, weight_decay=0.5, **changes
    )
    return optimizers.make_optimizer(config, 10)


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_is_the_textbook_one(float64, nesterov):
    w, v = PARAMS["conv"]["kernel"], np.zeros(2)
    for _ in range(3):
        g = GRADIENT["conv"]["kernel"] + 0.5 * w
        v = 0.9 * v + g
        w = w - 0.1 * (g + 0.9 * v if nesterov else v)
    ours = steps_of(made(nesterov=nesterov), given)
    np.testing.assert_allclose(ours["kernel"], w, rtol=1e-12)


def test_adam_l2_is_adam_on_a_loss_with_the_term(float64):
    def with_term(params):
        term = jax.grad(lambda p: 0.5 / 2 * jnp.square(p["conv"]["kernel"]).sum())
        return jax.tree.map(jnp.add, given(params), term(params))

    ours = steps_of(made(optimizer="adam_l2"), given)
    explicit = steps_of(optax.adam(0.1), with_term)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), ours, explicit
    )
    decoupled = steps_of(made(optimizer="adamw"), given)
    assert not np.allclose(ours["kernel"], decoupled["kernel"])


OPTIMIZERS = ["sgd", "adamw", "adam_l2", "lars", "muon"]


def test_lars_scales_the_step_of_each_kernel(float64):
    w, b, v = PARAMS["conv"]["kernel"], PARAMS["conv"]["bias"], [np.zeros(2), 0.0]
    for _ in range(3):
        g = GRADIENT["conv"]["kernel"] + 0.5 * w
        ratio = 0.001 * np.linalg.norm(w) / np.linalg.norm(g)
        v = [
            0.9 * v[0] + 0.1 * ratio * g,
            0.9 * v[1] + 0.1 * GRADIENT["conv"]["bias"],
        ]
        w, b = w - v[0], b - v[1]
    ours = steps_of(made(optimizer="lars", nesterov=False), given)
    np.testing.assert_allclose(ours["kernel"], w, rtol=1e-12)
    np.testing.assert_allclose(ours["bias"], b, rtol=1e-12)


def test_muon_takes_orthogonal_steps_inside_and_adams_outside(float64):
    rng = np.random.default_rng(0)
    shapes = {
        "stem": (3, 3, 2, 4),
        "stack1": (3, 3, 2, 5),
        "stack2": (1, 1, 6, 12),
        "head": (6, 3),
    }
    params = {k: {"kernel": rng.normal(size=s)} for k, s in shapes.items()}
    gradient = {k: {"kernel": rng.normal(size=s)} for k, s in shapes.items()}
    params["stack1"]["bias"] = gradient["stack1"]["bias"] = np.ones(5)
    params, gradient = jax.tree.map(jnp.asarray, (params, gradient))
    optimizer = made(optimizer="muon")
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        adamw = optax.adamw(
            0.1,
            weight_decay=0.5,
            mask=lambda tree: jax.tree.map_with_path(
                lambda path, _: path[-1].key == "kernel", tree
            ),
        )
        adams, _ = adamw.update(gradient, adamw.init(params), params)
    for path in (("stem", "kernel"), ("head", "kernel"), ("stack1", "bias")):
        got, expected = (tree[path[0]][path[1]] for tree in (updates, adams))
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    for stack in ("stack1", "stack2"):
        step = updates[stack]["kernel"] + 0.1 * 0.5 * params[stack]["kernel"]
        matrix = np.asarray(step).reshape(-1, step.shape[-1])
        length = 0.1 * 0.2 * max(matrix.shape) ** 0.5
        values = np.linalg.svd(matrix, compute_uv=False) / length
        # Five iterations of Newton and Schulz come as near as this, by design.
        assert 0.6 < values.min() <= values.max() < 1.3
        g = np.asarray(gradient[stack]["kernel"]).reshape(matrix.shape)
        u, _, v = np.linalg.svd(g, full_matrices=False)
        cosine = -(matrix * (u @ v)).sum() / np.linalg.norm(matrix)
        assert cosine / len(values) ** 0.5 > 0.97
        # As long as Adam's step of about 0.1 a number.
        assert np.sqrt((matrix**2).mean()) == pytest.approx(0.1 * 0.2, rel=0.3)


@pytest.mark.parametrize(("limit", "scale"), [(100.0, 1.0), (0.1, 0.1 / 0.14**0.5)])
def test_clipping_scales_the_gradient_before_the_decay(float64, limit, scale):
    w = PARAMS["conv"]["kernel"]
    expected = w - 0.1 * (scale * GRADIENT["conv"]["kernel"] + 0.5 * w)
    ours = steps_of(made(clip_norm=limit, momentum=0.0, nesterov=False), given, count=1)
    np.testing.assert_allclose(ours["kernel"], expected, rtol=1e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_classifier_alone_learns_if_that_is_said(optimizer):
    optimizer = made(optimizer=optimizer, trainable="classifier", clip_norm=1.0)
    params = {
        "stack1": {"conv": {"kernel": jnp.ones((1, 1, 2, 2))}},
        "head": {"classifier": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
    }
    # What does not learn has no gradient (see ``make_train_step``).
    gradient = jax.tree.map(jnp.ones_like, params)
    gradient["stack1"] = jax.tree.map(jnp.zeros_like, gradient["stack1"])
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    assert not updates["stack1"]["conv"]["kernel"].any()
    assert all(leaf.all() for leaf in jax.tree.leaves(updates["head"]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_kernels_alone_decay_unless_all_is_said(optimizer):
    def nothing(params):
        return jax.tree.map(jnp.zeros_like, params)

    kernels = steps_of(made(optimizer=optimizer), nothing)
    assert np.array_equal(kernels["bias"], PARAMS["conv"]["bias"])
    assert not np.allclose(kernels["kernel"], PARAMS["conv"]["kernel"])
    everything = steps_of(made(optimizer=optimizer, decay="all"), nothing)
    assert not np.allclose(everything["bias"], PARAMS["conv"]["bias"])


# The step


def test_the_step_is_a_pure_function_of_sums(model):
    config = TrainConfig(epochs=1, schedule="constant")
    step = jax.jit(make_train_step(model, config, PIXELS, seed=0, steps_per_epoch=10))
    state, batch = state_of(model, config), batch_of(8)
    (new, metrics), (again, _) = step(state, batch), step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, new, again)
    assert int(new.step) == int(state.step) + 1
    assert int(metrics["count"]) == 8
    assert int(metrics["steps"]) == 1
    assert set(metrics["gradient_norm"]) == {"stem", "stack1", "stack2", "head"}
    assert 0 <= int(metrics["correct"]) <= 8
    assert float(metrics["loss"]) > 0


def test_a_steps_parts_called_one_by_one_are_the_step():
    """Bit for bit, with options that change each part."""
    config = TrainConfig(
        epochs=1,
        schedule="constant",
        ema_decay=0.9,
        clip_norm=1.0,
        label_smoothing=0.1,
        stochastic_depth=0.3,
    )
    pixels = replace(PIXELS, mixup=0.5, randaugment=1, cutout=2)
    model = create_model(tiny.SMALL)
    step = make_train_step(model, config, pixels, seed=3, steps_per_epoch=10)
    state, batch = state_of(model, config), batch_of(8, padding=1)
    state = state.replace(step=jnp.int32(4))
    inputs = jax.eval_shape(step.inputs, state.step, batch)
    assert inputs.images.shape == (8, *tiny.SHAPE)
    assert inputs.target.shape == (8, 4)
    assert inputs.arguments["residual_scale"].shape == (8, 2)

    @jax.jit
    def apart(state, batch):
        inputs = step.inputs(state.step, batch)
        gradient, (stats, sums) = jax.grad(step.loss, has_aux=True)(
            state.params, state.batch_stats, inputs, batch, batch.mask.sum()
        )
        return step.update(state, gradient, stats), sums

    @jax.jit
    def whole(state, batch):
        new, metrics = step(state, batch)
        return new, {name: metrics[name] for name in ("loss", "correct")}

    (new, sums), expected = apart(state, batch), whole(state, batch)
    jax.tree.map(np.testing.assert_array_equal, (new, sums), expected)
    assert int(new.step) == 5


def test_the_loss_is_the_sum_of_smoothed_cross_entropies(float64):
    logits = jnp.asarray([[1.0, 2.0, 0.0], [0.5, 0.0, 3.0], [9.0, 0.0, 0.0]])
    label = jnp.asarray([1, 0, 2])
    batch = Batch(None, label, jnp.asarray([True, True, False]))
    smoothed = objective.targets(label, 3, 0.3, "float64")
    loss, correct = sums_of(logits, smoothed, batch)
    log = np.asarray(logits) - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = np.full((3, 3), 0.1) + 0.7 * np.eye(3)[[1, 0, 2]]
    expected = -(target * log).sum(-1)[:2].sum()
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    assert int(correct) == 1


def test_several_labels_have_a_sigmoid_each(float64):
    logits = np.array([[1.0, -2.0, 0.5, 3.0], [0.1, 0.2, -0.3, 0.0], [9.0] * 4])
    label = np.array([[1, 0, 0, 1], [0, 1, 1, 1], [0] * 4], np.uint8)
    mask = np.array([True, True, False])
    batch = jax.tree.map(jnp.asarray, Batch(None, label, mask))
    target = objective.targets(batch.label, 4, 0.2, "float64")
    np.testing.assert_allclose(target, 0.1 + 0.8 * label, rtol=1e-12)
    loss, correct = sums_of(jnp.asarray(logits), target, batch)
    p = 1 / (1 + np.exp(-logits))
    t = np.asarray(target)
    terms = -(t * np.log(p) + (1 - t) * np.log(1 - p))
    assert float(loss) == pytest.approx(terms[:2].mean(1).sum(), rel=1e-12)
    # Three of four, and one of four: 0 is no yes.
    assert float(correct) == 0.75 + 0.25
    flags = batch._replace(label=batch.label.astype(bool))
    same = objective.targets(flags.label, 4, 0.2, "float64")
    assert np.array_equal(same, target)


def test_a_net_learns_several_labels():
    config = TrainConfig(epochs=9, schedule="constant", learning_rate=0.1)
    model, step, state = small_step(config)
    batch = batch_of(16)
    # Two labels stand for the class, two for halves of the classes.
    label = np.stack([np.asarray(batch.label) == k for k in (0, 1)], 1)
    halves = np.stack([np.asarray(batch.label) % 3 == k for k in (0, 1)], 1)
    label = np.concatenate([label, halves], 1).astype(np.uint8)
    batch = batch._replace(label=jnp.asarray(label))
    losses = []
    for _ in range(80):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    evaluated = make_eval_step(model, PLAIN)(state.variables(), batch)
    assert "correct_top5" not in evaluated
    assert float(evaluated["correct"] / 16) > 0.8


def test_the_five_likeliest_of_many_classes_are_counted():
    net = replace(tiny.SMALL, num_classes=100)
    model = create_model(net)
    variables, batch = tiny.variables_of(model), batch_of(16, padding=2)
    images = (batch.image.astype(jnp.float32) / 255 - 0.5) / 0.25
    logits = np.asarray(model.apply(variables, images, train=False))
    # The class of row k is its likeliest but k.
    label = np.argsort(-logits, 1)[range(16), range(16)].astype(np.int32)
    metrics = make_eval_step(model, PLAIN)(
        variables, batch._replace(label=jnp.asarray(label))
    )
    assert int(metrics["correct"]) == 1
    assert int(metrics["correct_top5"]) == 5
    masked = batch._replace(label=jnp.asarray(label), mask=jnp.arange(16) >= 2)
    assert int(make_eval_step(model, PLAIN)(variables, masked)["correct_top5"]) == 3


def test_a_mirror_image_has_half_a_say(model):
    variables, batch = tiny.variables_of(model), batch_of(12)
    images = (batch.image.astype(jnp.float32) / 255 - 0.5) / 0.25
    apply = jax.jit(partial(model.apply, train=False))
    logits = [apply(variables, x) for x in (images, images[:, :, ::-1])]
    # As a geometric mean of probabilities.
    p = np.sqrt(np.prod([jax.nn.softmax(x) for x in logits], axis=0))
    p /= p.sum(1, keepdims=True)
    label = np.asarray(batch.label)
    pixels = replace(PLAIN, test_flip=True)
    metrics = jax.jit(make_eval_step(model, pixels))(variables, batch)
    expected = -np.log(p[range(12), label]).sum()
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4)
    assert int(metrics["correct"]) == (p.argmax(1) == label).sum()
    predictor = Predictor(model, variables, pixels, "abcd", tiny.SHAPE)
    np.testing.assert_allclose(predictor(np.asarray(batch.image)), p, rtol=1e-4)
    plain = jax.jit(make_eval_step(model, PLAIN))(variables, batch)
    assert float(plain["loss"]) != pytest.approx(expected, rel=1e-4)
    # The residuals reported are those of the image as it is.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4),
        metrics["residual_ratio"],
        plain["residual_ratio"],
    )


def test_padded_rows_count_for_nothing(model):
    variables = tiny.variables_of(model)
    step = jax.jit(make_eval_step(model, PLAIN))
    padded = batch_of(6, padding=2)
    whole = jax.tree.map(lambda x: x[:4], padded)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        step(variables, padded),
        step(variables, whole),
    )


def test_the_average_follows_the_parameters(model):
    config = TrainConfig(epochs=1, schedule="constant", ema_decay=0.9)
    step = jax.jit(make_train_step(model, config, PIXELS, seed=0, steps_per_epoch=10))
    state = state_of(model, config)
    for done, keep in ((0, 0.1), (1, 2 / 11)):
        new, _ = step(state, batch_of(8, seed=done))
        expected = jax.tree.map(
            lambda a, b, keep=keep: keep * a + (1 - keep) * b,
            state.ema,
            {"params": new.params, "batch_stats": new.batch_stats},
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            new.ema,
            expected,
        )
        state = new
    assert state.variables() is state.ema
    assert state_of(model, replace(config, ema_decay=0.0)).ema is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, r"train.epochs=0 must be a whole number"),
        ({"batch_size": -8}, r"train.batch_size=-8 must be"),
        ({"eval_batch_size": 0}, r"train.eval_batch_size=0 must be"),
        ({"learning_rate": 0.0}, r"train.learning_rate=0.0 must be .*\(0, "),
        ({"weight_decay": -1.0}, r"train.weight_decay=-1.0 must be .*from 0"),
        ({"momentum": 1.0}, r"train.momentum=1.0 must be .*in \[0, 1\)"),
        ({"label_smoothing": -0.1}, r"train.label_smoothing=-0.1 must be .*in"),
        ({"ema_decay": 1.5}, r"train.ema_decay=1.5 must be .*in"),
        ({"clip_norm": 0.0}, r"train.clip_norm=0.0 must be .*in \(0, .* or None"),
        ({"warmup_epochs": 200.0}, r"warmup_epochs=200.0 must be .* epochs=200"),
        ({"lr_drops": (0.7, 0.5)}, r"train.lr_drops=\(0.7, 0.5\) must be rising"),
        ({"lr_drops": (1.5,)}, r"train.lr_drops=\(1.5,\) must be rising"),
    ],
)
def test_numbers_that_cannot_train_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        optimizers.check_train(TrainConfig(**changes))


@pytest.mark.parametrize("schedule", ["steps", "cosine", "one_cycle", "constant"])
def test_a_warm_up_that_leaves_no_step_is_refused(schedule):
    config = TrainConfig(epochs=2, warmup_epochs=1.9, schedule=schedule)
    optimizers.check_train(config)
    with pytest.raises(UsageError, match=r"warmup_epochs=1.9 takes all 4 steps of ep"):
        optimizers.make_schedule(config, steps_per_epoch=2)
    optimizers.make_schedule(config, steps_per_epoch=10)


# A strict program may use all of it


@pytest.mark.parametrize(
    "schedule", ["steps", "cosine", "one_cycle", "linear", "constant", "exponential"]
)
def test_a_strict_program_may_ask_for_the_rate(schedule):
    config = TrainConfig(epochs=10, schedule=schedule, warmup_epochs=1)
    rate = optimizers.make_schedule(config, steps_per_epoch=10)
    assert float(rate(jnp.int32(10))) == pytest.approx(0.1)
    assert float(jax.jit(rate)(jnp.int32(10))) == pytest.approx(0.1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", ["steps", "one_cycle"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_strict_program_may_train(optimizer, schedule, dtype):
    config = TrainConfig(optimizer=optimizer, schedule=schedule, ema_decay=0.9)
    model = create_model(tiny.SMALL, Execution(dtype=dtype))
    step = make_train_step(model, config, PIXELS, seed=0, steps_per_epoch=10)
    create = lambda: create_train_state(  # noqa: E731
        model, config, jax.random.key(0), tiny.SHAPE, 10
    )
    state = jax.eval_shape(create)
    new, _ = jax.eval_shape(step, state, batch_of(4))
    # The state keeps its structure, shapes and types.
    assert new == state


def test_a_compiled_step_transfers_nothing():
    model = create_model(tiny.SMALL)
    config = TrainConfig(ema_decay=0.9)
    step = make_train_step(model, config, PIXELS, seed=0, steps_per_epoch=10)
    step = jax.jit(step)
    state = create_train_state(model, config, jax.random.key(0), tiny.SHAPE, 10)
    batch = jax.device_put(batch_of(4))
    with jax.transfer_guard("disallow"):
        state, _ = step(state, batch)
        assert jax.device_get(step(state, batch)[0].step) == 2


def test_float64_is_float64_throughout(float64):
    config = TrainConfig(schedule="constant", ema_decay=0.9)
    model = create_model(tiny.SMALL, Execution(dtype="float64"))
    step = make_train_step(model, config, PIXELS, seed=0, steps_per_epoch=10)
    create = lambda: create_train_state(  # noqa: E731
        model, config, jax.random.key(0), tiny.SHAPE, 10
    )
    state = jax.eval_shape(create)
    new, metrics = jax.eval_shape(step, state, batch_of(4))
    assert new == state
    floats = {leaf.dtype for leaf in jax.tree.leaves((new.params, new.ema))}
    assert floats == {metrics["loss"].dtype} == {jnp.dtype("float64")}


# What a step is, written out


def small_step(config, pixels=PLAIN, seed=0):
    model = create_model(tiny.SMALL)
    step = make_train_step(model, config, pixels, seed=seed, steps_per_epoch=10)
    variables = tiny.variables_of(model)
    state = TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizers.make_optimizer(config, 10).init(variables["params"]),
        ema=jax.tree.map(jnp.copy, variables) if config.ema_decay else None,
    )
    return model, jax.jit(step), state


def test_a_step_goes_down_the_gradient_of_the_mean_loss():
    config = TrainConfig(
        schedule="constant", momentum=0.0, weight_decay=0.0, label_smoothing=0.1
    )
    model, step, state = small_step(config)
    batch = batch_of(6)

    @jax.jit
    @jax.grad
    def gradient_of(params):
        logits, _ = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            (batch.image.astype(jnp.float32) / 255 - 0.5) / 0.25,
            train=True,
            mutable=["batch_stats"],
        )
        target = 0.9 * jax.nn.one_hot(batch.label, 4) + 0.1 / 4
        return -(target * jax.nn.log_softmax(logits)).sum(-1).mean()

    gradient = gradient_of(state.params)
    new, metrics = step(state, batch)
    jax.tree.map(
        lambda old, g, now: np.testing.assert_allclose(
            now, old - 0.1 * g, rtol=1e-4, atol=1e-6
        ),
        state.params, gradient, new.params,
    )  # fmt: skip
    for part, norm in metrics["gradient_norm"].items():
        squares = sum(float((g**2).sum()) for g in jax.tree.leaves(gradient[part]))
        assert float(norm) == pytest.approx(squares**0.5, rel=1e-4)


def test_the_gradients_of_parts_add_up():
    config = TrainConfig(
        schedule="constant", momentum=0.0, weight_decay=0.0, accumulation_steps=2
    )
    model, step, state = small_step(config)
    batch = batch_of(8, padding=1)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient_of(params, stats, part):
        logits, updated = model.apply(
            {"params": params, "batch_stats": stats},
            (part.image.astype(jnp.float32) / 255 - 0.5) / 0.25,
            train=True,
            mutable=["batch_stats"],
        )
        target = jax.nn.one_hot(part.label, 4)
        losses = -(target * jax.nn.log_softmax(logits)).sum(-1)
        # All of the batch count, in whatever part.
        return losses @ part.mask.astype(float) / 7, updated["batch_stats"]

    stats, gradients = state.batch_stats, []
    for part in (0, 1):
        rows = jax.tree.map(lambda x, part=part: x[part::2], batch)
        gradient, stats = gradient_of(state.params, stats, rows)
        gradients.append(gradient)
    new, metrics = step(state, batch)
    assert int(metrics["count"]) == 7
    jax.tree.map(
        lambda old, a, b, now: np.testing.assert_allclose(
            now, old - 0.1 * (a + b), rtol=1e-4, atol=1e-6
        ),
        state.params, *gradients, new.params,
    )  # fmt: skip
    # Running statistics move twice.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        new.batch_stats,
        stats,
    )


def test_units_are_dropped_more_and_more_and_scaled_to_the_same_mean():
    keys = image_keys(jax.random.key(0), jnp.int32(0), jnp.arange(4000))
    keep = np.asarray(step.stochastic_depth_scales(keys, units=5, share=0.5))
    assert keep.shape == (4000, 5)
    dropped = (keep == 0).mean(0)
    np.testing.assert_allclose(dropped, [0.1, 0.2, 0.3, 0.4, 0.5], atol=0.03)
    np.testing.assert_allclose(keep.max(0), 1 / (1 - np.arange(0.1, 0.6, 0.1)), 1e-5)
    np.testing.assert_allclose(keep.mean(0), 1, atol=0.05)
    # Of each image by itself.
    assert abs(np.corrcoef((keep == 0).T)[0, 1:]).max() < 0.06


def test_a_masked_row_gives_neither_loss_nor_gradient_nor_hit():
    batch = batch_of(6, padding=2)
    few = jax.tree.map(lambda x: x[:4], batch)
    # Every row is right.
    logits = 5 * jax.nn.one_hot(batch.label, 4)
    target = objective.targets(batch.label, 4, 0.1, "float32")
    loss, correct = sums_of(logits, target, batch)
    assert int(correct) == 4
    np.testing.assert_allclose(loss, sums_of(logits[:4], target[:4], few)[0], rtol=1e-6)
    gradient = jax.grad(lambda x: sums_of(x, target, batch)[0])(logits)
    assert not gradient[4:].any()
    assert gradient[:4].any(1).all()
    # Not even where a masked row is beyond all numbers.
    wild = sums_of(logits.at[5].set(jnp.inf), target, batch)[0]
    np.testing.assert_array_equal(wild, loss)


def test_step_number_and_seed_choose_the_crops_and_masked_labels_do_not_matter():
    config, batch = (
        TrainConfig(schedule="constant", ema_decay=0.9),
        batch_of(6, padding=2),
    )
    losses = set()
    for seed in (0, 1):
        _, step, state = small_step(config, replace(PIXELS, crop_padding=2), seed)
        for number in (0, 1):
            at = state.replace(step=jnp.int32(number))
            losses.add(float(step(at, batch)[1]["loss"]))
    assert len(losses) == 4
    other = batch._replace(label=(batch.label + (~batch.mask).astype(jnp.int32)) % 4)
    assert (other.label != batch.label).sum() == 2
    results = step(state, batch), step(state, other)
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert int(results[0][1]["count"]) == 4
    # An old average keeps the share that the configuration says.
    old = state.replace(step=jnp.int32(1000))
    new, _ = step(old, batch)
    before, now, got = (
        tree["head"]["norm"]["mean"]
        for tree in (old.ema["batch_stats"], new.batch_stats, new.ema["batch_stats"])
    )
    np.testing.assert_allclose(got, 0.9 * before + 0.1 * now, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("optimizer", "'sgd', 'adamw', 'adam_l2', 'lars', 'muon'"),
        ("schedule", "'steps', 'cosine', 'one_cycle', 'linear', 'constant', 'exp"),
        ("decay", "'kernels', 'all'"),
    ],
)
def test_an_unknown_word_is_refused_with_the_choices(field, choices):
    config = replace(TrainConfig(), **{field: "lion"})
    with pytest.raises(UsageError, match=f"train.{field}=.*lion.* one of .*{choices}"):
        optimizers.check_train(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": True},
        {"epochs": 1.5},
        {"learning_rate": float("nan")},
        {"lr_drops": (0.5, 0.5)},
    ],
)
def test_a_number_of_another_kind_is_refused(changes):
    with pytest.raises(UsageError, match=f"train.{next(iter(changes))}="):
        optimizers.check_train(TrainConfig(**changes))


VERSIONS = {
    "group normalization": replace(BIT, norm_groups=2),
    "version 1": replace(ARTICLE, order="post", final_norm=False),
    "Keras": KERAS,
}


@pytest.mark.parametrize("name", VERSIONS)
def test_other_versions_train_and_are_evaluated(name):
    net = replace(tiny.SMALL, semantics=VERSIONS[name])
    model, config = create_model(net), TrainConfig(epochs=2, learning_rate=0.05)
    state = create_train_state(model, config, jax.random.key(0), tiny.SHAPE, 10)
    step = jax.jit(make_train_step(model, config, PLAIN, seed=0, steps_per_epoch=10))
    batch, losses = batch_of(16), []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    evaluated = make_eval_step(model, PLAIN)(state.variables(), batch)
    assert np.isfinite(float(evaluated["loss"]))
    assert evaluated["count"] == 16


# Other platforms

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
