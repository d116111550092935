"""Energy, throttling, clocks and memory around a timed window, from counters that the device keeps anyway.

`Window` reads cumulative counters once before and once after the window, so nothing samples while the work
runs. A counter that the device refuses gives a null with the reason. `python -m bench.capture.nvml` shows
which of them answer here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from bench import devices, host

# NVML's fields that count the time spent throttled, in nanoseconds since the driver was loaded: the
# NVML_FI_DEV_PERF_POLICY_* and, from 269 on, NVML_FI_DEV_CLOCKS_EVENT_REASON_* (recent drivers).
THROTTLE_FIELDS: Final[Mapping[str, int]] = {
    "sw_power_cap": 74,
    "thermal": 75,
    "sync_boost": 76,
    "board_limit": 77,
    "low_utilization": 78,
    "reliability": 79,
    "sw_thermal": 269,
    "hw_thermal": 270,
    "hw_power_brake": 271,
}
# The same from nvmlDeviceGetViolationStatus, by NVML_PERF_POLICY_*, for devices that refuse the field.
_POLICIES: Final[Mapping[str, int]] = {
    "sw_power_cap": 0,
    "thermal": 1,
    "sync_boost": 2,
    "board_limit": 3,
    "low_utilization": 4,
    "reliability": 5,
}
# Which value of the union a field holds: double, unsigned int, unsigned long, unsigned long long, signed …
_UNION: Final = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
_SHARE_LIMIT: Final = 1.05  # a share above it means that the counter does not count what we believe


def metric(name: str, value: float | None, unit: str, reason: str = "", **more: Any) -> dict[str, Any]:
    """A `metric` message of `bench.protocol`; a null says why."""
    message = {"type": "metric", "metric": name, "value": value, "unit": unit, "phase": "values"}
    message |= {"source": "measured", "censored": False, **more}
    if value is None:
        message["reason"] = reason
    return message


@dataclass(slots=True)
class _Reading:
    ns: int
    values: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


class Rapl:
    """The CPU packages' energy counters of /sys/class/powercap."""

    def __init__(self, root: Path = host.ROOT) -> None:
        zones = sorted((root / "sys/class/powercap").glob("intel-rapl:[0-9]*"))
        self._zones = [zone for zone in zones if zone.name.count(":") == 1]
        self.reason = "" if self._zones else "no /sys/class/powercap/intel-rapl: no energy counter here"

    def read(self) -> list[int] | None:
        """Microjoules by package; None where they are unreadable, with `reason`."""
        counts = [host.read_int(zone / "energy_uj") for zone in self._zones]
        if not counts or None in counts:
            self.reason = self.reason or "energy_uj is not readable for this user"
            return None
        return [count for count in counts if count is not None]

    def joules(self, before: list[int] | None, after: list[int] | None) -> float | None:
        """Energy between two readings; a counter that wrapped once is unwrapped."""
        if before is None or after is None:
            return None
        total = 0
        for zone, start, stop in zip(self._zones, before, after, strict=True):
            span = host.read_int(zone / "max_energy_range_uj") or 0
            total += stop - start if stop >= start else stop - start + span
        return total / 1e6


class Window:
    """`with Window("cuda:0") as window: …` or `start()` and `stop()`; then `metrics()`.

    The device must be idle when the window ends (the value's closing wait sees to that). The counters lag by
    up to 100 ms, so a window should last a second.
    """

    def __init__(self, device: str = "cpu", root: Path = host.ROOT) -> None:
        self.device = device
        self._nvml: Any = None
        self._handle: Any = None
        self._absence = ""
        self._rapl = Rapl(root)
        self._joules: tuple[list[int] | None, list[int] | None] = (None, None)
        self._before = self._after = _Reading(0)
        self._library: Any = None
        if device.startswith("cuda"):
            self._open()
        elif device != "cpu":
            raise ValueError(f"device {device!r} is neither cpu nor cuda:N")

    def _open(self) -> None:
        index = int(self.device.partition(":")[2] or 0)
        library = devices.nvml()
        try:
            nvml = library.__enter__()
        except devices.NoNvml as error:
            self._absence = str(error)
            return
        self._library, self._nvml = library, nvml
        handles = devices.visible_handles(nvml)
        if index < len(handles):
            self._handle = handles[index]
        else:
            self._absence = f"NVML shows {len(handles)} visible devices: {self.device} is not among them"

    def close(self) -> None:
        """Lets go of NVML."""
        library, self._library, self._handle = self._library, None, None
        if library is not None:
            library.__exit__(None, None, None)

    def __enter__(self) -> Window:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Takes the readings before the window."""
        self._joules = (self._rapl.read(), None)
        self._before = self._read()

    def stop(self) -> list[dict[str, Any]]:
        """Takes the readings after it and returns the metrics."""
        self._after = self._read()
        self._joules = (self._joules[0], self._rapl.read())
        return self.metrics()

    def _read(self) -> _Reading:
        reading = _Reading(time.perf_counter_ns())
        if self._handle is None:
            return reading
        nvml, handle = self._nvml, self._handle
        asked = {
            "energy_mj": (nvml.nvmlDeviceGetTotalEnergyConsumption, ()),
            "temperature_c": (nvml.nvmlDeviceGetTemperature, (nvml.NVML_TEMPERATURE_GPU,)),
            "sm_clock_mhz": (nvml.nvmlDeviceGetClockInfo, (nvml.NVML_CLOCK_SM,)),
            "memory": (nvml.nvmlDeviceGetMemoryInfo, ()),
        }
        for name, (function, arguments) in asked.items():
            try:
                answer = function(handle, *arguments)
            except nvml.NVMLError as error:
                reading.reasons[name] = f"NVML: {error}"
            else:
                reading.values[name] = answer.used if name == "memory" else answer
        self._read_throttling(reading)
        return reading

    def _read_throttling(self, reading: _Reading) -> None:
        nvml = self._nvml
        try:
            answers = list(nvml.nvmlDeviceGetFieldValues(self._handle, list(THROTTLE_FIELDS.values())))
        except nvml.NVMLError as error:
            answers = []
            reading.reasons.update(dict.fromkeys(THROTTLE_FIELDS, f"NVML: {error}"))
        for name, answer in zip(THROTTLE_FIELDS, answers, strict=False):
            if answer.nvmlReturn == 0:
                reading.values[name] = getattr(answer.value, _UNION[answer.valueType])
            else:
                reading.reasons[name] = f"NVML: {nvml.NVMLError(answer.nvmlReturn)}"
        for name, policy in _POLICIES.items():
            if name in reading.values:
                continue
            try:
                status = nvml.nvmlDeviceGetViolationStatus(self._handle, policy)
            except nvml.NVMLError as error:
                reading.reasons[name] = f"NVML: {error}"
            else:
                reading.values[name] = status.violationTime

    def metrics(self) -> list[dict[str, Any]]:
        """The `metric` messages of the window that was measured last."""
        seconds = (self._after.ns - self._before.ns) / 1e9
        found = [metric("window_s", seconds, "s")]
        cpu_joules = self._rapl.joules(*self._joules)
        cpu = metric("cpu_package_energy_j", cpu_joules, "J", self._rapl.reason)
        if not self.device.startswith("cuda"):
            return [*found, {**cpu, "metric": "energy_j"}]
        energy, reason = self._difference("energy_mj")
        found.append(metric("energy_j", None if energy is None else energy / 1000, "J", reason))
        found.append(cpu)
        found += [self._share(name, seconds) for name in THROTTLE_FIELDS]
        for name, unit in (("temperature_c", "C"), ("sm_clock_mhz", "MHz")):
            for when, reading in (("before", self._before), ("after", self._after)):
                value = reading.values.get(name)
                stem, _, suffix = name.rpartition("_")
                why = self._why(name, reading)
                found.append(metric(f"{stem}_{when}_{suffix}", value, unit, why))
        used = self._after.values.get("memory")
        found.append(metric("device_used_bytes", used, "bytes", self._why("memory", self._after)))
        return found

    def _why(self, name: str, *readings: _Reading) -> str:
        known = (reading.reasons.get(name) for reading in readings)
        return self._absence or next((reason for reason in known if reason), "not read")

    def _difference(self, name: str) -> tuple[float | None, str]:
        start, stop = self._before.values.get(name), self._after.values.get(name)
        if start is None or stop is None:
            return None, self._why(name, self._before, self._after)
        if stop < start:
            return None, "the counter ran backwards: the driver was reloaded or the device reset"
        return stop - start, ""

    def _share(self, name: str, seconds: float) -> dict[str, Any]:
        label = f"throttled_{name}_share"
        spent, reason = self._difference(name)
        if spent is None or seconds <= 0:
            return metric(label, None, "1", reason or "an empty window")
        share = spent / 1e9 / seconds
        if share > _SHARE_LIMIT:
            return metric(label, None, "1", f"the counter moved {share:.3g} times as far as the clock")
        return metric(label, min(share, 1.0), "1")


def probe(device: str = "cuda:0") -> list[dict[str, Any]]:
    """Which counters answer: the metrics of a short window, and whether GPM (DRAM utilisation) is offered."""
    window = Window(device)
    try:
        window.start()
        time.sleep(0.2)
        found = window.stop()
        return [*found, _gpm(window)] if device.startswith("cuda") else found
    finally:
        window.close()


def _gpm(window: Window) -> dict[str, Any]:
    nvml, handle = window._nvml, window._handle
    if handle is None:
        return metric("gpm_supported", None, "1", window._absence)
    try:
        answer = nvml.nvmlGpmQueryDeviceSupport(handle)
    except nvml.NVMLError as error:
        return metric("gpm_supported", None, "1", f"NVML: {error}")
    return metric("gpm_supported", int(bool(answer.isSupportedDevice)), "1")


if __name__ == "__main__":
    for line in probe(*sys.argv[1:2]):
        print(json.dumps(line))
