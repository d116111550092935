"""A device's limits as JAX and XLA reach them: copy, matrix product by precision, launch."""

from __future__ import annotations

import os
from typing import Any, Final

from bench import devices
from bench.capture import ceilings
from bench.capture.ceilings import Budget, Run

_PRECISIONS: Final = {"fp32": "highest", "tf32": "tensorfloat32", "bf16": "default"}


def measure(device: str, threads: int) -> list[dict[str, Any]]:
    """Metric messages of every ceiling on `cpu` or `cuda:N`. JAX must not have started in this process."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if device == "cpu" else "cuda")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["NPROC"] = str(threads)  # the size of XLA's CPU thread pool
    import jax

    platform, _, index = device.partition(":")
    where = jax.devices(platform)[int(index or 0)]
    memory, cache = ceilings.cpu_memory()
    if device != "cpu":
        here = devices.here(device)
        memory = (where.memory_stats() or {}).get("bytes_limit") or here.memory_bytes or 1 << 30
        cache = here.l2_bytes or 64 << 20
    budget = Budget(stack="jax", device=device, memory_bytes=memory, cache_bytes=cache)
    with jax.default_device(where):
        rows = list(ceilings.launches(_launch(), budget))
        rows += ceilings.copies(_copy, budget)
        rows += ceilings.products(_product, _error, budget)
    return rows


def _normal(*shape: int, seed: int = 0) -> Any:
    import jax.numpy as jnp
    import numpy as np

    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def _launch() -> Run:
    import jax

    add, tiny = jax.jit(lambda x: x + 1.0), _normal(1)

    def run(calls: int) -> None:
        out = tiny
        for _ in range(calls):
            out = add(out)
        jax.block_until_ready(out)

    return run


def _copy(size: int) -> Run:
    import jax
    import jax.numpy as jnp

    # Without a donated target every copy writes to fresh pages: 3.6 GB/s instead of 13 on a 2-core CPU.
    duplicate = jax.jit(lambda x, out: jnp.array(x, copy=True), donate_argnums=1, keep_unused=True)
    block = _normal(min(size, 64 << 20) // 4)
    source = jnp.tile(block, -(-size // block.nbytes))[: size // 4]
    target = [jnp.zeros_like(source)]

    def run(calls: int) -> None:
        for _ in range(calls):
            target[0] = duplicate(source, target[0])
        jax.block_until_ready(target[0])

    return run


def _multiply(dtype: str) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.jit(lambda a, b: jnp.matmul(a, b, precision=_PRECISIONS[dtype]))


def _operands(dtype: str, *arrays: Any) -> list[Any]:
    import jax.numpy as jnp

    return [jnp.asarray(array).astype(jnp.bfloat16 if dtype == "bf16" else jnp.float32) for array in arrays]


def _product(side: int, dtype: str) -> Run:
    import jax

    function = _multiply(dtype)
    a, b = _operands(dtype, _normal(side, side), _normal(side, side, seed=1))

    def run(calls: int) -> None:
        out = a
        for _ in range(calls):
            out = function(a, b)
        jax.block_until_ready(out)

    return run


def _error(dtype: str) -> float:
    """Relative error of one product against float64: which precision was in force."""
    import numpy as np

    random = np.random.default_rng(1)
    a, b = (random.standard_normal((ceilings.PROBE_N, ceilings.PROBE_N)) for _ in range(2))
    got = _multiply(dtype)(*_operands(dtype, a.astype(np.float32), b.astype(np.float32)))
    exact = a @ b
    return float(np.linalg.norm(np.asarray(got, dtype=np.float64) - exact) / np.linalg.norm(exact))


if __name__ == "__main__":
    ceilings.main(measure)
