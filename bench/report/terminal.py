"""The summary that `stackbench report` and `compare` print: readable at 80 columns, and as cards at 40.

Every string that came from a file is `plain`: no markup is interpreted and no control character is passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.analyze import Analysis, loading
from bench.analyze.break_even import BreakEven
from bench.analyze.differences import NOT_REPORTED, Differences
from bench.analyze.parity import Distance
from bench.analyze.ratios import Comparison, groups
from bench.analyze.summary import CaseSummary
from bench.report import words
from bench.report.words import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from bench.store import Tables

NARROW = 72  # below it, cards instead of columns
LONGEST_LIST = 40
MANY = 12  # cases: beyond it one measure a case
MOST_GROUPS = 3  # whose differences are printed
COLOURS = {"ok": "green", "failed": "red", "not comparable": "red", "skipped": "yellow", "unreadable": "red"}


class Printer:
    """Lines with styles and hanging indents on a rich console of any width."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.width = max(20, console.width)
        self.narrow = console.width < NARROW

    def line(
        self, text: str, style: str = "", indent: int = 0, hang: int | None = None, prefix: Text | None = None
    ) -> None:
        """Wrapped; later lines are indented by `hang`. A prefix stands before the text on the first line."""
        from rich.text import Text

        later = indent if hang is None else hang
        room = max(10, self.width - max(indent, later))
        body = Text(text, style=style)
        pieces = body.wrap(self.console, room) if text else [body]
        for i, piece in enumerate(pieces):
            piece.rstrip()
            lead = Text(" " * (later if i else indent))
            if i == 0 and prefix is not None:
                lead.append_text(prefix)
                lead.pad_right(max(0, later - lead.cell_len))
            self.console.print(lead.append_text(piece), no_wrap=True, overflow="ignore", crop=False)

    def heading(self, text: str) -> None:
        self.console.print()
        self.line(text, style="bold")

    def pair(self, label: str, text: str, *, width: int, indent: int = 2) -> None:
        """A label and its text, which hangs under itself; on a narrow screen below the label."""
        from rich.text import Text

        if self.narrow:
            self.line(label, style="bold", indent=indent)
            self.line(text, indent=indent + 2)
        else:
            shown = label if len(label) < width else f"{label[: width - 3]}…  "
            self.line(text, indent=indent, hang=indent + width, prefix=Text(shown))


def show_report(
    console: Console, tables: Tables, analysis: Analysis, *, page: str = "", price: bool = False
) -> None:
    """The whole summary; `page` is the path of the HTML report."""
    out = Printer(console)
    header(out, tables)
    by_group = comparisons_of(analysis)
    for key, cases in groups(analysis.cases).items():
        out.heading(title(cases[0], analysis))
        for sentence in sentences(by_group.get(key, []), cases, analysis):
            out.line(sentence, hang=2)
        if by_group.get(key):
            out.console.print()
        results(out, cases, analysis, price=price)
    pay_off(out, analysis)
    found = merged(analysis)
    for names, group in found[:MOST_GROUPS]:
        differences(out, names, group)
    if len(found) > MOST_GROUPS:
        out.line(f"… and {len(found) - MOST_GROUPS} more groups of cases; the page has them all", indent=2)
    parity(out, analysis)
    failures(out, analysis.failures)
    if analysis.notes:
        out.heading("Notes")
        for note in analysis.notes:
            out.line(f"· {plain(note)}", hang=2)
    if page:
        out.console.print()
        out.line(f"page: {page}")


def show_comparison(console: Console, analysis: Analysis, *, price: bool = False) -> None:
    """`stackbench compare`: the verdicts, the times they come from, and what is missing."""
    out = Printer(console)
    by_group = comparisons_of(analysis)
    for key, cases in groups(analysis.cases).items():
        out.heading(title(cases[0], analysis))
        for sentence in sentences(by_group.get(key, []), cases, analysis):
            out.line(sentence, hang=2)
        results(out, cases, analysis, price=price)
    pay_off(out, analysis)
    failures(out, analysis.failures)
    if analysis.notes:
        out.heading("Notes")
        for note in analysis.notes:
            out.line(f"· {plain(note)}", hang=2)


def sentences(
    comparisons: Sequence[Comparison], cases: Sequence[CaseSummary], analysis: Analysis
) -> list[str]:
    """The verdicts of a group; loaders' name their tokenizer, so that each can be quoted alone."""
    if is_loading(cases):
        return [words.claim(row) for row in loading.claims(comparisons, cases, analysis.loading)]
    return [words.verdict(comparison) for comparison in comparisons]


def is_loading(cases: Sequence[CaseSummary]) -> bool:
    return bool(cases) and cases[0].workload.startswith("load/")


def comparisons_of(analysis: Analysis) -> dict[tuple[str, str], list[Comparison]]:
    """By session and group, the fastest first."""
    found: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in analysis.comparisons:
        found.setdefault((comparison.session, comparison.group), []).append(comparison)
    return {k: sorted(v, key=lambda c: -(c.speedup.estimate or 0)) for k, v in found.items()}


def header(out: Printer, tables: Tables) -> None:
    for row in tables.rows("sessions"):
        device = plain(row["device_name"] or "an unknown device", 80)
        started = plain((row["started"] or "")[:10])
        threads = f", {words.plural(row['threads'], 'thread')}" if row["threads"] else ""
        session = f" [{plain(row['session'], 60)}]" if len(tables["sessions"]) > 1 else ""
        out.line(f"{plain(row['suite'] or 'suite', 60)} on {device}{threads}, {started}{session}", hang=2)


def title(case: CaseSummary, analysis: Analysis) -> str:
    several = len({c.session for c in analysis.cases}) > 1
    session = f" [{plain(case.session, 60)}]" if several else ""
    return f"{plain(case.workload, 80)}: {words.conditions(case.axes)}{session}"


# --------------------------------------------------------------------------------------------------- results
def results(out: Printer, cases: Sequence[CaseSummary], analysis: Analysis, *, price: bool) -> None:
    """The table of one workload, or cards where it does not fit; a case without a time shows its reason."""
    if is_loading(cases):
        from bench.report import loaders

        loaders.show(out, cases, analysis)
        return
    mfu = any(c.mfu.estimate is not None for c in cases)
    head = ["", "status", "ms a step", "tokens/s", "compile s"]
    head += ["MFU"] if mfu else []
    head += ["$/Gtok"] if price else []
    rows = [table_row(case, mfu=mfu, price=price) for case in cases]
    full = [head, *(row for row in rows if len(row) == len(head))]
    widths = [max(len(row[i]) for row in full) for i in range(len(head))]
    room = out.width - sum(widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = min(max(len(row[0]) for row in rows), max(room, 0), 40)
    if out.narrow or widths[0] < min(14, max(len(row[0]) for row in rows)):
        for case in cases:
            card(out, case, price=price)
        return
    if len(full) > 1:
        out.line(joined(head, widths), style="dim")
    for case, row in zip(cases, rows, strict=True):
        print_row(out, case, row, widths)
    if any(c.measured for c in cases):
        out.line("compile s: with cold caches / with seeded caches", style="dim", indent=widths[0] + 2)


def table_row(case: CaseSummary, *, mfu: bool, price: bool) -> list[str]:
    name = plain(case.arm, 60)
    if not case.measured:
        return [name, case.status, plain(case.reason)]
    row = [name, case.status, words.with_span(case.step_s, 1e3), words.short(case.tokens_per_s.estimate)]
    row.append(f"{words.brief(case.compile_cold_s)} / {words.brief(case.compile_seeded_s)}")
    row += [words.percent(case.mfu)] if mfu else []
    row += [words.number(case.usd_per_gtoken.estimate, 3)] if price else []
    return row


def joined(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
    cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join(cells)


def print_row(out: Printer, case: CaseSummary, row: Sequence[str], widths: Sequence[int]) -> None:
    from rich.text import Text

    name = row[0] if len(row[0]) <= widths[0] else row[0][: widths[0] - 1] + "…"
    prefix = Text(name.ljust(widths[0]) + "  ")
    prefix.append(row[1], style=COLOURS.get(case.status, ""))
    start = widths[0] + widths[1] + 4
    if len(row) == 3:
        out.line(row[2], hang=max(start, widths[0] + len(row[1]) + 4), prefix=prefix)
        return
    cells = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    prefix.pad_right(max(0, start - prefix.cell_len))
    prefix.append("  ".join(cells))
    out.console.print(prefix, no_wrap=True, overflow="ignore", crop=False)
    if case.reason:
        out.line(plain(case.reason), style="dim", indent=start)


def card(out: Printer, case: CaseSummary, *, price: bool) -> None:
    """One case on a small screen."""
    from rich.text import Text

    name = Text(plain(case.arm, 60) + "  ")
    out.console.print(name.append(case.status, style=COLOURS.get(case.status, "")), overflow="fold")
    if case.reason:
        out.line(plain(case.reason), indent=2)
    if case.timed:
        out.line(f"{words.with_span(case.step_s, 1e3)} ms a step", indent=2)
        out.line(f"{words.short(case.tokens_per_s.estimate)} tokens/s", indent=2)
    if case.mfu.estimate is not None:
        out.line(f"MFU {words.percent(case.mfu)}", indent=2)
    if price and case.usd_per_gtoken.estimate is not None:
        out.line(f"${words.number(case.usd_per_gtoken.estimate, 3)} a billion tokens", indent=2)
    if case.compile_cold_s is not None or case.compile_seeded_s is not None:
        cold, seeded = words.seconds(case.compile_cold_s), words.seconds(case.compile_seeded_s)
        out.line(f"compile {cold} cold, {seeded} seeded", indent=2)


def pay_off(out: Printer, analysis: Analysis) -> None:
    """When compiling has paid for itself, cold and seeded in one sentence; where it never does, nothing."""
    found: dict[tuple[str, str, str], list[BreakEven]] = {}
    for row in analysis.break_even:
        if row.steps is not None and row.steps >= 1:
            found.setdefault((row.session, row.group, row.arm), []).append(row)
    if not found:
        return
    out.heading("Compiling pays off")
    labels = words.labels(analysis.cases)
    for rows in list(found.values())[:LONGEST_LIST]:
        one = rows[0]
        times = ", ".join(f"{words.pays_off(row)} with {row.cache} caches" for row in rows)
        arms = f"{plain(one.arm, 60)} overtakes {plain(one.baseline, 60)}"
        out.line(f"{labels[one.session, one.group]}: {arms} {times}", hang=2)


# --------------------------------------------------------------------------------------- the fairness of it
def merged(analysis: Analysis, least: int = 2) -> list[tuple[list[str], Differences]]:
    """Groups of at least so many arms; those whose manifests say the same once, with all their names."""
    labels = words.labels(analysis.cases)
    out: list[tuple[list[str], Differences]] = []
    for one in analysis.differences:
        if len(one.arms) < least:
            continue
        name = labels.get((one.session, one.group), plain(one.workload, 60))
        for names, other in out:
            same = (one.differing, one.partial, one.alike)
            if one.arms == other.arms and same == (other.differing, other.partial, other.alike):
                names.append(name)
                break
        else:
            out.append(([name], one))
    return out


def partial_facts(group: Differences) -> list[str]:
    """`graph_breaks (torch-compile: 0)`"""
    found = []
    for key, values in group.partial.items():
        arms = [plain(arm, 40) for arm in group.arms if values[arm] != NOT_REPORTED]
        value = next(v for v in values.values() if v != NOT_REPORTED)
        found.append(f"{plain(key, 60)} ({', '.join(arms)}: {plain(value, 60)})")
    return found


def differences(out: Printer, names: Sequence[str], group: Differences) -> None:
    """Keys whose values differ, each value with the arms that hold it; the rest in one line."""
    out.heading(f"Where the stacks differ: {plain('; '.join(names), 300)}")
    for key, values in list(group.differing.items())[:LONGEST_LIST]:
        out.line(plain(key, 80), style="bold", indent=2)
        holders: dict[str, list[str]] = {}
        for arm in group.arms:
            holders.setdefault(values[arm], []).append(plain(arm, 60))
        for value, arms in holders.items():
            out.line(f"{', '.join(arms)}: {plain(value, 160)}", indent=4, hang=6)
    more = len(group.differing) - LONGEST_LIST
    if more > 0:
        out.line(f"… and {more} more; the page has them all", indent=2)
    if group.partial:
        text = plain(", ".join(partial_facts(group)), 1000)
        out.line(f"reported by some only ({len(group.partial)}): {text}", style="dim", indent=2, hang=4)
    if group.alike:
        keys = [plain(key, 60) for key in group.alike]
        shown = ", ".join(keys[:LONGEST_LIST]) + (" …" if len(keys) > LONGEST_LIST else "")
        out.line(f"alike in all ({len(keys)}): {shown}", style="dim", indent=2, hang=4)


def parity(out: Printer, analysis: Analysis) -> None:
    """The worst distance of every measure, case by case, or of every case where there are many."""
    found = analysis.parity
    if not found:
        return
    out.heading("Parity: worst error / tolerance (above 1 is other work)")
    labels = words.labels(analysis.cases)
    cases: dict[tuple[str, str], list[Distance]] = {}
    for distance in found:
        cases.setdefault((distance.session, distance.case_id), []).append(distance)
    named = [
        (f"{labels[rows[0].session, rows[0].group]} {plain(rows[0].arm, 60)}", rows)
        for rows in cases.values()
    ]
    width = min(max(len(name) for name, _ in named) + 2, 44)
    for name, rows in named[: 2 * LONGEST_LIST]:
        shown = rows if len(cases) <= MANY else [max(rows, key=lambda d: d.distance)]
        text = " · ".join(f"{plain(d.measure, 40)} {words.number(d.distance, 2)}" for d in shown)
        out.pair(plain(name, 120), text, width=width)
        for d in [d for d in rows if not d.distance <= 1][:3]:
            what = f"{plain(d.measure, 40)} of {plain(d.parameter, 80)}"
            out.line(f"{what}: {d.error:.2e}, tolerance {d.tolerance:.2e}", style="red", indent=4, hang=6)
    if len(named) > 2 * LONGEST_LIST:
        out.line(f"… and {len(named) - 2 * LONGEST_LIST} more cases; the page has them all", indent=2)


def failures(out: Printer, found: Sequence[dict[str, str]]) -> None:
    if not found:
        return
    out.heading("Not timed, or left out")
    for row in found[:LONGEST_LIST]:
        style = COLOURS.get(row["status"], "yellow")
        out.line(f"{plain(row['status'], 40)}: {plain(row['name'], 120)}", style=style, indent=2, hang=4)
        out.line(plain(row["reason"], 300), indent=4)
    if len(found) > LONGEST_LIST:
        out.line(f"… and {len(found) - LONGEST_LIST} more; the page has them all", indent=2)
