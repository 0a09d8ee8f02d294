"""States on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_resnetv2 import Checkpointer


def test_states_come_back_bit_for_bit_where_they_belong(tmp_path):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ("d",))
    place = NamedSharding(mesh, PartitionSpec())
    states = {
        step: jax.device_put({"a": jnp.arange(3.0) + step, "n": jnp.int32(step)}, place)
        for step in (1, 2, 3)
    }
    checkpoints = Checkpointer(tmp_path / "c", keep=2)
    assert checkpoints.latest() is None
    for step, state in states.items():
        checkpoints.save(step, state)
    checkpoints.close()
    again = Checkpointer(tmp_path / "c", keep=2)
    assert again.latest() == 3
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["2", "3"]
    restored, _ = again.restore(2, like=states[1])
    jax.tree.map(np.testing.assert_array_equal, restored, states[2])
    assert restored["a"].sharding == place
    again.close()


def test_what_is_saved_may_change_at_once(tmp_path):
    """The notes, and the memory of the arrays."""
    like = {"a": jnp.arange(5.0)}
    with Checkpointer(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 2, 3):
            state = jax.device_put({"a": jnp.full(5, float(step))})
            notes = {"step": step}
            checkpoints.save(step, state, notes)
            notes["step"] = -1
            jax.jit(lambda x: x["a"] * 0 - 1, donate_argnums=0)(state)
            assert checkpoints.latest() == step
        with pytest.raises(ValueError, match="step 3 is not newer than 3"):
            checkpoints.save(3, like)
    with Checkpointer(tmp_path / "c") as checkpoints:
        for step in (2, 3):
            state, notes = checkpoints.restore(step, like)
            np.testing.assert_array_equal(state["a"], np.full(5, float(step)))
            assert notes == {"step": step}
