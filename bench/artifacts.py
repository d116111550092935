"""Reading raw artifacts, which may be anybody's: sizes and types are checked, nothing here raises on content.

A fact of the wrong type is null; a file that cannot be read is a `Problem` that names file and cause. Text is
made storable (no lone surrogates), not safe to show: that is the report's part.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from bench import protocol

MIB: Final = 1 << 20
LIMITS: Final = {
    "run.json": MIB, "messages.jsonl": 64 * MIB, "plan.json": 64 * MIB, "environment.json": 16 * MIB,
    "wall.json": 4 * MIB, "gate": 64 * MIB, "doctor.json": 16 * MIB,
}  # fmt: skip
LONGEST_TEXT: Final = 4000
NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+:-]{0,199}")  # of sessions: they become file names
STATUSES: Final = (
    protocol.STATUS_OK, protocol.STATUS_FAILED, protocol.STATUS_SKIPPED, protocol.STATUS_NOT_COMPARABLE,
)  # fmt: skip
TEXTS: Final = (
    "run_id", "parent_run_id", "kind", "role", "case_id", "group", "workload", "stack", "arm", "env_id",
    "session", "round_id", "cache", "status", "reason", "started", "device_uuid",
)  # fmt: skip
INTEGERS: Final = (
    "order", "cache_id", "cache_changes", "steps_per_value", "tokens_per_step", "flops_per_step", "exit",
    "schema_version",
)  # fmt: skip


class Problem(Exception):
    """An artifact that cannot be read: the cause, without the file's name."""


# ------------------------------------------------------------------------------------------------- values
def text(value: Any, longest: int = LONGEST_TEXT) -> str | None:
    if not isinstance(value, str):
        return None
    short: str = value if len(value) <= longest else value[: longest - 1] + "…"
    return short.encode("utf-8", "replace").decode()


def integer(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not value.is_integer():
        return None
    return int(value) if -(2**63) <= value < 2**63 else None


def real(value: Any, *, finite: bool = True) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) or not finite else None


def flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def compact(value: Any) -> str | None:
    """A JSON value as text; None for None and for what is too long to be one fact."""
    if value is None:
        return None
    try:
        written = json.dumps(value, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError, TypeError):
        return None
    return written if len(written) <= 16 * LONGEST_TEXT else None


def table(value: Any) -> dict[str, Any]:
    """A JSON object, or an empty one."""
    return value if isinstance(value, dict) else {}


def rows(value: Any) -> list[dict[str, Any]]:
    """The objects of a JSON array."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


# -------------------------------------------------------------------------------------------------- files
def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes. Raises Problem."""
    try:
        with path.open("rb") as file:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise Problem("is no regular file")
            data = file.read(limit + 1)
    except OSError as error:
        raise Problem(error.strerror or type(error).__name__) from None
    if len(data) > limit:
        raise Problem(f"is larger than {limit // MIB} MiB")
    return data


def parse(data: bytes | str) -> Any:
    """JSON. Raises Problem: not UTF-8, not JSON, nested too deeply, or a number too long."""
    try:
        return json.loads(data)
    except RecursionError:
        raise Problem("is nested too deeply") from None
    except UnicodeDecodeError:
        raise Problem("is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Problem(f"is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except ValueError as error:
        raise Problem(f"is not JSON that can be read: {error}") from None


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object. Raises Problem."""
    value = parse(read_bytes(path, limit))
    if not isinstance(value, dict):
        raise Problem(f"holds a JSON {type(value).__name__}, not an object")
    return value


def irregular(path: Path) -> bool:
    """Whether opening it could block: a pipe, a device, a socket."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


# ------------------------------------------------------------------------------------------- observations
def run_row(directory: Path) -> dict[str, Any]:
    """`run.json` as a row of `runs`, as far as one observation tells it. Raises Problem."""
    path = directory / "run.json"
    if irregular(path):
        raise Problem("run.json is no regular file")
    try:
        raw = read_json(path, LIMITS["run.json"])
    except Problem as problem:
        raise Problem(f"run.json {problem}") from None
    if raw.get("run_id") != directory.name:
        raise Problem("run.json holds another run_id than its directory's name")
    row: dict[str, Any] = {name: text(raw.get(name)) for name in TEXTS}
    for name in INTEGERS:
        row[name] = integer(raw.get(name))
    row["axes"], row["wall_s"] = compact(raw.get("axes")), real(raw.get("wall_s"))
    row["round_index"] = round_index(row["round_id"])
    missing = [name for name in ("kind", "case_id", "group", "arm", "stack", "session") if not row[name]]
    if missing:
        raise Problem(f"run.json lacks {', '.join(missing)}")
    if not NAME.fullmatch(row["session"]):
        raise Problem(f"run.json: session {row['session'][:80]!r} is no name")
    if row["status"] not in STATUSES:
        raise Problem(f"run.json: status {str(raw.get('status'))[:80]!r} is none of {', '.join(STATUSES)}")
    return row


def round_index(round_id: str | None) -> int | None:
    """The index in `<session>.<group>.r<index>.<attempt>`."""
    found = re.search(r"\.r(\d{1,9})\.\d{1,9}$", round_id or "")
    return int(found[1]) if found else None


def messages(directory: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(line number, message) of `messages.jsonl`; None for a line that is no JSON object. Raises Problem."""
    path = directory / "messages.jsonl"
    if irregular(path):
        raise Problem("messages.jsonl is no regular file")
    try:
        data = read_bytes(path, LIMITS["messages.jsonl"])
    except Problem as problem:
        raise Problem(f"messages.jsonl {problem}") from None
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            message = parse(line)
        except Problem:
            message = None
        yield number, message if isinstance(message, dict) else None


def value_row(message: Mapping[str, Any]) -> dict[str, Any] | None:
    """A `value` message as a row of `values`; None where it is none."""
    wall, steps = integer(message.get("wall_ns")), integer(message.get("steps"))
    index, warmup = integer(message.get("index")), flag(message.get("warmup"))
    if wall is None or wall <= 0 or steps is None or steps <= 0 or index is None or warmup is None:
        return None
    return {"index": index, "is_warmup": warmup, "steps": steps, "wall_ns": wall,
            "device_ns": integer(message.get("device_ns")), "loss": real(message.get("loss"))}  # fmt: skip


def metric_rows(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A `metric` or `compiled` message as rows of `metrics`."""
    if message.get("type") == "compiled":
        return [
            {"phase": "compile", "metric": name, "value": value, "unit": "s", "censored": False,
             "source": "measured"}
            for name in ("first_step_s", "build_s")
            if (value := real(message.get(name))) is not None and value >= 0
        ]  # fmt: skip
    name = text(message.get("metric"), 200)
    if not name:
        return []
    return [
        {"phase": text(message.get("phase"), 200) or "", "metric": name, "value": real(message.get("value")),
         "unit": text(message.get("unit"), 40), "censored": flag(message.get("censored")),
         "source": text(message.get("source"), 40)}
    ]  # fmt: skip
