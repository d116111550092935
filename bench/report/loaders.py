"""What a reader sees of loaders: the terminal's table, and the page's. Columns nobody fills are left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from bench.analyze import Analysis
from bench.analyze.loading import Loading
from bench.analyze.ratios import groups
from bench.analyze.summary import CaseSummary
from bench.report import words
from bench.report.words import plain
from bench.stats import Interval

if TYPE_CHECKING:
    from bench.report.figures.style import Look
    from bench.report.terminal import Printer

Known = Mapping[tuple[str, str], Loading]


def by_case(analysis: Analysis) -> Known:
    return {(row.session, row.case_id): row for row in analysis.loading}


# -------------------------------------------------------------------------------------------------- terminal
HEAD = ("", "status", "Mtok/s", "in all", "first ms", "CPU s/M", "PSS MB")


def show(out: Printer, cases: Sequence[CaseSummary], analysis: Analysis) -> None:
    """One group: tokens a second after the first batch and in all, the first batch, CPU, memory."""
    from bench.report import terminal

    known = by_case(analysis)
    rows = [terminal_row(case, known.get((case.session, case.case_id))) for case in cases]
    full = [list(HEAD), *(row for row in rows if len(row) == len(HEAD))]
    widths = [max(len(row[i]) for row in full) for i in range(len(HEAD))]
    room = out.width - sum(widths[1:]) - 2 * (len(widths) - 1)
    widths[0] = min(max(len(row[0]) for row in rows), max(room, 0), 40)
    if out.narrow or widths[0] < min(14, max(len(row[0]) for row in rows)):
        for case, row in zip(cases, rows, strict=True):
            card(out, case, row)
        return
    if len(full) > 1:
        out.line(terminal.joined(HEAD, widths), style="dim")
    for case, row in zip(cases, rows, strict=True):
        terminal.print_row(out, case, row, widths)


def terminal_row(case: CaseSummary, row: Loading | None) -> list[str]:
    name = plain(case.arm, 60)
    if row is None or not case.timed:
        return [name, case.status, plain(case.reason)]
    first, memory = row.first_batch_s.estimate, row.pss_bytes.estimate
    return [
        name, case.status, words.with_span(case.tokens_per_s, 1e-6, 3),
        scaled(row.rate_in_all.estimate, 1e-6), scaled(first, 1e3),
        scaled(row.cpu_s_per_mtok.estimate, 1), scaled(memory, 1e-6),
    ]  # fmt: skip


def scaled(value: float | None, scale: float, digits: int = 3) -> str:
    return words.number(None if value is None else value * scale, digits)


def card(out: Printer, case: CaseSummary, row: Sequence[str]) -> None:
    """One loader on a small screen."""
    out.line(f"{row[0]}  {row[1]}", style="bold")
    if len(row) == 3:
        out.line(row[2], indent=2)
        return
    for label, text in zip(HEAD[2:], row[2:], strict=True):
        out.line(f"{text} {label}", indent=2)
    if case.reason:
        out.line(plain(case.reason), indent=2)


# ------------------------------------------------------------------------------------------------------ page
def results(analysis: Analysis, look: Look) -> str:
    """One table: rates, first batch, CPU, memory, the consumer's side, what was pickled, the lock's price."""
    from bench.report import sections
    from bench.report.sections import e, td, th

    known = by_case(analysis)
    speedups = {(c.session, c.case_id): c for c in analysis.comparisons}
    shown = [name for name in COLUMNS if any(COLUMNS[name](row) for row in analysis.loading)]
    notes = {"tokens/s": "after the first batch", "in all": "tokens/s", "CPU": "s a million tokens",
             "memory": "PSS of the tree", "a ready batch": "µs for the consumer", "prepared": "kept, apart",
             "pickled": "a batch", "GIL": "slowdown of a thread", "padding": "of the tokens"}  # fmt: skip
    width = len(shown) + 4
    head = [th("arm"), th("status"), th("tokens/s", n=True, small=notes["tokens/s"])]
    head += [th("times as fast", n=True)]
    head += [th(name, n=True, small=notes.get(name, "")) for name in shown]
    body = []
    for members in groups(analysis.cases).values():
        title = f"<span>{sections.name_of(members[0], analysis)}</span>"
        body.append(f'<tbody><tr><th colspan="{width}" scope="rowgroup">{title}</th></tr>')
        for case in members[: sections.MOST_ROWS]:
            row = known.get((case.session, case.case_id))
            swatch = sections.swatch(look, case.stack)
            first = f'<th scope="row">{swatch}{e(case.arm, 80)}</th>{sections.status(case.status)}'
            if row is None:
                reason = f'<td class="reason" colspan="{width - 2}">{e(case.reason)}</td>'
                body.append(f"<tr>{first}{reason}</tr>")
                continue
            rate = td(words.short(case.tokens_per_s.estimate), sections.rates(case.tokens_per_s))
            fast = sections.result_cells(case, speedups.get((case.session, case.case_id)))["times as fast"]
            cells = [td(*(COLUMNS[name](row) or (words.NONE, ""))) for name in shown]
            body.append(f"<tr>{first}{rate}{fast}{''.join(cells)}</tr>")
        body.append("</tbody>")
    return sections.table(head, "".join(body), "Loaders")


def cell(value: float | None, scale: float, unit: str, digits: int = 3) -> tuple[str, str] | None:
    return None if value is None else (f"{words.number(value * scale, digits)}{unit}", "")


def ranged(value: Interval, scale: float, unit: str) -> tuple[str, str] | None:
    if value.estimate is None:
        return None
    return f"{words.number(value.estimate * scale, 3)}{unit}", words.span(value, scale, 3)


COLUMNS: Mapping[str, Callable[[Loading], tuple[str, str] | None]] = {
    "in all": lambda r: ranged(r.rate_in_all, 1e-6, " M"),
    "first batch": lambda r: ranged(r.first_batch_s, 1e3, " ms"),
    "CPU": lambda r: ranged(r.cpu_s_per_mtok, 1, ""),
    "memory": lambda r: ranged(r.pss_bytes, 1e-6, " MB"),
    "a ready batch": lambda r: cell(r.consumer_us_per_batch, 1, ""),
    "pickled": lambda r: cell(r.bytes_pickled_per_batch, 1e-3, " kB"),
    "GIL": lambda r: cell(r.gil_slowdown, 100, " %", 2),
    "prepared": lambda r: cell(r.prepare_s, 1, " s"),
    "padding": lambda r: cell(r.padding_share, 100, " %", 2),
}


def options(analysis: Analysis, look: Look) -> str:
    """The point of its grid at which every arm ran, and of how many points it was the best."""
    from bench.report import sections
    from bench.report.sections import e, td, th

    labels = words.labels(analysis.cases)
    body = []
    for row in analysis.loading[: sections.MOST_ROWS]:
        if row.options:
            tried = str(row.points_tried) if row.points_tried else "as given"
            body.append(
                f'<tr><th scope="row">{sections.swatch(look, row.stack)}{e(row.arm, 80)}</th>'
                f"<td>{e(labels[row.session, row.group], 120)}</td>{td(tried)}"
                f'<td class="reason">{e(row.options, 500)}</td></tr>'
            )
    head = [th("arm"), th("workload"), th("points tried", n=True), th("options in force")]
    return sections.table(head, f"<tbody>{''.join(body)}</tbody>", "Options") if body else ""
