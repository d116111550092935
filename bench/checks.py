"""What on this machine would disturb a measurement: one function a question, each answer a `Finding`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import devices, host
from bench.devices import Device

OK: Final = "ok"
NOTE: Final = "note"
WARNING: Final = "warning"
LEVELS: Final = (WARNING, NOTE, OK)
_GB: Final = 1e9
# NVML's clock event reasons that are faults, and the one that is a busy H200's normal state.
_SLOWDOWNS: Final[Mapping[int, str]] = {
    0x08: "hardware slow-down",
    0x20: "software thermal slow-down",
    0x40: "hardware thermal slow-down",
    0x80: "power brake",
}
_POWER_CAP: Final = 0x04


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what is so, why it matters to a measurement, what to do about it."""

    level: str
    what: str
    why: str = ""
    do: str = ""


def cpu_times(root: Path = host.ROOT) -> tuple[int, int, int]:
    """Ticks of all CPUs since boot: (all, busy, stolen by the hypervisor)."""
    for line in (host.read(root / "proc/stat") or "").splitlines():
        if line.startswith("cpu "):
            ticks = [int(part) for part in line.split()[1:9]]
            total, idle = sum(ticks), ticks[3] + ticks[4]
            stolen = ticks[7] if len(ticks) > 7 else 0
            return total, total - idle - stolen, stolen
    return 0, 0, 0


def check_load(seconds: float = 0.5, root: Path = host.ROOT) -> Iterator[Finding]:
    """Who else uses the CPUs: over half a second in which this process sleeps, and over the last minute."""
    before, stopped = cpu_times(root), host.throttled_periods(root)
    time.sleep(seconds)
    total, busy, stolen = (b - a for a, b in zip(before, cpu_times(root), strict=True))
    if total > 0:
        share, steal = busy / total, stolen / total
        what = f"CPUs {share:.0%} busy with other work over {seconds} s, load {_load(root)}"
        if share > 0.05:
            why = "it takes time, cache and memory bandwidth from one arm and not from the next"
            yield Finding(WARNING, what, why, "stop it, or measure when the machine is quiet")
        else:
            yield Finding(OK, what)
        if steal > 0.005:
            why = "the hypervisor gives our CPUs to other guests: times grow, and nothing here shows when"
            yield Finding(WARNING, f"CPU steal {steal:.1%}", why, "use a dedicated machine, or more rounds")
        else:
            yield Finding(OK, f"CPU steal {steal:.1%}")
    now = host.throttled_periods(root)
    if stopped is not None and now is not None and now > stopped:
        why = "the quota stops all threads for the rest of a period: latencies get steps of 100 ms"
        yield Finding(WARNING, "the CPU quota throttles at this moment", why, "raise the cgroup's cpu.max")


def _load(root: Path) -> str:
    return (host.read(root / "proc/loadavg") or "unknown").split()[0]


def check_cpus(root: Path = host.ROOT) -> Iterator[Finding]:
    """CPU count and quota, shared cores, frequency control."""
    cpus, quota = len(host.affinity()), host.cpu_quota(root)
    if quota is not None and quota < cpus:
        why = "a pool of one thread a CPU would be stopped by the quota; pools get min(quota, CPUs) threads"
        yield Finding(NOTE, f"CPU quota {quota:g} on {cpus} CPUs", why, "ask for whole CPUs (cpuset)")
    if cpus < 4:
        why = "the harness, the kernel and the work share them: expect a noise of some percent"
        yield Finding(NOTE, f"{cpus} CPUs", why, "trust intervals, not single numbers; take more rounds")
    else:
        yield Finding(OK, f"{cpus} CPUs")
    if host.smt(root):
        why = "two CPUs share one core: a thread's speed depends on what runs beside it"
        yield Finding(NOTE, "SMT is on", why, "bind one CPU a core: affinity = a list in the suite")
    governor = host.governor(root)
    if governor not in (None, "performance"):
        why = "the clock follows the load, so the first seconds run slower"
        yield Finding(WARNING, f"CPU governor {governor}", why, "cpupower frequency-set -g performance")
    elif governor is None:
        why = "the clock is the host's affair and may change between sessions"
        yield Finding(NOTE, "CPU frequency control is not visible", why, "compare within a session only")
    else:
        yield Finding(OK, "CPU governor performance")
    if host.turbo(root):
        why = "the clock then depends on temperature and on how many cores are busy"
        yield Finding(NOTE, "turbo is on", why, "leave it, or switch it off for small effects")
    if found := host.virtualisation(root):
        why = "neighbours on the host are invisible from here"
        yield Finding(NOTE, f"runs in: {', '.join(found)}", why, "compare within a session only")


def check_memory(root: Path = host.ROOT) -> Iterator[Finding]:
    """Free memory and use of swap."""
    info = host.key_values(host.read(root / "proc/meminfo"))
    total, swapped = info.get("MemTotal", 0), info.get("SwapTotal", 0) - info.get("SwapFree", 0)
    available = min(info.get("MemAvailable", 0), host.memory_usable(root) or 0)
    if total and swapped > 0.01 * total:
        why = "pages come back from disk in the middle of a step"
        yield Finding(WARNING, f"{swapped / _GB:.1f} GB in swap", why, "free memory, then swapoff -a")
    if total and available < 4 * _GB:
        why = "a training step of the quick suite with its compiler needs about 3 GB"
        yield Finding(
            WARNING, f"{available / _GB:.1f} GB of memory free", why, "free memory or use smaller cases"
        )
    elif total:
        yield Finding(OK, f"{available / _GB:.0f} of {total / _GB:.0f} GB of memory free")


def check_disk(directories: Mapping[str, Path]) -> Iterator[Finding]:
    """Space for results, and for compilers' temporary files."""
    for name, directory in directories.items():
        existing = next(p for p in (directory, *directory.resolve().parents) if p.exists())
        free = shutil.disk_usage(existing).free / _GB
        if free < 5:
            why = "traces and compile caches take some GB; a full disk ends the run (what was measured stays)"
            yield Finding(
                WARNING, f"{free:.1f} GB free for {name}", why, "free space or choose another --out"
            )
        else:
            yield Finding(OK, f"{free:.0f} GB free for {name}")


def check_tools(root: Path = host.ROOT) -> Iterator[Finding]:
    """Compilers and counters."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        why = "torch.compile builds its CPU kernels with it: torch-compile would be skipped on the CPU"
        yield Finding(WARNING, "no C++ compiler", why, "apt-get install g++")
    else:
        yield Finding(OK, f"C++ compiler {Path(compiler).name}")
    paranoid = host.read_int(root / "proc/sys/kernel/perf_event_paranoid")
    if paranoid is not None and paranoid > 1 and os.geteuid() != 0:
        why = "the kernel refuses CPU counters to this user; times do not need them"
        yield Finding(NOTE, f"perf_event_paranoid is {paranoid}", why, "sysctl kernel.perf_event_paranoid=1")


def check_fingerprint(found: Mapping[str, Any]) -> Iterator[Finding]:
    """Packages against the lock, and the commit."""
    if found["agrees_with_lock"] is False:
        wrong = found["lock_disagreements"]
        what = f"{len(wrong)} packages differ from the lock: {'; '.join(wrong[:3])}"
        yield Finding(WARNING, what, "results of another environment than the recorded one", "make bench")
    elif found["agrees_with_lock"] is None:
        yield Finding(NOTE, "no lock names the installed packages", "nobody can rebuild it", "make bench")
    else:
        yield Finding(OK, "packages agree with the lock")
    if found["git_dirty"]:
        why = "the commit alone will not say what was measured"
        yield Finding(NOTE, "uncommitted changes", why, "commit before a run that will be released")


def check_gpus(found: Sequence[Device]) -> Iterator[Finding]:
    """Processes on the visible GPUs and what slows their clocks at this moment."""
    gpus = [device for device in found if device.kind == "cuda"]
    if not gpus:
        yield Finding(NOTE, f"no CUDA device: {_no_gpu()}", "GPU cases are planned only", "")
        return
    with devices.nvml() as nvml:
        for device, handle in zip(gpus, devices.visible_handles(nvml), strict=False):
            yield from _gpu_state(nvml, handle, device)


def _no_gpu() -> str:
    try:
        with devices.nvml():
            return "NVML shows none that CUDA_VISIBLE_DEVICES lets through"
    except devices.NoNvml as error:
        return str(error)


def _gpu_state(nvml: Any, handle: Any, device: Device) -> Iterator[Finding]:
    processes = devices.ask(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle)
    used = devices.ask(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    busy = f", {used.gpu} % busy" if used is not None else ""
    if processes is None:
        yield Finding(NOTE, f"{device.id}: NVML does not list processes{busy}", "others stay unseen", "")
    elif processes:
        why = "they share its memory, its caches and its power"
        yield Finding(WARNING, f"{device.id}: {len(processes)} processes{busy}", why, "stop them: nvidia-smi")
    else:
        yield Finding(OK, f"{device.id}: no other process{busy}")
    reasons = devices.ask(nvml, nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    slow = [name for bit, name in _SLOWDOWNS.items() if reasons and reasons & bit]
    if slow:
        why = "the gate calls values measured so invalid"
        yield Finding(WARNING, f"{device.id}: {', '.join(slow)}", why, "check cooling and power supply")
    elif reasons and reasons & _POWER_CAP:
        yield Finding(
            NOTE, f"{device.id}: clocks held by the power cap", "normal under load, not when idle", ""
        )
    elif reasons is None:
        yield Finding(
            NOTE, f"{device.id}: clock event reasons are not readable", "slow-downs stay unseen", ""
        )
    else:
        yield Finding(OK, f"{device.id}: nothing slows its clocks")
    if not device.peak_flops:
        why = "no MFU and no roofline for it"
        yield Finding(NOTE, f"{device.name} is not in devices.toml", why, "add it there, with its source")


def check_counters(found: Sequence[Device]) -> Iterator[Finding]:
    """Which NVML counters answer (asked in a process of its own), and whether ncu is there."""
    for device in (d for d in found if d.kind == "cuda"):
        rows = _probe(device.id)
        refused = [row["metric"] for row in rows if row["value"] is None]
        if not rows:
            yield Finding(
                NOTE, f"{device.id}: the NVML probe failed", "energy and throttling would be null", ""
            )
        elif refused:
            what = f"{device.id}: {len(refused)} of {len(rows)} NVML metrics are null: {', '.join(refused)}"
            yield Finding(NOTE, what, "they stay null in the results", "")
        else:
            yield Finding(OK, f"{device.id}: all {len(rows)} NVML metrics answer")
    if any(device.kind == "cuda" for device in found):
        if shutil.which("ncu"):
            why = "whether this user may read counters (ERR_NVGPUCTRPERM) shows when it runs"
            yield Finding(OK, "ncu found", why)
        else:
            why = "bytes from counters would be missing: the models' bytes remain, labelled modelled"
            yield Finding(NOTE, "ncu not found", why, "install Nsight Compute and put it on PATH")


def _probe(device: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "bench.capture.nvml", device]
    root = Path(__file__).resolve().parents[1]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=root, check=True)
        return [json.loads(line) for line in answer.stdout.splitlines()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def all_findings(
    fingerprint: Mapping[str, Any], found: Sequence[Device], directories: Mapping[str, Path]
) -> list[Finding]:
    """Every check, warnings first."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        check_load,
        check_cpus,
        check_memory,
        lambda: check_disk(directories),
        check_tools,
        lambda: check_gpus(found),
        lambda: check_counters(found),
        lambda: check_fingerprint(fingerprint),
    ]
    findings = [finding for check in checks for finding in check()]
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))
