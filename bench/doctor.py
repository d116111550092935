"""`stackbench doctor`: what is here, what would disturb a measurement, what the device can reach at all."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench import ceilings as limits
from bench import checks, devices
from bench.checks import Finding
from bench.devices import Device
from bench.run import environment

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

REPOSITORY: Final = Path(__file__).resolve().parents[1]
_PACKAGES: Final = ("torch", "triton", "jax", "jaxlib", "numpy", "pyperf", "nvidia-ml-py")
_MARKS: Final = {checks.WARNING: ("!", "bold yellow"), checks.NOTE: ("·", "cyan"), checks.OK: ("✓", "green")}
_LABELS: Final = {
    "copy_bytes_per_s": "copy",
    "matmul_flops_per_s": "matmul",
    "launch_latency_us": "launch",
    "launch_roundtrip_us": "launch+wait",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything the doctor found. `ceilings` is None where they were not asked for."""

    made_at: str
    fingerprint: dict[str, Any]
    devices: list[Device]
    packages: dict[str, str | None]
    findings: list[Finding]
    ceilings: list[dict[str, Any]] | None = None

    def as_json(self) -> dict[str, Any]:
        """The report as JSON-able data, without paths, user or host names."""
        data = dataclasses.asdict(self)
        for row, device in zip(data["devices"], self.devices, strict=True):
            row["id"] = device.id
        return dict(environment.scrub_values(data, REPOSITORY))


def packages() -> dict[str, str | None]:
    """Installed versions of the stacks' packages (nothing is imported); None where one is missing."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def diagnose(*, ceilings: bool = False, out: Path | None = None) -> Report:
    """Looks at this machine; with `ceilings` also measures it (about 10 s a stack and device)."""
    found = devices.detect()
    locks = sorted((REPOSITORY / "locks").glob("*.txt"))
    fingerprint = environment.fingerprint(None, {}, locks, REPOSITORY)
    directories = {"results": out or Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    findings = checks.all_findings(fingerprint, found, directories)
    return Report(
        made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        fingerprint=fingerprint,
        devices=found,
        packages=packages(),
        findings=findings,
        ceilings=limits.measure(found) if ceilings else None,
    )


def to_rows(report: Report) -> list[dict[str, Any]]:
    """The rows of the `ceilings` table: device_uuid, metric, dtype, size, value, unit, stack."""
    return limits.table_rows(report.ceilings or [])


def render(report: Report, console: Console) -> None:
    """Prints the report; fits 80 columns."""
    console.print(_machine(report))
    console.print(_devices(report))
    for line in _findings(report):
        console.print(line)
    if report.ceilings is not None:
        console.print()
        console.print(_ceilings(report))
        for row in report.ceilings:
            if row["value"] is None:
                name = " ".join(filter(None, (row["stack"], row["dtype"], _LABELS.get(row["metric"], ""))))
                console.print(f"  {row['device']} {name}: {row['reason']}", style="yellow", markup=False)


def _machine(report: Report) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    found = report.fingerprint
    commit = (found["git_sha"] or "no commit")[:12] + (" + changes" if found["git_dirty"] else "")
    lock = {True: "agree with the lock", False: "differ from the lock", None: "not in a lock"}
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in report.packages.items())
    flags = " ".join(f"{name}={value}" for name, value in found["flags"].items())
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "environment": f"{found['env_id']}  ({commit})",
        "python": f"{found['implementation']} {found['python']}, packages {lock[found['agrees_with_lock']]}",
        "packages": versions,
        "flags": flags or "none set",
        "kernel": f"{found['kernel']}  {' '.join(found['virtualisation'])}",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _number(value: float | None, unit: str = "") -> str:
    """Three digits with a decimal prefix; a dash for what is unknown."""
    if value is None:
        return "–"
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def _devices(report: Report) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for name in ("device", "", "memory", "bandwidth*", "bf16 peak*", "driver"):
        table.add_column(name, justify="left" if name in ("device", "") else "right", overflow="fold")
    for device in report.devices:
        cpus = f" ({device.cpus} threads)" if device.cpus else ""
        table.add_row(
            device.id,
            f"{device.name}{cpus}",
            _number(device.memory_bytes, "B"),
            _number(device.hbm_bytes_per_s, "B/s"),
            _number(device.peak_flops.get("bf16"), "FLOP/s"),
            str(report.fingerprint["driver"] or "–") if device.kind == "cuda" else "",
        )
    table.caption = "* datasheet, dense (bench/devices.toml); – unknown"
    table.caption_justify = "left"
    return table


def _findings(report: Report) -> Iterator[RenderableType]:
    from rich.padding import Padding
    from rich.text import Text

    good = [finding for finding in report.findings if finding.level == checks.OK]
    for finding in report.findings:
        if finding.level == checks.OK:
            continue
        mark, style = _MARKS[finding.level]
        yield Text.assemble((f"{mark} ", style), (finding.what, "bold"))
        rest = f"{finding.why}{'; ' if finding.why and finding.do else ''}"
        if rest or finding.do:
            yield Padding(Text.assemble(rest, (finding.do, "italic")), (0, 0, 0, 4))
    mark, style = _MARKS[checks.OK]
    yield Text.assemble((f"{mark} ", style), "; ".join(finding.what for finding in good))


def _spread(spread: float) -> str:
    """(highest - lowest) / median of the values; loud where the best of them says little."""
    return f"[yellow]{spread:.0%}[/]" if spread > 0.2 else f"{spread:.0%}"


def _ceilings(report: Report) -> RenderableType:
    from rich import box
    from rich.table import Table

    by_id = {device.id: device for device in report.devices}
    table = Table(
        title="Ceilings: the best size of each", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.title_justify = "left"
    for name in ("device", "limit", "stack", "size", "measured", "±", "datasheet", "share"):
        table.add_column(
            name, justify="left" if name in ("device", "limit", "stack") else "right", no_wrap=True
        )
    table.caption = "±: spread of the values · copy: read + written · launch: enqueued, or waited for"
    table.caption_justify = "left"
    for row in limits.highest(report.ceilings or []):
        if row["value"] is None:
            continue
        peak = limits.datasheet(row, by_id[row["device"]])
        unit, copied = row["unit"], row["metric"] == "copy_bytes_per_s"
        size = "" if row["size"] is None else _number(row["size"], "B") if copied else f"{row['size']}³"
        table.add_row(
            row["device"],
            " ".join(filter(None, (_LABELS.get(row["metric"], row["metric"]), row["dtype"]))),
            row["stack"],
            size,
            _number(row["value"], unit),
            _spread(row["spread"]),
            _number(peak, unit),
            "–" if peak is None else f"{row['value'] / peak:.0%}",
        )
    return table


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all: a temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump(data, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def run_doctor(ceilings: bool, out: Path | None, as_json: bool) -> int:
    """`stackbench doctor`. 0; with `ceilings` 1 if a stack failed and 4 if nothing at all was measured."""
    report = diagnose(ceilings=ceilings, out=out)
    data = report.as_json()
    if out is not None:
        _write(out / "doctor.json", data)
    if as_json:
        sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
    else:
        from rich.console import Console

        render(report, Console())
    if not ceilings:
        return 0
    rows = report.ceilings or []
    if all(row["value"] is None for row in rows):
        return 4
    return 1 if any(row["metric"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="stackbench doctor", description=__doc__)
    parser.add_argument("--ceilings", action="store_true", help="measure copy, matmul and launch limits")
    parser.add_argument("--out", type=Path, help="write doctor.json here")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    sys.exit(run_doctor(chosen.ceilings, chosen.out, chosen.json))
