"""A stack is one file: read, never run; found by its name; wrong keys are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import registry
from bench.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """stacks/train/ of a user's own directory."""
    path = tmp_path / "mine" / "stacks" / "train"
    path.mkdir(parents=True)
    return path


def found(folder: Path) -> dict[str, registry.Stack]:
    return registry.stacks("train", [folder.parent.parent])


def message(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        found(folder)
    return str(error.value)


def test_ours_are_found_by_their_files_names() -> None:
    stacks = registry.stacks("train")
    assert {"jax-xla", "torch-eager", "torch-compile", "reference"} <= set(stacks)
    for name, stack in stacks.items():
        assert stack.file.stem.replace("_", "-") == name == stack.name
        assert stack.role in ("stack", "reference")
        assert "default" in stack.variants


def test_a_new_file_is_a_new_stack_and_nothing_runs(folder: Path) -> None:
    (folder / "my_own.py").write_text("STACK = {'framework': 'x'}\nraise SystemExit('this file was run')\n")
    (folder / "helper.py").write_text("NOT_A_STACK = 1\n")
    stacks = found(folder)
    assert set(stacks) - set(registry.stacks("train")) == {"my-own"}
    assert stacks["my-own"].framework == "x"
    assert stacks["my-own"].variants == {"default": {}}
    (folder / "my_own.py").unlink()
    assert "my-own" not in found(folder)


def test_a_stack_in_another_language_is_a_toml_file(folder: Path) -> None:
    (folder / "in_c.toml").write_text('argv = ["{build}/step"]\nbuild = ["make"]\nversion = ["cc", "-v"]\n')
    (folder / "models.toml").write_text("")
    (folder / "notes.toml").write_text("x = 1\n")
    stack = found(folder)["in-c"]
    assert (stack.argv, stack.build, stack.version) == (("{build}/step",), ("make",), ("cc", "-v"))
    assert "notes" not in found(folder)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("bad.py", "STACK = {'opitons': {}}", ["bad.py", "'opitons'", "did you mean 'options'", "valid:"]),
        ("bad.py", "STACK = dict(x=1)", ["bad.py", "literal"]),
        ("bad.py", "STACK = [1]", ["bad.py", "dictionary", "list"]),
        ("bad.py", "STACK = {", ["bad.py", "not Python"]),
        ("bad.py", "STACK = {'variants': {'default': {'x': 1}}}", ["bad.py", "'default'", "option 'x'"]),
        (
            "bad.py",
            "STACK = {'options': {'x': [1, 2]}, 'variants': {'default': {'x': 3}}}",
            ["bad.py", "x = 3", "valid: 1, 2"],
        ),
        ("bad.toml", "argv = [", ["bad.toml", "not TOML"]),
        ("bad.toml", "argv = ['a']\nnope = 1", ["bad.toml", "'nope'", "valid:"]),
        ("jax_xla.py", "STACK = {}", ["'jax-xla'", "twice"]),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(folder: Path, name: str, text: str, words: list[str]) -> None:
    (folder / name).write_text(text)
    shown = message(folder)
    assert all(word in shown for word in words), shown


def test_a_file_that_is_no_text_is_named(folder: Path) -> None:
    (folder / "binary.py").write_bytes(b"\x80\x81\x00")
    assert "binary.py" in message(folder)


def test_a_missing_path_is_an_error() -> None:
    with pytest.raises(UserError, match="--path /no/such: no such directory"):
        registry.suites([Path("/no/such")])


def test_models_and_suites_are_found_there_too(tmp_path: Path, folder: Path) -> None:
    mine = folder.parent.parent
    (folder / "models.toml").write_text(
        '[gpt-mine]\nfamily = "gpt2"\nlayers = 1\nd_model = 32\nheads = 4\nvocab = 300\n'
        "sequence = 32\nbatch = 2\n"
    )
    (mine / "suites").mkdir()
    (mine / "suites" / "ours.toml").write_text("")
    assert registry.train_models([mine])["gpt-mine"].d_model == 32
    assert "gpt-tiny" in registry.train_models([mine])
    assert registry.suites([mine])["ours"] == (mine / "suites" / "ours.toml").resolve()
    assert "quick" in registry.suites([mine])
    (folder / "models.toml").write_text("[gpt-mine]\nfamily = 3\n")
    with pytest.raises(UserError, match="gpt-mine"):
        registry.train_models([mine])
