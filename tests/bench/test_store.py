"""Artifacts become typed tables; what is foreign or broken becomes a row with a reason, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from bench import schema, store
from bench.errors import UserError
from tests.fixtures.results import Results, make


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("pristine") / "good")


@pytest.fixture
def good(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "good")


def timed(out: Path) -> list[Path]:
    return sorted(p for p in (out / "artifacts").iterdir() if "-timed-" in p.name)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_every_table_has_exactly_the_schema(good: Path) -> None:
    tables = store.build(good)
    assert set(tables.frames) == set(schema.TABLES)
    for name, frame in tables.frames.items():
        assert dict(frame.schema) == store.dtypes(name), name
    assert len(tables["runs"]) == 6 + 36 and len(tables["cases"]) == 6 and len(tables["problems"]) == 0
    assert tables["values"].filter(~pl.col("is_warmup")).height == 36 * 5


def test_load_reads_what_build_wrote(good: Path) -> None:
    built, loaded = store.build(good), store.load([good])
    for name in schema.TABLES:
        assert built[name].equals(loaded[name]), name
    paths = list((good / "tables").rglob("*"))
    assert {p.name for p in paths if p.is_file()} == {"s1.parquet"}  # no temporary file is left
    metadata = pl.read_parquet_metadata(good / "tables/runs/s1.parquet")
    assert metadata[store.VERSION] == str(schema.SCHEMA_VERSION)


def test_tables_are_built_again_when_artifacts_change(good: Path) -> None:
    before = store.load([good])
    mark = (good / "tables/runs/s1.parquet").stat().st_mtime_ns
    store.load([good])
    assert (good / "tables/runs/s1.parquet").stat().st_mtime_ns == mark
    shutil.rmtree(timed(good)[0])
    assert len(store.load([good])["runs"]) == len(before["runs"]) - 1


def test_broken_tables_are_built_again(good: Path) -> None:
    store.build(good)
    for path in (good / "tables").rglob("*.parquet"):
        path.write_bytes(b"not parquet")
    assert len(store.load([good])["runs"]) == 42


def test_released_tables_without_artifacts(good: Path, tmp_path: Path) -> None:
    store.build(good)
    shutil.copytree(good / "tables", tmp_path / "release" / "tables")
    assert len(store.load([tmp_path / "release"])["runs"]) == 42
    (tmp_path / "release/tables/runs/s1.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(UserError, match="no table of stackbench"):
        store.load([tmp_path / "release"])


def test_old_and_new_columns_are_read_together(good: Path, tmp_path: Path) -> None:
    store.build(good)
    out = shutil.copytree(good / "tables", tmp_path / "release" / "tables").parent
    path = out / "tables/values/s1.parquet"
    frame = pl.read_parquet(path)
    frame.drop("device_ns").with_columns(pl.lit(1).alias("from_the_future")).write_parquet(path)
    values = store.load([out])["values"]
    assert values.columns == list(schema.TABLES["values"]) and values["device_ns"].null_count() == len(values)


def test_a_directory_that_cannot_be_written_is_still_read(
    good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert len(store.load([good])["runs"]) == 42
    assert not (good / "tables").exists()


def test_several_directories_keep_their_sessions_apart(good: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", seed=5)
    tables = store.load([good, other, good])
    assert sorted(tables["sessions"]["session"]) == ["good/s1", "other/s1"]
    assert set(tables["runs"]["session"]) == {"good/s1", "other/s1"}


# ------------------------------------------------------------------------------------------- complete rounds
def complete(out: Path) -> dict[tuple[str, int], bool]:
    runs = store.build(out)["runs"].filter(pl.col("kind") == "timed")
    return {
        (group, index): bool(all(flags))
        for group, index, flags in runs.group_by("group", "round_index").agg("complete").iter_rows()
    }


def test_a_round_is_complete_when_every_arm_finished(good: Path) -> None:
    assert all(complete(good).values())
    lost = json.loads((timed(good)[4] / "run.json").read_text())
    shutil.rmtree(timed(good)[4])
    found = complete(good)
    index = int(lost["round_id"].rsplit(".r", 1)[1].split(".")[0])
    assert found.pop((lost["group"], index)) is False
    assert all(found.values())


def test_an_interrupted_observation_does_not_complete_its_round(good: Path) -> None:
    edit(timed(good)[0] / "run.json", lambda r: {**r, "status": "failed", "reason": "interrupted"})
    assert list(complete(good).values()).count(False) == 1


def test_a_case_that_was_given_up_is_not_waited_for(tmp_path: Path) -> None:
    out = make(tmp_path / "r", fail=lambda w, a, i: "crash: x" if a == "jax-xla" and i < 2 else "")
    for path in timed(out):
        row = json.loads((path / "run.json").read_text())
        if row["arm"] == "jax-xla" and ".r0." not in row["round_id"] and ".r1." not in row["round_id"]:
            shutil.rmtree(path)
    assert all(complete(out).values())


# --------------------------------------------------------------------------------------------- hostile input
BREAKAGES: dict[str, Callable[[Path], Any]] = {
    "empty run.json": lambda d: (d / "run.json").write_text(""),
    "no run.json": lambda d: (d / "run.json").unlink(),
    "run.json is a list": lambda d: (d / "run.json").write_text("[]"),
    "not UTF-8": lambda d: (d / "run.json").write_bytes(b"\xff\xfe{}"),
    "nested deeply": lambda d: (d / "run.json").write_text("[" * 100_000),
    "long number": lambda d: (d / "run.json").write_text('{"order": ' + "9" * 5000 + "}"),
    "too large": lambda d: (d / "run.json").write_text(" " * 2_000_000 + "{}"),
    "a pipe": lambda d: ((d / "run.json").unlink(), os.mkfifo(d / "run.json")),
    "a directory": lambda d: ((d / "run.json").unlink(), (d / "run.json").mkdir()),
    "another run id": lambda d: edit(d / "run.json", lambda r: {**r, "run_id": "../../etc"}),
    "a session that leaves": lambda d: edit(d / "run.json", lambda r: {**r, "session": "../../x"}),
    "a session of another type": lambda d: edit(d / "run.json", lambda r: {**r, "session": ["s1"]}),
    "an unknown status": lambda d: edit(d / "run.json", lambda r: {**r, "status": "excellent"}),
}  # fmt: skip


@pytest.mark.parametrize("how", BREAKAGES)
def test_an_unreadable_observation_is_a_row_with_a_reason(good: Path, how: str) -> None:
    target = timed(good)[3]
    BREAKAGES[how](target)
    tables = store.build(good)
    row = tables["runs"].filter(pl.col("run_id") == target.name).to_dicts()[0]
    assert row["status"] == "failed" and row["reason"].startswith("unreadable artifact: run.json")
    assert tables["problems"]["place"].to_list() == [f"artifacts/{target.name}"]
    assert not (good.parent / "x.parquet").exists()


VALUES = {
    "wall_ns": [None, -1, 0, "5", True, 1.5, 10**30, [1]], "steps": [0, None, "x"],
    "warmup": [None, 1, "yes"], "index": [None, "0", 1e300],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, vs in VALUES.items() for v in vs])
def test_a_malformed_value_fails_the_observation(good: Path, key: str, value: Any) -> None:
    target = timed(good)[3] / "messages.jsonl"
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    lines[3][key] = value
    target.write_text("\n".join(json.dumps(line) for line in lines))
    row = store.build(good)["runs"].filter(pl.col("run_id") == target.parent.name).to_dicts()[0]
    assert row["status"] == "failed" and "line 4" in row["reason"]


def test_lines_that_are_no_json_fail_an_ok_observation_only(good: Path) -> None:
    ok, failed = timed(good)[:2]
    edit(failed / "run.json", lambda r: {**r, "status": "failed", "reason": "crash: exit code 1"})
    for path in (ok, failed):
        with (path / "messages.jsonl").open("a") as file:
            file.write('{"type": "val\n')
    runs = {r["run_id"]: r for r in store.build(good).rows("runs")}
    assert runs[ok.name]["reason"].startswith("unreadable artifact: messages.jsonl line")
    assert runs[failed.name]["reason"] == "crash: exit code 1"


def test_odd_facts_become_null_or_text(good: Path) -> None:
    target = timed(good)[0]
    with (target / "messages.jsonl").open("a") as file:
        for message in (
            {"type": "metric", "metric": "energy_j", "value": float("inf"), "unit": 7, "phase": None},
            {"type": "metric", "metric": ["x"], "value": 1},
            {
                "type": "manifest",
                "facts": {"a": {"b": [1]}, "lone \ud800": "\udfff", "n": None, "pyperf.x": 1},
            },
            {"type": "manifest", "facts": "none"},
            {"type": "compiled", "first_step_s": "soon", "build_s": -1},
        ):
            file.write(json.dumps(message) + "\n")
    edit(target / "run.json", lambda r: {**r, "order": "first", "wall_s": float("nan"), "exit": 2**80})
    tables = store.build(good)
    run = tables["runs"].filter(pl.col("run_id") == target.name).to_dicts()[0]
    assert (run["status"], run["order"], run["wall_s"], run["exit"]) == ("ok", None, None, None)
    facts = dict(tables["manifest"].select("key", "value").iter_rows())
    assert (
        facts["a"] == '{"b":[1]}' and facts["lone ?"] == "?" and "n" not in facts and "pyperf.x" not in facts
    )
    metrics = tables["metrics"].filter(pl.col("run_id") == target.name, pl.col("metric") == "energy_j")
    assert metrics.to_dicts()[-1]["value"] is None


@pytest.mark.parametrize("name", ["environment.json", "wall.json", "gates"])
@pytest.mark.parametrize(
    "content", ["", "[1, 2]", '{"a": ', "null", '{"sessions": {"x": 1}, "cases": [], "rows": 3}']
)
def test_side_files_of_another_shape_are_problems_not_crashes(good: Path, name: str, content: str) -> None:
    path = good / name if name != "gates" else next((good / "gates").iterdir())
    path.write_text(content)
    tables = store.build(good)
    assert len(tables["cases"]) == 6 and len(tables["runs"]) == 42


def test_a_directory_that_is_not_ours(tmp_path: Path, good: Path) -> None:
    with pytest.raises(UserError, match="does not exist") as caught:
        store.load([tmp_path / "nothing"])
    assert str(good) in caught.value.valid and "stackbench run" in caught.value.next_command
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no plan\.json"):
        store.load([tmp_path / "empty"])


PLANS = [
    "", "[]", "{}", '{"schema_version": 99}', '{"schema_version": 1, "cases": 3}',
    '{"schema_version": 1, "cases": [{"case_id": 1}]}', '{"schema_version": 1, "cases": [[1]]}',
    '{"schema_version": 1, "cases": [], "suite": 1, "device": {}, "measure": {}}',
]  # fmt: skip


@pytest.mark.parametrize("content", PLANS)
def test_a_plan_that_is_none_is_the_users_to_correct(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match=r"plan\.json"):
        store.load([tmp_path])


def test_names_in_any_script_and_lone_surrogates(tmp_path: Path) -> None:
    out = Results(rename=lambda text: f"\ud800 ☃ <b> $x$ {text}", rounds=1).write(tmp_path / "r")
    tables = store.build(out)
    assert tables["runs"].filter(pl.col("kind") == "timed")["complete"].all()
    assert len(tables["problems"]) == 0
    assert tables["cases"]["case_id"].str.starts_with("? ☃").all()


def test_cold_sessions_and_hidden_directories(good: Path) -> None:
    (good / "artifacts/.unfinished.tmp").mkdir()
    assert len(store.build(good)["runs"]) == 42


def test_ceilings_of_the_doctor(good: Path) -> None:
    row = {
        "device_uuid": None,
        "metric": "copy",
        "dtype": "fp32",
        "size": 8,
        "value": 1.5,
        "unit": "B/s",
        "stack": "x",
    }
    (good / "doctor.json").write_text(json.dumps({"ceilings": [row, 3]}))
    assert store.build(good).rows("ceilings") == [row]
