"""The parity gate of one group: what runs, and in which order, before anything is timed.

1. reference   float64 NumPy, and the case's precision emulated in two orders of summation (round-off)
2. every arm   20 steps from the same bits on the same batches; where the timed shape is small enough
               for the reference this is the timed executable itself, cold: it fills the compile columns
               and leaves the compile cache that timed observations read
3. where the timed shape is too large for float64, step 2 runs at a small shape against the reference,
   and at the timed shape stack against stack; round-off there is the first stack's own step
   re-ordered (math attention, chunked loss, twice the micro-batches)
4. judged by bench.verify; K, the steps of a value, from the fastest arm
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import plan as planning
from bench import protocol, verify
from bench.run import observe
from bench.run.observe import Context, Request
from bench.run.rounds import TOLD, cache_directory
from stacks.train import spec

CALIBRATION_S = 0.3
ROUTER_MARGIN = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 4e-3, "bf16-pure": 4e-3}  # of probability
REFERENCES = (
    ("float64", {"arithmetic": "float64", "order": "natural"}),
    ("emulated", {"arithmetic": "emulated", "order": "natural"}),
    ("emulated, re-ordered", {"arithmetic": "emulated", "order": "permuted"}),
)


@dataclasses.dataclass(kw_only=True)
class Gate:
    """The state of one group's gate while it runs."""

    context: Context
    group: str
    cases: list[planning.Case]
    status: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    references: list[str] = dataclasses.field(default_factory=list)
    facts: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    step_s: dict[str, float] = dataclasses.field(default_factory=dict)
    levels: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def precision(self) -> str:
        return str(self.cases[0].axes["precision"])

    def alive(self) -> list[planning.Case]:
        return [c for c in self.cases if self.status.get(c.case_id, ("ok", ""))[0] == "ok"]

    def observe(self, request: Request) -> dict[str, Any]:
        tell({"event": "start", "case_id": request.case.case_id, "gate": request.role})
        row = observe.observe(self.context, request)
        tell({"event": "end", **{k: row[k] for k in TOLD}})
        return row

    def parity_of(self, run_id: str) -> dict[str, Any]:
        return verify.read(self.context.out / "artifacts" / run_id / "parity.safetensors")

    def steps(self) -> int:
        return int(self.context.plan.suite["parity_steps"])


def tell(message: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")  # one write: two references may speak at once
    sys.stdout.flush()


def run_gate(out: Path, group: str) -> dict[str, Any]:
    """Runs and judges the gate of a group; writes `gates/<session>.<group>.json` and returns it."""
    context = Context.open(out)
    gate = Gate(context=context, group=group, cases=context.plan.groups[group])
    case = gate.cases[0]
    model = spec.from_job(case.model)
    gflop = gate.steps() * (case.flops_per_step_executed or 0) / 1e9
    build_all(gate)
    if gflop <= context.plan.suite["reference_gflop"]:
        against_reference(gate, model, case.axes, None, timed=True)
    else:
        small_model, small_axes = spec.small(model, case.axes)
        inputs = small_inputs(context, gate, small_model, small_axes)
        against_reference(gate, small_model, small_axes, inputs, timed=False)
        stack_against_stack(gate, model)
    judge_levels(gate)
    for extra in range(1, context.plan.suite["cache_draws"]):
        seed_cache(gate, extra)
    result = {
        "schema_version": planning.SCHEMA_VERSION, "session": context.session["session"], "group": group,
        "steps_per_value": steps_per_value(gate), "references": gate.references,
        "cases": {i: {"status": s, "reason": r} for i, (s, r) in sorted(gate.status.items())},
        "rows": gate.rows,
    }  # fmt: skip
    path = out / "gates" / f"{context.session['session']}.{group}.json"
    path.parent.mkdir(exist_ok=True)
    planning.write_atomic(path, json.dumps(result, allow_nan=True))
    return result


def build_all(gate: Gate) -> None:
    """Builds stacks in other languages; one that does not build fails its cases with the compiler's words."""
    import subprocess

    for name in dict.fromkeys(case.stack for case in gate.cases):
        stack = gate.context.stack(gate.cases[0], name)
        if not stack.build:
            continue
        directory = observe.build_directory(gate.context, stack)
        directory.mkdir(parents=True, exist_ok=True)
        places = {"dir": str(stack.file.parent), "build": str(directory)}
        argv = [observe.fill(part, places) for part in stack.build]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)
            failure = f"exit code {done.returncode}: {done.stderr[-500:]}" if done.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            failure = str(error)
        if failure:
            reason = gate.context.scrubber.text(f"build failed: {failure}")
            for case in gate.cases:
                if case.stack == name:
                    gate.status[case.case_id] = (protocol.STATUS_FAILED, reason)


# ------------------------------------------------------------------------------------ against float64
def against_reference(
    gate: Gate, model: spec.Model, axes: dict[str, Any], batches: Mapping[str, Any] | None, *, timed: bool
) -> None:
    """References, then every arm, at one shape; fills status, rows and levels."""
    references = run_references(gate, model, axes, batches)
    if isinstance(references, str):
        for case in gate.alive():
            gate.status[case.case_id] = (protocol.STATUS_FAILED, f"the reference failed: {references}")
        return
    exact, *emulated = references
    for index, arrays in enumerate(emulated):
        gate.levels[f"reference {index}"] = verify.level(model, arrays, exact)
    routing = write_routing(gate, exact)
    seed = gate.context.plan.suite["seed"]
    role = "timed shape" if timed else "small shape"
    for case in gate.alive():
        row = run_arm(gate, case, role, model, axes, batches, routing, timed=timed)
        if row is None:
            continue
        got = parity_or_fail(gate, case, row)
        if got is None:
            continue
        rows = verify.judge(model, gate.precision, seed, got, exact, emulated, f"float64, {role}")
        rows += verify.judge_dtypes(model, gate.precision, gate.facts.get(case.case_id, {}))
        rows += verify.judge_routing(got, exact, ROUTER_MARGIN[gate.precision])
        gate.levels[case.case_id] = verify.level(model, got, exact)
        record(gate, case, rows)


def run_references(
    gate: Gate, model: spec.Model, axes: dict[str, Any], batches: Mapping[str, Any] | None
) -> list[dict[str, Any]] | str:
    """Parity arrays of float64, emulated and re-ordered; or why there are none."""
    arrays: list[dict[str, Any]] = []

    def request(index: int, routing: str | None) -> Request:
        role, options = REFERENCES[index]
        return Request(
            case=gate.cases[0], kind="parity", cache=gate.context.out / "caches" / "reference",
            cache_state="none", stack="reference", model=dataclasses.asdict(model), axes=dict(axes),
            options=dict(options), batches=batches, role=f"reference: {role}", threads=1,
            parity={"steps": gate.steps(), "routing_in": routing},
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(gate.observe, request(0, None))
        routing = None
        if model.family == "moe":  # the others must follow its experts
            failure = settle(gate, [first.result()], arrays)
            if failure:
                return failure
            routing = write_routing(gate, arrays[0])
        rest = [pool.submit(gate.observe, request(i, routing)) for i in (1, 2)]
        rows = ([] if arrays else [first.result()]) + [r.result() for r in rest]
        return settle(gate, rows, arrays) or arrays


def settle(gate: Gate, rows: list[dict[str, Any]], arrays: list[dict[str, Any]]) -> str:
    for row in rows:
        if row["status"] != protocol.STATUS_OK:
            return str(row["reason"])
        gate.references.append(row["run_id"])
        arrays.append(gate.parity_of(row["run_id"]))
    return ""


def write_routing(gate: Gate, reference: Mapping[str, Any]) -> str | None:
    """Path of the experts that every stack is forced to where the reference's margin is round-off."""
    import numpy as np

    if "routing/ids" not in reference:
        return None
    forced = verify.forced_routing(reference, ROUTER_MARGIN[gate.precision])
    path = gate.context.out.resolve() / "inputs" / f"routing-{gate.group}-{forced.shape[2]}.npy"
    np.save(path, forced, allow_pickle=False)
    return str(path)


def run_arm(
    gate: Gate, case: planning.Case, role: str, model: spec.Model, axes: dict[str, Any],
    batches: Mapping[str, Any] | None, routing: str | None, *, timed: bool,
) -> dict[str, Any] | None:  # fmt: skip
    """One arm's parity run. At the timed shape it compiles cold and leaves its cache; elsewhere none."""
    draw = cache_directory(gate.context, case, 0)
    with tempfile.TemporaryDirectory() as scratch:
        if timed:
            observe.remove_tree(draw)
        parity = {"steps": gate.steps(), "routing_in": routing, "calibrate": CALIBRATION_S if timed else 0.0}
        row = gate.observe(
            Request(
                case=case, kind="parity", cache=draw if timed else Path(scratch), cache_state="cold",
                model=dataclasses.asdict(model), axes=dict(axes), batches=batches, role=role, parity=parity,
            )
        )  # fmt: skip
    read_messages(gate, case, row, timed=timed)
    if row["status"] != protocol.STATUS_OK:
        gate.status[case.case_id] = (row["status"], row["reason"])
        return None
    return row


def read_messages(gate: Gate, case: planning.Case, row: Mapping[str, Any], *, timed: bool) -> None:
    """Facts of the manifest, and the calibrated step time."""
    facts = gate.facts.setdefault(case.case_id, {})
    path = gate.context.out / "artifacts" / row["run_id"] / "messages.jsonl"
    for line in path.read_text().splitlines():
        message = json.loads(line)
        if message["type"] == "manifest" and isinstance(message.get("facts"), dict):
            facts.update({str(k): str(v) for k, v in message["facts"].items()})
        calibration = message["type"] == "metric" and message.get("phase") == "calibration"
        if timed and calibration and isinstance(message.get("value"), (int, float)):
            gate.step_s[case.case_id] = float(message["value"])


def parity_or_fail(gate: Gate, case: planning.Case, row: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        return gate.parity_of(row["run_id"])
    except ValueError as error:
        reason = gate.context.scrubber.text(str(error))
        gate.status[case.case_id] = (protocol.STATUS_NOT_COMPARABLE, reason)
        return None


def record(gate: Gate, case: planning.Case, rows: list[verify.Row]) -> None:
    status, reason = verify.verdict(rows)
    if gate.status.get(case.case_id, ("ok", ""))[0] == "ok":
        gate.status[case.case_id] = (status, reason)
    gate.rows += [
        {"case_id": case.case_id, "against": row.detail if row.measure != "dtype" else "precision table",
         **dataclasses.asdict(row)}
        for row in rows
    ]  # fmt: skip


# ------------------------------------------------------------------------------------ stack against stack
def stack_against_stack(gate: Gate, model: spec.Model) -> None:
    """At the timed shape: every arm against the first that runs; tolerances from that one re-ordered."""
    axes, seed = gate.cases[0].axes, gate.context.plan.suite["seed"]
    alive = sorted(gate.alive(), key=lambda c: c.stack != "torch-eager")
    anchor: tuple[planning.Case, dict[str, Any], list[dict[str, Any]]] | None = None
    routing = None
    for case in alive:
        row = run_arm(gate, case, "timed shape", model, axes, None, routing, timed=True)
        got = None if row is None else parity_or_fail(gate, case, row)
        if got is None:
            continue
        if anchor is None:
            routing = write_routing(gate, got)
            other = run_reordered(gate, case, model, routing)
            if other is None:
                gate.status[case.case_id] = (protocol.STATUS_FAILED, "its re-ordered parity run failed")
                continue
            anchor = (case, got, [other])
            rows = verify.judge(model, gate.precision, seed, other, got, [other], "itself, re-ordered")
        else:
            name = f"{anchor[0].arm}, timed shape"
            rows = verify.judge(model, gate.precision, seed, got, anchor[1], anchor[2], name)
            rows += verify.judge_routing(got, anchor[1], ROUTER_MARGIN[gate.precision])
        record(gate, case, rows + verify.judge_dtypes(model, gate.precision, gate.facts[case.case_id]))


def run_reordered(
    gate: Gate, case: planning.Case, model: spec.Model, routing: str | None
) -> dict[str, Any] | None:
    """The same step in another order of summation: what round-off is at this shape."""
    axes = {**case.axes, "attention": "math"}
    micro = axes["batch"] // axes["accumulation"]
    if micro % 2 == 0:
        axes["accumulation"] *= 2
    if spec.tokens_per_step(axes) // axes["accumulation"] % spec.LOSS_CHUNKS == 0:
        axes["loss"] = "chunked"
    options = {**case.options, **gate.context.stack(case).reordered}
    with tempfile.TemporaryDirectory() as scratch:
        row = gate.observe(
            Request(
                case=case, kind="parity", cache=Path(scratch), cache_state="cold", options=options,
                model=dataclasses.asdict(model), axes=axes, role="timed shape, re-ordered",
                parity={"steps": gate.steps(), "routing_in": routing},
            )
        )  # fmt: skip
    return parity_or_fail(gate, case, row) if row["status"] == protocol.STATUS_OK else None


def judge_levels(gate: Gate) -> None:
    """No stack's error against float64 may be a multiple of the others' and the emulated references'."""
    peers = verify.judge_peers(gate.levels)
    for case in gate.cases:
        if case.case_id in peers:
            record(gate, case, [peers[case.case_id]])


# --------------------------------------------------------------------------------------- inputs, caches, K
def small_inputs(context: Context, gate: Gate, model: spec.Model, axes: Mapping[str, Any]) -> dict[str, Any]:
    """Batches at the small shape, cut from the group's real ones, ids folded into its vocabulary."""
    import numpy as np

    row = context.session["inputs"][gate.group]
    data = np.fromfile(context.out / "inputs" / row["file"], np.int32) % model.vocab
    shape = (gate.steps(), int(axes["batch"]), int(axes["sequence"]) + 1)
    data = np.resize(data, math.prod(shape)).reshape(shape)
    name = f"small-{gate.group}.bin"
    data.tofile(context.out / "inputs" / name)
    digest = hashlib.sha256(data.tobytes()).hexdigest()
    return {"file": name, "sha256": digest, "shape": list(shape), "dtype": "int32"}


def seed_cache(gate: Gate, draw: int) -> None:
    """One more independent cold compilation of every arm: another draw of the autotuner."""
    for case in gate.alive():
        cache = cache_directory(gate.context, case, draw)
        observe.remove_tree(cache)
        gate.observe(
            Request(
                case=case, kind="parity", cache=cache, cache_state="cold", cache_id=draw,
                role=f"cache draw {draw}", parity={"steps": 1, "calibrate": CALIBRATION_S},
            )
        )  # fmt: skip


def steps_per_value(gate: Gate) -> int:
    """K: the fastest arm's value lasts the device's floor; equal for all arms."""
    fastest = min((gate.step_s[c.case_id] for c in gate.alive() if c.case_id in gate.step_s), default=None)
    if fastest is None:
        return 1
    return max(1, math.ceil(1.1 * gate.context.plan.measure["value_s"] / fastest))
