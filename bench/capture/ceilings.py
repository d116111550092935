"""What a device can reach at all, measured through a framework: the part that knows no framework.

`ceilings_torch.py` and `ceilings_jax.py` each give three functions (a copy, a matrix product, a tiny launch)
and a probe; this file chooses sizes, times and reports. The data is random: on zeros a GPU clocks higher.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from bench import host

# Relative error of a 512³ product of standard normals against float64, by the precision that was really used:
# fp32 about 1e-7 to 5e-7, tf32 3e-4, bf16 3e-3.
ERROR_BANDS: Final = {"fp32": (0.0, 1e-5), "tf32": (5e-5, 1.5e-3), "bf16": (5e-4, 2e-2)}
DTYPE_BYTES: Final = {"fp32": 4, "tf32": 4, "bf16": 2}
PROBE_N: Final = 512
_MIB: Final = 1 << 20

# `run(n)` enqueues n calls and waits for the last one.
Run = Callable[[int], object]


@dataclass(kw_only=True, slots=True)
class Budget:
    """How long the measurement may last, and how much memory it may take."""

    stack: str
    device: str
    memory_bytes: int  # free on the device
    cache_bytes: int  # its last-level cache
    seconds: float = 8.0
    began: float = field(default_factory=time.perf_counter)

    @property
    def cpu(self) -> bool:
        """Whether the device is a CPU."""
        return self.device == "cpu"

    def left(self) -> float:
        """Seconds of the budget that remain."""
        return self.seconds - (time.perf_counter() - self.began)

    def row(self, metric: str, value: float | None, unit: str, **more: Any) -> dict[str, Any]:
        """A `metric` message with the ceilings' own columns."""
        message = {"type": "metric", "metric": metric, "value": value, "unit": unit, "phase": "ceilings"}
        message |= {"source": "measured", "censored": False, "stack": self.stack}
        return {**message, "dtype": None, "size": None, **more}

    def copy_sizes(self) -> list[int]:
        """Bytes of one buffer: source and target together are at least twice the last-level cache.

        A CPU's cache can be a server's whole 480 MB, of which a small guest owns little: the memory caps the
        sizes, and a working set that fits into the cache is dropped rather than reported.
        """
        first = max(self.cache_bytes, (128 if self.cpu else 256) * _MIB)
        factors = (1, 2) if self.cpu else (1, 4, 16)
        sizes = [-(-first * factor // _MIB) * _MIB for factor in factors]
        return [size for size in sizes if 2 * size <= self.memory_bytes // 4]

    def matmul_sizes(self) -> list[int]:
        """Sides of square matrices."""
        sides = (1024, 2048, 4096) if self.cpu else (4096, 8192, 16384)
        return [side for side in sides if 3 * 4 * side * side <= self.memory_bytes // 4]


def calls_a_second(run: Run, budget: Budget, share: float, values: int = 5) -> list[float]:
    """Calls a second of `values` repeats, each of enough calls to last `share` of the budget's whole time.

    The first call (compilation, page faults) and a calibrating one are not counted. A function that is too
    slow for what is left of the budget gives fewer values, at least one.
    """
    run(1)
    start = time.perf_counter()
    run(1)
    once = max(time.perf_counter() - start, 1e-9)
    allowed = min(share * budget.seconds, max(budget.left(), 0.0) * 0.5)
    calls = max(1, int(allowed / values / once))
    rates: list[float] = []
    while len(rates) < values and not (rates and calls * once * len(rates) > allowed):
        start = time.perf_counter()
        run(calls)
        rates.append(calls / (time.perf_counter() - start))
    return rates


def best(rates: list[float], scale: float) -> dict[str, Any]:
    """The best of the rates, scaled, with what it is the best of."""
    spread = (max(rates) - min(rates)) / statistics.median(rates)
    return {"value": max(rates) * scale, "n": len(rates), "spread": round(spread, 4)}


def copies(make: Callable[[int], Run], budget: Budget) -> Iterator[dict[str, Any]]:
    """Device-to-device copies; the bytes are those read plus those written."""
    sizes = budget.copy_sizes()
    if not sizes:
        why = f"no room for buffers beyond the {budget.cache_bytes // _MIB} MiB cache"
        yield budget.row("copy_bytes_per_s", None, "B/s", reason=why)
    for size in sizes:
        rates = calls_a_second(make(size), budget, 0.12 if budget.cpu else 0.03)
        yield budget.row("copy_bytes_per_s", **best(rates, 2.0 * size), unit="B/s", size=size)


def products(
    make: Callable[[int, str], Run], error: Callable[[str], float], budget: Budget
) -> Iterator[dict[str, Any]]:
    """Square matrix products by precision; a precision that the probe does not find in force is null."""
    for dtype, (low, high) in ERROR_BANDS.items():
        seen = error(dtype)
        if not low <= seen <= high:
            why = f"{dtype} is not in force: a product's error is {seen:.1e}, not {low:.0e} to {high:.0e}"
            yield budget.row("matmul_flops_per_s", None, "FLOP/s", dtype=dtype, reason=why)
            continue
        cost = 0.0  # seconds of the last size's single product
        for side in budget.matmul_sizes():
            if cost and 8 * cost * 5 > min(budget.left(), 1.2):
                break  # the next side costs eight times this one, for two calls unseen and three values
            rates = calls_a_second(make(side, dtype), budget, 0.06 if budget.cpu else 0.03)
            cost = 1 / max(rates)
            value = best(rates, 2.0 * side**3)
            yield budget.row("matmul_flops_per_s", **value, unit="FLOP/s", dtype=dtype, size=side, error=seen)


def launches(run: Run, budget: Budget) -> Iterator[dict[str, Any]]:
    """Microseconds of one tiny operation: enqueued back to back, and waited for each time."""
    many = calls_a_second(run, budget, 0.03)
    yield budget.row("launch_latency_us", 1e6 / max(many), "us", **_spread(many), mode="enqueued")

    def waited(calls: int) -> None:
        for _ in range(calls):
            run(1)

    each = calls_a_second(waited, budget, 0.03)
    yield budget.row("launch_roundtrip_us", 1e6 / max(each), "us", **_spread(each), mode="waited")


def _spread(rates: list[float]) -> dict[str, Any]:
    summary = best(rates, 1.0)
    return {"n": summary["n"], "spread": summary["spread"]}


def cpu_memory() -> tuple[int, int]:
    """Bytes this process may use and of the last-level cache (32 MiB where the kernel does not say)."""
    return host.memory_usable() or 1 << 30, host.last_level_cache() or 32 * _MIB


def main(measure: Callable[[str, int], list[dict[str, Any]]]) -> None:
    """`python -m bench.capture.ceilings_<framework> --device cpu`: one JSON object a line."""
    parser = ArgumentParser(description="Measured limits of a device, one JSON object a line.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--threads", type=int, default=host.threads_for(len(host.affinity())))
    chosen = parser.parse_args()
    for row in measure(chosen.device, chosen.threads):
        sys.stdout.write(json.dumps(row) + "\n")
