"""The local launcher: interrupted, killed, out of disk or time, and resumed, without orphans or lost rows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import plan as planning
from bench.errors import UserError
from bench.run import execute, local, rounds
from tests.fixtures.runs import OUTSIDE, PATIENCE_S, Workplace, needs_compiler, until


def whole_run(test: Any) -> Any:
    """Of the command line, in processes of its own."""
    linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is left running")
    return linux(needs_compiler(pytest.mark.slow(pytest.mark.timeout(900)(test))))


@contextlib.contextmanager
def hung(place: Workplace) -> Iterator[subprocess.Popen[str]]:
    """A run whose second observation of a round never ends; the first one of that round is finished."""
    process = place.start()
    try:
        until(lambda: (place.scratch / "waiting").exists() or process.poll() is not None, "it hangs")
        assert process.poll() is None, process.communicate()
        yield process
        until(lambda: not place.alive(), "nothing of the run is left")
    finally:
        process.kill()
        process.communicate()


def finished(place: Workplace) -> dict[str, bytes]:
    """Rows of timed observations as they lie on disk, by run id."""
    names = [row["run_id"] for row in place.rows()]
    return {name: (place.out / "artifacts" / name / "run.json").read_bytes() for name in names}


def resume(place: Workplace, before: dict[str, bytes], expected: tuple[int, int] | None = (0, 1)) -> None:
    """Lets the run go on to its end, and asserts what that means: of two rounds one was begun twice."""
    assert before, "nothing was measured before the interruption"
    (place.scratch / "go").touch()
    code, said = place.run("--resume")
    assert code == 0, said
    after = finished(place)
    assert {name: after[name] for name in before} == before
    plan = planning.from_json(json.loads((place.out / "plan.json").read_text()))
    done, attempts = local.completed_rounds(plan, place.out, "s1")
    assert sorted(index for _, index in done) == [0, 1]
    assert expected is None or tuple(sorted(attempts.values())) == expected
    rows = place.rows()
    for (group, index), attempt in attempts.items():
        whole = [r for r in rows if r["round_id"] == rounds.round_id("s1", group, index, attempt)]
        assert [r["status"] for r in whole] == ["ok", "ok"]
        assert sorted(r["order"] for r in whole) == [0, 1]
    assert place.alive() == []


@whole_run
def test_ctrl_c_then_resume(tmp_path: Path) -> None:
    place = Workplace(tmp_path, ["hang-midway"], rounds=2)
    with hung(place) as process:
        before = place.snapshot()
        code, said = place.run()
        assert code == 2 and "already holds a run" in said
        code, said = place.run("--resume")
        assert code == 2 and "another run is writing" in said
        assert place.snapshot() == before
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130 and "Traceback" not in said, said
    assert [p.name for p in (place.out / "artifacts").glob(".*")] == []
    rows = place.rows()
    assert [(r["status"], r["reason"]) for r in rows[-2:]] == [("ok", ""), ("failed", "interrupted")]
    log = place.out / "artifacts" / rows[-1]["run_id"] / "log.txt"
    assert log.exists() and not log.with_name("stderr.txt").exists()
    resume(place, finished(place))

    settled = place.snapshot()
    for other in (["--set", "seed=1"], ["--set", "values=4"], ["--cases", "*midway*"], ["--set", "batch=8"]):
        code, said = place.run("--resume", *other)
        assert code == 2 and "--resume" in said, said
        assert place.snapshot() == settled


@whole_run
def test_sigterm_is_an_interruption_too(tmp_path: Path) -> None:
    """As a queue ends a job whose time is over."""
    place = Workplace(tmp_path, ["hang-midway"], rounds=2)
    with hung(place) as process:
        process.terminate()
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130
    assert place.rows()[-1]["reason"] == "interrupted"


@whole_run
def test_the_harness_is_killed_then_resumed(tmp_path: Path) -> None:
    place = Workplace(tmp_path, ["hang-midway"], rounds=2)
    with hung(place) as process:
        process.kill()
        process.communicate(timeout=PATIENCE_S)
    resume(place, finished(place))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a small file system here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@whole_run
def test_the_disk_is_full_then_resumed(tmp_path: Path, small_disk: Path) -> None:
    place = Workplace(tmp_path, ["fill-midway"], rounds=2)
    place.out = small_disk / "out"
    code, said = place.run()
    assert code == 1 and "Traceback" not in said, said
    assert "No space left on device" in said
    before = finished(place)
    assert all(json.loads(row)["status"] == "ok" for row in before.values())
    code, said = place.run("--resume")  # still full
    assert code == 1 and "Traceback" not in said, said
    assert finished(place) == before
    (place.out / "ballast").unlink()
    resume(place, before, None)  # which row still had room is the file system's matter


@whole_run
def test_out_of_time_before_anything_was_timed(tmp_path: Path) -> None:
    place = Workplace(tmp_path, [], rounds=2)
    code, said = place.run("--time-budget", "1s")
    assert code == 4
    assert "out of time" in said and "--resume" in said
    assert place.rows() == []


# ------------------------------------------------------------------------------------- without processes
@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> planning.Plan:
    """Two groups of two arms, three rounds."""
    monkeypatch.setattr("tests.fixtures.runs.plain_c", lambda: Path("plain_c"))
    place = Workplace(tmp_path, ["dies"], rounds=3)
    return plan_of(place, "batch=[4, 8]")


def plan_of(place: Workplace, *settings: str) -> planning.Plan:
    paths = [place.directory, OUTSIDE]
    return execute.plan_for(str(place.suite), cases="*", settings=settings, paths=paths)


def put(out: Path, case: planning.Case, index: int, attempt: int = 0, **changed: Any) -> None:
    """The row of a timed observation."""
    name = f"{len(list(out.glob('artifacts/*'))):04d}-timed"
    row = {
        "run_id": name, "kind": "timed", "session": "s1", "group": case.group, "case_id": case.case_id,
        "round_id": rounds.round_id("s1", case.group, index, attempt), "status": "ok", "reason": "",
    }  # fmt: skip
    (out / "artifacts" / name).mkdir(parents=True)
    (out / "artifacts" / name / "run.json").write_text(json.dumps({**row, **changed}))


def pass_gate(out: Path, cases: list[planning.Case], failed: tuple[str, ...] = ()) -> None:
    status = {c.case_id: {"status": "failed" if c.arm in failed else "ok", "reason": ""} for c in cases}
    (out / "gates").mkdir(exist_ok=True)
    (out / "gates" / f"s1.{cases[0].group}.json").write_text(json.dumps({"cases": status}))


def test_a_fresh_plan_is_done_breadth_first(plan: planning.Plan, tmp_path: Path) -> None:
    a, b = plan.groups
    tasks = local.schedule(plan, tmp_path / "out", "s1", 3)
    assert tasks == [
        ("gate", a, ""), ("round", a, f"s1.{a}.r0.0"), ("gate", b, ""), ("round", b, f"s1.{b}.r0.0"),
        ("round", a, f"s1.{a}.r1.0"), ("round", b, f"s1.{b}.r1.0"),
        ("round", a, f"s1.{a}.r2.0"), ("round", b, f"s1.{b}.r2.0"),
    ]  # fmt: skip
    assert local.schedule(plan, tmp_path / "out", "s1", 0) == [("gate", a, ""), ("gate", b, "")]


def test_an_interrupted_round_is_repeated_whole_under_the_next_attempt(
    plan: planning.Plan, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    a, b = plan.groups
    one, two = plan.groups[a]
    out.mkdir()
    pass_gate(out, [one, two])
    for case in (one, two):
        put(out, case, 0)
    put(out, one, 1)
    put(out, two, 1, status="failed", reason="interrupted")
    assert local.completed_rounds(plan, out, "s1")[0] == {(a, 0)}
    tasks = local.schedule(plan, out, "s1", 2)
    assert tasks == [("gate", b, ""), ("round", b, f"s1.{b}.r0.0"), ("round", a, f"s1.{a}.r1.1"),
                     ("round", b, f"s1.{b}.r1.0")]  # fmt: skip
    put(out, one, 1, attempt=1)
    assert local.completed_rounds(plan, out, "s1")[0] == {(a, 0)}
    put(out, two, 1, attempt=1, status="failed", reason="crash")
    assert local.completed_rounds(plan, out, "s1")[0] == {(a, 0), (a, 1)}
    assert local.completed_rounds(plan, out, "s2") == (set(), {})


def test_a_case_that_keeps_failing_holds_no_round_up(plan: planning.Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    group = next(iter(plan.groups))
    one, two = plan.groups[group]
    out.mkdir()
    pass_gate(out, [one, two])
    for index in range(rounds.GIVE_UP_AFTER):
        put(out, one, index)
        put(out, two, index, status="failed", reason="crash")
    put(out, one, rounds.GIVE_UP_AFTER)
    rows = list(rounds.read_rows(out))
    assert rounds.given_up(rows, "s1") == {two.case_id}
    assert rounds.given_up(rows, "s2") == set()
    assert len(local.completed_rounds(plan, out, "s1")[0]) == rounds.GIVE_UP_AFTER + 1


def test_a_case_that_the_gate_refused_is_not_waited_for(plan: planning.Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    group = next(iter(plan.groups))
    one, two = plan.groups[group]
    out.mkdir()
    pass_gate(out, [one, two], failed=(two.arm,))
    put(out, one, 0)
    assert local.completed_rounds(plan, out, "s1")[0] == {(group, 0)}


def test_an_unreadable_row_is_passed_over(plan: planning.Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    case = plan.cases[0]
    put(out, case, 0)
    for name, text in (("0007-timed", "{"), ("0008-timed", "[]"), ("0009-timed", '{"run_id": "other"}')):
        (out / "artifacts" / name).mkdir()
        (out / "artifacts" / name / "run.json").write_text(text)
    (out / "artifacts" / ".0010-timed.tmp").mkdir()
    assert [row["run_id"] for row in rounds.read_rows(out)] == ["0000-timed"]


def test_a_directory_of_something_else_is_left_alone(plan: planning.Plan, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("It was a dark and stormy night")
    for resume in (False, True):
        with pytest.raises(UserError, match="no results of stackbench"):
            local.begin(plan, tmp_path / "thesis", resume=resume)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter1"]


def test_resuming_needs_the_same_work(plan: planning.Plan, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert local.begin(plan, out, resume=True) is plan
    text = (out / "plan.json").read_text()
    with pytest.raises(UserError, match="already holds a run"):
        local.begin(plan, out, resume=False)
    more = dataclasses.replace(plan, suite={**plan.suite, "rounds": 9, "price_per_hour": 2.0})
    assert local.begin(more, out, resume=True).suite["rounds"] == 9
    fewer = dataclasses.replace(plan, cases=plan.cases[:3])
    with pytest.raises(UserError, match="other cases") as error:
        local.begin(fewer, out, resume=True)
    assert plan.cases[3].case_id in str(error.value)
    longer = dataclasses.replace(plan, suite={**plan.suite, "value_s": 2.5})
    with pytest.raises(UserError, match=r"value_s = 0\.002 there, 2\.5 here"):
        local.begin(longer, out, resume=True)
    assert (out / "plan.json").read_text() == text
    (out / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="no plan of this version"):
        local.begin(plan, out, resume=True)


def test_two_runs_never_share_a_directory(tmp_path: Path) -> None:
    with local.locked(tmp_path):
        with pytest.raises(UserError, match="another run"), local.locked(tmp_path):
            pass
        with pytest.raises(UserError, match="another run"), local.locked(tmp_path):
            pass
    with local.locked(tmp_path):
        pass


def test_an_unsteady_round_is_repeated_once(plan: planning.Plan, tmp_path: Path) -> None:
    """That is the machine's doing: the case is not given up, and the row of a later attempt replaces it."""
    out = tmp_path / "out"
    group = next(iter(plan.groups))
    one, two = plan.groups[group]
    out.mkdir()
    pass_gate(out, [one, two])
    restless = {"status": "failed", "reason": "not steady: after 5.0 s of warm-up"}
    for index in (0, 1, 2):
        put(out, one, index)
        put(out, two, index, **restless)
    assert local.completed_rounds(plan, out, "s1")[0] == set()
    tasks = [task for task in local.schedule(plan, out, "s1", 3) if task[:2] == ("round", group)]
    assert [name for _, _, name in tasks] == [rounds.round_id("s1", group, i, 1) for i in (0, 1, 2)]
    put(out, one, 0, attempt=1)
    put(out, two, 0, attempt=1)
    put(out, one, 1, attempt=1)
    put(out, two, 1, attempt=1, **restless)
    assert local.completed_rounds(plan, out, "s1")[0] == {(group, 0), (group, 1)}
    rows = list(rounds.read_rows(out))
    assert rounds.given_up(rows, "s1") == set()
    assert rounds.superseded(rows) == {"0001-timed"}


def reference_row(start: int, wall_s: float | None, role: str = "reference: x") -> dict[str, Any]:
    return {"role": role, "wall_s": wall_s, "started": f"2026-01-01T00:00:{start:02d}.000+00:00"}


def test_references_at_once_count_once() -> None:
    rows = [reference_row(0, 4.0), reference_row(2, 3.0), reference_row(10, 1.0), reference_row(11, None)]
    assert local.overlap(rows) == pytest.approx(2.0)
    assert local.overlap([reference_row(0, 50.0, "timed shape"), *rows]) == pytest.approx(2.0)
    assert local.overlap([]) == 0
