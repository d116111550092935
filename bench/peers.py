"""Set-up of other people's loaders: `python3 -m bench.bootstrap peers` (`make setup-peers`).

Each environment is a layer on `.venv` from a lock of its own, so that no peer brings another torch or numpy
and none changes what is timed. Standard library only.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from bench.bootstrap import (
    Pin,
    SetupError,
    announce,
    applies,
    call,
    digest,
    install_locks,
    installed,
    is_stamped,
    layered,
    missing,
    read_lock,
    say,
    timed,
    venv_version,
)

PEERS = ("peers", "peers-mosaic")  # `.venvs/NAME` from `locks/NAME.txt`


def install_each(root: Path, venv: Path, lock: str, pins: list[Pin], pip_args: list[str]) -> list[str]:
    """What a lock lacks, one pin at a time; the names that cannot be installed, each said with its reason."""
    pip: list[str | Path] = [venv / "bin" / "python", "-m", "pip"]
    blocks = re.split(r"\n(?=# )", (root / "locks" / f"{lock}.txt").read_text())
    left_out = []
    for pin in missing(pins, installed(venv)):
        own = "".join(f"{block}\n" for block in blocks if re.search(rf"(?m)^{pin.name}==", block))
        with tempfile.TemporaryDirectory() as folder:
            (file := Path(folder, "pin.txt")).write_text(own)
            options: list[str | Path] = [
                "install",
                "--no-deps",
                "--require-hashes",
                "--only-binary",
                ":all:",
                "-r",
                file,
            ]
            code, output = call([*pip, *options, *pip_args], cwd=root, quiet=True)
        if code:
            reason = next((line for line in output.splitlines() if "ERROR" in line), f"pip exited {code}")
            say(f"left out: {pin.name} {pin.version}: {reason}")
            left_out.append(pin.name)
    return left_out


def peers(root: Path, requested: str, pip_args: list[str]) -> bool:
    """Set up `.venv` and the layers that hold other people's loaders; false where all are there already.

    A peer that cannot be installed is left out and said, the others stay, and the next call tries it again.
    """
    changed = timed(root, requested, pip_args)
    version = venv_version(root / ".venv") or ""
    for name in PEERS:
        venv = root / ".venvs" / name
        stamp, expected = venv / "stackbench.stamp", digest(root, version, f"locks/{name}.txt")
        if venv_version(venv) == version and is_stamped(venv, expected, ""):
            continue
        stamp.unlink(missing_ok=True)
        layered(root, name, version)
        pins = [pin for pin in read_lock(root / "locks" / f"{name}.txt") if applies(pin, version)]
        announce(venv, {name: missing(pins, installed(venv))})
        left_out: list[str] = []
        try:
            install_locks(root, venv, {name: pins}, pip_args)
        except SetupError:
            left_out = install_each(root, venv, name, pins, pip_args)
        if not left_out:
            stamp.write_text(expected)
        say(f".venvs/{name} is ready" + (f", without {', '.join(left_out)}" if left_out else ""))
        changed = True
    return changed
