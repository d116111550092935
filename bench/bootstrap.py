"""Set-up from a bare Python: `python3 -m bench.bootstrap timed|dev|peers|locks` (the Makefile calls it).

`.venv` is the timed environment: base lock, one build of torch, the project. `.venvs/dev` is a layer on it
that holds the test tools, so that testing never changes what is timed; `.venvs/peers` and its like are layers
with other people's loaders. Standard library only; a stamp, written last, makes a second call do nothing,
and an interrupted call leaves none.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.13", "3.12", "3.11")
NVIDIA_PATHS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0")
SYSTEM_PACKAGES = {  # Debian package: the commands of which one is enough
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "g++": ("g++", "c++"),
}
CHECK = "import jax, matplotlib, numpy, polars, pydantic, pyperf, torch, typer"


class SetupError(Exception):
    """Something the user can correct: value, place, valid options, next command."""


@dataclass(frozen=True)
class Pin:
    """One line of a lock; `megabytes` is the size of its wheel for Linux x86-64 and Python 3.11."""

    name: str
    version: str
    marker: str
    megabytes: float | None
    hashed: bool


def say(text: str) -> None:
    """Print at once, so that our lines and those of pip keep their order."""
    print(f"set-up: {text}", flush=True)


def call(command: Sequence[str | Path], *, quiet: bool = False, cwd: Path | None = None) -> tuple[int, str]:
    """Run a command; its exit code, and its output where `quiet` keeps that off the terminal."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    environment["DEBIAN_FRONTEND"] = "noninteractive"
    pipe = subprocess.PIPE if quiet else None
    try:
        done = subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=subprocess.STDOUT if quiet else None,
            env=environment,
            cwd=cwd,
            text=True,
            check=False,
        )
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout or ""


# Locks and what is installed


def normal(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def minor(python: str) -> str:
    """`3.11` of `3.11.7`."""
    return ".".join(python.split(".")[:2])


def read_lock(path: Path) -> list[Pin]:
    """The pins of a lock file; the comment above a pin is its download size."""
    pins: list[Pin] = []
    size = None
    for line in path.read_text().replace("\\\n", " ").splitlines():
        if found := re.fullmatch(r"# ([0-9.]+) MB", line):
            size = float(found[1])
        elif found := re.match(r"([\w.-]+)==([^\s;]+)\s*(?:;\s*(.*?))?\s*(--hash=.*)?$", line):
            pins.append(Pin(normal(found[1]), found[2], found[3] or "", size, bool(found[4])))
            size = None
    return pins


def applies(pin: Pin, python: str) -> bool:
    """Evaluate a pin's marker; a marker of our locks is a Python expression over these names."""
    names = {
        "python_full_version": python,
        "python_version": minor(python),
        "sys_platform": sys.platform,
        "platform_system": platform.system(),
        "platform_machine": platform.machine(),
        "platform_python_implementation": "CPython",
    }
    return not pin.marker or bool(eval(pin.marker, {"__builtins__": {}}, names))


def site_packages(venv: Path) -> Path:
    """Where an environment keeps its distributions."""
    return next(iter(sorted(venv.glob("lib/python3.*/site-packages"))), venv / "lib")


def installed(venv: Path) -> dict[str, str]:
    """Names and versions in an environment. Leftovers of an interrupted pip are removed, and so repaired."""
    found = {}
    for info in site_packages(venv).glob("*.dist-info"):
        if not (info / "RECORD").exists():
            shutil.rmtree(info)
            continue
        name, _, version = info.name[: -len(".dist-info")].partition("-")
        found[normal(name)] = version
    return found


def missing(pins: Iterable[Pin], have: dict[str, str]) -> list[Pin]:
    """The pins that are not there in exactly the locked version."""
    return [pin for pin in pins if have.get(pin.name) != pin.version]


def is_other_build(have: str, wanted: str | None) -> bool:
    """The same public version with another local label, such as `+cpu`."""
    return wanted is not None and have != wanted and have.split("+")[0] == wanted.split("+")[0]


# Interpreters and environments


def python_version(command: str | Path) -> str | None:
    """What `command` answers, as `3.11.7`; none where it does not run."""
    code, output = call([command, "-c", "import platform; print(platform.python_version())"], quiet=True)
    return output.strip() if code == 0 else None


def supported(version: str | None) -> bool:
    """Is this a Python that the project declares?"""
    return version is not None and version.startswith(tuple(f"{python}." for python in PYTHONS))


def find_python(requested: str) -> tuple[str, str]:
    """The interpreter for the environments, and its version: `PYTHON=`, or else the newest that runs."""
    seen = []
    for command in [requested] if requested else [*(f"python{python}" for python in PYTHONS), "python3"]:
        version = python_version(command)
        if version is not None and supported(version):
            return command, version
        seen.append(f"{command} is {f'Python {version}' if version else 'not to be run'}")
    raise SetupError(
        f"{'PYTHON=' if requested else ''}{', '.join(seen)}; valid: Python {', '.join(PYTHONS)}. "
        "Next: make setup PYTHON=/path/to/python3.11"
    )


def venv_version(venv: Path) -> str | None:
    """The Python an environment was made with, read and not run."""
    config = venv / "pyvenv.cfg"
    found = re.search(r"^version\s*=\s*(\S+)", config.read_text(), re.M) if config.exists() else None
    return found[1] if found and (venv / "bin" / "python").exists() else None


def may_use_apt() -> bool:
    """Root on Debian: the one place where set-up installs system packages."""
    release = Path("/etc/os-release")
    debian = release.exists() and re.search(r"^ID=debian$", release.read_text(), re.M)
    return bool(debian) and os.geteuid() == 0 and shutil.which("apt-get") is not None


def apt_install(packages: Sequence[str]) -> bool:
    """Install Debian packages; say so before, and what went wrong after."""
    say(f"installing with apt: {' '.join(packages)}")
    call(["apt-get", "update", "-q"], quiet=True)
    code, output = call(["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages], quiet=True)
    if code:
        say("apt-get failed:\n" + "\n".join(output.splitlines()[-5:]))
    return code == 0


def make_venv(venv: Path, python: str | Path, version: str, *options: str) -> None:
    """Make an environment, unless one of this Python is there and runs."""
    if venv_version(venv) == version and python_version(venv / "bin" / "python") == version:
        return
    if venv.exists():
        say(f"{venv.name} is incomplete or of another Python: made anew")
        shutil.rmtree(venv)
    command = [python, "-m", "venv", *options, venv]
    code, output = call(command, quiet=True)
    package = f"python{minor(version)}-venv"
    if code and "ensurepip" in output and may_use_apt() and apt_install([package]):
        shutil.rmtree(venv, ignore_errors=True)
        code, output = call(command, quiet=True)
    if code:
        shutil.rmtree(venv, ignore_errors=True)
        raise SetupError(f"{python} -m venv failed: {output.strip()}\nNext: apt install {package}")


# Torch: which build, and why


def nvidia_device() -> str | None:
    """What shows that an NVIDIA device is here."""
    shown = [path for path in NVIDIA_PATHS if Path(path).exists()]
    return next(iter(shown), shutil.which("nvidia-smi"))


def choose_torch(root: Path, pip: list[str | Path], pip_args: list[str]) -> tuple[str, str]:
    """`cpu` or `cuda`, and the reason.

    pip is asked for a version that cannot exist: it lists those on offer and downloads nothing.
    """
    if device := nvidia_device():
        return "cuda", f"an NVIDIA device is here ({device})"
    version = read_lock(root / "locks" / "torch-cpu.txt")[0].version
    ask = [
        "install",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "--only-binary",
        ":all:",
        "torch==0.dev0",
    ]
    _, output = call([*pip, *ask, *pip_args], quiet=True)
    offer = re.search(r"\(from versions: ([^)]*)\)", output)
    if offer is None or offer[1] == "none":
        raise SetupError(
            f"pip finds no torch at all:\n{output.strip()}\nNext: make setup PIP_ARGS='--index-url …'"
        )
    if version in offer[1].split(", "):
        return "cpu", "no NVIDIA device, and pip is offered the CPU build"
    return (
        "cuda",
        f"no NVIDIA device, but pip is not offered torch {version}: the default build runs here too",
    )


# The two environments


def digest(root: Path, python: str | None, *files: str) -> str:
    """What a stamp holds: everything that decides what is installed."""
    parts = [python or "", str(root), *((root / file).read_text() for file in files)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def timed_digest(root: Path, python: str | None, flavour: str) -> str:
    """The stamp of `.venv`."""
    project = ("pyproject.toml", "bench/__init__.py")
    return f"{flavour} {digest(root, python, 'locks/base.txt', f'locks/torch-{flavour}.txt', *project)}"


def is_stamped(venv: Path, expected: str, requested: str) -> bool:
    """Is there nothing to do? Reads files; runs only a Python that was asked for by name."""
    stamp = venv / "stackbench.stamp"
    if not stamp.exists() or stamp.read_text() != expected or not venv_version(venv):
        return False
    return not requested or find_python(requested)[1] == venv_version(venv)


def announce(venv: Path, groups: dict[str, list[Pin]]) -> None:
    """Say how much will be downloaded before anything is."""
    pins = [pin for group in groups.values() for pin in group]
    if not pins:
        return
    parts = [
        f"{name} {sum(pin.megabytes or 0 for pin in group):.0f} MB" for name, group in groups.items() if group
    ]
    unknown = [pin.name for pin in pins if pin.megabytes is None]
    total = sum(pin.megabytes or 0 for pin in pins)
    say(
        f"{venv.name} needs {len(pins)} packages: will download about {total:.0f} MB"
        + (f" ({', '.join(parts)})" if parts else "")
        + (f" and {', '.join(unknown)} of unknown size" if unknown else "")
        + ", less what pip has cached"
    )


def pip_install(pip: list[str | Path], what: str, arguments: list[str], root: Path) -> None:
    """One pip call; without its chatter, unless a person watches or it fails."""
    say(what)
    watched = sys.stdout.isatty()
    code, output = call([*pip, "install", *arguments], cwd=root, quiet=not watched)
    if code:
        words = "" if watched else "\n" + "\n".join(output.strip().splitlines()[-20:])
        raise SetupError(
            f"{what} failed: pip exited {code}{words}\nNext: correct that, then the same command"
        )


def install_locks(root: Path, venv: Path, locks: dict[str, list[Pin]], pip_args: list[str]) -> None:
    """Bring an environment to exactly its locks: remove what is not in them, then add what is missing."""
    pip: list[str | Path] = [venv / "bin" / "python", "-m", "pip"]
    have = installed(venv)
    wanted = {pin.name: pin.version for pins in locks.values() for pin in pins}
    strays = [name for name in have if name not in {*wanted, "pip", "stackbench", "stackbench-native"}]
    # To pip, torch==2.13.0 is fulfilled by 2.13.0+cpu: a build of the same version has to go first.
    strays += [name for name in have if is_other_build(have[name], wanted.get(name))]
    if strays:
        say(f"removing what is not locked: {' '.join(strays)}")
        call([*pip, "uninstall", "--yes", "--quiet", *strays])
    for lock, pins in locks.items():
        if missing(pins, have):
            hashes = ["--require-hashes"] if all(pin.hashed for pin in pins) else []
            options = ["--no-deps", *hashes, "--only-binary", ":all:", "-r", f"locks/{lock}.txt"]
            pip_install(pip, f"installing locks/{lock}.txt", [*options, *pip_args], root)


def timed(root: Path, requested: str, pip_args: list[str]) -> bool:
    """Set up `.venv` and, in it, the Rust loader; false where both already are."""
    from bench.native import native

    changed = timed_packages(root, requested, pip_args)
    return native(root, pip_args) or changed


def timed_packages(root: Path, requested: str, pip_args: list[str]) -> bool:
    """Set up `.venv` but for the Rust loader; false where it already is."""
    venv, started = root / ".venv", time.monotonic()
    stamp = venv / "stackbench.stamp"
    flavour = stamp.read_text().split()[0] if stamp.exists() else "cuda"
    stale_cpu = flavour == "cpu" and nvidia_device() is not None
    if not stale_cpu and is_stamped(venv, timed_digest(root, venv_version(venv), flavour), requested):
        return False
    stamp.unlink(missing_ok=True)
    command, version = find_python(requested)
    say(f".venv: Python {version} ({command})")
    make_venv(venv, command, version)
    python = venv / "bin" / "python"
    flavour, reason = choose_torch(root, [python, "-m", "pip"], pip_args)
    say(f"torch from locks/torch-{flavour}.txt: {reason}")
    locks = {
        lock: [pin for pin in read_lock(root / "locks" / f"{lock}.txt") if applies(pin, version)]
        for lock in ("base", f"torch-{flavour}")
    }
    have = installed(venv)
    announce(venv, {lock: missing(pins, have) for lock, pins in locks.items()})
    install_locks(root, venv, locks, pip_args)
    options = ["--no-deps", "--no-build-isolation", "-e", "."]
    pip_install([python, "-m", "pip"], "installing the project", [*options, *pip_args], root)
    code, output = call([python, "-c", CHECK], quiet=True)
    if code:
        raise SetupError(f".venv does not import:\n{output.strip()}\nNext: make clean setup")
    stamp.write_text(timed_digest(root, version, flavour))
    say(f".venv is ready after {time.monotonic() - started:.0f} s")
    return True


def system_packages(python: Path, version: str) -> None:
    """What a browser test and torch.compile need. Without it their tests skip, with a reason."""
    lacking = [package for package, names in SYSTEM_PACKAGES.items() if not any(map(shutil.which, names))]
    _, headers = call([python, "-c", "import sysconfig; print(sysconfig.get_path('include'))"], quiet=True)
    if not Path(headers.strip(), "Python.h").exists():
        lacking.append(f"python{minor(version)}-dev")
    if lacking and not (may_use_apt() and apt_install(lacking)):
        names = " ".join(lacking)
        say(f"going on without {names}: tests that need it skip. Next: apt install {names}")


def layered(root: Path, name: str, version: str) -> Path:
    """Make `.venvs/NAME`, which sees everything in `.venv` and comes before it, and has no pip of its own."""
    base, venv = root / ".venv", root / ".venvs" / name
    make_venv(venv, base / "bin" / "python", version, "--without-pip")
    layer = f"import site; site.addsitedir({str(site_packages(base))!r})\n"
    (site_packages(venv) / "timed-environment.pth").write_text(layer)
    return venv


def dev(root: Path, requested: str, pip_args: list[str]) -> bool:
    """Set up `.venv` and `.venvs/dev`; false where both already are."""
    changed = timed(root, requested, pip_args)
    base, venv = root / ".venv", root / ".venvs" / "dev"
    version = venv_version(base) or ""
    stamp, expected = venv / "stackbench.stamp", digest(root, version, "locks/dev.txt")
    if venv_version(venv) == version and is_stamped(venv, expected, ""):
        return changed
    stamp.unlink(missing_ok=True)
    system_packages(base / "bin" / "python", version)
    layered(root, "dev", version)
    locks = {"dev": [pin for pin in read_lock(root / "locks" / "dev.txt") if applies(pin, version)]}
    announce(venv, {"dev": missing(locks["dev"], installed(venv))})
    install_locks(root, venv, locks, pip_args)
    stamp.write_text(expected)
    say(".venvs/dev is ready")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, set up, and turn what the user can correct into exit code 2."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.bootstrap", description=__doc__)
    parser.add_argument("what", choices=("timed", "dev", "peers", "locks"))
    parser.add_argument("--python", default="", help="the interpreter for the environments")
    parser.add_argument("--pip-args", default="", help="options for every pip call, as one word")
    options = parser.parse_args(arguments)
    steps = {"timed": timed, "dev": dev}
    if options.what == "locks":
        from bench.relock import relock

        steps["locks"] = relock
    if options.what == "peers":
        from bench.peers import peers

        steps["peers"] = peers
    try:
        steps[options.what](ROOT, options.python, shlex.split(options.pip_args))
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
