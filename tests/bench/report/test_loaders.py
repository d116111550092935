"""What a reader sees of loaders: the terminal at every width, a page of loaders alone and one with both."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bench import store
from bench.analyze import Analysis, analyze
from bench.report import html, readme, terminal
from bench.report.figures import loader_rate
from bench.store import Tables
from tests.bench.report.test_page import Checker
from tests.fixtures.loads import LoadResults

Read = tuple[Tables, Analysis]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Read:
    bad = {"python-single": ("not comparable", "parity: documents: 1 of 9 are missing")}
    out = LoadResults(gates=bad, cores=(2,)).write(tmp_path_factory.mktemp("loads") / "alone")
    tables = store.load([out])
    return tables, analyze(tables)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Read:
    tables = store.load([LoadResults(train=True).write(tmp_path_factory.mktemp("loads") / "both")])
    return tables, analyze(tables)


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_terminal(both: Read, width: int) -> None:
    text = io.StringIO()
    terminal.show_report(Console(file=text, width=width), *both)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    words = " ".join(text.getvalue().split())
    assert (
        "fast tokenizer: python-single is " in words
        and "after the first batch 4.0" in words
        and "hf tokenizer: " in words
    )
    assert "tokens/s" in words, "training's table is there too"
    assert ("CPU s/M" in words) and ("in all" in words)


def page(read: Read) -> str:
    text = html.page(*read)
    checker = Checker()
    checker.feed(text)
    assert len(checker.ids) == len(set(checker.ids)) and not checker.outside
    assert not {"script", "img"} & set(checker.tags)
    return text


def test_a_page_of_loaders_alone(alone: Read) -> None:
    text = page(alone)
    assert "<h1>input-quick: the same batches from every loader</h1>" in text
    for words in ("MFU", "compile, cold", "training step", "Compiling", "ms a step"):
        assert words not in text.split("<body>")[1], words
    for words in ("Tokens a second, by tokenizer", "Loaders: how many times as fast",
                  "Where the CPU time goes",
                  "Memory of the process tree", "The price of the interpreter", "Time to the first batch",
                  "parity: documents: 1 of 9 are missing", "Parity: are these the corpus"):  # fmt: skip
        assert words in text, words
    assert "Scaling over cores" not in text, "one number of cores is no scaling"


def test_a_page_of_both(both: Read) -> None:
    text = page(both)
    assert "the same training step on every stack and the same batches from every loader" in text
    assert text.index("Results of training") < text.index("Results of loaders")
    assert "Scaling over cores" in text and "MFU" in text
    assert text.count('class="verdicts"') == 1


def test_the_readmes_block_has_a_table_for_each_kind(both: Read) -> None:
    block = readme.block(*both)
    assert "fast tokenizer: python-single is " in block and "after the first batch 4.0" in block
    assert "| workload | arm | ms a step |" in block and "| workload | arm | Mtok/s | in all |" in block
    rows = [line for line in block.splitlines() if line.startswith("| load/synthetic")]
    assert len(rows) == 12 and all(line.count("|") == 9 for line in rows)


def test_what_is_off_the_scale_stands_in_the_table_alone(both: Read) -> None:
    load = both[1].of("load")
    assert {case.arm for case in loader_rate.on_scale(load)} == {"python-single", "torch-dataloader"}
    assert {case.arm for case in load.cases} > {"memmap"}
