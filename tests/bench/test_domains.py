"""One table of domains: cases of both kinds in one suite, axes of all in `--set`, ids that never move."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import devices, domains, registry
from bench import plan as planning
from bench import suite as suites
from bench.devices import Device
from bench.errors import UserError
from bench.report import planned, words
from bench.suite import ArmSpec, Matrix, Suite

CPU = Device(kind="cpu", name="Some CPU", memory_bytes=2**34, cpus=2)
LOADERS = ["python-single", "torch-dataloader"]


def make(*rows: Matrix, overrides: dict[str, Any] | None = None, **keys: Any) -> planning.Plan:
    rows = rows or (Matrix(workload="load/synthetic", arms=LOADERS),)
    suite = Suite(name="s", matrix=list(rows), **keys)
    return planning.make(suite, CPU, overrides=overrides, check_installed=False)


def test_a_loading_case() -> None:
    case = make().cases[0]
    assert case.group == "synthetic.b8-s2048-jsonl-fast.a0ac5412"
    # another id orphans every stored result: only for a change of what the work is
    assert case.case_id.startswith("synthetic.b8-s2048-jsonl-fast.python-single.")
    assert case.tokens_per_step == 8 * 2049
    assert [getattr(case, name) for name in domains.CASE_FACTS] == [None] * 5
    assert planning.from_json(make().to_json()).cases[0] == case


def test_axes_that_are_not_at_their_default_are_in_the_id() -> None:
    plan = make(Matrix(workload="load/real", arms=LOADERS, axes={"tokenizer": "hf", "cores": [1, 2]}))
    assert list(plan.groups) != []
    assert [c.case_id.rsplit(".", 2)[0] for c in plan.cases[::2]] == [
        "real.b8-s2048-jsonl-hf-cores=1", "real.b8-s2048-jsonl-hf",
    ]  # fmt: skip


def test_both_kinds_in_one_suite_and_one_override_for_both() -> None:
    rows = [Matrix(workload="train/gpt-tiny", arms=["jax-xla"]), Matrix(workload="load/real", arms=LOADERS)]
    plan = make(*rows, overrides={"batch": 16, "precision": "bf16", "tokenizer": "hf"})
    assert [c.axes["batch"] for c in plan.cases] == [16, 16, 16]
    assert plan.cases[0].axes["precision"] == "bf16" and "precision" not in plan.cases[1].axes
    assert plan.cases[1].axes["tokenizer"] == "hf" and "tokenizer" not in plan.cases[0].axes
    assert planning.total_seconds(plan, 6, {}) > 0


def test_an_override_that_nothing_has_is_an_error() -> None:
    with pytest.raises(UserError, match="--set precision: no workload of suite s has this axis") as error:
        make(overrides={"precision": "bf16"})
    assert "tokenizer" in error.value.valid and error.value.next_command


@pytest.mark.parametrize(
    ("workload", "words_"),
    [("load/gpt-tiny", ["load/real", "load/synthetic"]), ("lode/real", ["load/real", "train/gpt-tiny"])],
)
def test_unknown_workloads_name_those_there_are(workload: str, words_: list[str]) -> None:
    with pytest.raises(UserError, match="unknown workload") as error:
        make(Matrix(workload=workload, arms=LOADERS))
    assert set(words_) <= set(error.value.valid)


def test_the_name_tokenizer_is_an_axis_and_a_path(tmp_path: Path) -> None:
    table: dict[str, Any] = {}
    settings = ["tokenizer=hf", "cores=1,2", "page_cache=cold"]
    assert suites.apply_settings(table, settings) == {
        "tokenizer": "hf", "cores": [1, 2], "page_cache": "cold",
    }  # fmt: skip
    assert table == {}
    assert suites.apply_settings(table, ["tokenizer=fast,hf"]) == {"tokenizer": ["fast", "hf"]}
    assert suites.apply_settings(table, ['tokenizer="/some/tokenizer.json"']) == {}
    assert table == {"tokenizer": "/some/tokenizer.json"}


def test_more_cores_than_there_are_is_a_skip() -> None:
    case = make(overrides={"cores": 4}).cases[0]
    assert case.skip == "cores = 4: this machine has 2 CPUs"


# ------------------------------------------------------------------------------------- grids and environments
STACK = """
STACK = {
    "requires": ["no-such-distribution"], "devices": ["cpu"], "environment": "nowhere-peers",
    "options": {"workers": [1, 2], "chunk": [4]},
    "variants": {"default": {"chunk": 4}, "two": {"workers": 2}},
}
"""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "stacks" / "load"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text(STACK)
    return tmp_path


def case_of(outside: Path, check: bool = False, arm: str = "mine", **keys: Any) -> planning.Case:
    suite = Suite(name="s", path=[outside], matrix=[Matrix(workload="load/real", arms=[arm])], **keys)
    return planning.make(suite, CPU, check_installed=check).cases[0]


def test_a_grid_is_calibrated_where_the_suite_asks(outside: Path) -> None:
    plain, asked = case_of(outside), case_of(outside, calibrate=True)
    assert (plain.grid, asked.grid) == ({}, {"workers": [1, 2], "chunk": [4]})
    assert plain.case_id != asked.case_id and plain.group == asked.group
    assert case_of(outside, calibrate=True, arm="mine:two").grid == {}
    arms = {"m": ArmSpec(stack="mine", options={"workers": 1})}
    assert case_of(outside, calibrate=True, arm="m", arms=arms).grid == {}


def test_an_environment_of_its_own(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(outside)
    place = registry.environment("nowhere-peers")
    assert case.interpreter == str(place / "bin" / "python") and case.skip is None
    asked = case_of(outside, check=True)
    assert asked.skip == "the environment 'nowhere-peers' is not set up: make setup-nowhere"
    monkeypatch.setattr(registry, "environment", lambda name: outside / name)
    here = outside / "nowhere-peers"
    site = here / "lib" / "python3.12" / "site-packages"
    (here / "bin").mkdir(parents=True)
    (here / "bin" / "python").touch()
    site.mkdir(parents=True)
    planning.distributions.cache_clear()
    skip = case_of(outside, check=True).skip or ""
    assert skip.startswith("no-such-distribution not installed in the environment 'nowhere-peers'")
    layer = outside / "below"
    (layer / "No_Such.Distribution-1.0.dist-info").mkdir(parents=True)
    (site / "layer.pth").write_text(f"import site; site.addsitedir({str(layer)!r})\n")
    planning.distributions.cache_clear()
    assert case_of(outside, check=True).skip is None
    planning.distributions.cache_clear()


def test_an_environment_is_a_name(outside: Path) -> None:
    (outside / "stacks" / "load" / "bad.py").write_text("STACK = {'environment': '../up'}\n")
    with pytest.raises(UserError, match="must be a name like 'peers'"):
        registry.stacks("load", [outside])


# ----------------------------------------------------------------------------------------------------- words
def test_what_is_always_said_of_a_loader() -> None:
    axes = make().cases[0].axes
    assert words.conditions(axes) == "batch 8 × 2048 tokens, jsonl, fast tokenizer, 2 cores"
    cold = {**axes, "cores": 1, "page_cache": "cold", "megabytes": 4}
    assert words.conditions(cold).endswith("fast tokenizer, 1 core, cold page cache, 4 MB")


def test_a_plan_of_loaders_is_shown() -> None:
    found = planned.document(make(), {}, None)
    assert found["cases"][0]["memory_past_error"] is None and found["totals"]["expected_s"] > 0
    text = io.StringIO()
    planned.print_plan(found, Console(file=text, width=100))
    assert "fast tokenizer" in text.getvalue() and "python-single" in text.getvalue()


def test_every_domain_names_modules_that_exist() -> None:
    for domain in domains.DOMAINS.values():
        for role in ("worker", "gate", "kit", *(("details",) if domain.details else ())):
            assert domain.module(role).__doc__
        kit = domain.module("kit")
        assert all(hasattr(kit, name) for name in ("prepare", "ready", "cpus", "job", "problem", "watched"))
    assert devices.cpu().kind == "cpu"
