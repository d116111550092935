"""What the numbers were measured in, as labelled facts."""

from __future__ import annotations

import json
from typing import Any

from bench.report import words
from bench.report.words import plain


def versions_of(text: str | None) -> dict[str, str]:
    """A JSON object of names and values, whatever was stored."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in found.items()}


def facts(environment: dict[str, Any], session: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and text, unknown ones left out."""
    agrees = {True: "yes", False: "no", None: None}[environment["agrees_with_lock"]]
    dirty = " with uncommitted changes" if environment["git_dirty"] else ""
    memory = environment["memory_bytes"]
    rows: list[tuple[str, Any]] = [
        ("device", session.get("device_name")), ("device UUID", environment["device_uuid"]),
        ("driver", environment["driver"]), ("CPU", environment["cpu_model"]),
        ("CPUs usable", environment["cpus"]), ("threads a pool", session.get("threads")),
        ("memory", words.bytes_(memory) if memory else None), ("Python", environment["python"]),
        ("packages", pairs(environment["versions"])),
        ("all packages, hash", environment["distributions_hash"]),
        ("agrees with the lock", agrees), ("libraries loaded", pairs(environment["libraries"])),
        ("flags", pairs(environment["flags"], "=")), ("input", session.get("inputs")),
        ("commit", f"{environment['git_sha']}{dirty}" if environment["git_sha"] else None),
        ("session started", session.get("started")), ("environment id", environment["env_id"]),
    ]  # fmt: skip
    return [(label, plain(value, 4000)) for label, value in rows if value not in (None, "")]


def pairs(text: str | None, sign: str = " ") -> str:
    return ", ".join(f"{name}{sign}{value}" for name, value in sorted(versions_of(text).items()))
