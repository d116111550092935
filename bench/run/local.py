"""The local launcher: prepares inputs, runs gates and rounds as processes of their own, shows progress."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import domains, registry
from bench import plan as planning
from bench.errors import UserError
from bench.run import isolate, rounds

DISK_FULL = 5
INTERRUPTED = 3


@dataclasses.dataclass(kw_only=True)
class Result:
    """How a run ended: `status` is complete, interrupted, out of time or disk full."""

    status: str
    wall_s: float
    workers_s: float
    preparation_s: float
    finished_rounds: int
    planned_rounds: int

    @property
    def harness_share(self) -> float:
        spent = self.workers_s + self.preparation_s
        return max(0.0, 1 - spent / self.wall_s) if self.wall_s else 0.0


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, as a queue sends it, means what Ctrl-C means: the round is interrupted, its rows stay."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Two runs never write one directory at a time."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another run is writing into {out}", next_command="wait for it, or give another --out"
            ) from None
        yield


def begin(plan: planning.Plan, out: Path, *, resume: bool) -> planning.Plan:
    """The directory's plan: this one, or with `resume` the one already there, which must hold the same work.

    Nothing that lies in the directory is changed. Raises UserError.
    """
    existing = out / "plan.json"
    if not existing.exists():
        if out.exists() and any(p.name != ".lock" for p in out.iterdir()):
            raise UserError(
                f"{out} holds files that are no results of stackbench",
                next_command=f"stackbench run {plan.suite['name']} --out results/local/NEW",
            )
        out.mkdir(parents=True, exist_ok=True)
        planning.write_atomic(existing, json.dumps(plan.to_json()))
        return plan
    if not resume:
        raise UserError(
            f"{out} already holds a run; nothing in it was changed",
            next_command=f"stackbench run {plan.suite['name']} --out {out} --resume, or another --out",
        )
    try:
        old = planning.from_json(json.loads(existing.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{existing} is no plan of this version: {error}") from None
    mine, theirs = ({(c.case_id, c.arm) for c in p.cases} for p in (plan, old))
    if mine != theirs:
        only = sorted(f"{i} ({a})" for i, a in mine ^ theirs)
        raise UserError(
            f"--resume: {out} holds other cases than this suite and options give",
            valid=[f"differs: {x}" for x in only],
            next_command=f"stackbench run {plan.suite['name']} --out {out} --resume with the same options",
        )
    free = ("rounds", "name", "description", "price_per_hour", "matrix")  # the cases say what matrix says
    changed = [k for k in plan.suite if k not in free and plan.suite[k] != old.suite.get(k)]
    if changed:
        raise UserError(
            f"--resume: {out} was measured with other settings than this suite and options give",
            valid=[f"{k} = {old.suite.get(k)!r} there, {plan.suite[k]!r} here" for k in changed],
            next_command=f"stackbench run {plan.suite['name']} --out {out} --resume with the same options",
        )
    return dataclasses.replace(old, suite={**old.suite, "rounds": plan.suite["rounds"]})


def run(
    plan: planning.Plan, out: Path, *, time_budget_s: float | None, progress: Any, cache_dir: Path
) -> Result:
    """Everything: inputs, then breadth first gates and rounds, until done, out of time or interrupted.

    Rounds with an arm that was not steady are repeated once, at the end.
    """
    start = time.monotonic()
    deadline = None if time_budget_s is None else start + time_budget_s
    known = {row["run_id"] for row in rounds.read_rows(out)}
    session = open_session(plan, out)
    preparation = prepare_inputs(plan, out, session, cache_dir, progress)
    isolate.become_subreaper()
    planned = plan.suite["rounds"] if plan.suite["caches"] != "cold" else 0
    status, finished, total = "complete", 0, 0
    for repeat in (False, True):
        tasks = schedule(plan, out, session["session"], planned)
        if repeat:
            tasks = [task for task in tasks if task[0] == "round" and gate_passed(out, session, task[1])]
        total += sum(kind == "round" for kind, _, _ in tasks)
        if tasks and status == "complete":
            progress.begin(tasks_total=len(tasks), plan=plan, counts=Counter(kind for kind, _, _ in tasks))
            status, more = work_through(tasks, out, session["session"], deadline, progress)
            finished += more
    rows = [row for row in rounds.read_rows(out) if row["run_id"] not in known]
    workers = sum(row["wall_s"] or 0.0 for row in rows) - overlap(rows)
    return Result(
        status=status, wall_s=time.monotonic() - start, workers_s=workers, preparation_s=preparation,
        finished_rounds=finished, planned_rounds=total,
    )  # fmt: skip


def gate_passed(out: Path, session: dict[str, Any], group: str) -> bool:
    """Some case of the group may be timed."""
    path = out / "gates" / f"{session['session']}.{group}.json"
    return path.exists() and any(
        row["status"] == "ok" for row in json.loads(path.read_text())["cases"].values()
    )


def work_through(
    tasks: list[tuple[str, str, str]], out: Path, session: str, deadline: float | None, progress: Any
) -> tuple[str, int]:
    """Runs tasks in order; returns how it ended and how many rounds were finished."""
    status, finished = "complete", 0
    durations: dict[tuple[str, str], float] = {}
    for kind, group, name in tasks:
        expected = durations.get((kind, group), progress.expected(kind, group))
        if deadline is not None and time.monotonic() + expected > deadline:
            status = "out of time"
            if kind == "gate":
                continue
            break
        if kind != "gate" and not (out / "gates" / f"{session}.{group}.json").exists():
            continue
        begun = time.monotonic()
        code = run_task(out, name if kind == "round" else f"{kind}:{group}", progress)
        durations[kind, group] = time.monotonic() - begun
        finished += kind == "round" and code == 0
        if code != 0:
            status = {INTERRUPTED: "interrupted", DISK_FULL: "disk full"}.get(code, f"crash ({code})")
            break
        progress.advance(kind, group)
    return status, finished


def overlap(rows: list[dict[str, Any]]) -> float:
    """Seconds in which two reference runs went on at once: counted once as worker time."""
    spans: list[tuple[float, float]] = []
    for row in rows:
        if row["role"].startswith("reference") and row["wall_s"]:
            begin = datetime.datetime.fromisoformat(row["started"]).timestamp()
            spans.append((begin, begin + row["wall_s"]))
    total = float(sum(b - a for a, b in spans))
    union, end = 0.0, float("-inf")
    for a, b in sorted(spans):
        union += max(0.0, b - max(a, end))
        end = max(end, b)
    return total - union


# ------------------------------------------------------------------------------------------- the session
def open_session(plan: planning.Plan, out: Path) -> dict[str, Any]:
    """The session of this environment: the last one if nothing changed, else a new one."""
    from bench import devices
    from bench.run import environment

    fingerprints = fingerprint_arms(plan)
    path = out / "environment.json"
    table = json.loads(path.read_text()) if path.exists() else {"environments": {}, "sessions": []}
    arms = {arm: f["env_id"] for arm, f in fingerprints.items()}
    table["environments"].update({f["env_id"]: f for f in fingerprints.values()})
    last = table["sessions"][-1] if table["sessions"] else None
    if last is None or last["arms"] != arms:
        device = devices.here(
            plan.device["kind"] if plan.device["kind"] == "cpu" else f"cuda:{plan.device['index']}"
        )
        cpus = environment.cpu_list(plan.suite["affinity"], device)
        last = {
            "session": f"s{len(table['sessions']) + 1}", "arms": arms, "cpus": cpus,
            "threads": environment.thread_count(cpus), "inputs": {},
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        table["sessions"].append(last)
    planning.write_atomic(path, json.dumps(table))
    planning.write_atomic(out / "session.json", json.dumps(last))
    return dict(last)


def fingerprint_arms(plan: planning.Plan) -> dict[str, dict[str, Any]]:
    """One fingerprint an arm; arms that share interpreter and variables share it."""
    from bench.run import environment

    paths = [Path(p) for p in plan.suite["path"]]
    stacks = [s for name in domains.DOMAINS for s in registry.stacks(name, paths).values()]
    layers = {stack.environment for stack in stacks} | {"dev"}
    every = sorted((registry.ROOT / "locks").glob("*.txt"))
    timed = chosen_locks([p for p in every if p.stem not in layers])
    seen: dict[str, dict[str, Any]] = {}
    out = {}
    for case in plan.cases:
        if case.skip is not None or case.arm in out:
            continue
        key = json.dumps([case.interpreter, case.variables], sort_keys=True)
        if key not in seen:
            interpreter = Path(case.interpreter) if case.interpreter else None
            own = [p for p in every if interpreter and registry.environment(p.stem) in interpreter.parents]
            locks = [*timed, *own]  # environments of their own are layers on the timed one
            seen[key] = environment.fingerprint(interpreter, case.variables, locks, registry.ROOT)
        out[case.arm] = seen[key]
    return out


def chosen_locks(locks: list[Path]) -> list[Path]:
    """base, and of the two torch locks the one whose build is installed."""
    import importlib.metadata

    try:
        cpu = importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        cpu = False
    other = "torch-cuda" if cpu else "torch-cpu"
    return [p for p in locks if p.stem != other]


def prepare_inputs(
    plan: planning.Plan, out: Path, session: dict[str, Any], cache_dir: Path, progress: Any
) -> float:
    """The input of every group, by its domain's kit, on disk with hashes. Returns the seconds it took."""
    start = time.monotonic()
    inputs = out / "inputs"
    inputs.mkdir(exist_ok=True)
    for group, cases in plan.groups.items():
        row, kit = session["inputs"].get(group), domains.of(cases[0].workload).module("kit")
        if row and kit.ready(row, inputs):
            continue
        progress.say(f"input of {group}")
        session["inputs"][group] = kit.prepare(plan, cases, inputs, cache_dir, progress.say)
    planning.write_atomic(out / "session.json", json.dumps(session))
    table = json.loads((out / "environment.json").read_text())
    table["sessions"][-1] = session
    planning.write_atomic(out / "environment.json", json.dumps(table))
    return time.monotonic() - start


# ------------------------------------------------------------------------------------------------- tasks
def schedule(plan: planning.Plan, out: Path, session: str, planned: int) -> list[tuple[str, str, str]]:
    """What is left to do, breadth first: (`gate` | `round`, group, round id), read off the artifacts."""
    done, attempts = completed_rounds(plan, out, session)
    tasks = []
    for index in range(max(planned, 1)):
        for group in plan.groups:
            if index == 0 and not (out / "gates" / f"{session}.{group}.json").exists():
                tasks.append(("gate", group, ""))
            if index < planned and (group, index) not in done:
                attempt = attempts.get((group, index), -1) + 1
                tasks.append(("round", group, rounds.round_id(session, group, index, attempt)))
    for group, cases in plan.groups.items():
        domain = domains.of(cases[0].workload)
        if domain.details and details_left(domain, plan, out, session, group):
            tasks.append(("details", group, ""))
    return tasks


def details_left(domain: domains.Domain, plan: planning.Plan, out: Path, session: str, group: str) -> bool:
    """Whether something of a group is to be observed apart from its rounds, as far as is known by now."""
    details = domain.module("details")
    if not (out / "gates" / f"{session}.{group}.json").exists():
        return bool(details.wanted(plan, group))
    return bool(details.missing(plan, out, session, group))


def completed_rounds(
    plan: planning.Plan, out: Path, session: str
) -> tuple[set[tuple[str, int]], dict[tuple[str, int], int]]:
    """Rounds in which every arm that passed the gate was observed, and the last attempt of each.

    A first attempt with an arm that was not steady is not complete: it is repeated once.
    """
    seen: dict[str, set[str]] = {}
    restless: set[str] = set()
    attempts: dict[tuple[str, int], int] = {}
    rows = [r for r in rounds.read_rows(out) if r["kind"] == "timed" and r["session"] == session]
    for row in rows:
        _, group, index, attempt = rounds.parse_round_id(row["round_id"])
        attempts[group, index] = max(attempts.get((group, index), -1), attempt)
        if row["reason"] != "interrupted":
            seen.setdefault(row["round_id"], set()).add(row["case_id"])
        if attempt == 0 and row["status"] != "ok" and row["reason"].startswith(rounds.NOT_STEADY):
            restless.add(row["round_id"])
    done, lost = set(), rounds.given_up(rows, session)
    for name, cases in seen.items():
        _, group, index, _ = rounds.parse_round_id(name)
        path = out / "gates" / f"{session}.{group}.json"
        if name in restless or group not in plan.groups or not path.exists():
            continue
        gate = json.loads(path.read_text())
        wanted = {i for i, row in gate["cases"].items() if row["status"] == "ok"}
        if wanted - lost <= cases:
            done.add((group, index))
    return done, attempts


def run_task(out: Path, name: str, progress: Any) -> int:
    """A gate or a round in a process of its own; its events move the progress bar.

    On Ctrl-C (or SIGTERM) the child is asked to stop, ends its worker, writes the row, and is waited for.
    """
    command = [sys.executable, "-m", "bench.run.rounds", str(out), name, str(os.getpid())]
    env = {**os.environ, "PYTHONPATH": str(registry.ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                progress.event(json.loads(line))
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return INTERRUPTED
    finally:
        process.stdout.close()
        isolate.reap_orphans()  # between tasks this process has no children of its own
