"""Free host memory, under the limits of the host and of cgroups."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.saving import memory

MIB = 1 << 20


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with 1000 MiB free. Returns the folder of its cgroups."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {1000 * 1024} kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    return tmp_path / "groups"


def limit(folder: Path, most: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used * MIB}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {cache * MIB}\n")


def test_the_memory_of_the_host_is_free_without_a_limit(host: Path) -> None:
    """G13. Method: no cgroup at all, then one without a limit."""
    assert memory.free_memory() == 1000 * MIB
    (host.parent / "cgroup").write_text("0::/job\n")
    limit(host / "job", "max", 10, 1)
    assert memory.free_memory() == 1000 * MIB


def test_the_limit_of_a_cgroup_or_of_its_parent_is_kept(host: Path) -> None:
    """G13. Method: a job with 300 MiB left, of which 100 MiB are cached files; then a parent with
    less, a container that sees only its own files, and a group that is full."""
    (host.parent / "cgroup").write_text("0::/jobs/job\n")
    limit(host / "jobs/job", str(500 * MIB), 300, 100)
    assert memory.free_memory() == 300 * MIB
    limit(host / "jobs", str(600 * MIB), 500, 50)
    assert memory.free_memory() == 150 * MIB
    limit(host, str(100 * MIB), 20, 0)
    assert memory.free_memory() == 80 * MIB
    limit(host, str(100 * MIB), 200, 0)
    assert memory.free_memory() == 0


def test_the_limit_of_version_1_is_kept(host: Path) -> None:
    """Method: the files of version 1 of cgroups, which have other names."""
    (host.parent / "cgroup").write_text("5:cpu:/x\n4:memory:/job\n0::/\n")
    folder = host / "memory/job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{400 * MIB}")
    (folder / "memory.usage_in_bytes").write_text(f"{300 * MIB}")
    (folder / "memory.stat").write_text(f"total_inactive_file {50 * MIB}\n")
    assert memory.free_memory() == 150 * MIB


def test_a_system_that_says_nothing_has_unknown_memory(host: Path) -> None:
    """Method: neither file exists."""
    (host.parent / "meminfo").unlink()
    assert memory.free_memory() is None
