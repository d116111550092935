"""Tables in Parquet: built from artifacts, written atomically, read back typed. Columns: bench/schema.py.

    build(directory)   reads every artifact and writes tables/<table>/<session>.parquet
    load(directories)  frames of one or several results directories; builds first where artifacts are newer

Tables are a cache: they can be deleted at any time. Where they cannot be written (a read-only directory) the
frames are still returned. A directory that holds tables and no artifacts (a release) is read as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench import schema
from bench import tables as raw
from bench.errors import UserError

if TYPE_CHECKING:
    import polars as pl

FORMAT: Final = 1  # of this builder: a change rebuilds
MARK: Final = "stackbench.source"  # Parquet metadata: what the tables were built from
VERSION: Final = "stackbench.schema_version"
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Tables:
    """Frames by table name, every table present and typed; where they come from."""

    frames: Mapping[str, pl.DataFrame]
    directories: tuple[Path, ...]

    def __getitem__(self, name: str) -> pl.DataFrame:
        return self.frames[name]

    def rows(self, name: str) -> list[Row]:
        return self.frames[name].to_dicts()


# -------------------------------------------------------------------------------------------------- build
def build(directory: Path) -> Tables:
    """Reads all artifacts of a results directory and writes its tables. Raises UserError if it is none."""
    mark = signature(directory)
    draft = raw.collect(directory)
    frames = {name: frame_of(name, draft.rows[name]) for name in schema.TABLES}
    with contextlib.suppress(OSError):
        write(directory, frames, mark)
    return Tables(frames, (directory,))


def dtypes(name: str) -> dict[str, Any]:
    import polars as pl

    return {column: getattr(pl, dtype) for column, dtype in schema.TABLES[name].items()}


def frame_of(name: str, rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows as a frame of exactly the schema's columns and types; what a row lacks is null."""
    import polars as pl

    columns = {column: [row.get(column) for row in rows] for column in schema.TABLES[name]}
    return pl.DataFrame(columns, schema=dtypes(name))


def signature(directory: Path) -> str:
    """Changes whenever an artifact, a gate, the plan or the environment does. Two `stat`s an observation."""
    seen: list[tuple[str, int, int]] = []
    files = [directory / name for name in ("plan.json", "environment.json", "wall.json", "doctor.json")]
    files += sorted((directory / "gates").glob("*.json"))
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(directory / "artifacts"), key=lambda e: e.name):
            if not entry.name.startswith("."):
                files += [Path(entry.path, "run.json"), Path(entry.path, "messages.jsonl")]
    for path in files:
        try:
            status = path.stat()
        except OSError:
            continue
        seen.append((str(path.relative_to(directory)), status.st_size, status.st_mtime_ns))
    text = repr((FORMAT, schema.SCHEMA_VERSION, sorted(schema.TABLES), seen))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# -------------------------------------------------------------------------------------------------- write
def write(directory: Path, frames: Mapping[str, pl.DataFrame], mark: str) -> None:
    """tables/<table>/<session>.parquet, `runs` last: its mark says that all the others are there."""
    import polars as pl

    metadata = {VERSION: str(schema.SCHEMA_VERSION), MARK: mark}
    session_of = dict(frames["runs"].select("run_id", "session").iter_rows())
    for name in sorted(frames, key=lambda n: n == "runs"):
        frame, folder = frames[name], directory / "tables" / name
        folder.mkdir(parents=True, exist_ok=True)
        if "session" in frame.columns:
            sessions = frame["session"]
        elif "run_id" in frame.columns:
            sessions = frame["run_id"].replace_strict(session_of, default=None, return_dtype=pl.String)
        else:
            sessions = pl.Series([raw.UNKNOWN] * len(frame), dtype=pl.String)
        sessions = sessions.fill_null(raw.UNKNOWN)
        wanted = set(sessions.to_list()) or ({raw.UNKNOWN} if name == "runs" else set())
        for session in sorted(wanted):
            write_atomic(folder / f"{session}.parquet", frame.filter(sessions == session), metadata)
        for old in folder.glob("*.parquet"):
            if old.stem not in wanted:
                old.unlink()


def write_atomic(path: Path, frame: pl.DataFrame, metadata: dict[str, str]) -> None:
    """Temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            frame.write_parquet(file, metadata=metadata)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------- load
def load(directories: Sequence[Path]) -> Tables:
    """Frames of results directories, built where they are missing or older than the artifacts.

    Sessions are numbered within a directory: of several directories their names get its name in front.
    """
    import polars as pl

    unique = list({path.resolve(): path for path in directories}.values())
    loaded = [load_one(path) for path in unique]
    if len(loaded) == 1:
        return loaded[0]
    frames = {}
    for name in schema.TABLES:
        parts = []
        for label, one in zip(labels(unique), loaded, strict=True):
            frame = one[name]
            if "session" in frame.columns:
                frame = frame.with_columns(pl.concat_str(pl.lit(f"{label}/"), "session").alias("session"))
            parts.append(frame)
        frames[name] = pl.concat(parts)
    return Tables(frames, tuple(unique))


def labels(directories: Sequence[Path]) -> list[str]:
    """Short unique names: the last part of the path, numbered where two are alike."""
    names = [path.resolve().name.encode("utf-8", "replace").decode() or "root" for path in directories]
    return [f"{name}#{i + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def load_one(directory: Path) -> Tables:
    runs = sorted((directory / "tables" / "runs").glob("*.parquet"))
    if not (directory / "plan.json").exists() and runs:
        return Tables({name: scan(directory, name) for name in schema.TABLES}, (directory,))
    try:
        fresh = bool(runs) and {mark_of(path) for path in runs} == {signature(directory)}
        if fresh:
            return Tables({name: scan(directory, name) for name in schema.TABLES}, (directory,))
    except (UserError, OSError):
        pass  # tables are a cache: what is broken is built again
    return build(directory)


def mark_of(path: Path) -> str:
    import polars as pl

    try:
        return pl.read_parquet_metadata(path).get(MARK, "")
    except (OSError, pl.exceptions.PolarsError):
        return ""


def scan(directory: Path, name: str) -> pl.DataFrame:
    """All sessions of a table by the schema of today: missing columns are null, others ignored."""
    import polars as pl

    paths = sorted((directory / "tables" / name).glob("*.parquet"))
    if not paths:
        return pl.DataFrame(schema=dtypes(name))
    try:
        return pl.scan_parquet(
            paths, schema=dtypes(name), missing_columns="insert", extra_columns="ignore", glob=False
        ).collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{directory / 'tables' / name} is no table of stackbench: {cause[0][:300]}",
            next_command=f"remove {directory / 'tables'}; it is built again from the artifacts",
        ) from None
