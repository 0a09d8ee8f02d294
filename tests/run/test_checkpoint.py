"""States on disk."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_resnetv2 import Checkpointer, RunError


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


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "a"),
        ValueError("Error opening: Permission denied [os_error_code='EACCES']"),
    ],
)
def test_what_may_not_be_read_is_not_damaged(tmp_path, monkeypatch, error):
    """Orbax and tensorstore say it in two ways."""
    like = {"a": jnp.arange(5.0)}
    with Checkpointer(tmp_path / "c", keep=2) as checkpoints:
        checkpoints.save(1, like)

    def refuse(*_, **__):
        raise error

    with Checkpointer(tmp_path / "c", keep=2) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", refuse)
        with pytest.raises(RunError, match=r"1 cannot be read \(.*; let this user"):
            checkpoints.restore_newest(like)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


def test_an_error_of_writing_is_told_once(tmp_path, monkeypatch, caplog):
    like = {"a": jnp.arange(5.0)}

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    message = r"written .*No space left .*; free some space"
    with (
        pytest.raises(RunError, match=message),
        Checkpointer(tmp_path / "c", keep=2) as checkpoints,
    ):
        monkeypatch.setattr(checkpoints._manager, "save", refuse)
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", refuse)
        checkpoints.save(1, like)
        checkpoints.wait()
    assert not caplog.records
