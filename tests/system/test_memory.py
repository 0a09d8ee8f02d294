"""The memory of containers, from the files of both versions of cgroups."""

import pytest

from flax_resnetv2.system.memory import free_memory, machine_memory

V2 = "memory.max", "memory.current", "inactive_file"
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"


def lay_out(root, membership, groups, names):
    """Write files of a machine with 4 GB free; groups have (limit, used, droppable)."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    (root / "proc/meminfo").write_text("MemTotal: 8 kB\nMemAvailable: 4000000 kB\n")
    for group, (limit, used, droppable) in groups.items():
        directory = root / "sys/fs/cgroup" / group
        directory.mkdir(parents=True, exist_ok=True)
        (directory / names[0]).write_text(f"{limit}\n")
        (directory / names[1]).write_text(f"{used}\n")
        (directory / "memory.stat").write_text(f"anon 7\n{names[2]} {droppable}\n")


@pytest.mark.parametrize(
    ("membership", "groups", "names"),
    [
        ("0::/\n", {"": (2_000, 900, 100)}, V2),
        ("0::/a/b\n", {"a": (2_000, 900, 100), "a/b": ("max", 500, 0)}, V2),
        ("0::/a/b\n", {"a": (9_000, 1_000, 0), "a/b": (2_000, 900, 100)}, V2),
        ("5:cpu,memory:/a\n0::/\n", {"memory/a": (2_000, 900, 100)}, V1),
        # The path is the host's, and the container sees its own group as the base.
        ("4:memory:/docker/12\n", {"memory": (2_000, 900, 100)}, V1),
        ("4:memory:/a\n", {"memory": (2**63 - 4096, 0, 0),
                           "memory/a": (2_000, 900, 100)}, V1),
    ],
)  # fmt: skip
def test_the_smallest_limit_counts(tmp_path, membership, groups, names):
    lay_out(tmp_path, membership, groups, names)
    assert machine_memory(tmp_path) == 2_000
    assert free_memory(tmp_path) == 2_000 - (900 - 100)


@pytest.mark.parametrize("membership", ["0::/\n", "3:cpu:/a\n0::/\n", ""])
def test_without_limits_the_machine_counts(tmp_path, membership):
    lay_out(tmp_path, membership, {"": ("max", 5, 0)}, V2)
    assert machine_memory(tmp_path) == machine_memory(tmp_path / "no such")
    assert free_memory(tmp_path) == 4_096_000_000
