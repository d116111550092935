"""Suite + devices -> cases. Pure: it runs nothing, imports no stack, and knows devices it has never seen."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench import domains, registry
from bench.devices import Device
from bench.errors import UserError
from bench.suite import ArmSpec, Suite, arm

SCHEMA_VERSION = 1


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
    flops_per_step: int | None
    flops_per_step_noncausal: int | None
    flops_per_step_executed: int | None
    memory_lower_bound_bytes: int | None
    memory_predicted_bytes: int | None
    skip: str | None = None
    grid: dict[str, list[Any]] = dataclasses.field(default_factory=dict)  # options that the gate calibrates


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
    found: dict[str, Case] = {}
    unused = dict.fromkeys(overrides or {})
    for matrix in suite.matrix:
        for workload in [matrix.workload] if isinstance(matrix.workload, str) else matrix.workload:
            domain, model = domains.find(
                f"suite {suite.name}", workload, paths, f"stackbench plan {suite.name}"
            )
            mine = {name: value for name, value in (overrides or {}).items() if name in domain.axes}
            for name in mine:
                unused.pop(name, None)
            stacks = registry.stacks(domain.name, paths)
            arms = {a: arm(suite, a, stacks) for a in matrix.arms}
            for axes in points(suite, domain, workload, model, {**matrix.axes, **mine}, device):
                common = common_facts(domain, workload, model, axes)
                for name, the_arm in arms.items():
                    stack = stacks[the_arm.stack]
                    case = make_case(suite, name, the_arm, stack, common, device, check_installed)
                    first = found.setdefault(case.case_id, case)
                    if first.arm != name:
                        raise UserError(
                            f"suite {suite.name}: arms {first.arm!r} and {name!r} are both written "
                            f"{case.case_id}: rename one"
                        )
    if unused:
        raise UserError(
            f"--set {next(iter(unused))}: no workload of suite {suite.name} has this axis",
            valid=sorted({n for case in found.values() for n in case.axes}),
            next_command=f"stackbench plan {suite.name}",
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


def points(
    suite: Suite, domain: domains.Domain, workload: str, model: Any, axes: Mapping[str, Any], device: Device
) -> Iterator[dict[str, Any]]:
    """Every combination of the axes, resolved."""
    choices = [value if isinstance(value, list) else [value] for value in axes.values()]
    for point in itertools.product(*choices):
        try:
            yield domain.resolve(workload, model, dict(zip(axes, point, strict=True)), device.kind)
        except ValueError as error:
            raise UserError(
                f"suite {suite.name}: {workload}: {error}", next_command=f"stackbench plan {suite.name}"
            ) from None


def common_facts(domain: domains.Domain, workload: str, model: Any, axes: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Case that are the same for all arms of a group."""
    shape, slug = domain.shape(model), domain.slug_of(workload, axes)
    return {
        "group": f"{slug}.{digest({'workload': workload, 'model': shape, 'axes': axes})}",
        "workload": workload, "model": shape, "axes": axes,
        **dict.fromkeys(domains.CASE_FACTS), **domain.facts(model, axes),
    }  # fmt: skip


def make_case(
    suite: Suite, name: str, the_arm: ArmSpec, stack: registry.Stack, common: Mapping[str, Any],
    device: Device, check_installed: bool,
) -> Case:  # fmt: skip
    options = {**stack.variants[the_arm.variant], **the_arm.options}
    grid = grid_of(suite, the_arm, stack)
    identity = {k: common[k] for k in ("workload", "model", "axes")}
    identity.update(stack=stack.name, options={"grid": grid} if grid else options)
    slug = common["group"].rpartition(".")[0]
    written = f"{slug}.{name.replace(':', '-')}"
    if not re.fullmatch(r"[\w.=+-]+", written):  # it names files
        raise UserError(
            f"{written!r}: a name of a workload or an arm has a character that a case id cannot have",
            valid=["letters", "digits", ". _ = + -"],
        )
    interpreter = interpreter_of(the_arm, stack)
    return Case(
        case_id=f"{written}.{digest(identity)}", arm=name, stack=stack.name, stack_file=str(stack.file),
        variant=the_arm.variant, options=options,
        interpreter=str(interpreter) if interpreter else None, variables=dict(the_arm.variables), grid=grid,
        skip=skip_reason(stack, the_arm, common, device, check_installed), **common,
    )  # fmt: skip


def grid_of(suite: Suite, the_arm: ArmSpec, stack: registry.Stack) -> dict[str, list[Any]]:
    """The options of a stack that the gate calibrates: its whole grid, for the arm that asks for no point."""
    chosen = the_arm.options or the_arm.variant != "default"
    if not suite.calibrate or chosen or not domains.DOMAINS[stack.domain].calibrated:
        return {}
    return {name: list(values) for name, values in stack.options.items()}


def interpreter_of(the_arm: ArmSpec, stack: registry.Stack) -> Path | None:
    """The arm's own, else that of the stack's environment; None for the timed environment."""
    if the_arm.interpreter is not None or not stack.environment:
        return the_arm.interpreter
    return registry.environment(stack.environment) / "bin" / "python"


def skip_reason(
    stack: registry.Stack, the_arm: ArmSpec, common: Mapping[str, Any], device: Device, check_installed: bool
) -> str | None:
    """Why this case cannot run, as far as the plan can know; None where it can."""
    axes, lower = common["axes"], common["memory_lower_bound_bytes"]
    if device.kind not in stack.devices:
        return f"{stack.name} does not run on a {device.kind} device"
    for axis, by_kind in stack.axes.items():
        valid = by_kind.get(device.kind)
        if valid is not None and axes[axis] not in valid:
            return f"{stack.name} has no {axis} = {axes[axis]} on a {device.kind} device (it has {valid})"
    if refused := domains.DOMAINS[stack.domain].refusal(axes, device):
        return refused
    if device.memory_bytes is not None and lower is not None and lower > device.memory_bytes:
        return (
            f"needs at least {lower / 2**30:.1f} GiB (weights, gradients, moments, logits); "
            f"the device has {device.memory_bytes / 2**30:.1f} GiB"
        )
    if not check_installed:
        return None
    if missing := not_installed(stack, the_arm, device):
        return missing
    for need in stack.needs:
        if not compiler(need):
            return f"no {need} found: apt-get install build-essential"
    return None


def not_installed(stack: registry.Stack, the_arm: ArmSpec, device: Device) -> str | None:
    """What of the stack's environment is missing, and what to type; None where all is there."""
    wanted = stack.requires + (stack.requires_cuda if device.kind == "cuda" else ())
    if the_arm.interpreter is not None:
        if not the_arm.interpreter.exists():
            return f"interpreter {the_arm.interpreter} does not exist"
        return None
    if not stack.environment:
        missing = [name for name in wanted if not installed(name)]
        how = stack.install or "see the file of the stack"
        return f"{', '.join(missing)} not installed: {how}" if missing else None
    how = stack.install or f"make setup-{stack.environment.partition('-')[0]}"
    place = registry.environment(stack.environment)
    if not (place / "bin" / "python").exists():
        return f"the environment {stack.environment!r} is not set up: {how}"
    missing = [name for name in wanted if normal(name) not in distributions(place)]
    if missing:
        return f"{', '.join(missing)} not installed in the environment {stack.environment!r}: {how}"
    return None


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


LAYER = re.compile(r"addsitedir\('([^']+)'\)")  # how bench.bootstrap layers one environment on another


@lru_cache(maxsize=16)
def distributions(environment: Path) -> frozenset[str]:
    """Names of what an environment and its .pth files hold, without starting its interpreter."""
    places = list(environment.glob("lib*/python3*/site-packages"))
    for path in [p for place in places for p in place.glob("*.pth")]:
        lines = path.read_text(errors="replace").splitlines()
        added = [m[1] if (m := LAYER.search(line)) else line for line in lines]
        places += [Path(line) for line in added if line.startswith("/") and Path(line).is_dir()]
    found = {p.name for place in places for p in place.glob("*.dist-info")}
    return frozenset(normal(name.removesuffix(".dist-info").rpartition("-")[0]) for name in found)


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
@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    observation_s: float
    gate_s: float
    source: str  # "earlier runs" | "estimate"


def estimate(case: Case, plan: Plan, history: Mapping[str, Mapping[str, float]]) -> Estimate:
    """Seconds of one observation and of the gate: from earlier runs of the case, else a stated guess."""
    guess = domains.of(case.workload).guess(case, plan.suite, plan.measure, plan.device["kind"])
    seen = history.get(case.case_id)
    if seen and "observation_s" in seen:
        gate = seen.get("gate_s", guess.gate_s)
        return Estimate(observation_s=seen["observation_s"], gate_s=gate, source="earlier runs")
    return Estimate(observation_s=guess.observation_s, gate_s=guess.gate_s, source="estimate")


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
