"""The rules of the house (CONTRIBUTING.md, design rules 1-4, 8 and 12): who imports what, one file a stack,
sizes, everything is run, nothing leaks."""

from __future__ import annotations

import ast
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from bench import devices, registry
from bench import plan as planning
from bench import suite as suites
from bench.run.environment import leaks

ROOT = registry.ROOT
FRAMEWORKS = ("torch", "jax", "jaxlib", "triton", "tensorflow", "flax")
ANALYSIS = ("polars", "matplotlib", "scipy")
IGNORED = {".git", ".venv", ".venvs", ".cache", "__pycache__", "build", "dist", "local", "node_modules"}


@cache
def files() -> list[Path]:
    """Tracked and new files, relative to the root; in a copy without git, all but caches and environments."""
    command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        found = [Path(name) for name in names]
    except (OSError, subprocess.CalledProcessError):
        found = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        found = [p for p in found if not IGNORED & set(p.parts) and not p.parts[0].startswith(".")]
    return sorted(p for p in set(found) if (ROOT / p).is_file())


def python(*folders: str) -> list[Path]:
    return [p for p in files() if p.suffix == ".py" and p.parts[0] in folders]


def text_of(path: Path) -> str:
    """Empty for files that are no text."""
    try:
        return (ROOT / path).read_text()
    except UnicodeDecodeError:
        return ""


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def loaded_after(program: str, **variables: str) -> set[str]:
    """Top-level names of `sys.modules` after a program ran in a process of its own."""
    program += (
        "\nimport sys\nprint()\nprint(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return set(done.stdout.splitlines()[-1].split())


def test_there_is_something_to_keep() -> None:
    assert {"bench/cli.py", "stacks/train/spec.py", "tests/test_house.py"} <= {str(p) for p in files()}


# --------------------------------------------------------------------------------------- 1: who imports what
def test_the_harness_imports_no_framework() -> None:
    modules = [module_of(p) for p in python("bench") if p.parts[:2] != ("bench", "capture")]
    modules += ["stacks.train.spec"]
    assert len(modules) > 30
    loaded = loaded_after("\n".join(f"import {m}" for m in modules))
    assert not loaded & set(FRAMEWORKS)


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules that run when the file is imported: not in functions, not for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield from imported(node)
        yield from imports(node)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_captures_and_frameworks_are_imported_where_they_belong() -> None:
    """Outside bench/capture: captures in functions of the worker alone, frameworks not even in functions."""
    for path in python("bench", "stacks", "kernels"):
        if path.parts[:2] == ("bench", "capture"):
            continue
        tree = ast.parse(text_of(path))
        everywhere = [name for node in ast.walk(tree) for name in imported(node)]
        assert not [m for m in imports(tree) if is_within(m, "bench.capture")], path
        captures = [m for m in everywhere if is_within(m, "bench.capture")]
        assert not captures or path == Path("bench/run/worker.py"), path
        if path.parts[0] == "bench":
            assert not [m for m in everywhere if m.partition(".")[0] in FRAMEWORKS], path


@pytest.mark.parametrize("words", [["--help"], ["plan", "quick"], ["plan", "quick", "--json"]], ids=" ".join)
def test_planning_needs_no_analysis(words: list[str], tmp_path: Path) -> None:
    program = f"from bench import cli\nassert cli.guarded(lambda: cli.app({words!r})) == 0"
    loaded = loaded_after(program, STACKBENCH_CACHE=str(tmp_path))
    assert not loaded & {*ANALYSIS, *FRAMEWORKS}
    if words == ["--help"]:
        assert not loaded & {"numpy", "pyperf", "pydantic"}, "help is immediate"


def test_running_needs_no_analysis() -> None:
    modules = [module_of(p) for p in python("bench") if p.parts[:2] == ("bench", "run")]
    loaded = loaded_after("\n".join(f"import {m}" for m in [*modules, "bench.cli", "bench.verify"]))
    assert not loaded & {*ANALYSIS, *FRAMEWORKS}


# ------------------------------------------------------------------------------------ 2: a stack is one file
def defines_stack(path: Path) -> bool:
    return re.search(r"^STACK\b.*=", text_of(path), re.MULTILINE) is not None


def test_a_file_that_defines_a_stack_is_registered_under_its_name() -> None:
    found: dict[str, set[str]] = {}
    for path in python("stacks"):
        if len(path.parts) == 3 and defines_stack(path):
            found.setdefault(path.parts[1], set()).add(path.stem.replace("_", "-"))
    assert found["train"] >= {"jax-xla", "torch-eager", "torch-compile", "reference"}
    for domain, names in found.items():
        stacks = registry.stacks(domain)
        assert {n for n, s in stacks.items() if s.file.suffix == ".py"} == names
        assert all(stack.summary for stack in stacks.values())


MAY_NAME_A_STACK = {
    "bench/analyze/ratios.py": "the usual baseline",
    "bench/report/figures/style.py": "colours that never change",
    "bench/run/gate.py": "eager goes first: it needs no compilation to be compared with",
}


def test_no_list_names_the_stacks() -> None:
    """The harness knows stacks by their files; where one is named in code, others work without it."""
    stacks = [name for name, stack in registry.stacks("train").items() if stack.role == "stack"]
    for path in python("bench"):
        tree = ast.parse(text_of(path))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        constants = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs]
        named = {node.value for node in constants} & set(stacks)
        assert not named or str(path) in MAY_NAME_A_STACK, f"{path} names {sorted(named)}"


def test_a_new_file_is_planned_without_editing_anything(tmp_path: Path) -> None:
    folder = tmp_path / "stacks" / "train"
    folder.mkdir(parents=True)
    (folder / "my_stack.py").write_text(
        "STACK = {'options': {'a': [1]}, 'variants': {'default': {'a': 1}}}\n"
    )
    suite = suites.Suite(
        name="s", path=[tmp_path], matrix=[suites.Matrix(workload="train/gpt-tiny", arms=["my-stack"])]
    )
    case = planning.make(suite, devices.known("h200"), check_installed=False).cases[0]
    assert (case.stack, case.options, case.skip) == ("my-stack", {"a": 1}, None)
    assert case.stack_file == str(folder / "my_stack.py")


# ------------------------------------------------------------------------------------------------- 3: sizes
LINES = {"bench": 300, "stacks": 500, "kernels": 500}
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENCODING, tokenize.ENDMARKER}  # fmt: skip
GPU_KERNEL = re.compile(r"triton\.jit|pallas|cute\.kernel")  # in a decorator


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that are neither blank nor comments nor part of a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def test_lines_are_counted_without_blanks_comments_and_docstrings() -> None:
    function = 'def f():\n    """Doc."""\n    # note\n    return 1\n'
    source = f'"""Doc\nstring."""\n\nx = """a\nb"""  # text\n\n\n{function}'
    assert code_lines(source) == {4, 5, 8, 11}


def test_modules_and_functions_are_small() -> None:
    large = {}
    for path in python(*LINES):
        source = text_of(path)
        lines = code_lines(source)
        if len(lines) > LINES[path.parts[0]]:
            large[str(path)] = len(lines)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = len(lines & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
                on_gpu = any(GPU_KERNEL.search(ast.unparse(d)) for d in node.decorator_list)
                if length > 60 and not on_gpu:
                    large[f"{path}:{node.name}"] = length
    assert not large


def test_no_line_is_longer_than_110() -> None:
    long = [
        f"{path}:{i}"
        for path in python("bench", "stacks", "kernels", "tests")
        for i, line in enumerate(text_of(path).splitlines(), 1)
        if len(line) > 110 and " " in line.strip()  # as ruff: one long word cannot be wrapped
    ]
    assert not long


# ----------------------------------------------------------------------------------- 4: everything is run
@pytest.mark.parametrize("device", ["cpu", "h200"])
@pytest.mark.parametrize("name", registry.suites())
def test_every_suite_is_planned(name: str, device: str) -> None:
    suite, _ = suites.load(name)
    assert planning.make(suite, devices.known(device), check_installed=False).cases


def test_every_stack_is_run_by_a_test() -> None:
    from tests.stacks.train import test_stacks

    for name, stack in registry.stacks("train").items():
        if stack.role == "stack" and stack.file.suffix == ".py":
            assert test_stacks.points(stack), name
            assert name in test_stacks.PYTHON, name
        else:
            tests = [p for p in python("tests") if name in text_of(p) and p.name != Path(__file__).name]
            assert tests, f"no test speaks of {name}"


def test_ci_runs_the_tests() -> None:
    workflows = [
        p for p in files() if p.parts[:2] == (".github", "workflows") and p.suffix in (".yml", ".yaml")
    ]
    assert any(".ci/run" in text_of(p) for p in workflows)
    assert re.search(r"^make test$", text_of(Path(".ci/run")), re.MULTILINE)
    assert re.search(r"^test:.*\n(?:\t.*\n)*\t.*-m pytest", text_of(Path("Makefile")), re.MULTILINE)


def test_nothing_is_left_to_do() -> None:
    left = re.compile(r"\b(TODO|FIXME|XXX|NotImplementedError)\b")
    assert not [str(p) for p in python("bench", "stacks", "kernels") if left.search(text_of(p))]


# -------------------------------------------------------------------------------------- 8: nothing leaks
MACHINE_PATH = re.compile(r"(?<![\w.~>-])/(?:home|root|Users|work|mnt|private)/[\w.-]+")
# Links in code, each by its purpose. Nothing is downloaded but from the package index that pip knows.
LINKS = {
    "http://www.w3.org/": "XML namespaces of SVG",
    "https://example.org/": "made up, for tests of scrubbing",
    "http://127.0.0.1": "servers that tests start",
}


def test_results_and_fixtures_name_no_machine() -> None:
    """Paths, users and hosts. Programs among the fixtures may speak of paths, as the tests do."""
    for path in files():
        artifact = path.parts[0] == "results" or path.parts[:2] == ("tests", "fixtures")
        if artifact and path.suffix not in (".py", ".c"):
            assert leaks(text_of(path), ROOT) == [], path


def test_no_file_holds_a_path_of_a_machine() -> None:
    found = {str(p): MACHINE_PATH.findall(text_of(p)) for p in files() if p.parts[0] != "tests"}
    assert {p: paths for p, paths in found.items() if paths} == {}


def test_no_test_holds_the_place_of_this_checkout() -> None:
    here = str(ROOT)
    if here.count("/") < 2:
        pytest.skip("the checkout lies at the top of the file system")
    assert not [str(p) for p in python("tests") if here in text_of(p)]


def test_links_are_documentation() -> None:
    for path in files():
        named = path.suffix == ".md" or path.name in ("LICENSE", "Cargo.lock")
        if named or path == Path("tests/test_house.py"):
            continue
        found = re.findall(r"https?://[^\s\"'<>)]+", text_of(path))
        assert [link for link in found if not link.startswith(tuple(LINKS))] == [], path
        assert path.parts[0] != "locks" or not found, path


# ---------------------------------------------------------------------- 12: no command changes a tracked file
def digests(root: Path) -> dict[str, str]:
    return {
        str(p): hashlib.sha256((root / p).read_bytes()).hexdigest() for p in files() if (root / p).is_file()
    }


def test_commands_change_no_tracked_file(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for path in files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, copy / path)
    before = digests(copy)
    assert len(before) == len(files())
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    for words in (["--help"], ["plan", "quick"], ["doctor"], ["status", "results"], ["report", "results"]):
        command = [sys.executable, "-m", "bench.cli", *words]
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        assert done.returncode in (0, 1, 2), done.stderr
    assert digests(copy) == before
    new = {str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file()} - set(before)
    assert all(name.startswith((".cache/", "results/")) for name in new), new
