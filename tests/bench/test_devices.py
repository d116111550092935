"""Devices: figures and their sources, detection through a fake NVML, the limits of a machine."""

from __future__ import annotations

import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from bench import devices, host
from bench.devices import Device
from bench.errors import UserError

REGISTRY = tomllib.loads(devices.DEVICES_TOML.read_text(encoding="utf-8"))
FIGURES = ("memory_bytes", "hbm_bytes_per_s", "l2_bytes", "tdp_w", "peak_flops")


@pytest.mark.parametrize("key", REGISTRY)
def test_every_figure_has_a_source_and_every_source_a_figure(key: str) -> None:
    entry = REGISTRY[key]
    assert set(entry["source"]) == {name for name in FIGURES if name in entry}
    assert set(entry) <= {"title", "names", "source", *FIGURES}
    assert set(entry["peak_flops"]) <= {"fp32", "tf32", "bf16", "fp16", "fp8"}
    assert devices.known(key).peak_flops == entry["peak_flops"]


def test_peaks_are_dense_and_belong_to_their_own_device() -> None:
    h200, h100, pcie = (devices.known(name) for name in ("h200", "h100-sxm", "h100-pcie"))
    assert h200.peak_flops["bf16"] == 989e12  # published MFUs divide by this, not by the sparse 1,979
    assert h200.hbm_bytes_per_s == 4.8e12
    assert h100.hbm_bytes_per_s == 3.35e12
    assert pcie.peak_flops["bf16"] == 756e12
    for key in REGISTRY:
        peaks = devices.known(key).peak_flops
        assert peaks["bf16"] == peaks["fp16"] >= peaks["tf32"] >= peaks.get("fp32", 0)


def test_what_nobody_looked_up_is_none() -> None:
    assert "fp8" not in devices.known("a100-sxm-80").peak_flops
    assert devices.known("l40s").l2_bytes is None
    assert devices.known("a10").memory_bytes is None


@pytest.mark.parametrize(
    ("reported", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("A100-SXM4-40GB", "a100-sxm-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_names_that_nvml_reports(reported: str, key: str) -> None:
    found = devices.match(reported)
    assert found is not None
    assert found.key == key


@pytest.mark.parametrize(
    "name", ["NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090 D", "NVIDIA H20", "Tesla K80"]
)
def test_unknown_devices_get_nobodys_peaks(name: str) -> None:
    assert devices.match(name) is None


def test_a_wrong_name_is_told_the_right_ones() -> None:
    with pytest.raises(UserError) as caught:
        devices.known("h2000")
    assert "did you mean 'h200'" in str(caught.value)
    assert {"cpu", "h200", "b200"} <= set(caught.value.valid)
    assert devices.known("H200").device_class == "h200"
    assert devices.known("cpu").device_class == "cpu"


def test_detection_fills_in_datasheet_and_nvml(fake_nvml) -> None:
    fake = fake_nvml(["NVIDIA H200", "NVIDIA Unheard Of"])
    first, second, cpu = devices.detect()
    assert (first.id, first.key, first.uuid) == ("cuda:0", "h200", "GPU-a0-0000")
    assert first.memory_bytes == 150_754_820_096
    assert first.peak_flops["bf16"] == 989e12
    assert second.peak_flops == {}
    assert second.hbm_bytes_per_s is None
    assert second.device_class == "nvidia-unheard-of"
    assert cpu.id == "cpu"
    assert (fake.started, fake.stopped) == (1, 1)
    assert devices.here("cuda") == first
    with pytest.raises(UserError, match="cuda:7"):
        devices.here("cuda:7")


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("", []),
        ("1", ["GPU-b1-0000"]),
        ("2,0", ["GPU-c2-0000", "GPU-a0-0000"]),
        ("0,7,1", ["GPU-a0-0000"]),  # as in CUDA, the list ends at the first that names nothing
        ("-1", []),
        ("0,0", ["GPU-a0-0000"]),
        ("GPU-b1-0000,0", ["GPU-b1-0000", "GPU-a0-0000"]),
        ("GPU-c", ["GPU-c2-0000"]),
        ("GPU-", []),  # ambiguous
        ("MIG-1", ["MIG-1"]),
        ("MIG-2", []),
    ],
)
def test_cuda_visible_devices(
    fake_nvml, monkeypatch: pytest.MonkeyPatch, visible: str, uuids: list[str]
) -> None:
    fake_nvml(["NVIDIA H200"] * 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = devices.detect()[:-1]
    assert [device.uuid for device in found] == uuids
    assert [device.index for device in found] == list(range(len(uuids)))


def test_a_mig_slice_has_no_peaks(fake_nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(["NVIDIA H200"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert devices.detect()[0].peak_flops == {}


@pytest.mark.parametrize("refused", ["nvmlInit", "nvmlDeviceGetCount"])
def test_an_nvml_that_refuses_leaves_the_cpu(fake_nvml, refused: str) -> None:
    fake_nvml(["NVIDIA H200"], refused=frozenset({refused}))
    assert [device.kind for device in devices.detect()] == ["cpu"]


def test_numa_node_from_the_pci_address(fake_nvml, tmp_path: Path) -> None:
    fake = fake_nvml(["NVIDIA H200"])
    node = tmp_path / "sys/bus/pci/devices/0000:1b:00.0/numa_node"
    node.parent.mkdir(parents=True)
    node.write_text("1\n")
    assert devices.numa_node_of(fake, 0, tmp_path) == 1
    node.write_text("-1\n")
    assert devices.numa_node_of(fake, 0, tmp_path) is None


def test_detection_is_cheap_and_imports_no_framework() -> None:
    code = (
        "import sys, time; from bench import devices; devices.detect(); t = time.perf_counter()\n"
        "devices.detect(); s = time.perf_counter() - t\n"
        "assert not {'torch', 'jax', 'numpy', 'pynvml', 'rich', 'psutil'} & set(sys.modules), 'imports'\n"
        "print(s)"
    )
    root = Path(__file__).parents[2]
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    if not devices._driver_present():
        assert float(answer.stdout) < 0.2  # milliseconds when idle; the CPUs of a test run are not


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_limits_of_control_groups_v2(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/step",
            "proc/meminfo": "MemTotal:       16000000 kB",
            "sys/fs/cgroup/job/step/memory.max": "max",
            "sys/fs/cgroup/job/memory.max": "4294967296",
            "sys/fs/cgroup/job/cpu.max": "150000 100000",
            "sys/fs/cgroup/job/step/cpu.max": "max 100000",
            "sys/fs/cgroup/job/cpu.stat": "usage_usec 5\nnr_throttled 7",
        },
    )
    assert host.memory_limit(root) == 4 << 30
    assert host.memory_usable(root) == 4 << 30
    assert host.cpu_quota(root) == 1.5
    assert host.threads_for(8, root) == 1
    assert host.throttled_periods(root) == 7


def test_limits_of_control_groups_v1_and_a_container_that_sees_only_its_own(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc",
            "proc/meminfo": "MemTotal:       16000000 kB",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
    )
    assert host.memory_limit(root) is None
    assert host.memory_usable(root) == 16_384_000_000
    assert host.cpu_quota(root) == 4
    assert host.threads_for(2, root) == 2
    assert host.throttled_periods(root) is None


def test_nothing_readable_is_none_everywhere(tmp_path: Path) -> None:
    assert host.memory_usable(tmp_path) is None
    assert host.last_level_cache(tmp_path) is None
    assert host.governor(tmp_path) is host.turbo(tmp_path) is host.smt(tmp_path) is None
    assert host.numa_nodes([0], tmp_path) == host.virtualisation(tmp_path) == []
    assert isinstance(devices.cpu(tmp_path), Device)


def test_machine_facts(tmp_path: Path) -> None:
    cpus = "sys/devices/system/cpu"
    root = write(
        tmp_path,
        {
            f"{cpus}/cpu0/cache/index2/size": "2048K",
            f"{cpus}/cpu0/cache/index3/size": "105M",
            f"{cpus}/cpu0/cpufreq/scaling_governor": "powersave",
            f"{cpus}/intel_pstate/no_turbo": "0",
            f"{cpus}/smt/active": "1",
            "sys/devices/system/node/node0/cpulist": "0-1,4",
            "sys/devices/system/node/node1/cpulist": "2-3",
            "proc/cpuinfo": "model name\t: Some CPU\nflags\t\t: fpu hypervisor sse",
            "proc/version": "Linux version 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016",
            ".dockerenv": "",
        },
    )
    assert host.last_level_cache(root) == 105 << 20
    assert host.governor(root) == "powersave"
    assert host.turbo(root) is host.smt(root) is True
    assert host.numa_cpus(0, root) == [0, 1, 4]
    assert host.numa_nodes([2], root) == [1]
    assert host.cpu_model(root) == "Some CPU"
    assert host.virtualisation(root) == ["vm", "gvisor", "container"]


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2"])
def test_a_bad_cpu_list(text: str) -> None:
    with pytest.raises(ValueError):
        host.parse_cpus(text)


def test_here_this_machine_answers() -> None:
    start = time.perf_counter()
    cpu = devices.detect()[-1]
    assert cpu.cpus is not None and 1 <= cpu.cpus <= len(host.affinity())
    assert cpu.memory_bytes is not None and cpu.memory_bytes > 1 << 28
    assert time.perf_counter() - start < 5
