"""NVML as far as stackbench asks it, without a GPU: the fixture `fake_nvml` puts it where pynvml would be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bench import devices


class NVMLError(Exception):
    """What the real module raises; the code is its only argument."""


class FakeNvml:
    """Devices by name; `refused` names functions that raise; attributes hold what counters say."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, names: list[str], refused: frozenset[str] = frozenset(), old_driver: bool = False):
        self.names, self.refused, self.old_driver = names, refused, old_driver
        self.started = self.stopped = 0
        self.energy_mj = 5_000_000
        self.throttled_ns: dict[int, int] = {}
        self.reasons = 0
        self.processes: list[Any] = []

    def __getattribute__(self, name: str) -> Any:
        refused = object.__getattribute__(self, "refused") if name.startswith("nvml") else ()
        if name in refused:

            def refuse(*_: Any) -> Any:
                raise NVMLError("Not Supported")

            return refuse
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:
        self.started += 1

    def nvmlShutdown(self) -> None:
        self.stopped += 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.159.04"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        if uuid != "MIG-1":
            raise NVMLError("Not Found")
        return "MIG-1"

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return handle if isinstance(handle, str) else f"GPU-{'abc'[handle]}{handle}-0000"

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return f"{self.names[0]} MIG 1g.18gb" if isinstance(handle, str) else self.names[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        return SimpleNamespace(total=150_754_820_096, used=1_000_000)

    def nvmlDeviceGetPciInfo(self, handle: Any) -> Any:
        return SimpleNamespace(busId="00000000:1B:00.0")

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any) -> int:
        return 700_000

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int) -> int:
        return 1980 if kind == 1 else 3201

    nvmlDeviceGetMaxClockInfo = nvmlDeviceGetClockInfo

    def nvmlDeviceGetMigMode(self, handle: Any) -> list[int]:
        return [0, 0]

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:
        return 45

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int:
        return self.energy_mj

    def nvmlDeviceGetFieldValues(self, handle: Any, fields: list[int]) -> list[Any]:
        def answer(field: int) -> Any:
            value = SimpleNamespace(ullVal=self.throttled_ns.get(field, 0))
            return SimpleNamespace(nvmlReturn=3 if self.old_driver else 0, valueType=3, value=value)

        return [answer(field) for field in fields]

    def nvmlDeviceGetViolationStatus(self, handle: Any, policy: int) -> Any:
        return SimpleNamespace(violationTime=self.throttled_ns.get(74 + policy, 0))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:
        return self.processes

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        return SimpleNamespace(gpu=0)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any) -> int:
        return self.reasons

    def nvmlGpmQueryDeviceSupport(self, handle: Any) -> Any:
        return SimpleNamespace(isSupportedDevice=1)


@pytest.fixture
def fake_nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    """`fake_nvml(["NVIDIA H200"])`: these GPUs are here until the test ends, all of them visible."""

    def install(*arguments: Any, **keywords: Any) -> FakeNvml:
        fake = FakeNvml(*arguments, **keywords)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.setattr(devices, "_driver_present", lambda: True)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return fake

    return install
