"""Findings on Python and the installed packages, for the command ``doctor``.

Only the standard library is imported at the top, so these work where nothing else does.
"""

import contextlib
import importlib
import os
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
"""The repository, if the package runs from it."""
PYTHON = ">=3.11"
"""The supported versions of Python, as in pyproject.toml."""

_MODULES = {"orbax-checkpoint": "orbax.checkpoint", "pillow": "PIL"}
"""Packages whose module has another name."""
_OPTIONAL = ("h5py", "safetensors", "matplotlib", "pytest")
"""Packages that training does not need. Not imported: matplotlib would write files."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Literal["ok", "note", "problem"]
    """A problem prevents the run, or the use of the accelerator."""
    about: str
    """What was checked, in one word."""
    text: str
    """What was found; of a problem, the last part after a semicolon is the repair."""


def print_findings(findings: Iterable[Finding]) -> int:
    """Print findings as they come; return 1 if there is a problem, else 0."""
    # One line each in a file; in a terminal wrapped within the last column.
    width = sys.maxsize
    if sys.stdout.isatty():
        width = max(40, shutil.get_terminal_size().columns)
    lines = textwrap.TextWrapper(
        width,
        subsequent_indent=" " * 22,
        break_long_words=False,
        break_on_hyphens=False,
    )
    problems = 0
    for finding in findings:
        problems += finding.level == "problem"
        line = f"{finding.level:9}{finding.about:13}{finding.text}"
        print(lines.fill(line), flush=True)
    print(f"{problems} problem{'s' * (problems > 1)}" if problems else "no problem")
    return int(problems > 0)


def python() -> Iterator[Finding]:
    """Check that Python is new enough."""
    version = platform.python_version()
    if _within(version, PYTHON):
        yield Finding("ok", "python", version)
    else:
        text = f"{version} is not {PYTHON}; create an environment with a newer Python"
        yield Finding("problem", "python", text)


def packages() -> Iterator[Finding]:
    """Check that each package is installed, in its tested range, and importable."""
    required, good = requirements(), []
    for requirement in required:
        name, ranges = re.match(r"([\w-]+)(.*)", requirement).groups()
        repair = f'pip install "{requirement}"'
        try:
            version = metadata.version(name)
            if _within(version, ranges):
                if name not in _OPTIONAL:
                    importlib.import_module(_MODULES.get(name, name.replace("-", "_")))
                good.append(f"{name} {version}")
                continue
            fault = f"{version} is not in the tested range {ranges}"
        except metadata.PackageNotFoundError:
            fault = "is not installed"
        except Exception as error:
            fault = f"{version} cannot be imported ({reason(error)})"
            repair = repair.replace("install", "install --force-reinstall")
        level = "note" if name in _OPTIONAL else "problem"
        yield Finding(level, "packages", f"{name} {fault}; {repair}")
    if good:
        yield Finding("ok", "packages", f"in the tested ranges: {', '.join(good)}")
    if not required:
        text = "no tested ranges were found: requirements.txt is missing"
        yield Finding("note", "packages", text)


def plugins() -> str:
    """Return the installed JAX plugins for accelerators, in words."""
    found = {f"{d.name} {d.version}" for d in metadata.distributions()}
    plugins = [text for text in found if re.match(r"jax-.*-plugin |libtpu ", text)]
    return ", ".join(sorted(plugins)) or "no accelerator plugin is installed"


def requirements() -> list[str]:
    """Return the tested ranges, as "jax>=0.10.2,<0.13"; empty if they are unknown."""
    lines = []
    if (ROOT / "pyproject.toml").is_file():
        lines = (ROOT / "requirements.txt").read_text().splitlines()
    else:
        with contextlib.suppress(metadata.PackageNotFoundError):
            lines = metadata.requires("flax_resnetv2") or []
    return [line.replace(" ", "") for line in lines if re.match(r"\w", line)]


def _within(version: str, ranges: str) -> bool:
    """Whether a version is in ">=1.2,<2"; suffixes such as rc1 are ignored."""

    def numbers(text: str) -> list[int]:
        found = re.match(r"\d+(\.\d+)*", text)[0].split(".")
        return [*map(int, found), *[0] * (8 - len(found))]

    return all(
        (numbers(version) >= numbers(bound)) == (relation == ">=")
        for relation, bound in re.findall(r"(>=|<)([\d.]+)", ranges)
    )


def unusable_devices() -> str | None:
    """Return why JAX cannot use its devices, and a repair; None if it can."""
    import jax
    import numpy as np

    try:
        for device in jax.local_devices():
            jax.block_until_ready(jax.device_put(np.zeros(1, np.float32), device))
    except Exception as error:
        text = f"JAX cannot use its devices ({reason(error)}; {plugins()})"
        repair = "install the plugin of jax's version, and check the driver"
        if platforms := os.environ.get("JAX_PLATFORMS"):
            text += f" with JAX_PLATFORMS={platforms}"
            repair += ", or unset JAX_PLATFORMS"
        return f"{text}; {repair}"
    return None


def reason(error: Exception) -> str:
    """Return an error in one line: its type and the first line of its message."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
