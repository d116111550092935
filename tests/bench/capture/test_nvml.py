"""The counters around a window, from a fake NVML and a fake powercap, and the libraries of this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from bench.capture import libraries, nvml


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    assert all(
        row["type"] == "metric" and {"unit", "phase", "source", "censored"} <= set(row) for row in rows
    )
    assert all(bool(row.get("reason")) == (row["value"] is None) for row in rows)
    return {row["metric"]: row for row in rows}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The window's clock: the test sets its only element."""
    now = [0]
    monkeypatch.setattr(nvml.time, "perf_counter_ns", lambda: now[0])
    return now


@pytest.mark.parametrize("old_driver", [False, True])
def test_a_window_takes_differences(fake_nvml, clock: list[int], tmp_path: Path, old_driver: bool) -> None:
    fake = fake_nvml(["NVIDIA H200"], old_driver=old_driver)
    fake.throttled_ns = {74: 9_000_000_000, 270: 5}
    with nvml.Window("cuda:0", tmp_path) as window:
        clock[0] += 2_000_000_000
        fake.energy_mj += 1_400_000
        fake.throttled_ns[74] += 500_000_000
    found = by_name(window.metrics())
    assert found["window_s"]["value"] == 2
    assert found["energy_j"]["value"] == 1400
    assert found["throttled_sw_power_cap_share"]["value"] == 0.25
    assert found["throttled_reliability_share"]["value"] == 0
    assert found["temperature_before_c"]["value"] == 45
    assert found["sm_clock_after_mhz"]["value"] == 1980
    assert found["device_used_bytes"]["value"] == 1_000_000
    assert "powercap" in found["cpu_package_energy_j"]["reason"]
    # the newer reasons have no older function to fall back on
    hardware = found["throttled_hw_thermal_share"]
    assert (hardware["value"] is None) == old_driver
    window.close()
    window.close()
    assert (fake.started, fake.stopped) == (1, 1)


@pytest.mark.parametrize(
    ("refused", "metric"),
    [
        ("nvmlDeviceGetTotalEnergyConsumption", "energy_j"),
        ("nvmlDeviceGetTemperature", "temperature_after_c"),
        ("nvmlDeviceGetClockInfo", "sm_clock_before_mhz"),
        ("nvmlDeviceGetMemoryInfo", "device_used_bytes"),
    ],
)
def test_what_is_refused_is_null_with_a_reason(
    fake_nvml, clock: list[int], refused: str, metric: str
) -> None:
    fake_nvml(["NVIDIA H200"], refused=frozenset({refused}))
    window = nvml.Window("cuda:0")
    window.start()
    clock[0] += 10**9
    row = by_name(window.stop())[metric]
    assert row["value"] is None
    assert row["reason"] == "NVML: Not Supported"


def test_throttling_counters_that_are_refused_or_absurd(fake_nvml, clock: list[int]) -> None:
    gone = frozenset({"nvmlDeviceGetFieldValues", "nvmlDeviceGetViolationStatus"})
    fake_nvml(["NVIDIA H200"], refused=gone)
    with nvml.Window("cuda:0") as window:
        clock[0] += 10**9
    assert by_name(window.metrics())["throttled_sw_power_cap_share"]["reason"] == "NVML: Not Supported"
    fake = fake_nvml(["NVIDIA H200"])
    fake.throttled_ns, fake.energy_mj = {74: 0, 75: 5}, 10
    with nvml.Window("cuda:0") as window:
        clock[0] += 10**9
        fake.throttled_ns, fake.energy_mj = {74: 7 * 10**9, 75: 0}, 0
    found = by_name(window.metrics())
    assert "7 times as far as the clock" in found["throttled_sw_power_cap_share"]["reason"]
    assert "backwards" in found["throttled_thermal_share"]["reason"]
    assert "backwards" in found["energy_j"]["reason"]


def test_a_device_that_is_not_there(fake_nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(["NVIDIA H200"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with nvml.Window("cuda:1") as window:
        pass
    found = by_name(window.metrics())
    assert "cuda:1 is not among them" in found["energy_j"]["reason"]
    assert set(found) == set(by_name(nvml.Window("cuda:0").metrics()))  # the same columns, null or not


def test_without_a_driver_every_gpu_metric_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml.devices, "_driver_present", lambda: False)
    with nvml.Window("cuda:0") as window:
        pass
    rows = by_name(window.metrics())
    assert [name for name, row in rows.items() if row["value"] is not None] == ["window_s"]
    assert "no NVIDIA driver" in rows["energy_j"]["reason"]


def rapl(root: Path, package: int, joules: float, span: int = 10**9) -> Path:
    zone = root / "sys/class/powercap" / f"intel-rapl:{package}"
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (zone / "max_energy_range_uj").write_text(f"{span}\n")
    return zone


def test_cpu_energy_is_the_sum_of_the_packages(tmp_path: Path) -> None:
    rapl(tmp_path, 0, 10)
    rapl(tmp_path, 1, 990)
    core = tmp_path / "sys/class/powercap/intel-rapl:0:0"  # a part of package 0: not counted twice
    core.mkdir()
    (core / "energy_uj").write_text("1\n")
    with nvml.Window("cpu", tmp_path) as window:
        rapl(tmp_path, 0, 15)
        rapl(tmp_path, 1, 2)  # wrapped at 1000 J
    assert by_name(window.metrics())["energy_j"]["value"] == pytest.approx(17)


def test_cpu_energy_that_cannot_be_read(tmp_path: Path) -> None:
    with nvml.Window("cpu", tmp_path) as window:
        pass
    assert "powercap" in by_name(window.metrics())["energy_j"]["reason"]
    (rapl(tmp_path, 0, 1) / "energy_uj").unlink()
    with nvml.Window("cpu", tmp_path) as window:
        pass
    assert "not readable" in by_name(window.metrics())["energy_j"]["reason"]


def test_the_probe_names_every_counter(fake_nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_nvml(["NVIDIA H200"])
    monkeypatch.setattr(nvml.time, "sleep", lambda _: None)
    found = by_name(nvml.probe("cuda:0"))
    assert found["gpm_supported"]["value"] == 1
    assert fake.stopped == 1
    fake_nvml(["NVIDIA H200"], refused=frozenset({"nvmlGpmQueryDeviceSupport"}))
    assert by_name(nvml.probe("cuda:0"))["gpm_supported"]["reason"] == "NVML: Not Supported"


MAPS = """\
7f00-7f01 r-xp 00000000 08:01 12 /home/alice/v/lib/python3.12/site-packages/nvidia/cu13/lib/libcublas.so.13
7f01-7f02 r--p 00001000 08:01 12 /home/alice/v/lib/python3.12/site-packages/nvidia/cu13/lib/libcublas.so.13
7f02-7f03 r-xp 00000000 08:01 13 /opt/stray dir/libcudnn.so.9.1.0
7f03-7f04 r-xp 00000000 08:01 14 /usr/lib/x86_64-linux-gnu/libgomp.so.1.0.0
7f04-7f05 r-xp 00000000 08:01 15 /v/torch.libs/libgomp-24e2ab19.so.1.0.0
7f05-7f06 r-xp 00000000 08:01 16 /usr/lib/x86_64-linux-gnu/libc.so.6
7f06-7f07 rw-p 00000000 00:00 0 [heap]
7f07-7f08 r-xp 00000000 08:01 17 /v/torch/lib/libtorch_cpu.so
"""


def test_libraries_from_the_maps_of_a_process() -> None:
    found = libraries.loaded(MAPS.splitlines())
    assert found == {
        "cublas": "13 (libcublas.so.13)",
        "cudnn": "9.1.0 (libcudnn.so.9.1.0)",
        "openmp-gnu": "1.0.0 (libgomp.so.1.0.0) + 1.0.0 (libgomp-24e2ab19.so.1.0.0)",
        "torch": "unknown (libtorch_cpu.so)",
    }
    assert "/" not in str(found)


def test_libraries_of_this_process() -> None:
    import numpy as np

    np.ones((2, 2)) @ np.ones((2, 2))
    found = libraries.loaded()
    assert "/" not in str(found)
    if "openblas" in found:
        assert found["openblas"][0].isdigit()


def test_capturing_imports_no_framework() -> None:
    frameworks = {"torch", "jax", "triton"} & set(sys.modules)
    libraries.loaded()
    nvml.Window("cpu")
    assert {"torch", "jax", "triton"} & set(sys.modules) == frameworks
