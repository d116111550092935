"""A device's limits as JAX and XLA reach them: copy, matrix product by precision, launch."""

from __future__ import annotations

import os
from typing import Any

from bench.capture import ceilings
from bench.capture.ceilings import Budget, Run


def measure(device: str, threads: int) -> list[dict[str, Any]]:
    """Metric messages of every ceiling on `cpu` or `cuda:N`. JAX must not have started in this process."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if device == "cpu" else "cuda")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["NPROC"] = str(threads)  # the size of XLA's CPU thread pool
    import jax
    import jax.numpy as jnp
    import numpy as np

    index = int(device.partition(":")[2] or 0)
    where = jax.devices("cpu" if device == "cpu" else "cuda")[index]
    memory, cache = ceilings.cpu_memory()
    if device != "cpu":
        from bench import devices

        stats = where.memory_stats() or {}
        memory = int(stats.get("bytes_limit", devices.here(device).memory_bytes or 1 << 30))
        cache = devices.here(device).l2_bytes or 64 << 20
    budget = Budget(stack="jax", device=device, memory_bytes=memory, cache_bytes=cache)
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jax.device_put(random.standard_normal(shape, dtype=np.float32), where)

    # Without a donated target every copy writes to fresh pages: 3.6 GB/s instead of 13 on a 2-core CPU.
    duplicate = jax.jit(lambda x, out: jnp.array(x, copy=True), donate_argnums=1, keep_unused=True)

    def copy(size: int) -> Run:
        block = normal(min(size, 64 << 20) // 4)
        source = jnp.tile(block, -(-size // block.nbytes))[: size // 4]
        target = [jnp.zeros_like(source)]

        def run(calls: int) -> None:
            for _ in range(calls):
                target[0] = duplicate(source, target[0])
            jax.block_until_ready(target[0])

        return run

    def precision(dtype: str) -> tuple[Any, str]:
        return (jnp.bfloat16 if dtype == "bf16" else jnp.float32), {
            "fp32": "highest",
            "tf32": "tensorfloat32",
            "bf16": "default",
        }[dtype]

    def multiply(dtype: str) -> Any:
        return jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision(dtype)[1]))

    def product(side: int, dtype: str) -> Run:
        a, b = (normal(side, side).astype(precision(dtype)[0]) for _ in range(2))
        function = multiply(dtype)

        def run(calls: int) -> None:
            out = a
            for _ in range(calls):
                out = function(a, b)
            jax.block_until_ready(out)

        return run

    def error(dtype: str) -> float:
        a, b = (random.standard_normal((ceilings.PROBE_N, ceilings.PROBE_N)) for _ in range(2))
        kind = precision(dtype)[0]
        left, right = (jax.device_put(x.astype(np.float32), where).astype(kind) for x in (a, b))
        got = np.asarray(multiply(dtype)(left, right).astype(jnp.float32), dtype=np.float64)
        return float(np.linalg.norm(got - a @ b) / np.linalg.norm(a @ b))

    add = jax.jit(lambda x: x + 1.0)
    tiny = normal(1)

    def launch(calls: int) -> None:
        out = tiny
        for _ in range(calls):
            out = add(out)
        jax.block_until_ready(out)

    rows = list(ceilings.launches(launch, budget))
    rows += ceilings.copies(copy, budget)
    rows += ceilings.products(product, error, budget)
    return rows


if __name__ == "__main__":
    ceilings.main(measure)
