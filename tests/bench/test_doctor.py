"""The doctor: what each finding takes, the report at 80 columns, ceilings in processes of their own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import ceilings, checks, devices, doctor, host
from bench.capture import ceilings as measuring
from bench.checks import NOTE, OK, WARNING, Finding
from bench.devices import Device
from bench.run import environment

ROOT = Path(__file__).parents[2]
FINGERPRINT = {"agrees_with_lock": True, "lock_disagreements": [], "git_dirty": False}


def levels(findings: Any) -> dict[str, str]:
    return {finding.what: finding.level for finding in findings}


def level(findings: Any, part: str) -> str:
    (found,) = (finding for finding in findings if part in finding.what)
    return found.level


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("after", "busy", "steal"),
    [
        ("cpu 100 0 0 1100 0 0 0 0 0 0", OK, OK),
        ("cpu 400 0 0 1000 0 0 0 0 0 0", WARNING, OK),
        ("cpu 100 0 0 1000 0 0 0 40 0 0", OK, WARNING),
    ],
)
def test_load_and_steal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str, busy: str, steal: str
) -> None:
    root = write(
        tmp_path, {"proc/stat": "cpu 100 0 0 1000 0 0 0 0 0 0", "proc/loadavg": "0.10 0.1 0.1 1/9 9"}
    )
    monkeypatch.setattr(checks.time, "sleep", lambda _: write(tmp_path, {"proc/stat": after}))
    findings = list(checks.check_load(0.5, root))
    assert level(findings, "busy with other work") == busy
    assert level(findings, "CPU steal") == steal


def test_a_throttling_quota_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.stat": "nr_throttled 3"}
    root = write(tmp_path, files)
    more = {"sys/fs/cgroup/cpu.stat": "nr_throttled 5"}
    monkeypatch.setattr(checks.time, "sleep", lambda _: write(tmp_path, more))
    assert levels(checks.check_load(0.5, root)) == {"the CPU quota throttles at this moment": WARNING}


def test_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "affinity", lambda: list(range(8)))
    cpus = "sys/devices/system/cpu"
    files = {
        f"{cpus}/cpu0/cpufreq/scaling_governor": "powersave",
        f"{cpus}/cpufreq/boost": "1",
        f"{cpus}/smt/active": "1",
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/cpu.max": "300000 100000",
    }
    found = levels(checks.check_cpus(write(tmp_path, files)))
    assert found == {
        "CPU quota 3 on 8 CPUs": NOTE,
        "8 CPUs": OK,
        "SMT is on": NOTE,
        "CPU governor powersave": WARNING,
        "turbo is on": NOTE,
    }
    monkeypatch.setattr(host, "affinity", lambda: [0, 1])
    quiet = write(
        tmp_path, {f"{cpus}/cpu0/cpufreq/scaling_governor": "performance", f"{cpus}/smt/active": "0"}
    )
    assert (
        levels(checks.check_cpus(quiet)).items() >= {"2 CPUs": NOTE, "CPU governor performance": OK}.items()
    )


def test_memory_and_swap(tmp_path: Path) -> None:
    info = "MemTotal: 16000000 kB\nMemAvailable: 2000000 kB\nSwapTotal: 8000000 kB\nSwapFree: 4000000 kB"
    found = levels(checks.check_memory(write(tmp_path, {"proc/meminfo": info})))
    assert found == {"4.1 GB in swap": WARNING, "2.0 GB of memory free": WARNING}
    info = "MemTotal: 16000000 kB\nMemAvailable: 9000000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB"
    assert set(levels(checks.check_memory(write(tmp_path, {"proc/meminfo": info}))).values()) == {OK}


def test_disk_of_a_directory_that_does_not_exist_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return type("Usage", (), {"free": 10**9})

    monkeypatch.setattr(checks.shutil, "disk_usage", usage)
    found = levels(checks.check_disk({"results": tmp_path / "a/b"}))
    assert found == {"1.0 GB free for results": WARNING}
    assert asked == [tmp_path]


def test_a_missing_compiler_and_refused_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda _: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    root = write(tmp_path, {"proc/sys/kernel/perf_event_paranoid": "4"})
    found = list(checks.check_tools(root))
    assert levels(found) == {"no C++ compiler": WARNING, "perf_event_paranoid is 4": NOTE}
    assert "torch-compile would be skipped" in found[0].why
    monkeypatch.setattr(checks.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "g++" else None)
    assert levels(checks.check_tools(tmp_path / "none")) == {"C++ compiler g++": OK}


def test_packages_and_commit() -> None:
    assert levels(checks.check_fingerprint(FINGERPRINT)) == {"packages agree with the lock": OK}
    wrong = {
        "agrees_with_lock": False,
        "lock_disagreements": ["numpy: locked 1, installed 2"],
        "git_dirty": True,
    }
    assert list(levels(checks.check_fingerprint(wrong)).values()) == [WARNING, NOTE]
    assert level(checks.check_fingerprint({**FINGERPRINT, "agrees_with_lock": None}), "no lock") == NOTE


def test_gpu_state(fake_nvml) -> None:
    fake = fake_nvml(["NVIDIA H200"])
    found = levels(checks.check_gpus(devices.detect()))
    assert found == {"cuda:0: no other process, 0 % busy": OK, "cuda:0: nothing slows its clocks": OK}
    fake.processes, fake.reasons = [object()], 0x40 | 0x04
    found = levels(checks.check_gpus(devices.detect()))
    assert set(found.values()) == {WARNING}
    assert "cuda:0: hardware thermal slow-down" in found
    fake.processes, fake.reasons = [], 0x04
    assert level(checks.check_gpus(devices.detect()), "power cap") == NOTE


def test_gpu_that_says_little(fake_nvml) -> None:
    names = ("ComputeRunningProcesses", "UtilizationRates", "CurrentClocksEventReasons")
    fake_nvml(["NVIDIA Unheard Of"], refused=frozenset(f"nvmlDeviceGet{name}" for name in names))
    assert set(levels(checks.check_gpus(devices.detect())).values()) == {NOTE}
    assert level(checks.check_gpus(devices.detect()), "not in devices.toml") == NOTE


def test_counters_of_a_gpu_are_probed_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device(kind="cuda", name="NVIDIA H200", key="h200")
    monkeypatch.setattr(checks.shutil, "which", lambda _: None)
    answers = [{"metric": "energy_j", "value": 1.0}, {"metric": "gpm_supported", "value": None}]
    monkeypatch.setattr(checks, "_probe", lambda _: answers)
    found = levels(checks.check_counters([gpu]))
    assert found == {"cuda:0: 1 of 2 NVML metrics are null: gpm_supported": NOTE, "ncu not found": NOTE}
    monkeypatch.setattr(checks, "_probe", lambda _: answers[:1])
    monkeypatch.setattr(checks.shutil, "which", lambda _: "/usr/bin/ncu")
    assert set(levels(checks.check_counters([gpu])).values()) == {OK}
    monkeypatch.setattr(checks, "_probe", lambda _: [])
    assert level(checks.check_counters([gpu]), "probe failed") == NOTE
    assert list(checks.check_counters([Device(kind="cpu", name="c")])) == []


def test_the_probe_itself() -> None:
    rows = checks._probe("cpu")
    assert [row["metric"] for row in rows] == ["window_s", "energy_j"]
    assert checks._probe("--nonsense") == []


H200 = devices.known("h200")
ROWS: list[dict[str, Any]] = [
    {"device": "cuda:0", "device_uuid": "GPU-1", "stack": "torch", "spread": 0.02, **row}
    for row in (
        {"metric": "matmul_flops_per_s", "dtype": "bf16", "size": 8192, "value": 7e14, "unit": "FLOP/s"},
        {"metric": "matmul_flops_per_s", "dtype": "bf16", "size": 16384, "value": 798e12, "unit": "FLOP/s"},
        {"metric": "copy_bytes_per_s", "dtype": None, "size": 4 << 30, "value": 4.33e12, "unit": "B/s"},
        {"metric": "launch_latency_us", "dtype": None, "size": None, "value": 3.0, "unit": "us"},
        {"metric": "launch_latency_us", "dtype": None, "size": None, "value": 2.0, "unit": "us"},
        {"metric": "matmul_flops_per_s", "dtype": "tf32", "size": None, "value": None, "unit": "FLOP/s"}
        | {"reason": "tf32 is not in force"},
    )
]


def report(**changes: Any) -> doctor.Report:
    found = environment.fingerprint(None, {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}, [], ROOT)
    values: dict[str, Any] = {
        "made_at": "2026-01-01T00:00:00+00:00",
        "fingerprint": {**found, "driver": "580.159.04"},
        "devices": [H200, devices.cpu()],
        "packages": {"torch": "2.13.0", "jax": None},
        "findings": [
            Finding(WARNING, "CPU steal 3.0%", "why " * 30, "do"),
            Finding(NOTE, "2 CPUs"),
            Finding(OK, "fine"),
        ],
        "ceilings": [
            *ROWS,
            {**ceilings._failed("jax", "exit 1: no"), "device": "cuda:0", "device_uuid": None},
        ],
    }
    return doctor.Report(**{**values, **changes})


def test_the_report_fits_80_columns() -> None:
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    doctor.render(report(), console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for part in (
        "NVIDIA H200 SXM",
        "989 TFLOP/s",
        "798 TFLOP/s",
        "81%",
        "90%",
        "2 us",
        "! CPU steal",
        "jax missing",
    ):
        assert part in text
    assert "700 TFLOP/s" not in text and "3 us" not in text  # only the best of each
    assert "tf32 is not in force" in text and "exit 1: no" in text
    console = Console(width=80, file=io.StringIO())
    doctor.render(report(ceilings=None), console)
    assert "Ceilings" not in console.file.getvalue()


def test_measured_and_datasheet_stay_apart() -> None:
    rows = doctor.to_rows(report())
    assert all(set(row) == set(ceilings.COLUMNS) for row in rows)
    assert len(rows) == len(ROWS)
    assert ceilings.datasheet(ROWS[0], H200) == 989e12
    assert ceilings.datasheet(ROWS[2], H200) == 4.8e12
    assert ceilings.datasheet(ROWS[3], H200) is None
    assert ceilings.datasheet(ROWS[0], devices.cpu()) is None
    assert doctor.to_rows(report(ceilings=None)) == []


def test_json_carries_no_path(tmp_path: Path) -> None:
    finding = Finding(NOTE, f"under {tmp_path}/x", "", "")
    text = json.dumps(report(findings=[finding]).as_json())
    assert str(tmp_path) not in text and "<tmp>" in text
    assert environment.leaks(text, doctor.REPOSITORY) == []


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        (ROWS, 0),
        ([*ROWS, {"metric": "failed", "value": None}], 1),
        ([{"metric": "failed", "value": None}], 4),
        ([], 4),
        (None, 0),
    ],
)
def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, rows: Any, code: int) -> None:
    def diagnose(*, ceilings: bool, out: Path | None) -> doctor.Report:
        assert out == tmp_path / "out"
        return report(ceilings=rows)

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    assert doctor.run_doctor(rows is not None, tmp_path / "out", True) == code
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "out/doctor.json").read_text()) == printed
    assert os.listdir(tmp_path / "out") == ["doctor.json"]


def test_diagnosis_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.time, "sleep", lambda _: None)
    found = doctor.diagnose()
    assert found.ceilings is None
    assert found.devices[-1].kind == "cpu"
    assert [finding.level for finding in found.findings] == sorted(
        (finding.level for finding in found.findings), key=checks.LEVELS.index
    )
    json.dumps(found.as_json())


def test_the_doctor_imports_no_framework_and_no_capture() -> None:
    code = (
        "import sys, bench.doctor as d\n"
        "light = {'rich', 'psutil', 'pynvml', 'numpy'} & set(sys.modules); assert not light, light\n"
        "d.diagnose()\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] in ('torch', 'jax', 'triton', 'numpy')\n"
        "         or m.startswith('bench.capture')]; assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def fake_framework(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    package = tmp_path / "bench" / "capture"
    package.mkdir(parents=True)
    (tmp_path / "bench/__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "ceilings_numpy.py").write_text(body)
    (package / "ceilings_not_installed_anywhere.py").write_text("")
    monkeypatch.setattr(ceilings, "_ROOT", tmp_path)


def test_ceilings_come_from_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = (
        "import json, os, sys\n"
        "facts = [sys.argv[1:], os.environ['JAX_PLATFORMS'], os.getsid(0) == os.getpid()]\n"
        "print(json.dumps({'metric': 'm', 'value': 1, 'stack': 'numpy', 'facts': facts}))"
    )
    fake_framework(monkeypatch, tmp_path, body)
    assert list(ceilings.frameworks()) == ["numpy"]
    cpu = devices.cpu()
    (row,) = ceilings.measure([cpu])
    arguments, platform, leader = row["facts"]
    assert arguments == ["--device", "cpu", "--threads", str(cpu.cpus)]
    assert (platform, leader, row["device"], row["device_uuid"]) == ("cpu", True, "cpu", None)


def test_a_framework_that_fails_is_a_row_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_framework(monkeypatch, tmp_path, "raise SystemExit('no such device')")
    (row,) = ceilings.measure([devices.cpu()])
    assert (row["metric"], row["value"], row["reason"]) == ("failed", None, "exit 1: no such device")


def test_a_framework_that_hangs_is_ended_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    body = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(60)"
    )
    fake_framework(monkeypatch, tmp_path, body)
    (row,) = ceilings.run_one("numpy", devices.cpu(), timeout_s=3)
    assert row["reason"] == "no answer in 3 s"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        state = host.read(Path(f"/proc/{pid}/stat"))
        if state is None or state.rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child outlived its group")


def budget(**changes: Any) -> measuring.Budget:
    values = {
        "stack": "s",
        "device": "cpu",
        "memory_bytes": 32 << 30,
        "cache_bytes": 64 << 20,
        "seconds": 0.2,
    }
    return measuring.Budget(**{**values, **changes})


def test_copy_sizes_lie_beyond_the_cache_and_within_the_memory() -> None:
    assert budget().copy_sizes() == [128 << 20, 256 << 20]
    assert budget(cache_bytes=480 << 20).copy_sizes() == [480 << 20, 960 << 20]
    assert budget(cache_bytes=480 << 20, memory_bytes=4 << 30).copy_sizes() == [480 << 20]
    gpu = budget(device="cuda:0", cache_bytes=60 << 20, memory_bytes=140 << 30)
    assert gpu.copy_sizes() == [256 << 20, 1 << 30, 4 << 30]
    assert gpu.matmul_sizes() == [4096, 8192, 16384]
    none = list(measuring.copies(lambda _: lambda calls: None, budget(memory_bytes=1 << 28)))
    assert none[0]["value"] is None and "no room" in none[0]["reason"]


def test_a_precision_that_is_not_in_force_has_no_rate() -> None:
    def make(side: int, dtype: str) -> measuring.Run:
        return lambda calls: time.sleep(1e-4 * calls)

    errors = {"fp32": 3e-7, "tf32": 3e-7, "bf16": 3e-3}
    rows = list(measuring.products(make, errors.__getitem__, budget()))
    by_dtype = {row["dtype"]: row for row in rows}
    assert by_dtype["tf32"]["value"] is None
    assert "error is 3.0e-07" in by_dtype["tf32"]["reason"]
    assert by_dtype["fp32"]["value"] > 0 and by_dtype["bf16"]["n"] >= 1
    errors = {"fp32": 4e-4, "tf32": 4e-4, "bf16": 3e-3}  # JAX's default on an H100
    rows = list(measuring.products(make, errors.__getitem__, budget()))
    assert {row["dtype"] for row in rows if row["value"] is None} == {"fp32"}


def test_a_slow_device_is_not_driven_beyond_the_budget() -> None:
    sides = []

    def make(side: int, dtype: str) -> measuring.Run:
        sides.append(side)
        return lambda calls: time.sleep(0.05 * calls)

    start = time.perf_counter()
    rows = list(measuring.products(make, {"fp32": 0.0, "tf32": 0.0, "bf16": 3e-3}.__getitem__, budget()))
    assert time.perf_counter() - start < 5
    assert sides == [1024, 1024]  # each precision once: a larger side would not fit
    assert [row["n"] >= 1 for row in rows if row["value"]] == [True, True]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_ceilings_of_this_cpu(framework: str) -> None:
    if framework not in ceilings.frameworks():
        pytest.skip(f"{framework} is not installed")
    start = time.perf_counter()
    rows = ceilings.run_one(framework, devices.cpu())
    assert time.perf_counter() - start < 280
    found = {(row["metric"], row["dtype"]): row for row in rows}
    assert (
        found["copy_bytes_per_s", None]["value"] > 1e8
        or "no room" in found["copy_bytes_per_s", None]["reason"]
    )
    assert found["matmul_flops_per_s", "fp32"]["value"] > 1e9
    assert found["matmul_flops_per_s", "bf16"]["value"] > 1e8
    assert 0.1 < found["launch_latency_us", None]["value"] < 1e4
    assert found["matmul_flops_per_s", "tf32"]["value"] is None  # no CPU that we know does it
