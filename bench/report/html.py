"""One page that stands alone: no script, nothing fetched, light and dark, from a phone to a wide screen."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Final

from bench.analyze import Analysis
from bench.plan import write_atomic
from bench.report import sections, words
from bench.report.figures.style import Look, to_svg
from bench.report.sections import e
from bench.store import Tables

HERE: Final = Path(__file__).parent

METHODS: Final = {
    "train": """
<h2>How to read this</h2>
<p>A <em>value</em> is the wall time of K consecutive training steps, enqueued without reading anything back
and closed by one wait for all outputs, divided by K; K is the same for all arms of a round. A
<em>process</em> gives one number: the median of its values after warm-up. Only cases that passed the parity
gate have a time. Compile time is the first step minus a median step. In <code>METHODOLOGY.md</code>: “The
timed value” and “FLOPs, MFU, memory”.</p>
""",
    "load": """
<h2>How to read the loaders</h2>
<p>A <em>value</em> is one pass over text that the process has not seen, from the first batch received to the
last, divided by the batches in between; the consumer sums every token inside it. One fresh process a value.
Tokens a second <em>in all</em> count from before the loader was made. Every arm delivered the same documents:
the gate compares the hash of each document's ids, and every timed run the number of its tokens and their
sum. No ratio here mixes tokenizers. In <code>METHODOLOGY.md</code>: “Loaders”.</p>
""",
    "all": """
<p>A <em>round</em> is one fresh process of every arm, back to back in balanced order. Times are medians over
rounds between ordered process medians, exact by the sign test. Ratios are Hodges–Lehmann estimates of the
per-round log-ratios with the exact Wilcoxon interval: 96.9 % with 6 rounds; fewer give no 95 % interval, and
none is shown. Only complete rounds enter a ratio.</p>
<p>The argument is in <code>METHODOLOGY.md</code>: “The same work first, time second” and “Rounds and
intervals”. The numbers are in <code>tables/</code> beside this page, the raw artifacts in
<code>artifacts/</code>.</p>
""",
}


def write(path: Path, tables: Tables, analysis: Analysis) -> None:
    """The page, put in place by one rename. Raises OSError."""
    write_atomic(path, page(tables, analysis))


def page(tables: Tables, analysis: Analysis) -> str:
    """The whole document."""
    sessions = tables.rows("sessions")
    suite = words.plain(", ".join(dict.fromkeys(s["suite"] or "suite" for s in sessions)) or "results", 120)
    template = string.Template((HERE / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=e(f"stackbench: {suite}"),
        css=(HERE / "page.css").read_text(encoding="utf-8"),
        heading=e(f"{suite}: {heading(analysis)}"),
        lead=lead(tables),
        body="\n".join(body(tables, analysis)),
        footer="".join(METHODS[name] for name in METHODS if name == "all" or analysis.of(name).cases),
    )


def heading(analysis: Analysis) -> str:
    """What the page is about."""
    parts = [text for name, text in HEADINGS.items() if analysis.of(name).cases]
    return " and ".join(parts) or HEADINGS["train"]


HEADINGS: Final = {
    "train": "the same training step on every stack",
    "load": "the same batches from every loader",
}


def lead(tables: Tables) -> str:
    """Where and when, one line a session."""
    lines = []
    for row in tables.rows("sessions"):
        parts = [row["device_name"] or "an unknown device"]
        parts += [words.plural(row["threads"], "thread")] if row["threads"] else []
        parts += [(row["started"] or "")[:10]] if row["started"] else []
        session = f"{row['session']}: " if len(tables["sessions"]) > 1 else ""
        lines.append(f'<p class="lead">{e(session + ", ".join(parts), 300)}</p>')
    return "".join(lines[:20])


def body(tables: Tables, analysis: Analysis) -> Iterator[str]:
    """The sections in order, kind of work by kind of work; what has nothing to say is left out."""
    look = Look(analysis.cases)
    yield sections.verdicts(analysis, look)
    if analysis.failures:
        n = sum(1 for f in analysis.failures if f["kind"] == "case")
        if n:
            text = f"{n} of {words.plural(len(analysis.cases), 'case')} without a clean result: see below."
            yield f'<p class="hint">{e(text)}</p>'
    parts = {name: analysis.of(name) for name in CHAPTERS}
    several = sum(bool(part.cases) for part in parts.values()) > 1
    for name, part in parts.items():
        if part.cases:
            yield from CHAPTERS[name](part, look, several)
    differences = sections.differences(analysis)
    if differences:
        text = "Facts that each worker reported of what it really ran."
        yield section("Where the stacks differ", differences, text)
    if analysis.failures:
        yield section("Not timed, or left out", sections.failures(analysis.failures))
    if analysis.notes:
        yield section("Notes", sections.bullet_list(analysis.notes))
    details = sections.manifests(analysis) + sections.environments(tables)
    if details:
        yield section("Manifests and environments", details)


def training(analysis: Analysis, look: Look, several: bool) -> Iterator[str]:
    """Training: times, ratios, compilation, efficiency, parity."""
    from bench.report.figures import (
        break_even,
        compile_time,
        energy,
        mfu,
        parity,
        ratios,
        step_times,
        throughput,
    )

    title = "Results of training" if several else "Results"
    yield section(title, sections.results(analysis, look), intervals_hint(analysis))
    yield figure(throughput, analysis, look)
    yield figure(ratios, analysis, look)
    yield figure(step_times, analysis, look)
    yield figure(compile_time, analysis, look)
    yield figure(break_even, analysis, look, sections.break_even(analysis, look))
    yield figure(mfu, analysis, look)
    yield figure(energy, analysis, look)
    yield figure(parity, analysis, look, sections.parity(analysis, look))


def loading(analysis: Analysis, look: Look, several: bool) -> Iterator[str]:
    """Loaders: rates by tokenizer, ratios, scaling, first batch, CPU by stage, memory, the lock, parity."""
    from bench.report import loaders
    from bench.report.figures import (
        first_batch,
        gil_cost,
        loader_memory,
        loader_rate,
        loader_ratios,
        loader_scaling,
        loader_stages,
    )

    title = "Results of loaders" if several else "Results"
    yield section(title, loaders.results(analysis, look), intervals_hint(analysis))
    yield figure(loader_rate, analysis, look)
    yield figure(loader_ratios, analysis, look)
    yield figure(loader_scaling, analysis, look)
    yield figure(first_batch, analysis, look)
    yield figure(loader_stages, analysis, look)
    yield figure(loader_memory, analysis, look)
    yield figure(gil_cost, analysis, look)
    if options := loaders.options(analysis, look):
        text = "Where points were tried, the best of them: see `tried` in the gate's files for all."
        yield section("At which options", options, text)
    if parity := sections.parity(analysis, look):
        text = "Counts of what differs from Hugging Face tokenizers' ids over the gate's text: all must be 0."
        yield section("Parity: are these the corpus's documents?", parity, text)


CHAPTERS: Final = {"train": training, "load": loading}


def intervals_hint(analysis: Analysis) -> str:
    levels = {c.step_s.confidence for c in analysis.cases if c.step_s.confidence is not None}
    if not levels:
        return "Too few rounds for intervals: no number here is a finding."
    shown = " and ".join(f"{100 * level:.3g} %" for level in sorted(levels))
    return f"Small print: intervals, {shown}. Spread: relative standard deviation, in percent."


def section(title: str, content: str, hint: str = "") -> str:
    quiet = f'<p class="hint">{e(hint)}</p>' if hint else ""
    return f"<section><h2>{e(title)}</h2>{quiet}{content}</section>"


def figure(module: ModuleType, analysis: Analysis, look: Look, after: str = "") -> str:
    """Drawn twice, for wide and for narrow screens; nothing where the question has no answer here."""
    parts = []
    for kind in ("wide", "narrow"):
        drawn = module.draw(analysis, kind == "wide")
        if drawn is not None:
            uid = f"{module.__name__.rpartition('.')[2]}-{kind}"
            parts.append(f'<div class="{kind}">{to_svg(drawn, uid, module.alt(analysis))}</div>')
    if not parts:
        return ""
    caption = f"<figcaption>{e(module.CAPTION, 1000)}</figcaption>"
    key = legend(analysis, look) if getattr(module, "LEGEND", False) else ""
    content = f"{key}<figure>{''.join(parts)}{caption}</figure>{after}"
    return section(module.TITLE, content)


def legend(analysis: Analysis, look: Look) -> str:
    """Arms by colour; a variant of a stack has its stack's colour, paler."""
    items = []
    for arm, case in list({case.arm: case for case in analysis.cases if case.measured}.items())[:16]:
        kind = "" if case.variant == "default" else " class=pale"
        items.append(f"<li{kind}>{sections.swatch(look, case.stack)}{e(arm, 60)}</li>")
    return f'<ul class="legend" aria-label="Colours">{"".join(items)}</ul>' if len(items) > 1 else ""
