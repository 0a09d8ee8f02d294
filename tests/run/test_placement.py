"""Arrays and functions on devices, apart from any run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_resnetv2.run.placement import AXIS, Placement, sum_on_host

TREE = {"a": np.arange(6.0, dtype=np.float32), "n": np.int32(7)}
ROWS = np.arange(24, dtype=np.float32).reshape(8, 3)
EXECUTORS = ("pmap", "jit")

each = pytest.mark.parametrize(
    ("devices", "executor"), [(n, name) for n in (1, 2, 8) for name in EXECUTORS]
)


def placed(devices, executor):
    return Placement(jax.devices()[:devices], executor)


def copies(array):
    return [np.asarray(shard.data) for shard in array.addressable_shards]


@each
def test_a_replica_is_whole_on_every_device(devices, executor):
    placement = placed(devices, executor)
    assert placement.count == devices
    assert placement.axis == (AXIS if devices > 1 else None)
    for name, array in placement.replicate(TREE).items():
        assert array.sharding.device_set == set(jax.devices()[:devices])
        assert len(copies(array)) == devices
        for copy in copies(array):
            np.testing.assert_array_equal(copy, TREE[name])


@each
def test_the_global_view_and_back_copies_nothing(devices, executor):
    placement = placed(devices, executor)
    tree = placement.replicate(TREE)
    there = placement.as_global(tree)
    back = placement.as_local(there)
    for name, array in tree.items():
        assert there[name].sharding == placement.global_sharding
        assert back[name].sharding == array.sharding
        pointers = [
            [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]
            for x in (array, there[name], back[name])
        ]
        assert pointers[0] == pointers[1] == pointers[2]
        np.testing.assert_array_equal(back[name], TREE[name])


@each
def test_rows_are_shared_in_order(devices, executor):
    parts = copies(placed(devices, executor).shard(ROWS))
    assert len(parts) == devices
    parts = [part.reshape(-1, 3) for part in parts]
    assert {len(part) for part in parts} == {8 // devices}
    np.testing.assert_array_equal(np.concatenate(parts), ROWS)


def run(devices, executor, sharded, donate=False):
    """Map a function that sums over the devices; return its result on the host."""
    placement = placed(devices, executor)

    def function(first, rows, more):
        total = jnp.tanh(rows).sum()
        if placement.axis is not None:
            total = jax.lax.psum(total, placement.axis)
        return {"a": first["a"] * total, "n": first["n"] + jnp.int32(more.shape[1])}

    first = placement.replicate(TREE)
    place = placement.shard if sharded else placement.replicate
    result = placement.map(function, donate, sharded)(first, place(ROWS), place(ROWS))
    for array in result.values():
        assert len({copy.tobytes() for copy in copies(array)}) == 1
    return jax.device_get(result), first


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_both_executors_compute_the_same_bits(devices, sharded):
    results = [run(devices, executor, sharded)[0] for executor in EXECUTORS]
    jax.tree.map(np.testing.assert_array_equal, *results)
    shares = 1 if sharded else devices
    expected = TREE["a"] * np.tanh(ROWS).sum() * shares
    np.testing.assert_allclose(results[0]["a"], expected, rtol=1e-5)
    assert results[0]["n"] == 7 + 3


@each
def test_donated_arrays_are_gone(devices, executor):
    _, first = run(devices, executor, sharded=True, donate=True)
    assert first["a"].is_deleted()
    _, first = run(devices, executor, sharded=True)
    assert not first["a"].is_deleted()


def test_a_result_can_be_the_next_argument():
    """Its sharding is that of ``replicate``, so nothing is compiled again."""
    for executor in EXECUTORS:
        placement = placed(2, executor)
        mapped = placement.map(lambda x: x + 1)
        first = placement.replicate(np.float32(0))
        second = mapped(first)
        assert second.sharding.is_equivalent_to(first.sharding, 0)
        assert float(mapped(second)) == 2


def test_sums_on_the_host_continue_where_they_stopped():
    metrics = [{"x": jnp.float32(v)} for v in (0.1, 1e8, -1e8, 0.3)]
    whole = sum_on_host(metrics)
    assert whole == sum_on_host(metrics[2:], sum_on_host(metrics[:2]))
    assert isinstance(whole["x"], float)
    assert whole["x"] == pytest.approx(0.4, abs=1e-7)
