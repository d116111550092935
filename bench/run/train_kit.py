"""What training cases need on disk and in their job: token batches, the optimizer's constants, warm-up."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import plan as planning
from stacks.train import spec

if TYPE_CHECKING:
    from bench.run.observe import Context, Request

Row = dict[str, Any]
NOT_STORED = ("lr", "parameters")  # of a job: long, and follow from the rest


def prepare(
    plan: planning.Plan, cases: Sequence[planning.Case], inputs: Path, cache_dir: Path, say: Any
) -> Row:
    """Real batches of a group, on disk with their hash: the group's row of the session's `inputs`."""
    from bench import corpus

    case = cases[0]
    batches = corpus.prepare_batches(
        n=int(plan.suite["parity_steps"]), batch=case.axes["batch"], sequence=case.axes["sequence"],
        vocab=case.model["vocab"], seed=plan.suite["seed"], out_dir=inputs, cache_dir=cache_dir,
        corpus=path_of(plan.suite["corpus"]), tokenizer=path_of(plan.suite["tokenizer"]),
    )  # fmt: skip
    return {
        "file": batches.path.name, "sha256": batches.sha256, "shape": list(batches.shape),
        "dtype": "int32", "provenance": batches.provenance,
    }  # fmt: skip


def ready(row: Mapping[str, Any], inputs: Path) -> bool:
    """Whether what `prepare` put there is there still."""
    return Path(inputs, row["file"]).exists()


def path_of(text: str | None) -> Path | None:
    return Path(text) if text else None


def cpus(context: Context, case: planning.Case) -> list[int]:
    """The CPUs that a worker of the case is bound to."""
    return list(context.session["cpus"])


def variables(job: Mapping[str, Any]) -> dict[str, str]:
    """Environment variables of the worker, before those of stack and arm."""
    return {}


def job(context: Context, request: Request, directory: Path) -> Row:
    """The part of a job that is training's own: see bench.protocol."""
    case, suite, measure = request.case, context.plan.suite, context.plan.measure
    model = request.model or case.model
    batches = request.batches or context.session["inputs"][case.group]
    foreign, shape = context.stack(case, request.stack).argv, spec.from_job(model)
    parity = dict(request.parity) if request.parity else None
    if parity is not None:
        parity = {"routing_in": None, "routing_out": None, "calibrate": 0.0, **parity}
        parity.update(out=str(directory / "parity.safetensors"), sample=4096, whole_up_to=65536)
    return {
        "model": model,
        "batches": {**batches, "path": str(context.out.resolve() / "inputs" / batches["file"])},
        "init": None, "lr": [float(x) for x in spec.lr_table()] if foreign else None,
        "optimizer": {**dataclasses.asdict(spec.OPTIMIZER),
                      "decayed": [p.name for p in spec.parameters(shape) if p.decay]},
        "parameters": [{"name": p.name, "shape": p.shape, "init": p.init, "std": p.std,
                        "seed": spec.path_seed(p.name, suite["seed"]), "scale": spec.uniform_scale(p.std)}
                       for p in spec.parameters(shape)] if foreign else None,
        "warmup": {"seconds": measure["warmup_s"], "max_seconds": measure["warmup_max_s"],
                   "trend": suite["warmup_trend"], "window": 3},
        "values": suite["values"], "parity": parity,
    }  # fmt: skip


def problem(job: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
    """How what a timed worker did is other work than the job asked for; empty if it is not."""
    other = {m["steps"] for m in messages if m["type"] == "value"} - {job["steps_per_value"]}
    return f"crash: values of {min(other)} steps instead of {job['steps_per_value']}" if other else ""


@contextlib.contextmanager
def watched(job: Mapping[str, Any]) -> Iterator[None]:
    """Around a worker's life: nothing is watched from outside."""
    yield None
