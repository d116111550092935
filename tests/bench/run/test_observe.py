"""One observation of anybody's worker: it becomes a row with a reason, and the run goes on without it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyperf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.run import observe
from tests.fixtures.runs import PATIENCE_S, Workplace, needs_compiler

GATE = {  # fault: status, how the reason begins
    "gate-complains": ("failed", "crash: exit code 3: the disk is made of cheese"),
    "zero-step": ("failed", "crash: malformed message: metric: value"),
    "refuses": ("skipped", "unsupported: not on a Tuesday"),
    "no-parity": ("not comparable", "parity file cannot be read"),
    "bad-parity": ("not comparable", "parity file cannot be read"),
    "misshapen": ("not comparable", "parity: loss of step 0: error inf"),
}
TIMED = {
    "hang": ("failed", "timeout: no end after"),
    "dies": ("failed", "killed by SIGKILL"),
    "complains": ("failed", "crash: exit code 3: the disk is made of cheese"),
    "memory": ("failed", "out of memory: after 0 blocks"),
    "nan": ("failed", "crash: malformed message: value: wall_ns"),
    "lazy": ("failed", "crash: ended after 1 of 3 values"),
    "noise": ("ok", ""),
    "descendants": ("ok", ""),
    "odd-facts": ("ok", ""),
    "": ("ok", ""),
}
TIMEOUT_S = 15

hostile = [
    needs_compiler, pytest.mark.slow, pytest.mark.xdist_group("hostile"), pytest.mark.timeout(2 * PATIENCE_S)
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """One run of every fault, beside a worker that does its work."""
    faults = [*GATE, *filter(None, TIMED)]
    place = Workplace(tmp_path_factory.mktemp("hostile"), faults, rounds=1, timeout_s=TIMEOUT_S)
    place.code, place.said = place.run()
    return place


def fault_of(row: dict[str, Any]) -> str:
    return row["arm"].partition(":")[2]


class TestHostileWorkers:
    pytestmark = hostile

    def test_the_run_ends_and_says_that_something_failed(self, place: Any) -> None:
        assert place.code == 1, place.said
        assert "Traceback" not in place.said
        for fault, (status, _) in {**GATE, **TIMED}.items():
            failed = status in ("failed", "not comparable")
            assert (f"hostile-{fault}." in place.said.partition("not timed: ")[2]) == (failed and fault != "")

    @pytest.mark.parametrize("fault", GATE)
    def test_a_fault_in_the_gate_has_no_time(self, place: Any, fault: str) -> None:
        status, reason = GATE[fault]
        found = place.gate()[fault]
        assert found["status"] == status
        assert found["reason"].startswith(reason)
        assert found["reason"].isprintable() and len(found["reason"]) <= 1000
        assert fault not in {fault_of(row) for row in place.rows()}

    @pytest.mark.parametrize("fault", TIMED)
    def test_a_fault_in_timing_is_a_row(self, place: Any, fault: str) -> None:
        status, reason = TIMED[fault]
        (row,) = [row for row in place.rows() if fault_of(row) == fault]
        assert row["status"] == status
        assert row["reason"].startswith(reason) and (status == "failed") == bool(row["reason"])
        assert row["wall_s"] > 0
        directory = place.out / "artifacts" / row["run_id"]
        assert (directory / "pyperf.json").exists() == (status == "ok")
        for line in (directory / "messages.jsonl").read_text().splitlines():
            assert json.loads(line)["type"]
        log = (directory / "log.txt").read_text()
        assert str(place.scratch) not in log and not (directory / "stderr.txt").exists()
        assert len(log) < 5 << 20

    def test_noise_costs_no_message(self, place: Any) -> None:
        (row,) = [row for row in place.rows() if fault_of(row) == "noise"]
        path = place.out / "artifacts" / row["run_id"] / "messages.jsonl"
        messages = [json.loads(line) for line in path.read_text().splitlines()]
        assert sum(m["type"] == "value" and not m["warmup"] for m in messages) == 3
        assert [m["type"] for m in messages].count("done") == 1
        assert "no message of the protocol" in (path.parent / "log.txt").read_text()

    def test_pyperf_reads_what_was_timed(self, place: Any) -> None:
        for row in place.rows():
            if row["status"] == "ok":
                path = place.out / "artifacts" / row["run_id"] / "pyperf.json"
                (benchmark,) = pyperf.BenchmarkSuite.load(str(path)).get_benchmarks()
                assert benchmark.get_name() == row["case_id"]
                assert benchmark.get_nvalue() == 3

    def test_nothing_is_left_running(self, place: Any) -> None:
        assert place.alive() == []

    def test_no_temporary_directory_is_left(self, place: Any) -> None:
        assert [p.name for p in (place.out / "artifacts").glob(".*")] == []


# ------------------------------------------------------------------------------------ pieces of its own
def value(warmup: bool, steps: int = 4) -> dict[str, Any]:
    return {"type": "value", "warmup": warmup, "steps": steps, "wall_ns": 1000, "index": 0}


def test_a_worker_that_is_done_has_done_its_job() -> None:
    job = {"kind": "timed", "values": 2, "steps_per_value": 4}
    assert observe.shortfall(job, [value(True), value(False), value(False)]) == ""
    assert observe.shortfall(job, [value(True), value(False)]) == "ended after 1 of 2 values"
    assert observe.shortfall(job, [value(False)] * 3) == "ended after 3 of 2 values"
    wrong = [value(True, 5), value(False), value(False)]
    assert observe.shortfall(job, wrong) == "values of 5 steps instead of 4"
    assert observe.shortfall({**job, "kind": "parity"}, []) == ""


@given(st.text("ab{}%$ \\\"'"), st.text(max_size=8))
def test_only_known_places_are_filled(text: str, value: str) -> None:
    assert observe.fill(text, {"dir": value}) == text
    assert observe.fill(text + "{dir}", {"dir": value}) == text + value


names = st.text("abc", min_size=1, max_size=3)
files = st.dictionaries(st.tuples(names, names).map("/".join), st.binary(max_size=5), max_size=6)


def write(cache: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_bytes(data)


@settings(deadline=None, max_examples=60)
@given(before=files, written=files, removed=st.sets(st.integers(0, 5)))
def test_a_seeded_cache_gains_nothing(
    before: dict[str, bytes], written: dict[str, bytes], removed: set[int]
) -> None:
    """What a run adds is taken away again; what it added, removed or resized is counted."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        write(cache, before)
        sealed = observe.seal(cache)
        assert set(sealed) == set(before)
        assert observe.restore(cache, sealed) == 0
        write(cache, written)
        gone = {name for i, name in enumerate(sorted(before)) if i in removed} - set(written)
        for name in gone:
            os.unlink(cache / name)
        resized = {n for n in set(before) & set(written) if len(before[n]) != len(written[n])}
        changes = observe.restore(cache, sealed)
        assert changes == len(set(written) - set(before)) + len(gone) + len(resized)
        assert set(observe.seal(cache)) == set(before) - gone


ROW = {
    "case_id": "c", "steps_per_value": 4, "run_id": "r", "arm": "a", "session": "s1", "round_id": "s1.g.r0.0",
    "env_id": "e",
}  # fmt: skip


@pytest.mark.parametrize(
    "facts",
    [{}, {"pyperf.load_avg_1min": "much"}, {"pyperf.date": " "}, {"pyperf.mem_max_rss": 1.5},
     {"pyperf.cpu_freq": None}, {"pyperf.platform": "a\nb"}, {"pyperf.loops": "x", "pyperf.unit": "sheep"}],
)  # fmt: skip
def test_pyperf_json_with_anybodys_facts(tmp_path: Path, facts: dict[str, Any]) -> None:
    messages = [value(True), value(False), value(False), {"type": "manifest", "facts": facts}]
    path = tmp_path / "pyperf.json"
    observe.write_pyperf(path, ROW, messages)
    run = pyperf.Benchmark.load(str(path)).get_runs()[0]
    assert run.values == (2.5e-7, 2.5e-7)
    assert run.warmups == ((4, 2.5e-7),)
    assert run.get_metadata()["round_id"] == "s1.g.r0.0"


def test_no_pyperf_json_without_a_value(tmp_path: Path) -> None:
    observe.write_pyperf(tmp_path / "pyperf.json", ROW, [value(True)])
    assert not (tmp_path / "pyperf.json").exists()
