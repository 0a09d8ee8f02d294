"""Settings of a process that trains: kept memory, compiled programs on disk.

Called by the commands. Whoever imports the package decides about his own process.
"""

import ctypes
import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path


def user_cache() -> Path:
    """Give this project's directory among the user's caches; it may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "flax_resnetv2"


def keep_memory() -> bool:
    """Keep the memory that a step frees for the next one, where the CPU trains.

    XLA allocates all memory of a step anew, a gigabyte and more. The C library gives it
    back to the system after the step, and the system clears every page again: a
    quarter of a step's time. To be called before JAX has started its backend.

    Returns:
        Whether it was done: with the GNU C library, and where JAX finds neither a
        plugin of an accelerator nor a TPU, since there the memory lies elsewhere.
    """
    accelerated = (
        find_spec("jax_plugins")
        or find_spec("libtpu")
        or entry_points(group="jax_plugins")
    )
    if accelerated and os.environ.get("JAX_PLATFORMS") != "cpu":
        return False
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # <malloc.h>: one arena, whose top is never given back, and no blocks outside it.
    arena_max, mmap_max, trim_threshold = -8, -4, -1
    settings = ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1))
    return all([mallopt(name, value) == 1 for name, value in settings])


def cache_compilations() -> Path | None:
    """Keep compiled programs in the user's cache directory, for the next process.

    A directory that JAX was told (``JAX_COMPILATION_CACHE_DIR``) stays.

    Returns:
        Where they are kept; None: the directory cannot be written.
    """
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        directory = user_cache() / "xla"
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        if not os.access(directory, os.W_OK):
            return None
        jax.config.update("jax_compilation_cache_dir", str(directory))
        # A start is also many small programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return Path(jax.config.jax_compilation_cache_dir)
