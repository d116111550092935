"""What a loading case is given, and how a timed run is judged by its tokens."""

from __future__ import annotations

from typing import Any

import pytest

from bench import verify_load
from bench.run import load_details, load_gate, load_kit

JOB: dict[str, Any] = {
    "axes": {"page_cache": "warm"}, "end": 9, "expected": {"documents": 3, "tokens": 100, "total": 5000},
}  # fmt: skip


def metrics(**values: float | None) -> list[dict[str, Any]]:
    rows = {"tokens": 120, "token_sum": 5000 + 20 * 9, "padding": 17, "page_cache_resident_share": 1.0}
    return [{"type": "metric", "metric": name, "value": value} for name, value in (rows | values).items()]


def test_right_tokens() -> None:
    assert load_kit.problem(JOB, metrics()) == ""
    assert load_kit.problem({**JOB, "expected": None}, metrics(tokens=3)) == ""


@pytest.mark.parametrize("wrong", [{"tokens": 119}, {"token_sum": 5181}, {"padding": 16}, {"tokens": None}])
def test_wrong_tokens(wrong: dict[str, Any]) -> None:
    reason = load_kit.problem(JOB, metrics(**wrong))
    assert reason.startswith("wrong tokens: ") and "the corpus has 103, sum 5,027" in reason


def test_a_page_cache_that_stays_warm() -> None:
    job = {**JOB, "axes": {"page_cache": "cold"}}
    assert load_kit.problem(job, metrics(page_cache_resident_share=0.01)) == ""
    assert "90% of the files stayed in it" in load_kit.problem(job, metrics(page_cache_resident_share=0.9))
    assert "does not say" in load_kit.problem(job, metrics(page_cache_resident_share=None))


def test_threads_of_tokenizers_follow_the_cores() -> None:
    assert load_kit.variables({"cpus": [0]}) == {"TOKENIZERS_PARALLELISM": "false"}
    assert load_kit.variables({"cpus": [0, 1]}) == {"TOKENIZERS_PARALLELISM": "true"}


# ----------------------------------------------------------------------------------------------- calibration
def test_the_search_goes_option_by_option_and_keeps_the_best() -> None:
    asked: list[dict[str, Any]] = []

    def speed(point: dict[str, Any]) -> float | None:
        asked.append(point)
        if point["start"] == "broken":
            return None
        return point["workers"] * 10 - abs(point["chunk"] - 16)

    grid = {"workers": [1, 2, 4], "chunk": [4, 16, 64], "start": ["fork", "broken"]}
    best = load_gate.search(grid, {"workers": 1, "chunk": 4, "start": "fork"}, speed)
    assert best == {"workers": 4, "chunk": 16, "start": "fork"}
    assert len(asked) == 1 + 2 + 2 + 1, "as many as the grid has values, not their product"


def test_a_start_that_fails_is_left_behind() -> None:
    speeds = {"a": None, "b": 2.0, "c": 1.0}
    assert load_gate.search({"x": ["a", "b", "c"]}, {"x": "a"}, lambda p: speeds[p["x"]]) == {"x": "b"}
    assert load_gate.search({"x": ["a"]}, {"x": "a"}, lambda p: None) == {"x": "a"}


def test_a_point_that_works_before_its_first_batch_is_not_preferred() -> None:
    def at(rate: float | None, cpu: float | None) -> float | None:
        rows = metrics(tokens_per_s=rate, cpu_s_per_mtok=cpu)
        return load_gate.believable(rows, 2)

    assert at(1e9, 0.02) == pytest.approx(1.5e8) and at(5e7, 0.02) == 5e7
    assert at(5e7, None) == 5e7 and at(None, 0.02) is None


# -------------------------------------------------------------------------------------------------- the gate
A, B, C = (bytes([i]) * 16 for i in range(3))
SEEN = {"tokens": 30, "padding": 4, "padding_said": 4, "shape": 0, "dtype": 0, "contiguous": 0, "streams": 1}
EXPECTED = {"documents": 3, "tokens": 23}


def judged(got: list[bytes], order: str = "", **seen: int) -> dict[str, float]:
    rows = verify_load.judge(got, SEEN | seen, [A, B, C], EXPECTED, order)
    return {row.measure: row.error for row in rows if not row.ok}


def test_a_multiset_is_compared_and_order_where_it_is_promised() -> None:
    assert judged([A, B, C]) == judged([C, A, B]) == {}
    assert judged([C, B, A], "corpus") == {"order": 2.0}
    assert judged([C, B, A], "corpus", streams=2) == judged([C, B, A], "seed") == {}
    assert judged([A, B]) == {"documents": 1.0}
    assert judged([A, B, C, C]) == {"documents": 1.0}
    assert judged([A, B, b"x" * 16]) == {"documents": 2.0}


def test_shapes_and_padding_count() -> None:
    assert judged([A, B, C], shape=1, dtype=2) == {"shape": 1.0, "dtype": 2.0}
    assert judged([A, B, C], padding_said=5) == {"padding": 1.0}
    assert judged([A, B, C], tokens=29) == {"tokens": 1.0}
    status, reason = verify_load.verdict(verify_load.judge([A], SEEN, [A, B, C], EXPECTED, ""))
    assert status == "not comparable" and reason.startswith("parity: documents: 2 of 3 are missing")


def test_files_that_cannot_be_read(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        verify_load.read(tmp_path)
    (tmp_path / "documents.json").write_text('{"tokens": "x"}')
    with pytest.raises(ValueError, match="cannot be read"):
        verify_load.read(tmp_path)
    (tmp_path / "documents.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="no number of hashes"):
        verify_load.hashes(tmp_path / "documents.bin")


def test_what_is_observed_apart() -> None:
    from types import SimpleNamespace

    def wanted(details: list[str], **axes: Any) -> list[str]:
        case = SimpleNamespace(axes={"cores": 2, "page_cache": "warm", **axes})
        plan: Any = SimpleNamespace(groups={"g": [case]}, suite={"details": details})
        return load_details.wanted(plan, "g")

    assert wanted(["breakdown", "gil"]) == ["consumer", "breakdown", "gil"]
    assert wanted(["breakdown", "gil"], cores=1) == ["consumer", "breakdown"]
    assert wanted([]) == []
