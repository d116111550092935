"""What differs between kinds of work, in one table: the rest of the harness asks here and nowhere else.

A workload is `<domain>/<name>`. Its domain says what its axes are and how they resolve, what a case id shows
of them, what a step costs, and which modules gate it, feed it and run it. A new kind of work is one entry of
`DOMAINS`, its specification `stacks/<domain>/spec.py`, a gate, a kit and a worker.

The modules of a domain are named, not imported: planning stays light.
    worker   `python -m … JOB.json`: bench.protocol
    gate     run_gate(out, group): proves a group's arms equal, writes gates/<session>.<group>.json
    kit      prepare(…), ready(…): a group's input on disk; job(…): its own part of a job file
    details  run_details(out, group): what is observed apart, after the rounds; "" where there is nothing
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.devices import Device
from bench.errors import UserError, did_you_mean
from stacks.load import spec as load_spec
from stacks.train import spec as train_spec
from stacks.train.spec import Axis

CASE_FACTS = (  # of a case, null where the domain has no such thing
    "flops_per_step", "flops_per_step_noncausal", "flops_per_step_executed", "memory_lower_bound_bytes",
    "memory_predicted_bytes",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Domain(abc.ABC):
    """One kind of work."""

    name: str
    axes: Mapping[str, Axis]
    slug: tuple[str, ...]  # axes that every case id shows, in order
    step: str  # what one step is called
    worker: str
    gate: str
    kit: str
    details: str = ""
    calibrated: bool = False  # a stack's options are a grid to choose the best point of

    @abc.abstractmethod
    def workloads(self, paths: Iterable[Path]) -> dict[str, Any]:
        """By name: whatever `resolve` and `facts` need to know of it."""

    @abc.abstractmethod
    def resolve(self, workload: str, model: Any, axes: Mapping[str, Any], device_kind: str) -> dict[str, Any]:
        """All axes in canonical order. Raises ValueError that names the axis, the value and what is valid."""

    def shape(self, model: Any) -> dict[str, Any]:
        """What the case id hashes of the workload beside its name and axes."""
        return {}

    @abc.abstractmethod
    def facts(self, model: Any, axes: Mapping[str, Any]) -> dict[str, Any]:
        """tokens_per_step, and those of CASE_FACTS that are known."""

    def refusal(self, axes: Mapping[str, Any], device: Device) -> str:
        """Why no stack can do this on the device; empty where one may."""
        return ""

    @abc.abstractmethod
    def guess(self, case: Any, suite: Mapping[str, Any], measure: Mapping[str, float], kind: str) -> Guess:
        """Seconds of an observation and of the gate, without any earlier run."""

    def module(self, role: str) -> ModuleType:
        """The gate, kit, details or worker, imported."""
        return importlib.import_module(getattr(self, role))

    def show(self, axis: str, value: Any) -> str:
        """An axis that stands in every case id, as that id shows it."""
        return f"{axis[0]}{value}" if axis in ("batch", "sequence") else str(value)

    def slug_of(self, workload: str, axes: Mapping[str, Any]) -> str:
        """`gpt-tiny.b8-s64-fp32`, and every axis that is not at its default."""
        parts = [self.show(name, axes[name]) for name in self.slug]
        others = (n for n, axis in self.axes.items() if n not in self.slug and axes[n] != axis.default)
        return f"{workload.split('/', 1)[1]}.{'-'.join([*parts, *(f'{n}={axes[n]}' for n in others)])}"


@dataclasses.dataclass(frozen=True, slots=True)
class Guess:
    observation_s: float
    gate_s: float


# -------------------------------------------------------------------------------------------------- training
FIRST_GUESS = {  # seconds, measured on a 2-core machine (facts: 4-7 s an observation), without a history
    "cpu": {"observation_s": 8.0, "gate_s": 25.0, "flops_per_s": 6e10},
    "cuda": {"observation_s": 30.0, "gate_s": 60.0, "flops_per_s": 2e14},
}


@lru_cache(maxsize=256)
def _shape(model: train_spec.Model) -> dict[str, Any]:
    return dict(dataclasses.asdict(model))


class Train(Domain):
    """Training steps of a model."""

    def workloads(self, paths: Iterable[Path]) -> dict[str, Any]:
        from bench import registry

        return {f"train/{name}": model for name, model in registry.train_models(paths).items()}

    def resolve(self, workload: str, model: Any, axes: Mapping[str, Any], device_kind: str) -> dict[str, Any]:
        return train_spec.resolve_axes(model, axes, device_kind)

    def shape(self, model: Any) -> dict[str, Any]:
        return _shape(model)

    def facts(self, model: Any, axes: Mapping[str, Any]) -> dict[str, Any]:
        tokens, t = train_spec.tokens_per_step(axes), int(axes["sequence"])
        return {
            "tokens_per_step": tokens,
            "flops_per_step": tokens * train_spec.flops_per_token(model, t),
            "flops_per_step_noncausal": tokens * train_spec.flops_per_token(model, t, causal=False),
            "flops_per_step_executed": tokens * train_spec.flops_per_token(model, t, executed=True),
            "memory_lower_bound_bytes": train_spec.memory_lower_bound_bytes(model, axes),
            "memory_predicted_bytes": train_spec.memory_predicted_bytes(model, axes),
        }  # fmt: skip

    def guess(self, case: Any, suite: Mapping[str, Any], measure: Mapping[str, float], kind: str) -> Guess:
        guess = FIRST_GUESS[kind]
        step = case.flops_per_step_executed / guess["flops_per_s"]
        busy = max(measure["warmup_s"], 3 * step) + suite["values"] * max(measure["value_s"], step)
        return Guess(guess["observation_s"] / 2 + busy, guess["gate_s"] + 3 * suite["parity_steps"] * step)


# --------------------------------------------------------------------------------------------------- loading
BYTES_PER_S = {"fast": 4e7, "hf": 3e6}  # of text, a loader's on one core, as a first guess


class Load(Domain):
    """Batches of tokens from text on disk."""

    def workloads(self, paths: Iterable[Path]) -> dict[str, Any]:
        return {name: name for name in load_spec.WORKLOADS}

    def resolve(self, workload: str, model: Any, axes: Mapping[str, Any], device_kind: str) -> dict[str, Any]:
        return load_spec.resolve_axes(workload, axes)

    def shape(self, model: Any) -> dict[str, Any]:
        return {"vocab": load_spec.VOCAB}

    def facts(self, model: Any, axes: Mapping[str, Any]) -> dict[str, Any]:
        return {"tokens_per_step": load_spec.tokens_per_step(axes)}

    def refusal(self, axes: Mapping[str, Any], device: Device) -> str:
        if device.kind == "cpu" and device.cpus is not None and axes["cores"] > device.cpus:
            return f"cores = {axes['cores']}: this machine has {device.cpus} CPUs"
        return ""

    def guess(self, case: Any, suite: Mapping[str, Any], measure: Mapping[str, float], kind: str) -> Guess:
        once = 2.0 + case.axes["megabytes"] * 1e6 / BYTES_PER_S[case.axes["tokenizer"]]
        points = sum(map(len, case.grid.values()))  # the search tries about so many
        return Guess(once, 6.0 + 4.0 * points)


DOMAINS: dict[str, Domain] = {
    domain.name: domain
    for domain in (
        Train(
            name="train", axes=train_spec.AXES, slug=("batch", "sequence", "precision"), step="step",
            worker="bench.run.worker", gate="bench.run.gate", kit="bench.run.train_kit",
        ),
        Load(
            name="load", axes=load_spec.AXES, slug=load_spec.SLUG, step="batch",
            worker="bench.run.load_worker", gate="bench.run.load_gate", kit="bench.run.load_kit",
            details="bench.run.load_details", calibrated=True,
        ),
    )
}  # fmt: skip
AXES: dict[str, Axis] = {name: axis for domain in DOMAINS.values() for name, axis in domain.axes.items()}


def of(workload: str) -> Domain:
    """The domain of a workload. Raises KeyError for a domain that there is not."""
    return DOMAINS[workload.partition("/")[0]]


def named(workload: str) -> str:
    """The name of a workload's domain, or what stands in its place."""
    return workload.partition("/")[0]


def find(place: str, workload: str, paths: Sequence[Path], next_command: str) -> tuple[Domain, Any]:
    """Domain and model of a workload. Raises UserError naming it, the place and the workloads there are."""
    domain = DOMAINS.get(named(workload))
    known = domain.workloads(paths) if domain else {}
    if domain is None or workload not in known:
        valid = list(known) or [name for d in DOMAINS.values() for name in d.workloads(paths)]
        message = f"{place}: unknown workload {workload!r}{did_you_mean(workload, valid)}"
        raise UserError(message, valid=valid, next_command=next_command)
    return domain, known[workload]
