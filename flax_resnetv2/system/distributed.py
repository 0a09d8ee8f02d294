"""Several processes that train together: how they join, agree and leave."""

import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_resnetv2.errors import RunError, UsageError

HEARTBEAT = 30
"""Seconds without a heartbeat after which JAX considers a process dead."""


def init_distributed(
    coordinator: str | None, processes: int | None, process: int | None
) -> None:
    """Join the other processes; call it before JAX's backend starts.

    When a process dies, the others fail at their next collective, or JAX ends them
    after ``HEARTBEAT`` seconds. With all arguments None, JAX takes them from SLURM,
    Open MPI, Kubernetes or the TPU pod.

    Args:
        coordinator: HOST:PORT of the first process.
        processes: the number of processes.
        process: the index of this process, from 0.

    Raises:
        UsageError: an argument is missing and no cluster environment supplies it.
        RunError: the other processes do not answer.
    """
    # JAX's own SIGTERM handler would catch the signal before ``Stop`` listens.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT
        )
    except ValueError as error:
        raise UsageError(
            f"no cluster environment was found ({error}); give --coordinator HOST:PORT "
            "--processes N --process K"
        ) from error
    except RuntimeError as error:
        raise RunError(
            f"the processes could not connect ({str(error).splitlines()[0]}); start "
            "all of them within five minutes, with the same --coordinator"
        ) from error


def is_first_process() -> bool:
    """Whether this process writes the files of a run."""
    return jax.process_index() == 0


def is_multi_process() -> bool:
    """Whether this process has joined others; starts no backend."""
    return bool(jax.distributed.is_initialized() and jax.process_count() > 1)


def exit_without_peers(code: int) -> None:
    """End a process of a multi-process run at once; do nothing in a single process.

    A normal exit would wait for the others, which may be dead or waiting for this one.
    """
    if is_multi_process():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true in any process. Every process must call this."""
    if jax.process_count() > 1:
        flag = bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
    return flag


def broadcast_from_first(flag: bool) -> bool:
    """Return the first process's ``flag``. Every process must call this."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag)))
