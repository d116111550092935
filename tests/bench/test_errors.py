"""An error the user can correct names the value, the place, the valid options and the next command."""

from __future__ import annotations

import pytest

from bench.errors import UserError, did_you_mean


def test_all_parts_are_lines_of_their_own() -> None:
    error = UserError("suite x: no stack 'y'", valid=["a", "b"], next_command="stackbench doctor")
    assert str(error) == "suite x: no stack 'y'\nvalid: a, b\nnext:  stackbench doctor"
    assert (error.message, error.valid, error.next_command) == (
        "suite x: no stack 'y'", ["a", "b"], "stackbench doctor",
    )  # fmt: skip


def test_parts_that_are_missing_leave_no_line() -> None:
    assert str(UserError("bad")) == "bad"


def test_long_lists_end_with_a_count() -> None:
    text = str(UserError("bad", valid=[f"option-{i}" for i in range(100)]))
    assert "option-39 … and 60 more" in text
    assert "option-40" not in text


@pytest.mark.parametrize(
    ("value", "hint"),
    [("qiuck", " (did you mean 'quick'?)"), ("quick", " (did you mean 'quick'?)"), ("zzzz", ""), ("", "")],
)
def test_a_close_option_is_suggested(value: str, hint: str) -> None:
    assert did_you_mean(value, ["quick", "train"]) == hint
