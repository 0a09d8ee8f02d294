"""What a command shows of the package's log, and how errors become exit codes."""

import errno
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console

from flax_resnetv2 import RunError, UsageError
from flax_resnetv2.cli.exits import guarded
from flax_resnetv2.errors import Stopped
from tests.support import faults

ROOT = Path(__file__).parents[2]
LOGGER = logging.getLogger("flax_resnetv2.run.somewhere")


def log():
    LOGGER.debug("hidden")
    LOGGER.info("[bold]plain[/bold] :smile: 1.5 \x1b[31m\udce9 %s", "x" * 300)
    LOGGER.warning("a warning")


def test_the_log_is_shown_as_plain_lines(capsys):
    assert guarded(log) == 0
    output = capsys.readouterr()
    plain = f"[bold]plain[/bold] :smile: 1.5 \\x1b[31m\\udce9 {'x' * 300}"
    assert output.out == f"{plain}\na warning\n"
    assert not output.err


def test_the_log_may_go_to_standard_error(capsys):
    assert guarded(log, log=Console(stderr=True)) == 0
    output = capsys.readouterr()
    assert output.err.endswith("a warning\n")
    assert not output.out


def test_logging_is_as_before_afterwards():
    logger = logging.getLogger("flax_resnetv2")
    before = logger.level, logger.propagate, list(logger.handlers)
    guarded(log)
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 / 0)
    assert (logger.level, logger.propagate, logger.handlers) == before


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("x=1 must be 2"), 2, "error: x=1 must be 2\n"),
        (UsageError("\x1b[31m[red]:cat:"), 2, "error: \\x1b[31m[red]:cat:\n"),
        (RunError("no network"), 1, "failed: no network\n"),
        (Stopped("by SIGTERM"), 75, "stopped by SIGTERM\n"),
        (KeyboardInterrupt(), 130, "ended by Ctrl-C\n"),
    ],
)
def test_an_error_is_one_line_and_a_code(error, code, message, capsys):
    def fail():
        raise error

    assert guarded(fail) == code
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", message)


def test_a_command_may_return_a_code():
    assert guarded(lambda: 1) == 1


def test_devices_that_cannot_be_used_are_one_line(monkeypatch, capsys):
    """However JAX fails where it needs them first."""

    def fail():
        raise AssertionError

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert guarded(jax.local_devices) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: JAX cannot use its devices (AssertionError; ")
    assert "with JAX_PLATFORMS=cuda; " in error
    assert error.endswith("or unset JAX_PLATFORMS\n")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *[("train.py quickstart", name) for name in ("cuda", "tpu", "CPU")],
        *[
            ("predict.py cifar10-resnet20 docs/maps.png", name)
            for name in ("gpu", " cpu")
        ],
    ],
)
def test_a_platform_that_is_not_there_is_one_line(command, name, tmp_path):
    words = command.split()
    if "train.py" in words:
        words += ["--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": name},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: JAX cannot use its devices")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def ended(command, **how):
    """Exit code and standard error of a command."""
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **how,
    )
    return done.returncode, done.stderr


def unread():
    """A pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def test_a_command_whose_reader_left_ends_quietly():
    with unread() as pipe:
        assert ended("-m flax_resnetv2 show article", stdout=pipe) == (141, "")


def test_predictions_whose_reader_left_end_quietly():
    with unread() as pipe:
        command = "predict.py cifar10-resnet20 docs/maps.png"
        assert ended(command, stdout=pipe) == (141, "")


def test_a_run_goes_on_without_its_reader(tmp_path):
    words = "train.py", *faults.RUN, "--train.epochs", "1"
    with unread() as pipe:
        line = " ".join([*words, "--workdir", str(tmp_path / "run")])
        assert ended(line, stdout=pipe) == (0, "")
    assert (tmp_path / "run" / "report.html").exists()


def test_output_without_room_is_one_line():
    with open("/dev/full", "w") as full:
        code, error = ended("-m flax_resnetv2 show article", stdout=full)
    assert code == 1
    assert error == (
        "failed: standard output cannot be written (No space left on device)\n"
    )


@pytest.mark.parametrize("words", ["-m flax_resnetv2 show article", "train.py --help"])
def test_standard_output_may_be_closed(words):
    shell = f"{shlex.quote(sys.executable)} {words} >&-"
    done = subprocess.run(
        shell,
        shell=True,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_file_never_gets_the_number_of_a_closed_stream(closed):
    """Or what native code writes on standard error would land in it."""
    code = (
        "import os\n"
        "from flax_resnetv2.cli.exits import guarded\n"
        "def work():\n"
        "    print('no one may read this')\n"
        "    return int(os.open(os.devnull, os.O_RDONLY) < 3)\n"
        "os._exit(guarded(work))\n"
    )
    shell = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {closed}"
    assert subprocess.run(shell, shell=True, check=False, cwd=ROOT).returncode == 0


def test_a_directory_that_is_gone_is_one_line(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    shell = (
        f"rmdir {gone}; {shlex.quote(sys.executable)} {ROOT}/predict.py "
        "cifar10-resnet20 a.png"
    )
    done = subprocess.run(
        shell, shell=True, cwd=gone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "error: the current directory cannot be used (No such file or directory); "
        "change to one that exists\n"
    )


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_file_that_may_not_be_used_is_one_line(number, capsys):
    def fail():
        raise OSError(number, os.strerror(number), "a/b")

    assert guarded(fail) == 1
    said = f"failed: a/b cannot be used ({os.strerror(number)}); repair that, or name "
    assert capsys.readouterr().err == f"{said}another\n"
