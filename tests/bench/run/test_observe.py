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
from tests.fixtures.runs import Workplace, needs_compiler

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


def fault_of(row: dict[str, Any]) -> str:
    return str(row["arm"]).partition(":")[2]


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hostile_workers(tmp_path: Path) -> None:
    """One run of every fault, beside a worker that does its work."""
    place = Workplace(tmp_path, [*GATE, *filter(None, TIMED)], rounds=1, timeout_s=TIMEOUT_S)
    code, said = place.run()
    assert code == 1, said
    assert "Traceback" not in said
    assert place.alive() == []
    assert [path.name for path in (place.out / "artifacts").glob(".*")] == []
    verdicts, rows = place.gate(), {fault_of(row): row for row in place.rows()}
    assert len(rows) == len(place.rows()) == len(TIMED)
    told = said.partition("not timed: ")[2]
    for fault, (status, _) in {**GATE, **TIMED}.items():
        assert (f"hostile-{fault}." in told) == (status in ("failed", "not comparable")), fault
    for fault, (status, reason) in GATE.items():
        found = verdicts[fault]
        assert (found["status"], found["reason"][: len(reason)]) == (status, reason), fault
        assert found["reason"].isprintable() and len(found["reason"]) <= 1000
        assert fault not in rows
    for fault, (status, reason) in TIMED.items():
        row = rows[fault]
        assert (row["status"], row["reason"][: len(reason)]) == (status, reason), fault
        assert bool(row["reason"]) == (status == "failed") and row["wall_s"] > 0, fault
        check_artifacts(place.out / "artifacts" / row["run_id"], row, place.scratch)
    check_noise(place.out / "artifacts" / rows["noise"]["run_id"])


def check_artifacts(directory: Path, row: dict[str, Any], scratch: Path) -> None:
    """Messages that are messages, a log without this machine in it, and pyperf's file for what is ok."""
    for line in (directory / "messages.jsonl").read_text().splitlines():
        assert json.loads(line)["type"]
    log = (directory / "log.txt").read_text()
    assert str(scratch) not in log and not (directory / "stderr.txt").exists()
    assert len(log) < 5 << 20
    path = directory / "pyperf.json"
    assert path.exists() == (row["status"] == "ok"), row["arm"]
    if path.exists():
        (benchmark,) = pyperf.BenchmarkSuite.load(str(path)).get_benchmarks()
        assert (benchmark.get_name(), benchmark.get_nvalue()) == (row["case_id"], 3)


def check_noise(directory: Path) -> None:
    """Not one message among the noise is lost."""
    messages = [json.loads(line) for line in (directory / "messages.jsonl").read_text().splitlines()]
    assert sum(m["type"] == "value" and not m["warmup"] for m in messages) == 3
    assert [m["type"] for m in messages].count("done") == 1
    assert "no message of the protocol" in (directory / "log.txt").read_text()


# ------------------------------------------------------------------------------------ pieces of its own
def value(warmup: bool, steps: int = 4) -> dict[str, Any]:
    return {"type": "value", "warmup": warmup, "steps": steps, "wall_ns": 1000, "index": 0}


def test_a_worker_that_is_done_has_done_its_job() -> None:
    job = {"kind": "timed", "values": 2, "steps_per_value": 4, "workload": "train/gpt-tiny"}
    assert observe.shortfall(job, [value(True), value(False), value(False)]) == ""
    assert observe.shortfall(job, [value(True), value(False)]) == "crash: ended after 1 of 2 values"
    assert observe.shortfall(job, [value(False)] * 3) == "crash: ended after 3 of 2 values"
    wrong = [value(True, 5), value(False), value(False)]
    assert observe.shortfall(job, wrong) == "crash: values of 5 steps instead of 4"
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
