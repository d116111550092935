"""A device's limits as torch reaches them: copy, matrix product by precision, launch."""

from __future__ import annotations

from typing import Any

from bench.capture import ceilings
from bench.capture.ceilings import Budget, Run


def measure(device: str, threads: int) -> list[dict[str, Any]]:
    """Metric messages of every ceiling on `cpu` or `cuda:N`."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    where = torch.device(device)
    cuda = where.type == "cuda"
    if cuda:
        memory, _ = torch.cuda.mem_get_info(where)
        cache = torch.cuda.get_device_properties(where).L2_cache_size
    else:
        memory, cache = ceilings.cpu_memory()
    budget = Budget(stack="torch", device=device, memory_bytes=memory, cache_bytes=cache)

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(where)

    def copy(size: int) -> Run:
        block = torch.randn(min(size, 64 << 20) // 4, device=where)
        source = block.repeat(-(-size // (block.numel() * 4)))[: size // 4]
        target = torch.empty_like(source)

        def run(calls: int) -> None:
            for _ in range(calls):
                target.copy_(source)
            wait()

        return run

    def precision(dtype: str) -> torch.dtype:
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        return torch.bfloat16 if dtype == "bf16" else torch.float32

    def product(side: int, dtype: str) -> Run:
        kind = precision(dtype)
        a, b = (torch.randn(side, side, device=where).to(kind) for _ in range(2))
        out = torch.empty(side, side, device=where, dtype=kind)

        def run(calls: int) -> None:
            for _ in range(calls):
                torch.mm(a, b, out=out)
            wait()

        return run

    def error(dtype: str) -> float:
        kind = precision(dtype)
        a, b = (torch.randn(ceilings.PROBE_N, ceilings.PROBE_N, dtype=torch.float64) for _ in range(2))
        exact = a @ b
        got = (a.float().to(where).to(kind) @ b.float().to(where).to(kind)).cpu().double()
        return float((got - exact).norm() / exact.norm())

    tiny = torch.randn(1, device=where)

    def launch(calls: int) -> None:
        for _ in range(calls):
            tiny.add_(1.0)
        wait()

    with torch.inference_mode():
        tiny = torch.randn(1, device=where)
        rows = list(ceilings.launches(launch, budget))
        rows += ceilings.copies(copy, budget)
        rows += ceilings.products(product, error, budget)
    return rows


if __name__ == "__main__":
    ceilings.main(measure)
