"""Stacks from outside, one in C and one in a single Python file: gate, timing and report like any other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyperf
import pytest

from bench import plan as planning
from bench import registry
from bench.errors import UserError
from bench.run import execute
from tests.fixtures.runs import COMPILER, OUTSIDE, PATIENCE_S, Workplace, plain_c, toml, write_toml

needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler `cc` here")
needs_torch = pytest.mark.skipif(not planning.installed("torch"), reason="torch is not installed")
slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(900)  # for hangs alone


def cpu_of_this_worker() -> str:
    """One CPU for a run's workers, another for each pytest-xdist worker: they then share none."""
    import os

    cpus = sorted(os.sched_getaffinity(0))
    number = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return f"affinity={cpus[int(number) % len(cpus)]}"


def stackbench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=registry.ROOT, timeout=3 * PATIENCE_S, check=False
    )


def gates(out: Path) -> dict[str, Any]:
    """Status and reason by stack."""
    (path,) = (out / "gates").glob("*.json")
    cases = json.loads(path.read_text())["cases"]
    return {case_id.split(".")[2]: row for case_id, row in cases.items()}


def timed(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(path.read_text()) for path in sorted(out.glob("artifacts/*/run.json"))]
    return [row for row in rows if row["kind"] == "timed"]


# ----------------------------------------------------------------------------- a stack in C, one in a file
@needs_cc
@needs_torch
@slow
def test_a_c_stack_and_a_python_stack_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite `outside` of `tests/fixtures/outside`, run and reported."""
    place = Workplace(tmp_path, [])  # for its text
    monkeypatch.setenv("STACKBENCH_CACHE", place.environment()["STACKBENCH_CACHE"])
    out, arms = tmp_path / "run", ["outside-torch", "plain-c", "torch-eager"]
    arguments = ["--path", str(OUTSIDE), "--out", str(out), "--corpus", str(tmp_path / "corpus")]
    done = stackbench("run", "outside", *arguments, "--set", cpu_of_this_worker())
    assert done.returncode == 0, done.stderr
    assert {arm: row["status"] for arm, row in gates(out).items()} == dict.fromkeys(arms, "ok")
    rows = timed(out)
    assert [row["status"] for row in rows] == ["ok"] * 6
    assert len({row["steps_per_value"] for row in rows}) == 1
    for name in {row["round_id"] for row in rows}:
        assert sorted(row["arm"] for row in rows if row["round_id"] == name) == arms
    c_row = next(row for row in rows if row["stack"] == "plain-c")
    check_messages(out / "artifacts" / c_row["run_id"] / "messages.jsonl")
    check_pyperf(out / "artifacts" / c_row["run_id"] / "pyperf.json", c_row["case_id"])
    check_report(out)


def check_messages(path: Path) -> None:
    """What the C stack says of itself."""
    messages = [json.loads(line) for line in path.read_text().splitlines()]
    assert [m["type"] for m in messages][:2] == ["event", "compiled"] and messages[-1]["type"] == "done"
    facts: dict[str, str] = {}
    for message in messages:
        facts.update(message.get("facts", {}))
    assert facts["dtype.weights"] == "float32" and facts["compile"]
    values = [m for m in messages if m["type"] == "value"]
    assert [m["warmup"] for m in values] == [True] * (len(values) - 3) + [False] * 3
    assert [m["index"] for m in values] == list(range(len(values)))


def check_pyperf(path: Path, case_id: str) -> None:
    (benchmark,) = pyperf.BenchmarkSuite.load(str(path)).get_benchmarks()
    assert benchmark.get_name() == case_id
    assert benchmark.get_nvalue() == 3 and min(benchmark.get_values()) > 0
    assert benchmark.get_metadata()["arm"] == "plain-c"
    for command in ("show", "stats", "hist"):
        words = [sys.executable, "-m", "pyperf", command, str(path)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


def check_report(out: Path) -> None:
    done = stackbench("report", str(out))
    assert done.returncode == 0, done.stderr
    assert "plain-c" in done.stdout and "outside-torch" in done.stdout
    assert "plain-c" in (out / "report.html").read_text()
    done = stackbench("compare", str(out), "--baseline", "torch-eager", "--json")
    assert done.returncode == 0 and "plain-c" in json.dumps(json.loads(done.stdout)), done.stderr


# ------------------------------------------------------------------------------------- faults in the C stack
@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
@slow
def test_faults_in_the_c_stack_have_no_time(tmp_path: Path) -> None:
    """Built with another epsilon, with the last token left out, and by a compiler that refuses."""
    place = Workplace(tmp_path, [], rounds=1)
    folder = OUTSIDE / "stacks" / "train"
    stacks = {
        "epsilon-c": ["-DFAULT=1", "{dir}/plain_c.c"], "last-token-c": ["-DFAULT=2", "{dir}/plain_c.c"],
        "broken-c": ["-DFAULT=", "{dir}/no_such_file.c"],
    }  # fmt: skip
    (tmp_path / "stacks" / "train" / "plain_c.c").write_text((folder / "plain_c.c").read_text())
    for name, flags in stacks.items():
        build = [str(COMPILER), "-O2", *flags, "-o", "{build}/worker", "-lm"]
        table = {"build": build, "argv": ["{build}/worker"], "devices": ["cpu"]}
        write_toml(tmp_path / "stacks" / "train" / f"{name.replace('-', '_')}.toml", table)
    suite = place.suite.read_text().replace(toml(["hostile"]), toml(["hostile", *stacks]))
    place.suite.write_text(suite)
    code, said = place.run()
    assert code == 1 and "Traceback" not in said, said
    found = gates(place.out)
    assert found["hostile"]["status"] == "ok", found
    for name in ("epsilon-c", "last-token-c"):
        assert found[name]["status"] == "not comparable", found[name]
        assert found[name]["reason"].startswith("parity: "), found[name]
    assert found["broken-c"]["status"] == "failed"
    assert found["broken-c"]["reason"].startswith("build failed: exit code 1:")
    assert (
        "no_such_file.c" in found["broken-c"]["reason"] and str(tmp_path) not in found["broken-c"]["reason"]
    )
    assert {row["arm"] for row in place.rows()} == {"hostile"}


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_the_c_stack_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    job = {"kind": "timed", "axes": {"batch": 1, "sequence": 2}, "batches": {"path": "b", "shape": [1, 1, 3]},
           "optimizer": {"decayed": []}}  # fmt: skip
    rows = [
        {"name": n, "shape": [2, 2], "seed": 1, "init": "ones", "scale": 0.5} for n in ("wte.weight", "h.0")
    ]
    for parameters, kind in ((rows, "unsupported"), ([], "unsupported"), (None, "bad job")):
        written = {**job, "parameters": parameters} if parameters is not None else job
        (tmp_path / "job.json").write_text(json.dumps(written))
        done = subprocess.run([plain_c(), tmp_path / "job.json"], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert json.loads(done.stdout.splitlines()[-1])["kind"] == kind


# ------------------------------------------------------------------------------------------- without running
def plan_of(directory: Path, suite: dict[str, Any], *settings: str, **keys: Any) -> planning.Plan:
    path = write_toml(directory / "suite.toml", {**keys, "matrix": [suite]})
    paths = [OUTSIDE, directory]
    return execute.plan_for(str(path), cases="*", settings=settings, paths=paths)


SUITE = {"workload": "train/c-tiny", "arms": ["plain-c"]}


@needs_cc
def test_a_case_beyond_what_a_stack_has_is_skipped_in_the_plan(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SUITE, 'precision=["fp32", "bf16"]', "accumulation=[1, 2]")
    skips = [case.skip for case in plan.cases]
    assert skips[0] is None and len(skips) == 4
    assert all(reason.startswith("plain-c has no ") for reason in skips[1:] if reason)
    assert None not in skips[1:]


def test_without_a_compiler_the_c_stack_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "compiler", lambda need: None)
    (case,) = plan_of(tmp_path, SUITE).cases
    assert case.skip is not None and case.skip.startswith("no c compiler found: ")


def test_suites_models_and_stacks_come_from_outside(tmp_path: Path) -> None:
    assert set(registry.suites([OUTSIDE])) == {*registry.suites(), "outside", "loaders"}
    assert set(registry.train_models([OUTSIDE])) == {*registry.train_models(), "c-tiny"}
    assert set(registry.stacks("train", [OUTSIDE])) == {*registry.stacks("train"), "plain-c", "outside-torch"}
    with pytest.raises(UserError, match="no such directory"):
        registry.roots([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.toml", "argv = 'python worker.py'", "argv = 'python worker.py': must be a list of strings"),
        ("a.toml", "argv = [1]", "must be a list of strings"),
        ("a.toml", "argv = ['x']\noptions = ['a']", "must be a table"),
        ("a.toml", "argv = ['x']\nneeds = ['fortran']", "unknown tool 'fortran'"),
        ("a.toml", "argv = ['x']\nargs = ['y']", "unknown key 'args' in STACK"),
        ("a.toml", "argv = [", "is not TOML"),
        ("a.toml", "argv = ['x']\n[variants]\ntuned = { fast = true }", "no option 'fast'"),
        ("a.py", "STACK = dict(a=1)", "must be a literal"),
        ("a.py", "STACK: object = 7", "must be a dictionary"),
        ("a.py", "STACK = {", "is not Python"),
        ("torch_eager.py", "STACK = {}", "is defined twice"),
    ],
)
def test_a_file_that_is_no_stack_is_refused_by_name(
    tmp_path: Path, name: str, text: str, complaint: str
) -> None:
    (tmp_path / "stacks" / "train").mkdir(parents=True)
    (tmp_path / "stacks" / "train" / name).write_text(text)
    with pytest.raises(UserError, match=complaint) as error:
        registry.stacks("train", [tmp_path])
    assert Path(name).stem in str(error.value).replace("-", "_")


def test_files_without_a_stack_are_no_stacks(tmp_path: Path) -> None:
    folder = tmp_path / "stacks" / "train"
    folder.mkdir(parents=True)
    (folder / "helper.py").write_text("x = 1\nraise SystemExit('was run')\n")
    (folder / "settings.toml").write_text("a = 1\n")
    assert set(registry.stacks("train", [tmp_path])) == set(registry.stacks("train"))
