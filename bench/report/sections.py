"""The page's tables and sentences as HTML. Every text that came from a file goes through `e`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from bench.analyze import Analysis
from bench.analyze.break_even import BreakEven
from bench.analyze.differences import Differences
from bench.analyze.parity import Distance
from bench.analyze.ratios import Comparison, groups
from bench.analyze.summary import CaseSummary
from bench.report import environment, words
from bench.report.figures.style import Look
from bench.report.terminal import comparisons_of, merged, partial_facts, sentences
from bench.stats import Interval
from bench.store import Tables

TONE = {"ok": "ok", "failed": "bad", "not comparable": "bad", "unreadable": "bad"}
MOST_ROWS = 2000
NONE = words.NONE


def e(text: Any, longest: int = 500) -> str:
    """Printable and escaped."""
    return html.escape(words.plain(text, longest), quote=True)


def table(head: Sequence[str], body: str, name: str, kind: str = "") -> str:
    """A table that scrolls inside its own container; the head's cells are ready HTML."""
    columns = f"<thead><tr>{''.join(head)}</tr></thead>" if head else ""
    opening = f'<div class="scroll" role="region" tabindex="0" aria-label="{e(name)}"><table'
    return f"{opening}{f' class={kind!r}' if kind else ''}>{columns}{body}</table></div>"


def breakable(name: str) -> str:
    """A name with underscores that may be broken after each."""
    return e(name, 120).replace("_", "_<wbr>")


def th(text: str, *, n: bool = False, scope: str = "col", small: str = "") -> str:
    extra = f"<small>{e(small)}</small>" if small else ""
    return f'<th scope="{scope}"{" class=n" if n else ""}>{e(text)}{extra}</th>'


def td(text: str, small: str = "") -> str:
    """A number, with what belongs to it in small print below."""
    return f'<td class="n">{e(text)}{f"<small>{e(small)}</small>" if small else ""}</td>'


def swatch(look: Look, stack: str) -> str:
    return f'<span class="swatch" style="background:{look.variable(stack)}"></span>'


def status(text: str) -> str:
    return f'<td class="status {TONE.get(text, "warn")}">{e(text)}</td>'


def name_of(case: CaseSummary, analysis: Analysis) -> str:
    """Workload and conditions, with the session where there are several."""
    several = len({c.session for c in analysis.cases}) > 1
    session = f" [{e(case.session, 80)}]" if several else ""
    return f'{e(case.workload, 80)}{session} <span class="conditions">{e(words.conditions(case.axes))}</span>'


# ------------------------------------------------------------------------------------------------ headlines
def verdicts(analysis: Analysis, look: Look) -> str:
    by_group = comparisons_of(analysis)
    cards = []
    for key, cases in groups(analysis.cases).items():
        told = sentences(by_group.get(key, []), cases, analysis)
        items = [sentence(c, text, look) for c, text in zip(by_group.get(key, []), told, strict=True)]
        if not items:
            items = [f"<li>{without_verdict(cases)}</li>"]
        cards.append(
            f'<article class="verdict"><h2>{name_of(cases[0], analysis)}</h2>'
            f'<ul class="plain">{"".join(items)}</ul></article>'
        )
    return f'<section class="verdicts" aria-label="Verdicts">{"".join(cards)}</section>'


def sentence(comparison: Comparison, text: str, look: Look) -> str:
    """The verdict, its evidence in a quieter tone."""
    main, bracket, evidence = text.partition(" (")
    quiet = f' <span class="evidence">({e(evidence)}</span>' if bracket else ""
    return f"<li>{swatch(look, comparison.stack)}{e(main)}{quiet}</li>"


def without_verdict(cases: Sequence[CaseSummary]) -> str:
    timed = [c for c in cases if c.timed]
    if len(timed) == 1:
        speed = words.short(timed[0].tokens_per_s.estimate)
        return f"Only {e(timed[0].arm, 60)} has a time: {speed} tokens a second. There is nothing to compare."
    if timed:
        return "The baseline has no time, so nothing is compared."
    if any(c.measured for c in cases):
        return "Only compilation was measured."
    return "Nothing was timed: " + "; ".join(f"{e(c.arm, 60)} {e(c.status, 40)}" for c in cases[:12])


# -------------------------------------------------------------------------------------------- result table
def results(analysis: Analysis, look: Look) -> str:
    """One table; columns that nobody can fill are left out."""
    cases = analysis.cases
    speedups = {(c.session, c.case_id): c for c in analysis.comparisons}
    columns = [
        ("ms a step", True), ("tokens/s", True), ("times as fast", bool(speedups)),
        ("MFU", any(c.mfu.estimate is not None for c in cases)),
        ("mJ a token", any(c.joules_per_token.estimate is not None for c in cases)),
        ("$ a billion tokens", any(c.usd_per_gtoken.estimate is not None for c in cases)),
        ("compile, cold", True), ("compile, seeded", True),
        ("device memory", any(c.peak_allocated_bytes is not None for c in cases)),
        ("host memory", any(c.pss_bytes is not None for c in cases)), ("rounds", True), ("spread", True),
    ]  # fmt: skip
    shown = [name for name, known in columns if known]
    notes = {"MFU": "12·L·d·T", "spread": "processes / values", "host memory": "PSS"}
    head = [th("arm"), th("status"), *(th(name, n=True, small=notes.get(name, "")) for name in shown)]
    body = []
    for members in groups(cases).values():
        title = f"<span>{name_of(members[0], analysis)}</span>"
        body.append(f'<tbody><tr><th colspan="{len(shown) + 2}" scope="rowgroup">{title}</th></tr>')
        for case in members[:MOST_ROWS]:
            cells = result_cells(case, speedups.get((case.session, case.case_id)))
            first = f'<th scope="row">{swatch(look, case.stack)}{e(case.arm, 80)}</th>{status(case.status)}'
            if not case.measured:
                body.append(
                    f'<tr>{first}<td class="reason" colspan="{len(shown)}">{e(case.reason)}</td></tr>'
                )
            else:
                body.append(f"<tr>{first}{''.join(cells[name] for name in shown)}</tr>")
        body.append("</tbody>")
    return table(head, "".join(body), "Results")


def result_cells(case: CaseSummary, comparison: Comparison | None) -> dict[str, str]:
    spread = [NONE if s is None else f"{100 * s:.1f}" for s in (case.spread_between, case.spread_within)]
    draws = f", {words.plural(case.n_draws, 'draw')}" if case.n_draws > 1 else ""
    fast = td(words.NONE)
    if comparison is not None and comparison.speedup.estimate is not None:
        ratio = comparison.speedup
        ends = f"{ratio.low:.2f}–{ratio.high:.2f}" if ratio.low is not None and ratio.high is not None else ""
        fast = td(f"{ratio.estimate:.2f}×", ends or "no interval")
    failed = f"{case.n_failed} failed" if case.n_failed else ""
    return {
        "ms a step": interval(case.step_s, 1e3), "tokens/s": td(words.short(case.tokens_per_s.estimate),
                                                               rates(case.tokens_per_s)),
        "times as fast": fast,
        "MFU": td(words.percent(case.mfu), words.percent(case.mfu_noncausal) if case.mfu.estimate else ""),
        "mJ a token": interval(case.joules_per_token, 1e3, 3),
        "$ a billion tokens": interval(case.usd_per_gtoken, 1, 3),
        "compile, cold": td(words.seconds(case.compile_cold_s)),
        "compile, seeded": td(words.seconds(case.compile_seeded_s)),
        "device memory": td(words.bytes_(case.peak_allocated_bytes)),
        "host memory": td(words.bytes_(case.pss_bytes)),
        "rounds": td(f"{case.n_rounds}{draws}", failed), "spread": td(f"{spread[0]} / {spread[1]} %"),
    }  # fmt: skip


def interval(value: Interval, scale: float, digits: int = 4) -> str:
    if value.estimate is None:
        return td(NONE)
    return td(words.number(value.estimate * scale, digits), words.span(value, scale, digits) or "no interval")


def rates(value: Interval) -> str:
    if value.low is None or value.high is None:
        return "no interval" if value.estimate is not None else ""
    return f"{words.short(value.low)}–{words.short(value.high)}"


def break_even(analysis: Analysis, look: Look) -> str:
    """One row an arm: what a step saves, and what compiling costs and when it pays, cold and seeded."""
    stacks = {(c.session, c.group, c.arm): c.stack for c in analysis.cases}
    labels = words.labels(analysis.cases)
    found: dict[tuple[str, str, str], dict[str, BreakEven]] = {}
    for row in analysis.break_even:
        found.setdefault((row.session, row.group, row.arm), {})[row.cache] = row
    body = []
    for key, rows in list(found.items())[:MOST_ROWS]:
        one = next(iter(rows.values()))
        saved = one.saved_s_per_step
        cells = [td(NONE if saved is None else f"{words.number(1e3 * saved, 3)} ms")]
        for cache in ("cold", "seeded"):
            row = rows[cache]
            cells += [td(words.seconds(row.extra_compile_s)), f"<td>{e(words.pays_off(row))}</td>"]
        body.append(
            f'<tr><th scope="row">{swatch(look, stacks.get(key, ""))}{e(one.arm, 80)}</th>'
            f"<td>{e(labels[one.session, one.group], 120)}</td><td>{e(one.baseline, 80)}</td>"
            f"{''.join(cells)}</tr>"
        )
    head = [th("arm"), th("workload"), th("baseline"), th("saved a step", n=True),
            th("extra compile", n=True, small="cold caches"), th("pays off", small="cold caches"),
            th("extra compile", n=True, small="seeded"), th("pays off", small="seeded")]  # fmt: skip
    return table(head, f"<tbody>{''.join(body)}</tbody>", "Break-even") if body else ""


# --------------------------------------------------------------------------------------- parity, differences
def parity(analysis: Analysis, look: Look) -> str:
    """Worst distance of every case and measure."""
    measures = list(dict.fromkeys(d.measure for d in analysis.parity))
    labels = words.labels(analysis.cases)
    rows: dict[tuple[str, str], dict[str, Distance]] = {}
    for d in analysis.parity:
        rows.setdefault((d.session, d.case_id), {})[d.measure] = d
    body = []
    for found in list(rows.values())[:MOST_ROWS]:
        first = next(iter(found.values()))
        cells = []
        for measure in measures:
            if measure not in found:
                cells.append(td(NONE))
                continue
            d = found[measure]
            bad = "" if d.distance <= 1 else " bad"
            what = e(f"{d.parameter}, {d.against}", 120)
            cells.append(f'<td class="n{bad}" title="{what}">{e(words.number(d.distance, 2))}</td>')
        body.append(
            f'<tr><th scope="row">{swatch(look, first.stack)}{e(first.arm, 80)}</th>'
            f"<td>{e(labels[first.session, first.group], 120)}</td>{''.join(cells)}</tr>"
        )
    head = [th("arm"), th("workload"), *(th(m.replace("_", " "), n=True) for m in measures)]
    return table(head, f"<tbody>{''.join(body)}</tbody>", "Parity distances") if body else ""


def differences(analysis: Analysis) -> str:
    parts = []
    for names, group in merged(analysis):
        parts.append(f"<h3>{e('; '.join(names), 300)}</h3>")
        if group.differing:
            parts.append(facts_table(group, group.differing, f"Differences, {names[0]}"))
        if group.partial:
            text = ", ".join(partial_facts(group))
            parts.append(
                f'<p class="hint">Reported by some only ({len(group.partial)}): {e(text, 3000)}.</p>'
            )
        if group.alike:
            keys = ", ".join(group.alike)
            parts.append(f'<p class="hint">Alike in all ({len(group.alike)}): {e(keys, 3000)}.</p>')
    return "".join(parts)


def facts_table(group: Differences, facts: Any, name: str) -> str:
    rows = [
        f'<tr><th scope="row">{breakable(key)}</th>'
        f"{''.join(f'<td>{e(values[a], 1000)}</td>' for a in group.arms)}</tr>"
        for key, values in list(facts.items())[:MOST_ROWS]
    ]
    head = [th("fact"), *(th(arm) for arm in group.arms)]
    return table(head, f"<tbody>{''.join(rows)}</tbody>", name, "facts")


def manifests(analysis: Analysis) -> str:
    """Every fact of every arm, collapsed."""
    out = []
    for names, group in merged(analysis, least=1):
        everything = {k: dict.fromkeys(group.arms, v) for k, v in group.alike.items()} | dict(group.partial)
        everything |= dict(group.differing)
        body = facts_table(group, dict(sorted(everything.items())), f"Manifest, {names[0]}")
        out.append(f"<details><summary>Manifest: {e('; '.join(names), 200)}</summary>{body}</details>")
    return "".join(out)


def environments(tables: Tables) -> str:
    sessions = {row["session"]: row for row in tables.rows("sessions")}
    out = []
    for row in tables.rows("environments"):
        found = environment.facts(row, sessions.get(row["session"], {}))
        body = "".join(f'<tr><th scope="row">{e(k, 60)}</th><td>{e(v, 4000)}</td></tr>' for k, v in found)
        name = f"Environment {row['env_id']}, session {row['session']}"
        shown = table([], f"<tbody>{body}</tbody>", name, "facts")
        out.append(f"<details><summary>{e(name, 120)}</summary>{shown}</details>")
    return "".join(out)


def failures(found: Sequence[dict[str, str]]) -> str:
    rows = "".join(
        f'<tr>{status(row["status"])}<td class="reason">{e(row["name"], 200)}</td>'
        f'<td class="reason">{e(row["reason"], 1000)}</td></tr>'
        for row in found[:MOST_ROWS]
    )
    more = f'<p class="hint">… and {len(found) - MOST_ROWS} more.</p>' if len(found) > MOST_ROWS else ""
    return table([th("status"), th("what"), th("reason")], f"<tbody>{rows}</tbody>", "Not timed") + more


def bullet_list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{e(item, 1000)}</li>' for item in items)}</ul>"
