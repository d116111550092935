"""Estimates and exact intervals: the one place that `report`, `compare` and `check` take theirs from.

Every statistic starts from process medians: one number an observation, since values within a process are not
independent. Two questions, two methods, neither of which approximates by a normal distribution:

- *How do two arms compare?* Log-ratios of the arms' process medians, round by round; their Hodges–Lehmann
  estimate; the interval between ordered Walsh averages whose confidence is exact under the Wilcoxon
  signed-rank distribution (96.9 % for 6 rounds; 5 cannot give 95 %). It needs log-ratios that scatter
  symmetrically, which swapping two arms in random order gives, and no particular shape.
- *How long does one arm take?* The median of its process medians and the interval between ordered ones
  whose confidence is exact by the sign test. It needs no symmetry: step times have long upper tails.

Ties and zeros need no special case: nothing is ranked or dropped, and the interval includes its ends, so
that with ties (a discrete distribution) the confidence is at least the one stated.

Cache draws. Rounds that used the same compiled code share what the autotuner happened to pick. From three
draws on, the draw is what is counted: the rounds of each are first reduced to one number (by the same
estimate), and the interval is over draws: exact as above from six draws on; with three to five, where no
exact interval reaches 95 %, Student's t over the draws' numbers (logarithms), which assumes that they scatter
normally and is wide. One or two draws cannot show how much they scatter: the rounds are counted as they are,
the interval speaks of that compiled code only, and the report says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np

CONFIDENCE: Final = 0.95
LEAST_ROUNDS: Final = 6  # for an interval of 95 %
DRAWS_LEVEL: Final = 3  # so many cache draws make the draw a level of the interval
MOST: Final = 1000  # beyond it the weights of the exact distribution underflow


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its interval; where `low` is None, `reason` says why there is none."""

    estimate: float | None
    low: float | None = None
    high: float | None = None
    confidence: float | None = None  # the one achieved, not the one asked for
    n: int = 0  # numbers it was made of: rounds, or cache draws
    method: str = ""
    reason: str = ""

    def map(self, change: Callable[[float], float]) -> Interval:
        """The interval of a monotone function of the quantity; a decreasing one swaps the ends."""
        if self.estimate is None:
            return self
        ends: list[float] = []
        if self.low is not None and self.high is not None:
            ends = sorted((change(self.low), change(self.high)))
        return Interval(
            estimate=change(self.estimate),
            low=ends[0] if ends else None,
            high=ends[1] if ends else None,
            confidence=self.confidence,
            n=self.n,
            method=self.method,
            reason=self.reason,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """a / b over rounds that both took part in. `confidence` is the achieved one; null ends have a reason."""

    estimate: float | None
    low: float | None
    high: float | None
    confidence: float | None
    n_rounds: int
    n_draws: int
    method: str
    reason: str

    @property
    def differs(self) -> bool | None:
        """Whether the interval leaves out 1; None without an interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 1 or self.high < 1


# --------------------------------------------------------------------------------------- exact distributions
@lru_cache(maxsize=64)
def signed_rank_cdf(n: int) -> np.ndarray:
    """P(T <= t), t = 0 … n(n+1)/2, of Wilcoxon's signed-rank statistic under the null, without ties.

    Rank i adds i or nothing, each with probability 1/2: one convolution a rank.
    """
    import numpy as np

    if not 1 <= n <= MOST:
        raise ValueError(f"signed_rank_cdf: n = {n}; valid: 1 to {MOST}")
    weights = np.zeros(n * (n + 1) // 2 + 1)
    weights[0] = 1.0
    for rank in range(1, n + 1):
        shifted = np.zeros_like(weights)
        shifted[rank:] = weights[:-rank]
        weights = 0.5 * (weights + shifted)
    return np.cumsum(weights)


@lru_cache(maxsize=64)
def sign_cdf(n: int) -> np.ndarray:
    """P(B <= k), k = 0 … n, of a binomial count with probability 1/2."""
    import numpy as np

    if not 1 <= n <= MOST:
        raise ValueError(f"sign_cdf: n = {n}; valid: 1 to {MOST}")
    total = 2**n
    return np.cumsum([math.comb(n, k) / total for k in range(n + 1)])


def _cut(cdf: np.ndarray, confidence: float) -> tuple[int, float] | None:
    """How many ordered values to leave out at each end, and the confidence then; None if 0 is too many."""
    import numpy as np

    tail = (1 - confidence) / 2
    cut = int(np.searchsorted(cdf, tail * (1 + 1e-12), side="right")) - 1
    return None if cut < 0 else (cut, 1 - 2 * float(cdf[cut]))


def least_rounds(confidence: float = CONFIDENCE) -> int:
    """The fewest rounds for which an exact interval of this confidence exists: 6 for 95 %."""
    return next(n for n in range(1, MOST) if 2 * 0.5**n <= (1 - confidence) * (1 + 1e-12))


# -------------------------------------------------------------------------------------------------- estimates
def _numbers(x: Sequence[float]) -> np.ndarray:
    import numpy as np

    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("expected a sequence of finite numbers")
    return values


def walsh_averages(x: Sequence[float]) -> np.ndarray:
    """(x_i + x_j) / 2 for all i <= j, in order."""
    import numpy as np

    values = _numbers(x)
    i, j = np.triu_indices(len(values))
    return np.sort(values[i] / 2 + values[j] / 2)


def hodges_lehmann(x: Sequence[float]) -> float:
    """Median of the Walsh averages."""
    import numpy as np

    if len(x) == 0:
        raise ValueError("hodges_lehmann: no numbers")
    return float(np.median(walsh_averages(x)))


def median(x: Sequence[float]) -> float:
    import numpy as np

    if len(x) == 0:
        raise ValueError("median: no numbers")
    return float(np.median(_numbers(x)))


def _too_few(n: int, confidence: float, what: str = "round") -> str:
    needed = least_rounds(confidence)
    if n > MOST:
        return f"no interval: more than {MOST} {what}s"
    return f"no interval: {n} {what}{'' if n == 1 else 's'}, {100 * confidence:g} % needs {needed}"


def _exact(
    x: Sequence[float], ordered: np.ndarray, cdf: Callable[[int], np.ndarray], estimate: float,
    confidence: float, method: str,
) -> Interval:  # fmt: skip
    found = _cut(cdf(len(x)), confidence) if 1 <= len(x) <= MOST else None
    if found is None:
        return Interval(estimate=estimate, n=len(x), method=method, reason=_too_few(len(x), confidence))
    cut, achieved = found
    low, high = float(ordered[cut]), float(ordered[len(ordered) - 1 - cut])
    return Interval(estimate=estimate, low=low, high=high, confidence=achieved, n=len(x), method=method)


def wilcoxon_interval(x: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Hodges–Lehmann estimate of the centre of symmetry, between ordered Walsh averages.

    Exact for every n up to 1,000: n = 6 gives the full range of the Walsh averages and 96.9 %, n = 5 nothing.
    """
    if len(x) == 0:
        return Interval(estimate=None, method="wilcoxon", reason="no rounds")
    averages = walsh_averages(x)
    return _exact(x, averages, signed_rank_cdf, hodges_lehmann(x), confidence, "wilcoxon")


def median_interval(x: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Median between ordered values: exact by the sign test, whatever the shape."""
    import numpy as np

    if len(x) == 0:
        return Interval(estimate=None, method="order statistics", reason="no rounds")
    return _exact(x, np.sort(_numbers(x)), sign_cdf, median(x), confidence, "order statistics")


def t_interval(x: Sequence[float], estimate: float, confidence: float = CONFIDENCE) -> Interval:
    """Student's t about the mean, around an estimate of our choice; for few cache draws only."""
    import numpy as np
    from scipy.special import stdtrit

    values = _numbers(x)
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * error
    low, high = min(mean - half, estimate), max(mean + half, estimate)
    if not np.isfinite(half):
        return Interval(estimate=estimate, n=len(x), method="t over cache draws", reason="no interval")
    return Interval(
        estimate=estimate, low=low, high=high, confidence=confidence, n=len(x), method="t over cache draws"
    )


def _by_draw(x: Sequence[float], draws: Sequence[int | None] | None) -> list[list[float]]:
    groups: dict[int | None, list[float]] = {}
    for value, draw in zip(x, draws or [0] * len(x), strict=True):
        groups.setdefault(draw, []).append(value)
    return list(groups.values())


def _levelled(
    logs: Sequence[float], draws: Sequence[int | None] | None, confidence: float,
    interval: Callable[[Sequence[float], float], Interval], estimate: Callable[[Sequence[float]], float],
) -> Interval:  # fmt: skip
    """The interval over rounds, or over cache draws from three draws on."""
    groups = _by_draw(logs, draws)
    if len(groups) < DRAWS_LEVEL or len(logs) < least_rounds(confidence):
        return interval(logs, confidence)
    centres = [estimate(group) for group in groups]
    if len(groups) >= least_rounds(confidence):
        found = interval(centres, confidence)
        return Interval(
            estimate=found.estimate, low=found.low, high=found.high, confidence=found.confidence,
            n=found.n, method=f"{found.method} over cache draws", reason=found.reason,
        )  # fmt: skip
    return t_interval(centres, estimate(centres), confidence)


def _logarithms(x: Sequence[float]) -> list[float]:
    if any(not (value > 0 and math.isfinite(value)) for value in x):
        raise ValueError("expected positive finite numbers")
    return [math.log(value) for value in x]


def level(
    rounds: Sequence[float], draws: Sequence[int | None] | None = None, confidence: float = CONFIDENCE
) -> Interval:
    """One arm: the median over rounds of its process medians, all positive."""
    if len(rounds) == 0:
        return Interval(estimate=None, method="order statistics", reason="no rounds")
    found = _levelled(_logarithms(rounds), draws, confidence, median_interval, median).map(math.exp)
    if len(_by_draw(rounds, draws)) < DRAWS_LEVEL or len(rounds) < least_rounds(confidence):
        # of an even number the median is the mean of two: of the times themselves, not of their logarithms
        return Interval(
            estimate=median(rounds), low=found.low, high=found.high, confidence=found.confidence,
            n=found.n, method=found.method, reason=found.reason,
        )  # fmt: skip
    return found


def ratio(
    rounds_a: Sequence[float], rounds_b: Sequence[float], draws: Sequence[int | None] | None = None,
    confidence: float = CONFIDENCE,
) -> Ratio:  # fmt: skip
    """a / b, from the process medians of both arms in the same rounds (paired by position).

    `draws[i]` is the cache draw of round i. Swapping the arms gives the reciprocal of everything.
    """
    logs_a, logs_b = _logarithms(rounds_a), _logarithms(rounds_b)
    logs = [a - b for a, b in zip(logs_a, logs_b, strict=True)]
    n_draws = len(_by_draw(logs, draws))
    if not logs:
        found = Interval(estimate=None, method="wilcoxon", reason="no round in which both arms have a time")
    else:
        found = _levelled(logs, draws, confidence, wilcoxon_interval, hodges_lehmann).map(math.exp)
    return Ratio(
        estimate=found.estimate, low=found.low, high=found.high, confidence=found.confidence,
        n_rounds=len(logs), n_draws=n_draws if logs else 0, method=found.method, reason=found.reason,
    )  # fmt: skip


def spread(x: Sequence[float]) -> float | None:
    """Standard deviation of the logarithms (a relative spread); None for fewer than two numbers."""
    import numpy as np

    return float(np.std(_logarithms(x), ddof=1)) if len(x) > 1 else None
