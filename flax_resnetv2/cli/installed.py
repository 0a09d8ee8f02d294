"""Which packages are installed: what the doctor can say where no other module loads.

So only the standard library is imported, and each package to see that it can be.
"""

import contextlib
import importlib
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
"""The repository, where the package runs from it."""

PYTHON = ">=3.11"
"""As in pyproject.toml."""

_MODULES = {"orbax-checkpoint": "orbax.checkpoint", "pillow": "PIL"}
"""Packages that are imported under another name."""
_BESIDE = ("h5py", "safetensors", "matplotlib", "pytest")
"""Packages that a run does without; not imported: matplotlib would write files."""


@dataclass(frozen=True)
class Finding:
    """What was found of one part."""

    level: Literal["ok", "note", "problem"]
    """A problem keeps a run from starting, or from using the accelerator."""
    about: str
    """The part, in a word."""
    text: str
    """What is there; of a problem, after the last semicolon, what to do."""


def tell(findings: Iterable[Finding]) -> int:
    """Print findings as they come; give 1 if there is a problem, else 0."""
    # In a file a finding is a line; in a terminal it is wrapped to stay in its column.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    problems = 0
    for finding in findings:
        problems += finding.level == "problem"
        line = f"{finding.level:9}{finding.about:13}{finding.text}"
        print(
            textwrap.fill(
                line,
                width,
                subsequent_indent=" " * 22,
                break_long_words=False,
                break_on_hyphens=False,
            ),
            flush=True,
        )
    print(f"{problems} problem{'s' * (problems > 1)}" if problems else "no problem")
    return int(problems > 0)


def python() -> Iterator[Finding]:
    """Is Python new enough?"""
    version = platform.python_version()
    if _within(version, PYTHON):
        yield Finding("ok", "python", version)
    else:
        text = f"{version} is not {PYTHON}; make an environment with a newer one"
        yield Finding("problem", "python", text)


def packages() -> Iterator[Finding]:
    """Is each package there, within its tested range, and can it be imported?"""
    wanted, good = requirements(), []
    for requirement in wanted:
        name, ranges = re.match(r"([\w-]+)(.*)", requirement).groups()
        repair = f'pip install "{requirement}"'
        try:
            version = metadata.version(name)
            if _within(version, ranges):
                if name not in _BESIDE:
                    importlib.import_module(_MODULES.get(name, name.replace("-", "_")))
                good.append(f"{name} {version}")
                continue
            wrong = f"{version} is not in the tested range {ranges}"
        except metadata.PackageNotFoundError:
            wrong = "is not installed"
        except Exception as error:
            wrong = f"{version} cannot be imported ({reason(error)})"
            repair = repair.replace("install", "install --force-reinstall")
        level = "note" if name in _BESIDE else "problem"
        yield Finding(level, "packages", f"{name} {wrong}; {repair}")
    if good:
        yield Finding("ok", "packages", f"in their ranges: {', '.join(good)}")
    if not wanted:
        text = "neither requirements.txt nor an installed flax_resnetv2 names ranges"
        yield Finding("note", "packages", text)


def plugins() -> str:
    """The installed packages by which JAX reaches accelerators."""
    found = {f"{d.name} {d.version}" for d in metadata.distributions()}
    plugins = [text for text in found if re.match(r"jax-.*-plugin |libtpu ", text)]
    return ", ".join(sorted(plugins)) or "no plugin for an accelerator is installed"


def requirements() -> list[str]:
    """The tested ranges, as "jax>=0.10.2,<0.13"; none where nothing names them."""
    lines = []
    if (ROOT / "pyproject.toml").is_file():
        lines = (ROOT / "requirements.txt").read_text().splitlines()
    else:
        with contextlib.suppress(metadata.PackageNotFoundError):
            lines = metadata.requires("flax_resnetv2") or []
    return [line.replace(" ", "") for line in lines if re.match(r"\w", line)]


def _within(version: str, ranges: str) -> bool:
    """Whether a version is in ">=1.2,<2"; of a pre-release only the numbers count."""

    def numbers(text: str) -> list[int]:
        found = [int(n) for n in re.match(r"\d+(\.\d+)*", text)[0].split(".")]
        return found + [0] * (8 - len(found))

    return all(
        (numbers(version) >= numbers(bound)) == (relation == ">=")
        for relation, bound in re.findall(r"(>=|<)([\d.]+)", ranges)
    )


def reason(error: Exception) -> str:
    """An error in one line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
