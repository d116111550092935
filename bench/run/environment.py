"""What an arm runs in: the fingerprint of interpreter, packages, device, machine and flags.

The environment's variables are never stored, except flags: those that the suite sets and those whose names
change performance, with paths rewritten. No user name, host name or absolute path is stored (`scrub`).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench import devices, host
from bench.devices import Device
from bench.errors import UserError
from bench.run.scrub import leaks, scrub, scrub_values

__all__ = [
    "cpu_list",
    "fingerprint",
    "flags_in_force",
    "inherited_flags",
    "leaks",
    "same_environment",
    "scrub",
    "scrub_values",
    "thread_count",
]

# Variables that change how fast something runs. Values of others are never read.
_FLAGS: Final = re.compile(
    r"(XLA_|JAX_|TORCH|PYTORCH_|OMP_|KMP_|GOMP_|MKL_|OPENBLAS_|TRITON_|CUBLAS|CUDNN_|NCCL_|MALLOC_)\w*"
    r"|CUDA_(VISIBLE_DEVICES|DEVICE_ORDER|LAUNCH_BLOCKING|MODULE_LOADING|DEVICE_MAX_CONNECTIONS|FORCE_PTX_JIT)"
    r"|NVIDIA_TF32_OVERRIDE|LD_PRELOAD|NPROC|RAYON_NUM_THREADS|TOKENIZERS_PARALLELISM|PYTHONMALLOC|PYTHON_GIL"
)
_TELLING: Final = re.compile(r"(ADDR|ADDRESS|HOST|HOSTS|TOKEN|KEY|SECRET|PASSWORD|USER)(_|$)")
_PLACE: Final = re.compile(r"(DIR|PATH|FILE|HOME|ROOT)$")  # says where, not how
_INTERESTING: Final = re.compile(
    r"torch|jax|jaxlib|jax-.*|triton|numpy|pyperf|ml-dtypes|tokenizers|mkl|intel-openmp|nvidia-.*|stackbench"
    r"|fastokens|gigatoken|tiktoken|orjson|zstandard|pyarrow|torchdata|datasets|grain|spdl|litdata|daft"
    r"|mosaicml-streaming|dataloader-rs|stackbench-native"
)
_TOOLS: Final = frozenset({"pip", "setuptools", "wheel", "uv", "stackbench"})
_PROBE: Final = """
import importlib.metadata as m, json, platform
print(json.dumps([platform.python_version(), platform.python_implementation(),
                  [[d.metadata["Name"], d.version] for d in m.distributions()]]))
"""


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _distributions(pairs: Iterable[Sequence[str | None]]) -> dict[str, str]:
    """Names to versions; the first on the path wins, as it does for `import`."""
    found: dict[str, str] = {}
    for name, version in pairs:
        if name and version:
            found.setdefault(_normal(name), version)
    return dict(sorted(found.items()))


def _python(interpreter: Path | None) -> tuple[str, str, dict[str, str]]:
    """Version, implementation and distributions of an interpreter; of this one without starting a process."""
    if interpreter is None or interpreter == Path(sys.executable):
        from importlib.metadata import distributions

        pairs = [(d.metadata["Name"], d.version) for d in distributions()]
        return platform.python_version(), platform.python_implementation(), _distributions(pairs)
    try:
        answer = subprocess.run(
            [interpreter, "-c", _PROBE], capture_output=True, text=True, timeout=60, cwd="/", check=True
        )
        version, implementation, found = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise UserError(
            f"interpreter {str(interpreter)!r} does not answer: {type(error).__name__}: {error}",
            next_command="make bench (it makes the environments that suites name)",
        ) from error
    return version, implementation, _distributions(found)


def _locked(lock: Path) -> dict[str, set[str]]:
    """The versions a lock allows, by name: requirements with `==`, or uv.lock and pylock.toml."""
    text = lock.read_text(encoding="utf-8")
    if lock.suffix in (".toml", ".lock"):
        data = tomllib.loads(text)
        packages = [*data.get("package", ()), *data.get("packages", ())]
        pairs = [(p["name"], p["version"]) for p in packages if "version" in p]
    else:
        pairs = re.findall(r"^([A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?\s*==\s*([^\s;\\]+)", text, re.MULTILINE)
    allowed: dict[str, set[str]] = {}
    for name, version in pairs:
        allowed.setdefault(_normal(name), set()).add(version)
    return allowed


def _against_locks(installed: Mapping[str, str], locks: Iterable[Path]) -> dict[str, Any]:
    """Whether the installed versions are the locked ones; null where no lock speaks of any of them.

    A package in a lock that is not installed is no disagreement: locks hold extras and platforms too.
    """
    allowed: dict[str, set[str]] = {}
    for lock in locks:
        for name, versions in _locked(lock).items():
            allowed.setdefault(name, set()).update(versions)
    spoken = [name for name in installed if name in allowed]
    wrong = [
        f"{name}: locked {' or '.join(sorted(allowed[name]))}, installed {installed[name]}"
        for name in spoken
        if installed[name] not in allowed[name]
    ]
    silent = [name for name in installed if name not in allowed and name not in _TOOLS] if spoken else []
    return {
        "agrees_with_lock": not wrong if spoken else None,
        "lock_disagreements": wrong,
        "not_in_lock": silent,
    }


def _git(repository: Path) -> dict[str, Any]:
    """The commit and whether the tree differs from it; null outside git."""

    def ask(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(
                ["git", "-C", str(repository), *arguments],
                capture_output=True,
                text=True,
                timeout=30,
                env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip()

    status = ask("status", "--porcelain")
    return {
        "git_sha": ask("rev-parse", "--verify", "--quiet", "HEAD"),
        "git_dirty": None if status is None else bool(status),
    }


def inherited_flags() -> dict[str, str]:
    """The variables whose names change performance, as they are: for workers, not for storing."""
    return {k: v for k, v in sorted(os.environ.items()) if _FLAGS.fullmatch(k) and not _TELLING.search(k)}


def flags_in_force(flags: Mapping[str, str], repository: Path) -> dict[str, str]:
    """The suite's flags, and from the environment's variables those whose names change performance."""
    chosen = inherited_flags() | dict(flags)
    stored = {}
    for name, value in sorted(chosen.items()):
        if name == "LD_PRELOAD":
            stored[name] = " ".join(Path(part).name for part in re.split(r"[\s:]+", value) if part)
        elif _PLACE.search(name):
            stored[name] = "<path>"
        else:
            stored[name] = scrub(value, repository)
    return stored


def _gpus() -> tuple[str | None, list[dict[str, Any]]]:
    """Driver version and the visible GPUs with what may change between sessions: clocks, power cap."""
    try:
        with devices.nvml() as nvml:
            driver = devices.ask(nvml, nvml.nvmlSystemGetDriverVersion)
            return driver, [_gpu(nvml, handle) for handle in devices.visible_handles(nvml)]
    except devices.NoNvml:
        return None, []


def _gpu(nvml: Any, handle: Any) -> dict[str, Any]:
    def ask(name: str, *arguments: Any) -> Any:
        function = getattr(nvml, name, None)
        return devices.ask(nvml, function, handle, *arguments) if function else None

    memory, cap, mig = ask("nvmlDeviceGetMemoryInfo"), ask("nvmlDeviceGetEnforcedPowerLimit"), None
    modes = ask("nvmlDeviceGetMigMode")
    if modes is not None:
        mig = bool(modes[0])
    return {
        "name": ask("nvmlDeviceGetName"),
        "uuid": ask("nvmlDeviceGetUUID"),
        "memory_bytes": None if memory is None else int(memory.total),
        "power_cap_w": None if cap is None else cap / 1000,
        "sm_clock_mhz": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
        "sm_clock_max_mhz": ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        "mig": mig,
        "numa_node": devices.numa_node_of(nvml, handle),
    }


def _machine() -> dict[str, Any]:
    cpus = host.affinity()
    return {
        "cpu_model": host.cpu_model(),
        "cpu_count": os.cpu_count(),
        "cpu_affinity": cpus,
        "cpu_quota": host.cpu_quota(),
        "numa_nodes": host.numa_nodes(cpus),
        "governor": host.governor(),
        "turbo": host.turbo(),
        "smt": host.smt(),
        "memory_bytes": host.memory_usable(),
        "last_level_cache_bytes": host.last_level_cache(),
        "kernel": f"{platform.system()} {platform.release()}",
        "virtualisation": host.virtualisation(),
    }


def fingerprint(
    interpreter: Path | None, flags: Mapping[str, str], locks: Sequence[Path], repository: Path
) -> dict[str, Any]:
    """Everything that could make the same work take another time here, as JSON.

    `env_id` hashes what defines the environment; readings that move by themselves (current clocks) stay out.
    """
    python, implementation, installed = _python(interpreter)
    driver, gpus = _gpus()
    found: dict[str, Any] = {
        "python": python,
        "implementation": implementation,
        "distributions_hash": _digest(installed),
        "versions": {name: version for name, version in installed.items() if _INTERESTING.fullmatch(name)},
        **_against_locks(installed, locks),
        **_git(repository),
        "driver": driver,
        "device_uuids": [gpu["uuid"] for gpu in gpus],
        "gpus": gpus,
        **_machine(),
        "flags": flags_in_force(flags, repository),
    }
    return {"env_id": _digest(_defining(found)), **found}


def _defining(found: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two environments different ones: label to value."""
    return {
        "device UUIDs": found["device_uuids"],
        "driver": found["driver"],
        "power cap (W)": [gpu["power_cap_w"] for gpu in found["gpus"]],
        "Python": f"{found['implementation']} {found['python']}",
        "packages": found["distributions_hash"],
        "flags": found["flags"],
        "commit": found["git_sha"],
        "uncommitted changes": found["git_dirty"],
        "CPU": found["cpu_model"],
        "CPUs": len(found["cpu_affinity"]),
        "CPU quota": found["cpu_quota"],
        "governor": found["governor"],
        "turbo": found["turbo"],
        "kernel": found["kernel"],
    }


def _changes(label: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    def show(value: Any) -> str:
        return "unset" if value is None else str(value)

    names = sorted(old.keys() | new.keys())
    return [
        f"{label} {name}: {show(old.get(name))} → {show(new.get(name))}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def same_environment(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints so that a resumed run is a new session; empty if nothing does."""
    old, new = _defining(a), _defining(b)
    differences: list[str] = []
    for label, value in old.items():
        if value == new[label]:
            continue
        if label == "packages":
            named = _changes("package", a["versions"], b["versions"])
            differences += named or [f"packages: {value} → {new[label]} (none of the interesting ones)"]
        elif label == "flags":
            differences += _changes("flag", a["flags"], b["flags"])
        else:
            differences.append(f"{label}: {value} → {new[label]}")
    return differences


def thread_count(cpus: Sequence[int] | int) -> int:
    """Threads of every pool of an arm bound to these CPUs: min(CPU quota, CPUs), at least one."""
    return host.threads_for(cpus if isinstance(cpus, int) else len(cpus))


def cpu_list(affinity: str, device: Device | None = None) -> list[int]:
    """The CPUs that every arm is bound to.

    `none`: the whole affinity mask; `device`: the mask's CPUs on the GPU's NUMA node, and the whole mask for
    a CPU or where the node is unknown; `0-3,8`: these.
    """
    mask = host.affinity()
    if affinity == "none":
        return mask
    if affinity == "device":
        node = device.numa_node if device is not None and device.kind == "cuda" else None
        near = host.numa_cpus(node) if node is not None else None
        return sorted(set(near or mask) & set(mask)) or mask
    try:
        wanted = host.parse_cpus(affinity)
    except ValueError:
        raise UserError(
            f"affinity = {affinity!r} is no CPU list", valid=["device", "none", "a list such as 0-3,8"]
        ) from None
    if missing := sorted(set(wanted) - set(mask)):
        raise UserError(
            f"affinity = {affinity!r} names CPUs that this process may not use: {missing}",
            valid=[str(cpu) for cpu in mask],
        )
    return wanted
