"""Strict JAX for every test: eight CPU devices, no promotion of dtypes and ranks.

``exhaustive.txt`` lists the tests that take long and repeat, with more cases or at full
size, what another test checks: ``python -m pytest -m exhaustive`` runs these alone, and
``-m ""`` all tests.
"""

import gc
import os
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compiling takes longer than running what was compiled, so it is done with few
# optimizations, here and in child processes. CI repeats the tests of the numbers with
# all of them, as users compile: it sets this variable.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"


@pytest.fixture
def float64():
    """Switch float64 on for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    """A random key."""
    return jax.random.key(0)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(config, items):
    """Mark the tests of ``exhaustive.txt``: one case, or all cases of a function."""
    lines = Path(__file__).with_name("exhaustive.txt").read_text().splitlines()
    listed = {line for line in lines if not line.startswith("#")}
    unused = set(listed)
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        if found := listed & {name, name.partition("[")[0]}:
            item.add_marker(pytest.mark.exhaustive)
            unused -= found
    # Only of files that were collected as a whole.
    files = {item.nodeid.removeprefix("tests/").partition("::")[0] for item in items}
    unused = {line for line in unused if line.partition("::")[0] in files}
    if unused and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"exhaustive.txt names no test: {sorted(unused)}")


@pytest.fixture(scope="session", autouse=True)
def _compile_once(tmp_path_factory):
    """Keep compiled programs on disk for this session and its child processes, because
    most tests compile the same tiny nets."""
    # xdist's workers share it; TEST_PROGRAMS names one for several sessions.
    session = tmp_path_factory.getbasetemp()
    session = session.parent if "PYTEST_XDIST_WORKER" in os.environ else session
    programs = os.environ.get("TEST_PROGRAMS", session / "programs")
    settings = {
        "jax_compilation_cache_dir": str(programs),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Free the programs of a module's tests: each maps pieces of memory, of which Linux
    gives a process 65,530 (``vm.max_map_count``), and XLA crashes for want of one."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _restore_cache():
    """Undo what a command changed: where compiled programs are kept."""
    before = jax.config.jax_compilation_cache_dir
    yield
    if jax.config.jax_compilation_cache_dir != before:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
