"""Set-up against a fake Python: a script that answers as interpreter, venv and pip, and notes each call."""

import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bench import bootstrap, peers, relock

REPOSITORY = Path(bootstrap.__file__).parent.parent
LOCKS = ("base", "torch-cpu", "torch-cuda", "dev", *peers.PEERS)

FAKE = r"""#!{python} -ISB
import os, sys  # no more: a test starts this many times

state, me, words = {state!r}, sys.argv[0], sys.argv[1:]
packages = os.path.join(os.path.dirname(me), "../lib/python3.11/site-packages")


def told(name):
    with open(os.path.join(state, name)) as file:
        return file.read()


with open(os.path.join(state, "calls"), "a") as log:
    print(os.path.basename(me), *words, file=log)
if words[0] == "-c":
    print(told("version"))
elif words[:2] == ["-m", "venv"] and os.path.exists(os.path.join(state, "bare")):
    os.makedirs(words[-1])
    sys.exit("The virtual environment was not created successfully because ensurepip is not available.")
elif words[:2] == ["-m", "venv"]:
    venv = words[-1]
    os.makedirs(venv + "/bin")
    os.makedirs(venv + "/lib/python3.11/site-packages")
    with open(venv + "/pyvenv.cfg", "w") as file:
        print("home = /", "version = " + told("version"), sep="\n", file=file)
    os.symlink(os.path.realpath(me), venv + "/bin/python")
elif "--dry-run" in words:
    sys.exit("ERROR: Could not find a version that satisfies torch (from versions: " + told("offer") + ")")
elif "install" in words:
    if os.path.exists(os.path.join(state, "broken")):
        sys.exit("ERROR: the network is gone")
    with open(words[words.index("-r") + 1] if "-r" in words else os.devnull) as lock:
        pins = [line.split()[0].split("==") for line in lock if "==" in line]
    refused = told("refused") if os.path.exists(os.path.join(state, "refused")) else None
    if refused in [name for name, version in pins]:
        sys.exit("ERROR: no wheel of " + refused)
    for name, version in pins:
        info = os.path.join(packages, name + "-" + version + ".dist-info")
        os.makedirs(info, exist_ok=True)
        open(info + "/RECORD", "w").close()
elif "uninstall" in words:
    for name in words[words.index("--quiet") + 1 :]:
        for info in os.listdir(packages):
            if info.startswith(name + "-"):
                os.unlink(os.path.join(packages, info, "RECORD"))
                os.rmdir(os.path.join(packages, info))
"""


class Machine:
    """A checkout with small locks, on a machine whose only Python is the fake one."""

    def __init__(self, root: Path) -> None:
        self.root, self.state = root / "checkout", root / "state"
        self.python = root / "python3.11"
        self.state.mkdir()
        (self.root / "locks").mkdir(parents=True)
        (self.root / "bench").mkdir()
        (self.root / "pyproject.toml").write_text("")
        (self.root / "bench" / "__init__.py").write_text("")
        self.lock(
            "base",
            "# 1.50 MB\none==1.0 \\\n    --hash=sha256:00\n# 2.50 MB\ntwo==2.0 \\\n    --hash=sha256:11\n",
        )
        self.lock("torch-cpu", "# 200.00 MB\ntorch==2.13.0+cpu \\\n    --hash=sha256:22\n")
        self.lock("torch-cuda", "# 500.00 MB\ntorch==2.13.0 \\\n    --hash=sha256:33\n")
        self.lock("dev", "# 4.00 MB\npytest==9.0 \\\n    --hash=sha256:44\n")
        self.tell("version", "3.11.7")
        self.tell("offer", "2.12.0+cpu, 2.13.0+cpu")
        self.python.write_text(FAKE.format(python=sys.executable, state=str(self.state)))
        self.python.chmod(0o755)

    def lock(self, name: str, text: str) -> None:
        (self.root / "locks" / f"{name}.txt").write_text(text)

    def tell(self, name: str, text: str) -> None:
        (self.state / name).write_text(text)

    def calls(self, word: str = "") -> list[str]:
        """What the fake was asked since the last time."""
        log = self.state / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [line for line in lines if word in shlex.split(line) or not word]

    def timed(self, requested: str | None = None, *pip_args: str) -> bool:
        return bootstrap.timed(
            self.root, str(self.python) if requested is None else requested, list(pip_args)
        )

    def dev(self) -> bool:
        return bootstrap.dev(self.root, str(self.python), [])

    def have(self, venv: str = ".venv") -> dict[str, str]:
        return bootstrap.installed(self.root / venv)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(bootstrap, "NVIDIA_PATHS", ())
    monkeypatch.setattr(bootstrap, "may_use_apt", lambda: False)
    monkeypatch.setenv("PATH", "/nowhere")
    machine = Machine(tmp_path)
    monkeypatch.setattr(bootstrap, "ROOT", machine.root)
    monkeypatch.setattr(bootstrap, "system_packages", lambda python, version: None)
    return machine


# Setting up


def test_three_steps_in_order_each_without_dependencies(machine: Machine) -> None:
    assert machine.timed(None, "--find-links", "/wheels")
    installs = [line for line in machine.calls("install") if "--dry-run" not in line]
    assert [re.search(r"locks/\S+|-e \.", line)[0] for line in installs] == [  # type: ignore[index]
        "locks/base.txt",
        "locks/torch-cpu.txt",
        "-e .",
    ]
    assert all("--no-deps" in line and line.endswith("--find-links /wheels") for line in installs)
    assert all("--require-hashes" in line for line in installs[:2])
    assert "--no-build-isolation" in installs[2]
    assert machine.have() == {"one": "1.0", "two": "2.0", "torch": "2.13.0+cpu"}


def test_second_call_runs_and_prints_nothing(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert machine.timed()
    machine.calls()
    capsys.readouterr()
    assert not machine.timed("")
    assert machine.calls() == []
    assert capsys.readouterr().out == ""


def test_sizes_are_told_before_anything_is_installed(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.timed()
    out = capsys.readouterr().out
    assert "3 packages: will download about 204 MB (base 4 MB, torch-cpu 200 MB)" in out
    assert out.index("will download") < out.index("installing")


def test_only_what_is_not_there_is_counted(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.timed()
    capsys.readouterr()
    machine.lock(
        "base", "# 1.50 MB\none==1.0 \\\n    --hash=sha256:00\nthree==3.0 \\\n    --hash=sha256:11\n"
    )
    assert machine.timed()
    out = capsys.readouterr().out
    assert "1 packages: will download about 0 MB (base 0 MB) and three of unknown size" in out
    assert "removing what is not locked: two" in out
    assert machine.have() == {"one": "1.0", "three": "3.0", "torch": "2.13.0+cpu"}


def test_interrupted_set_up_leaves_no_stamp_and_is_repaired(machine: Machine) -> None:
    machine.tell("broken", "")
    failure = r"installing locks/base\.txt failed: pip exited 1\nERROR: the network is gone\nNext: "
    with pytest.raises(bootstrap.SetupError, match=failure):
        machine.timed()
    assert not (machine.root / ".venv" / "stackbench.stamp").exists()
    half = machine.root / ".venv/lib/python3.11/site-packages/one-1.0.dist-info"
    half.mkdir()
    (machine.state / "broken").unlink()
    assert machine.timed()
    assert (half / "RECORD").exists()
    assert not machine.timed()


def test_environment_that_does_not_run_is_made_anew(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.timed()
    (machine.root / ".venv" / "bin" / "python").unlink()
    assert machine.timed()
    assert ".venv is incomplete or of another Python: made anew" in capsys.readouterr().out
    assert machine.have()["one"] == "1.0"


def test_python_without_venv_names_the_package(machine: Machine) -> None:
    machine.tell("bare", "")
    with pytest.raises(bootstrap.SetupError, match=r"Next: apt install python3\.11-venv"):
        machine.timed()
    assert not (machine.root / ".venv").exists()


def test_python_without_venv_is_completed_by_root_on_debian(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def apt_install(packages: list[str]) -> bool:
        asked.extend(packages)
        (machine.state / "bare").unlink()
        return True

    machine.tell("bare", "")
    monkeypatch.setattr(bootstrap, "may_use_apt", lambda: True)
    monkeypatch.setattr(bootstrap, "apt_install", apt_install)
    assert machine.timed()
    assert asked == ["python3.11-venv"]


def test_unhashed_lock_is_installed_without_requiring_hashes(machine: Machine) -> None:
    machine.lock("torch-cpu", "torch==2.13.0+cpu\n")
    machine.timed()
    (line,) = [line for line in machine.calls("install") if "locks/torch-cpu.txt" in line]
    assert "--require-hashes" not in line


def test_dev_is_a_layer_and_leaves_the_timed_environment_alone(machine: Machine) -> None:
    machine.timed()
    before = machine.have()
    assert machine.dev()
    assert machine.have() == before
    assert machine.have(".venvs/dev") == {"pytest": "9.0"}
    packages = machine.root / ".venvs/dev/lib/python3.11/site-packages"
    layer = (packages / "timed-environment.pth").read_text()
    assert layer == f"import site; site.addsitedir('{machine.root}/.venv/lib/python3.11/site-packages')\n"
    assert not machine.dev()


# Which torch


def test_cpu_build_is_not_offered(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.tell("offer", "2.12.0, 2.13.0")
    machine.timed()
    assert machine.have()["torch"] == "2.13.0"
    assert (
        "torch from locks/torch-cuda.txt: no NVIDIA device, but pip is not offered" in capsys.readouterr().out
    )


def test_nvidia_device_decides_without_asking_pip(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap, "NVIDIA_PATHS", (str(machine.python),))
    machine.timed()
    assert machine.have()["torch"] == "2.13.0"
    assert "an NVIDIA device is here" in capsys.readouterr().out
    assert not machine.calls("--dry-run")


def test_a_device_that_appears_later_changes_the_build(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.timed()
    monkeypatch.setattr(bootstrap, "NVIDIA_PATHS", (str(machine.python),))
    assert machine.timed()
    assert machine.have()["torch"] == "2.13.0"
    assert "removing what is not locked: torch" in capsys.readouterr().out


def test_an_index_without_torch_is_an_error_not_a_fallback(machine: Machine) -> None:
    machine.tell("offer", "none")
    with pytest.raises(bootstrap.SetupError, match=r"no torch at all[^$]*Next: make setup PIP_ARGS="):
        machine.timed()


# Which Python


@pytest.mark.parametrize("version", ["3.10.13", "3.14.0", "2.7.18"])
def test_other_pythons_are_refused_by_name(
    machine: Machine, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.tell("version", version)
    assert bootstrap.main(["timed", "--python", str(machine.python)]) == 2
    err = capsys.readouterr().err
    assert f"PYTHON={machine.python} is Python {version}; valid: Python 3.13, 3.12, 3.11" in err
    assert "Next: make setup PYTHON=" in err
    assert not (machine.root / ".venv").exists()


def test_no_python_at_all(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert bootstrap.main(["timed"]) == 2
    assert "python3.13 is not to be run" in capsys.readouterr().err


def test_another_python_makes_the_environment_anew(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.timed()
    machine.tell("version", "3.12.1")
    assert machine.timed()
    assert "of another Python: made anew" in capsys.readouterr().out


def test_pip_args_that_begin_with_a_dash_reach_pip(machine: Machine) -> None:
    assert bootstrap.main(["timed", f"--python={machine.python}", "--pip-args=--no-index -f '/a b'"]) == 0
    installs = machine.calls("install")
    assert installs and all(line.endswith("--no-index -f /a b") for line in installs)


# Other people's loaders


@pytest.fixture
def with_peers(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(peers, "PEERS", ("peers",))
    machine.lock(
        "peers",
        "# Made by hand.\n\n# 7.00 MB\ngrain==0.2 \\\n    --hash=sha256:55\n\n"
        "# 2.00 MB\nspdl==0.8 \\\n    --hash=sha256:66\n",
    )
    return machine


def set_up_peers(machine: Machine) -> bool:
    return peers.peers(machine.root, str(machine.python), [])


def test_peers_are_a_layer_whose_size_is_said_first(
    with_peers: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set_up_peers(with_peers)
    said = capsys.readouterr().out
    assert "peers needs 2 packages: will download about 9 MB" in said
    assert said.index("will download about 9 MB") < said.index("installing locks/peers.txt")
    assert with_peers.have(".venvs/peers") == {"grain": "0.2", "spdl": "0.8"}
    (layer,) = (with_peers.root / ".venvs" / "peers").glob("lib/python3*/site-packages/*.pth")
    assert str(bootstrap.site_packages(with_peers.root / ".venv")) in layer.read_text()


def test_second_set_up_of_peers_does_nothing(with_peers: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_peers(with_peers)
    with_peers.calls()
    capsys.readouterr()
    assert not peers.peers(with_peers.root, "", [])
    assert (with_peers.calls(), capsys.readouterr().out) == ([], "")


def test_a_peer_that_cannot_be_installed_is_left_out_and_tried_again(
    with_peers: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    with_peers.tell("refused", "spdl")
    assert set_up_peers(with_peers)
    said = capsys.readouterr().out
    assert "left out: spdl 0.8: ERROR: no wheel of spdl" in said
    assert ".venvs/peers is ready, without spdl" in said
    assert with_peers.have(".venvs/peers") == {"grain": "0.2"}
    (with_peers.state / "refused").unlink()
    assert set_up_peers(with_peers)
    assert with_peers.have(".venvs/peers") == {"grain": "0.2", "spdl": "0.8"}


# The locks as they are tracked


def lock_lines(name: str) -> list[str]:
    return (REPOSITORY / "locks" / f"{name}.txt").read_text().splitlines()


@pytest.mark.parametrize("name", LOCKS)
def test_lock_names_no_host_and_no_path(name: str) -> None:
    text = "\n".join(lock_lines(name) + (REPOSITORY / "locks" / f"{name}.in").read_text().splitlines())
    assert not re.search(r"https?:|//|--(extra-)?index|--find-links|\.(com|org|io)\b", text)
    assert not re.search(r"/(tmp|root|home|work|usr|opt)\b", text)


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_has_hashes_a_size_and_a_marker_that_evaluates(name: str) -> None:
    pins = bootstrap.read_lock(REPOSITORY / "locks" / f"{name}.txt")
    assert len(pins) == sum("==" in line and line[0] not in "# " for line in lock_lines(name)) > 0
    for pin in pins:
        assert pin.hashed, pin
        assert pin.megabytes is not None, pin
        bootstrap.applies(pin, "3.11.7")
    digests = [line for line in lock_lines(name) if "--hash" in line]
    assert all(re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}( \\)?", line) for line in digests)


def test_locks_do_not_overlap() -> None:
    files = [REPOSITORY / "locks" / f"{name}.txt" for name in LOCKS]
    base, cpu, cuda, dev, *layers = ({pin.name for pin in bootstrap.read_lock(file)} for file in files)
    assert not base & cuda
    for name, layer in zip(peers.PEERS, layers, strict=True):
        named = re.findall(r"^[\w.-]+", (REPOSITORY / "locks" / f"{name}.in").read_text(), re.M)
        assert layer & (base | cuda) <= {bootstrap.normal(it) for it in named}
        assert not layer & {"torch", "numpy", "jax", "jaxlib", "tokenizers", "fastokens"}
    assert not dev & (base | cuda)
    assert cpu == {"torch"} <= cuda


def versions() -> dict[str, str]:
    files = (REPOSITORY / "locks" / f"{name}.txt" for name in ("base", "torch-cuda", "dev"))
    return {pin.name: pin.version for file in files for pin in bootstrap.read_lock(file)}


def test_locks_fulfil_their_inputs() -> None:
    for name in LOCKS:
        pins = {pin.name: pin.version for pin in bootstrap.read_lock(REPOSITORY / "locks" / f"{name}.txt")}
        for line in (REPOSITORY / "locks" / f"{name}.in").read_text().splitlines():
            if line and not line.startswith("#"):
                wanted = Requirement(line)
                assert wanted.specifier.contains(pins[wanted.name]), line


def test_locked_versions_lie_in_the_declared_ranges() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    locked = versions()
    for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(locked[wanted.name]), line
    declared = SpecifierSet(project["requires-python"])
    assert set(declared.filter(f"3.{minor}" for minor in range(9, 20))) == set(bootstrap.PYTHONS)


def test_both_builds_of_torch_are_one_version() -> None:
    (cpu,) = bootstrap.read_lock(REPOSITORY / "locks" / "torch-cpu.txt")
    assert cpu.version == versions()["torch"] + "+cpu"


@pytest.mark.parametrize(
    ("file", "fits"),
    [
        ("jaxlib-0.10.2-cp311-cp311-manylinux_2_27_x86_64.whl", True),
        ("polars-2.1.0-cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
        ("rich-15.0.0-py3-none-any.whl", True),
        ("six-1.0-py2.py3-none-any.whl", True),
        ("multiprocess-0.70.19-py311-none-any.whl", True),
        ("multiprocess-0.70.19-py310-none-any.whl", False),
        ("triton-3.7.1-cp314-cp314-manylinux_2_28_x86_64.whl", False),
        ("numpy-2.4.6-cp313-cp313t-manylinux_2_28_x86_64.whl", False),
        ("numpy-2.4.6-cp311-cp311-win_amd64.whl", False),
        ("numpy-2.4.6-pp311-pypy311_pp73-manylinux_2_28_x86_64.whl", False),
    ],
)
def test_wheels_of_supported_machines(file: str, fits: bool) -> None:
    assert relock.wheel_fits(file, ["13", "12", "11"], "manylinux.*x86_64") is fits
