"""The devices a case can run on: what is here, and what datasheets say of devices that are not.

`detect()` asks NVML and the kernel, never a framework; `known("h200")` reads `devices.toml`, so that a laptop
can plan for a GPU node. A figure that nobody looked up is None, never another device's.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from bench import host
from bench.errors import UserError, did_you_mean

DEVICES_TOML: Final = Path(__file__).with_name("devices.toml")
_DRIVER_FILES: Final = ("dev/nvidiactl", "dev/dxg", "dev/nvhost-gpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One device, detected here or read from `devices.toml`."""

    kind: str  # "cpu" | "cuda"
    name: str
    index: int = 0  # among the visible ones: `cuda:0` is the first that CUDA_VISIBLE_DEVICES lets through
    key: str = ""  # in devices.toml; "" for a device that it does not know
    uuid: str | None = None
    memory_bytes: int | None = None
    peak_flops: Mapping[str, float] = field(default_factory=dict, hash=False)  # by dtype, dense
    hbm_bytes_per_s: float | None = None
    l2_bytes: int | None = None  # a CPU's: its last-level cache
    tdp_w: float | None = None
    cpus: int | None = None  # a CPU's: min(quota, affinity)
    numa_node: int | None = None
    source: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def id(self) -> str:
        """What a job calls it: `cpu`, `cuda:0`."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @property
    def device_class(self) -> str:
        """What a verdict is filed under: the key, else the name in lower case with dashes, `cpu` for CPUs."""
        return "cpu" if self.kind == "cpu" else self.key or re.sub(r"[^a-z0-9]+", "-", self.name.lower())


class NoNvml(Exception):
    """NVML cannot be asked here; the message says why."""


@functools.cache
def _registry() -> dict[str, dict[str, Any]]:
    with DEVICES_TOML.open("rb") as file:
        return tomllib.load(file)


def _from_registry(key: str) -> Device:
    entry = _registry()[key]
    return Device(
        kind="cuda",
        name=entry["title"],
        key=key,
        memory_bytes=entry.get("memory_bytes"),
        peak_flops={dtype: float(value) for dtype, value in entry.get("peak_flops", {}).items()},
        hbm_bytes_per_s=entry.get("hbm_bytes_per_s"),
        l2_bytes=entry.get("l2_bytes"),
        tdp_w=entry.get("tdp_w"),
        source=entry["source"],
    )


def match(nvml_name: str) -> Device | None:
    """The registry's device that NVML reports under this name; None for an unknown one."""
    for key, entry in _registry().items():
        if any(re.fullmatch(pattern, nvml_name.strip()) for pattern in entry["names"]):
            return _from_registry(key)
    return None


def known(name: str) -> Device:
    """The device of `--device NAME`: a key of devices.toml, a name that NVML would report, or `cpu`."""
    if name.lower() == "cpu":
        return cpu()
    if name.lower() in _registry():
        return _from_registry(name.lower())
    found = match(name)
    if found is None:
        valid = ["cpu", *_registry()]
        raise UserError(
            f"--device {name!r} is not in bench/devices.toml{did_you_mean(name.lower(), valid)}",
            valid=valid,
            next_command="stackbench plan SUITE --device h200",
        )
    return found


def cpu(root: Path = host.ROOT) -> Device:
    """The CPU of this machine, as much of it as this process may use. Its peaks are unknown."""
    cpus = host.affinity()
    nodes = host.numa_nodes(cpus, root)
    return Device(
        kind="cpu",
        name=host.cpu_model(root),
        memory_bytes=host.memory_usable(root),
        l2_bytes=host.last_level_cache(root),
        cpus=host.threads_for(len(cpus), root),
        numa_node=nodes[0] if len(nodes) == 1 else None,
        source={"memory_bytes": "min(cgroup limit, MemTotal)", "l2_bytes": "sysfs, last-level cache"},
    )


def _driver_present(root: Path = host.ROOT) -> bool:
    """Whether the kernel shows an NVIDIA device at all: three lookups, where loading NVML takes 20 ms."""
    return any((root / name).exists() for name in _DRIVER_FILES)


@contextlib.contextmanager
def nvml() -> Iterator[Any]:
    """NVML, started and stopped again; NoNvml with the reason where there is none."""
    if not _driver_present():
        raise NoNvml("no NVIDIA driver: /dev/nvidiactl does not exist")
    try:
        import pynvml
    except ImportError as error:
        raise NoNvml("nvidia-ml-py is not installed") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoNvml(f"NVML does not start: {error}") from error
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def ask(nvml: Any, function: Callable[..., Any], *arguments: Any) -> Any | None:
    """What NVML answers, or None where the device or the driver refuses."""
    try:
        answer = function(*arguments)
    except nvml.NVMLError:
        return None
    return answer.decode() if isinstance(answer, bytes) else answer


def visible_handles(nvml: Any) -> list[Any]:
    """NVML's handles in the order in which CUDA numbers the devices.

    CUDA_VISIBLE_DEVICES holds indices, UUIDs or unique beginnings of UUIDs; as in CUDA, the first entry that
    names no device ends the list. Indices are taken in PCI order (CUDA_DEVICE_ORDER=PCI_BUS_ID); CUDA's own
    default puts faster devices first and differs only on mixed nodes.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return handles
    uuids = [str(ask(nvml, nvml.nvmlDeviceGetUUID, handle)) for handle in handles]
    found: list[Any] = []
    seen: set[str] = set()
    for token in (part.strip() for part in wanted.split(",")):
        if token.isdigit():
            matches = [int(token)] if int(token) < len(handles) else []
        else:
            matches = [i for i, uuid in enumerate(uuids) if token and uuid.startswith(token)]
        if len(matches) == 1:
            handle = handles[matches[0]]
        elif token.startswith("MIG-"):
            handle = ask(nvml, nvml.nvmlDeviceGetHandleByUUID, token)
        else:
            break
        uuid = str(ask(nvml, nvml.nvmlDeviceGetUUID, handle)) if handle is not None else ""
        if not uuid or uuid in seen:
            break
        seen.add(uuid)
        found.append(handle)
    return found


def numa_node_of(nvml: Any, handle: Any, root: Path = host.ROOT) -> int | None:
    """The NUMA node that the device hangs on, from its PCI address; None where the kernel does not say."""
    pci = ask(nvml, nvml.nvmlDeviceGetPciInfo, handle)
    if pci is None:
        return None
    address = pci.busId.decode() if isinstance(pci.busId, bytes) else str(pci.busId)
    domain, _, rest = address.lower().partition(":")
    node = host.read_int(root / "sys/bus/pci/devices" / f"{domain[-4:]}:{rest}" / "numa_node")
    return node if node is not None and node >= 0 else None


def _cuda(nvml: Any, handle: Any, index: int) -> Device:
    name = str(ask(nvml, nvml.nvmlDeviceGetName, handle))
    uuid = ask(nvml, nvml.nvmlDeviceGetUUID, handle)
    memory = ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    # A MIG slice has a share of its parent's rates that no datasheet of the parent states.
    sliced = str(uuid).startswith("MIG-")
    found = None if sliced else match(name)
    base = found or Device(kind="cuda", name=name)
    total = None if memory is None else int(memory.total)
    return replace(
        base,
        name=name,
        index=index,
        uuid=uuid,
        memory_bytes=total,
        numa_node=numa_node_of(nvml, handle),
        source={**base.source, "memory_bytes": "NVML"},
    )


def detect() -> list[Device]:
    """The visible CUDA devices, then the CPU. Without a GPU this costs milliseconds."""
    found: list[Device] = []
    with contextlib.suppress(NoNvml), nvml() as library:
        try:
            handles = visible_handles(library)
        except library.NVMLError:
            handles = []
        found = [_cuda(library, handle, index) for index, handle in enumerate(handles)]
    return [*found, cpu()]


def here(device: str) -> Device:
    """The detected device of a job's `cpu`, `cuda` or `cuda:N`."""
    devices = detect()
    wanted = f"{device}:0" if device == "cuda" else device
    for candidate in devices:
        if candidate.id == wanted:
            return candidate
    raise UserError(
        f"device {device!r} is not here", valid=[d.id for d in devices], next_command="stackbench doctor"
    )
