"""What the commands set in their process, each tried in a process of its own."""

import os
import subprocess
import sys

import jax
import pytest

from flax_resnetv2.system import runtime

ALLOCATING = """
import resource, sys
from flax_resnetv2.system.runtime import keep_memory
import jax, jax.numpy as jnp
if sys.argv[1] == "keep":
    assert keep_memory()

@jax.jit
def step(x):
    # Products cannot be fused: 64 MB of intermediates.
    for _ in range(4):
        x = jnp.tanh(x @ x)
    return x[0, 0]

x = jnp.zeros([2048, 2048])
for _ in range(8):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip(), done.stderr


# Elsewhere `keep_memory` does nothing and says so: there is nothing to measure.
of_glibc = pytest.mark.skipif(
    sys.platform != "linux", reason="a setting of the GNU C library"
)


@of_glibc
def test_kept_memory_is_not_cleared_by_the_system_again():
    kept = int(run(ALLOCATING, "keep", JAX_PLATFORMS="cpu")[0])
    given_back = int(run(ALLOCATING, "plain", JAX_PLATFORMS="cpu")[0])
    assert 2 * kept < given_back
    assert given_back > 10_000


def test_memory_is_left_alone_beside_an_accelerator(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(runtime, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(runtime.ctypes, "CDLL", None)
    assert runtime.keep_memory() is False


TOUCHING = """
import ctypes, resource, sys
from flax_resnetv2.system.runtime import keep_memory, touch_memory
assert touch_memory(1 << 20) is None, "memory is not kept yet"
size = 200 << 20
if sys.argv[1] == "touched":
    assert keep_memory()
    touch_memory(size).join()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
libc.memset(libc.malloc(size), 1, size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@of_glibc
def test_touched_memory_is_there_for_whoever_comes_next():
    plain, touched = (
        int(run(TOUCHING, way, JAX_PLATFORMS="cpu")[0]) for way in ("plain", "touched")
    )
    assert touched < plain / 10


CONVOLVING = """
import sys
from flax_resnetv2 import tune
if sys.argv[1] == "chosen":
    tune()
import jax, jax.numpy as jnp
from flax_resnetv2.model.ops import plain_convolution
x, kernel = jnp.ones([8, 16, 16, 32]), jnp.ones([3, 3, 32, 32])
print(jax.jit(plain_convolution).lower(x, kernel).compile().as_text())
"""


def test_convolutions_leave_ynnpack():
    assert "ynn" in run(CONVOLVING, "plain", JAX_PLATFORMS="cpu", XLA_FLAGS="")[0]
    assert "ynn" not in run(CONVOLVING, "chosen", JAX_PLATFORMS="cpu", XLA_FLAGS="")[0]


def test_flags_of_the_user_stay(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=reduce")
    assert runtime.choose_convolutions() is False
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_ftz=true")
    assert runtime.choose_convolutions() is True
    assert runtime.os.environ["XLA_FLAGS"].split() == [
        "--xla_cpu_ftz=true",
        "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution",
    ]


@pytest.fixture
def untouched():
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    old = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in old.items():
        jax.config.update(name, value)


def test_compiled_programs_go_to_the_users_cache(untouched, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = tmp_path / "flax_resnetv2" / "xla"
    assert runtime.cache_compilations() == expected
    assert jax.config.jax_compilation_cache_dir == str(expected)
    assert not expected.exists(), "JAX makes it when it has something to keep"


def test_a_cache_that_jax_was_told_stays(untouched, monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", "/told")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert str(runtime.cache_compilations()) == "/told"
    assert not list(tmp_path.iterdir())


def test_no_place_for_a_cache_is_no_error(untouched, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert runtime.cache_compilations() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_flags_may_lie_in_a_file(tmp_path, monkeypatch):
    """XLA reads a file if the variable does not begin with a dash."""
    (tmp_path / "flags").write_text("--a=1\n--b=2\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    runtime.make_deterministic()
    assert os.environ["XLA_FLAGS"] == "--a=1 --b=2 --xla_gpu_deterministic_ops=true"
