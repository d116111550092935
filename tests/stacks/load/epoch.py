"""The program that runs loaders for `test_stacks`: `python -m tests.stacks.load.epoch JOBS.json`.

It imports one stack, then forks a child for every job, so that an import is paid once and no job sees the
threads of another. A child writes what it saw beside the jobs, by its number.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np


def run(module: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Batches of a job as document digests, and what is left after `close`."""
    given = {**job["loader"], "files": [Path(file) for file in job["loader"]["files"]]}
    given |= {name: Path(given[name]) for name in ("tokenizer", "cache")}
    stages = None
    if job.get("stages"):
        from stacks.load.reading import Stages

        stages = Stages(Path(job["stages"]))
    seen: dict[str, Any] = {"error": None, "digests": [], "tokens": 0, "sum": 0, "wrong": 0, "stages": {}}
    loader = module.Loader(**given, stages=stages)
    streams: dict[int, list[np.ndarray]] = {}
    try:
        if hasattr(loader, "prepare"):
            loader.prepare()
        batches = loader.batches()
        for count, (batch, stream) in enumerate(batches, 1):
            array = np.asarray(batch)
            good = array.shape == (given["batch"], given["sequence"] + 1) and array.dtype == np.int32
            seen["wrong"] += not (good and array.flags.c_contiguous)
            streams.setdefault(stream, []).append(array.reshape(-1).copy())
            del array, batch
            if count == job.get("stop"):
                batches.close()
                break
        seen["padding"], seen["manifest"] = loader.padding(), loader.manifest()
    except Exception as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    loader.close()
    if stages is not None:
        seen["stages"] = stages.totals()
    for parts in streams.values():
        ids = np.concatenate(parts)
        seen["tokens"] += len(ids)
        seen["sum"] += int(ids.sum(dtype=np.int64))
        for document in np.split(ids, np.flatnonzero(ids == given["end"]) + 1):
            if len(document) > 1:
                seen["digests"].append(hashlib.blake2b(document.tobytes(), digest_size=8).hexdigest())
    seen["threads"] = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
    return seen


def main(path: Path) -> None:
    table = json.loads(path.read_text())
    module = importlib.import_module(table["module"])
    for number, job in enumerate(table["jobs"]):
        child = os.fork()
        if child == 0:
            os.setsid()
            signal.alarm(table["limit_s"])  # a hang ends here
            try:
                seen = run(module, job)
            except BaseException:
                seen = {"error": traceback.format_exc()}
            path.with_name(f"{number}.json").write_text(json.dumps(seen))
            sys.stderr.flush()
            sys.exit(0)  # as a user's program ends: what a library does at exit is done
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
