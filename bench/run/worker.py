"""The worker of Python stacks: reads a job, drives one `Trainer`, reports by JSON lines (bench.protocol).

    python -m bench.run.worker JOB.json

It knows no framework: the stack's module, found by the path in the job, imports its own. Everything that a
number depends on (when a value starts and ends, what is waited for, when warm-up is over) is in this file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import numpy as np

from stacks.train import spec

Job = Mapping[str, Any]


class Refusal(Exception):
    """A reason of `protocol.ERROR_KINDS` for which this case has no number here."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Channel:
    """JSON lines on the process's standard output; whatever else prints there goes to standard error."""

    def __init__(self) -> None:
        self.file: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.start_ns = time.perf_counter_ns()

    def send(self, type_: str, **fields: Any) -> None:
        self.file.write(json.dumps({"type": type_, **fields}, allow_nan=False) + "\n")

    def event(self, name: str) -> None:
        self.send("event", name=name, t_ns=time.perf_counter_ns() - self.start_ns)

    def metric(self, metric: str, value: float | None, unit: str, *, phase: str = "", **extra: Any) -> None:
        if value is not None and not np.isfinite(value):
            value = None
        row = {"source": "measured", "censored": False, **extra}
        self.send("metric", metric=metric, value=value, unit=unit, phase=phase, **row)


def load_stack(path: str) -> ModuleType:
    """The stack's module, from its file (inside the package or anywhere else)."""
    file = Path(path)
    location = importlib.util.spec_from_file_location(f"stackbench_stack_{file.stem}", file)
    if location is None or location.loader is None:
        raise Refusal("bad job", f"stack file {file.name} cannot be loaded as Python")
    module = importlib.util.module_from_spec(location)
    sys.modules[location.name] = module  # dataclasses of the module look themselves up there
    location.loader.exec_module(module)
    return module


def read_batches(job: Job) -> np.ndarray:
    """int32 [n, batch, sequence + 1], checked against the job's hash."""
    row = job["batches"]
    data = Path(row["path"]).read_bytes()
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise Refusal("bad job", "the batches do not have the hash that the plan recorded")
    return np.frombuffer(data, np.int32).reshape(row["shape"])


# ------------------------------------------------------------------------------------------------ timing
def timed_value(trainer: Any, steps: int, start: int, *, every_step: bool) -> int:
    """Wall nanoseconds of `steps` steps enqueued without read-back, closed by one wait for all outputs."""
    begin = time.perf_counter_ns()
    for i in range(start, start + steps):
        trainer.step(i)
        if every_step:
            trainer.wait()
    trainer.wait()
    return time.perf_counter_ns() - begin


def trend(values: Sequence[float]) -> float:
    """Relative change over the values if they move one way throughout, else 0.

    Noise goes up and down; a warm-up that is not over goes one way.
    """
    steps = [b - a for a, b in itertools.pairwise(values)]
    if all(s > 0 for s in steps) or all(s < 0 for s in steps):
        return abs(values[-1] - values[0]) / statistics.median(values)
    return 0.0


class Clock:
    """Times values of K steps one after another over rotating batches, and sends each as a message."""

    def __init__(self, trainer: Any, job: Job, channel: Channel, done: int) -> None:
        self.trainer, self.channel = trainer, channel
        self.steps = int(job["steps_per_value"])
        self.every_step = job["axes"]["sync"] == "every-step"
        self.next_step, self.index = done, 0

    def value(self, *, warmup: bool) -> float:
        wall_ns = timed_value(self.trainer, self.steps, self.next_step, every_step=self.every_step)
        self.next_step += self.steps
        loss = self.trainer.loss()  # read once a value, outside the timed window
        if not np.isfinite(loss):
            raise Refusal("crash", f"the loss is {loss} after {self.next_step} steps")
        self.channel.send(
            "value", index=self.index, warmup=warmup, steps=self.steps, wall_ns=wall_ns, device_ns=None,
            loss=loss,
        )  # fmt: skip
        self.index += 1
        return wall_ns / 1e9


def warm_up(clock: Clock, rule: Mapping[str, float]) -> None:
    """Values until `seconds` of busy time have passed and the last `window` show no trend above `trend`.

    Raises Refusal("not steady") when `max_seconds` have passed first.
    """
    busy, values = 0.0, []
    while True:
        values.append(clock.value(warmup=True))
        busy += values[-1]
        last = values[-int(rule["window"]) :]
        if len(last) < rule["window"]:
            continue
        if busy >= rule["seconds"] and trend(last) <= rule["trend"]:
            return
        if busy >= rule["max_seconds"]:
            raise Refusal(
                "not steady",
                f"after {busy:.1f} s of warm-up the last {len(last)} values still move one way by "
                f"{trend(last):.1%} (limit {rule['trend']:.0%})",
            )


def run_timed(trainer: Any, job: Job, channel: Channel) -> None:
    from bench.capture import nvml

    first_step(trainer, channel)
    clock = Clock(trainer, job, channel, done=1)
    warm_up(clock, job["warmup"])
    cpu, wall = time.process_time(), time.perf_counter()
    with nvml.Window(job["device"]) as window:
        for _ in range(int(job["values"])):
            clock.value(warmup=False)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    channel.metric("cpu_seconds_per_second", cpu / wall, "1", phase="values")
    for row in window.metrics():
        channel.send("metric", **{"phase": "values", "source": "measured", "censored": False, **row})


def first_step(trainer: Any, channel: Channel) -> None:
    """The first step's wall time, compilation and lazy initialisation included."""
    begin = time.perf_counter_ns()
    trainer.step(0)
    trainer.wait()
    seconds = (time.perf_counter_ns() - begin) / 1e9
    built = channel.start_ns
    channel.send("compiled", first_step_s=seconds, build_s=(begin - built) / 1e9)


def memory_metrics(trainer: Any, channel: Channel) -> None:
    for name, value in trainer.memory().items() if hasattr(trainer, "memory") else ():
        channel.metric(name, value, "bytes", phase="steady")
    channel.metric("pss_bytes", pss_bytes(), "bytes", phase="steady")


def pss_bytes() -> float | None:
    """Proportional set size of this process, or null where the kernel does not tell."""
    try:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return float(line.split()[1]) * 1024
    except OSError:
        return None
    return None


# ---------------------------------------------------------------------------------------------- the gate
PROBE_SIZE = 256
PROBE_LIMITS = {  # relative error of one product with float64: rounding of the inputs to 24, 11, 8 bits
    "ieee": (0.0, 5e-6),
    "tf32": (5e-5, 2e-3),
    "bfloat16": (5e-4, 2e-2),
}


def probe_precision(trainer: Any, axes: Mapping[str, Any], channel: Channel) -> None:
    """Proves the matmul precision in force by one product's error; raises Refusal where it is another."""
    bits = spec.hash_bits("probe", 0, 2 * PROBE_SIZE**2)
    a, b = (bits.astype(np.float32) / 2**31 - 1).reshape(2, PROBE_SIZE, PROBE_SIZE)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = float(np.linalg.norm(trainer.product(a, b) - exact) / np.linalg.norm(exact))
    table = spec.PRECISION[axes["precision"]]
    wanted = table["matmul"] if table["weights_used"] == "float32" else table["weights_used"]
    low, high = PROBE_LIMITS[wanted]
    channel.metric("matmul_relative_error", error, "1", phase="probe")
    channel.send("manifest", facts={"precision_probe": f"{wanted}: relative error {error:.1e}"})
    if not low <= error <= high:
        seen = min(PROBE_LIMITS, key=lambda k: abs(np.log(error + 1e-12) - np.log(PROBE_LIMITS[k][1])))
        raise Refusal(
            "unsupported",
            f"precision {axes['precision']} asks for {wanted} products, but this device's error of "
            f"{error:.1e} is that of {seen}: the setting is not in force here",
        )


def summarize(
    kind: str, tensors: Iterator[tuple[str, np.ndarray]], rule: Mapping[str, Any]
) -> dict[str, Any]:
    """Elements at the shared indices, and norm and mean of the whole, float64."""
    out = {}
    for name, value in tensors:
        flat = np.ascontiguousarray(value).reshape(-1).astype(np.float64)
        index = spec.sample_indices(name, flat.size, rule["sample"], rule["whole_up_to"])
        out[f"{kind}/{name}"] = flat[index]
        out[f"{kind}_norm/{name}"] = np.array([np.linalg.norm(flat), flat.mean() if flat.size else 0.0])
    return out


def run_gate(trainer: Any, job: Job, channel: Channel, first: bool) -> None:
    """`parity.steps` steps, each loss read; the first moments after step 1, the weights at the end."""
    from safetensors.numpy import save_file

    rule, out, losses, ids, margins = job["parity"], {}, [], [], []
    for i in range(rule["steps"]):
        if i == 0 and first:
            first_step(trainer, channel)
        else:
            trainer.step(i)
            trainer.wait()
        losses.append(trainer.loss())
        if i == 0:
            scale = 1 - spec.OPTIMIZER.beta1
            moments = ((n, np.asarray(m, np.float64) / scale) for n, m in trainer.first_moments())
            out.update(summarize("gradient", moments, rule))
        routing = trainer.routing()
        if routing is not None:
            ids.append(routing[0])
            margins.append(routing[1])
    out["loss"] = np.array(losses)
    out.update(summarize("weight", trainer.weights(), rule))
    if ids:
        out["routing/ids"], out["routing/margin"] = np.stack(ids), np.stack(margins).astype(np.float32)
    save_file(out, rule["out"])
    channel.event("gate")


def check_dropout(trainer: Any, axes: Mapping[str, Any], channel: Channel) -> None:
    """The timed step's own generator: rate, scale, forward mask = backward mask, independent masks."""
    rate, count = axes["dropout"], 65536
    keys = [(step, site) for step in (0, 1) for site in spec.dropout_sites(trainer.model)[:3]]
    masks = []
    for step, site in keys:
        forward, backward = trainer.dropout_sample(step, site, count)
        if not np.array_equal(forward, backward):
            raise Refusal("crash", f"dropout at {site}: the backward mask is not the forward mask")
        kept = forward != 0
        if not np.allclose(forward[kept], 1 / (1 - rate), rtol=1e-5):
            raise Refusal("crash", f"dropout at {site}: kept elements are not scaled by 1 / (1 - {rate})")
        masks.append(kept.astype(np.float64) - (1 - rate))
    sigma = np.sqrt(rate * (1 - rate) / count)
    worst_rate = max(abs(m.mean()) / sigma for m in masks)
    pairs = [(a * b).mean() for i, a in enumerate(masks) for b in masks[i + 1 :]]
    worst_pair = max(abs(p) for p in pairs) / (rate * (1 - rate) / np.sqrt(count))
    channel.metric("dropout_rate_sigmas", float(worst_rate), "1", phase="gate")
    channel.metric("dropout_correlation_sigmas", float(worst_pair), "1", phase="gate")
    if max(worst_rate, worst_pair) > 5:
        raise Refusal(
            "crash",
            f"dropout: rate off by {worst_rate:.1f} sigma, or masks of two sites or steps correlated by "
            f"{worst_pair:.1f} sigma (limit 5)",
        )


def calibrate(trainer: Any, seconds: float, done: int, channel: Channel) -> None:
    """Step time for choosing K: the fastest of growing windows, not a result."""
    steps, best, spent = 1, float("inf"), 0.0
    while spent < seconds:
        wall = timed_value(trainer, steps, done, every_step=False) / 1e9
        done += steps
        spent += wall
        best = min(best, wall / steps)
        steps = min(2 * steps, 64)
    channel.metric("step_s", best, "s", phase="calibration")


def run_parity(make: Any, job: Job, channel: Channel) -> None:
    """Cold compilation of the timed step, the gate's steps, facts of the manifest.

    Where the gate needs nothing from outside (no dropout, no experts) its steps are the timed step itself,
    the very executable that is timed later.
    """
    axes, rule = job["axes"], job["parity"]
    special = axes["dropout"] > 0 or job["model"]["family"] == "moe"
    trainer = make(gate=special and not rule["calibrate"])
    probe = hasattr(trainer, "product") and job["stack"] != "reference"
    if probe:
        probe_precision(trainer, axes, channel)
    if rule["calibrate"] and special:
        first_step(trainer, channel)
        calibrate(trainer, rule["calibrate"], 1, channel)
        report_facts(trainer, channel)
        if axes["dropout"] > 0:
            check_dropout(trainer, axes, channel)
        del trainer
        trainer = make(gate=True)
        run_gate(trainer, job, channel, first=False)
        return
    run_gate(trainer, job, channel, first=True)
    if rule["calibrate"]:
        calibrate(trainer, rule["calibrate"], rule["steps"], channel)
    report_facts(trainer, channel)


def report_facts(trainer: Any, channel: Channel) -> None:
    channel.send("manifest", facts={k: str(v) for k, v in trainer.manifest().items()})
    dtypes = {f"dtype.{k}": ", ".join(v) for k, v in trainer.dtypes().items()}
    channel.send("manifest", facts=dtypes)


# ------------------------------------------------------------------------------------------------- main
def work(job: Job, channel: Channel) -> None:
    channel.event("ready")
    module = load_stack(job["stack_file"])
    model, batches = spec.from_job(job["model"]), read_batches(job)
    routing_path = (job["parity"] or {}).get("routing_in")
    routing = np.load(routing_path, allow_pickle=False) if routing_path else None

    def make(*, gate: bool) -> Any:
        trainer = module.Trainer(
            model=model, axes=dict(job["axes"]), options=dict(job["options"]), device=job["device"],
            batches=batches, seed=job["seed"], threads=job["threads"], gate=gate,
            routing=routing if gate else None,
        )  # fmt: skip
        channel.event("built")
        return trainer

    if job["kind"] == "parity":
        run_parity(make, job, channel)
    elif job["kind"] == "timed":
        trainer = make(gate=False)
        run_timed(trainer, job, channel)
        memory_metrics(trainer, channel)
    else:
        raise Refusal("bad job", f"kind {job['kind']!r} is none of timed, parity")
    describe_process(channel)


def describe_process(channel: Channel) -> None:
    """pyperf's metadata of this process, and the versions of the libraries really loaded."""
    import pyperf

    from bench.capture import libraries

    facts = pyperf.Run([1.0], collect_metadata=True).get_metadata()
    channel.send("manifest", facts={f"pyperf.{k}": v for k, v in facts.items() if k != "hostname"})
    channel.send("manifest", facts={f"library.{k}": v for k, v in libraries.loaded().items()})


def error_kind(error: BaseException) -> str:
    if isinstance(error, Refusal):
        return error.kind
    name, text = type(error).__name__, str(error)
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "RESOURCE_EXHAUSTED" in text:
        return "out of memory"
    if isinstance(error, RuntimeError) and "can't allocate memory" in text:
        return "out of memory"
    return "crash"


def main(argv: list[str], work: Callable[[Job, Channel], None] = work) -> int:
    """Runs the job of a file; another kind of worker gives its own `work`."""
    channel = Channel()
    try:
        job = json.loads(Path(argv[0]).read_text())
        work(job, channel)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        message = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {lines[0]}"
        channel.send("error", kind=error_kind(error), message=message[:2000])
        return 1
    channel.send("done")
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(code)  # everything is said: a framework's teardown may take seconds, and tells nothing
