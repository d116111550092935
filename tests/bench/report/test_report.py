"""`report` and `compare` of a results directory: exit codes, JSON, the terminal at any width, the README."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bench import store
from bench.analyze import analyze
from bench.errors import UserError
from bench.report import readme, run_compare, run_report, terminal, words
from bench.stats import Interval
from tests.fixtures.results import Results, make

EVIL = (
    "<img src=x onerror=alert(1)>\"'&"
    "</script> $\\frac{1}{2}$ \x1b[31m [bold]x[/bold] | ` \u202eevil\ud800 中 🚀 "
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("report") / "good")


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(
        tmp_path_factory.mktemp("report") / "bad",
        rounds=1,
        gates={
            "torch-compile@llama-tiny": ("not comparable", "parity: gradient of wte.weight: error 1e-5"),
            "jax-xla@llama-tiny": ("skipped", "unsupported: tf32"),
        },
        fail=lambda w, a, i: "timeout: no end after 900 s" if (w, a) == ("train/gpt-tiny", "jax-xla") else "",
    )


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = Results(
        rename=lambda text: EVIL + text, gates={"torch-compile@llama-tiny": ("failed", EVIL * 40)}
    )
    return results.write(tmp_path_factory.mktemp("report") / "hostile")


def shown(out: Path, width: int, *, compare: bool = False) -> str:
    tables = store.load([out])
    analysis, file = analyze(tables, price_per_hour=3.0), io.StringIO()
    console = Console(file=file, width=width, highlight=False, markup=False, emoji=False)
    if compare:
        terminal.show_comparison(console, analysis, price=True)
    else:
        terminal.show_report(console, tables, analysis, page="results/report.html", price=True)
    return file.getvalue()


# -------------------------------------------------------------------------------------------------- terminal
@pytest.mark.parametrize("which", ["good", "bad", "hostile"])
@pytest.mark.parametrize("width", [30, 40, 72, 80, 140])
def test_no_line_is_wider_than_the_terminal(which: str, width: int, request: pytest.FixtureRequest) -> None:
    from rich.cells import cell_len

    for text in (
        shown(request.getfixturevalue(which), width),
        shown(request.getfixturevalue(which), width, compare=True),
    ):
        lines = text.splitlines()
        assert len(lines) > 20
        too_wide = [line for line in lines if cell_len(line) > max(width, 1)]
        assert not too_wide, too_wide[:3]


def test_the_verdicts_are_sentences(good: Path) -> None:
    text = shown(good, 80)
    sentence = r"^torch-compile is 1\.3\d× as fast as torch-eager \(1\.3\d–1\.3\d, 6 rounds, 96\.9 %\)$"
    found = re.search(sentence, text, re.M)
    assert found, text
    assert "One autotuning draw" in text and "harness" in text and "alike in all" in text


def test_a_case_without_a_time_shows_its_reason(bad: Path) -> None:
    for width in (80, 40):
        text = " ".join(shown(bad, width).split())
        assert "timeout: no end after 900 s" in text and "unsupported: tf32" in text
        assert "not comparable" in text and "no interval: not a finding" in text


def test_no_control_character_reaches_the_terminal(hostile: Path) -> None:
    text = shown(hostile, 80)
    assert "\x1b" not in text and "\u202e" not in text and "[bold]x[/bold]" in text


def test_plain() -> None:
    assert words.plain("a\x00b\x1b[2J\n\u202ec\ud800") == "a b [2J c?"
    assert words.plain("x" * 20, 10) == "x" * 9 + "…"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(None, 4, "–"), (0.0, 4, "0"), (11.7812, 4, "11.78"), (43460.5, 4, "43,460"), (0.99999, 2, "1.0"),
     (9.9999, 3, "10.0"), (-0.5, 2, "−0.50"), (1.23e-7, 3, "1.23e−07"), (float("inf"), 3, "∞"),
     (float("nan"), 3, "–"), (1e300, 2, f"{1e300:,.0f}")],
)  # fmt: skip
def test_numbers(value: float | None, digits: int, text: str) -> None:
    assert words.number(value, digits) == text


def test_short_and_spans() -> None:
    assert [words.short(v) for v in (43460, 1.21e6, 512, None)] == ["43.5 k", "1.21 M", "512", "–"]
    interval = Interval(estimate=0.01178, low=0.01161, high=0.012124)
    assert words.with_span(interval, 1e3) == "11.78 (11.61–12.12)"
    assert words.with_span(Interval(estimate=0.01178), 1e3) == "11.78"
    assert words.brief(-0.001) == "0.00" and words.brief(21.44) == "21.4"


# ------------------------------------------------------------------------------------------ the entry points
def test_report_prints_and_writes_the_page(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_report([good], update_readme=False, price_per_hour=None, as_json=False) == 0
    assert "report.html" in capsys.readouterr().out
    assert (good / "report.html").read_text().startswith("<!doctype html>")
    assert not list(good.glob(".report*"))


@pytest.mark.parametrize("command", ["report", "compare"])
def test_json_is_one_document_and_nothing_else(
    bad: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "report":
        code = run_report([bad], update_readme=False, price_per_hour=2.0, as_json=True)
    else:
        code = run_compare(bad, baseline="jax-xla", price_per_hour=None, as_json=True)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert code == document["exit_code"] == 1 and document["command"] == command
    assert set(document) == {
        "schema_version", "command", "directories", "page", "exit_code", "sessions", "cases", "comparisons",
        "break_even", "differences", "parity", "failures", "notes", "loading", "claims",
    }  # fmt: skip
    case = document["cases"][0]
    assert {"case_id", "status", "reason", "step_s", "tokens_per_s", "mfu", "run_ids"} <= set(case)
    assert {"estimate", "low", "high", "confidence", "reason"} <= set(case["step_s"])


def test_compare_in_words(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_compare(good, baseline="torch-compile", price_per_hour=None, as_json=False) == 0
    out = capsys.readouterr().out
    assert "torch-eager takes 1.3" in " ".join(out.split())
    with pytest.raises(UserError, match="nonsense"):
        run_compare(good, baseline="nonsense", price_per_hour=None, as_json=False)


def test_nothing_timed_is_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = make(tmp_path / "r", fail=lambda w, a, i: "crash: exit code 1")
    assert run_report([out], update_readme=False, price_per_hour=None, as_json=False) == 4
    assert "Nothing was timed" in capsys.readouterr().out


def test_hostile_and_broken_directories_never_raise(hostile: Path, tmp_path: Path) -> None:
    assert run_report([hostile], update_readme=False, price_per_hour=None, as_json=True) == 1
    with pytest.raises(UserError):
        run_report([tmp_path], update_readme=False, price_per_hour=None, as_json=True)


def test_a_page_that_cannot_be_written_is_said(
    good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.report import html

    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(html, "write", refuse)
    assert run_report([good], update_readme=False, price_per_hour=None, as_json=True) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["page"] is None and "cannot be written" in captured.err


def test_importing_the_report_is_cheap() -> None:
    import subprocess

    code = (
        "import sys, bench.report, bench.stats, bench.store, bench.analyze, bench.report.terminal\n"
        "print([m for m in ('polars', 'matplotlib', 'scipy', 'numpy', 'torch', 'jax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------- README.md
def test_the_readme_block_is_replaced_and_nothing_else(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"# before\n\n{readme.BEGIN}\nstale\n{readme.END}\n\nafter\n")
    readme.splice_readme(path, store.load([good]))
    text = path.read_text()
    assert text.startswith(f"# before\n\n{readme.BEGIN}\n- train/gpt-tiny: jax-xla is 1.3")
    assert text.endswith(f"{readme.END}\n\nafter\n") and "stale" not in text
    assert "| train/gpt-tiny, batch 8 × 64 tokens, fp32 | jax-xla | 11.78 (11.61–12.12) |" in text
    assert "Synthetic CPU 9000" in text and "torch 2.13.0" in text
    again = path.read_text()
    readme.splice_readme(path, store.load([good]))
    assert path.read_text() == again


@pytest.mark.parametrize(
    "text", ["", readme.BEGIN, f"{readme.END}{readme.BEGIN}", (readme.BEGIN + readme.END) * 2]
)
def test_a_readme_without_the_markers(good: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(UserError, match="must hold"):
        readme.splice_readme(path, store.load([good]))
    assert path.read_text() == text


def test_the_readme_escapes(hostile: Path, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"{readme.BEGIN}\n{readme.END}\n")
    readme.splice_readme(path, store.load([hostile]))
    text = path.read_text()
    assert "<img" not in text.replace("\\<img", "") and text.count(readme.END) == 1
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7}
