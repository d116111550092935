"""A results directory's raw files -> rows of every table, in plain Python; `bench.store` makes frames of it.

What cannot be read becomes a row of `problems`, and for an observation a failed row of `runs` with a reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bench import artifacts, plan, protocol, schema
from bench.artifacts import Problem, compact, flag, integer, real, rows, table, text
from bench.errors import UserError
from bench.run import rounds

UNKNOWN: Final = "unknown"  # session of what could not be read
Row = dict[str, Any]


@dataclasses.dataclass(kw_only=True)
class Draft:
    """Rows of all tables while a directory is read."""

    directory: Path
    plan: plan.Plan
    rows: dict[str, list[Row]] = dataclasses.field(default_factory=lambda: {n: [] for n in schema.TABLES})
    facts: dict[tuple[str, str, str], set[str]] = dataclasses.field(default_factory=dict)
    libraries: dict[tuple[str, str], dict[str, str]] = dataclasses.field(default_factory=dict)
    gates: dict[tuple[str, str], dict[str, tuple[str, str]]] = dataclasses.field(default_factory=dict)

    def add(self, name: str, row: Row) -> None:
        self.rows[name].append(row)

    def problem(self, session: str, place: str, problem: str) -> None:
        self.add("problems", {"session": session, "place": place, "problem": problem})


def collect(directory: Path) -> Draft:
    """Reads everything in a results directory. Raises UserError if it is none."""
    draft = Draft(directory=directory, plan=read_plan(directory))
    read_gates(draft)
    read_observations(draft)
    mark_complete(draft)
    read_sessions(draft)
    read_ceilings(draft)
    for (session, case_id, key), values in sorted(draft.facts.items()):
        value = " | ".join(sorted(values))
        draft.add("manifest", {"case_id": case_id, "session": session, "key": key, "value": value})
    return draft


def read_plan(directory: Path) -> plan.Plan:
    """plan.json. Raises UserError naming the file and the problem."""
    next_command = "stackbench run quick --out DIR"
    path = directory / "plan.json"
    if not path.exists():
        what = "does not exist" if not directory.exists() else "holds no plan.json"
        raise UserError(
            f"{directory} is no results directory: it {what}",
            valid=candidates(directory),
            next_command=next_command,
        )
    try:
        if artifacts.irregular(path):
            raise Problem("is no regular file")
        found = plan.from_json(artifacts.read_json(path, artifacts.LIMITS["plan.json"]))
        check_plan(found)
    except Problem as problem:
        raise UserError(f"{path} {problem}", next_command=next_command) from None
    except (KeyError, TypeError, AttributeError) as error:
        message = f"{path} is no plan of schema version {plan.SCHEMA_VERSION}: {error}"
        raise UserError(message, next_command=next_command) from None
    names = ("case_id", "group", "workload", "arm", "stack", "variant")
    changes: list[dict[str, Any]] = [{n: text(getattr(c, n)) for n in names} for c in found.cases]
    clean = [dataclasses.replace(c, **change) for c, change in zip(found.cases, changes, strict=True)]
    return dataclasses.replace(found, cases=tuple(clean))


def check_plan(found: plan.Plan) -> None:
    """Raises Problem where a field that is used here has another type."""
    for name, value in (("suite", found.suite), ("device", found.device), ("measure", found.measure)):
        if not isinstance(value, dict):
            raise Problem(f"is no plan: {name} is {type(value).__name__}, not an object")
    case: Any
    for case in found.cases:
        for name in ("case_id", "group", "workload", "arm", "stack", "variant"):
            if not isinstance(getattr(case, name), str) or not getattr(case, name):
                raise Problem(f"is no plan: {name} of a case is no text")
        if not isinstance(case.skip, str | None) or not isinstance(case.axes, dict):
            raise Problem(f"is no plan: case {case.case_id[:80]!r} has axes or a skip of another type")


def candidates(directory: Path) -> list[str]:
    """Results directories nearby, newest first: what the user may have meant."""
    found: list[Path] = []
    with contextlib.suppress(OSError):
        for place in (directory, directory.parent, Path("results/local")):
            found += [p.parent for p in place.glob("*/plan.json")][:200]
    unique = {str(p): p for p in found}
    return sorted(unique, key=lambda p: (-unique[p].stat().st_mtime, p))[:8]


def read_gates(draft: Draft) -> None:
    """Status of every case that went through a gate, and the rows of `parity`."""
    for path in sorted((draft.directory / "gates").glob("*.json")):
        try:
            if artifacts.irregular(path):
                raise Problem("is no regular file")
            gate = artifacts.read_json(path, artifacts.LIMITS["gate"])
            session, group = text(gate.get("session")), text(gate.get("group"))
            if not session or not group or not artifacts.NAME.fullmatch(session):
                raise Problem("names no session and group")
        except Problem as problem:
            draft.problem(UNKNOWN, f"gates/{path.name}", str(problem))
            continue
        cases = draft.gates.setdefault((session, group), {})
        for case_id, row in table(gate.get("cases")).items():
            status, reason = text(table(row).get("status")), text(table(row).get("reason")) or ""
            if status not in artifacts.STATUSES:
                status, reason = protocol.STATUS_FAILED, "the gate's file has no status for it"
            cases[text(case_id) or ""] = (str(status), reason)
        for row in rows(gate.get("rows")):
            parity = {k: text(row.get(k)) for k in ("case_id", "against", "parameter", "measure", "detail")}
            numbers = {k: real(row.get(k), finite=False) for k in ("error", "tolerance")}
            draft.add("parity", {"session": session, "group": group, **parity, **numbers})


def read_observations(draft: Draft) -> None:
    """Every directory under artifacts/: a row of `runs`, also where it cannot be read."""
    root = draft.directory / "artifacts"
    names = sorted(entry.name for entry in os.scandir(root)) if root.is_dir() else []
    for name in names:
        if name.startswith("."):
            continue  # never finished: it was not put in place
        try:
            row = artifacts.run_row(root / name)
        except Problem as problem:
            reason = f"unreadable artifact: {problem}"
            safe = text(name)
            draft.add("runs", {"run_id": safe, "session": UNKNOWN, "status": "failed", "reason": reason,
                               "schema_version": schema.SCHEMA_VERSION})  # fmt: skip
            draft.problem(UNKNOWN, f"artifacts/{safe}", str(problem))
            continue
        read_messages(draft, root / name, row)
        draft.add("runs", row)
        draft.add("processes", {"run_id": row["run_id"], "rank": 0, "role": "worker",
                                "device_uuid": row["device_uuid"], "exit": row["exit"]})  # fmt: skip


def read_messages(draft: Draft, directory: Path, row: Row) -> None:
    """Values, metrics and facts of one observation. What is malformed in an `ok` one makes it failed."""
    tag = {"run_id": row["run_id"], "rank": 0}
    malformed, timed = "", 0
    try:
        for number, message in artifacts.messages(directory):
            kind = message.get("type") if message else None
            if message is None or kind == "value":
                value = artifacts.value_row(message) if message else None
                if value is None:
                    malformed = malformed or f"messages.jsonl line {number} cannot be read"
                else:
                    draft.add("values", {**tag, **value})
                    timed += not value["is_warmup"]
            elif kind in ("metric", "compiled"):
                for metric in artifacts.metric_rows(message):
                    draft.add("metrics", {**tag, **metric})
            elif kind == "manifest":
                note_facts(draft, row, table(message.get("facts")))
    except Problem as problem:
        malformed = str(problem)
    if row["status"] != protocol.STATUS_OK:
        return
    if malformed:
        row.update(status="failed", reason=f"unreadable artifact: {malformed}")
    elif row["kind"] == "timed" and timed == 0:
        row.update(status="failed", reason="the worker ended well without a timed value")


def note_facts(draft: Draft, row: Row, facts: Mapping[str, Any]) -> None:
    """Facts of the timed work go into the manifest; pyperf's own stay in its file."""
    if row["kind"] != "timed" and row["role"] != "timed shape":
        return
    for key, value in facts.items():
        shown = text(value) if isinstance(value, str) else compact(value)
        if shown is None or key.startswith("pyperf."):
            continue
        name = text(key, 200) or ""
        if name.startswith("library.") and row["env_id"]:
            found = draft.libraries.setdefault((row["session"], row["env_id"]), {})
            found[name.removeprefix("library.")] = shown
        draft.facts.setdefault((row["session"], row["case_id"], name), set()).add(shown)


def mark_complete(draft: Draft) -> None:
    """`complete`: in the round every arm that passed the gate, and was not given up, finished."""
    timed = [row for row in draft.rows["runs"] if row.get("kind") == "timed"]
    planned = {case.case_id for case in draft.plan.cases}
    for row in timed:
        if row["case_id"] not in planned:
            draft.problem(row["session"], f"artifacts/{row['run_id']}", "its case is not in plan.json")
    lost = {s: rounds.given_up(timed, s) for s in {row["session"] for row in timed}}
    replaced = rounds.superseded(timed)
    seen: dict[tuple[str, str | None], set[str]] = {}
    members: dict[tuple[str, str], set[str]] = {}
    for row in timed:
        if row["reason"] != "interrupted":
            seen.setdefault((row["session"], row["round_id"]), set()).add(row["case_id"])
        members.setdefault((row["session"], row["group"]), set()).add(row["case_id"])
    for row in timed:
        session, group = row["session"], row["group"]
        gate = draft.gates.get((session, group))
        passed = {i for i, (status, _) in gate.items() if status == "ok"} if gate else members[session, group]
        wanted = set(passed) - lost[session]
        row["superseded"] = row["run_id"] in replaced
        row["complete"] = bool(row["round_id"]) and wanted <= seen.get((session, row["round_id"]), set())


# ------------------------------------------------------------------------------- sessions and environments
def read_sessions(draft: Draft) -> None:
    """Rows of `sessions`, `cases` and `environments` from plan.json, environment.json and wall.json."""
    path, found = draft.directory / "environment.json", {}
    try:
        if artifacts.irregular(path):
            raise Problem("is no regular file")
        found = artifacts.read_json(path, artifacts.LIMITS["environment.json"])
    except Problem as problem:
        draft.problem(UNKNOWN, "environment.json", str(problem))
    declared = {name: row for row in rows(found.get("sessions")) if (name := text(row.get("session")))}
    names = {n for n in declared if artifacts.NAME.fullmatch(n)} | {s for s, _ in draft.gates}
    names |= {row["session"] for row in draft.rows["runs"] if row["session"] != UNKNOWN}
    ordered = sorted(names or {UNKNOWN}, key=lambda n: (text(table(declared.get(n)).get("started")) or "", n))
    walls = read_walls(draft)
    for name in ordered:
        raw = table(declared.get(name))
        last = name == ordered[-1]
        draft.add("sessions", session_row(draft, name, raw, walls if last else {}))
        for position, case in enumerate(draft.plan.cases):
            draft.add("cases", case_row(draft, name, position, case))
        for env_id in sorted({e for e in table(raw.get("arms")).values() if isinstance(e, str)}):
            fingerprint = table(table(found.get("environments")).get(env_id))
            draft.add("environments", environment_row(draft, name, env_id, fingerprint))


def read_walls(draft: Draft) -> Row:
    """Sums over the invocations in wall.json; the directory's, shown with its last session."""
    path = draft.directory / "wall.json"
    if not path.exists():
        return {}
    try:
        if artifacts.irregular(path):
            raise Problem("is no regular file")
        found = rows(artifacts.parse(artifacts.read_bytes(path, artifacts.LIMITS["wall.json"])))
    except Problem as problem:
        draft.problem(UNKNOWN, "wall.json", str(problem))
        return {}
    sums = {k: sum(real(r.get(k)) or 0.0 for r in found) for k in ("wall_s", "workers_s", "preparation_s")}
    idle = sum((real(r.get("wall_s")) or 0.0) * (real(r.get("harness_share")) or 0.0) for r in found)
    share = idle / sums["wall_s"] if sums["wall_s"] else None
    return {**sums, "n_invocations": len(found), "harness_share": share}


def session_row(draft: Draft, name: str, raw: Row, walls: Row) -> Row:
    suite, device = draft.plan.suite, draft.plan.device
    inputs = {k: table(v).get("provenance") for k, v in table(raw.get("inputs")).items()}
    cpus = raw.get("cpus")
    return {
        "session": name, "started": text(raw.get("started")), "suite": text(suite.get("name")),
        "seed": integer(suite.get("seed")), "rounds_planned": integer(suite.get("rounds")),
        "cache_draws": integer(suite.get("cache_draws")), "caches": text(suite.get("caches")),
        "device_kind": text(device.get("kind")), "device_name": text(device.get("name")),
        "device_class": "cpu" if device.get("kind") == "cpu" else text(device.get("key")),
        "peak_flops": compact(table(device.get("peak_flops"))),
        "cpus": len(cpus) if isinstance(cpus, list) else None, "threads": integer(raw.get("threads")),
        "inputs": compact(inputs), "price_per_hour": real(suite.get("price_per_hour")),
        "schema_version": schema.SCHEMA_VERSION, **walls,
    }  # fmt: skip


def case_row(draft: Draft, session: str, position: int, case: plan.Case) -> Row:
    """A case of the plan in a session: `planned` is run or skipped, `gate` what the gate said, if it ran."""
    gate, reason = draft.gates.get((session, case.group), {}).get(case.case_id, (None, ""))
    return {
        "session": session, "position": position, "axes": compact(case.axes),
        "options": compact(case.options),
        "precision": text(case.axes.get("precision")), "planned": "run" if case.skip is None else "skipped",
        "gate": gate, "reason": text(case.skip) if case.skip is not None else reason,
        **{k: text(getattr(case, k)) for k in ("case_id", "group", "workload", "stack", "arm", "variant")},
        **{k: integer(getattr(case, k)) for k in ("tokens_per_step", "flops_per_step",
           "flops_per_step_noncausal", "flops_per_step_executed")},
    }  # fmt: skip


def environment_row(draft: Draft, session: str, env_id: str, found: Row) -> Row:
    gpus, affinity, uuids = rows(found.get("gpus")), found.get("cpu_affinity"), found.get("device_uuids")
    uuid = uuids[0] if isinstance(uuids, list) and uuids else None
    return {
        "env_id": text(env_id), "session": session, "python": text(found.get("python")),
        "versions": compact(found.get("versions")),
        "distributions_hash": text(found.get("distributions_hash")),
        "agrees_with_lock": flag(found.get("agrees_with_lock")),
        "libraries": compact(draft.libraries.get((session, env_id), {})), "device_uuid": text(uuid),
        "device_name": text(gpus[0].get("name")) if gpus else None, "driver": text(found.get("driver")),
        "cpu_model": text(found.get("cpu_model")),
        "cpus": len(affinity) if isinstance(affinity, list) else None,
        "memory_bytes": integer(found.get("memory_bytes")), "flags": compact(found.get("flags")),
        "git_sha": text(found.get("git_sha")), "git_dirty": flag(found.get("git_dirty")),
    }  # fmt: skip


def read_ceilings(draft: Draft) -> None:
    """What `stackbench doctor --ceilings --out DIR` left here."""
    path = draft.directory / "doctor.json"
    if not path.exists() or artifacts.irregular(path):
        return
    try:
        found = rows(artifacts.read_json(path, artifacts.LIMITS["doctor.json"]).get("ceilings"))
    except Problem as problem:
        draft.problem(UNKNOWN, "doctor.json", str(problem))
        return
    for row in found:
        texts = {k: text(row.get(k)) for k in ("device_uuid", "metric", "dtype", "unit", "stack")}
        draft.add("ceilings", {**texts, "size": integer(row.get("size")), "value": real(row.get("value"))})
