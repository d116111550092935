"""Resolve `locks/*.in` again: `python3 -m bench.bootstrap locks` (`make locks`).

uv resolves for every supported Python and system at once and knows each wheel's hash and size; the addresses
that it also knows are left out.
"""

from __future__ import annotations

import re
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.bootstrap import (
    PYTHONS,
    SetupError,
    call,
    find_python,
    make_venv,
    normal,
    pip_install,
    read_lock,
    say,
)

UV = "uv==0.13.9"


def wheel_fits(file: str, pythons: Sequence[str], platforms: str) -> bool:
    """Would this wheel install on one of these CPython minors (as `11`) and platforms (a pattern)?"""
    python, abi, system = file[: -len(".whl")].split("-")[-3:]
    if system != "any" and not re.search(platforms, system):
        return False
    for tag in python.split("."):
        minor = tag[3:]
        named = tag in (f"cp3{minor}", f"py3{minor}") and minor in pythons
        if tag == "py3" or (named and abi in (tag, "abi3", "none")):
            return True
        if abi == "abi3" and tag.startswith("cp3") and minor.isdigit() and int(minor) <= int(max(pythons)):
            return True
    return False


def lock_entry(package: dict[str, Any]) -> str:
    """One pin with the hashes of every wheel that a supported machine could take."""
    wheels = package.get("wheels", [])
    files = {wheel.get("name") or wheel["url"].rsplit("/", 1)[1]: wheel for wheel in wheels}
    minors = [python.split(".")[1] for python in PYTHONS]
    fits = [file for file in files if wheel_fits(file, minors, "manylinux.*(x86_64|aarch64)|macosx")]
    sizes = [files[file].get("size") for file in fits if wheel_fits(file, ["11"], "manylinux.*x86_64")]
    hashes = sorted({files[file]["hashes"]["sha256"] for file in fits})
    if not hashes:
        raise SetupError(
            f"{package['name']}=={package['version']} has no wheel for Python {', '.join(PYTHONS)}"
        )
    size = max((size for size in sizes if size is not None), default=None)  # a mirror may not tell
    marker = f" ; {package['marker']}" if "marker" in package else ""
    lines = [
        f"{package['name']}=={package['version']}{marker}",
        *(f"    --hash=sha256:{it}" for it in hashes),
    ]
    return (f"# {size / 1e6:.2f} MB\n" if size else "") + " \\\n".join(lines) + "\n"


def resolve(root: Path, uv: Path, lock: str, below: Sequence[str], uv_args: list[str]) -> bool:
    """Resolve `locks/LOCK.in` under the versions of the locks `below`, leaving out what those hold.

    What `LOCK.in` names itself it may have in another version: in a layer that one then comes first.
    """
    named = re.findall(r"^([\w.-]+)", (root / "locks" / f"{lock}.in").read_text(), re.M)
    held = {pin.name: pin for name in below for pin in read_lock(root / "locks" / f"{name}.txt")}
    held = {name: pin for name, pin in held.items() if name not in {normal(it) for it in named}}
    with tempfile.TemporaryDirectory() as folder:
        constraints, output = Path(folder, "constraints.txt"), Path(folder, "pylock.toml")
        constraints.write_text("".join(f"{pin.name}=={pin.version}\n" for pin in held.values()))
        options = ["--universal", "--python-version", PYTHONS[-1], "--fork-strategy", "fewest", "--quiet"]
        options += ["--format", "pylock.toml", "-c", str(constraints), "-o", str(output), *uv_args]
        code, words = call([uv, "pip", "compile", *options, root / "locks" / f"{lock}.in"], quiet=True)
        if code:
            say(f"locks/{lock}.txt stays as it is: {words.strip()}")
            return False
        packages = tomllib.loads(output.read_text())["packages"]
    elsewhere = re.compile("== '(win32|emscripten)'")
    chosen = [it for it in packages if it["name"] not in held and not elsewhere.search(it.get("marker", ""))]
    head = f"# Made by `make locks` from locks/{lock}.in. Sizes: the wheels for Linux x86-64, Python 3.11.\n"
    text = "\n".join(lock_entry(package) for package in chosen)
    (root / "locks" / f"{lock}.txt").write_text(f"{head}\n{text}")
    say(f"locks/{lock}.txt: {len(chosen)} packages")
    return True


def relock(root: Path, requested: str, pip_args: list[str]) -> bool:
    """Resolve every lock again; pip's index options are uv's too."""
    venv = root / ".venvs" / "locks"
    make_venv(venv, *find_python(requested))
    pip_install([venv / "bin" / "python", "-m", "pip"], f"installing {UV}", [UV, *pip_args], root)
    uv = venv / "bin" / "uv"
    done = [
        resolve(root, uv, "base", [], pip_args),
        resolve(root, uv, "torch-cuda", ["base"], pip_args),
        resolve(root, uv, "dev", ["base", "torch-cuda"], pip_args),
        resolve(root, uv, "peers", ["base", "torch-cuda"], pip_args),
        resolve(root, uv, "peers-mosaic", ["base", "torch-cuda"], ["--no-deps", *pip_args]),
    ]
    # An index without the CPU build cannot answer for it: the file then stays, which is no failure.
    resolve(root, uv, "torch-cpu", ["base"], ["--no-deps", *pip_args])
    if not all(done):
        raise SetupError("a lock could not be resolved; uv's words are above. Next: make locks PIP_ARGS='…'")
    return True
