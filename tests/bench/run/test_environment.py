"""Fingerprints, CPU lists, and scrubbing: nobody's name, host or directory survives it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import devices, host
from bench.errors import UserError
from bench.run import environment
from bench.run.scrub import ANONYMOUS, Identity, leaks, scrub, scrub_values

REPOSITORY = Path("/home/alice/proj/stackbench")
WHO = Identity(
    (
        ("/home/alice", "<home>"),
        ("/home/alice/proj/stackbench", "<repo>"),
        ("/tmp", "<tmp>"),
        ("/scratch/job 7", "<tmp>"),
    ),
    ("alice",),
    ("box42.cluster.example.org", "box42"),
)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/alice/proj/stackbench/bench/x.py:12", "<repo>/bench/x.py:12"),
        ('File "/home/alice/.venv/lib/a.py"', 'File "<home>/.venv/lib/a.py"'),
        ("alice@box42:/data/secret/f.txt", "<user>@<host>:<path>/f.txt"),
        ("BOX42.cluster.example.org is up", "<host> is up"),
        ("/opt/v/lib/python3.12/site-packages/jax/x.py", "<site>/jax/x.py"),
        ("-I/opt/inc/foo -L/home/alice/lib", "-I<path>/foo -L<home>/lib"),
        ("PATH=/a/b:/c/d", "PATH=<path>/b:<path>/d"),
        ("file:///data/x/y.py", "file://<path>/y.py"),
        (r'{"log": "x\n/data/secret/f\nalice"}', r'{"log": "x\n<path>/f\n<user>"}'),
        ("/tmp/torchinductor_alice/aa/b.py", "<tmp>/torchinductor_<user>/aa/b.py"),
        ("/scratch/job 7/cache/x", "<tmp>/cache/x"),
        ("--xla_dump_to=/home/alice2/dump", "--xla_dump_to=<path>/dump"),
    ],
)
def test_what_is_rewritten(text: str, clean: str) -> None:
    assert scrub(text, REPOSITORY, WHO) == clean
    assert leaks(text, REPOSITORY, WHO)
    assert not leaks(clean, REPOSITORY, WHO)


@pytest.mark.parametrize(
    "text",
    [
        'op_name="jit(step)/jit(main)/transpose(jvp())/dot_general"',
        "https://example.org/a/b/c and git@example.org:a/b",
        "tokens/s/GPU, 1/2/3, and/or, a/b/c",
        "ROOT %fusion.3 = f32[8,1024]{1,0} fusion(%p0), kind=kLoop",
        "/proc/self/maps /usr/lib/x86_64-linux-gnu/libc.so.6 /dev/null",
        "<repo>/a/b <home>/x/y <path>/z <user>@<host>",
        "malice aliceblue box420",
    ],
)
def test_what_stays(text: str) -> None:
    assert scrub(text, REPOSITORY, WHO) == text
    assert not leaks(text, REPOSITORY, WHO)


names = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=3, max_size=10).filter(
    lambda name: (
        name not in ANONYMOUS
        and not name.isdigit()
        and name not in "<repo><home><tmp><site><path><host><user>"
    )
)
parts = st.text("abcXYZ019_-.é", min_size=1, max_size=8).filter(lambda part: part.strip("."))
glue = st.sampled_from(
    [" ", "\n", "\\n", '"', "'", "=", ":", ", ", "(", ")", "[", "@", " -I", "file://", "_", "-", "/"]
)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), user=names, box=names, base=st.lists(parts, min_size=1, max_size=2))
def test_nothing_survives_and_twice_is_once(
    data: st.DataObject, user: str, box: str, base: list[str]
) -> None:
    home = f"/home/{user}"
    repository = f"{home}/{'/'.join(base)}/repo"
    directories = ((home, "<home>"), (repository, "<repo>"), ("/tmp", "<tmp>"))
    who = Identity(directories, (user,), (f"{box}.example.org", box))
    path = st.lists(parts, min_size=2, max_size=4).map(lambda found: "/mnt/" + "/".join(found))
    secrets = st.sampled_from(
        [user, box, box.upper(), home, repository, f"{repository}/x.py", f"/tmp/{user}/x"]
    )
    piece = st.one_of(secrets, path, st.text(max_size=6), parts)
    pieces = data.draw(st.lists(st.tuples(piece, glue), max_size=8))
    text = "".join(f"{a}{b}" for a, b in pieces)
    clean = scrub(text, Path(repository), who)
    assert scrub(clean, Path(repository), who) == clean
    assert leaks(clean, Path(repository), who) == []
    assert not re.search(rf"(?<![A-Za-z0-9]){user}(?![A-Za-z0-9])", re.sub(r"<\w+>", "<>", clean))
    assert not re.search(rf"(?i)(?<![A-Za-z0-9]){box}(?![A-Za-z0-9])", re.sub(r"<\w+>", "<>", clean))
    for secret in (home, repository):
        assert not re.search(rf"(?<![\w.\-/]){re.escape(secret)}(?![\w.\-])", clean)


@given(st.lists(parts, min_size=2, max_size=5))
def test_directories_of_other_paths_are_dropped(found: list[str]) -> None:
    clean = scrub(f'open("/mnt/{"/".join(found)}") failed', REPOSITORY, WHO)
    assert clean == f'open("<path>/{found[-1]}") failed'


def test_values_are_scrubbed_and_keys_are_not() -> None:
    data = {"alice": ["/home/alice/x", 1, None], "b": {"c": "box42"}}
    assert scrub_values(data, REPOSITORY, WHO) == {"alice": ["<home>/x", 1, None], "b": {"c": "<host>"}}


def test_this_process_leaks_nothing_of_itself(tmp_path: Path) -> None:
    text = f"{tmp_path}/a {Path.home()}/b {Path(__file__)}"
    clean = scrub(text, Path(__file__).parents[3])
    assert str(Path.home()) not in clean or str(Path.home()) == "/"
    assert "<tmp>" in clean
    assert clean.endswith("<repo>/tests/bench/run/test_environment.py")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    def git(*arguments: str) -> None:
        settings = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *settings, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    return tmp_path


def fingerprint(repository: Path, **changes: Any) -> dict[str, Any]:
    return {**environment.fingerprint(None, {}, [], repository), **changes}


def test_the_fingerprint_says_what_defines_it(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "hunter2")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.1.2.3:80")
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={repository}/dump")
    monkeypatch.setenv("LD_PRELOAD", "/opt/secret/libtcmalloc.so:/opt/x/libb.so")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/data/secret")
    found = environment.fingerprint(None, {"TORCH_LOGS": "x"}, [], repository)
    text = json.dumps(found)
    assert "hunter2" not in text and "10.1.2.3" not in text and "secret" not in text
    assert found["flags"]["XLA_FLAGS"] == "--xla_dump_to=<repo>/dump"
    assert found["flags"]["LD_PRELOAD"] == "libtcmalloc.so libb.so"
    assert found["flags"]["TORCHINDUCTOR_CACHE_DIR"] == "<path>"
    assert found["flags"]["TORCH_LOGS"] == "x"
    assert environment.inherited_flags()["TORCHINDUCTOR_CACHE_DIR"] == "/data/secret"
    assert re.fullmatch(r"[0-9a-f]{40}", found["git_sha"])
    assert found["git_dirty"] is False
    assert found["agrees_with_lock"] is None
    assert found["python"] == sys.version.split()[0]
    assert found["versions"]["numpy"]
    assert environment.leaks(text, repository) == []
    (repository / "a").write_text("2")
    changed = environment.fingerprint(None, {"TORCH_LOGS": "x"}, [], repository)
    assert changed["git_dirty"] is True
    assert changed["env_id"] != found["env_id"]


def test_outside_git_it_is_null(tmp_path: Path) -> None:
    found = environment._git(tmp_path)
    assert found == {"git_sha": None, "git_dirty": None}


def test_another_interpreter_is_asked_for_its_own_packages(tmp_path: Path) -> None:
    link = tmp_path / "python"
    link.symlink_to(sys.executable)  # outside its environment: it sees no site-packages of ours
    version, implementation, installed = environment._python(link)
    assert version == sys.version.split()[0]
    assert implementation == sys.implementation.name.replace("cpython", "CPython")
    assert isinstance(installed, dict)
    with pytest.raises(UserError, match="does not answer"):
        environment._python(tmp_path / "missing")


def test_agreement_with_locks(tmp_path: Path) -> None:
    base, cpu, uv = tmp_path / "base.txt", tmp_path / "torch-cpu.txt", tmp_path / "uv.lock"
    base.write_text(
        "# a comment==1\nNumPy==2.1.0 \\\n    --hash=sha256:00\nzoo[extra]==3 ; python_version > '3'\n"
    )
    cpu.write_text("torch==2.13.0+cpu\n")
    uv.write_text('[[package]]\nname = "torch"\nversion = "2.13.0"\n')
    installed = {"numpy": "2.1.0", "torch": "2.13.0+cpu", "pip": "25", "private": "1"}
    agreed = environment._against_locks(installed, [base, cpu, uv])
    assert agreed == {"agrees_with_lock": True, "lock_disagreements": [], "not_in_lock": ["private"]}
    wrong = environment._against_locks({**installed, "numpy": "2.2.0"}, [base, cpu, uv])
    assert wrong["agrees_with_lock"] is False
    assert wrong["lock_disagreements"] == ["numpy: locked 2.1.0, installed 2.2.0"]
    assert environment._against_locks({"other": "1"}, [base])["agrees_with_lock"] is None


def test_gpus_in_the_fingerprint(repository: Path, fake_nvml) -> None:
    fake_nvml(["NVIDIA H200"], refused=frozenset({"nvmlDeviceGetMigMode"}))
    found = fingerprint(repository)
    assert found["driver"] == "580.159.04"
    assert found["device_uuids"] == ["GPU-a0-0000"]
    assert found["gpus"][0]["power_cap_w"] == 700
    assert found["gpus"][0]["sm_clock_mhz"] == 1980
    assert found["gpus"][0]["mig"] is None
    json.dumps(found)


def test_a_resume_elsewhere_is_a_new_session(repository: Path, fake_nvml) -> None:
    fake_nvml(["NVIDIA H200"])
    before = fingerprint(repository)
    assert environment.same_environment(before, fingerprint(repository)) == []
    clocks = [{**before["gpus"][0], "sm_clock_mhz": 345}]
    assert environment.same_environment(before, {**before, "gpus": clocks}) == []
    after = {
        **before,
        "device_uuids": ["GPU-x"],
        "driver": "590",
        "flags": {"XLA_FLAGS": "--x"},
        "distributions_hash": "0",
        "versions": {**before["versions"], "numpy": "9", "new": "1"},
    }
    told = environment.same_environment(before, after)
    numpy = before["versions"]["numpy"]
    assert "device UUIDs: ['GPU-a0-0000'] → ['GPU-x']" in told
    assert "driver: 580.159.04 → 590" in told
    assert f"package numpy: {numpy} → 9" in told
    assert "package new: unset → 1" in told
    assert any(line.startswith("flag XLA_FLAGS: ") and line.endswith("→ --x") for line in told)
    other = environment.same_environment(before, {**before, "distributions_hash": "0"})
    assert len(other) == 1 and other[0].startswith("packages: ")


def test_cpu_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "affinity", lambda: [0, 1, 2, 3, 8])
    monkeypatch.setattr(host, "numa_cpus", lambda node: {0: [0, 1], 1: [2, 3, 4], 2: [9]}.get(node))
    gpu = devices.Device(kind="cuda", name="g", numa_node=1)
    assert environment.cpu_list("none", gpu) == [0, 1, 2, 3, 8]
    assert environment.cpu_list("device", gpu) == [2, 3]
    assert environment.cpu_list("device") == [0, 1, 2, 3, 8]
    assert environment.cpu_list("device", devices.Device(kind="cpu", name="c", numa_node=0)) == [
        0,
        1,
        2,
        3,
        8,
    ]
    assert environment.cpu_list("device", devices.Device(kind="cuda", name="g", numa_node=2)) == [
        0,
        1,
        2,
        3,
        8,
    ]
    assert environment.cpu_list("8,0-1") == [0, 1, 8]
    for bad in ("0-4", "near", "3-1"):
        with pytest.raises(UserError):
            environment.cpu_list(bad)


def test_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpu_quota", lambda root: 2.5)
    assert environment.thread_count([0, 1, 2, 3]) == 2
    assert environment.thread_count(1) == 1
    monkeypatch.setattr(host, "cpu_quota", lambda root: None)
    assert environment.thread_count(range(6)) == 6


def test_variables_are_not_read_beyond_the_list() -> None:
    allowed = environment.inherited_flags()
    assert not {"PATH", "HOME", "USER", "HOSTNAME"} & set(allowed)
    assert set(allowed) <= set(os.environ)
