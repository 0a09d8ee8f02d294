"""What a run is said to need, held against what XLA says its program takes."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flax_resnetv2 import (
    PRESETS,
    Architecture,
    Batch,
    Execution,
    UsageError,
    create_model,
    create_train_state,
    make_train_step,
)
from flax_resnetv2.run.cost import StepCost, amount, memory_limit, peak_flops, step_cost
from tests.support import tiny

NET = Architecture(units=(3,), widths=(16,), strides=(1,), stem_width=16)
SHAPE = (16, 16, 3)


def counted(architecture=NET, shape=SHAPE, **execution):
    return step_cost(create_model(architecture, Execution(**execution), shape), shape)


@pytest.mark.parametrize(
    ("remat", "parts", "least"),
    [("nothing", 1, 0.5), ("norms", 1, 0.5), ("norms", 4, 0.3)],
)
def test_predicted_memory_is_most_of_what_xla_takes(remat, parts, least):
    """The prediction is what is kept; XLA's number includes its work space, of which
    the parts take more where it optimizes little."""
    execution, config = (
        Execution(remat=remat),
        tiny.config(accumulation_steps=parts).train,
    )
    model = create_model(NET, execution, SHAPE)
    augmentation = replace(tiny.config().augment, mean=(0.5,) * 3, std=(0.2,) * 3)
    step = make_train_step(model, config, augmentation, seed=0, steps_per_epoch=5)
    state = jax.eval_shape(
        lambda key: create_train_state(model, config, key, SHAPE, 5), jax.random.key(0)
    )

    def taken(batch):
        images = jax.ShapeDtypeStruct((batch, *SHAPE), "uint8")
        labels = jax.ShapeDtypeStruct((batch,), "int32")
        mask = jax.ShapeDtypeStruct((batch,), "bool")
        program = jax.jit(step).lower(state, Batch(images, labels, mask)).compile()
        return program.memory_analysis().temp_size_in_bytes

    measured = (taken(128) - taken(64)) / 64
    predicted = counted(remat=remat).image_bytes / parts
    assert least * measured < predicted < 1.05 * measured


def test_less_is_kept_where_more_is_computed_again():
    nothing, norms, units = (
        counted(remat=remat).image_bytes for remat in ("nothing", "norms", "units")
    )
    assert nothing > norms > units > 0
    assert counted(dtype="bfloat16").image_bytes == norms // 2
    assert counted(backward="automatic").image_bytes == nothing


def test_of_several_parts_one_is_kept():
    whole, parts = counted(), step_cost(create_model(NET, image_shape=SHAPE), SHAPE, 4)
    assert parts.image_bytes == whole.image_bytes
    # Their gradients are added up.
    assert parts.fixed_bytes == 2 * whole.fixed_bytes
    assert parts.bytes(64) - parts.fixed_bytes == 16 * whole.image_bytes
    limit = parts.bytes(64)
    parts.check(batch=64, devices=1, limit=limit)
    with pytest.raises(UsageError, match=r"--train.batch-size 64 or less, or --train"):
        parts.check(batch=128, devices=1, limit=limit)


def test_flops_are_six_for_each_multiply_add():
    preset = PRESETS["he2016-resnet164"]
    found = counted(preset.architecture, (32, 32, 3))
    assert found.parameters == preset.parameters
    # 244.5 million multiply-adds with the shortcuts.
    assert found.flops == pytest.approx(6 * 244.5e6, rel=0.03)


def test_what_lies_on_a_device_is_added():
    empty = counted()
    full = empty.plus_resident(
        {"a": np.zeros(250, np.float32)}, np.zeros(500, np.uint8)
    )
    assert full.fixed_bytes - empty.fixed_bytes == 1500
    assert full.bytes(3) == full.fixed_bytes + 3 * full.image_bytes


NEEDS = StepCost(
    parameters=1,
    flops=1.0,
    image_bytes=10**9,
    fixed_bytes=10**9,
    execution=Execution(),
)
SMALLEST = Execution(dtype="bfloat16", remat="units")


@pytest.mark.parametrize(
    ("limit", "execution", "repair"),
    [
        (
            4 * 10**9,
            Execution(),
            "--train.batch-size 6 or less, or --train.accumulation-steps 2, or more "
            "devices, or --execution.dtype bfloat16, or --execution.remat units",
        ),
        (
            4 * 10**9,
            SMALLEST,
            "--train.batch-size 6 or less, or --train.accumulation-steps 2, or more "
            "devices",
        ),
        (
            2 * 10**9,
            SMALLEST,
            "--train.batch-size 2 or less, or --train.accumulation-steps 4, or more "
            "devices",
        ),
        (15 * 10**8, SMALLEST, "more devices"),
        (10**9, Execution(), "a smaller net, or a device with more memory"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would_help(limit, execution, repair):
    with pytest.raises(UsageError, match="at least 5 GB on each of 2 devices") as e:
        replace(NEEDS, execution=execution).check(batch=8, devices=2, limit=limit)
    assert str(e.value).endswith(f"; choose {repair}")


@pytest.mark.parametrize("limit", [5 * 10**9, None])
def test_what_fits_or_cannot_be_known_is_let_through(limit):
    NEEDS.check(batch=8, devices=2, limit=limit)


def test_a_device_says_its_memory_and_its_kind_its_peak():
    assert memory_limit(jax.devices()[0]) > 10**8
    gpu = SimpleNamespace(
        platform="gpu",
        device_kind="NVIDIA H100 80GB HBM3",
        memory_stats=lambda: {"bytes_limit": 7},
    )
    assert memory_limit(gpu) == 7
    assert peak_flops(gpu) == 989e12
    assert peak_flops(jax.devices()[0]) is None
    for kind, peak in (("L4", 121e12), ("L40", 181e12), ("L40S", 362e12)):
        assert peak_flops(SimpleNamespace(device_kind=f"NVIDIA {kind}")) == peak
    for kind, peak in (("v5", 459e12), ("v5p", 459e12), ("v5 lite", 197e12)):
        assert peak_flops(SimpleNamespace(device_kind=f"TPU {kind}")) == peak
    silent = SimpleNamespace(platform="tpu", memory_stats=lambda: None)
    assert memory_limit(silent) is None


def test_amounts_have_three_digits_and_a_prefix():
    assert amount(1_610_612_736, "B") == "1.61 GB"
    assert amount(187.8e9, "FLOP") == "188 GFLOP"
    assert amount(999_600, "B") == "1 MB"
    assert amount(12, "B") == "12 B"
