"""Text without the people and machines behind it.

Logs, pyperf metadata, HLO and traces carry user names, host names and absolute paths. `scrub` rewrites them
when an artifact is written: the repository's root becomes `<repo>`, the home directory `<home>`, temporary
directories `<tmp>`, the host name `<host>`, the user name `<user>`; any other absolute path keeps what
follows `site-packages` (`<site>/torch/nn/x.py`) or else only its last part (`<path>/x.py`). The system's own
directories (/proc, /usr/lib …) say nothing of anyone and stay, and so do URLs and scopes (`jit(f)/add`).
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import pwd
import re
import socket
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

TOKENS: Final = ("<repo>", "<home>", "<tmp>", "<site>", "<path>", "<host>", "<user>")
# Accounts and hosts of images and CI that name nobody, and words that every log is full of: rewriting them
# would hide nothing and spoil text ("root" above all).
_ACCOUNTS: Final = ("root", "nobody", "user", "users", "ubuntu", "debian", "runner", "vscode", "jovyan")
_HOSTS: Final = ("localhost", "localdomain", "vm", "host", "node", "docker", "container", "home", "tmp")
_WORDS: Final = ("python", "jax", "torch", "cuda", "gpu", "cpu", "bench", "test", "repo", "site", "path")
ANONYMOUS: Final = frozenset((*_ACCOUNTS, *_HOSTS, *_WORDS))
_SYSTEM: Final = ("proc", "sys", "dev", "usr", "lib", "lib64", "bin", "sbin", "etc", "run")
# What may stand before the slash that begins an absolute path: no part of a relative path, a URL or a scope.
# An escaped line end (`\n/data`) ends in a letter, and so does a compiler's `-I/data`.
_ESCAPED: Final = r"(?:(?<=\\[nrt]/)|(?<=-[IL]/)|(?<=file:///))"
_BEFORE: Final = rf"(?:{_ESCAPED}|(?<![\w.\-/~)\]}}%+@#]/){''.join(rf'(?<!{token}/)' for token in TOKENS)})"
_PART: Final = r"[^\s/\\\"'`,;:()\[\]{}<>|&*?=$!]+"


@dataclass(frozen=True, slots=True)
class Identity:
    """What must not be told: directories by their token, and names."""

    directories: tuple[tuple[str, str], ...]  # (path, token)
    users: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()


def _spellings(path: Path) -> Iterable[str]:
    return dict.fromkeys(str(p).rstrip("/") for p in (path, path.resolve()))


def _user_names() -> list[str]:
    names = [os.environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER")]
    with contextlib.suppress(Exception):
        names.append(getpass.getuser())
    with contextlib.suppress(KeyError):
        names.append(pwd.getpwuid(os.getuid()).pw_name)
    return names


def identity(repository: Path) -> Identity:
    """The identity of this process: its user, host, home, temporary directories and repository."""
    homes = [Path(os.environ["HOME"])] if os.environ.get("HOME") else []
    with contextlib.suppress(KeyError):
        homes.append(Path(pwd.getpwuid(os.getuid()).pw_dir))
    temporary = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    directories = {
        spelling: token
        for token, paths in (("<tmp>", temporary), ("<home>", homes), ("<repo>", [repository]))
        for path in paths
        for spelling in _spellings(path)
        if spelling.count("/") >= 1 and len(spelling) > 1
    }
    host = socket.gethostname()
    return Identity(tuple(directories.items()), tuple(_user_names()), (host, host.partition(".")[0]))


def _telling(names: Iterable[str]) -> list[str]:
    """Names that could tell somebody: longest first, so that a name within a name is not cut out of it."""
    kept = {name for name in names if len(name) > 1 and name.lower() not in ANONYMOUS and not name.isdigit()}
    return sorted(kept, key=lambda name: (-len(name), name))


@functools.lru_cache(maxsize=16)
def _patterns(who: Identity) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
    known = sorted(who.directories, key=lambda pair: -len(pair[0]))
    literal = "".join(rf"(?P<d{i}>{re.escape(path[1:])})(?![\w\-.])|" for i, (path, _) in enumerate(known))
    other = rf"(?!(?:{'|'.join(_SYSTEM)})/)(?P<other>{_PART}(?:/+{_PART})+)"
    paths = re.compile(rf"/{_BEFORE}(?:{literal}{other})")
    users, hosts = _telling(who.users), _telling(who.hosts)
    alternatives = [rf"(?P<host>(?i:{'|'.join(map(re.escape, hosts))}))"] if hosts else []
    if users:
        alternatives.append(rf"(?P<user>{'|'.join(map(re.escape, users))})")
    if not alternatives:
        return paths, None
    start = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))"
    tokens = "|".join(TOKENS)
    return paths, re.compile(rf"{tokens}|{start}(?:{'|'.join(alternatives)})(?![A-Za-z0-9])")


def scrub(text: str, repository: Path, who: Identity | None = None) -> str:
    """`text` with paths, user and host names rewritten; scrubbing twice changes nothing more."""
    who = who or identity(repository)
    paths, names = _patterns(who)
    tokens = [token for _, token in sorted(who.directories, key=lambda pair: -len(pair[0]))]

    def path(match: re.Match[str]) -> str:
        other = match["other"]
        if other is None:
            group = match.lastgroup or ""
            return tokens[int(group[1:])]
        for marker in ("/site-packages/", "/dist-packages/"):
            if marker in other:
                return f"<site>/{other.rpartition(marker)[2]}"
        return f"<path>/{other.rpartition('/')[2]}"

    def name(match: re.Match[str]) -> str:
        return f"<{match.lastgroup}>" if match.lastgroup else match[0]

    text = paths.sub(path, text)
    return names.sub(name, text) if names else text


def scrub_values(value: Any, repository: Path, who: Identity | None = None) -> Any:
    """The same for the strings of JSON-like data; keys are ours and stay."""
    who = who or identity(repository)
    if isinstance(value, str):
        return scrub(value, repository, who)
    if isinstance(value, Mapping):
        return {key: scrub_values(item, repository, who) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub_values(item, repository, who) for item in value]
    return value


def leaks(text: str, repository: Path, who: Identity | None = None) -> list[str]:
    """What `scrub` would still rewrite in `text`: empty for a clean artifact."""
    who = who or identity(repository)
    paths, names = _patterns(who)
    found = [match[0] for match in paths.finditer(text)]
    if names:
        found += [match[0] for match in names.finditer(text) if match.lastgroup]
    return found
