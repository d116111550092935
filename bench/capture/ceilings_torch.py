"""A device's limits as torch reaches them: copy, matrix product by precision, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.capture import ceilings
from bench.capture.ceilings import Budget, Run


def measure(device: str, threads: int) -> list[dict[str, Any]]:
    """Metric messages of every ceiling on `cpu` or `cuda:N`."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if device == "cpu":
        memory, cache = ceilings.cpu_memory()
    else:
        memory, _ = torch.cuda.mem_get_info(device)
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    budget = Budget(stack="torch", device=device, memory_bytes=memory, cache_bytes=cache)
    with torch.inference_mode():
        tiny = torch.randn(1, device=device)
        rows = list(ceilings.launches(_repeated(lambda: tiny.add_(1.0), device), budget))
        rows += ceilings.copies(lambda size: _copy(size, device), budget)
        rows += ceilings.products(
            lambda side, dtype: _product(side, dtype, device), lambda dtype: _error(dtype, device), budget
        )
    return rows


def _repeated(call: Callable[[], object], device: str) -> Run:
    import torch

    def run(calls: int) -> None:
        for _ in range(calls):
            call()
        if device != "cpu":
            torch.cuda.synchronize(device)

    return run


def _copy(size: int, device: str) -> Run:
    import torch

    block = torch.randn(min(size, 64 << 20) // 4, device=device)
    source = block.repeat(-(-size // block.nbytes))[: size // 4]
    target = torch.empty_like(source)
    return _repeated(lambda: target.copy_(source), device)


def _precision(dtype: str) -> Any:
    """Sets the precision of fp32 products and returns the dtype of the operands."""
    import torch

    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    return torch.bfloat16 if dtype == "bf16" else torch.float32


def _product(side: int, dtype: str, device: str) -> Run:
    import torch

    kind = _precision(dtype)
    a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    out = torch.empty(side, side, device=device, dtype=kind)
    return _repeated(lambda: torch.mm(a, b, out=out), device)


def _error(dtype: str, device: str) -> float:
    """Relative error of one product against float64: which precision was in force."""
    import torch

    kind = _precision(dtype)
    a, b = (torch.randn(ceilings.PROBE_N, ceilings.PROBE_N, dtype=torch.float64) for _ in range(2))
    exact = a @ b
    got = torch.mm(a.to(device=device, dtype=kind), b.to(device=device, dtype=kind)).cpu().double()
    return float((got - exact).norm() / exact.norm())


if __name__ == "__main__":
    ceilings.main(measure)
