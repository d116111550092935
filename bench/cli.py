"""The command line: one screen a command; every command that answers takes `--json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import __version__
from bench.errors import UserError

app = typer.Typer(
    name="stackbench",
    help="Run equivalent training work on competing stacks, prove it equal, time it honestly, report it.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip

SuiteArgument = Annotated[str, typer.Argument(help="name of a suite, or a .toml file", metavar="SUITE")]
Cases = Annotated[str, typer.Option("--cases", help="glob over case ids", metavar="GLOB")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="an axis or a suite key, repeatable", metavar="KEY=VALUE")
]
Paths = Annotated[
    list[Path] | None,
    typer.Option("--path", help="directory with more stacks, models and suites, repeatable", metavar="DIR"),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]
Price = Annotated[float | None, typer.Option("--price-per-hour", help="of the device, for costs", min=0)]
Corpus = Annotated[Path | None, typer.Option("--corpus", help="directory, .jsonl, .jsonl.zst or .parquet")]
Tokenizer = Annotated[Path | None, typer.Option("--tokenizer", help="a tokenizer.json")]


def version(show: bool) -> None:
    if show:
        typer.echo(f"stackbench {__version__}")
        raise typer.Exit


@app.callback()
def common(
    _: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="and exit")] = False,
) -> None:
    pass


@app.command()
def doctor(
    ceilings: Annotated[bool, typer.Option(help="measure the device's limits too")] = False,
    out: Annotated[Path | None, typer.Option(help="write the table of ceilings here", metavar="DIR")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the environment, and what would disturb a measurement here."""
    from bench.doctor import run_doctor

    raise typer.Exit(run_doctor(ceilings, out, as_json))


@app.command()
def plan(
    suite: SuiteArgument,
    cases: Cases = "*",
    settings: Settings = None,
    device: Annotated[str | None, typer.Option(help="plan for a device that is not here")] = None,
    price_per_hour: Price = None,
    paths: Paths = None,
    corpus: Corpus = None,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Print cases, skips with reasons, expected time, memory and cost. Runs nothing."""
    from bench.report import planned
    from bench.run import execute as running

    wanted = settings_of(settings, corpus, tokenizer, {})
    made = running.plan_for(suite, cases=cases, settings=wanted, paths=paths or [], device=device)
    raise typer.Exit(planned.show(made, price_per_hour=price_per_hour, as_json=as_json))


@app.command()
def run(
    suite: SuiteArgument,
    out: Annotated[Path, typer.Option(help="results directory", metavar="DIR")],
    cases: Cases = "*",
    settings: Settings = None,
    rounds: Annotated[int | None, typer.Option(help="instead of the suite's", min=1)] = None,
    time_budget: Annotated[
        str | None, typer.Option(help="stop before a round that would not fit", metavar="9m")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on where a run in DIR stopped")] = False,
    paths: Paths = None,
    corpus: Corpus = None,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Run a suite: parity gate, then balanced rounds. Writes artifacts only; `report` reads them."""
    from bench.run import execute as running

    wanted = settings_of(settings, corpus, tokenizer, {"rounds": rounds})
    made = running.plan_for(suite, cases=cases, settings=wanted, paths=paths or [])
    budget = None if time_budget is None else running.seconds(time_budget)
    raise typer.Exit(running.execute(made, out, resume=resume, time_budget_s=budget, as_json=as_json))


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="results directories", metavar="DIR...")],
    update_readme: Annotated[
        bool, typer.Option("--update-readme", help="put the newest results into README.md")
    ] = False,
    price_per_hour: Price = None,
    as_json: AsJson = False,
) -> None:
    """Build the tables, print the summary, write DIR/report.html."""
    from bench.report import run_report

    code = run_report(
        directories, update_readme=update_readme, price_per_hour=price_per_hour, as_json=as_json
    )
    raise typer.Exit(code)


@app.command()
def compare(
    directory: Annotated[Path, typer.Argument(help="results directory", metavar="DIR")],
    baseline: Annotated[str | None, typer.Option(help="arm to compare with", metavar="STACK")] = None,
    price_per_hour: Price = None,
    as_json: AsJson = False,
) -> None:
    """Every arm's ratio to a baseline, with its interval."""
    from bench.report import run_compare

    raise typer.Exit(
        run_compare(directory, baseline=baseline, price_per_hour=price_per_hour, as_json=as_json)
    )


@app.command()
def tokenize(
    corpus: Annotated[str, typer.Argument(help="file, directory or URL of a store (s3, gs, http)")],
    out: Annotated[Path, typer.Option(help="new directory; with --index-only a cache", metavar="DIR")],
    tokenizer: Tokenizer = None,
    index_only: Annotated[
        bool, typer.Option("--index-only", help="only the manifest and the document index of a loader")
    ] = False,
    shuffle: Annotated[
        str, typer.Option(help="global: index every document", metavar="none|block|global")
    ] = "none",
    text_field: Annotated[str, typer.Option(help="key or column of the text")] = "text",
    skip_errors: Annotated[bool, typer.Option(help="leave out what cannot be read, and count it")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a corpus as pre-tokenized shards, in its order, or index it."""
    from bench.shards import run_tokenize

    code = run_tokenize(
        corpus, out, tokenizer=tokenizer, index_only=index_only, shuffle=shuffle, field=text_field,
        skip_errors=skip_errors, as_json=as_json,
    )  # fmt: skip
    raise typer.Exit(code)


@app.command()
def status(
    directory: Annotated[Path, typer.Argument(help="results directory", metavar="DIR")],
    as_json: AsJson = False,
) -> None:
    """What a run in DIR has finished and what is left."""
    from bench.run import execute as running

    raise typer.Exit(running.show_status(directory, as_json=as_json))


def settings_of(
    settings: list[str] | None, corpus: Path | None, tokenizer: Path | None, more: dict[str, Any]
) -> list[str]:
    """`--corpus`, `--tokenizer` and the like are shorthands of `--set`."""
    paths = {k: str(v.resolve()) for k, v in (("corpus", corpus), ("tokenizer", tokenizer)) if v is not None}
    extra = {**paths, **{k: v for k, v in more.items() if v is not None}}
    return [*(settings or []), *(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in extra.items())]


def guarded(command: Callable[[], Any]) -> int:
    """Errors the user can correct become a message and exit code 2; a full disk 1; Ctrl-C 130."""
    try:
        command()
    except UserError as error:
        print(f"stackbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stackbench: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"stackbench: {where}{error.strerror or error}: what was measured stays", file=sys.stderr)
        return 1
    except SystemExit as end:
        return int(end.code or 0) if isinstance(end.code, (int, type(None))) else 2
    return 0


def main() -> None:
    sys.exit(guarded(lambda: app(standalone_mode=True)))


if __name__ == "__main__":
    main()
