"""The memory that this process may use: of the machine, or less in a container.

A process that takes more than a control group (cgroup) allows is killed without a word.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")


def machine_memory(root: Path = ROOT) -> int | None:
    """Return the bytes that this process may use; None if the system does not say."""
    sizes = [group.limit for group in _groups(root)]
    with contextlib.suppress(ValueError, OSError):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(sizes, default=None)


def free_memory(root: Path = ROOT) -> int | None:
    """Return the bytes that this process may still take; None if Linux does not say."""
    sizes = [max(group.limit - group.used, 0) for group in _groups(root)]
    with contextlib.suppress(OSError):
        text = (root / "proc/meminfo").read_text()
        if found := re.search(r"MemAvailable:\s+(\d+) kB", text):
            sizes.append(int(found[1]) * 1024)
    return min(sizes, default=None)


class _Group(NamedTuple):
    """A control group with a limit."""

    limit: int
    used: int
    """Without files that the system would drop for other use."""


def _groups(root: Path) -> Iterator[_Group]:
    """Yield the limited groups of this process, from its own to the outermost."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
            dropped = "inactive_file"
            if controllers:  # version 1 of cgroups
                if "memory" not in controllers.split(","):
                    continue
                base /= "memory"
                names = "memory.limit_in_bytes", "memory.usage_in_bytes"
                dropped = "total_inactive_file"
            group = base / path.lstrip("/")
            # Inside a container the path may be the host's: its own group is the base.
            for directory in (group, *group.parents):
                if directory.is_relative_to(base):
                    with contextlib.suppress(OSError, ValueError):  # "max": no limit
                        limit, used = (int((directory / n).read_text()) for n in names)
                        text = (directory / "memory.stat").read_text()
                        found = re.search(rf"^{dropped} (\d+)$", text, re.MULTILINE)
                        yield _Group(limit, used - (int(found[1]) if found else 0))
