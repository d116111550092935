"""The loading work's axes: defaults, refusals that say what is valid, tokens a batch."""

from __future__ import annotations

from typing import Any

import pytest

from stacks.load import spec


def test_defaults() -> None:
    axes = spec.resolve_axes("load/synthetic", {})
    assert list(axes) == list(spec.AXES)
    assert axes == {
        "batch": 8, "sequence": 2048, "format": "jsonl", "tokenizer": "fast", "shuffle": "none", "cores": 2,
        "page_cache": "warm", "megabytes": 64,
    }  # fmt: skip
    assert spec.tokens_per_step(axes) == 8 * 2049


def test_given_values_are_kept() -> None:
    given = {"tokenizer": "hf", "megabytes": 4, "format": "parquet", "shuffle": "global"}
    axes = spec.resolve_axes("load/real", given)
    assert {name: axes[name] for name in given} == given


@pytest.mark.parametrize(
    ("workload", "axes", "words"),
    [
        ("load/fake", {}, ["'load/fake'", "load/real", "load/synthetic"]),
        ("load/real", {"cpus": 2}, ["'cpus'", "cores", "page_cache"]),
        ("load/real", {"cores": 0}, ["cores = 0", "at least 1"]),
        ("load/real", {"cores": 1.5}, ["cores = 1.5", "int"]),
        ("load/real", {"format": "csv"}, ["format = 'csv'", "jsonl.zst", "tokens"]),
        ("load/real", {"tokenizer": "tiktoken"}, ["tokenizer = 'tiktoken'", "fast, hf"]),
    ],
)
def test_refusals_name_axis_value_and_what_is_valid(
    workload: str, axes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"valid") as error:
        spec.resolve_axes(workload, axes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_every_axis_says_what_it_is() -> None:
    assert all(axis.help and axis.default is not None for axis in spec.AXES.values())
    assert set(spec.SLUG) <= set(spec.AXES)
