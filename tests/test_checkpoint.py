"""States on disk."""

import jax
import jax.numpy as jnp
import numpy as np
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
