"""An autoencoder: its mirror image, what it measures, and its training by ``fit``."""

import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import integrate, stats

from flax_resnetv2 import (
    ATIENZA,
    BIT,
    HE2016,
    KERAS,
    RECIPES,
    Architecture,
    AutoencoderConfig,
    Execution,
    UsageError,
    create_autoencoder,
    create_model,
    create_train_state,
    make_train_step,
)
from flax_resnetv2.cli import tools
from flax_resnetv2.data.batch import Batch
from flax_resnetv2.model.autoencoder import Reconstruction
from flax_resnetv2.model.decoder_plan import decoder_table, plan_decoder
from flax_resnetv2.model.initial import init_in_one_draw
from flax_resnetv2.model.modules import Latent
from flax_resnetv2.model.planning import plan
from flax_resnetv2.reports import reconstruction
from flax_resnetv2.run import loop
from flax_resnetv2.run.build import create_net, create_objective, net_layers
from flax_resnetv2.run.config import check_config, to_json
from flax_resnetv2.run.cost import step_cost
from flax_resnetv2.training.augment import AugmentConfig
from flax_resnetv2.training.objective import Autoencoding
from tests.support import tiny
from tests.support.runs import data, differing, lines_of, losses, run_fit, untimed

NET = replace(tiny.SMALL, head="latent", latent=5)
VARIATIONAL = replace(NET, latent_variance=True)


def configuration(architecture=NET, **train):
    train = {"optimizer": "adamw", "learning_rate": 0.01, "epochs": 2} | train
    config = tiny.config(**train)
    return replace(config, architecture=architecture, log_every=4)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (NET, (8, 8, 3)),
        (VARIATIONAL, (9, 7, 1)),
        (replace(NET, unit="basic", reduction=1, stem_stride=2), (17, 12, 3)),
        (replace(NET, stem_pool=True, head_input="flattened"), (27, 21, 3)),
        (replace(NET, stem=False, strides=(2, 3)), (11, 8, 4)),
        (replace(NET, semantics=ATIENZA, bridge=True), (8, 8, 3)),
        (replace(NET, semantics=KERAS), (11, 8, 3)),
        (
            replace(
                NET,
                semantics=replace(
                    HE2016, order="post", final_norm=False, shortcut_input="raw"
                ),
            ),
            (8, 8, 3),
        ),
        (
            replace(NET, widths=(32, 64), stem_width=32, reduction=1, semantics=BIT),
            (8, 8, 3),
        ),
    ],
)
def test_the_image_comes_back_in_its_shape(net, shape):
    model = create_autoencoder(net, shape)
    images = jnp.zeros((2, *shape))
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), images, train=False)
    )
    made, latent = jax.eval_shape(
        lambda v: model.apply(v, images, train=False), variables
    )
    assert made.shape == images.shape
    assert made.dtype == jnp.float32
    assert jax.tree.leaves(latent)[0].shape == (2, 5)
    # Counted from the plan as from the arrays.
    rows = net_layers(model, shape)
    assert sum(row.parameters for row in rows) == sum(
        leaf.size for leaf in jax.tree.leaves(variables["params"])
    )
    # One draw gives the same tree.
    drawn = jax.eval_shape(lambda: init_in_one_draw(model, jax.random.key(0), shape))
    assert jax.tree.structure(drawn) == jax.tree.structure(variables)
    assert jax.tree.leaves(drawn) == jax.tree.leaves(variables)


def test_the_mirror_has_each_stack_of_the_net_backwards():
    net = Architecture(head="latent", units=(2, 1, 1), stem_stride=2)
    shape = (50, 32, 3)
    decoder = plan_decoder(net, plan(net), shape, AutoencoderConfig(units=3))
    assert decoder.start == (7, 4, 256)
    assert decoder.sizes == ((13, 8), (25, 16), (25, 16))
    assert decoder.image == (50, 32)
    widths = [
        [layer.conv.width for layer in stack.units[0].layers]
        for stack in decoder.stacks
    ]
    assert widths == [[64, 64, 128], [32, 32, 64], [32, 32, 64]]
    assert [len(stack.units) for stack in decoder.stacks] == [3, 3, 3]
    assert (decoder.last.conv.in_width, decoder.last.conv.width) == (64, 3)
    rows = {row.name: row.shape for row in decoder_table(decoder, net.latent)}
    assert rows["decoder/stack3/unit1/layer3/conv"] == (13, 8, 128)
    assert rows["decoder/stack1/unit1/layer3/conv"] == (25, 16, 64)
    assert rows["decoder/image/conv"] == (50, 32, 3)


@pytest.fixture(scope="module")
def made():
    """A variational autoencoder with variables unlike their start."""
    model = create_autoencoder(VARIATIONAL, tiny.SHAPE)
    return model, tiny.variables_of(model), tiny.images_of(4)


def test_the_net_alone_reads_the_same_variables(made):
    model, variables, images = made
    net = create_model(VARIATIONAL)
    _, latent = model.apply(variables, images, train=False)
    alone = net.apply(variables, images, train=False)
    assert isinstance(alone, Latent)
    jax.tree.map(np.testing.assert_array_equal, alone, latent)


def test_a_vector_is_taken_at_its_noise_or_at_the_mean(made):
    model, variables, images = made
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    apply = jax.jit(partial(model.apply, variables, images, train=False))
    for given, factor in (({}, 0.0), ({"noise": noise}, noise)):
        image, latent = apply(**given)
        place = latent.mean + np.exp(latent.log_variance / 2) * factor
        decoded = model.apply(variables, place, method="decode")
        np.testing.assert_allclose(image, decoded, rtol=1e-4, atol=1e-5)
    assert not np.allclose(image, apply()[0])


def test_the_divergence_is_that_of_the_two_distributions():
    mean, log_variance = np.array([[0.7, -1.2]]), np.array([[-0.5, 0.8]])

    def divergence(m, v):
        ours, standard = stats.norm(m, np.exp(v / 2)), stats.norm()
        return integrate.quad(
            lambda x: ours.pdf(x) * (ours.logpdf(x) - standard.logpdf(x)), -15, 15
        )[0]

    expected = sum(map(divergence, mean[0], log_variance[0]))
    target = np.zeros((1, 2, 3, 1), np.float32)
    image = target.copy()
    image[0, 0, 1] = 3.0
    outputs = Reconstruction(
        *map(jnp.asarray, (image,)), Latent(*map(jnp.asarray, (mean, log_variance)))
    )
    batch = Batch(None, jnp.zeros([1], jnp.int32), jnp.ones([1], bool))
    sums = Autoencoding(2, "float32", 0.5).train_metrics(
        outputs, jnp.asarray(target), batch
    )
    assert float(sums["kl"]) == pytest.approx(expected, rel=1e-5)
    assert float(sums["squared_error"]) == pytest.approx(9 / 6)
    assert float(sums["loss"]) == pytest.approx(
        9 / 6 / 2 + 0.5 * expected / 6, rel=1e-5
    )


def test_masked_images_count_nothing():
    rng = np.random.default_rng(0)
    image, target = (jnp.asarray(rng.normal(size=(3, 4, 4, 3))) for _ in range(2))
    image = image.at[2].set(jnp.inf)
    batch = Batch(None, jnp.zeros([3], jnp.int32), jnp.arange(3) < 2)
    objective = Autoencoding(2, "float32", None)
    sums = objective.train_metrics(Reconstruction(image, None), target, batch)
    expected = np.square(image - target)[:2].mean((1, 2, 3)).sum()
    assert set(sums) == {"loss", "squared_error"}
    assert float(sums["squared_error"]) == pytest.approx(expected, rel=1e-6)
    assert float(sums["loss"]) == pytest.approx(expected / 2, rel=1e-6)


@pytest.mark.parametrize("architecture", [NET, VARIATIONAL])
def test_everything_learns(architecture):
    config = replace(
        configuration(architecture),
        augment=AugmentConfig(crop_padding=0, mean=(0.5,) * 3, std=(0.25,) * 3),
    )
    model = create_net(config, tiny.SHAPE)
    key = jax.random.key(0)
    state = create_train_state(model, config.train, key, tiny.SHAPE, 10)
    step = make_train_step(
        model,
        config.train,
        config.augment,
        seed=0,
        steps_per_epoch=10,
        objective=create_objective(config, model),
    )
    split = tiny.dataset().splits["train"]
    batch = Batch(*(jnp.asarray(x[:8]) for x in split), jnp.ones([8], bool))
    after, metrics = jax.jit(step)(state, batch)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, after.params)
    still = [
        jax.tree_util.keystr(path)
        for path, moved in jax.tree.leaves_with_path(moved)
        if not moved
    ]
    assert still == []
    assert set(metrics["gradient_norm"]) == set(state.params) >= {"decoder", "head"}
    assert ("kl" in metrics) == architecture.latent_variance


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of the variational one: its directory, and what it gave."""
    directory = tmp_path_factory.mktemp("finished")
    config = configuration(VARIATIONAL, epochs=4, ema_decay=0.5, learning_rate=0.03)
    return config, directory, *run_fit(directory, config, 2)


def test_a_run_learns_to_make_its_images_again(finished):
    _, _, result, lines, state = finished
    train, tests = (
        [line for line in lines if line["split"] == split]
        for split in ("train", "test")
    )
    errors = [line["squared_error"] for line in tests]
    assert errors[-1] < 0.8 * errors[0]
    assert train[-1]["squared_error"] < 0.9  # that of the mean image is 1
    assert result == tests[-1]
    assert {"loss", "squared_error", "kl", "residual_ratio"} <= set(tests[-1])
    assert "accuracy" not in tests[-1]
    assert set(tests[-1]["residual_ratio"]) == {"stack1", "stack2"}
    values = np.prod(tiny.SHAPE)
    for line in lines:
        expected = line["squared_error"] / 2 + line["kl"] / values
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert differing(state) == []


def test_a_run_that_goes_on_is_the_same(finished, tmp_path):
    config, directory, _, lines, state = finished
    shutil.copytree(directory, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/24")
    _, again, state_again = run_fit(tmp_path / "run", config, 2)
    assert untimed(again) == untimed(lines)
    jax.tree.map(np.testing.assert_array_equal, state_again, state)


def test_reconstructions_are_drawn(finished, monkeypatch, capsys):
    _, directory, *_ = finished
    drawn = {}

    def keep(rows):
        drawn.update(rows)
        return draw(rows)

    draw = reconstruction.draw_rows
    monkeypatch.setattr(reconstruction, "draw_rows", keep)
    monkeypatch.setattr(reconstruction, "open_dataset", lambda _: data())
    assert tools.main(["reconstruct", str(directory), "--images", "4"]) == 0
    path = directory / "reconstructions.png"
    assert f"drawn in {path}" in capsys.readouterr().out
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > image.height > 200
    stored, made, imagined = drawn.values()
    assert list(drawn) == ["test images", "reconstructions", "samples from N(0, 1)"]
    assert stored.shape == made.shape == imagined.shape == (4, *tiny.SHAPE)
    # As the stored pixels, however they were normalized.
    pixels = data().splits["test"].image[:4] / 255
    np.testing.assert_allclose(stored, pixels, atol=1e-6)
    assert np.abs(made - pixels).mean() < np.abs(imagined - pixels).mean()


def test_a_classifier_makes_no_images(tmp_path, capsys):
    (tmp_path / "config.json").write_text(to_json(tiny.config()))
    assert tools.main(["reconstruct", str(tmp_path)]) == 2
    assert "run of a classifier, which decodes no images" in capsys.readouterr().err


def test_losses_do_not_depend_on_the_devices(tmp_path, float64):
    config = configuration(VARIATIONAL, epochs=1, batch_size=16, accumulation_steps=2)
    config = replace(config, execution=Execution(dtype="float64"))
    found = []
    for devices in (1, 8):
        _, lines, _ = run_fit(tmp_path / str(devices), config, devices)
        found.append(lines)
    for ours, theirs in zip(*found, strict=True):
        for name in ("loss", "squared_error", "kl"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-9)
    assert len(set(losses(found[0]))) > 0


def test_the_best_of_an_autoencoder_has_the_lowest_loss(tmp_path):
    config = configuration(epochs=3, learning_rate=0.01)
    run_fit(tmp_path, config, 1, data(train=16, validation=9))
    validated = {
        line["step"]: line["loss"]
        for line in lines_of(tmp_path)
        if line["split"] == "validation"
    }
    assert loop.best_step(
        {str(step): -loss for step, loss in validated.items()}, list(validated)
    ) == min(validated, key=validated.get)


def test_the_decoder_counts_in_what_a_run_needs():
    config = configuration()
    classifier = replace(config, architecture=tiny.SMALL)
    alone = step_cost(create_net(classifier, tiny.SHAPE), tiny.SHAPE)
    whole = step_cost(create_net(config, tiny.SHAPE), tiny.SHAPE)
    rows = decoder_table(plan_decoder(NET, plan(NET), tiny.SHAPE), NET.latent)
    assert whole.flops - alone.flops == pytest.approx(
        6 * sum(row.multiply_adds for row in rows), rel=0.05
    )
    assert whole.image_bytes > 1.5 * alone.image_bytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head": "none"}, "returns feature maps, which cannot be trained"),
        (
            {"head": "classifier", "latent_variance": True},
            r"architecture.latent_variance=True has no use where .*'classifier'",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_refused(change, words):
    config = replace(configuration(), architecture=replace(NET, **change))
    with pytest.raises(UsageError, match=words):
        check_config(config)


@pytest.mark.parametrize(
    ("net", "config", "words"),
    [
        (tiny.SMALL, {}, "head='classifier' returns no vector"),
        (NET, {"units": 0}, "autoencoder.units=0"),
        (NET, {"kl_weight": -1.0}, "autoencoder.kl_weight=-1.0"),
        (
            replace(NET, stem_width=3),
            {},
            r"the decoder of stack 1: reduction=2 does not divide width=3",
        ),
    ],
)
def test_a_mirror_that_cannot_be_is_refused(net, config, words):
    with pytest.raises(UsageError, match=words):
        create_autoencoder(net, tiny.SHAPE, AutoencoderConfig(**config))


def test_recipes_train_encoders():
    for name in ("quickstart", "cifar10"):
        plain, variational = (
            RECIPES[f"{name}-{kind}"].config for kind in ("autoencoder", "vae")
        )
        assert plain.architecture.head == variational.architecture.head == "latent"
        assert variational.architecture.latent_variance
        check_config(plain)
        check_config(variational)
