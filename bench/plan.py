"""Suite + devices -> cases. Pure: it runs nothing, imports no stack, and knows devices it has never seen."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench import registry
from bench.devices import Device
from bench.errors import UserError, did_you_mean
from bench.suite import ArmSpec, Suite, arm
from stacks.train import spec

SCHEMA_VERSION = 1
DEFAULT_SLUG = ("batch", "sequence", "precision")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One workload x stack x axis point under one arm. `skip` holds the reason known before anything runs."""

    case_id: str
    group: str  # cases that are compared in the same rounds
    workload: str
    arm: str
    stack: str
    stack_file: str
    variant: str
    options: dict[str, Any]
    interpreter: str | None
    variables: dict[str, str]
    model: dict[str, Any]
    axes: dict[str, Any]
    tokens_per_step: int
    flops_per_step: int
    flops_per_step_noncausal: int
    flops_per_step_executed: int
    memory_lower_bound_bytes: int
    memory_predicted_bytes: int
    skip: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What will run, in order of worth. JSON-able by `to_json`."""

    suite: dict[str, Any]
    device: dict[str, Any]
    measure: dict[str, float]
    cases: tuple[Case, ...]

    @property
    def groups(self) -> dict[str, list[Case]]:
        """Runnable cases by group, in the suite's order."""
        found: dict[str, list[Case]] = {}
        for case in self.cases:
            if case.skip is None:
                found.setdefault(case.group, []).append(case)
        return found

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}


def from_json(table: Mapping[str, Any]) -> Plan:
    """Raises KeyError or TypeError where the table is no plan of this schema version."""
    if table["schema_version"] != SCHEMA_VERSION:
        raise KeyError(f"schema version {table['schema_version']}, not {SCHEMA_VERSION}")
    cases = tuple(Case(**row) for row in table["cases"])
    return Plan(suite=table["suite"], device=table["device"], measure=table["measure"], cases=cases)


def digest(value: Any, length: int = 8) -> str:
    """Hash of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def make(
    suite: Suite, device: Device, *, overrides: Mapping[str, Any] | None = None, cases: str = "*",
    check_installed: bool = True,
) -> Plan:  # fmt: skip
    """Every case of the suite on a device. Raises UserError for what the user can correct."""
    paths = [Path(p) for p in suite.path]
    stacks, models = registry.stacks("train", paths), registry.train_models(paths)
    found: dict[str, Case] = {}
    for matrix in suite.matrix:
        workloads = [matrix.workload] if isinstance(matrix.workload, str) else matrix.workload
        axes, arms = {**matrix.axes, **(overrides or {})}, {a: arm(suite, a, stacks) for a in matrix.arms}
        names, choices = list(axes), [v if isinstance(v, list) else [v] for v in axes.values()]
        for workload in workloads:
            model = find_model(suite, workload, models)
            for point in itertools.product(*choices):
                try:
                    full = spec.resolve_axes(model, dict(zip(names, point, strict=True)), device.kind)
                except ValueError as error:
                    raise UserError(
                        f"suite {suite.name}: {workload}: {error}",
                        next_command=f"stackbench plan {suite.name}",
                    ) from None
                common = common_facts(workload, model, full)
                for name, the_arm in arms.items():
                    stack = stacks[the_arm.stack]
                    case = make_case(name, the_arm, stack, common, device, check_installed)
                    first = found.setdefault(case.case_id, case)
                    if first.arm != name:
                        raise UserError(
                            f"suite {suite.name}: arms {first.arm!r} and {name!r} are both written "
                            f"{case.case_id}: rename one"
                        )
    if not found:
        raise UserError(
            f"suite {suite.name} has no case: a list of workloads, arms or values of an axis is empty",
            next_command="see bench/suites/quick.toml",
        )
    chosen = tuple(c for c in found.values() if fnmatch.fnmatch(c.case_id, cases))
    if not chosen:
        ids = sorted(c.case_id for c in found.values())
        raise UserError(
            f"--cases {cases!r} matches none of {len(ids)} cases", valid=ids,
            next_command=f"stackbench plan {suite.name} --cases '*{ids[0].split('.')[0]}*'",
        )  # fmt: skip
    plan_suite = json.loads(suite.model_dump_json())
    row = {k: v for k, v in dataclasses.asdict(device).items() if not k.startswith("_")}
    return Plan(suite=plan_suite, device=row, measure=suite.measure(device.kind), cases=chosen)


def find_model(suite: Suite, workload: str, models: Mapping[str, spec.Model]) -> spec.Model:
    domain, _, name = workload.partition("/")
    if domain != "train" or name not in models:
        known = [f"train/{m}" for m in models]
        message = f"suite {suite.name}: unknown workload {workload!r}{did_you_mean(workload, known)}"
        raise UserError(message, valid=known, next_command=f"stackbench plan {suite.name}")
    return models[name]


def common_facts(workload: str, model: spec.Model, axes: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Case that are the same for all arms of a group."""
    shape, tokens, t = _shape(model), spec.tokens_per_step(axes), int(axes["sequence"])
    slug = slug_of(workload, axes)
    return {
        "group": f"{slug}.{digest({'workload': workload, 'model': shape, 'axes': axes})}",
        "workload": workload, "model": shape, "axes": axes, "tokens_per_step": tokens,
        "flops_per_step": tokens * spec.flops_per_token(model, t),
        "flops_per_step_noncausal": tokens * spec.flops_per_token(model, t, causal=False),
        "flops_per_step_executed": tokens * spec.flops_per_token(model, t, executed=True),
        "memory_lower_bound_bytes": spec.memory_lower_bound_bytes(model, axes),
        "memory_predicted_bytes": spec.memory_predicted_bytes(model, axes),
    }  # fmt: skip


def make_case(
    name: str, the_arm: ArmSpec, stack: registry.Stack, common: Mapping[str, Any], device: Device,
    check_installed: bool,
) -> Case:  # fmt: skip
    options = {**stack.variants[the_arm.variant], **the_arm.options}
    identity = {k: common[k] for k in ("workload", "model", "axes")}
    identity.update(stack=stack.name, options=options)
    slug = common["group"].rpartition(".")[0]
    written = f"{slug}.{name.replace(':', '-')}"
    if not re.fullmatch(r"[\w.=+-]+", written):  # it names files
        raise UserError(
            f"{written!r}: a name of a workload or an arm has a character that a case id cannot have",
            valid=["letters", "digits", ". _ = + -"],
        )
    lower = common["memory_lower_bound_bytes"]
    return Case(
        case_id=f"{written}.{digest(identity)}", arm=name, stack=stack.name, stack_file=str(stack.file),
        variant=the_arm.variant, options=options,
        interpreter=str(the_arm.interpreter) if the_arm.interpreter else None,
        variables=dict(the_arm.variables),
        skip=skip_reason(stack, the_arm, common["axes"], device, lower, check_installed), **common,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _shape(model: spec.Model) -> dict[str, Any]:
    return dict(dataclasses.asdict(model))


def slug_of(workload: str, axes: Mapping[str, Any]) -> str:
    """`gpt-tiny.b8-s64-fp32`, and every axis that is not at its default."""
    parts = [f"b{axes['batch']}", f"s{axes['sequence']}", str(axes["precision"])]
    for name, axis in spec.AXES.items():
        if name not in DEFAULT_SLUG and axes[name] != axis.default:
            parts.append(f"{name}={axes[name]}")
    return f"{workload.split('/', 1)[1]}.{'-'.join(parts)}"


def skip_reason(
    stack: registry.Stack, the_arm: ArmSpec, axes: Mapping[str, Any], device: Device, lower: int,
    check_installed: bool,
) -> str | None:  # fmt: skip
    """Why this case cannot run, as far as the plan can know; None where it can."""
    if device.kind not in stack.devices:
        return f"{stack.name} does not run on a {device.kind} device"
    for axis, by_kind in stack.axes.items():
        valid = by_kind.get(device.kind)
        if valid is not None and axes[axis] not in valid:
            return f"{stack.name} has no {axis} = {axes[axis]} on a {device.kind} device (it has {valid})"
    if device.memory_bytes is not None and lower > device.memory_bytes:
        return (
            f"needs at least {lower / 2**30:.1f} GiB (weights, gradients, moments, logits); "
            f"the device has {device.memory_bytes / 2**30:.1f} GiB"
        )
    if not check_installed:
        return None
    if the_arm.interpreter is None:
        wanted = stack.requires + (stack.requires_cuda if device.kind == "cuda" else ())
        missing = [name for name in wanted if not installed(name)]
        if missing:
            return f"{', '.join(missing)} not installed: {stack.install or 'see the file of the stack'}"
    elif not the_arm.interpreter.exists():
        return f"interpreter {the_arm.interpreter} does not exist"
    for need in stack.needs:
        if not compiler(need):
            return f"no {need} found: apt-get install build-essential"
    return None


@lru_cache(maxsize=64)
def installed(name: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@lru_cache(maxsize=4)
def compiler(need: str = "c++ compiler") -> str | None:
    """The compiler there is of a language: $CXX or $CC, else a usual name. Inductor looks for C++'s alike."""
    import os

    variable, *names = registry.TOOLS[need]
    for name in (os.environ.get(variable), *names):
        if name and shutil.which(name):
            return name
    return None


# ------------------------------------------------------------------------------------------- expected cost
FIRST_GUESS = {  # seconds, measured on a 2-core machine (facts: 4-7 s an observation), without a history
    "cpu": {"observation_s": 8.0, "gate_s": 25.0, "flops_per_s": 6e10},
    "cuda": {"observation_s": 30.0, "gate_s": 60.0, "flops_per_s": 2e14},
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    observation_s: float
    gate_s: float
    source: str  # "earlier runs" | "estimate"


def estimate(case: Case, plan: Plan, history: Mapping[str, Mapping[str, float]]) -> Estimate:
    """Seconds of one observation and of the gate: from earlier runs of the case, else a stated guess."""
    seen = history.get(case.case_id)
    if seen and "observation_s" in seen:
        gate = seen.get("gate_s", FIRST_GUESS[plan.device["kind"]]["gate_s"])
        return Estimate(observation_s=seen["observation_s"], gate_s=gate, source="earlier runs")
    guess, measure = FIRST_GUESS[plan.device["kind"]], plan.measure
    step = case.flops_per_step_executed / guess["flops_per_s"]
    busy = max(measure["warmup_s"], 3 * step) + plan.suite["values"] * max(measure["value_s"], step)
    gate = guess["gate_s"] + 3 * plan.suite["parity_steps"] * step
    return Estimate(observation_s=guess["observation_s"] / 2 + busy, gate_s=gate, source="estimate")


def total_seconds(plan: Plan, rounds: int, history: Mapping[str, Mapping[str, float]]) -> float:
    total = 0.0
    for case in itertools.chain.from_iterable(plan.groups.values()):
        one = estimate(case, plan, history)
        total += one.gate_s + rounds * one.observation_s
    return total


def orders(names: Iterable[str], rounds: int, seed: int) -> list[list[str]]:
    """Order of the arms in each round. Up to three arms: every permutation once before any twice, shuffled;
    more: a Williams design (every arm follows every other equally often), rows shuffled."""
    import random

    generator, arms = random.Random(f"order:{seed}"), list(names)
    rows = [list(p) for p in itertools.permutations(arms)] if len(arms) <= 3 else williams(arms)
    out: list[list[str]] = []
    while len(out) < rounds:
        block = rows[:]
        generator.shuffle(block)
        out += block
    return out[:rounds]


def williams(arms: list[str]) -> list[list[str]]:
    """Latin square balanced for first-order carry-over (Williams 1949); doubled by reversal for odd n."""
    n = len(arms)
    first = [0] + [(i + 1) // 2 if i % 2 else n - i // 2 for i in range(1, n)]
    square = [[arms[(x + shift) % n] for x in first] for shift in range(n)]
    return square if n % 2 == 0 else square + [row[::-1] for row in square]


def write_atomic(path: Path, text: str) -> None:
    """Temporary name, fsync, rename: a reader sees the old file or the whole new one."""
    import os

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
