"""Measured limits beside the datasheet's: `bench/capture/ceilings_*.py`, each run in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.devices import Device
from bench.run import environment

_ROOT: Final = Path(__file__).resolve().parents[1]
_PREFIX: Final = "ceilings_"
COLUMNS: Final = ("device_uuid", "metric", "dtype", "size", "value", "unit", "stack")


def frameworks() -> dict[str, str]:
    """The frameworks that can measure ceilings and are installed, with their versions; none is imported."""
    found = {}
    for file in sorted((_ROOT / "bench/capture").glob(f"{_PREFIX}*.py")):
        name = file.stem.removeprefix(_PREFIX)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def measure(found: Sequence[Device], timeout_s: float = 180.0) -> list[dict[str, Any]]:
    """Rows of every installed framework on every device, one process after the other."""
    return [
        {"device": device.id, "device_uuid": device.uuid, **row}
        for device in found
        for framework in frameworks()
        for row in run_one(framework, device, timeout_s)
    ]


def run_one(framework: str, device: Device, timeout_s: float = 180.0) -> list[dict[str, Any]]:
    """One framework on one device. A failure is a row with its reason."""
    threads = environment.thread_count(environment.cpu_list("device", device))
    command = [sys.executable, "-m", f"bench.capture.{_PREFIX}{framework}"]
    command += ["--device", device.id, "--threads", str(threads)]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
        "JAX_PLATFORMS": device.kind,
        "OMP_NUM_THREADS": str(threads),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        cwd=_ROOT,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return [_failed(framework, f"no answer in {timeout_s:g} s")]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if process.returncode != 0:
        last = (err.strip().splitlines() or ["no message"])[-1]
        return [_failed(framework, f"exit {process.returncode}: {last}")]
    return [json.loads(line) for line in out.splitlines()]


def _failed(framework: str, reason: str) -> dict[str, Any]:
    row = dict.fromkeys(("value", "unit", "dtype", "size"))
    return {"metric": "failed", "stack": framework, "reason": reason, **row}


def datasheet(row: Mapping[str, Any], device: Device) -> float | None:
    """The datasheet's figure for a measured ceiling; None where devices.toml has none."""
    if row["metric"] == "copy_bytes_per_s":
        return device.hbm_bytes_per_s
    if row["metric"] == "matmul_flops_per_s":
        return device.peak_flops.get(str(row["dtype"]))
    return None


def highest(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each device, metric, precision and stack the best size; a null only where every size is null."""

    def better(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
        if new["value"] is None or old["value"] is None:
            return new["value"] is not None
        smaller = str(new["metric"]).startswith("launch_")
        return bool(new["value"] < old["value"] if smaller else new["value"] > old["value"])

    kept: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        key = (row["device"], row["metric"], row["dtype"], row["stack"])
        if key not in kept or better(row, kept[key]):
            kept[key] = row
    return list(kept.values())


def table_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the `ceilings` table."""
    return [{name: row[name] for name in COLUMNS} for row in rows if row["metric"] != "failed"]
