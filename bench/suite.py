"""A suite: what is compared and how precisely, as frozen types parsed from TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bench import registry
from bench.errors import UserError, did_you_mean

STRICT = ConfigDict(extra="forbid", frozen=True)
EXAMPLE = "see bench/suites/quick.toml"
SETTING = "stackbench run quick --out DIR --set precision=bf16"


class ArmSpec(BaseModel):
    """An arm: stack + options + environment. Shorthand in a matrix: `stack` or `stack:variant`."""

    model_config = STRICT
    stack: str
    variant: str = "default"
    options: dict[str, Any] = Field(default_factory=dict)
    interpreter: Path | None = None
    variables: dict[str, str] = Field(default_factory=dict)


class Matrix(BaseModel):
    """Workloads x arms x axes: every combination is a case. A list in `axes` is an axis of the matrix."""

    model_config = STRICT
    workload: str | list[str]
    arms: list[str]
    axes: dict[str, Any] = Field(default_factory=dict)


class Suite(BaseModel):
    """All keys of a suite file. Times default by device: see `Measure`."""

    model_config = STRICT
    name: str
    description: str = ""
    seed: int = 0
    rounds: int = Field(default=6, ge=1)
    values: int = Field(default=5, ge=1)
    value_s: float | None = Field(default=None, gt=0)
    warmup_s: float | None = Field(default=None, ge=0)
    warmup_max_s: float | None = Field(default=None, gt=0)
    warmup_trend: float = Field(default=0.01, gt=0)
    caches: Literal["cold", "seeded", "fresh"] = "seeded"
    cache_draws: int = Field(default=1, ge=1)
    affinity: str = "device"
    device: str = "auto"
    timeout_s: float = Field(default=900, gt=0)
    parity_steps: int = Field(default=20, ge=1)
    reference_gflop: float = Field(default=250, ge=0)
    price_per_hour: float | None = Field(default=None, ge=0)
    calibrate: bool = False  # loaders: each arm at the best of its stack's grid, found in runs apart
    details: list[Literal["breakdown", "gil"]] = Field(
        default=["breakdown", "gil"]
    )  # loaders: observed apart
    corpus: Path | None = None
    tokenizer: Path | None = None
    path: list[Path] = Field(default_factory=list)
    arms: dict[str, ArmSpec] = Field(default_factory=dict)
    matrix: list[Matrix] = Field(min_length=1)

    @field_validator("affinity", mode="before")
    @classmethod
    def _cpus(cls, value: Any) -> Any:
        """`--set affinity=0,2` arrives as numbers."""
        parts = value if isinstance(value, list) else [value]
        numbers = all(isinstance(part, int) and not isinstance(part, bool) for part in parts)
        return ",".join(map(str, parts)) if numbers and parts else value

    def measure(self, kind: str) -> dict[str, float]:
        """Seconds of a value and of warm-up on a device kind: method.md 2's floors unless the suite says."""
        value, warm = (0.2, 1.0) if kind == "cpu" else (1.0, 10.0)
        warm = self.warmup_s if self.warmup_s is not None else warm
        longest = self.warmup_max_s or max(10 * warm, 10.0)
        return {"value_s": self.value_s or value, "warmup_s": warm, "warmup_max_s": longest}


def load(
    name: str, *, settings: Iterable[str] = (), paths: Iterable[Path] = ()
) -> tuple[Suite, dict[str, Any]]:
    """The suite of a name or file, and the axes set by `--set`, which apply to every row of its matrix.

    Raises UserError naming the key, the file, what is valid and what to type.
    """
    paths = list(paths)
    file = Path(name)
    if not (file.suffix == ".toml" and file.is_file()):
        known = registry.suites(paths)
        if name not in known:
            raise UserError(
                f"unknown suite {name!r}{did_you_mean(name, known)}: no such name and no such file",
                valid=sorted(known),
                next_command="stackbench plan quick",
            )
        file = known[name]
    try:
        table = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"suite {file.name} is not TOML: {error}", next_command=EXAMPLE) from None
    except OSError as error:
        raise UserError(f"suite {file}: {error.strerror}", next_command=EXAMPLE) from None
    settings = list(settings)
    axes = apply_settings(table, settings)
    table.setdefault("name", file.stem)
    own = table.get("path", [])
    table["path"] = [*(own if isinstance(own, list) else [own]), *(str(path.resolve()) for path in paths)]
    try:
        return Suite.model_validate(table), axes
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        given = next((s for s in settings if s.partition("=")[0] == key), None)
        raise explain(error, f"--set {given}" if given else file.name) from None


def apply_settings(table: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """`key=value`: an axis (returned), or a key of the suite (put into `table`). Values are TOML or text."""
    from bench.domains import AXES

    axes: dict[str, Any] = {}
    own = set(Suite.model_fields) - {"name", "matrix", "arms"}
    for setting in settings:
        key, equals, text = setting.partition("=")
        keys = [*AXES, *sorted(own - set(AXES))]
        if not equals:
            raise UserError(f"--set {setting}: no value: write KEY=VALUE", valid=keys, next_command=SETTING)
        if key not in keys:
            raise UserError(
                f"--set {setting}: {key!r} is no axis and no key of a suite{did_you_mean(key, keys)}",
                valid=keys,
                next_command=SETTING,
            )
        value = parse_value(text)
        (axes if is_axis(key, value, AXES, own) else table)[key] = value
    return axes


def is_axis(key: str, value: Any, axes: Mapping[str, Any], own: set[str]) -> bool:
    """Whether a setting is an axis. One name is both, `tokenizer`: of the axis there are few values, the key
    is the path of a file."""
    if key in axes and key in own:
        values = value if isinstance(value, list) else [value]
        return all(v in axes[key].values for v in values)
    return key in axes


def parse_value(text: str) -> Any:
    """A TOML value; a bare comma list; otherwise the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return [parse_value(part) for part in text.split(",")] if "," in text else text


def explain(error: ValidationError, place: str) -> UserError:
    """pydantic's first complaint in our form: value, place, valid options."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    owner = owner_of(first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        valid = sorted(owner.model_fields)
        message = f"{place}: unknown key {where!r}{did_you_mean(key, valid)}"
        return UserError(message, valid=valid, next_command=EXAMPLE)
    if first["type"] == "missing":
        valid = sorted(owner.model_fields)
        return UserError(f"{place}: key {where!r} is missing", valid=valid, next_command=EXAMPLE)
    shown = repr(first["input"])[:80]
    return UserError(f"{place}: {where} = {shown}: {first['msg']}", next_command=EXAMPLE)


def owner_of(location: Sequence[int | str]) -> type[BaseModel]:
    if location and location[0] == "matrix" and len(location) > 2:
        return Matrix
    if location and location[0] == "arms" and len(location) > 2:
        return ArmSpec
    return Suite


def arm(suite: Suite, name: str, stacks: Mapping[str, registry.Stack]) -> ArmSpec:
    """The arm of a name: the suite's own, else `stack` or `stack:variant`."""
    if name in suite.arms:
        spec = suite.arms[name]
    else:
        stack, _, variant = name.partition(":")
        spec = ArmSpec(stack=stack, variant=variant or "default")
    known = sorted(s.name for s in stacks.values() if s.role == "stack")
    if spec.stack not in stacks:
        raise UserError(
            f"suite {suite.name}: unknown stack {spec.stack!r} in arm {name!r}"
            f"{did_you_mean(spec.stack, known)}",
            valid=known,
            next_command="stackbench doctor",
        )
    stack_ = stacks[spec.stack]
    if spec.variant not in stack_.variants:
        raise UserError(
            f"suite {suite.name}: stack {spec.stack} has no variant {spec.variant!r} (arm {name!r})",
            valid=sorted(stack_.variants),
            next_command="stackbench plan quick",
        )
    registry.check_options(stack_, spec.options, f"suite {suite.name}: arm {name!r}")
    return spec
