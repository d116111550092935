"""What passes between the harness and a worker: one JSON file in, JSON lines and one safetensors file out.

A worker is a command in any language: `argv… JOB.json`. It reads the job, writes one JSON object a line to
standard output, anything else to standard error, and exits 0 after `done`. CONTRIBUTING.md walks through it.

The job
    protocol          1
    kind              "timed" | "parity"
    run_id, case_id, workload ("train/gpt-tiny"), stack ("torch-eager")
    model             the fields of `stacks.train.spec.Model`
    axes, options     of the case; every axis is present
    device            "cpu" | "cuda:0"
    threads, cpus     size of every thread pool, and the CPUs the process is bound to already
    seed              of the initial values and of the stack's own dropout generator
    batches           {path, sha256, shape: [n, batch, sequence + 1], dtype: "int32"}: raw little-endian;
                      step i (from 0) trains on batch i mod n, inputs [:, :-1], targets [:, 1:]
    init              {path, parameters: [{name, shape, offset}]} or null: raw float32 initial values, for
                      workers that do not hash them themselves
    lr                learning rate of step 1, 2, …; the last one holds for all later steps
    optimizer         beta1, beta2, eps, decay, clip, clip_eps; decayed: names of the decayed parameters
    warmup            {seconds, max_seconds, trend, window}: see `bench.run.worker.warm_up`
    steps_per_value   K, equal for all arms of a round
    values            V
    parity            null, or {steps, out, sample, whole_up_to, routing_in, routing_out}
    rank, world_size, rendezvous

The job of a loader (workload "load/…") has, from `model` to `parity`, these instead
    kind              "timed" | "calibration" | "parity" | "prepare" | "consumer" | "breakdown" | "gil"
    files, format     what to read, in order; for format "text" directories of .txt files
    tokenizer, end    path of tokenizer.json, id of end-of-text
    text, bytes       which text it is (main | gate | short) and its size in UTF-8
    expected          {documents, tokens, total}: of its ids without end-of-text; or null
    cache             a directory that the loader may keep an index in; timed runs find what `prepare` left
    scratch           a directory for what an instrumented run counts
    values            1: one pass; its steps are the batches after the first
    parity            {out}: where to write the hash of each document's ids, BLAKE2b-128, and beside it a JSON
                      object of counts (bench.run.load_worker.run_parity); or null
A timed pass sends the metrics `tokens`, `token_sum` and `padding`, which are compared with `expected`.

The messages
    {"type": "event", "name", "t_ns"}                          free-form milestones (`ready`, `built`)
    {"type": "manifest", "facts": {key: value}}                 facts in force, for the fairness manifest
    {"type": "compiled", "first_step_s", "build_s"}             the first step's wall time, and set-up's
    {"type": "value", "index", "warmup", "steps", "wall_ns", "device_ns" (or null), "loss"}
    {"type": "metric", "metric", "value" (or null), "unit", "phase", "source", "censored"}
    {"type": "error", "kind", "message"}                        kind: one of ERROR_KINDS
    {"type": "done"}

The parity file (safetensors, float64 unless it says otherwise)
    loss                     [steps]
    gradient/NAME            the clipped gradient of step 1 at `spec.sample_indices`, as the optimizer got
                             it: first moment after step 1 / (1 - beta1)
    gradient_norm/NAME       [2]: Euclidean norm and mean of the whole tensor
    weight/NAME, weight_norm/NAME   the same of the stored weights after the last step
    routing/ids              int32 [steps, layers, tokens, top_k], MoE only; routing/margin float32 [steps,
                             layers, tokens]: router probability of the last chosen minus the next expert
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

PROTOCOL: Final = 1
ERROR_KINDS: Final = ("out of memory", "unsupported", "not steady", "bad job", "crash")
MESSAGE_TYPES: Final = ("event", "manifest", "compiled", "value", "metric", "error", "done")

# Statuses of an observation. `incomplete` is a finished observation of a round that was interrupted.
STATUS_OK: Final = "ok"
STATUS_FAILED: Final = "failed"
STATUS_SKIPPED: Final = "skipped"
STATUS_NOT_COMPARABLE: Final = "not comparable"

LEAST_STEP_S: Final = 1e-7  # a shorter calibrated step is no measurement


def _number(value: Any, least: float = -math.inf) -> bool:
    """A finite number that fits into a column of a table."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return max(least, -(2.0**63)) <= value < 2**63 if isinstance(value, int) else least <= value < math.inf


def problem(message: Mapping[str, Any]) -> str:
    """What is wrong with a message of a known type, which may come from anybody; empty if nothing is."""
    checks: dict[str, bool] = {}
    get = message.get
    if get("type") == "value":
        checks = {
            "index": isinstance(get("index"), int) and _number(get("index"), 0),
            "warmup": isinstance(get("warmup"), bool),
            "steps": isinstance(get("steps"), int) and _number(get("steps"), 1),
            "wall_ns": _number(get("wall_ns"), 1),
            "device_ns": get("device_ns") is None or _number(get("device_ns"), 0),
            "loss": get("loss") is None or _number(get("loss")),
        }
    elif get("type") == "compiled":
        checks = {name: _number(get(name), 0) for name in ("first_step_s", "build_s")}
    elif get("type") == "metric":
        least = LEAST_STEP_S if get("phase") == "calibration" else -math.inf
        checks = {
            "metric": isinstance(get("metric"), str),
            "value": _number(get("value"), least) or (get("value") is None and least < 0),
        }
    elif get("type") == "manifest":
        facts = get("facts")
        flat = isinstance(facts, dict) and not any(isinstance(v, (dict, list)) for v in facts.values())
        checks = {"facts": flat}
    wrong = [name for name, right in checks.items() if not right]
    return f"{get('type')}: {wrong[0]} = {str(get(wrong[0]))[:80]!r}" if wrong else ""
