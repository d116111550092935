"""The gate of loaders: at its best point, does every arm deliver the corpus's documents, each once?

1. calibrate   where the suite asks for it: the stack's grid, one option after the other from its default
               point, each tried point one observation on a short text; the fastest of each is kept
2. parity      a small text that is hard on loaders: multiset of the hashes of every document's ids, shape,
               dtype, padding; the order where the manifest promises the corpus's
3. prepare     where a loader keeps something between runs: built once, timed apart
A timed observation is judged again by the number of its tokens and their sum (`load_kit.problem`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plan as planning
from bench import protocol, verify_load
from bench.run import observe
from bench.run.gate import tell
from bench.run.observe import Context, Request
from bench.run.rounds import TOLD, cache_directory

Options = dict[str, Any]
SLACK = 1.5  # the CPU time of a pass holds the start of processes, which a rate leaves out


@dataclasses.dataclass(kw_only=True)
class Gate:
    """The state of one group's gate while it runs."""

    context: Context
    group: str
    cases: list[planning.Case]
    status: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    options: dict[str, Options] = dataclasses.field(default_factory=dict)
    tried: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def alive(self) -> list[planning.Case]:
        return [c for c in self.cases if self.status.get(c.case_id, ("ok", ""))[0] == "ok"]

    def observe(self, case: planning.Case, kind: str, role: str, options: Options) -> dict[str, Any]:
        tell({"event": "start", "case_id": case.case_id, "gate": role})
        row = observe.observe(
            self.context,
            Request(
                case=case, kind=kind, cache=cache_directory(self.context, case, 0), cache_state="cold",
                options=options, role=role, parity={} if kind == "parity" else None,
            ),
        )  # fmt: skip
        tell({"event": "end", **{k: row[k] for k in TOLD}})
        return row

    def messages(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        path = self.context.out / "artifacts" / row["run_id"] / "messages.jsonl"
        for line in path.read_text().splitlines():
            yield json.loads(line)


def run_gate(out: Path, group: str) -> dict[str, Any]:
    """Runs and judges the gate of a group; writes `gates/<session>.<group>.json` and returns it."""
    context = Context.open(out)
    gate = Gate(context=context, group=group, cases=context.plan.groups[group])
    for case in gate.cases:
        observe.remove_tree(cache_directory(context, case, 0))
        calibrate(gate, case)
        judge(gate, case)
    result = {
        "schema_version": planning.SCHEMA_VERSION, "session": context.session["session"], "group": group,
        "steps_per_value": 1, "options": gate.options, "tried": gate.tried, "rows": gate.rows,
        "cases": {i: {"status": s, "reason": r} for i, (s, r) in sorted(gate.status.items())},
    }  # fmt: skip
    path = out / "gates" / f"{context.session['session']}.{group}.json"
    path.parent.mkdir(exist_ok=True)
    planning.write_atomic(path, json.dumps(result))
    return result


# -------------------------------------------------------------------------------------------------- calibrate
def calibrate(gate: Gate, case: planning.Case) -> None:
    """The case's options: its own, or the best point of the grid that was found."""
    best = dict(case.options)
    if case.grid:
        speeds: dict[str, float | None] = {}
        complete = {name: best.get(name, values[0]) for name, values in case.grid.items()}
        best = search(case.grid, complete, lambda point: speed(gate, case, point, speeds))
        if not any(speeds.values()):
            gate.status[case.case_id] = (protocol.STATUS_FAILED, "no point of its grid could be calibrated")
    gate.options[case.case_id] = best


def search(grid: Mapping[str, list[Any]], start: Options, speed: Any) -> Options:
    """Coordinate by coordinate from `start`, keeping the fastest: as many points as the grid has values, not
    their product. A point that fails (None) is not kept."""
    best, fastest = dict(start), speed(start)
    for name, values in grid.items():
        for value in values:
            if value == best[name]:
                continue
            point = {**best, name: value}
            found = speed(point)
            if found is not None and (fastest is None or found > fastest):
                best, fastest = point, found
    return best


def speed(gate: Gate, case: planning.Case, point: Options, seen: dict[str, float | None]) -> float | None:
    """Tokens a second of one observation at a point; None where it failed."""
    key = json.dumps(point, sort_keys=True)
    if key not in seen:
        words = ", ".join(f"{name} {value}" for name, value in point.items())
        row = gate.observe(case, "calibration", f"calibration: {words}", point)
        seen[key] = None
        if row["status"] == protocol.STATUS_OK:
            seen[key] = believable(list(gate.messages(row)), int(case.axes["cores"]))
        gate.tried.append({"case_id": case.case_id, "options": point, "tokens_per_s": seen[key],
                           "run_id": row["run_id"], "reason": row["reason"]})  # fmt: skip
        tell({"event": "note", "text": f"{case.arm}: {words}: {told(seen[key])}"})
    return seen[key]


def believable(messages: Sequence[Mapping[str, Any]], cores: int) -> float | None:
    """Tokens a second after the first batch, but no more than the CPU time of the pass allows on the cores:
    a point that does much of its work before the first batch is not preferred for that."""
    rate, cpu_s = metric(messages, "tokens_per_s"), metric(messages, "cpu_s_per_mtok")
    return min(rate, SLACK * cores * 1e6 / cpu_s) if rate and cpu_s else rate


def told(tokens_per_s: float | None) -> str:
    return "failed" if tokens_per_s is None else f"{tokens_per_s / 1e6:.2f} Mtok/s"


def metric(messages: Sequence[Mapping[str, Any]], name: str) -> float | None:
    found = [m["value"] for m in messages if m["type"] == "metric" and m["metric"] == name]
    return float(found[-1]) if found and found[-1] is not None else None


# ------------------------------------------------------------------------------------------------------ judge
def judge(gate: Gate, case: planning.Case) -> None:
    """Parity at the options in force, then what the loader keeps."""
    if case not in gate.alive():
        return
    options = gate.options[case.case_id]
    row = gate.observe(case, "parity", "parity", options)
    if row["status"] != protocol.STATUS_OK:
        gate.status[case.case_id] = (row["status"], row["reason"])
        return
    facts: dict[str, str] = {}
    for message in gate.messages(row):
        if message["type"] == "manifest":
            facts.update({str(k): str(v) for k, v in message["facts"].items()})
    text = gate.context.session["inputs"][gate.group]["texts"]["gate"]
    try:
        got, seen = verify_load.read(gate.context.out / "artifacts" / row["run_id"])
        want = verify_load.hashes(gate.context.out / "inputs" / text["hashes"])
    except ValueError as error:
        reason = gate.context.scrubber.text(str(error))
        gate.status[case.case_id] = (protocol.STATUS_NOT_COMPARABLE, reason)
        return
    rows = verify_load.judge(got, seen, want, text["expected"], facts.get("order", ""))
    gate.status[case.case_id] = verify_load.verdict(rows)
    gate.rows += [
        {"case_id": case.case_id, "against": "Hugging Face tokenizers", **dataclasses.asdict(r)} for r in rows
    ]
    if case in gate.alive() and facts.get("keeps") == "yes":
        observe.remove_tree(cache_directory(gate.context, case, 0))  # of the gate's own small text
        kept = gate.observe(case, "prepare", "prepare", options)
        if kept["status"] != protocol.STATUS_OK:
            gate.status[case.case_id] = (kept["status"], kept["reason"])
