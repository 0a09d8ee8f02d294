"""The process and its JAX runtime: memory, XLA flags and the compilation cache.

Only the commands call these; importing the package changes no setting of the process.
"""

import contextlib
import ctypes
import logging
import os
import sys
import threading
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from flax_resnetv2.system.files import user_cache, writable

_keeps_memory = False
"""Whether ``keep_memory`` took effect in this process."""


def tune() -> None:
    """Speed up CPU training in this process; call it before JAX's backend starts.

    Does nothing where JAX will use an accelerator.
    """
    keep_memory()
    choose_convolutions()


def keep_memory() -> bool:
    """Keep the memory that a CPU training step frees, for the next step.

    XLA allocates all memory of a step anew, often more than a gigabyte. By default the
    C library returns it to the system after the step, and the system clears every page
    again, which takes a quarter of a step's time.

    Returns:
        Whether it took effect: it needs the GNU C library, and no accelerator, because
        there XLA uses the accelerator's memory.
    """
    if _has_accelerator() or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # <malloc.h>: one arena, never trimmed, and no blocks outside it.
    arena_max, mmap_max, trim_threshold = -8, -4, -1
    settings = ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1))
    global _keeps_memory
    _keeps_memory = all([mallopt(name, value) == 1 for name, value in settings])
    return _keeps_memory


def touch_memory(size: int) -> threading.Thread | None:
    """Fault in ``size`` bytes of memory in a background thread.

    Otherwise the first step waits for the system to clear its pages one by one, while a
    core is idle when the program is loaded or compiled. This brings the first step of
    he2016-resnet164 from 5 seconds to 3. Return the thread, or None if ``keep_memory``
    did not take effect.
    """
    if not _keeps_memory:
        return None
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    # Meanwhile the compiler takes memory from the same heap.
    size = size * 5 // 4

    def touch() -> None:
        if (start := libc.malloc(size)) is None:
            return
        piece = 1 << 20
        for at in range(0, size - piece, piece):
            libc.memset(start + at, 0, piece)
        libc.free(start)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    return thread


def choose_convolutions() -> bool:
    """Let XLA's CPU backend run convolutions on Eigen instead of YNNPACK.

    From 32 channels on YNNPACK takes 6.4 ms where Eigen takes 3.4 (3x3, 128 images of
    16x16x32, two cores): a tenth of a training step. Reductions and matrix products
    stay on YNNPACK.

    Returns:
        Whether it took effect: not if JAX will use an accelerator, or ``XLA_FLAGS``
        already selects YNNPACK fusions.
    """
    if _has_accelerator() or "ynn_fusion_type" in os.environ.get("XLA_FLAGS", ""):
        return False
    _add_xla_flag("--xla_cpu_experimental_ynn_fusion_type=-individual_convolution")
    return True


def make_deterministic() -> None:
    """Make GPU results reproducible bit for bit; call it before the backend starts."""
    _add_xla_flag("--xla_gpu_deterministic_ops=true")


def _add_xla_flag(flag: str) -> None:
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):  # the name of a file with flags
        with contextlib.suppress(OSError):
            flags = " ".join(Path(flags).read_text().split())
    os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()


def silence_orbax() -> None:
    """Suppress orbax's own logging; this package reports checkpoint errors itself."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    # Writes that failed beside the one whose error is raised.
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )
    show = sys.unraisablehook

    def filtered(unraisable: Any) -> None:
        # Reads that orbax started and abandoned when another one failed.
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = filtered


def _has_accelerator() -> bool:
    """Whether JAX would find an accelerator plugin or a TPU, and may use it."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    found = find_spec("jax_plugins") or find_spec("libtpu")
    return bool(found or entry_points(group="jax_plugins"))


def program_cache() -> Path:
    """Return the compilation cache: ``JAX_COMPILATION_CACHE_DIR`` or the user's."""
    return Path(jax.config.jax_compilation_cache_dir or user_cache() / "xla")


def cache_compilations() -> Path | None:
    """Keep compiled programs for the next process.

    Returns:
        The directory, ``program_cache()``, or None if it is not writable.
    """
    directory = program_cache()
    if jax.config.jax_compilation_cache_dir is None:
        # JAX creates it with its first program, so a refused run leaves no directory.
        if not writable(directory):
            return None
        jax.config.update("jax_compilation_cache_dir", str(directory))
        # Starting a run compiles many small programs, too.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory
