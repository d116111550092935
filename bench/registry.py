"""What can be compared: every file of `stacks/<domain>/` that defines `STACK`, here and under `--path`.

The literal is read from the source, never imported, so that no framework reaches the harness. A stack in
another language is a `.toml` with the same keys and how to build, run and version it.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.errors import UserError, did_you_mean

ROOT = Path(__file__).resolve().parent.parent  # the repository: bench/, stacks/, results/ …


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """One competitor. `variants` are named sets of `options`; `variables` may hold {cache} and {platform}."""

    name: str
    domain: str
    file: Path
    role: str = "stack"  # stack | reference
    framework: str = ""
    summary: str = ""
    requires: tuple[str, ...] = ()  # distributions that must be installed
    requires_cuda: tuple[str, ...] = ()  # and these on a CUDA device
    needs: tuple[str, ...] = ()  # tools of the machine: "c++ compiler"
    install: str = ""  # what to type where `requires` is not met
    devices: tuple[str, ...] = ("cpu", "cuda")
    options: Mapping[str, list[Any]] = dataclasses.field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: {"default": {}})
    reordered: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # options: another order of sums
    axes: Mapping[str, Mapping[str, list[Any]]] = dataclasses.field(default_factory=dict)
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    build: tuple[str, ...] = ()  # other languages: {dir} and {build} are filled in
    argv: tuple[str, ...] = ()
    version: tuple[str, ...] = ()
    environment: str = ""  # `.venvs/<environment>`, made by `make setup-<environment>`; "": the timed one


TOOLS = {  # what `needs` may name: the variable and the programs by which it is found
    "c++ compiler": ("CXX", "g++", "clang++", "c++"),
    "c compiler": ("CC", "cc", "gcc", "clang"),
}
LISTS = ("requires", "requires_cuda", "needs", "devices", "build", "argv", "version")
DICTS = ("options", "variants", "axes", "variables")
FIELDS = {f.name for f in dataclasses.fields(Stack)} - {"name", "domain", "file"}


def _literal(path: Path) -> dict[str, Any] | None:
    """The dictionary assigned to `STACK` at the top of a Python file; None where there is none."""
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path.name} is not Python that can be read: {error}") from None
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        if any(isinstance(t, ast.Name) and t.id == "STACK" for t in targets):
            try:
                value = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            except ValueError:
                message = f"{path.name}: STACK must be a literal: it is read without running the file"
                raise UserError(message) from None
            if not isinstance(value, dict):
                raise UserError(f"{path.name}: STACK must be a dictionary, not {type(value).__name__}")
            return value
    return None


def _load(path: Path, domain: str) -> Stack | None:
    if path.suffix == ".toml":
        try:
            table = tomllib.loads(path.read_text())
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path.name} is not TOML: {error}") from None
        if "argv" not in table:
            return None
        row: dict[str, Any] | None = table
    else:
        row = _literal(path)
    if row is None:
        return None
    unknown = sorted(set(row) - FIELDS)
    if unknown:
        message = f"{path.name}: unknown key {unknown[0]!r} in STACK{did_you_mean(unknown[0], FIELDS)}"
        raise UserError(message, valid=sorted(FIELDS))
    check_types(path.name, row)
    row.update({key: tuple(row[key]) for key in LISTS if key in row})
    stack = Stack(name=path.stem.replace("_", "-"), domain=domain, file=path.resolve(), **row)
    check_options(stack, stack.reordered, f"{path.name}: reordered")
    for variant, options in stack.variants.items():
        check_options(stack, options, f"{path.name}: variant {variant!r}")
    return stack


def check_types(place: str, row: Mapping[str, Any]) -> None:
    """Raises UserError for a list that is none, a table that is none, or a tool nobody can find."""
    for key, value in row.items():
        if key in LISTS and not (isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)):
            raise UserError(f"{place}: {key} = {value!r}: must be a list of strings")
        if key in DICTS and not isinstance(value, dict):
            raise UserError(f"{place}: {key} = {value!r}: must be a table")
        if key in ("role", "framework", "summary", "install", "environment") and not isinstance(value, str):
            raise UserError(f"{place}: {key} = {value!r}: must be a string")
    if not re.fullmatch(r"[a-z0-9-]*", row.get("environment", "")):
        raise UserError(f"{place}: environment = {row['environment']!r}: must be a name like 'peers'")
    unknown = sorted(set(row.get("needs", [])) - set(TOOLS))
    if unknown:
        raise UserError(f"{place}: unknown tool {unknown[0]!r} in needs", valid=sorted(TOOLS))


def check_options(stack: Stack, options: Mapping[str, Any], place: str) -> None:
    """Raises UserError naming the option, its value and what is valid."""
    for key, value in options.items():
        if key not in stack.options:
            message = f"{place}: stack {stack.name} has no option {key!r}{did_you_mean(key, stack.options)}"
            raise UserError(message, valid=sorted(stack.options) or ["(none)"])
        if value not in stack.options[key]:
            message = f"{place}: option {key} = {value!r} of stack {stack.name}"
            raise UserError(message, valid=[str(v) for v in stack.options[key]])


def environment(name: str) -> Path:
    """The directory of an environment of its own, beside the timed `.venv`."""
    return ROOT / ".venvs" / name


def roots(paths: Iterable[Path] = ()) -> list[Path]:
    """The repository first, then every `--path` directory, which must exist."""
    extra = []
    for path in paths:
        if not path.is_dir():
            raise UserError(
                f"--path {path}: no such directory",
                next_command="make it with the layout stacks/train/NAME.py, or leave --path out",
            )
        extra.append(path.resolve())
    return [ROOT, *extra]


def stacks(domain: str, paths: Iterable[Path] = ()) -> dict[str, Stack]:
    """Every stack of a domain by name, the repository's first; a second file of one name is an error."""
    found: dict[str, Stack] = {}
    for root in roots(paths):
        folder = root / "stacks" / domain
        for path in sorted(folder.glob("*.py")) + sorted(folder.glob("*.toml")):
            if path.stem in ("__init__", "spec", "models"):
                continue
            stack = _load(path, domain)
            if stack is None:
                continue
            if stack.name in found:
                first = found[stack.name].file
                raise UserError(f"stack {stack.name!r} is defined twice: in {first} and in {path}")
            found[stack.name] = stack
    return found


def suites(paths: Iterable[Path] = ()) -> dict[str, Path]:
    """Suite files by name: `bench/suites/` here, `suites/` or `bench/suites/` under every `--path`."""
    found: dict[str, Path] = {}
    for root in roots(paths):
        for folder in (root / "bench" / "suites", root / "suites"):
            found.update({p.stem: p for p in sorted(folder.glob("*.toml"))})
    return found


def train_models(paths: Iterable[Path] = ()) -> dict[str, Any]:
    """Models by name: `stacks/train/models.toml` of the repository and of every `--path`."""
    from stacks.train import spec

    models: dict[str, Any] = {}
    for root in roots(paths):
        path = root / "stacks" / "train" / "models.toml"
        if path.is_file():
            try:
                models.update(spec.load_models(path))
            except (ValueError, tomllib.TOMLDecodeError) as error:
                raise UserError(f"{path}: {error}") from None
    return models
