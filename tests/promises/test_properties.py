"""Properties of every configuration: refused in one clear line, or it runs.

The same examples at every run. ``PROPERTY_EXAMPLES=20 python -m pytest
tests/promises/test_properties.py`` tries twenty times as many, and others at each run.
"""

import inspect
import json
import os
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from flax_resnetv2 import (
    ARTICLE,
    Architecture,
    Config,
    Execution,
    Semantics,
    TrainConfig,
    UsageError,
    create_model,
    plan,
    plan_stack,
    plan_unit,
)
from flax_resnetv2.data.datasets import DataConfig
from flax_resnetv2.model.initial import init_in_one_draw
from flax_resnetv2.model.layer_table import layer_table, receptive_field
from flax_resnetv2.model.semantics import SEMANTICS
from flax_resnetv2.run.config import SCHEMA, check_config, from_json, to_json
from flax_resnetv2.training.augment import AugmentConfig
from tests.support.tiny import images_of, variables_of

TIMES = int(os.environ.get("PROPERTY_EXAMPLES", "1"))


def examples(count):
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# What each field may be, said once more, apart from the package


@dataclass(frozen=True)
class Kind:
    """Legal values to draw, and whether a value is legal."""

    draw: st.SearchStrategy
    fits: object


def whole(low, high, odd=False):
    values = st.integers(low, min(low + 8, high)) | st.integers(low, high)
    return Kind(
        values.filter(lambda v: v % 2) if odd else values,
        lambda v: type(v) is int and low <= v <= high and (v % 2 or not odd),
    )


def number(low, high, without=()):
    return Kind(
        st.floats(low, high).filter(lambda v: v not in without),
        lambda v: type(v) in (int, float) and low <= v <= high and v not in without,
    )


def word(*choices):
    return Kind(
        st.sampled_from(choices),
        lambda v: any(type(v) is type(c) and v == c for c in choices),
    )


def tuples(kind, low=0, high=5, rule=bool):
    """``rule`` is asked of what is not empty."""
    drawn = st.lists(kind.draw, min_size=low, max_size=high).map(tuple)
    return Kind(
        drawn.filter(lambda v: not v or rule(v)),
        lambda v: (
            type(v) is tuple
            and low <= len(v) <= high
            and all(map(kind.fits, v))
            and (not v or rule(v))
        ),
    )


def either(*kinds):
    return Kind(
        st.one_of([kind.draw for kind in kinds]),
        lambda v: any(kind.fits(v) for kind in kinds),
    )


def a_stack(kind):
    """One for all three stacks, or one each."""
    return either(kind, tuples(kind, 3, 3))


NONE, FLAG, COUNT = word(None), word(True, False), whole(1, 2**20)
STRIDE, KERNEL = whole(1, 64), whole(1, 255, odd=True)
POSITIVE = whole(1, 2**31 - 1)
SHARE, EPSILON = number(0, 1, without=(1,)), number(1e-12, 1)
TEXT = Kind(st.text(max_size=9), lambda v: type(v) is str)
REDUCTION = either(COUNT, word("previous"))
INITIALISER = word(
    *("he_normal", "he_normal_fan_out", "uniform_fan_in", "glorot_uniform"),
    *("normal_0.01", "zeros"),
)
POSITION = word("stem", "layer1", "layer2", "layer3", "shortcut")

FIELDS = {
    Architecture: {
        "units": tuples(whole(1, 10_000), 1, 5),
        "widths": tuples(COUNT, 3, 3),
        "strides": tuples(STRIDE, 3, 3),
        "reduction": a_stack(REDUCTION),
        "central_reduction": either(NONE, a_stack(REDUCTION)),
        "kernel": a_stack(KERNEL),
        "unit": word("bottleneck", "basic"),
        "bridge": a_stack(FLAG),
        "stem": FLAG,
        "stem_width": COUNT,
        "stem_kernel": KERNEL,
        "stem_stride": STRIDE,
        "stem_second_stride": either(NONE, STRIDE),
        "stem_deep": FLAG,
        "stem_pool": FLAG,
        "head": word("classifier", "latent", "none"),
        "head_input": word("pooled", "flattened"),
        "num_classes": COUNT,
        "hidden": tuples(COUNT, high=99),
        "latent": COUNT,
        "latent_variance": FLAG,
    },
    Semantics: {
        "order": word("pre", "post"),
        "stride_layer": word(1, 2),
        "strided_unit": word("first", "last"),
        "shortcut_input": word("raw", "preactivated"),
        "projection": word("when_needed", "every_stack"),
        "strided_shortcut": word("convolution", "selection"),
        "shortcut_pool": word("none", "average"),
        "shortcut_kernel": KERNEL,
        "padding": word("same", "symmetric"),
        "biases": tuples(POSITION, high=9),
        "norm": word("batch", "group"),
        "norm_groups": COUNT,
        "norm_epsilon": EPSILON,
        "norm_momentum": SHARE,
        "standardize_epsilon": either(NONE, EPSILON),
        "stem_norm": FLAG,
        "first_layer_exception": FLAG,
        "final_norm": FLAG,
        "pool_padding": word("lowest", "zero"),
        "kernel_init": INITIALISER,
        "dense_init": INITIALISER,
        "zero_init_last": FLAG,
    },
    Execution: {
        "dtype": word("float32", "bfloat16", "float64"),
        "remat": word("nothing", "norms", "units"),
        "backward": word("custom", "automatic"),
        "batch_norm_axis": either(NONE, TEXT),
    },
    TrainConfig: {
        "epochs": POSITIVE,
        "batch_size": POSITIVE,
        "accumulation_steps": POSITIVE,
        "eval_batch_size": POSITIVE,
        "optimizer": word("sgd", "adamw", "adam_l2", "lars", "muon"),
        "learning_rate": number(0, 1e6, without=(0,)),
        "momentum": SHARE,
        "nesterov": FLAG,
        "weight_decay": number(0, 1e6),
        "clip_norm": either(NONE, number(0, 1e6, without=(0,))),
        "trainable": word("all", "classifier"),
        "decay": word("kernels", "all"),
        "schedule": word(
            "steps", "cosine", "one_cycle", "linear", "constant", "exponential"
        ),
        # Of the 200 epochs of TrainConfig().
        "warmup_epochs": number(0, 200, without=(200,)),
        "lr_drops": tuples(
            number(0, 1, without=(0, 1)),
            high=99,
            rule=lambda v: list(v) == sorted(set(v)),
        ),
        "label_smoothing": SHARE,
        "ema_decay": SHARE,
        "stochastic_depth": SHARE,
        "sync_batch_norm": FLAG,
    },
    AugmentConfig: {
        "resize": either(NONE, whole(1, 1024)),
        "crop_padding": whole(0, 32),
        "flip": FLAG,
        "crop_scale": either(
            NONE,
            tuples(number(0, 1, without=(0,)), 2, 2, rule=lambda v: v[0] <= v[1]),
        ),
        "test_crop": number(0, 1, without=(0,)),
        "test_flip": FLAG,
        "color_jitter": SHARE,
        "randaugment": whole(0, 14),
        "randaugment_magnitude": whole(0, 30),
        "cutout": whole(0, 32),
        "mixup": either(NONE, number(0.001, 100)),
        "cutmix": either(NONE, number(0.001, 100)),
        "mean": tuples(number(0, 1), 3, 3),
        "std": tuples(number(1e-6, 1), 3, 3),
    },
    DataConfig: {
        "name": Kind(
            st.sampled_from(["cifar10", "cifar100", "mnist", "embedded_shapes"]),
            # Any other name may be one of TFDS; only the data directory says.
            lambda v: (
                type(v) is str
                and re.fullmatch(r"[a-z]\w*(/[\w.+-]*\w)?", v, re.ASCII) is not None
            ),
        ),
        "dir": either(NONE, TEXT),
        "archive": either(NONE, TEXT),
        "url": either(NONE, TEXT),
        "accept_checksum": FLAG,
        "image_size": either(NONE, whole(1, 1024)),
        "validation": whole(0, 2**31),
        "stream": either(NONE, FLAG),
        "workers": whole(0, 1024),
    },
    Config: {
        "weights": either(NONE, TEXT),
        "seed": whole(0, 2**32 - 1),
        "log_every": POSITIVE,
        "evaluate_every": POSITIVE,
        "target_accuracy": either(NONE, number(0, 1, without=(0,))),
        "checkpoint_every": POSITIVE,
        "checkpoint_steps": either(NONE, POSITIVE),
        "keep_checkpoints": POSITIVE,
    },
}
NORMALIZED = AugmentConfig(mean=(0.5,) * 3, std=(0.2,) * 3)
"""Where one of the two is changed."""

STRANGE = [
    *(None, True, False, 0, -1, 1.0, 2.0, 10**9, -(10**400), 1j, (), [], [3], {}),
    *(float("nan"), float("inf"), "", "3", "a\nb\u2028c", "\ud800", b"x", Architecture),
    *(np.int64(3), np.float64(0.5), np.zeros((2, 2)), ARTICLE, (None,), (1.0,) * 3),
    *((False,) * 3, (0, 1, 2), (True, 1, 1), (np.int64(1),) * 3, (float("nan"),) * 3),
    *(4, 33, 65, 257, 10_001, 2**20 + 1, 2**31, 2**32, (2, 4, 257), (2**20 + 1,) * 3),
    *((1,) * 4, (True,) * 4, (2, 2), 200),
]
SCALARS = st.one_of(
    st.sampled_from(STRANGE),
    st.integers(),
    st.floats(),
    st.text(max_size=9),
    COUNT.draw,
    SHARE.draw,
    POSITION.draw,
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=6).map(tuple)
        | st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=9,
)


@st.composite
def wrong_values(draw):
    kind = draw(st.sampled_from(list(FIELDS)))
    name = draw(st.sampled_from(sorted(FIELDS[kind])))
    value = draw(ANYTHING)
    assume(not FIELDS[kind][name].fits(value))
    return kind, name, value


def written(value):
    """As a message shows it: on one line, and not all of what is long."""
    return " ".join(repr(value).split())[:100]


def assert_refused(name, value, call, *arguments, **keywords):
    with pytest.raises(UsageError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert f"{name}=" in message
    assert written(value) in message
    assert re.search("must |choose |give |both or not", message)


def is_refused(call, *arguments):
    """Whether ``call`` refuses its arguments, in one line that names a field."""
    try:
        call(*arguments)
    except UsageError as error:
        assert len(str(error).splitlines()) == 1
        names = [name for rows in FIELDS.values() for name in rows]
        known = "|".join([*names, "image_shape", "width", "stride"])
        assert re.search(rf"\b({known})=", str(error))
        return True
    return False


# Wrong values, one at a time


@pytest.mark.parametrize("kind", [*FIELDS][:-1], ids=lambda kind: kind.__name__)
def test_every_field_is_tried(kind):
    named = {f.name for f in fields(kind)} - {"semantics"}
    assert set(FIELDS[kind]) == named


def assert_field_refused(kind, name, value):
    """By what checks this kind, with the name that its user knows."""
    if kind is Architecture:
        net = replace(Architecture(), **{name: value})
        assert_refused(name, value, plan, net)
    elif kind is Semantics:
        net = Architecture(semantics=replace(ARTICLE, **{name: value}))
        assert_refused(f"semantics.{name}", value, plan, net)
    elif kind is Execution:
        execution = replace(Execution(), **{name: value})
        assert_refused(f"execution.{name}", value, create_model, "article", execution)
    elif kind is Config:
        assert_refused(name, value, check_config, Config(**{name: value}))
    else:
        part = kind.__name__.removesuffix("Config").lower()
        config = Config(augment=NORMALIZED)
        changed = replace(getattr(config, part), **{name: value})
        changed = replace(config, **{part: changed})
        assert_refused(f"{part}.{name}", value, check_config, changed)


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_what_is_strange_is_refused_in_every_field(kind):
    for name, row in FIELDS[kind].items():
        wrong = [value for value in STRANGE if not row.fits(value)]
        assert len(wrong) > 20
        for value in wrong:
            assert_field_refused(kind, name, value)


@examples(800)
@given(wrong_values())
def test_a_wrong_value_is_refused_with_its_field_and_the_rule(case):
    assert_field_refused(*case)


@examples(60)
@given(ANYTHING, ANYTHING, ANYTHING, ANYTHING)
def test_what_is_no_configuration_is_refused(net, semantics, execution, shape):
    assert_refused("architecture", net, plan, net)
    if not isinstance(semantics, Semantics):
        assert_refused("semantics", semantics, plan, Architecture(semantics=semantics))
    assert_refused("execution", execution, create_model, Architecture(), execution)
    legal = either(NONE, tuples(whole(1, 2**16), 3, 3))
    if not legal.fits(shape):
        assert_refused("image_shape", shape, plan, Architecture(), shape)


@examples(300)
@given(st.data())
def test_a_unit_or_stack_by_hand_is_held_to_the_same_rules(data):
    custom = data.draw(st.sampled_from([plan_unit, plan_stack]))
    kinds = FIELDS[Architecture] | {
        "in_width": COUNT,
        "width": COUNT,
        "units": whole(1, 10_000),
        "stride": STRIDE,
        "reduction": REDUCTION,
        "central_reduction": either(NONE, REDUCTION),
        "kernel": KERNEL,
        "bridge": FLAG,
        "behind_norm": FLAG,
    }
    names = sorted(set(inspect.signature(custom).parameters) - {"semantics"})
    name, value = data.draw(st.sampled_from(names)), data.draw(ANYTHING)
    assume(not kinds[name].fits(value))
    legal = {"in_width": 8, "width": 8}
    if custom is plan_stack:
        legal["units"] = 1
    assert_refused(name, value, custom, **(legal | {name: value}))


@pytest.mark.parametrize("value", [10**5000, (10**5000,)], ids=["int", "tuple"])
@pytest.mark.parametrize("field", ["stem_width", "reduction", "hidden"])
def test_a_number_that_python_will_not_write_is_refused(field, value):
    with pytest.raises(UsageError, match=f"{field}=<.* too large to show> must be"):
        plan(Architecture(**{field: value}))


# Whole architectures


@st.composite
def semantics(draw):
    """Of any kind, most of them legal."""
    drawn = {name: draw(kind.draw) for name, kind in FIELDS[Semantics].items()}
    drawn |= {
        "shortcut_kernel": draw(st.sampled_from([1, 3])),
        "norm_groups": draw(st.sampled_from([1, 2])),
        # What a float32 of a few pixels can stand.
        "norm_epsilon": draw(st.sampled_from([1e-12, 1e-5, 1, 0.5])),
        "standardize_epsilon": draw(st.sampled_from([None, None, 1e-12, 1e-10, 1])),
    }
    if drawn["order"] == "post":
        drawn |= {"shortcut_input": "raw", "final_norm": False}
    return draw(st.sampled_from([*SEMANTICS.values(), *[Semantics(**drawn)] * 6]))


@st.composite
def architectures(draw, stacks=3):
    """Tiny ones with every field, most of them legal."""
    few, stride = st.integers(1, 5), st.integers(1, 3)
    count = draw(st.integers(1, stacks))

    def each(values):
        return st.tuples(*[values] * count)

    def one_or_each(values):
        return values | each(values)

    drawn = {name: draw(kind.draw) for name, kind in FIELDS[Architecture].items()}
    drawn |= {
        "units": draw(each(st.integers(1, 2))),
        "widths": draw(each(st.sampled_from([4, 8, 12]))),
        "strides": draw(each(stride)),
        "bridge": draw(one_or_each(st.booleans())),
        "kernel": draw(one_or_each(st.sampled_from([1, 3, 5]))),
        "reduction": 1,
        "central_reduction": None,
        "stem_width": draw(st.sampled_from([4, 8])),
        "stem_kernel": draw(st.sampled_from([1, 3, 7])),
        "stem_stride": draw(stride),
        "stem_second_stride": draw(st.none() | stride),
        "num_classes": draw(few),
        "hidden": draw(st.lists(few, max_size=2).map(tuple)),
        "latent": draw(few),
        "semantics": draw(semantics()),
    }
    if drawn["stem_deep"]:
        drawn["stem_kernel"] = 3
    if drawn["unit"] == "bottleneck":
        reduction = one_or_each(st.sampled_from([1, 2, "previous"]))
        drawn["reduction"] = draw(reduction)
        drawn["central_reduction"] = draw(st.none() | reduction)
    return Architecture(**drawn)


SHAPES = st.tuples(st.integers(1, 9), st.integers(2, 9), st.integers(1, 4))
EXECUTIONS = st.builds(
    Execution,
    dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
    remat=st.sampled_from(["nothing", "norms", "units"]),
    backward=st.sampled_from(["custom", "automatic"]),
)


@st.composite
def changed_architectures(draw):
    """With fields that do not fit together, or are wrong in themselves."""
    net = draw(architectures(stacks=6))
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from([Architecture, Architecture, Semantics]))
        name = draw(st.sampled_from(sorted(FIELDS[kind])))
        value = draw(FIELDS[kind][name].draw | ANYTHING)
        if kind is Semantics:
            name, value = "semantics", replace(net.semantics, **{name: value})
        net = replace(net, **{name: value})
    return net


def survives_json(config):
    again = from_json(to_json(config))
    # The text too: 1 == 1.0 == True.
    return again == config and repr(again) == repr(config)


def test_an_architecture_is_planned_or_refused():
    planned = Counter()
    shapes = st.none() | SHAPES | st.tuples(*[whole(1, 2**16).draw] * 3) | ANYTHING

    @examples(350)
    @given(changed_architectures(), shapes)
    def holds(net, shape):
        if is_refused(plan, net, shape):
            planned["refused"] += 1
            return
        planned["legal"] += 1
        assert hash(plan(net, shape)) == hash(plan(net, shape))
        assert survives_json(Config(architecture=net))
        assert net.depth > sum(net.units)
        if sum(net.units) < 100:
            fields = receptive_field(plan(net, shape))
            assert len(fields) == len(net.units) + net.stem
            assert shape is None or layer_table(plan(net, shape), shape)

    holds()
    assert min(planned["refused"], planned["legal"]) >= 75, planned


def sizes(params):
    """Numbers at each path without its last word: "stem/conv" -> 108."""
    found = Counter()
    for path, leaf in flatten_dict(params).items():
        found["/".join(path[:-1])] += leaf.size
    return found


def shapes_of(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def precision(execution):
    return jax.enable_x64(True) if execution.dtype == "float64" else nullcontext()


def loss_of(model):
    """Loss and new statistics; what the net gives out in training, in evaluation."""

    def loss(params, stats, images):
        variables = {"params": params, **stats}
        out, new = model.apply(variables, images, train=True, mutable=["batch_stats"])
        seen = model.apply(variables, images, train=False)
        # In the precision of the parameters: a net without a head gives bfloat16.
        total = sum(
            jnp.square(y.astype(model.execution.param_dtype)).mean()
            for y in jax.tree.leaves((out, seen))
        )
        return total, (out, seen, new)

    return loss


def expected_output(net, shape):
    if net.head == "none":
        rows = [
            r
            for r in layer_table(plan(net, shape), shape)
            if r.name.startswith("stack")
        ]
        main = [r for r in rows if "layer" in r.name]
        return [(2, *main[-1].shape)]
    if net.head == "classifier":
        return [(2, net.num_classes)]
    return [(2, net.latent)] * (1 + net.latent_variance)


def test_linen_makes_what_the_plan_says():
    made = Counter()

    @examples(30)
    @given(architectures(), EXECUTIONS, SHAPES)
    def holds(net, execution, shape):
        with precision(execution):
            if is_refused(create_model, net, execution, shape):
                return
            model = create_model(net, execution, shape)
            images = jax.ShapeDtypeStruct((2, *shape), "float32")
            key = jax.random.key(0)
            variables = jax.eval_shape(partial(model.init, train=False), key, images)
            drawn = jax.eval_shape(
                lambda key: init_in_one_draw(model, key, shape), jax.random.key(0)
            )
            assert shapes_of(drawn) == shapes_of(variables)
            params = variables.pop("params")
            rows = {
                row.name: row.parameters for row in layer_table(plan(net, shape), shape)
            }
            assert sizes(params) == rows
            step = jax.value_and_grad(loss_of(model), has_aux=True)
            (_, (out, seen, new)), gradients = jax.eval_shape(
                step, params, variables, images
            )
        assert shapes_of(gradients) == shapes_of(params)
        assert shapes_of(new) == shapes_of(variables)
        assert [y.shape for y in jax.tree.leaves(out)] == expected_output(net, shape)
        assert shapes_of(seen) == shapes_of(out)
        dtype = execution.dtype if net.head == "none" else execution.param_dtype
        assert all(y.dtype == dtype for y in jax.tree.leaves(out))
        made["nets"] += 1

    holds()
    assert made["nets"] >= 15


def test_what_is_legal_runs_forward_and_backward_in_finite_numbers():
    made = Counter()

    @examples(10)
    @given(architectures(stacks=2), EXECUTIONS, SHAPES)
    def holds(net, execution, shape):
        with precision(execution):
            if is_refused(create_model, net, execution, shape):
                return
            model = create_model(net, execution, shape)
            variables, images = variables_of(model, (2, *shape)), images_of(2, shape)
            params = variables.pop("params")
            step = jax.jit(jax.value_and_grad(loss_of(model), has_aux=True))
            lowered = step.lower(params, variables, images)
            # Compiled as fast as may be: it runs once.
            run = lowered.compile({"xla_backend_optimization_level": 0})
            results = run(params, variables, images)
            assert jax.tree.structure(results[1]) == jax.tree.structure(params)
            for path, leaf in jax.tree_util.tree_leaves_with_path(results):
                assert np.isfinite(leaf.astype("float32")).all(), path
        made["nets"] += 1

    holds()
    assert made["nets"] >= 5


# JSON


@st.composite
def configs(draw):
    def part(kind):
        return kind(**{name: draw(row.draw) for name, row in FIELDS[kind].items()})

    return replace(
        part(Config),
        architecture=draw(architectures(stacks=5)),
        execution=part(Execution),
        data=part(DataConfig),
        augment=part(AugmentConfig),
        train=part(TrainConfig),
    )


@examples(200)
@given(configs())
def test_a_configuration_survives_json(config):
    assert survives_json(config)
    is_refused(check_config, config)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**30, 1e400, "a\nb", "\ud800", "pre", "previous", 1, 2, 0.5]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed_json(draw):
    """What a configuration would be after somebody's editing, and where it was done."""
    values, places = json.loads(to_json(draw(configs()))), []
    for _ in range(draw(st.integers(1, 2))):
        at, path = values, []
        while True:
            name = draw(st.sampled_from(sorted(at)))
            path.append(name)
            if not isinstance(at[name], dict) or not at[name] or draw(st.booleans()):
                break
            at = at[name]
        what = draw(st.sampled_from(["other", "other", "gone", "renamed", "in a list"]))
        if what == "renamed":
            path[-1] = draw(st.text(max_size=5))
            at[path[-1]] = at.pop(name)
            places.append(name)
        elif what == "gone":
            del at[name]
        else:
            at[name] = draw(JSON_VALUES) if what == "other" else [at[name]]
        places.append(".".join(path))
        if not values:
            break
    return values, places


def with_defaults(values, default):
    if not is_dataclass(default):
        return values
    return {
        f.name: with_defaults(values[f.name], getattr(default, f.name))
        if f.name in values
        else json.loads(json.dumps(getattr(default, f.name), default=vars))
        for f in fields(default)
    }


def test_an_edited_configuration_is_read_as_written_or_refused():
    seen = Counter()

    @examples(250)
    @given(changed_json())
    def holds(case):
        values, places = case
        try:
            config = from_json(json.dumps(values))
        except UsageError as error:
            message = str(error)
            assert len(message.splitlines()) == 1
            known = {re.escape(repr(place)[1:-1]) for place in places}
            assert re.search("|".join(known), message), message
            seen["refused"] += 1
            return
        values.pop("schema")
        expected = {"schema": SCHEMA, **with_defaults(values, Config())}
        assert json.loads(to_json(config)) == expected
        assert survives_json(config)
        seen["read"] += 1

    holds()
    assert min(seen["refused"], seen["read"]) >= 25, seen


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "null", "[]", "3", '"schema"', "NaN", "\ufeff{}", '{"seed": 1}'),
        *('{"schema": true}', '{"schema": 1.0}'),
        *("[" * 100_000, '{"a":' * 100_000, "9" * 5000),
        '{"schema": 2, "seed": ' + "9" * 5000 + "}",
        '{"schema": 2, "seed": 1e999}',
        '{"schema": 2, "seed": ' + "[" * 400 + "]" * 400 + "}",
        '{"schema": 2, "seed": ' + "[" * 900 + "]" * 900 + "}",
        '{"schema": "a\\nb"}',
        '{"schema": 2, "a\\n\\ud800": 1}',
        '{"schema": 2, "train": [["epochs", 3]]}',
        '{"schema": 2, "augment": {"mean": [NaN, 0, 0]}}',
        '{"schema": 2, "architecture": {"semantics": "HE2016"}}',
    ],
    ids=lambda text: text[:30],
)
def test_what_is_no_configuration_is_refused_in_a_line(text):
    with pytest.raises(UsageError) as caught:
        from_json(text)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert len(message) < 500
