"""The results block of README.md: what stands between two comments is replaced, the rest stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from bench.analyze import Analysis, analyze
from bench.analyze.ratios import groups
from bench.analyze.summary import CaseSummary
from bench.errors import UserError
from bench.plan import write_atomic
from bench.report import loaders, words
from bench.report.terminal import sentences
from bench.report.words import plain
from bench.store import Tables

BEGIN: Final = "<!-- stackbench:results -->"
END: Final = "<!-- /stackbench:results -->"


def splice_readme(readme: Path, tables: Tables, analysis: Analysis | None = None) -> None:
    """Puts the results between the two markers. Raises UserError where they are not there exactly once."""
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--update-readme: {readme} cannot be read: {error}") from None
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(
            f"--update-readme: {readme} must hold {BEGIN} and, after it, {END}, each once",
            next_command=f"add the two lines to {readme.name} where the results belong",
        )
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n{block(tables, analysis or analyze(tables))}\n{END}{after}"
    if new != text:
        write_atomic(readme, new)


def cell(text: str) -> str:
    """Text of unknown origin inside a Markdown table: no pipes, no HTML, no links."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return text.replace("&", "&amp;")


def block(tables: Tables, analysis: Analysis) -> str:
    """Verdicts, one table, and a line on where it was measured."""
    lines: list[str] = []
    several = len({case.session for case in analysis.cases}) > 1
    members = groups(analysis.cases)
    for comparison in sorted(
        analysis.comparisons, key=lambda c: (c.session, c.group, -(c.speedup.estimate or 0))
    ):
        where = f"{comparison.workload} [{comparison.session}]" if several else comparison.workload
        cases = members[comparison.session, comparison.group]
        (told,) = sentences([comparison], cases, analysis)
        lines.append(f"- {cell(plain(where))}: {cell(told)}")
    if (train := analysis.of("train")).cases:
        lines += training(train, several)
    if (load := analysis.of("load")).cases:
        lines += loading(load, several)
    return "\n".join([*lines, "", environment_line(tables)]).strip()


def training(analysis: Analysis, several: bool) -> list[str]:
    lines = ["", "| workload | arm | ms a step | tokens/s | compile s, cold / seeded | status |",
              "| --- | --- | ---: | ---: | ---: | --- |"]  # fmt: skip
    for members in groups(analysis.cases).values():
        lines += [row(case, several) for case in members]
    return lines


def loading(analysis: Analysis, several: bool) -> list[str]:
    """Loaders have no compilation; what counts is the rate, the first batch, CPU and memory."""
    known = loaders.by_case(analysis)
    lines = ["", f"| workload | arm | {' | '.join(loaders.HEAD[2:])} | status |",
             f"| --- | --- | {'---: | ' * len(loaders.HEAD[2:])}--- |"]  # fmt: skip
    for case in analysis.cases:
        cells = loaders.terminal_row(case, known.get((case.session, case.case_id)))
        numbers = cells[2:] if len(cells) == len(loaders.HEAD) else [words.NONE] * len(loaders.HEAD[2:])
        status = case.status if not case.reason else f"{case.status}: {case.reason}"
        first = [cell(name_of(case, several)), cell(plain(case.arm, 80))]
        lines.append(f"| {' | '.join([*first, *numbers, cell(plain(status, 160))])} |")
    return lines


def name_of(case: CaseSummary, several: bool) -> str:
    session = f" [{case.session}]" if several else ""
    return plain(f"{case.workload}, {words.conditions(case.axes)}{session}", 160)


def row(case: CaseSummary, several: bool) -> str:
    status = case.status if not case.reason else f"{case.status}: {case.reason}"
    cells = [
        cell(name_of(case, several)), cell(plain(case.arm, 80)), words.with_span(case.step_s, 1e3),
        words.short(case.tokens_per_s.estimate),
        f"{words.brief(case.compile_cold_s)} / {words.brief(case.compile_seeded_s)}",
        cell(plain(status, 160)),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def environment_line(tables: Tables) -> str:
    """Device, threads, versions, commit, date: what the numbers belong to."""
    from bench.report.environment import versions_of

    out = []
    for session in tables.rows("sessions"):
        rows = [e for e in tables.rows("environments") if e["session"] == session["session"]]
        parts = [plain(session["device_name"] or "unknown device", 80)]
        parts += [words.plural(session["threads"], "thread")] if session["threads"] else []
        versions = {k: v for e in rows for k, v in versions_of(e["versions"]).items()}
        parts += [f"{n} {plain(versions[n], 40)}" for n in ("jax", "torch") if n in versions]
        parts += [f"Python {plain(e['python'], 20)}" for e in rows[:1] if e["python"]]
        parts += [f"commit {plain(e['git_sha'], 40)[:12]}" for e in rows[:1] if e["git_sha"]]
        parts += [f"{plain((session['started'] or '')[:10])}"] if session["started"] else []
        label = f"[{plain(session['session'], 60)}] " if len(tables["sessions"]) > 1 else ""
        out.append(f"Measured on {cell(label + ', '.join(parts))}. Intervals over rounds of fresh processes.")
    return "\n".join(out)
