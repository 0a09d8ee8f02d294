"""Several processes of one run, connected through the loopback interface."""

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.test_streaming import prepare_tiny
from tests.support.runs import lines_of, untimed

MEMBER = """
import sys
from dataclasses import replace
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)
from flax_resnetv2 import Execution
from flax_resnetv2.cli.exits import guarded
from flax_resnetv2.run.loop import fit
from flax_resnetv2.system.distributed import exit_without_peers, init_distributed
coordinator, count, number, devices, workdir, executor, records, *more = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
cache = str(Path(workdir).parent / "compiled")
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
if int(count) > 1:
    init_distributed(coordinator, int(count), int(number))
from tests.support import tiny
from tests.support.runs import CONFIG, VALIDATED, stop_after
from tests.data.test_streaming import streamed_from
import pytest
data = streamed_from(Path(records)) if records else VALIDATED
config = replace(CONFIG, execution=Execution(dtype="float64"), checkpoint_steps=5)
with pytest.MonkeyPatch.context() as patch:
    tiny.patch_dataset(patch, data)
    if more and number == more[1]:
        stop_after(patch, int(more[0]))
    code = guarded(lambda: fit(config, workdir, executor=executor) and 0)
if code not in (0, 75):
    exit_without_peers(code)
sys.exit(code)
"""
"""One process of a run of CONFIG in float64. records: the directory to stream from, if
any. more: the number of steps after which a process gets a signal, and its index."""


def start(workdir, count, devices=1, executor="pmap", records="", more=()):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    words = [str(devices), str(workdir), executor, str(records), *more]
    return [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, coordinator, str(count), str(k), *words],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k in range(count)
    ]


def end(processes, codes=(0,)):
    """Return the output of all processes, after they have exited."""
    output = [process.communicate(timeout=300)[0] for process in processes]
    assert {process.returncode for process in processes} <= set(codes), output
    return output


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The runs of one process and of two, at the same time; the output of the two."""
    directory = tmp_path_factory.mktemp("processes")
    single, two = start(directory / "alone", 1), start(directory / "together", 2)
    end(single)
    return directory, end(two)


@pytest.fixture(scope="module")
def alone(both):
    """The directory of all runs; in "alone", that on one device of one process."""
    return both[0]


def assert_same_losses(one, other):
    a, b = lines_of(one), lines_of(other)
    assert [(x["step"], x["split"], x["count"]) for x in a] == [
        (x["step"], x["split"], x["count"]) for x in b
    ]
    for x, y in zip(a, b, strict=True):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-10)
        assert y["accuracy"] == x["accuracy"]


@pytest.fixture(scope="module")
def together(both):
    """The run on two processes, and the output of the first."""
    directory, output = both
    for other in output[1:]:
        assert "step" not in other
    return directory / "together", output[0]


def test_two_processes_do_what_one_does(alone, together):
    """Each image counts once, one process writes, and the losses agree."""
    workdir, output = together
    assert_same_losses(alone / "alone", workdir)
    assert "2 cpu devices of 2 processes" in output
    assert len(json.loads((workdir / "environment.json").read_text())) == 1


def test_so_do_four_and_the_other_executor(alone):
    end(start(alone / "four", 4, executor="jit"))
    assert_same_losses(alone / "alone", alone / "four")


@pytest.mark.parametrize("executor", ["pmap", "jit"])
def test_each_reads_its_own_images_from_disk(tmp_path, executor):
    directory = prepare_tiny(tmp_path)
    single = start(tmp_path / "alone", 1, devices=2, records=directory)
    two = start(tmp_path / "two", 2, executor=executor, records=directory)
    end(single)
    assert "read from disk" in end(two)[0]
    assert_same_losses(tmp_path / "alone", tmp_path / "two")


def test_a_signal_to_one_process_stops_all_and_all_go_on(alone, together):
    """The same number of processes to the same bits, another to the same losses."""
    workdir = alone / "stopped"
    output = end(start(workdir, 2, more=["7", "1"]), codes=(75,))
    # The signal takes effect between two steps.
    assert all("stopped by" in text for text in output)
    assert "SIGTERM" in output[1]
    steps = [int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*")]
    assert max(steps) == 7
    shutil.copytree(workdir, alone / "changed")
    end(start(workdir, 2))
    assert untimed(lines_of(workdir)) == untimed(lines_of(together[0]))
    end(start(alone / "changed", 1, devices=2))
    assert_same_losses(alone / "alone", alone / "changed")


@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_dies_the_others_leave_and_starting_again_goes_on(alone, victim):
    workdir = alone / f"died-{victim}"
    processes = start(workdir, 2)
    checkpoints = workdir / "checkpoints"
    until = time.monotonic() + 200
    while not list(checkpoints.glob("[0-9]*")) and time.monotonic() < until:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    processes[victim].kill()
    processes[victim].communicate()
    survivor = processes[1 - victim]
    survivor.communicate(timeout=90)
    assert survivor.returncode not in (0, None)
    if victim == 0:  # whoever died, the directory is the same
        end(start(workdir, 2))
        assert_same_losses(alone / "alone", workdir)
