"""Set-up of the Rust loader, after `.venv`: built with cargo where that is, else a wheel from a folder given
through PIP_ARGS, else left out, and the stack `rust` is a skip that says how to get it.

Never from a package index: the name is not ours there. Standard library only.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

from bench.bootstrap import call, say, site_packages, venv_version

SOURCE = "stacks/native"
NAME = "stackbench-native"
SOURCES = ("Cargo.toml", "Cargo.lock", "loader/Cargo.toml", "loader/src", "python")  # what the build reads
INSTALL = "install Rust (cargo) and then: make setup; or: make setup PIP_ARGS='--find-links FOLDER_OF_WHEELS'"


def native(root: Path, pip_args: list[str]) -> bool:
    """Install the extension into `.venv` unless it is there already; false if nothing was done.

    A build that fails leaves everything else as it is, and is tried again by the next call.
    """
    source, venv = root / SOURCE, root / ".venv"
    if not source.is_dir():
        return False
    cargo, folders = shutil.which("cargo"), wheel_folders(pip_args)
    how = "cargo" if cargo else f"wheel {' '.join(folders)}" if folders else "none"
    stamp, expected = venv / "native.stamp", f"{how} {digest(source, venv_version(venv))}"
    if stamp.exists() and stamp.read_text() == expected and (how == "none" or is_installed(venv)):
        return False
    stamp.unlink(missing_ok=True)
    if how == "none":
        say(f"going on without the Rust loader: no cargo, and no folder of wheels. Next: {INSTALL}")
    elif not install(root, venv, bool(cargo), folders):
        return False
    stamp.write_text(expected)
    return True


def install(root: Path, venv: Path, build: bool, folders: list[str]) -> bool:
    """A wheel, made first where `build` says so: minutes at first, seconds later. False if it failed."""
    started, code, output = time.monotonic(), 0, ""
    python = venv / "bin" / "python"
    if build:
        say("building the Rust loader with cargo: about 300 crates, 5 to 10 minutes the first time")
        made = root / SOURCE / "target" / "wheels"
        folders = [str(made)]
        shutil.rmtree(made, ignore_errors=True)
        manifest = root / SOURCE / "python" / "Cargo.toml"
        where: list[str | Path] = ["-m", manifest, "--interpreter", python, "--out", made]
        maturin: list[str | Path] = [venv / "bin" / "maturin", "build", "--release", "--locked", "--strip"]
        code, output = call([*maturin, *where], quiet=True, cwd=root)
    else:
        say(f"installing the Rust loader's wheel from {' '.join(folders)}")
    if not code:
        links = [part for folder in folders for part in ("--find-links", folder)]
        options = ["install", "--no-deps", "--no-index", "--only-binary", ":all:", "--force-reinstall"]
        code, output = call([python, "-m", "pip", *options, *links, NAME], quiet=True)
    if code:
        words = "\n".join(output.strip().splitlines()[-20:])
        say(f"going on without the Rust loader, which could not be installed:\n{words}\nNext: {INSTALL}")
        return False
    say(f"the Rust loader is ready after {time.monotonic() - started:.0f} s")
    return True


def digest(source: Path, python: str | None) -> str:
    """Of everything the build reads."""
    parts = hashlib.sha256((python or "").encode())
    for place in (source / name for name in SOURCES):
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                parts.update(f"\0{path.relative_to(source)}\0".encode() + path.read_bytes())
    return parts.hexdigest()


def is_installed(venv: Path) -> bool:
    return any(site_packages(venv).glob(f"{NAME.replace('-', '_')}-*.dist-info"))


def wheel_folders(pip_args: list[str]) -> list[str]:
    """Local folders that `--find-links` (or `-f`) names and that hold our wheel."""
    named = []
    for i, arg in enumerate(pip_args):
        option, equals, value = arg.partition("=")
        if option in ("--find-links", "-f"):
            named.append(value if equals else "".join(pip_args[i + 1 : i + 2]))
    pattern = f"{NAME.replace('-', '_')}-*.whl"
    return [
        folder for folder in named if folder and Path(folder).is_dir() and any(Path(folder).glob(pattern))
    ]
