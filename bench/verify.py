"""The parity gate's judgement: the same work, within round-off that was measured, or no time at all.

Pure: arrays in, rows of the `parity` table out. What runs to make the arrays is `bench.run.gate`.

Errors are relative and compared with a tolerance per quantity:
    loss           |l - l'| / |l'|, step 0 and the worst of all steps
    gradient       norm(g - g') / max(norm(g'), 1e-6 * norm(all gradients)), per parameter (part)
    weight         norm(w - w') / norm(w' - w_initial): a difference against what training moved
    gradient_norm, weight_norm   | |x| - |x'| | / |x'| of the whole tensor: coherent drift (a missing decay)
                   that elementwise noise would hide
A tolerance is MARGIN times the round-off of that quantity, which is measured by computing the same step in
the same precision in another order, and not less than a few units of the last place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stacks.train import spec

if TYPE_CHECKING:
    import numpy as np

MARGIN = 8.0
FACTOR = 2.0  # error level against float64, to the median of the other stacks; legitimate variants: 1.3
FLOOR_ULPS = 4.0
GRADIENT_SHARE = 1e-6
UNIT = {"fp32": 2.0**-24, "tf32": 2.0**-11, "bf16": 2.0**-9, "bf16-pure": 2.0**-9}

Arrays = Mapping[str, "np.ndarray"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One compared quantity. `error` over `tolerance` is its distance; above 1 the case is not comparable."""

    parameter: str
    measure: str
    error: float
    tolerance: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for a NaN


def read(path: Path) -> dict[str, np.ndarray]:
    """Arrays of a parity file. Raises ValueError for a file that is none (it may be anything)."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return dict(load(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"parity file cannot be read: {error.strerror}") from None
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"parity file cannot be read: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A parameter, or named rows of it, with the positions of its samples in the parity file's array."""

    name: str
    parameter: spec.Parameter
    select: Any  # bool mask over the samples
    zero_gradient: bool


def parts(model: spec.Model) -> list[Part]:
    """Query, key and value rows of a fused projection are compared apart: their scales differ."""
    import numpy as np

    found = []
    for p in spec.parameters(model):
        index = spec.sample_indices(p.name, p.size)
        if not p.parts:
            found.append(
                Part(name=p.name, parameter=p, select=np.ones(len(index), bool), zero_gradient=False)
            )
            continue
        row = index // (p.size // p.shape[0])
        for name, start, stop in p.parts:
            select = (row >= start) & (row < stop)
            zero = name in p.zero_gradient
            found.append(Part(name=f"{p.name}[{name}]", parameter=p, select=select, zero_gradient=zero))
    return found


def errors(model: spec.Model, seed: int, got: Arrays, reference: Arrays) -> dict[tuple[str, str], float]:
    """Error of every quantity by (measure, parameter). Missing or misshapen arrays count as infinite."""
    import numpy as np

    out: dict[tuple[str, str], float] = {}
    loss, true = got.get("loss"), reference["loss"]
    if loss is None or loss.shape != true.shape:
        out["loss", "step 0"] = out["loss", "all steps"] = math.inf
    else:
        relative = np.abs(loss - true) / np.abs(true)
        out["loss", "step 0"], out["loss", "all steps"] = float(relative[0]), float(relative.max())
    total = total_norm(reference)
    for part in parts(model):
        p = part.parameter
        index = spec.sample_indices(p.name, p.size)
        scale = math.sqrt(p.size / max(len(index), 1))  # norm of the whole from its samples
        pair = [side.get(f"gradient/{p.name}") for side in (got, reference)]
        out["gradient", part.name] = _gradient_error(part, pair, total, scale)
        if part.zero_gradient:
            continue  # Adam normalises the rounding noise of a zero gradient: its weights tell nothing
        pair = [side.get(f"weight/{p.name}") for side in (got, reference)]
        start = spec.initial_at(p, index, seed).astype(np.float64)
        out["weight", part.name] = _weight_error(part, pair, start)
        for kind in ("gradient_norm", "weight_norm"):
            out[kind, p.name] = _norm_error([side.get(f"{kind}/{p.name}") for side in (got, reference)])
    return out


def total_norm(side: Arrays) -> float:
    """Global norm of all gradients; whatever is not a norm and a mean counts as infinite."""
    norms = [v for k, v in side.items() if k.startswith("gradient_norm/")]
    return math.sqrt(sum(float(v[0]) ** 2 if v.shape == (2,) else math.inf for v in norms)) or 1e-30


def _gradient_error(part: Part, pair: Sequence[Any], total: float, scale: float) -> float:
    import numpy as np

    got, true = pair
    if got is None or got.shape != true.shape:
        return math.inf
    got, true = got[part.select], true[part.select]
    if part.zero_gradient:
        return float(np.linalg.norm(got)) * scale / total
    floor = GRADIENT_SHARE * total / scale
    return float(np.linalg.norm(got - true) / max(float(np.linalg.norm(true)), floor))


def _weight_error(part: Part, pair: Sequence[Any], start: Any) -> float:
    import numpy as np

    got, true = pair
    if got is None or got.shape != true.shape:
        return math.inf
    got, true, start = (x[part.select] for x in (got, true, start))
    moved = float(np.linalg.norm(true - start))
    difference = float(np.linalg.norm(got - true))
    return difference / moved if moved else (0.0 if difference == 0 else math.inf)


def _norm_error(norms: Sequence[Any]) -> float:
    got, true = norms
    if got is None or got.shape != true.shape:
        return math.inf
    return abs(float(got[0]) - float(true[0])) / max(abs(float(true[0])), 1e-30)


def judge(
    model: spec.Model, precision: str, seed: int, got: Arrays, reference: Arrays,
    reordered: Iterable[Arrays], against: str,
) -> list[Row]:  # fmt: skip
    """Rows for one stack. `reordered` are runs of the same precision in other orders; their errors against
    the reference are the round-off that the tolerances are multiples of."""
    mine = errors(model, seed, got, reference)
    noise: dict[tuple[str, str], float] = {}
    for other in reordered:
        for key, value in errors(model, seed, other, reference).items():
            noise[key] = max(noise.get(key, 0.0), value)
    add_certain_noise(model, precision, seed, reference, noise)
    floor = FLOOR_ULPS * UNIT[precision]
    rows = []
    for (measure, name), error in mine.items():
        unit = floor / 4 if measure in ("loss", "weight_norm") else floor
        tolerance = MARGIN * max(noise.get((measure, name), 0.0), unit)
        rows.append(Row(parameter=name, measure=measure, error=error, tolerance=tolerance, detail=against))
    return rows


def add_certain_noise(
    model: spec.Model, precision: str, seed: int, reference: Arrays, noise: dict[tuple[str, str], float]
) -> None:
    """Round-off that two re-ordered runs may miss by luck, put into `noise`.

    Storing a weight rounds it: half a unit of |w| against what training moved (gains near 1 move little).
    A norm is one number: elementwise round-off d moves a norm of n elements by norm(d) / (norm(w) sqrt(n)).
    A gradient's norm may be off by as much as the gradient: clipping's own round-off scales all of it.
    """
    import numpy as np

    unit = 2.0**-24 if spec.PRECISION[precision]["weights"] == "float32" else 2.0**-9

    def raise_to(measure: str, name: str, value: float) -> None:
        noise[measure, name] = max(noise.get((measure, name), 0.0), value)

    for part in parts(model):
        p = part.parameter
        if part.zero_gradient:
            continue
        count = math.sqrt(p.size * max(float(part.select.mean()), 1e-30))
        raise_to("gradient_norm", p.name, noise.get(("gradient", part.name), 0.0))
        index = spec.sample_indices(p.name, p.size)
        true = reference[f"weight/{p.name}"][part.select]
        size = max(float(np.linalg.norm(true)), 1e-30)
        moved = max(float(np.linalg.norm(true - spec.initial_at(p, index, seed)[part.select])), 1e-30)
        raise_to("weight", part.name, 0.5 * unit * size / moved)
        raise_to("weight_norm", p.name, noise["weight", part.name] * moved / (size * count))


def judge_dtypes(model: spec.Model, precision: str, facts: Mapping[str, str]) -> list[Row]:
    """The dtypes that a worker reports against the precision table: one row a class, error 0 or 1."""
    rows = []
    for name in spec.TENSOR_CLASSES:
        if name in ("residual", "softmax") and model.layers == 0:
            continue
        wanted = spec.PRECISION[precision][name]
        seen = facts.get(f"dtype.{name}")
        ok = seen == wanted
        detail = "" if ok else f"{name} is {seen or 'not reported'}, precision {precision} says {wanted}"
        rows.append(
            Row(parameter=name, measure="dtype", error=0.0 if ok else 1.0, tolerance=0.5, detail=detail)
        )
    return rows


def judge_routing(got: Arrays, reference: Arrays, margin: float) -> list[Row]:
    """Expert ids of all steps where the router's margin exceeds round-off; elsewhere they were forced.

    The forced share stands in `detail`.
    """
    import numpy as np

    if "routing/ids" not in reference:
        return []
    true, free = reference["routing/ids"], reference["routing/margin"] > margin
    ids = got.get("routing/ids")
    share = f"forced where the margin is below {margin:.1e}: {1 - free.mean():.2%} of choices"
    if ids is None or ids.shape != true.shape:
        return [Row(parameter="experts", measure="routing", error=1.0, tolerance=0.0, detail="no expert ids")]
    same = (np.sort(ids, axis=-1) == np.sort(true, axis=-1)).all(axis=-1)
    wrong = float(1 - same[free].mean()) if free.any() else 0.0
    return [Row(parameter="experts", measure="routing", error=wrong, tolerance=0.0, detail=share)]


def forced_routing(reference: Arrays, margin: float) -> np.ndarray:
    """int32 [steps, layers, tokens, top_k]: the reference's experts where its margin is round-off, or -1."""
    import numpy as np

    ids, close = reference["routing/ids"], reference["routing/margin"] <= margin
    return np.where(close[..., None], ids, -1).astype(np.int32)


def judge_peers(levels: Mapping[str, float]) -> dict[str, Row]:
    """Each stack's error level against float64 to the median of the others': at most FACTOR."""
    import statistics

    out = {}
    for name, level in levels.items():
        others = [v for k, v in levels.items() if k != name]
        if others:
            median = statistics.median(others)
            error = level / median if median else (0.0 if level == 0 else math.inf)
            out[name] = Row(parameter="all gradients", measure="error_ratio", error=error, tolerance=FACTOR)
    return out


def level(model: spec.Model, got: Arrays, reference: Arrays) -> float:
    """A stack's error level: median over parameters of the gradient's error in direction.

    Both sides are divided by their own global norm first: the clipping factor, one number with its own
    round-off, would otherwise stand in every gradient.
    """
    import statistics

    import numpy as np

    found, mine, theirs = [], total_norm(got), total_norm(reference)
    for part in parts(model):
        pair = [side.get(f"gradient/{part.parameter.name}") for side in (got, reference)]
        if part.zero_gradient or pair[0] is None or pair[1] is None or pair[0].shape != pair[1].shape:
            continue
        ours, true = pair[0][part.select] / mine, pair[1][part.select] / theirs
        found.append(float(np.linalg.norm(ours - true)) / max(float(np.linalg.norm(true)), 1e-30))
    return statistics.median(found) if found else 0.0


def verdict(rows: Sequence[Row]) -> tuple[str, str]:
    """(`ok` | `not comparable`, reason naming the worst quantity)."""
    bad = [r for r in rows if not r.ok]
    if not bad:
        return "ok", ""
    worst = max(bad, key=lambda r: r.error / r.tolerance if r.tolerance else math.inf)
    if worst.measure == "dtype":
        return "not comparable", "; ".join(r.detail for r in bad if r.measure == "dtype")
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    return (
        "not comparable",
        f"parity: {worst.measure} of {worst.parameter}: error {worst.error:.2e}, "
        f"tolerance {worst.tolerance:.2e}{more}",
    )
