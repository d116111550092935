"""What a reader sees of the tables: the terminal's summary, the page, JSON, and the README's block."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path


def run_report(
    dirs: Sequence[Path], *, update_readme: bool, price_per_hour: float | None, as_json: bool
) -> int:
    """`stackbench report`: tables, summary, DIR/report.html. Raises UserError; exit codes: design.md."""
    from bench import registry, store
    from bench.analyze import analyze
    from bench.report import export, readme, terminal
    from bench.report import html as pages

    tables = store.load(list(dirs))
    analysis = analyze(tables, price_per_hour=price_per_hour)
    page = tables.directories[0] / "report.html"
    written = str(page)
    try:
        pages.write(page, tables, analysis)
    except OSError as error:
        print(f"stackbench: {page} cannot be written: {error.strerror}", file=sys.stderr)
        written = ""
    if update_readme:
        readme.splice_readme(registry.ROOT / "README.md", tables, analysis)
    if as_json:
        print(json.dumps(export.document("report", tables, analysis, page=written or None)))
        return analysis.exit_code
    from rich.console import Console

    price = any(case.usd_per_gtoken.estimate is not None for case in analysis.cases)
    console = Console(highlight=False, markup=False, emoji=False)
    terminal.show_report(console, tables, analysis, page=written, price=price)
    return analysis.exit_code


def run_compare(dir: Path, *, baseline: str | None, price_per_hour: float | None, as_json: bool) -> int:
    """`stackbench compare`: every arm's ratio to a baseline. Raises UserError; exit codes: design.md."""
    from bench import store
    from bench.analyze import analyze
    from bench.report import export, terminal

    tables = store.load([dir])
    analysis = analyze(tables, baseline=baseline, price_per_hour=price_per_hour)
    if as_json:
        print(json.dumps(export.document("compare", tables, analysis)))
        return analysis.exit_code
    from rich.console import Console

    price = any(case.usd_per_gtoken.estimate is not None for case in analysis.cases)
    console = Console(highlight=False, markup=False, emoji=False)
    terminal.show_comparison(console, analysis, price=price)
    return analysis.exit_code
