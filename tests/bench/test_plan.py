"""Planning is pure: ids that never move, skips with their numbers, balanced orders, costs from history."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bench import devices, registry
from bench import plan as planning
from bench import suite as suites
from bench.devices import Device
from bench.errors import UserError
from bench.report import planned
from bench.run import execute
from bench.suite import ArmSpec, Matrix, Suite
from stacks.train import spec

CPU = Device(kind="cpu", name="Some CPU", memory_bytes=2**34, cpus=2)
SMALL_GPU = Device(kind="cuda", name="Small GPU", memory_bytes=2**30, uuid="GPU-0")
ARMS = ["jax-xla", "torch-eager", "torch-compile"]


def make(
    device: Device = CPU, *, check: bool = False, overrides: dict[str, Any] | None = None, cases: str = "*",
    keys: dict[str, Any] | None = None, **matrix: Any,
) -> planning.Plan:  # fmt: skip
    row = {"workload": "train/gpt-tiny", "arms": ARMS} | matrix
    suite = Suite(name="s", matrix=[Matrix(**row)], **(keys or {}))
    return planning.make(suite, device, overrides=overrides, cases=cases, check_installed=check)


def ids(plan: planning.Plan) -> list[str]:
    return [case.case_id for case in plan.cases]


# ----------------------------------------------------------------------------------------------------- ids
GOLDEN = [  # a change here orphans every stored result: only for a change of what the work is
    "gpt-tiny.b8-s64-fp32.jax-xla.6da3a4e7",
    "gpt-tiny.b8-s64-fp32.torch-eager.4e3e112e",
    "gpt-tiny.b8-s64-fp32.torch-compile.1ea4e4d5",
    "llama-tiny.b8-s64-fp32.jax-xla.f3cbf6da",
    "llama-tiny.b8-s64-fp32.torch-eager.a42001b9",
    "llama-tiny.b8-s64-fp32.torch-compile.ecf17a97",
]


@pytest.mark.parametrize("device", [CPU, SMALL_GPU, devices.known("h200")], ids=lambda d: d.name)
def test_ids_of_quick_are_the_same_everywhere(device: Device) -> None:
    quick, _ = suites.load("quick")
    assert ids(planning.make(quick, device, check_installed=False)) == GOLDEN


def test_ids_know_neither_rounds_nor_seeds_nor_caches_nor_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"rounds": 99, "seed": 5, "caches": "cold", "values": 2, "timeout_s": 5.0}
    monkeypatch.setattr("bench.__version__", "99")
    assert ids(make(keys=keys)) == ids(make()) == GOLDEN[:3]


@pytest.mark.parametrize(
    "change",
    [
        {"workload": "train/llama-tiny"},
        {"arms": ["torch-eager"]},
        {"arms": ["jax-xla:tuned"]},
        *({"axes": {name: value}} for name, value in [
            ("batch", 16), ("sequence", 32), ("precision", "bf16"), ("attention", "math"),
            ("loss", "chunked"), ("accumulation", 2), ("dropout", 0.1), ("remat", "block"),
            ("sync", "every-step"),
        ]),
    ],
    ids=str,
)  # fmt: skip
def test_ids_know_workload_stack_options_and_every_axis(change: dict[str, Any]) -> None:
    base, other = make(arms=["jax-xla"]).cases[0], make(**{"arms": ["jax-xla"]} | change).cases[0]
    assert base.case_id.rpartition(".")[2] != other.case_id.rpartition(".")[2], "the hashes"
    assert (base.group == other.group) == ("arms" in change)
    for name, value in change.get("axes", {}).items():
        assert str(value) in other.case_id
        assert other.axes == base.axes | {name: value}


def test_options_of_an_arm_change_the_hash() -> None:
    def of(**options: Any) -> planning.Case:
        arms = {"mine": ArmSpec(stack="jax-xla", options=options)}
        return make(arms=["mine"], keys={"arms": arms}).cases[0]

    assert of(layers="scan").case_id != of().case_id
    assert of(layers="scan").options == {"layers": "scan", "xla": "default"}
    assert of().case_id.rpartition(".")[2] == make(arms=["jax-xla"]).cases[0].case_id.rpartition(".")[2]


def test_the_same_case_twice_is_one_and_two_arms_of_one_id_are_an_error() -> None:
    assert len(make(arms=["jax-xla", "jax-xla"], axes={"batch": [8, 8]}).cases) == 1
    arms = {"jax-xla-tuned": ArmSpec(stack="jax-xla", variant="tuned")}
    with pytest.raises(UserError, match=r"'jax-xla:tuned' and 'jax-xla-tuned'.*rename one"):
        make(arms=["jax-xla:tuned", "jax-xla-tuned"], keys={"arms": arms})


@pytest.mark.parametrize("name", ["a/b", "a b", "a*", "../up"])
def test_a_name_that_files_cannot_have_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match="a case id cannot have"):
        make(arms=[name], keys={"arms": {name: ArmSpec(stack="jax-xla")}})


def test_the_matrix_is_the_product_in_order() -> None:
    plan = make(workload=["train/gpt-tiny", "train/llama-tiny"], axes={"batch": [8, 16], "dropout": 0.1})
    assert [(c.workload, c.axes["batch"], c.arm) for c in plan.cases] == list(
        itertools.product(["train/gpt-tiny", "train/llama-tiny"], [8, 16], ARMS)
    )
    assert all(len(cases) == 3 for cases in plan.groups.values())


def test_overrides_win_over_the_suites_axes() -> None:
    plan = make(axes={"batch": [8, 16]}, overrides={"batch": 4, "precision": ["fp32", "bf16"]})
    assert {(c.axes["batch"], c.axes["precision"]) for c in plan.cases} == {(4, "fp32"), (4, "bf16")}


def test_cases_are_chosen_by_a_glob() -> None:
    assert ids(make(cases="*torch-eager*")) == [GOLDEN[1]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cases": "nope*"}, ["--cases 'nope*'", "3 cases", GOLDEN[0], "next:"]),
        ({"workload": "train/gpt-tniy"}, ["'train/gpt-tniy'", "did you mean 'train/gpt-tiny'", "next:"]),
        ({"workload": "gpt-tiny"}, ["'gpt-tiny'", "train/gpt-tiny", "next:"]),
        ({"workload": "kernel/gpt-tiny"}, ["'kernel/gpt-tiny'", "train/gpt-tiny", "next:"]),
        ({"axes": {"bacth": 1}}, ["suite s", "train/gpt-tiny", "'bacth'", "batch", "next:"]),
        ({"axes": {"precision": ["fp32", "fp8"]}}, ["axis precision = 'fp8'", "bf16-pure", "next:"]),
        ({"axes": {"batch": [[1]]}}, ["axis batch = [1]", "int", "next:"]),
        ({"axes": {"batch": {"a": 1}}}, ["axis batch = {'a': 1}", "next:"]),
        ({"axes": {"batch": [1, True]}}, ["axis batch = True", "next:"]),
        ({"axes": {"sequence": 4096}}, ["4096", "64 positions", "next:"]),
        ({"axes": {"precision": []}}, ["suite s has no case", "empty", "next:"]),
        ({"arms": []}, ["suite s has no case", "next:"]),
        ({"arms": ["jaxx"]}, ["'jaxx'", "valid:", "jax-xla", "next:"]),
        ({"keys": {"path": ["/no/such"]}}, ["/no/such", "no such directory", "next:"]),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_named(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        make(**change)
    assert all(word in str(error.value) for word in words), str(error.value)


# ----------------------------------------------------------------------------------------------- the facts
def test_work_is_counted_by_the_specification() -> None:
    case = make(workload="train/moe-tiny").cases[0]
    model = spec.MODELS["moe-tiny"]
    assert case.tokens_per_step == model.batch * model.sequence
    assert case.flops_per_step == case.tokens_per_step * spec.flops_per_token(model, model.sequence)
    assert case.flops_per_step < case.flops_per_step_noncausal < case.flops_per_step_executed


def test_axis_defaults_are_those_of_the_device() -> None:
    on_cpu, on_gpu = (make(d, workload="train/gpt2-124m").cases[0].axes for d in (CPU, devices.known("h200")))
    assert (on_cpu["batch"], on_cpu["sequence"]) == (1, 128)
    assert (on_gpu["batch"], on_gpu["sequence"]) == (32, 1024)


def test_a_plan_survives_json() -> None:
    plan = make(devices.known("h200"), axes={"dropout": 0.1})
    table = json.loads(json.dumps(plan.to_json()))
    again = planning.from_json(table)
    assert again == plan
    assert json.loads(json.dumps(again.to_json())) == table
    with pytest.raises(KeyError, match="schema version 99"):
        planning.from_json({**table, "schema_version": 99})


@pytest.mark.parametrize("device", ["cpu", "h200"])
@pytest.mark.parametrize("name", registry.suites())
def test_every_suite_is_planned(name: str, device: str) -> None:
    suite, _ = suites.load(name)
    plan = planning.make(suite, devices.known(device), check_installed=False)
    assert plan.cases
    elsewhere = suite.device == "cpu" and device != "cpu"  # loaders run on the host, whatever is beside it
    assert bool(plan.groups) != elsewhere, "every case is skipped"
    assert len(set(ids(plan))) == len(plan.cases)


# ------------------------------------------------------------------------------------------------- skips
def test_what_cannot_fit_is_skipped_with_both_numbers() -> None:
    plan = make(SMALL_GPU, workload=["train/gpt-tiny", "train/gpt2-124m"])
    by_workload = {c.workload: c for c in plan.cases}
    assert by_workload["train/gpt-tiny"].skip is None
    case = by_workload["train/gpt2-124m"]
    needed = f"{case.memory_lower_bound_bytes / 2**30:.1f} GiB"
    assert case.skip == (
        f"needs at least {needed} (weights, gradients, moments, logits); the device has 1.0 GiB"
    )
    assert all(c.skip is None for cases in plan.groups.values() for c in cases)
    assert make(dataclasses.replace(SMALL_GPU, memory_bytes=None), workload="train/gpt2-124m").groups


def test_what_a_stack_does_not_have_is_skipped_by_name() -> None:
    plan = make(CPU, axes={"attention": "cudnn"})
    assert not plan.groups
    assert plan.cases[0].skip == (
        "jax-xla has no attention = cudnn on a cpu device (it has ['best', 'math'])"
    )
    plan = make(SMALL_GPU, arms=["reference"])
    assert plan.cases[0].skip == "reference does not run on a cuda device"


def test_what_is_not_installed_is_skipped_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "installed", lambda name: name != "jax")
    monkeypatch.setattr(planning, "compiler", lambda *_: None)
    jax, eager, compiled = make(check=True).cases
    assert jax.skip == f"jax not installed: {registry.stacks('train')['jax-xla'].install}"
    assert eager.skip is None
    assert compiled.skip == "no c++ compiler found: apt-get install build-essential"
    assert all(case.skip is None for case in make(check=False).cases)


def test_a_missing_interpreter_is_a_skip(tmp_path: Path) -> None:
    arms = {"mine": ArmSpec(stack="torch-eager", interpreter=tmp_path / "python")}
    assert make(check=True, arms=["mine"], keys={"arms": arms}).cases[0].skip == (
        f"interpreter {tmp_path / 'python'} does not exist"
    )


@pytest.mark.parametrize("wanted", ["c++ compiler", "c compiler"])
def test_compilers_are_found_by_variable_and_name(
    wanted: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variable, *names = registry.TOOLS[wanted]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    find = planning.compiler.__wrapped__
    assert find(wanted) is None
    for name in (names[-1], "own-compiler"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    assert find(wanted) == names[-1]
    monkeypatch.setenv(variable, "own-compiler")
    assert find(wanted) == "own-compiler"


# ------------------------------------------------------------------------------------------------- orders
@given(n=st.integers(1, 3), seed=st.integers(0, 10**6))
@settings(deadline=None)
def test_up_to_three_arms_take_every_order_once_before_any_twice(n: int, seed: int) -> None:
    names = "abc"[:n]
    every = list(itertools.permutations(names))
    orders = planning.orders(names, 2 * len(every), seed)
    for block in (orders[: len(every)], orders[len(every) :]):
        assert sorted(map(tuple, block)) == every


@given(n=st.integers(4, 9), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_more_arms_follow_each_other_equally_often(n: int, seed: int) -> None:
    names = [chr(97 + i) for i in range(n)]
    rows = n if n % 2 == 0 else 2 * n
    orders = planning.orders(names, rows, seed)
    assert all(sorted(row) == names for row in orders)
    follows = Counter(pair for row in orders for pair in itertools.pairwise(row))
    assert set(follows.values()) == {rows // n}
    assert len(follows) == n * (n - 1)
    for position in range(n):
        assert set(Counter(row[position] for row in orders).values()) == {rows // n}


@given(n=st.integers(1, 7), rounds=st.integers(1, 20), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_more_rounds_do_not_change_the_orders_of_earlier_ones(n: int, rounds: int, seed: int) -> None:
    names = [str(i) for i in range(n)]
    orders = planning.orders(names, rounds, seed)
    assert len(orders) == rounds
    assert orders == planning.orders(names, 20, seed)[:rounds]


# ---------------------------------------------------------------------------------------- cost and history
def test_estimates_come_from_earlier_runs_where_there_are_any() -> None:
    plan = make()
    case = plan.cases[0]
    guess = planning.estimate(case, plan, {})
    assert guess.source == "estimate"
    seen = {case.case_id: {"observation_s": 3.0, "gate_s": 11.0}}
    known = planning.estimate(case, plan, seen)
    assert (known.observation_s, known.gate_s, known.source) == (3.0, 11.0, "earlier runs")
    others = [planning.estimate(c, plan, seen) for c in plan.cases[1:]]
    assert planning.total_seconds(plan, 6, seen) == pytest.approx(
        11 + 18 + sum(e.gate_s + 6 * e.observation_s for e in others)
    )


def observed(out: Path, run_id: str, **row: Any) -> None:
    folder = out / "artifacts" / run_id
    folder.mkdir(parents=True)
    row = {"run_id": run_id, "kind": "timed", "status": "ok", "wall_s": 4.0, "pss": 100.0} | row
    message = {"type": "metric", "metric": "pss_bytes", "value": row.pop("pss")}
    (folder / "messages.jsonl").write_text(json.dumps(message) + "\n")
    (folder / "run.json").write_text(json.dumps(row))


def test_a_run_is_remembered_by_device_and_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STACKBENCH_CACHE", str(tmp_path / "cache"))
    cpu, gpu = {"name": "Some CPU", "kind": "cpu"}, {"name": "Small GPU", "kind": "cuda"}
    assert execute.history(cpu) == {}
    out = tmp_path / "out"
    observed(out, "r1", case_id="a", wall_s=3.0, pss=5e8)
    observed(out, "r2", case_id="a", wall_s=5.0, pss=7e8)
    observed(out, "r3", case_id="a", wall_s=9.0, status="failed", pss=9e9)
    observed(out, "r4", case_id="a", kind="parity", wall_s=20.0)
    observed(out, "r5", case_id="b", wall_s=2.0, pss=None)
    execute.remember(out, execute.history(cpu), cpu)
    expected = {"a": {"observation_s": 4.0, "gate_s": 20.0, "memory_bytes": 7e8}}
    expected["b"] = {"observation_s": 2.0, "gate_s": 0.0}
    assert execute.history(cpu) == expected
    assert execute.history(gpu) == {}
    execute.remember(out, execute.history(gpu), gpu)
    assert execute.history(cpu) == expected
    assert execute.history(gpu)["a"] == {"observation_s": 4.0, "gate_s": 20.0}, "no peak_allocated_bytes"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"Some CPU": 3}', '{"Some CPU": {"a": 3}}', "null"])
def test_a_damaged_history_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("STACKBENCH_CACHE", str(tmp_path))
    (tmp_path / "history.json").write_text(text)
    assert execute.history({"name": "Some CPU"}) == {}


# ------------------------------------------------------------------------------------------ what is printed
def shown(plan: planning.Plan, width: int, price: float | None = None, history: Any = None) -> str:
    found = planned.document(plan, history or {}, price)
    out = io.StringIO()
    planned.print_plan(found, Console(file=out, width=width, highlight=False, markup=False, emoji=False))
    return out.getvalue()


def test_the_document_has_every_case_and_the_totals() -> None:
    plan = make(SMALL_GPU, workload=["train/gpt-tiny", "train/gpt2-124m"])
    case = plan.cases[0]
    history = {case.case_id: {"observation_s": 3.0, "gate_s": 11.0}}
    history[case.case_id]["memory_bytes"] = 2.0 * case.memory_predicted_bytes
    found = planned.document(plan, history, 3600.0)
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {
        "schema_version", "command", "suite", "description", "device", "cases", "totals",
    }  # fmt: skip
    first, last = found["cases"][0], found["cases"][-1]
    assert (first["case_id"], first["status"], first["reason"]) == (case.case_id, "planned", None)
    assert (first["observation_s"], first["source"], first["memory_past_error"]) == (3.0, "earlier runs", 1.0)
    assert (last["status"], last["memory_measured_bytes"], last["memory_past_error"]) == (
        "skipped",
        None,
        None,
    )
    assert "1.0 GiB" in last["reason"]
    totals = found["totals"]
    assert (totals["cases"], totals["skipped"], totals["rounds"], totals["observations"]) == (3, 3, 6, 18)
    assert totals["cost"] == pytest.approx(totals["expected_s"])
    assert planned.document(plan, history, None)["totals"]["cost"] is None
    assert found["device"]["here"] is True
    assert found["device"]["peak_flops"] == {"fp32": None}


def test_the_suites_price_holds_unless_the_command_line_gives_one() -> None:
    plan = make(keys={"price_per_hour": 2.0})
    assert planned.document(plan, {}, None)["totals"]["price_per_hour"] == 2.0
    assert planned.document(plan, {}, 0.0)["totals"] | {"expected_s": 0} == (
        planned.document(plan, {}, None)["totals"] | {"expected_s": 0, "price_per_hour": 0.0, "cost": 0.0}
    )


def test_cold_caches_have_no_rounds() -> None:
    totals = planned.document(make(keys={"caches": "cold"}), {}, None)["totals"]
    assert (totals["rounds"], totals["observations"]) == (0, 0)


@pytest.mark.parametrize("width", [80, 40])
def test_the_terminal_shows_ids_whole_and_keeps_to_its_width(width: int) -> None:
    plan = make(SMALL_GPU, workload=["train/gpt-tiny", "train/gpt2-124m"], axes={"dropout": 0.1})
    case = plan.cases[0]
    history = {case.case_id: {"observation_s": 3.0, "memory_bytes": 3.0 * case.memory_predicted_bytes}}
    text = shown(plan, width, 2.5, history)
    lines = text.splitlines()
    assert all(f"  {c.case_id}" in lines for c in plan.cases)
    others = [line for line in lines if line.strip() not in ids(plan)]
    assert all(len(line) <= width and line == line.rstrip() for line in others)
    flat = " ".join(text.split())
    for words in (
        "on Small GPU (1.00 GiB, fp32 peak unknown)",
        "dropout 0.1", "jax-xla: 3.0 s an observation (earlier runs)", "an earlier run's peak:", "3.0 × this",
        "no earlier run", "skipped: needs at least", "3 cases to run, 3 skipped",
        "1 parity gate, 6 rounds, 18 timed observations", "1 of 3 cases timed by earlier runs",
        "at 2.5 an hour",
    ):  # fmt: skip
        assert words in flat, words


def test_a_device_that_is_not_here_is_said_to_be_so() -> None:
    text = " ".join(shown(make(devices.known("h200"), axes={"precision": ["bf16-pure", "fp32"]}), 80).split())
    assert "NVIDIA H200 SXM (140 GiB, bf16 peak 989 TFLOP/s, fp32 peak 67.0 TFLOP/s)" in text
    assert "This device is not here" in text
    assert "is not here" not in shown(make(CPU), 80)


def test_names_cannot_draw_on_the_terminal() -> None:
    arms = {"mine": ArmSpec(stack="jax-xla")}
    plan = make(arms=["mine"], keys={"arms": arms, "description": "a\x1b[31mred\u202e [bold]b[/bold]"})
    text = shown(plan, 80)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[bold]b[/bold]" in text


@pytest.mark.parametrize(("seconds", "clock"), [(0, "0:00"), (1, "0:01"), (60, "0:01"), (3601, "1:01")])
def test_hours_and_minutes(seconds: float, clock: str) -> None:
    assert planned.clock(seconds) == clock


def test_writing_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    planning.write_atomic(path, "one")
    planning.write_atomic(path, "two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_cuda_device_needs_its_own_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "installed", lambda name: name != "jax-cuda13-plugin")
    quick, _ = suites.load("quick")
    for device, skipped in ((devices.known("h200"), True), (CPU, False)):
        made = planning.make(quick, device)
        reasons = {case.skip for case in made.cases if case.stack == "jax-xla"}
        assert all(("jax-cuda13-plugin not installed" in (reason or "")) == skipped for reason in reasons)
