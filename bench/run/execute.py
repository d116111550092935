"""Running a plan: from the command line's words to a results directory."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench import plan as planning
from bench import registry
from bench.errors import UserError


def cache_dir() -> Path:
    """Of tokenizers, batches and the history of run times: `.cache/` in a checkout, else the user's."""
    chosen = os.environ.get("STACKBENCH_CACHE")
    if chosen:
        return Path(chosen)
    if (registry.ROOT / ".git").exists() or (registry.ROOT / "Makefile").exists():
        return registry.ROOT / ".cache" / "stackbench"
    return Path.home() / ".cache" / "stackbench"


def seconds(text: str) -> float:
    """`90`, `90s`, `9m`, `1.5h` as seconds. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not match:
        valid = ["90s", "9m", "1.5h"]
        message = f"--time-budget {text!r} is no duration"
        raise UserError(message, valid=valid, next_command="--time-budget 9m")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def plan_for(
    name: str, *, cases: str, settings: Iterable[str], paths: Iterable[Path], device: str | None = None
) -> planning.Plan:
    """The plan of a suite for the device here, or for one by name. Raises UserError."""
    from bench import devices
    from bench import suite as suites

    suite, axes = suites.load(name, settings=settings, paths=paths)
    if device is not None:
        target = devices.known(device) if device != "cpu" else devices.cpu()
        return planning.make(suite, target, overrides=axes, cases=cases, check_installed=False)
    found = devices.detect()
    target = found[0] if suite.device == "auto" else devices.here(suite.device)
    return planning.make(suite, target, overrides=axes, cases=cases)


# ------------------------------------------------------------------------------------------- the history
MEMORY_METRICS = {"cpu": "pss_bytes", "cuda": "peak_allocated_bytes"}  # by device kind


def histories() -> dict[str, dict[str, dict[str, float]]]:
    """By device name, then case id (which knows no device): what earlier runs on this machine took."""
    try:
        table = json.loads((cache_dir() / "history.json").read_text())
        return {d: {i: dict(row) for i, row in cases.items()} for d, cases in table.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def history(device: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds and bytes of earlier observations and gates on this device by case id; empty if none."""
    return histories().get(device["name"], {})


def remember(out: Path, known: dict[str, dict[str, float]], device: Mapping[str, Any]) -> None:
    """Adds this run's times and memory to the history; losing it costs an estimate, never a result."""
    import statistics

    from bench.run import rounds

    timed: dict[str, list[float]] = {}
    gates: dict[str, float] = {}
    peaks: dict[str, float] = {}
    for row in rounds.read_rows(out):
        if row["status"] != "ok" or not row["wall_s"]:
            continue
        if row["kind"] == "timed":
            timed.setdefault(row["case_id"], []).append(row["wall_s"])
            peak = measured_memory(out / "artifacts" / row["run_id"], MEMORY_METRICS[device["kind"]])
            peaks[row["case_id"]] = max(peaks.get(row["case_id"], 0.0), peak)
        else:
            gates[row["case_id"]] = gates.get(row["case_id"], 0.0) + row["wall_s"]
    for case_id, values in timed.items():
        known[case_id] = {"observation_s": statistics.median(values), "gate_s": gates.get(case_id, 0.0)}
        if peaks[case_id]:
            known[case_id]["memory_bytes"] = peaks[case_id]
    cache_dir().mkdir(parents=True, exist_ok=True)
    table = {**histories(), device["name"]: known}
    planning.write_atomic(cache_dir() / "history.json", json.dumps(table))


def measured_memory(artifact: Path, metric: str) -> float:
    """The largest value of a memory metric that an observation reported; 0 where it reported none."""
    try:
        lines = (artifact / "messages.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines if metric in line]
    except (OSError, ValueError):
        return 0.0
    values = [float(row["value"]) for row in rows if row.get("metric") == metric and row["value"]]
    return max(values, default=0.0)


# --------------------------------------------------------------------------------------------- execution
def execute(
    plan: planning.Plan, out: Path, *, resume: bool, time_budget_s: float | None, as_json: bool
) -> int:
    """Runs the plan into `out` and says how it ended. Returns the exit code (design.md)."""
    from bench.run import local, progress

    known = history(plan.device)
    announce(plan, known, quiet=as_json)
    if not plan.groups:
        again = f"stackbench plan {plan.suite['name']}"
        print(f"stackbench: every case is skipped; see: {again}", file=sys.stderr)
        return 4
    fresh = not (out / "plan.json").exists()
    try:
        plan = local.begin(plan, out, resume=resume)
    except OSError as error:
        raise UserError(
            f"--out {out}: {error.strerror}", next_command=f"stackbench run {plan.suite['name']} --out DIR"
        ) from None
    bar = progress.Progress(known, quiet=as_json)
    with local.locked(out), local.terminable():
        start = time.time()
        try:
            result = local.run(plan, out, time_budget_s=time_budget_s, progress=bar, cache_dir=cache_dir())
        except UserError:
            forget(out, fresh)
            raise
        finally:
            bar.end()
        try:
            write_wall(out, result, start)
            remember(out, known, plan.device)
        except OSError as error:  # what was measured is on disk already
            print(f"stackbench: the run's own times could not be kept: {error.strerror}", file=sys.stderr)
    return conclude(plan, out, result, as_json=as_json)


def forget(out: Path, fresh: bool) -> None:
    """Input was refused before anything ran: a directory that this run began is as it was before."""
    if fresh and not (out / "artifacts").exists():
        shutil.rmtree(out, ignore_errors=True)


def announce(plan: planning.Plan, known: dict[str, dict[str, float]], *, quiet: bool) -> None:
    if quiet:
        return
    rounds = plan.suite["rounds"] if plan.suite["caches"] != "cold" else 0
    total = planning.total_seconds(plan, rounds, known)
    runnable = sum(map(len, plan.groups.values()))
    print(
        f"{plan.suite['name']}: {runnable} cases, {rounds} rounds on {plan.device['name']}, "
        f"about {max(1, round(total / 60))} min",
        file=sys.stderr,
    )
    for case in plan.cases:
        if case.skip:
            print(f"skipped: {case.case_id}: {case.skip}", file=sys.stderr)


def write_wall(out: Path, result: Any, start: float) -> None:
    """How long each invocation took and where: appended, for the report."""
    path = out / "wall.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    rows.append(
        {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)), "wall_s": result.wall_s,
            "workers_s": result.workers_s, "preparation_s": result.preparation_s,
            "harness_share": result.harness_share, "status": result.status,
        }
    )  # fmt: skip
    planning.write_atomic(path, json.dumps(rows))


def conclude(plan: planning.Plan, out: Path, result: Any, *, as_json: bool) -> int:
    """The last words of a run, and its exit code."""
    from bench.run import rounds

    rows = list(rounds.read_rows(out))
    timed = [r for r in rows if r["kind"] == "timed" and r["status"] == "ok"]
    bad = failures(out, plan, rows)
    cold = plan.suite["caches"] == "cold"
    measured = bool(timed) or (cold and any(r["kind"] == "parity" and r["status"] == "ok" for r in rows))
    code = 4 if not measured else 1 if bad or result.status.startswith(("disk", "crash")) else 0
    if result.status == "interrupted":
        code = 130
    summary = {
        "out": str(out), "status": result.status, "timed_observations": len(timed), "failures": bad,
        "wall_s": result.wall_s, "workers_s": result.workers_s, "preparation_s": result.preparation_s,
        "harness_share": result.harness_share, "exit_code": code,
    }  # fmt: skip
    if as_json:
        print(json.dumps(summary))
        return code
    for case_id, reason in bad.items():
        print(f"not timed: {case_id}: {reason}", file=sys.stderr)
    print(
        f"{result.status}: {len(timed)} timed observations in {result.wall_s:.0f} s; workers "
        f"{result.workers_s / result.wall_s:.1%}, "
        f"input preparation {result.preparation_s / result.wall_s:.1%}, "
        f"harness {result.harness_share:.1%}",
        file=sys.stderr,
    )
    if result.status != "complete":
        print(f"next: stackbench run {plan.suite['name']} --out {out} --resume", file=sys.stderr)
    if not measured:
        print("stackbench: nothing was measured", file=sys.stderr)
    return code


def failures(out: Path, plan: planning.Plan, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Cases that the gate refused or that failed while timed, with the reason. Skips are no failures, and
    neither is an unsteady observation whose round was repeated."""
    from bench.run import rounds

    bad: dict[str, str] = {}
    for path in sorted((out / "gates").glob("*.json")):
        for case_id, row in json.loads(path.read_text())["cases"].items():
            if row["status"] in ("failed", "not comparable"):
                bad[case_id] = f"{row['status']}: {row['reason']}"
    replaced = rounds.superseded(rows)
    for row in rows:
        if row["run_id"] in replaced or row["reason"] == "interrupted":
            continue
        if row["kind"] == "timed" and row["status"] == "failed":
            bad.setdefault(row["case_id"], row["reason"])
    return bad


def show_status(directory: Path, *, as_json: bool) -> int:
    """`stackbench status DIR`: finished and remaining rounds by group."""
    from bench.run import local

    try:
        plan = planning.from_json(json.loads((directory / "plan.json").read_text()))
        session = json.loads((directory / "session.json").read_text())["session"]
        done, _ = local.completed_rounds(plan, directory, session)
        rounds = plan.suite["rounds"] if plan.suite["caches"] != "cold" else 0
        table = {
            group: {
                "gate": (directory / "gates" / f"{session}.{group}.json").exists(),
                "rounds": sum(1 for g, _ in done if g == group),
                "planned": rounds,
            }
            for group in plan.groups
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{directory} is no results directory: plan.json or session.json cannot be read: {reason}",
            next_command="stackbench run quick --out DIR",
        ) from None
    if as_json:
        print(json.dumps({"session": session, "groups": table}))
        return 0
    for group, row in table.items():
        gate = "gate done" if row["gate"] else "gate to do"
        print(f"{group}: {gate}, {row['rounds']} of {row['planned']} rounds")
    return 0
