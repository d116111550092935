"""CPU seconds to plan 10,000 cases for a device that is not here (goal: 1 s).

python -m tests.benchmarks.plan_10000
"""

from __future__ import annotations

import statistics
import time

from bench import devices, plan
from bench.suite import Matrix, Suite

SUITE = Suite(
    name="ten-thousand",
    matrix=[
        Matrix(
            workload=["train/gpt-tiny", "train/llama-tiny", "train/moe-tiny", "train/gpt2-124m"],
            arms=["jax-xla", "jax-xla:tuned", "torch-eager", "torch-eager:tuned", "torch-compile"],
            axes={
                "batch": [8 * i for i in range(1, 26)],
                "precision": ["fp32", "tf32", "bf16", "bf16-pure"],
                "dropout": [0.0, 0.1, 0.2, 0.3, 0.4],
            },
        )
    ],
)


def main() -> None:
    device = devices.known("h200")
    seconds = []
    for _ in range(5):
        plan._shape.cache_clear()  # as in a fresh process
        begin = time.process_time()
        made = plan.make(SUITE, device, check_installed=False)
        seconds.append(time.process_time() - begin)
    shown = ", ".join(f"{s:.2f}" for s in seconds)
    print(f"{len(made.cases)} cases: median {statistics.median(seconds):.2f} CPU s ({shown})")


if __name__ == "__main__":
    main()
