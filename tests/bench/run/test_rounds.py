"""Order within rounds, names of rounds, and how a round's process ends."""

from __future__ import annotations

import errno
import itertools
import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import domains
from bench import plan as planning
from bench.run import gate, isolate, load_details, rounds

slugs = st.text("abcxyz019-.", min_size=1, max_size=30)


@given(st.integers(1, 99), slugs, st.integers(0, 999), st.integers(0, 99))
def test_a_round_id_survives(session: int, group: str, index: int, attempt: int) -> None:
    name = rounds.round_id(f"s{session}", group, index, attempt)
    assert rounds.parse_round_id(name) == (f"s{session}", group, index, attempt)


arms = st.lists(st.text("abcdef:-", min_size=1, max_size=5), min_size=1, max_size=9, unique=True)
seeds = st.integers(0, 2**32)


@given(arms, st.integers(0, 40), seeds)
def test_every_round_has_every_arm_once(names: list[str], count: int, seed: int) -> None:
    orders = planning.orders(names, count, seed)
    assert len(orders) == count
    assert all(sorted(order) == sorted(names) for order in orders)


@given(arms, st.integers(1, 30), seeds)
def test_a_longer_plan_goes_on_where_a_shorter_one_ended(names: list[str], count: int, seed: int) -> None:
    """So that a round makes its order itself, and resuming with more rounds repeats none."""
    assert planning.orders(names, count + 7, seed)[:count] == planning.orders(names, count, seed)


@given(st.integers(1, 3), st.integers(1, 3), seeds)
def test_up_to_three_arms_take_every_permutation_before_any_twice(n: int, blocks: int, seed: int) -> None:
    names = list("abc")[:n]
    permutations = list(itertools.permutations(names))
    orders = planning.orders(names, blocks * len(permutations), seed)
    for start in range(0, len(orders), len(permutations)):
        block = orders[start : start + len(permutations)]
        assert sorted(map(tuple, block)) == sorted(permutations)


@given(st.integers(2, 11), seeds)
def test_more_arms_are_balanced_for_place_and_predecessor(n: int, seed: int) -> None:
    """In a whole block every arm has every place, and every other arm before it, equally often."""
    names = [f"arm{i}" for i in range(n)]
    rows = len(planning.williams(names))
    block = planning.orders(names, rows, seed) if n > 3 else planning.williams(names)
    places = Counter((place, arm) for order in block for place, arm in enumerate(order))
    assert set(places.values()) == {rows // n} and len(places) == n * n
    followers = Counter(pair for order in block for pair in itertools.pairwise(order))
    assert set(followers.values()) == {rows // n} and len(followers) == n * (n - 1)


def test_seeds_shuffle() -> None:
    orders = {str(planning.orders("abc", 6, seed)) for seed in range(20)}
    assert len(orders) > 10


# ------------------------------------------------------------------------------------- a round's process
@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`main` without what would make the test's own process a round's."""
    monkeypatch.setattr(isolate, "become_subreaper", lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("raised", "code"),
    [(None, 0), (KeyboardInterrupt(), 3), (OSError(errno.ENOSPC, "No space left on device"), 5),
     (OSError(errno.EDQUOT, "Disk quota exceeded"), 5)],
)  # fmt: skip
def test_how_it_ends(
    process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: Any, code: int
) -> None:
    called: list[Any] = []

    def work(*arguments: Any) -> int:
        called.append(arguments)
        if raised:
            raise raised
        return 0

    monkeypatch.setattr(rounds, "run_round", work)
    monkeypatch.setattr(gate, "run_gate", work)
    monkeypatch.setattr(load_details, "run_details", work)
    domain = {"gate:g": domains.DOMAINS["train"], "details:g": domains.DOMAINS["load"]}
    monkeypatch.setattr(rounds, "domain_of", lambda out, name: domain[name])
    assert rounds.main(["out", "s1.g.r0.0"]) == code
    assert rounds.main(["out", "gate:g"]) == code
    assert rounds.main(["out", "details:g"]) == code
    assert called == [(Path("out"), "s1.g.r0.0"), (Path("out"), "g"), (Path("out"), "g")]
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said == ([{"event": "disk", "reason": raised.strerror}] * 3 if code == 5 else [])


def test_a_missing_file_is_not_a_full_disk(process: None, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        rounds.main([str(tmp_path), "s1.g.r0.0"])


def test_a_signal_stops_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(isolate, "stopping", threading.Event())
    with pytest.raises(KeyboardInterrupt):
        rounds.stop(signal.SIGTERM, None)
    assert isolate.stopping.is_set()


def test_cases_are_given_up_within_a_session() -> None:
    cases = [SimpleNamespace(case_id=name) for name in ("good", "bad", "refused", "unlucky")]
    context: Any = SimpleNamespace(session={"session": "s2"}, plan=SimpleNamespace(groups={"g": cases}))
    verdicts = {c.case_id: {"status": "failed" if c.case_id == "refused" else "ok"} for c in cases}

    def row(case_id: str, **changed: str) -> dict[str, str]:
        fields = {"kind": "timed", "session": "s2", "status": "failed", "reason": "crash"}
        return {**fields, "case_id": case_id, **changed}

    rows = [row("bad"), row("bad"), row("good", status="ok"), row("good"), row("good", reason="interrupted")]
    rows += [row("unlucky"), row("unlucky", session="s1"), row("unlucky", kind="parity")]
    found = rounds.runnable(context, "g", {"cases": verdicts}, rows)
    assert [c.case_id for c in found] == ["good", "unlucky"]
