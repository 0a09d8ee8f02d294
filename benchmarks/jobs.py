"""A queue of measurements, each in a process of its own.

A failure affects no other job: it leaves a row with the last line of its error. Rows
are appended as they come, so that a queue that is cut anywhere resumes where it
stopped.

Two kinds of jobs: one that runs alone, prints one row and ends; and a program (``Job``
with ``program``), which compiles beside the others and then waits until it is asked to
run with nothing beside it. Compiling takes most of the time, and uses one core.
"""

import contextlib
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.measure import append, read_rows, summary

ROOT = Path(__file__).parent.parent
MARK = "RESULT "
"""Prefix of the line in which a job's process returns its row."""
GRACE = 60
"""Seconds that a job has for saving."""
WARM_UP, ONE_RUN = 90.0, 60.0
"""Seconds after which a program that warms up or runs once is given up."""
RUNS = 9
"""Timed runs of a program."""


@dataclass(frozen=True)
class Job:
    """One process of the queue."""

    id: str
    command: tuple[str, ...]
    """The command; it prints ``MARK`` and a JSON object, or fails. A program's
    calls ``serve``."""
    estimate: float
    """Seconds with nothing beside it, expected."""
    timeout: float
    """Seconds after which it is terminated; of a program, while it compiles."""
    saves: bool = False
    """Whether it saves on SIGTERM and later resumes."""
    beside: float = 0.0
    """Seconds of it that may pass beside other jobs, expected: all of a test file, the
    compiling of a program. Zero: it starts when nothing else runs."""
    program: bool = False
    """Whether it waits after compiling to be asked for its runs."""
    environment: dict[str, str] = field(default_factory=dict, hash=False)
    """Variables of its process besides those of the queue."""
    also: tuple[str, ...] = ()
    """What a program is asked for after its runs: "profile" gives a row of its own."""


class JobError(Exception):
    """A program failed, or took too long."""


def duration(jobs: list[Job], cores: int) -> float:
    """Return the seconds that ``jobs`` are expected to take on so many cores."""
    beside = [job.beside for job in jobs if job.beside]
    together = max([sum(beside) / cores, *beside], default=0.0)
    return together + sum(job.estimate for job in jobs)


def choose(jobs: list[Job], seconds: float, cores: int) -> tuple[list[Job], list[Job]]:
    """Return the jobs for which ``seconds`` should suffice, first come, and the rest.

    A job that saves is chosen if enough is left for a beginning.
    """
    chosen: list[Job] = []
    left_out = []
    for job in jobs:
        fits = duration([*chosen, job], cores) <= seconds
        (chosen if fits else left_out).append(job)
    return chosen, left_out


def plan(jobs: list[Job], seconds: float, cores: int) -> str:
    """Say what ``run_queue`` would do, and leave out."""
    chosen, left_out = choose(jobs, seconds, cores)
    expected, alone = duration(chosen, cores), sum(job.estimate for job in chosen)
    lines = [
        f"{len(chosen)} of {len(jobs)} jobs in about {expected:.0f} of {seconds:.0f} s "
        f"on {cores} cores: {expected - alone:.0f} s of compiling and tests beside "
        f"each other, then {alone:.0f} s one by one",
        *(
            f"  {job.id:<55} {job.beside:4.0f} s beside, {job.estimate:4.0f} s alone"
            for job in chosen
        ),
        f"left out: {', '.join(job.id for job in left_out) or 'nothing'}",
    ]
    return "\n".join(lines)


def run_queue(
    jobs: list[Job],
    out: Path,
    seconds: float,
    cores: int,
    about: dict[str, Any] | None = None,
) -> None:
    """Run the jobs without a row of status "ok" in ``out``, as long as time is left.

    What it is going to do, and to leave out, is printed first.

    Args:
        jobs: the most important first.
        out: file of JSON lines; every job that was started appends one: "ok",
            "failed" (with "error"), or "cut" if the queue's time was over first.
        seconds: for all of them together.
        cores: most processes at once.
        about: fields for every row.
    """
    end = time.monotonic() + seconds
    rows = read_rows(out)
    tries = Counter(row["id"] for row in rows)
    status = {row["id"]: row["status"] for row in rows}
    waiting = [job for job in jobs if status.get(job.id) != "ok"]
    # One cut once keeps its place; cut again, it may be longer than any run.
    waiting.sort(
        key=lambda j: status.get(j.id) == "failed" or (tries[j.id] > 1 and not j.saves)
    )
    print(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} done before")
    print(plan(waiting, seconds, cores), flush=True)
    chosen, _ = choose(waiting, seconds, cores)

    def keep(row: dict[str, Any]) -> None:
        append(out, {"benchmark": "gpu"} | row | (about or {}))

    run_together([job for job in chosen if job.beside], end, cores, keep)
    for job in chosen:
        if job.beside:
            continue
        left = end - time.monotonic()
        if left < job.estimate:
            print(f"{job.id}: not started, {left:.0f} s left", flush=True)
            continue
        print(f"{job.id}: started, {left:.0f} s left", flush=True)
        keep(run_job(job, left))


def run_together(
    jobs: list[Job], end: float, cores: int, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Compile all programs at once, then time one after the other.

    Jobs that are no programs run beside the compiling. A program that is not ready when
    the time of the timed runs has come is cut; what it left in caches speeds it up next
    time.

    Args:
        jobs: the most important first.
        end: ``time.monotonic()`` at which all must be over.
        cores: most processes at once.
        keep: is called with every row as soon as it is known.
    """
    turns = sum(job.estimate for job in jobs)
    compiled_by = min(end - turns, time.monotonic() + 2 * duration(jobs, cores) - turns)
    waiting, busy, ready = list(jobs), [], []
    try:
        while (waiting or busy) and time.monotonic() < compiled_by:
            while waiting and len(busy) < cores:
                job = waiting.pop(0)
                print(f"{job.id}: started beside others", flush=True)
                busy.append(Process(job))
            for process in list(busy):
                if not process.settled():
                    continue
                busy.remove(process)
                if process.job.program and process.facts is not None:
                    ready.append(process)
                else:
                    keep(process.row())
            time.sleep(0.05)
        for process in busy:
            process.close()
            row = process.row()
            keep(row | {"status": "cut", "error": "not ready when its turn came"})
        busy.clear()
        ready.sort(key=lambda process: jobs.index(process.job))
        while ready:
            process = ready.pop(0)
            if end - time.monotonic() < process.job.estimate:
                process.close()
                print(f"{process.job.id}: no time left", flush=True)
                continue
            for row in time_program(process):
                keep(row)
    finally:
        for process in (*busy, *ready):
            process.close()


def time_program(process: "Process") -> Iterator[dict[str, Any]]:
    """Warm the program up, time its runs, and yield its rows."""
    name = process.job.id
    try:
        process.ask("warm", WARM_UP)
        seconds = [process.ask("run", ONE_RUN)["seconds"] for _ in range(RUNS)]
        row = process.facts | summary(seconds) | process.ask("memory", ONE_RUN)
        yield {"id": name, "status": "ok"} | _per_step(row)
        for word in process.job.also:
            name = f"{word}/{process.job.id.partition('/')[2]}"
            found = process.ask(word, WARM_UP)
            yield {"id": name, "status": "ok"} | found
    except JobError as error:
        yield {"id": name, "status": "failed", "error": str(error)}
    finally:
        process.close()


def _per_step(row: dict[str, Any]) -> dict[str, Any]:
    """Turn a row's seconds of one run into those of a step, and add the rates."""
    row["seconds"] /= row["steps"]
    row["images_per_second"] = round(row["batch"] / row["seconds"], 1)
    row["model_flops"] = row.pop("flops_per_step") / row["seconds"]
    return row


class Process:
    """A job's process in its own group, and what it wrote."""

    def __init__(self, job: Job) -> None:
        self.job, self.began = job, time.monotonic()
        self.facts: dict[str, Any] | None = None
        """A program's first answer: it is compiled."""
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, closed with us
        self._partly = b""
        self._process = subprocess.Popen(
            job.command,
            cwd=ROOT,
            env=os.environ | job.environment,
            stdin=subprocess.PIPE if job.program else subprocess.DEVNULL,
            stdout=subprocess.PIPE if job.program else self._output,
            stderr=self._output,
            start_new_session=True,
            bufsize=0,
        )
        self._timed_out = False

    def settled(self) -> bool:
        """Whether the process ended, took too long, or answered that it is ready."""
        if time.monotonic() - self.began > self.job.timeout:
            self._timed_out = True
            self.close()
            return True
        if self.job.program:
            with contextlib.suppress(JobError):
                self.facts = self._answer(0)
                return True
        return self._process.poll() is not None

    def ask(self, word: str, seconds: float) -> dict[str, Any]:
        """Ask a program for ``word``; return its answer.

        Raises:
            JobError: it ended, or did not answer within ``seconds``.
        """
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{word}\n".encode())
        return self._answer(seconds)

    def _answer(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\n" not in self._partly:
            left = max(end - time.monotonic(), 0)
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise JobError(f"no answer within {seconds:.0f} s")
            more = self._process.stdout.read(65536)
            if not more:
                self._process.wait()
                raise JobError(last_error(self._text()) or "no output")
            self._partly += more
        line, _, self._partly = self._partly.partition(b"\n")
        return json.loads(line)

    def wait(self, seconds: float) -> None:
        """Wait for the end of a job that is no program; end it after ``seconds``."""
        try:
            self._process.wait(max(seconds - GRACE * self.job.saves, 0))
        except subprocess.TimeoutExpired:
            self._timed_out = True
            if self.job.saves:
                os.killpg(self._process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(GRACE)
        finally:
            self.close()

    def close(self) -> None:
        """End the whole group: compilers' workers would hold the device."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if not self._output.closed:
            self._log = self._text()
            self._output.close()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()

    def row(self, left: float = math.inf) -> dict[str, Any]:
        """End the process; return its row. ``left`` was the queue's time."""
        self.close()
        text, code = self._text(), self._process.returncode
        seconds = round(time.monotonic() - self.began, 1)
        row = {"id": self.job.id, "status": "ok", "job_seconds": seconds}
        found = [line for line in text.splitlines() if line.startswith(MARK)]
        if code == 0 and found:
            return row | json.loads(found[-1].removeprefix(MARK))
        if self._timed_out and left < self.job.timeout:
            return row | {"status": "cut", "error": f"time over after {seconds} s"}
        if self._timed_out:
            return row | {"status": "failed", "error": f"ended after {seconds} s"}
        error = last_error(text) or "no output"
        return row | {"status": "failed", "exit_code": code, "error": error}

    def _text(self) -> str:
        if self._output.closed:
            return self._log
        self._output.seek(0)
        return self._output.read().decode(errors="replace")


def run_job(job: Job, left: float = math.inf) -> dict[str, Any]:
    """Run one job alone; return its row, whatever happens."""
    process = Process(job)
    process.wait(min(job.timeout, left))
    return process.row(left)


def serve(make: Callable[[], Any]) -> None:
    """Be a program: compile, say so, and answer until the queue has enough.

    Args:
        make: compiles and returns an object with ``facts`` (a dictionary) and a method
            for each word that the queue may ask for, which returns a dictionary.
    """
    # What libraries print goes to the log and not between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    program = make()
    say(program.facts)
    for line in sys.stdin:
        say(getattr(program, line.strip())())


def last_error(text: str) -> str:
    """Return the last line that names an error, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = re.compile(r"\w(Error|Exception)\b|RESOURCE_EXHAUSTED|^(E |FAILED)")
    errors = [line for line in lines if telling.search(line)]
    return (errors or lines or [""])[-1][:500]
