"""One observation: a job written, a worker run, its artifacts put in place by one rename.

A results directory, as it is being filled:
    plan.json  session.json  environment.json  inputs/  caches/  gates/  artifacts/<run_id>/
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import domains, protocol, registry
from bench import plan as planning
from bench.run import isolate

DONE = "run.json"  # written last: an observation without it never finished


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What every observation of a session shares."""

    out: Path
    plan: planning.Plan
    session: dict[str, Any]  # session, arms: {arm: env_id}, cpus, threads, inputs: {group: {...}}
    stacks: Mapping[str, Mapping[str, registry.Stack]]  # by domain, then name
    scrubber: isolate.Scrubber

    @classmethod
    def open(cls, out: Path) -> Context:
        plan = planning.from_json(json.loads((out / "plan.json").read_text()))
        session = json.loads((out / "session.json").read_text())
        paths = [Path(p) for p in plan.suite["path"]]
        scrubber = isolate.Scrubber.here(registry.ROOT)
        names = dict.fromkeys(domains.named(case.workload) for case in plan.cases)
        stacks = {name: registry.stacks(name, paths) for name in names}
        return cls(out=out, plan=plan, session=session, stacks=stacks, scrubber=scrubber)

    def stack(self, case: planning.Case, name: str | None = None) -> registry.Stack:
        """The case's stack, or another of its domain."""
        return self.stacks[domains.named(case.workload)][name or case.stack]

    @property
    def device(self) -> str:
        kind, index = self.plan.device["kind"], self.plan.device["index"]
        return kind if kind == "cpu" else f"{kind}:{index}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One observation to make. `model`, `axes`, `options` override the case's (a small shape, a variant)."""

    case: planning.Case
    kind: str  # timed | parity | and a domain's own
    cache: Path
    cache_state: str  # cold | seeded | fresh
    cache_id: int = 0
    stack: str | None = None  # another stack on the case's work: the reference
    model: dict[str, Any] | None = None
    axes: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    batches: Mapping[str, Any] | None = None
    parity: dict[str, Any] | None = None
    steps_per_value: int = 1
    round_id: str | None = None
    order: int | None = None
    role: str = ""  # which part of the gate: "timed shape", "float64", …
    threads: int | None = None


def new_run_id(kind: str, case_id: str, role: str) -> str:
    """Sorts by time; unique by process and content."""
    now = datetime.datetime.now(datetime.UTC)
    tail = planning.digest([case_id, role, os.getpid(), now.isoformat()])
    return f"{now:%Y%m%dT%H%M%S}{now.microsecond // 1000:03d}-{kind}-{tail}"


def job_of(context: Context, request: Request, run_id: str, directory: Path) -> dict[str, Any]:
    """The job file: see bench.protocol. The domain's kit adds its own part."""
    case = request.case
    stack, domain = context.stack(case, request.stack), domains.of(case.workload)
    cpus = domain.module("kit").cpus(context, case)
    own = len(cpus) if cpus != context.session["cpus"] else context.session["threads"]
    return {
        "protocol": protocol.PROTOCOL, "kind": request.kind, "run_id": run_id, "case_id": case.case_id,
        "workload": case.workload, "stack": stack.name, "stack_file": str(stack.file),
        "axes": request.axes or case.axes,
        "options": request.options if request.options is not None else case.options,
        "device": context.device, "threads": request.threads or own, "cpus": cpus,
        "seed": context.plan.suite["seed"], "steps_per_value": request.steps_per_value,
        "rank": 0, "world_size": 1, "rendezvous": None,
        **domain.module("kit").job(context, request, directory),
    }  # fmt: skip


def command(context: Context, case: planning.Case, stack: registry.Stack, job: Path) -> list[str]:
    """argv of a worker: ours for a Python stack, the stack's own otherwise."""
    if stack.argv:
        places = {"dir": str(stack.file.parent), "build": str(build_directory(context, stack))}
        return [fill(part, places) for part in stack.argv] + [str(job)]
    python = case.interpreter if case.interpreter and stack.role == "stack" else sys.executable
    return [python, "-m", domains.of(case.workload).worker, str(job)]


def fill(text: str, places: Mapping[str, str]) -> str:
    """`{name}` replaced for the names known; any other brace is the text's own (shell, JSON, flags)."""
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def build_directory(context: Context, stack: registry.Stack) -> Path:
    return context.out.resolve() / "build" / stack.name


def variables(
    context: Context, request: Request, stack: registry.Stack, job: Mapping[str, Any]
) -> dict[str, str]:
    """The domain's, the stack's and the arm's variables, with {cache} and {platform} filled in."""
    places = {"cache": str(request.cache.resolve()), "platform": context.plan.device["kind"]}
    wanted = {**stack.variables, **request.case.variables}
    filled = {name: fill(value, places) for name, value in wanted.items()}
    own = domains.of(request.case.workload).module("kit").variables(job)
    return {"PYTHONPATH": str(registry.ROOT), **own, **filled}


def observe(context: Context, request: Request) -> dict[str, Any]:
    """Makes one observation and returns its row of `runs`; its artifacts are then complete on disk.

    Raises OSError where the disk refuses; KeyboardInterrupt passes through, and leaves a row that says so.
    """
    from bench.run import environment

    case = request.case
    stack, kit = context.stack(case, request.stack), domains.of(case.workload).module("kit")
    run_id = new_run_id(request.kind, case.case_id, request.role)
    final = context.out / "artifacts" / run_id
    directory = final.with_name(f".{run_id}.tmp").resolve()
    directory.mkdir(parents=True)
    request.cache.mkdir(parents=True, exist_ok=True)
    job = job_of(context, request, run_id, directory)
    job_path = directory / "job.json"
    job_path.write_text(json.dumps(job))
    sealed = seal(request.cache) if request.cache_state == "seeded" else None
    env = isolate.environment(
        variables(context, request, stack, job), environment.inherited_flags(), job["threads"]
    )
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    row = base_row(context, request, run_id, started)
    try:
        with kit.watched(job) as watch:
            outcome = isolate.run(
                command(context, case, stack, job_path), directory=directory, env=env, cpus=job["cpus"],
                timeout_s=context.plan.suite["timeout_s"], scrubber=context.scrubber, watch=watch,
            )  # fmt: skip
    except KeyboardInterrupt:
        row.update(status=protocol.STATUS_FAILED, reason="interrupted", exit=None, wall_s=None)
        if sealed is not None:
            row["cache_changes"] = restore(request.cache, sealed)
        finish(context, directory, final, job, row, [])
        raise
    row.update(status=outcome.status, reason=outcome.reason, exit=outcome.exit, wall_s=outcome.wall_s)
    missing = shortfall(job, outcome.messages) if outcome.status == protocol.STATUS_OK else ""
    if missing:
        row.update(status=protocol.STATUS_FAILED, reason=missing)
    if sealed is not None:
        row["cache_changes"] = restore(request.cache, sealed)
    finish(context, directory, final, job, row, outcome.messages)
    return row


def shortfall(job: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
    """How a timed worker that says it is done did other work than its job; empty if it did not."""
    if job["kind"] != "timed":
        return ""
    values = [m for m in messages if m["type"] == "value"]
    timed = sum(not m["warmup"] for m in values)
    if timed != job["values"]:
        return f"crash: ended after {timed} of {job['values']} values"
    kit = domains.of(job["workload"]).module("kit")
    return str(kit.problem(job, messages))


def base_row(context: Context, request: Request, run_id: str, started: str) -> dict[str, Any]:
    """The row of `runs` as far as it is known before the worker starts."""
    case = request.case
    return {
        "schema_version": planning.SCHEMA_VERSION, "run_id": run_id, "parent_run_id": None,
        "kind": request.kind, "role": request.role, "case_id": case.case_id, "group": case.group,
        "workload": case.workload, "stack": request.stack or case.stack, "arm": case.arm,
        "axes": request.axes or case.axes, "env_id": context.session["arms"][case.arm],
        "session": context.session["session"], "round_id": request.round_id, "order": request.order,
        "cache": request.cache_state, "cache_id": request.cache_id,
        "steps_per_value": request.steps_per_value, "tokens_per_step": case.tokens_per_step,
        "flops_per_step": case.flops_per_step, "device_uuid": context.plan.device["uuid"],
        "started": started,
    }  # fmt: skip


def finish(
    context: Context, directory: Path, final: Path, job: Mapping[str, Any], row: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
) -> None:  # fmt: skip
    """Job without this machine's paths, pyperf's JSON, the row; fsync; one rename puts it all in place."""
    stored = context.scrubber.value(dict(job))
    for name in domains.of(job["workload"]).module("kit").NOT_STORED:
        stored.pop(name)
    (directory / "job.json").write_text(json.dumps(stored))
    if row["kind"] == "timed" and row["status"] == protocol.STATUS_OK:
        write_pyperf(directory / "pyperf.json", row, messages)
    (directory / DONE).write_text(json.dumps(context.scrubber.value(dict(row))))
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    directory.rename(final)


def write_pyperf(path: Path, row: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> None:
    """The observation as one pyperf Run, made by pyperf's own classes; nothing where no value was timed."""
    import pyperf

    values = [m for m in messages if m["type"] == "value"]
    timed = [m["wall_ns"] / 1e9 / m["steps"] for m in values if not m["warmup"]]
    if not timed:
        return
    warmups = [(int(m["steps"]), m["wall_ns"] / 1e9 / m["steps"]) for m in values if m["warmup"]]
    facts: dict[str, Any] = {}
    for message in messages:
        if message["type"] == "manifest":
            facts.update(message["facts"])
    metadata = {k.removeprefix("pyperf."): v for k, v in facts.items() if k.startswith("pyperf.")}
    keep = ("cpu_count", "cpu_model_name", "cpu_freq", "aslr", "platform", "load_avg_1min", "python_version",
            "mem_max_rss", "boot_time", "uptime", "runnable_threads", "cpu_affinity", "python_implementation",
            "python_compiler", "timer", "perf_version", "date", "duration")  # fmt: skip
    metadata = {k: v for k, v in metadata.items() if k in keep and usable(k, v)}
    metadata.update(
        name=row["case_id"], loops=int(row["steps_per_value"]), unit="second", run_id=row["run_id"],
        arm=row["arm"], session=row["session"], round_id=row["round_id"] or "", env_id=row["env_id"],
    )  # fmt: skip
    run = pyperf.Run(timed, warmups=warmups or None, metadata=metadata, collect_metadata=False)
    pyperf.Benchmark([run]).dump(str(path))


def usable(name: str, value: Any) -> bool:
    """Whether pyperf takes this as metadata: a worker may have sent anything."""
    import pyperf

    try:
        pyperf.Run([1.0], metadata={name: value}, collect_metadata=False)
    except (ValueError, TypeError):
        return False
    return True


# ------------------------------------------------------------------------------------------------ caches
def seal(cache: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file: a seeded cache is read, never written."""
    return {
        str(p.relative_to(cache)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in cache.rglob("*")
        if p.is_file()
    }


def restore(cache: Path, sealed: Mapping[str, tuple[int, int]]) -> int:
    """Removes what an observation added; returns how many files it added, removed or changed in size."""
    now = seal(cache)
    added = sorted(set(now) - set(sealed))
    for name in added:
        (cache / name).unlink(missing_ok=True)
    return len(added) + sum(1 for name, stat in sealed.items() if name not in now or now[name][0] != stat[0])


def remove_tree(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
