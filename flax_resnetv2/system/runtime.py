"""A process that trains: memory, convolutions, compiled programs; signals; others.

What changes the process is called by the commands: whoever imports the package decides
about his own. ``fit`` itself touches memory ahead and listens to signals.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flax_resnetv2.errors import RunError, UsageError

_kept = False
"""Whether ``keep_memory`` took effect in this process."""


def user_cache() -> Path:
    """Give this project's directory among the user's caches; it may not exist yet."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "flax_resnetv2"


def existing(path: Path) -> Path:
    """The path, or what exists already of the directories above it."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def writable(path: Path) -> bool:
    """Whether a directory can be written, or made; it is not made."""
    try:
        found = existing(path)
    except OSError:  # as of a name that is too long
        return False
    return found.is_dir() and os.access(found, os.W_OK | os.X_OK)


def tune() -> None:
    """Make this process fast where the CPU trains; call it before JAX's backend starts.

    With an accelerator beside the CPU it changes nothing.
    """
    keep_memory()
    choose_convolutions()


def keep_memory() -> bool:
    """Keep the memory that a step frees for the next one, where the CPU trains.

    XLA allocates all memory of a step anew, a gigabyte and more. The C library gives it
    back to the system after the step, and the system clears every page again: a
    quarter of a step's time.

    Returns:
        Whether it was done: with the GNU C library, and where JAX finds neither a
        plugin of an accelerator nor a TPU, since there the memory lies elsewhere.
    """
    if _accelerated() or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # <malloc.h>: one arena, whose top is never given back, and no blocks outside it.
    arena_max, mmap_max, trim_threshold = -8, -4, -1
    settings = ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1))
    global _kept
    _kept = all([mallopt(name, value) == 1 for name, value in settings])
    return _kept


def touch_memory(size: int) -> threading.Thread | None:
    """Have the system hand out ``size`` bytes of memory now, beside what goes on.

    The first step would wait for them, page by page, while one core computes; before
    it, reading or compiling the program leaves a core free. The first step of
    he2016-resnet164 takes 3 seconds instead of 5.

    Returns:
        The thread that does it; None: memory is not kept in this process, see
        ``keep_memory``.
    """
    if not _kept:
        return None
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    # The compiler's own memory is cut out of it meanwhile.
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
    """Have XLA's CPU backend compute convolutions by Eigen, not by YNNPACK.

    From 32 maps on YNNPACK takes 6.4 ms where Eigen takes 3.4 (3x3, 128 images of
    16x16x32, two cores): a tenth of a training step. Reductions and matrix products
    stay with YNNPACK.

    Returns:
        Whether it was done: not beside an accelerator, not where ``XLA_FLAGS`` says
        something of YNNPACK already.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _accelerated() or "ynn_fusion_type" in flags:
        return False
    chosen = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
    os.environ["XLA_FLAGS"] = f"{flags} {chosen}".strip()
    return True


class Stop:
    """Notes that SIGTERM or SIGINT asks the process to stop; a second one ends it.

    Only from ``listen`` on: before, there is nothing that a signal could lose. Outside
    the main thread signals stay as they are.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        """Name of the signal that came."""
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Begin to note signals; again: nothing."""
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.asked is not None:
            # A cluster tells every process, and a sweep passes on what it was told.
            if name == self.asked == "SIGTERM" and now < self._since + 1:
                return
            os._exit(128 + number)
        self.asked, self._since = name, now
        # print and logging may be in the middle of a line, and may wait for it.
        os.write(2, f"\n{self.asked}: saving; a second one ends at once\n".encode())

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run_child(command: Sequence[str], log: Path, stop: Stop, keeps: int) -> int:
    """Run a command to its end, and pass on to it that ``stop`` was asked.

    Args:
        command: its words.
        log: receives, behind what is there, what the child says.
        stop: listens in this process.
        keeps: a file that stays open in the child too, and with it the file's lock: it
            holds until the child has ended, whatever becomes of this process.

    Returns:
        Its exit code; below 0: minus the signal that ended it.
    """
    with log.open("ab") as said:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            pass_fds=[keeps],
            process_group=0,  # a terminal's Ctrl-C would be its second signal
        )
    told = False
    while True:
        try:
            return child.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            if stop.asked is not None and not told:
                child.terminate()
                told = True


def follow_parent() -> None:
    """Have Linux send this process SIGTERM when the one that started it has died.

    (Its thread that did; ``run_child`` is called in the main one.)
    """
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


HEARTBEAT = 30
"""Seconds without a sign of life after which a process counts as gone."""


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Become one of several processes; call it before JAX's backend starts.

    Where one of them dies, the others fail at their next exchange, or are ended by JAX
    after ``HEARTBEAT``.

    Args:
        coordinator: HOST:PORT of the first; None, with the others: what SLURM, Open
            MPI, Kubernetes or a TPU pod say.
        processes: how many there are.
        process: which one this is.

    Raises:
        UsageError: nothing says what the arguments leave out.
        RunError: the others do not answer.
    """
    import jax

    # JAX's own notice of SIGTERM would take the signal until ``Stop`` listens.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT
        )
    except ValueError as error:
        raise UsageError(
            f"no cluster was found that says who the processes are ({error}); give "
            "--coordinator HOST:PORT --processes N --process K"
        ) from error
    except RuntimeError as error:
        raise RunError(
            f"the processes did not come together ({str(error).splitlines()[0]}); "
            "start all of them within five minutes, with the same --coordinator"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    import jax

    return jax.process_index() == 0


def is_one_of_several() -> bool:
    """Whether this process has joined others."""
    jax = sys.modules.get("jax")
    return bool(jax and jax.distributed.is_initialized() and jax.process_count() > 1)


def leave_others(code: int) -> None:
    """End this process at once if it is one of several; else do nothing.

    Leaving in order would wait for the others, who may be gone, or wait for this one.
    """
    if is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def quieten() -> None:
    """Leave it to this project to say what went wrong, not to orbax's log."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.FATAL)
    show = sys.unraisablehook

    def known(about: Any) -> None:
        # Reads that orbax began and left when another one failed.
        if str(about.exc_value) != "Event loop is closed":
            show(about)

    sys.unraisablehook = known


def make_deterministic() -> None:
    """Have GPUs give the same bits run to run; call it before JAX's backend starts.

    CPUs and TPUs do so in any case.
    """
    chosen = "--xla_gpu_deterministic_ops=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {chosen}".strip()


def _accelerated() -> bool:
    """JAX would find an accelerator's plugin or a TPU, and was not told to leave it."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    found = find_spec("jax_plugins") or find_spec("libtpu")
    return bool(found or entry_points(group="jax_plugins"))


def program_cache() -> Path:
    """Where compiled programs are kept: where JAX was told to, or in the user's cache.

    JAX is told by ``JAX_COMPILATION_CACHE_DIR``.
    """
    import jax

    return Path(jax.config.jax_compilation_cache_dir or user_cache() / "xla")


def cache_compilations() -> Path | None:
    """Keep compiled programs in ``program_cache()``, for the next process.

    Returns:
        Where they are kept; None: the directory cannot be written.
    """
    import jax

    directory = program_cache()
    if jax.config.jax_compilation_cache_dir is None:
        # JAX makes it with its first program: a run that is refused leaves nothing.
        if not writable(directory):
            return None
        jax.config.update("jax_compilation_cache_dir", str(directory))
        # A start is also many small programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return directory
