"""What this machine gives a process: CPUs, memory, caches and NUMA nodes, read from /proc and /sys.

Every function takes the root of the file system, so that a test can hand it a small copy of another
machine's. What cannot be read is None, never a guess.
"""

from __future__ import annotations

import math
import os
import platform
import re
from pathlib import Path
from typing import Final

ROOT: Final = Path("/")
_UNLIMITED: Final = 1 << 60  # cgroup v1 writes "no limit" as a page-rounded 2^63
_CONTAINER_MARKS: Final = ("docker", "kubepods", "containerd", "libpod", "lxc", "podman", "garden")


def read(path: Path) -> str | None:
    """The stripped text of a small file, or None where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def read_int(path: Path) -> int | None:
    """The number a small file holds, or None."""
    text = read(path)
    try:
        return int(text) if text else None
    except ValueError:
        return None


def key_values(text: str | None) -> dict[str, int]:
    """`name 12` or `name: 12 kB` lines as numbers (kB become bytes)."""
    found = {}
    for line in (text or "").splitlines():
        match = re.match(r"(\S+?):?\s+(\d+)(\s*kB)?$", line)
        if match:
            found[match[1]] = int(match[2]) * (1024 if match[3] else 1)
    return found


def cgroup_directories(controller: str, root: Path = ROOT) -> list[Path]:
    """This process's cgroup and its ancestors for one controller, v2 and v1, nearest first.

    A limit counts wherever in the chain it stands. Inside a container the path that /proc names may not exist
    below the mount: the mount's own top is the container's group then.
    """
    mount = root / "sys/fs/cgroup"
    found: list[Path] = []
    for line in (read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base = mount / "unified" if (mount / "unified").is_dir() else mount
        elif controller in controllers.split(","):
            base = mount / controller
        else:
            continue
        group = base / path.strip("/")
        while group != base and base in group.parents:
            if group.is_dir():
                found.append(group)
            group = group.parent
        if base.is_dir():
            found.append(base)
    return found


def memory_limit(root: Path = ROOT) -> int | None:
    """The smallest memory limit of this process's control groups in bytes; None without one."""
    limits = []
    for group in cgroup_directories("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            value = read_int(group / name)
            if value is not None and value < _UNLIMITED:
                limits.append(value)
    return min(limits, default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time this process may use (cgroup CPU quota over its period); None without a quota."""
    quotas = []
    for group in cgroup_directories("cpu", root):
        both = (read(group / "cpu.max") or "").split()
        if len(both) != 2:
            both = [read(group / "cpu.cfs_quota_us") or "-1", read(group / "cpu.cfs_period_us") or "0"]
        if all(part.isdigit() for part in both) and int(both[1]) > 0:
            quotas.append(int(both[0]) / int(both[1]))
    return min(quotas, default=None)


def throttled_periods(root: Path = ROOT) -> int | None:
    """How often the CPU quota has stopped this process's groups so far; None where nothing counts it."""
    counts = [
        counters["nr_throttled"]
        for group in cgroup_directories("cpu", root)
        if "nr_throttled" in (counters := key_values(read(group / "cpu.stat")))
    ]
    return sum(counts) if counts else None


def affinity() -> list[int]:
    """The CPUs this process may run on (all of them where the system has no affinity masks)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def threads_for(cpus: int, root: Path = ROOT) -> int:
    """Threads for a pool on `cpus` CPUs: min(quota, CPUs), at least one."""
    quota = cpu_quota(root)
    return max(1, cpus if quota is None else min(cpus, math.floor(quota)))


def memory_total(root: Path = ROOT) -> int | None:
    """Bytes of main memory."""
    total = key_values(read(root / "proc/meminfo")).get("MemTotal")
    if total is None and root == ROOT and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total


def memory_usable(root: Path = ROOT) -> int | None:
    """min(control-group limit, main memory) in bytes."""
    return min((m for m in (memory_limit(root), memory_total(root)) if m is not None), default=None)


def cpu_model(root: Path = ROOT) -> str:
    """The CPU's name as the kernel tells it."""
    text = read(root / "proc/cpuinfo") or ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def last_level_cache(root: Path = ROOT) -> int | None:
    """Bytes of the largest cache that CPU 0 reports."""
    sizes = []
    for size in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", read(size) or "")
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=None)


def parse_cpus(text: str) -> list[int]:
    """`0-3,8` as [0, 1, 2, 3, 8]; ValueError for anything else."""
    cpus: set[int] = set()
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        first, last = int(low), int(high or low)
        if last < first:
            raise ValueError(part)
        cpus.update(range(first, last + 1))
    return sorted(cpus)


def numa_cpus(node: int, root: Path = ROOT) -> list[int] | None:
    """The CPUs of a NUMA node; None where the kernel does not say."""
    text = read(root / f"sys/devices/system/node/node{node}/cpulist")
    try:
        return parse_cpus(text) if text else None
    except ValueError:
        return None


def numa_nodes(cpus: list[int], root: Path = ROOT) -> list[int]:
    """The NUMA nodes that these CPUs belong to."""
    nodes = []
    for directory in (root / "sys/devices/system/node").glob("node[0-9]*"):
        node = int(directory.name.removeprefix("node"))
        if set(numa_cpus(node, root) or ()) & set(cpus):
            nodes.append(node)
    return sorted(nodes)


def governor(root: Path = ROOT) -> str | None:
    """CPU 0's frequency governor; None where the kernel (a guest's, often) has no frequency control."""
    return read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def turbo(root: Path = ROOT) -> bool | None:
    """Whether the CPU may clock above its base frequency; None where unreadable."""
    cpus = root / "sys/devices/system/cpu"
    no_turbo = read_int(cpus / "intel_pstate/no_turbo")
    if no_turbo is not None:
        return no_turbo == 0
    boost = read_int(cpus / "cpufreq/boost")
    return None if boost is None else boost == 1


def smt(root: Path = ROOT) -> bool | None:
    """Whether two CPUs share a core (simultaneous multithreading); None where unreadable."""
    active = read_int(root / "sys/devices/system/cpu/smt/active")
    return None if active is None else active == 1


def virtualisation(root: Path = ROOT) -> list[str]:
    """What stands between this process and the machine, as far as known: `vm`, `gvisor`, `container`."""
    found = []
    info = read(root / "proc/cpuinfo") or ""
    if re.search(r"^flags\s*:.*\bhypervisor\b", info, re.MULTILINE):
        found.append("vm")
    # gVisor's kernel calls itself 4.4.0 of this very date
    if "4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016" in (read(root / "proc/version") or ""):
        found.append("gvisor")
    groups = read(root / "proc/1/cgroup") or ""
    marked = any(mark in groups for mark in _CONTAINER_MARKS)
    if marked or any((root / name).exists() for name in (".dockerenv", "run/.containerenv")):
        found.append("container")
    return found
