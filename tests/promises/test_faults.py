"""The fault harness on a short run (long: ``python -m tests.support.faults``)."""

import shutil
import signal

import pytest

from tests.support import faults

EPOCHS = 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """An undisturbed run."""
    workdir = tmp_path_factory.mktemp("faults") / "alone"
    faults.finish(workdir, EPOCHS, 1)
    return workdir


def test_a_run_that_is_killed_ends_as_one_that_is_not(alone):
    """By SIGKILL, then by SIGTERM."""
    workdir = alone.with_name("disturbed")
    for number, whole in ((signal.SIGKILL, 0), (signal.SIGTERM, 1)):
        found = faults.disturb(workdir, EPOCHS, 1, 1, number, 0.2, 0, True)
        assert not found.differences
        assert found.whole == whole
    faults.finish(workdir, EPOCHS, 1)
    assert faults.compare(alone, workdir) == []


def test_the_harness_sees_a_difference(alone, tmp_path):
    """A line with another number, and arrays of another step."""
    other = tmp_path / "other"
    shutil.copytree(alone, other)
    text = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(
        text.replace('"count": 448', '"count": 449', 1)
    )
    (difference,) = faults.compare(alone, other)
    assert difference.startswith("metrics.jsonl: ")
    (other / "metrics.jsonl").write_text(text)
    newest = other / "checkpoints" / str(faults.steps_of(other))
    shutil.rmtree(newest)
    shutil.copytree(sorted((other / "checkpoints").glob("[0-9]*"))[0], newest)
    assert any(word.startswith("array ") for word in faults.compare(alone, other))
