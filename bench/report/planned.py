"""`stackbench plan`: what would run, why not, how long, how much memory, at what cost. Nothing is run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from bench import plan as planning
from bench.report import words
from bench.report.words import plain

if TYPE_CHECKING:
    from rich.console import Console

    from bench.report.terminal import Printer

History = Mapping[str, Mapping[str, float]]
PEAK_DTYPE: Final = {"bf16-pure": "bf16"}  # precision -> dtype of a datasheet's peak, where the two differ
MEMORY_OF: Final = {"cpu": "pss_bytes", "cuda": "peak_allocated_bytes"}  # what earlier runs measured


def show(plan: planning.Plan, *, price_per_hour: float | None, as_json: bool) -> int:
    """Prints the plan for a terminal, or as one JSON document. Returns the exit code, always 0."""
    from bench.run import execute

    found = document(plan, execute.history(plan.device), price_per_hour)
    if as_json:
        print(json.dumps(found))
        return 0
    from rich.console import Console

    print_plan(found, Console(highlight=False, markup=False, emoji=False))
    return 0


# ------------------------------------------------------------------------------------------------ the facts
def document(plan: planning.Plan, history: History, price_per_hour: float | None) -> dict[str, Any]:
    """The plan as JSON. Keys are added over time, never renamed; unknown is null."""
    price = plan.suite["price_per_hour"] if price_per_hour is None else price_per_hour
    cases = [case_document(case, plan, history) for case in plan.cases]
    return {
        "schema_version": planning.SCHEMA_VERSION, "command": "plan", "suite": plan.suite["name"],
        "description": plan.suite["description"], "device": device_document(plan), "cases": cases,
        "totals": totals_document(plan, cases, history, price),
    }  # fmt: skip


def device_document(plan: planning.Plan) -> dict[str, Any]:
    device = plan.device
    precisions = {str(case.axes["precision"]) for case in plan.cases if "precision" in case.axes}
    dtypes = {PEAK_DTYPE.get(p, p) for p in precisions}
    return {
        "name": device["name"], "kind": device["kind"], "memory_bytes": device["memory_bytes"],
        "cpus": device["cpus"], "here": device["kind"] == "cpu" or device["uuid"] is not None,
        "peak_flops": {dtype: device["peak_flops"].get(dtype) for dtype in sorted(dtypes)},
    }  # fmt: skip


def case_document(case: planning.Case, plan: planning.Plan, history: History) -> dict[str, Any]:
    one = planning.estimate(case, plan, history)
    measured, predicted = history.get(case.case_id, {}).get("memory_bytes"), case.memory_predicted_bytes
    keys = ("case_id", "group", "workload", "arm", "stack", "variant", "options", "axes", "tokens_per_step",
            "flops_per_step", "memory_lower_bound_bytes", "memory_predicted_bytes")  # fmt: skip
    return {
        **{key: getattr(case, key) for key in keys},
        "status": "planned" if case.skip is None else "skipped", "reason": case.skip,
        "memory_measured_bytes": measured, "memory_measured_as": MEMORY_OF[plan.device["kind"]],
        "memory_past_error": measured / predicted - 1 if measured is not None and predicted else None,
        **dataclasses.asdict(one),
    }  # fmt: skip


def totals_document(
    plan: planning.Plan, cases: list[dict[str, Any]], history: History, price: float | None
) -> dict[str, Any]:
    rounds = 0 if plan.suite["caches"] == "cold" else int(plan.suite["rounds"])
    runnable = [case for case in cases if case["status"] == "planned"]
    expected = planning.total_seconds(plan, rounds, history)
    return {
        "cases": len(runnable), "skipped": len(cases) - len(runnable), "groups": len(plan.groups),
        "rounds": rounds, "observations": rounds * len(runnable), "gates": len(plan.groups),
        "from_earlier_runs": sum(case["source"] == "earlier runs" for case in runnable),
        "expected_s": expected, "price_per_hour": price,
        "cost": None if price is None else expected / 3600 * price,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------- the terminal
def print_plan(found: Mapping[str, Any], console: Console) -> None:
    from bench.report.terminal import Printer

    out = Printer(console)
    header(out, found)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in found["cases"]:
        heading = f"{plain(case['workload'], 80)}: {words.conditions(case['axes'])}"
        groups.setdefault((case["group"], heading), []).append(case)
    for (_, heading), cases in groups.items():
        out.heading(heading)
        for case in cases:
            entry(out, case, found["device"]["kind"])
    totals(out, found["totals"])


def header(out: Printer, found: Mapping[str, Any]) -> None:
    description = f": {plain(found['description'])}" if found["description"] else ""
    out.line(f"{plain(found['suite'], 60)}{description}", style="bold", hang=2)
    device = found["device"]
    peaks = [
        f"{dtype} peak {'unknown' if flops is None else f'{words.short(flops)}FLOP/s'}"
        for dtype, flops in device["peak_flops"].items()
    ]
    memory = device["memory_bytes"]
    facts = ["memory unknown" if memory is None else words.bytes_(memory), *peaks]
    facts = [words.plural(device["cpus"], "CPU"), *facts] if device["cpus"] else facts
    out.line(f"on {plain(device['name'], 80)} ({', '.join(facts)})", hang=2)
    if not device["here"]:
        out.line("This device is not here: planned from bench/devices.toml, and what is installed is not "
                 "checked", style="yellow", hang=2)  # fmt: skip


def entry(out: Printer, case: Mapping[str, Any], kind: str) -> None:
    """The id on a line of its own, never broken: it can be copied into `--cases`."""
    out.console.print(f"  {case['case_id']}", no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)
    if case["reason"] is not None:
        out.line(f"{plain(case['arm'], 60)}: skipped: {plain(case['reason'])}", style="yellow", indent=4)
        return
    source = "earlier runs" if case["source"] == "earlier runs" else "estimate"
    out.line(f"{plain(case['arm'], 60)}: {words.seconds(case['observation_s'])} an observation ({source})",
             indent=4)  # fmt: skip
    if shown := memory(case, kind):
        out.line(shown, indent=4)


def memory(case: Mapping[str, Any], kind: str) -> str:
    """What it needs, as modelled, and what an earlier run used; nothing where nothing is known."""
    if case["memory_predicted_bytes"] is None:
        used = case["memory_measured_bytes"]
        return "" if used is None else f"memory: an earlier run's whole tree {words.bytes_(used)}"
    bound, predicted = (words.bytes_(case[f"memory_{k}_bytes"]) for k in ("lower_bound", "predicted"))
    if case["memory_measured_bytes"] is None:
        past = "no earlier run"
    else:
        what = "whole process" if kind == "cpu" else "peak"
        ratio = words.number(case["memory_past_error"] + 1, 2)
        past = f"an earlier run's {what}: {words.bytes_(case['memory_measured_bytes'])}, {ratio} × this"
    return f"memory ≥ {bound}, predicted {predicted} ({past})"


def totals(out: Printer, found: Mapping[str, Any]) -> None:
    out.heading(f"{words.plural(found['cases'], 'case')} to run, {found['skipped']} skipped")
    work = [words.plural(found["gates"], "parity gate"), words.plural(found["rounds"], "round")]
    out.line(", ".join([*work, words.plural(found["observations"], "timed observation")]), indent=2)
    known = f"{found['from_earlier_runs']} of {found['cases']} cases timed by earlier runs"
    out.line(f"expected time {clock(found['expected_s'])} (hours:minutes; {known})", indent=2, hang=2)
    if found["cost"] is None:
        out.line("cost: give --price-per-hour", style="dim", indent=2)
    else:
        out.line(f"cost {words.number(found['cost'], 3)} at {found['price_per_hour']:g} an hour", indent=2)


def clock(seconds: float) -> str:
    """`0:09`: hours and minutes, the started minute counted."""
    minutes = int(-(-seconds // 60))
    return f"{minutes // 60}:{minutes % 60:02d}"
