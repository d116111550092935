"""Seconds from typing `stackbench --help` to its end, in fresh processes (goal: 0.3 s).

python -m tests.benchmarks.help
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time


def main() -> None:
    for words in (["--help"], ["plan", "--help"], ["plan", "quick"]):
        seconds = []
        for _ in range(10):
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-m", "bench.cli", *words], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
        low, high = min(seconds), max(seconds)
        median = statistics.median(seconds)
        print(f"stackbench {' '.join(words)}: median {median:.2f} s ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
