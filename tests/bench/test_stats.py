"""The exact intervals are exact: distributions by enumeration, coverage by simulation, and equivariance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import stats

numbers = st.floats(-1e3, 1e3, allow_nan=False)
times = st.floats(1e-6, 1e3)
steady = settings(deadline=None, derandomize=True, max_examples=80)


def brute_signed_rank(n: int) -> np.ndarray:
    counts = np.zeros(n * (n + 1) // 2 + 1)
    for signs in itertools.product((0, 1), repeat=n):
        counts[sum(rank for rank, sign in enumerate(signs, 1) if sign)] += 1
    return np.cumsum(counts / 2**n)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 9])
def test_signed_rank_distribution_is_the_enumerated_one(n: int) -> None:
    np.testing.assert_allclose(stats.signed_rank_cdf(n), brute_signed_rank(n), rtol=1e-13)


def test_signed_rank_tail_is_exact_at_200() -> None:
    cdf = stats.signed_rank_cdf(200)
    assert cdf[0] == pytest.approx(2.0**-200, rel=1e-12)
    assert cdf[1] == pytest.approx(2 * 2.0**-200, rel=1e-12)
    assert cdf[3] == pytest.approx(5 * 2.0**-200, rel=1e-12)  # {}, {1}, {2}, {3}, {1,2}
    assert cdf[-1] == pytest.approx(1, abs=1e-12)


def test_known_values() -> None:
    assert stats.hodges_lehmann([1, 2, 3, 4, 100]) == 3.0
    assert stats.hodges_lehmann([5.0]) == 5.0
    assert stats.least_rounds() == 6
    assert stats.least_rounds(0.90) == 5
    six = stats.wilcoxon_interval([3, 1, 2, 6, 5, 4])
    assert (six.low, six.high, six.confidence) == (1, 6, 0.96875)
    assert six.estimate == 3.5
    ten = stats.wilcoxon_interval(list(range(1, 11)))  # tabulated: c = 8, 95.1 %
    assert ten.confidence == pytest.approx(0.951171875)


def test_five_rounds_cannot_give_95_percent() -> None:
    for found in (stats.wilcoxon_interval([1, 2, 3, 4, 5]), stats.median_interval([1, 2, 3, 4, 5])):
        assert (found.low, found.high, found.confidence) == (None, None, None)
        assert found.estimate == 3
        assert "5 rounds" in found.reason and "needs 6" in found.reason
    ratio = stats.ratio([1.0] * 5, [2.0] * 5)
    assert ratio.estimate == pytest.approx(0.5) and ratio.low is None and ratio.differs is None
    assert "needs 6" in ratio.reason


def test_nothing_is_null_with_a_reason() -> None:
    ratio = stats.ratio([], [])
    assert ratio.estimate is None and ratio.n_rounds == 0 and ratio.reason
    assert stats.level([]).reason


def test_median_interval_is_between_ordered_values() -> None:
    found = stats.median_interval([4, 1, 6, 2, 5, 3])
    assert (found.low, found.high, found.confidence) == (1, 6, 0.96875)
    nine = stats.median_interval(range(1, 10))  # 1 - 2 * P(B <= 1) = 1 - 2 * 10 / 512
    assert (nine.low, nine.high) == (2, 8) and nine.confidence == pytest.approx(1 - 20 / 512)


@pytest.mark.parametrize("bad", [[0.0, 1.0], [-1.0, 1.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_only_positive_finite_times(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="positive finite"):
        stats.ratio(bad, [1.0, 1.0])


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        stats.ratio([1.0], [1.0, 2.0])


def test_more_than_the_exact_limit_has_no_interval() -> None:
    found = stats.median_interval(list(range(stats.MOST + 1)))
    assert found.low is None and "more than" in found.reason


# ------------------------------------------------------------------------------------------------ properties
@steady
@given(st.lists(numbers, min_size=1, max_size=25), numbers)
def test_shift_equivariance(x: list[float], shift: float) -> None:
    a, b = stats.wilcoxon_interval(x), stats.wilcoxon_interval([v + shift for v in x])
    assert a.estimate is not None and b.estimate == pytest.approx(a.estimate + shift, abs=1e-6)
    if a.low is not None:
        assert b.low == pytest.approx(a.low + shift, abs=1e-6)


@steady
@given(st.lists(numbers, min_size=1, max_size=25), st.randoms())
def test_order_does_not_matter(x: list[float], random: object) -> None:
    shuffled = x[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert stats.wilcoxon_interval(x) == stats.wilcoxon_interval(shuffled)


@steady
@given(st.lists(numbers, min_size=6, max_size=25))
def test_the_estimate_lies_inside(x: list[float]) -> None:
    for found in (stats.wilcoxon_interval(x), stats.median_interval(x)):
        assert found.low is not None and found.high is not None and found.estimate is not None
        assert min(x) <= found.low <= found.estimate <= found.high <= max(x)
        assert found.confidence is not None and found.confidence >= 0.95


@steady
@given(
    st.lists(st.tuples(times, times, st.integers(0, 7)), min_size=1, max_size=24),
    st.booleans(),
)
def test_swapping_the_arms_gives_the_reciprocal(rows: list[tuple[float, float, int]], draws: bool) -> None:
    a, b = [r[0] for r in rows], [r[1] for r in rows]
    keys = [r[2] for r in rows] if draws else None
    one, other = stats.ratio(a, b, keys), stats.ratio(b, a, keys)
    assert one.estimate is not None and other.estimate is not None
    assert one.estimate * other.estimate == pytest.approx(1, rel=1e-9)
    assert (one.low is None) == (other.low is None)
    if one.low is not None and one.high is not None and other.low is not None and other.high is not None:
        assert one.low * other.high == pytest.approx(1, rel=1e-9)
        assert one.high * other.low == pytest.approx(1, rel=1e-9)
        assert one.low <= one.estimate * (1 + 1e-12) and one.estimate <= one.high * (1 + 1e-12)
    assert one.confidence == other.confidence


@steady
@given(st.lists(times, min_size=1, max_size=12), st.floats(1e-3, 1e3))
def test_units_do_not_matter(rounds: list[float], scale: float) -> None:
    one, other = stats.level(rounds), stats.level([scale * r for r in rounds])
    assert one.estimate is not None and other.estimate == pytest.approx(one.estimate * scale)


def test_map_keeps_the_order_of_the_ends() -> None:
    found = stats.level([2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).map(lambda s: 1 / s)
    assert found.low is not None and found.high is not None and found.estimate is not None
    assert found.low < found.estimate < found.high


def test_ties_and_zeros_stay() -> None:
    found = stats.wilcoxon_interval([0.0] * 6)
    assert (found.estimate, found.low, found.high, found.n) == (0, 0, 0, 6)
    assert stats.ratio([1.0] * 6, [1.0] * 6).differs is False


# -------------------------------------------------------------------------------------------------- coverage
NOISES = {
    "normal": lambda g, shape: g.normal(size=shape),
    "heavy-tailed": lambda g, shape: g.standard_t(1.5, size=shape),
    "skewed": lambda g, shape: g.exponential(size=shape) ** 1.5,  # per arm; the difference is symmetric
}
TRIALS = 4000


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("n", [6, 11])
def test_ratio_covers_at_the_stated_confidence(noise: str, n: int) -> None:
    generator = np.random.default_rng(7)
    a, b = (NOISES[noise](generator, (TRIALS, n)) * 0.02 for _ in range(2))
    common = generator.normal(size=(TRIALS, n)) * 0.1  # drift that both arms of a round share
    true, inside, confidence = 1.3, 0, 0.0
    for i in range(TRIALS):
        x, y = np.exp(common[i] + a[i]), np.exp(common[i] + b[i])
        found = stats.ratio(list(true * x), list(y))
        assert found.low is not None and found.high is not None and found.confidence is not None
        inside += found.low <= true <= found.high
        confidence = found.confidence
    error = 4 * math.sqrt(confidence * (1 - confidence) / TRIALS)
    assert inside / TRIALS == pytest.approx(confidence, abs=error)


@pytest.mark.parametrize("n", [6, 12])
def test_the_median_of_skewed_times_is_covered(n: int) -> None:
    generator = np.random.default_rng(11)
    inside, confidence = 0, 0.0
    for row in np.exp(generator.exponential(size=(TRIALS, n))):
        found = stats.level(list(row))
        assert found.low is not None and found.high is not None and found.confidence is not None
        inside += found.low <= 2.0 <= found.high  # the median of exp(Exponential) is 2
        confidence = found.confidence
    error = 4 * math.sqrt(confidence * (1 - confidence) / TRIALS)
    assert inside / TRIALS == pytest.approx(confidence, abs=error)


@pytest.mark.parametrize("draws", [3, 5, 8])
def test_cache_draws_are_a_level(draws: int) -> None:
    """What the autotuner picked varies by 5 %, processes by 0.5 %: counting rounds would cover too seldom."""
    generator = np.random.default_rng(13)
    rounds = [i % draws for i in range(2 * draws if draws > 3 else 9)]
    levelled, naive, trials = 0, 0, 1500
    for _ in range(trials):
        pick, other = generator.normal(size=draws) * 0.05, generator.normal(size=draws) * 0.05
        a = [math.exp(pick[d] + generator.normal() * 0.005) for d in rounds]
        b = [math.exp(other[d] + generator.normal() * 0.005) for d in rounds]
        found, flat = stats.ratio(a, b, rounds), stats.ratio(a, b)
        assert found.low is not None and found.high is not None and found.n_draws == draws
        assert "cache draws" in found.method
        levelled += found.low <= 1 <= found.high
        naive += flat.low is not None and flat.high is not None and flat.low <= 1 <= flat.high
    assert levelled / trials >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / trials)
    assert naive < levelled


def test_two_draws_are_no_level_and_few_rounds_have_no_interval() -> None:
    two = stats.ratio([1.0] * 6, [2.0] * 6, [0, 1] * 3)
    assert two.n_draws == 2 and two.confidence == 0.96875 and two.method == "wilcoxon"
    few = stats.ratio([1.0] * 3, [2.0] * 3, [0, 1, 2])
    assert few.low is None and few.reason


@steady
@given(st.lists(numbers, min_size=2, max_size=10))
def test_t_interval_agrees_with_scipy(x: list[float]) -> None:
    from scipy import stats as reference

    if np.std(x) == 0 or not np.isfinite(np.std(x, ddof=1)):
        return
    found = stats.t_interval(x, float(np.mean(x)))
    low, high = reference.t.interval(0.95, len(x) - 1, np.mean(x), reference.sem(x))
    assert found.low == pytest.approx(low, rel=1e-9, abs=1e-9)
    assert found.high == pytest.approx(high, rel=1e-9, abs=1e-9)
