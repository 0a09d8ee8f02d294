"""Signals and child processes: stopping a run, and passing the stop on to a child."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Stop:
    """Records a SIGTERM or SIGINT, so that the process can save; a second one ends it.

    Signals are recorded only after ``listen``; before, nothing can be lost. Outside the
    main thread signal handlers are left alone.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the signal that came, or None."""
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._listens = False

    def listen(self) -> None:
        """Start recording signals; calling it again does nothing."""
        if self._listens or threading.current_thread() is not threading.main_thread():
            return
        self._listens = True
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is signal.SIG_IGN:  # as the shell asks by &
                continue
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self.requested is not None:
            # One request may come twice: a cluster signals every process, and a sweep
            # passes its own signal on.
            if name == self.requested == "SIGTERM" and now < self._since + 1:
                return
            os._exit(128 + number)
        self.requested, self._since = name, now
        # Printing or logging here could deadlock, if the signal interrupts either.
        os.write(2, f"\n{name}: saving; a second one ends at once\n".encode())

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def run_child(command: Sequence[str], log: Path, stop: Stop, keeps: int) -> int:
    """Run a command to its end, and send it SIGTERM when ``stop`` is requested.

    Args:
        command: the program and its arguments.
        log: the child's stdout and stderr are appended to this file.
        stop: this process's.
        keeps: a file descriptor that the child inherits, so that a lock on the file
            holds until the child has ended, whatever happens to this process.

    Returns:
        The exit code; -N if signal N ended the child.
    """
    # This package, whatever lies in the current directory.
    path = str(Path(__file__).parents[2])
    if more := os.environ.get("PYTHONPATH"):
        path += os.pathsep + more
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path},
            pass_fds=[keeps],
            process_group=0,  # a terminal's Ctrl-C would be its second signal
        )
    terminated = False
    while True:
        try:
            return child.wait(timeout=0.1)
        except subprocess.TimeoutExpired:
            if stop.requested is not None and not terminated:
                child.terminate()
                terminated = True


def die_with_parent() -> None:
    """Make Linux send this process SIGTERM when the thread that started it dies.

    ``run_child`` starts it from the main thread.
    """
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
