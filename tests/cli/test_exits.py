"""What a command shows of the package's log, and how errors become exit codes."""

import logging

import pytest
from rich.console import Console

from flax_resnetv2 import RunError, UsageError
from flax_resnetv2.cli.exits import guarded
from flax_resnetv2.errors import Stopped

LOGGER = logging.getLogger("flax_resnetv2.run.somewhere")


def log():
    LOGGER.debug("hidden")
    LOGGER.info("[bold]plain[/bold] :smile: 1.5 %s", "x" * 300)
    LOGGER.warning("a warning")


def test_the_log_is_shown_as_plain_lines(capsys):
    assert guarded(log) == 0
    output = capsys.readouterr()
    plain = f"[bold]plain[/bold] :smile: 1.5 {'x' * 300}"
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
