"""Strict JAX for every test: eight CPU devices, no implicit promotion of dtypes."""

import gc

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def float64():
    """Switch float64 on for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    """A random key."""
    return jax.random.key(0)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Free the programs of a module's tests: each maps pieces of memory, of which Linux
    gives a process 65,530 (``vm.max_map_count``), and XLA crashes for want of one."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _keep_no_programs():
    """Undo what a command did: it keeps compiled programs from then on, and XLA has
    crashed writing one of a later test."""
    before = jax.config.jax_compilation_cache_dir
    yield
    if jax.config.jax_compilation_cache_dir != before:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
