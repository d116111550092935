"""Becomes a worker: binds to CPUs, dies with its parent, then runs the command. Standard library only.

    python launch.py CPUS PARENT_PID -- argv…

Runs between fork and the worker's own program, in any language: CPU affinity and PR_SET_PDEATHSIG survive
exec. `CPUS` is a comma list, or `-` for as inherited.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    cpus, parent, dashes, *command = argv
    assert dashes == "--" and command, "usage: launch.py CPUS PARENT_PID -- argv…"
    if cpus != "-" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(c) for c in cpus.split(",")})
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # the harness died before we could ask to die with it
        sys.exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
