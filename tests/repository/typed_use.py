"""A typed program that uses every public name; ``mypy`` checks it, nothing runs it.

``tests/repository/test_api.py`` tests that no public name is missing.
"""

from pathlib import Path
from typing import Any, assert_type

import jax
import numpy as np

from flax_resnetv2 import (
    ARTICLE,
    ATIENZA,
    BIT,
    HE2016,
    KERAS,
    NORMALIZATION,
    PRESETS,
    RECIPES,
    SHAPE_CLASSES,
    TIMM,
    Architecture,
    AugmentConfig,
    AutoencoderConfig,
    Autoencoding,
    Batch,
    Checkpointer,
    Config,
    DataConfig,
    Dataset,
    Execution,
    Head,
    Predictor,
    ResidualLayer,
    ResidualStack,
    ResidualUnit,
    ResNetV2,
    RunError,
    Semantics,
    Split,
    Stem,
    TrainConfig,
    TrainState,
    UsageError,
    activations,
    create_autoencoder,
    create_model,
    create_train_state,
    draw_net,
    draw_shapes,
    epoch_order,
    evaluation_order,
    fit,
    from_bit,
    from_file,
    from_keras,
    from_timm,
    gather_batch,
    init_in_one_draw,
    layer_table,
    make_eval_step,
    make_train_step,
    normalize,
    open_dataset,
    plan,
    plan_stack,
    plan_unit,
    receptive_field,
    residual_ratios,
    to_bit,
    to_keras,
    to_timm,
    tune,
)
from flax_resnetv2.model.autoencoder import Autoencoder
from flax_resnetv2.model.layer_table import Field, LayerRow
from flax_resnetv2.model.planning import NetPlan, StackPlan, UnitPlan


def nets(images: jax.Array) -> None:
    """Plan, build and inspect nets."""
    rows: list[Semantics] = [ARTICLE, ATIENZA, BIT, HE2016, KERAS, TIMM]
    architecture = Architecture(units=(1, 1), widths=(8, 16), semantics=rows[0])
    net = plan(architecture, (32, 32, 3))
    assert_type(net, NetPlan)
    assert_type(layer_table(net, (32, 32, 3)), list[LayerRow])
    assert_type(receptive_field(net), dict[str, Field])
    assert_type(draw_net(net, (32, 32, 3)), str)
    unit = plan_unit(in_width=8, width=8, reduction="previous")
    assert_type(unit, UnitPlan)
    stack = plan_stack(in_width=8, width=16, units=2, stride=2)
    assert_type(stack, StackPlan)
    model = create_model(architecture, Execution(dtype="bfloat16"), (32, 32, 3))
    assert_type(model, ResNetV2)
    assert_type(create_model("article"), ResNetV2)
    assert_type(PRESETS["article"].architecture, Architecture)
    assert_type(model.plan, NetPlan)
    ResidualUnit(unit), ResidualStack(stack), ResidualLayer(unit.layers[0])
    Head(model.plan.head)
    if model.plan.stem is not None:
        Stem(model.plan.stem)
    variables: dict[str, Any] = init_in_one_draw(model, jax.random.key(0), (32, 32, 3))
    assert_type(activations(model, variables, images), dict[str, jax.Array])
    assert_type(residual_ratios(model, variables, images), dict[str, list[float]])


def training(config: Config, workdir: Path) -> dict[str, float]:
    """Train a net: data, states, steps and runs."""
    tune()
    splits = {"train": Split(*draw_shapes("train"))}
    shapes = Dataset("shapes", SHAPE_CLASSES, splits)
    mean, std = shapes.channel_statistics()
    order = evaluation_order(splits["train"].num_images, 64)
    assert_type(epoch_order(100, 10, seed=0, epoch=0), np.ndarray)
    model = create_model(config.architecture)
    state = create_train_state(
        model, config.train, jax.random.key(config.seed), (32, 32, 3), 10
    )
    assert_type(state, TrainState)
    pixels = AugmentConfig(mean=mean, std=std)
    step = make_train_step(
        model, TrainConfig(epochs=1), pixels, seed=0, steps_per_epoch=10
    )
    batch = gather_batch(splits["train"], jax.numpy.asarray(order), jax.numpy.arange(8))
    assert_type(batch, Batch)
    assert_type(normalize(batch.image, pixels, "float32"), jax.Array)
    after, _ = step(state, batch)
    assert_type(after, TrainState)
    make_eval_step(model, pixels)(after.variables(), batch)
    encoder = create_autoencoder(
        Architecture(head="latent"), (32, 32, 3), AutoencoderConfig(units=2)
    )
    assert_type(encoder, Autoencoder)
    create_train_state(encoder, config.train, jax.random.key(0), (32, 32, 3), 10)
    task = Autoencoding(latent=64, dtype="float32", kl_weight=None)
    make_train_step(
        encoder, TrainConfig(), pixels, seed=0, steps_per_epoch=10, objective=task
    )
    dataset = open_dataset(DataConfig(name="cifar10"))
    assert_type(dataset.class_names, tuple[str, ...])
    with Checkpointer(workdir / "checkpoints") as checkpoints:
        assert_type(checkpoints.latest(), int | None)
    try:
        return fit(RECIPES["quickstart"].config, workdir)
    except (UsageError, RunError) as error:
        raise SystemExit(str(error)) from error


def using(workdir: Path, images: np.ndarray[Any, Any]) -> None:
    """Use a trained net, and published weights."""
    predictor = Predictor.find(workdir)
    assert_type(predictor, Predictor)
    predictor(images).argmax(-1)
    predictor.latents(images).mean(0)
    model = create_model("keras-resnet50v2")
    for variables in (
        from_keras("a.h5", model),
        from_timm("a.safetensors", model),
        from_bit("a.npz", model),
        from_file("a.npz", model, classifier="leave"),
    ):
        assert_type(variables, dict[str, Any])
        to_keras(variables, model), to_timm(variables, model), to_bit(variables, model)
    Predictor(model, {}, NORMALIZATION, ("cat", "dog"), (224, 224, 3))
