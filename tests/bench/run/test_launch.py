"""Between fork and the worker's own program: bound, dying with its parent, without a core file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.run import isolate
from tests.fixtures.runs import PATIENCE_S, alive, until


def launch(*arguments: str, parent: int | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", str(isolate.LAUNCH), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_it_becomes_the_command_bound_and_without_core_files() -> None:
    cpu = min(os.sched_getaffinity(0))
    show = "import os, resource as r; print(sorted(os.sched_getaffinity(0)), r.getrlimit(r.RLIMIT_CORE))"
    done = launch(str(cpu), str(os.getpid()), "--", sys.executable, "-I", "-c", show)
    assert done.stdout.strip() == f"[{cpu}] (0, 0)", done.stderr


def test_a_dash_leaves_the_cpus_alone() -> None:
    show = "import os; print(sorted(os.sched_getaffinity(0)))"
    done = launch("-", str(os.getpid()), "--", sys.executable, "-I", "-c", show)
    assert done.stdout.strip() == str(sorted(os.sched_getaffinity(0)))


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_it_does_not_start_for_a_parent_that_is_gone() -> None:
    done = launch("-", str(os.getpid() + 1), "--", sys.executable, "-c", "print('started')")
    assert (done.returncode, done.stdout) == (1, "")


def test_what_cannot_be_run_is_said(tmp_path: Path) -> None:
    done = launch("-", str(os.getpid()), "--", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("cannot run ") and "Permission denied" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_worker_dies_with_its_parent(tmp_path: Path) -> None:
    """Also where the parent is killed and cannot end it."""
    up = tmp_path / "up"
    code = f"import time; open({str(up)!r}, 'w'); time.sleep(600)"
    parent = (
        "import os, subprocess, sys\n"
        f"command = [sys.executable, {str(isolate.LAUNCH)!r}, '-', str(os.getpid()), '--']\n"
        f"subprocess.Popen([*command, sys.executable, '-c', {code!r}], start_new_session=True).wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], env={"TMPDIR": str(tmp_path)})
    until(up.exists, "the worker starts")
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not alive(tmp_path), "the worker dies")
