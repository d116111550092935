"""Prints, as Markdown, how far each planted fault and each legitimate variant lies from its tolerance.

python -m tests.benchmarks.gate_distances
"""

from __future__ import annotations

from stacks.train import torch_eager
from tests import faults
from tests.bench.test_gate_sensitivity import LEGITIMATE, OPTIONS, axes_of, yardstick


def main() -> None:
    print("| what | model, precision | worst quantity | error / tolerance |\n| --- | --- | --- | --- |")
    for fault in faults.FAULTS:
        model = faults.small_model(fault.family)
        axes = axes_of(model, precision=fault.precision)
        with fault.plant():
            yard = yardstick(fault.family, fault.precision)
            rows = faults.judge(torch_eager.Trainer, model, axes, dict(fault.options), yard)
        show(fault.name, fault.family, fault.precision, rows)
    for family, precision, options, changed in LEGITIMATE:
        model = faults.small_model(family)
        axes = axes_of(model, precision=precision, **changed)
        rows = faults.judge(torch_eager.Trainer, model, axes, OPTIONS | options, yardstick(family, precision))
        name = ", ".join(f"{k} {v}" for k, v in {**options, **changed}.items()) or "default"
        show(f"variant: {name}", family, precision, rows)


def show(name: str, family: str, precision: str, rows: list[faults.verify.Row]) -> None:
    ratio, worst = faults.distance(rows)
    numeric = [r for r in rows if r.measure != "dtype"]
    text = f"{worst.measure} of {worst.parameter}"
    if worst.measure == "dtype":
        text += f" (numerically {faults.distance(numeric)[0]:.2g})"
        print(f"| {name} | {family}, {precision} | {text} | another dtype |")
    else:
        shown = f"{ratio:.2g}" if worst.tolerance else f"{worst.error:.0%} of choices differ, 0 % may"
        print(f"| {name} | {family}, {precision} | {text} | {shown} |")


if __name__ == "__main__":
    main()
