"""A suite is TOML parsed into frozen types; whatever is wrong in it is named with what is valid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bench import registry, suite
from bench.errors import UserError
from bench.suite import ArmSpec, Matrix, Suite

ROW = '[[matrix]]\nworkload = "train/gpt-tiny"\narms = ["jax-xla"]\n'


def load(tmp_path: Path, text: str, *settings: str) -> tuple[Suite, dict[str, Any]]:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return suite.load(str(path), settings=settings)


def test_every_suite_of_ours_loads_under_its_files_name() -> None:
    for name, path in registry.suites().items():
        made, axes = suite.load(name)
        assert made.name == name == path.stem
        assert made.description
        assert axes == {}


def test_defaults_are_those_of_method_md(tmp_path: Path) -> None:
    made, _ = load(tmp_path, ROW)
    assert (made.name, made.rounds, made.caches, made.affinity) == ("mine", 6, "seeded", "device")
    assert made.measure("cuda") == {"value_s": 1.0, "warmup_s": 10.0, "warmup_max_s": 100.0}
    assert made.measure("cpu") == {"value_s": 0.2, "warmup_s": 1.0, "warmup_max_s": 10.0}
    made, _ = load(tmp_path, "value_s = 0.5\nwarmup_s = 0\nwarmup_max_s = 3\n" + ROW)
    assert made.measure("cuda") == {"value_s": 0.5, "warmup_s": 0.0, "warmup_max_s": 3.0}


def test_a_suite_is_frozen(tmp_path: Path) -> None:
    made, _ = load(tmp_path, ROW)
    with pytest.raises(ValidationError):
        made.rounds = 3


def test_settings_are_suite_keys_or_axes(tmp_path: Path) -> None:
    made, axes = load(
        tmp_path, ROW, "rounds=3", "precision=bf16,fp32", "batch=[8, 16]", "dropout=0.1", "caches=cold",
        "corpus=/some/where", 'tokenizer="/t.json"',
    )  # fmt: skip
    assert (made.rounds, made.caches, made.corpus) == (3, "cold", Path("/some/where"))
    assert made.tokenizer == Path("/t.json")
    assert axes == {"precision": ["bf16", "fp32"], "batch": [8, 16], "dropout": 0.1}


def test_paths_of_the_suite_and_of_the_command_line_add_up(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'path = ["{tmp_path}/a"]\n' + ROW)
    (tmp_path / "b").mkdir()
    made, _ = suite.load(str(path), paths=[tmp_path / "b"])
    assert [str(p) for p in made.path] == [f"{tmp_path}/a", f"{tmp_path}/b"]
    made, _ = suite.load(str(path), settings=[f"path={tmp_path}/c"])
    assert [str(p) for p in made.path] == [f"{tmp_path}/c"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rounds = = 3", ["mine.toml", "not TOML", "line 1"]),
        ("", ["mine.toml", "'matrix'", "missing"]),
        ("runds = 3\n" + ROW, ["mine.toml", "'runds'", "did you mean 'rounds'", "valid:", "caches"]),
        ("rounds = 0\n" + ROW, ["mine.toml", "rounds = 0", "greater than or equal to 1"]),
        ("rounds = 'many'\n" + ROW, ["mine.toml", "rounds = 'many'", "integer"]),
        ("caches = 'warm'\n" + ROW, ["caches = 'warm'", "'cold'", "'seeded'", "'fresh'"]),
        ("matrix = []", ["mine.toml", "matrix = []", "at least 1"]),
        ("matrix = 3", ["mine.toml", "matrix = 3"]),
        ("[[matrix]]\narms = ['jax-xla']", ["'matrix.0.workload'", "missing", "arms", "axes"]),
        (ROW + "axis = {}", ["'matrix.0.axis'", "did you mean 'axes'", "workload"]),
        (ROW + "[arms.x]\nstack = 's'\nopitons = {}", ["'arms.x.opitons'", "'options'", "interpreter"]),
        (ROW + "[arms.x]\nvariant = 'tuned'", ["'arms.x.stack'", "missing", "variant"]),
    ],
)
def test_a_bad_suite_names_place_value_and_what_is_valid(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, text)
    shown = str(error.value)
    assert all(word in shown for word in words), shown
    assert error.value.next_command


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("bacth=3", ["--set bacth=3", "did you mean 'batch'", "valid:", "precision", "rounds"]),
        ("rounds", ["--set rounds", "KEY=VALUE"]),
        ("=3", ["--set =3", "valid:"]),
        ("matrix=3", ["--set matrix=3", "valid:"]),
        ("rounds=0", ["--set rounds=0", "greater than or equal to 1"]),
        ("rounds=many", ["--set rounds=many", "integer"]),
        ("price_per_hour=-1", ["--set price_per_hour=-1", "greater than or equal to 0"]),
    ],
)
def test_a_bad_setting_names_itself(tmp_path: Path, setting: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(tmp_path, ROW, setting)
    shown = str(error.value)
    assert all(word in shown for word in words), shown
    assert error.value.next_command


def test_an_unknown_suite_names_the_known_ones() -> None:
    with pytest.raises(UserError) as error:
        suite.load("qiuck")
    assert "did you mean 'quick'" in str(error.value)
    assert {"quick", "train"} <= set(error.value.valid)


def test_files_that_are_no_suites_are_named(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\x80\x81")
    for name, word in {"binary.toml": "binary.toml is not TOML", "none.toml": "no such file"}.items():
        with pytest.raises(UserError, match=word):
            suite.load(str(tmp_path / name))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UserError, match="unknown suite"):
        suite.load(str(tmp_path / "folder.toml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("0.5", 0.5), ("true", True), ("bf16", "bf16"), ('"a b"', "a b"), ("[1, 2]", [1, 2]),
        ("bf16,fp32", ["bf16", "fp32"]), ("1,2", [1, 2]), ("", ""), ("/a/b c", "/a/b c"),
        ("{x = 1}", {"x": 1}),
    ],
)  # fmt: skip
def test_values_are_toml_or_text(text: str, value: Any) -> None:
    assert suite.parse_value(text) == value


# --------------------------------------------------------------------------------------------------- arms
def arm(name: str, **arms: ArmSpec) -> ArmSpec:
    made = Suite(name="s", arms=arms, matrix=[Matrix(workload="train/gpt-tiny", arms=[name])])
    return suite.arm(made, name, registry.stacks("train"))


def test_arms_are_stacks_variants_or_the_suites_own() -> None:
    assert arm("jax-xla") == ArmSpec(stack="jax-xla")
    assert arm("jax-xla:tuned") == ArmSpec(stack="jax-xla", variant="tuned")
    mine = ArmSpec(stack="jax-xla", options={"layers": "scan"}, variables={"XLA_FLAGS": "--x"})
    assert arm("mine", mine=mine) == mine


@pytest.mark.parametrize(
    ("name", "spec", "words"),
    [
        ("jax-xlaa", None, ["suite s", "'jax-xlaa'", "did you mean 'jax-xla'", "torch-eager", "next:"]),
        ("jax-xla:fast", None, ["suite s", "'fast'", "jax-xla", "default, tuned", "next:"]),
        ("a", ArmSpec(stack="nope"), ["suite s", "'nope'", "arm 'a'", "jax-xla", "next:"]),
        ("a", ArmSpec(stack="jax-xla", options={"layer": 1}), ["arm 'a'", "'layer'", "layers", "valid:"]),
        ("a", ArmSpec(stack="jax-xla", options={"layers": "x"}), ["arm 'a'", "layers = 'x'", "scan, unroll"]),
    ],
)
def test_a_bad_arm_names_itself_and_what_is_valid(name: str, spec: ArmSpec | None, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        arm(name, **({name: spec} if spec else {}))
    assert all(word in str(error.value) for word in words), str(error.value)
