"""Set-up of the Rust loader: built, taken from a folder, or left out with what to type; no index is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import native


class Calls:
    """Stands for pip and maturin."""

    def __init__(self, code: int = 0) -> None:
        self.seen: list[list[str]] = []
        self.code = code

    def __call__(self, command, *, quiet=False, cwd=None):
        self.seen.append([str(part) for part in command])
        return self.code, "pip's words"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "stacks/native/loader/src").mkdir(parents=True)
    (tmp_path / "stacks/native/loader/src/lib.rs").write_text("// one")
    for name in ("Cargo.toml", "Cargo.lock", "loader/Cargo.toml"):
        (tmp_path / "stacks/native" / name).write_text("")
    (tmp_path / "stacks/native/python").mkdir()
    (tmp_path / ".venv/lib/python3.11/site-packages").mkdir(parents=True)
    return tmp_path


def prepared(monkeypatch: pytest.MonkeyPatch, cargo: bool, code: int = 0) -> Calls:
    calls = Calls(code)
    monkeypatch.setattr(native, "call", calls)
    monkeypatch.setattr(native.shutil, "which", lambda name: "/usr/bin/cargo" if cargo else None)
    return calls


def as_installed(root: Path) -> None:
    (root / ".venv/lib/python3.11/site-packages/stackbench_native-0.1.0.dist-info").mkdir()


def test_built_with_cargo_once_and_again_when_a_source_changes(root, monkeypatch) -> None:
    calls = prepared(monkeypatch, cargo=True)
    assert native.native(root, [])
    assert calls.seen[0][1:4] == ["build", "--release", "--locked"]
    assert "--no-index" in calls.seen[1]
    as_installed(root)
    assert not native.native(root, []) and len(calls.seen) == 2
    (root / "stacks/native/target").mkdir()
    (root / "stacks/native/target/lib.rs").write_text("what the build itself writes")
    assert not native.native(root, [])
    (root / "stacks/native/loader/src/lib.rs").write_text("// two")
    assert native.native(root, []) and len(calls.seen) == 4


def test_a_wheel_in_a_folder_where_there_is_no_cargo(root, tmp_path, monkeypatch) -> None:
    calls = prepared(monkeypatch, cargo=False)
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "stackbench_native-0.1.0-cp311-abi3-manylinux_2_34_x86_64.whl").write_text("")
    assert native.native(root, ["--index-url", "somewhere", f"--find-links={folder}"])
    [command] = calls.seen
    assert command[-3:] == ["--find-links", str(folder), "stackbench-native"]
    assert "--no-index" in command and "somewhere" not in command  # a stranger may own the name elsewhere


def test_left_out_with_what_to_type(root, monkeypatch, capsys) -> None:
    calls = prepared(monkeypatch, cargo=False)
    assert native.native(root, ["--find-links", "no-such-folder"])
    assert "no cargo" in (said := capsys.readouterr().out) and "make setup" in said
    assert not calls.seen and not native.native(root, [])
    assert capsys.readouterr().out == ""


def test_a_failed_build_leaves_the_rest_and_is_tried_again(root, monkeypatch, capsys) -> None:
    calls = prepared(monkeypatch, cargo=True, code=1)
    assert not native.native(root, [])
    assert "pip's words" in capsys.readouterr().out
    assert not native.native(root, []) and len(calls.seen) == 2


def test_nothing_to_do_without_the_sources(tmp_path, monkeypatch) -> None:
    prepared(monkeypatch, cargo=True)
    assert not native.native(tmp_path, [])
