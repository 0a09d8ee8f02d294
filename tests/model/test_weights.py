"""Weights of others: names, layouts, round trips, and what is refused."""

import io
import logging
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from flax_resnetv2 import (
    BIT,
    KERAS,
    PRESETS,
    TIMM,
    Architecture,
    UsageError,
    create_model,
    from_bit,
    from_keras,
    from_timm,
    to_bit,
    to_keras,
    to_timm,
)
from flax_resnetv2.model import weight_layouts
from tests.support import golden, peers
from tests.support.tiny import variables_of

NET = Architecture(
    units=(2, 1),
    widths=(8, 16),
    strides=(1, 2),
    stem_width=4,
    stem_kernel=7,
    stem_stride=2,
    stem_pool=True,
    num_classes=5,
)
KERAS_NET = replace(NET, semantics=KERAS)
TIMM_NET = replace(NET, semantics=TIMM)
DEEP_NET = replace(NET, semantics=TIMM, stem_kernel=3, stem_deep=True)
BIT_NET = replace(NET, semantics=replace(BIT, norm_groups=2))


def keras_3(file, tensors):
    """As Keras 3 writes: numbered classes of layers, each with its name beside it."""
    layers = {}
    for name, tensor in tensors.items():
        layers.setdefault(name.split("/")[0], []).append((name, tensor))
    order = ["kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"]
    with h5py.File(file, "w") as h5:
        for number, (layer, variables) in enumerate(layers.items()):
            group = h5.create_group(f"layers/layer_{number}/vars")
            group.attrs["name"] = layer
            variables.sort(key=lambda pair: order.index(pair[0].split("/")[1]))
            for k, (_, tensor) in enumerate(variables):
                group[str(k)] = tensor
        h5.create_group("layers/activation/vars").attrs["name"] = "relu"


def write_keras_weights(path, tensors):
    keras_3(path, tensors)


def write_keras_archive(path, tensors):
    buffer = io.BytesIO()
    keras_3(buffer, tensors)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", buffer.getvalue())


def write_keras_classic(path, tensors):
    with h5py.File(path, "w") as h5:
        for name, tensor in tensors.items():
            layer, variable = name.split("/")
            h5[f"{layer}/{layer}/{variable}:0"] = tensor


def write_timm(path, tensors):
    more = {"norm.num_batches_tracked": np.asarray(7)}
    save_file(tensors | more, path)


def write_npz(path, tensors):
    np.savez(path, **tensors)


FORMATS = {
    "keras": ("x.keras", KERAS_NET, to_keras, write_keras_archive, from_keras),
    "weights": ("x.weights.h5", KERAS_NET, to_keras, write_keras_weights, from_keras),
    "classic": ("x.h5", KERAS_NET, to_keras, write_keras_classic, from_keras),
    "timm": ("x.safetensors", TIMM_NET, to_timm, write_timm, from_timm),
    "timm-d": ("x.safetensors", DEEP_NET, to_timm, write_timm, from_timm),
    "timm-bit": ("x.safetensors", BIT_NET, to_timm, write_timm, from_timm),
    "bit": ("x.npz", BIT_NET, to_bit, write_npz, from_bit),
}


@pytest.fixture(params=FORMATS)
def stored(request, tmp_path):
    """A file, the function that reads it, its net and its variables."""
    name, net, export, write, read = FORMATS[request.param]
    model = create_model(net)
    variables = variables_of(model, (1, 32, 32, 3))
    write(tmp_path / name, export(variables, model))
    return tmp_path / name, read, net, variables


def assert_equal(found, expected):
    found, expected = flatten_dict(found), flatten_dict(expected)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, err_msg=path)
        assert found[path].dtype == array.dtype


def test_what_was_exported_comes_back_bit_by_bit(stored):
    path, read, net, variables = stored
    assert_equal(read(path, create_model(net)), variables)


def test_another_classifier_keeps_its_own_head_and_that_is_said(stored, caplog):
    path, read, net, variables = stored
    model = create_model(replace(net, num_classes=3, hidden=(6,)))
    with caplog.at_level(logging.WARNING):
        found = read(path, model, classifier="leave")
    assert "the classifier of the file is left out" in caplog.text
    head = found["params"].pop("head")
    expected = variables["params"].pop("head")
    assert head["classifier"]["kernel"].shape == (6, 3)
    assert set(head) == {"norm", "hidden1", "classifier"}
    assert_equal(head["norm"], expected["norm"])
    assert_equal(found, variables)


def test_a_backbone_without_a_head_is_read(stored):
    path, read, net, variables = stored
    model = create_model(replace(net, head="none"))
    found = read(path, model, classifier="leave")
    del variables["params"]["head"]["classifier"]
    assert_equal(found, variables)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 3}, r"of another shape: .* instead of .*classifier='leave'"),
        ({"units": (1, 1)}, r"only in the file: .* and \d+ more"),
        ({"units": (2, 2)}, r"only in the model: .* and \d+ more"),
        ({"widths": (8, 32)}, r"of another shape: .* and \d+ more"),
    ],
)
def test_the_file_of_another_net_is_refused_with_both_sides(stored, change, message):
    path, read, net, _ = stored
    with pytest.raises(UsageError, match=message) as refusal:
        read(path, create_model(replace(net, **change)))
    assert "nothing was loaded" in str(refusal.value)


def test_a_model_of_another_kind_is_refused(stored):
    path, read, net, _ = stored
    with pytest.raises(UsageError, match=r"has no counterpart in .*|holds another net"):
        read(path, create_model(replace(net, stem_second_stride=1)))


def test_batch_statistics_have_no_counterpart_in_big_transfer(tmp_path):
    path = tmp_path / "x.npz"
    model = create_model(BIT_NET)
    write_npz(path, to_bit(variables_of(model, (1, 32, 32, 3)), model))
    with pytest.raises(UsageError, match=r"norm/(mean|var) has no counterpart in .*"):
        from_bit(path, create_model(TIMM_NET))


def test_an_unknown_word_for_the_classifier_is_refused(stored):
    path, read, net, _ = stored
    with pytest.raises(UsageError, match=r"classifier='skip' is unknown; .* 'leave'"):
        read(path, create_model(net), classifier="skip")


def test_a_head_that_depends_on_the_images_is_refused(stored):
    path, read, net, _ = stored
    model = create_model(replace(net, head_input="flattened", num_classes=3))
    with pytest.raises(UsageError, match="head_input='flattened' makes a head"):
        read(path, model, classifier="leave")


def test_layers_that_are_no_resnet_are_seen(tmp_path):
    model = create_model(KERAS_NET)
    path = tmp_path / "x.weights.h5"
    keras_3(path, to_keras(variables_of(model, (1, 32, 32, 3)), model))
    with h5py.File(path, "a") as h5:
        group = h5.create_group("layers/normalization/vars")
        group.attrs["name"] = "normalization"
        for k in range(3):
            group[str(k)] = np.zeros(3)
    with pytest.raises(UsageError, match="only in the file: normali"):
        from_keras(path, model)


def test_files_of_another_kind_under_the_name_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(UsageError, match=r"x.npz is damaged, or not in the format"):
        from_bit(tmp_path / "x.npz", create_model(BIT_NET))
    with h5py.File(tmp_path / "x.h5", "w") as h5:
        h5["data"] = np.zeros(3)
    with pytest.raises(UsageError, match=r"x.h5 is damaged, or not in the format"):
        from_keras(tmp_path / "x.h5", create_model(KERAS_NET))
    np.savez_compressed(tmp_path / "y.npz", a=np.arange(10000))
    flipped = bytearray((tmp_path / "y.npz").read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    (tmp_path / "y.npz").write_bytes(flipped)
    with pytest.raises(UsageError, match=r"y.npz is damaged, or not in the format"):
        from_bit(tmp_path / "y.npz", create_model(BIT_NET))


def test_a_truncated_file_is_refused(stored):
    path, read, net, _ = stored
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=f"{path.name} is damaged"):
            read(path, create_model(net))


def test_a_file_that_is_not_there_is_named(stored):
    path, read, net, _ = stored
    path.unlink()
    with pytest.raises(UsageError, match=f"{path.name} cannot be opened"):
        read(path, create_model(net))


def test_a_pickle_is_refused_with_its_conversion(tmp_path):
    with pytest.raises(UsageError, match=r"x.pth .* pickle, .* s.save_file"):
        from_timm(tmp_path / "x.pth", create_model(TIMM_NET))


class Payload:
    """Would write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_executed(tmp_path):
    harm = tmp_path / "harm"
    np.savez(tmp_path / "x.npz", np.asarray([Payload(harm)], object))
    assert pickle.loads(pickle.dumps(Payload(harm))) is None, "the payload works"
    harm.unlink()
    with pytest.raises(UsageError, match="is damaged, or not in the format"):
        from_bit(tmp_path / "x.npz", create_model(BIT_NET))
    assert not harm.exists()


def test_layers_without_names_are_refused(tmp_path):
    model = create_model(KERAS_NET)
    path = tmp_path / "x.weights.h5"
    keras_3(path, to_keras(variables_of(model, (1, 32, 32, 3)), model))
    with h5py.File(path, "a") as h5:
        for layer in h5["layers"].values():
            del layer["vars"].attrs["name"]
    with pytest.raises(UsageError, match="does not name its layers"):
        from_keras(path, model)


def names_of(preset, export):
    model = create_model(preset)
    shapes = golden.variable_shapes(PRESETS[preset].architecture)
    # No memory behind them, whatever their size.
    empty = jax.tree.map(
        lambda s: np.lib.stride_tricks.as_strided(
            np.zeros(1, np.float32), s.shape, (0,) * len(s.shape)
        ),
        shapes,
    )

    layout = {
        to_keras: weight_layouts.KERAS,
        to_timm: weight_layouts.timm(model),
        to_bit: weight_layouts.BIT,
    }[export]
    return {
        layout.tensor(leaf): list(layout.theirs(leaf, array).shape)
        for leaf, array in flatten_dict(empty).items()
    }


PEERS = sorted(path.stem for path in peers.HERE.glob("*.json"))


@pytest.mark.parametrize("preset", PEERS)
def test_names_and_shapes_are_those_of_the_peer(preset):
    """The scripts in ``tests.support.peers`` wrote them, from the peers themselves."""
    export = to_keras if preset.startswith("keras") else to_timm
    found = {name: tuple(shape) for name, shape in names_of(preset, export).items()}
    assert found == peers.shapes(preset)


def test_every_net_of_a_peer_is_held_against_it():
    families = ("keras-", "timm-", "bit-")
    assert [name for name in sorted(PRESETS) if name.startswith(families)] == PEERS


BIT_NAMES = {
    "resnet/root_block/standardized_conv2d/kernel": [7, 7, 3, 192],
    "resnet/block1/unit01/a/group_norm/gamma": [192],
    "resnet/block1/unit01/a/proj/standardized_conv2d/kernel": [1, 1, 192, 768],
    "resnet/block4/unit03/b/standardized_conv2d/kernel": [3, 3, 1536, 1536],
    "resnet/group_norm/beta": [6144],
    "resnet/head/conv2d/kernel": [1, 1, 6144, 1000],
}


def test_names_and_shapes_are_those_of_big_transfer():
    names = names_of("bit-r50x3", to_bit)
    assert {name: names[name] for name in BIT_NAMES} == BIT_NAMES
    leaves = jax.tree.leaves(golden.variable_shapes(PRESETS["bit-r50x3"].architecture))
    assert len(names) == len(leaves), "two arrays have one name"
