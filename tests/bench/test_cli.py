"""The command line: every bad input is exit code 2 with a message to act on; JSON is one document."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main

from bench import __version__, cli
from bench.run import execute

COMMANDS = sorted(typer.main.get_command(cli.app).commands)  # type: ignore[attr-defined]
ROW = '[[matrix]]\nworkload = "train/gpt-tiny"\narms = ["torch-eager"]\n'


@dataclasses.dataclass
class Ended:
    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def stackbench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process, without the history of this machine."""
    monkeypatch.setenv("STACKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["stackbench"])

    def run(*words: str | Path) -> Ended:
        code = cli.guarded(lambda: cli.app([str(w) for w in words], prog_name="stackbench"))
        return Ended(code, *capfd.readouterr())

    return run


# --------------------------------------------------------------------------------------------------- help
def test_the_commands_are_those_of_the_design() -> None:
    assert {"doctor", "plan", "run", "report", "compare", "status"} <= set(COMMANDS)


@pytest.mark.parametrize("words", [[], *([command] for command in COMMANDS)], ids=str)
def test_help_fits_eighty_columns(stackbench: Command, words: list[str]) -> None:
    ended = stackbench(*words, "--help")
    assert ended.code == 0
    assert ended.err == ""
    assert ended.out.startswith("Usage: stackbench")
    assert max(map(len, ended.out.splitlines())) <= 80
    if words:
        assert "--json" in ended.out, "every command that answers takes --json"


def test_version(stackbench: Command) -> None:
    assert stackbench("--version") == Ended(0, f"stackbench {__version__}\n", "")


def test_no_command_is_help_and_an_error(stackbench: Command) -> None:
    ended = stackbench()
    assert ended.code == 2
    assert "Usage: stackbench" in ended.out + ended.err


# ---------------------------------------------------------------------------------------------- bad inputs
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "qiuck"], ["'qiuck'", "did you mean 'quick'", "valid:", "next:"]),
        (["plan", "none.toml"], ["'none.toml'", "no such file", "valid:", "next:"]),
        (["plan", "quick", "--set", "bacth=3"], ["bacth=3", "did you mean 'batch'", "valid:", "next:"]),
        (["plan", "quick", "--set", "batch"], ["--set batch", "KEY=VALUE", "valid:", "next:"]),
        (["plan", "quick", "--set", "batch=0"], ["axis batch = 0", "at least 1", "next:"]),
        (["plan", "quick", "--set", "batch=inf"], ["axis batch = inf", "next:"]),
        (["plan", "quick", "--set", "batch=[[1]]"], ["axis batch = [1]", "next:"]),
        (["plan", "quick", "--set", "precision=fp16"], ["precision = 'fp16'", "bf16-pure", "next:"]),
        (["plan", "quick", "--set", "precision=[]"], ["suite quick has no case", "next:"]),
        (["plan", "quick", "--set", "rounds=0"], ["--set rounds=0", "greater than", "next:"]),
        (["plan", "quick", "--set", "caches=warm"], ["--set caches=warm", "'seeded'", "next:"]),
        (["plan", "quick", "--set", "device=gpu9"], ["'gpu9'", "valid: ", "cpu", "next:"]),
        (["plan", "quick", "--device", "h2000"], ["--device 'h2000'", "'h200'", "valid:", "next:"]),
        (["plan", "quick", "--cases", "nope*"], ["--cases 'nope*'", "6 cases", "valid:", "next:"]),
        (["plan", "quick", "--path", "/no/such"], ["--path /no/such", "no such directory", "next:"]),
        (["plan", "quick", "--price-per-hour", "-1"], ["--price-per-hour"]),
        (["plan"], ["SUITE"]),
        (["nope"], ["nope"]),
        (["run", "quick"], ["--out"]),
        (["run", "quick", "--rounds", "0"], ["--rounds"]),
        (["run", "quick", "--time-budget", "9x"], ["--time-budget '9x'", "valid: 90s, 9m", "next:"]),
        (
            ["run", "quick", "--corpus", "/no/such"],
            ["--corpus /no/such", "does not exist", "valid:", "next:"],
        ),
        (["run", "quick", "--tokenizer", "/no/such"], ["--tokenizer /no/such", "does not exist", "valid:"]),
        (["run", "quick", "--set", "affinity=a-b"], ["affinity = 'a-b'", "valid:", "none"]),
        (["run", "quick", "--path", "/no/such"], ["--path /no/such", "next:"]),
        (["status", "/no/such"], ["/no/such is no results directory", "next:"]),
        (["report", "/no/such"], ["/no/such", "next:"]),
        (["compare", "/no/such"], ["/no/such", "next:"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_bad_input_is_named(stackbench: Command, tmp_path: Path, words: list[str], said: list[str]) -> None:
    out = ["--out", tmp_path / "out"] if words[0] == "run" and len(words) > 2 else []
    ended = stackbench(*words, *out)
    assert ended.code == 2, ended
    assert ended.out == ""
    assert all(word in ended.err for word in said), ended.err
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists(), "what was refused leaves nothing behind"


def suite_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not toml at all", ["mine.toml", "not TOML"]),
        ("", ["mine.toml", "'matrix'", "missing", "valid:"]),
        ("runds = 3\n" + ROW, ["'runds'", "did you mean 'rounds'", "valid:"]),
        (ROW.replace("eager", "eagre"), ["'torch-eagre'", "did you mean 'torch-eager'", "valid:"]),
        (ROW.replace("torch-eager", "torch-eager:fast"), ["variant 'fast'", "valid: default, tuned"]),
        (ROW + "[arms.torch-eager]\nstack = 'torch-eager'\noptions = {optimizer = 'sgd'}",
         ["optimizer = 'sgd'", "valid: fused, foreach"]),
        (ROW + "[arms.torch-eager]\nstack = 'torch-eager'\noptions = {lr = 1}", ["option 'lr'", "valid:"]),
        (ROW.replace("tiny", "tniy"), ["'train/gpt-tniy'", "did you mean 'train/gpt-tiny'", "valid:"]),
        (ROW + "axes = {bacth = 1}", ["'bacth'", "valid axes: batch"]),
        (ROW + "axes = {loss = 'cheap'}", ["loss = 'cheap'", "valid values: full, chunked"]),
    ],
)  # fmt: skip
def test_a_bad_suite_is_named(stackbench: Command, tmp_path: Path, text: str, said: list[str]) -> None:
    ended = stackbench("plan", suite_file(tmp_path, text))
    assert (ended.code, ended.out) == (2, ""), ended
    assert all(word in ended.err for word in said), ended.err


@pytest.mark.parametrize("kind", ["empty", "malformed", "unreadable kind"])
def test_a_corpus_that_is_none_is_named(stackbench: Command, tmp_path: Path, kind: str) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    if kind != "empty":
        corpus = tmp_path / ("corpus.jsonl" if kind == "malformed" else "corpus.xyz")
        corpus.write_text("{not json\n")
    ended = stackbench("run", suite_file(tmp_path, ROW), "--out", tmp_path / "out", "--corpus", corpus)
    assert ended.code == 2, ended
    assert str(corpus) in ended.err or corpus.name in ended.err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_none_is_named(stackbench: Command, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("no tokenizer")
    ended = stackbench("run", suite_file(tmp_path, ROW), "--out", tmp_path / "out", "--tokenizer", tokenizer)
    assert ended.code == 2, ended
    assert "tokenizer.json" in ended.err
    assert "valid:" in ended.err


def test_an_out_that_cannot_be_written_is_named(stackbench: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        ended = stackbench("run", suite_file(tmp_path, ROW), "--out", out)
        assert ended.code == 2, ended
        assert f"--out {out}" in ended.err
        assert "next:" in ended.err
    assert (tmp_path / "file").read_text() == "mine"


def test_foreign_files_are_never_touched(stackbench: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    ended = stackbench("run", suite_file(tmp_path, ROW), "--out", out)
    assert ended.code == 2
    assert "no results of stackbench" in ended.err
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_a_directory_that_holds_a_run_is_not_begun_again(stackbench: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "plan.json").write_text("{}")
    ended = stackbench("run", suite_file(tmp_path, ROW), "--out", out)
    assert ended.code == 2
    assert "--resume" in ended.err
    assert (out / "plan.json").read_text() == "{}"


PLANS = ["", "{", "[]", "null", "{}", '{"schema_version": 99}', '{"schema_version": 1}',
         '{"schema_version": 1, "suite": null, "device": {}, "measure": {}, "cases": []}',
         '{"schema_version": 1, "suite": {}, "device": {}, "measure": {}, "cases": [{"x": 1}]}',
         '{"schema_version": 1, "suite": {}, "device": {}, "measure": {}, "cases": [3]}',
         "\x00\x01"]  # fmt: skip


@pytest.mark.parametrize("text", PLANS)
def test_status_of_a_directory_that_is_no_result(stackbench: Command, tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    (tmp_path / "session.json").write_text('{"session": "s1"}')
    ended = stackbench("status", tmp_path)
    assert ended.code == 2, ended
    assert f"{tmp_path} is no results directory" in ended.err
    assert "next:" in ended.err


# ------------------------------------------------------------------------------------------------ answers
@pytest.mark.parametrize("device", [[], ["--device", "h200"], ["--device", "cpu"]], ids=str)
def test_plan_answers_in_one_json_document(stackbench: Command, device: list[str]) -> None:
    ended = stackbench("plan", "quick", "--json", "--price-per-hour", "3", *device)
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert ended.out.count("\n") == 1
    assert len(found["cases"]) == 6
    assert found["device"]["here"] == (device != ["--device", "h200"])
    assert found["totals"]["price_per_hour"] == 3


def test_plan_for_a_gpu_that_is_not_here(stackbench: Command) -> None:
    ended = stackbench("plan", "train", "--device", "h200")
    assert (ended.code, ended.err) == (0, "")
    assert "NVIDIA H200" in ended.out
    assert "not here" in ended.out
    assert "skipped" not in ended.out.replace("0 skipped", "")
    assert max(map(len, ended.out.splitlines())) <= 80


def test_settings_and_shorthands_reach_the_plan(
    stackbench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def plan_for(name: str, **words: Any) -> Any:
        asked.update(words, name=name)
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "plan_for", plan_for)
    corpus = tmp_path / "ü, \N{GRINNING FACE}"
    stackbench(
        "plan", "quick", "--set", "batch=1,2", "--set", "rounds=3", "--corpus", corpus, "--cases", "x*"
    )
    assert asked["settings"] == ["batch=1,2", "rounds=3", f'corpus="{corpus}"']
    assert (asked["name"], asked["cases"], asked["paths"], asked["device"]) == ("quick", "x*", [], None)
    stackbench("run", "quick", "--out", tmp_path / "out", "--rounds", "2", "--path", tmp_path)
    assert (asked["settings"], asked["paths"]) == (["rounds=2"], [tmp_path])


def test_every_case_skipped_is_exit_code_4(
    stackbench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.plan.installed", lambda name: False)
    ended = stackbench("run", "quick", "--out", tmp_path / "out")
    assert ended.code == 4
    assert "every case is skipped" in ended.err
    assert "torch not installed" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, "a/b: No space left on device"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes_of_what_nobody_can_help(
    stackbench: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(execute, "plan_for", fails)
    ended = stackbench("plan", "quick")
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("9m", 540), ("1.5h", 5400), (" 2 m ", 120)],
)
def test_durations(text: str, seconds: float) -> None:
    assert execute.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "9x", "-1m", "m", "1m30s", "inf", "nan", "1e3"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(execute.UserError, match="--time-budget"):
        execute.seconds(text)
