"""What each loader costs beside its time, and what may be quoted of it."""

from __future__ import annotations

from typing import Any

import pytest

from bench import store
from bench.analyze import Analysis, analyze
from bench.analyze import loading as loaders
from bench.report import words
from tests.fixtures.loads import STAGES, LoadResults


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    out = tmp_path_factory.mktemp("loads") / "both"
    return analyze(store.load([LoadResults(train=True).write(out)]))


def one(analysis: Analysis, arm: str, tokenizer: str = "fast", cores: int = 2) -> loaders.Loading:
    (row,) = [
        r for r in analysis.loading
        if (r.arm, r.tokenizer, r.axes["cores"]) == (arm, tokenizer, cores)
    ]  # fmt: skip
    return row


def test_rates_first_batch_and_memory(both: Analysis) -> None:
    row = one(both, "torch-dataloader")
    case = next(c for c in both.cases if c.case_id == row.case_id)
    assert case.tokens_per_s.estimate == pytest.approx(20e6, rel=0.05)
    assert row.rate_in_all.estimate is not None and row.rate_in_all.estimate < case.tokens_per_s.estimate
    assert row.first_batch_s.estimate == 0.05 and row.first_batch_s.low is not None
    assert row.pss_bytes.estimate == 2e8, "of timed observations, not of those apart"
    assert row.cpu_s_per_mtok.estimate == pytest.approx(0.1, rel=0.05)
    assert case.mfu.estimate is None and case.compile_cold_s is None


def test_what_was_observed_apart(both: Analysis) -> None:
    row = one(both, "memmap", "hf", 1)
    assert row.stages == STAGES and list(row.stages) == list(STAGES)
    assert (row.prepare_s, row.consumer_us_per_batch, row.gil_slowdown) == (12.5, 21.0, 0.12)
    assert one(both, "python-single").prepare_s is None
    assert (row.options, row.points_tried) == ("workers 2", 1)


def test_no_comparison_mixes_tokenizers(both: Analysis) -> None:
    axes = {(c.session, c.case_id): c.axes for c in both.cases}
    for comparison in both.comparisons:
        mine = axes[comparison.session, comparison.case_id]
        base = axes[comparison.session, comparison.baseline_case_id]
        assert mine == base
    assert {c.baseline for c in both.of("load").comparisons} == {"torch-dataloader"}
    assert {c.baseline for c in both.of("train").comparisons} == {"torch-eager"}


def test_sentences_name_the_tokenizer_and_what_was_done_before(both: Analysis) -> None:
    rows = loaders.claims(both.comparisons, both.cases, both.loading)
    assert len(rows) == 2 * 2 * 2 and all(row["run_ids"] for row in rows)
    told = [words.claim(row) for row in rows]
    assert all(text.startswith(("fast tokenizer: ", "hf tokenizer: ")) for text in told)
    single = [text for text in told if "tokenizer: python-single is" in text]  # late: the whole pass leads
    assert any("6 rounds; start included; after the first batch 4.0" in text for text in single), single
    assert all("; start included; after the first batch " in text for text in single)
    memmap = [text for text in told if "memmap" in text]
    assert all("memmap, after 12.5 s of work beforehand, is " in text for text in memmap) and memmap


def test_claims_without_an_interval_are_no_findings() -> None:
    row = {"arm": "a", "baseline": "b", "tokenizer": "hf", "ratio": 2.0, "low": None, "high": None,
           "n_rounds": 2, "prepare_s": None, "in_all": 1.5, "in_all_low": 1.2, "in_all_high": 1.8,
           "late": False}  # fmt: skip
    assert words.claim(row) == "hf tokenizer: a is 2.00× b (2 rounds, no interval: not a finding)"
    assert "no difference" in words.claim({**row, "low": 0.9, "high": 3.0, "n_rounds": 6})
    assert "no round" in words.claim({**row, "ratio": None})


def test_the_whole_pass_leads_where_much_of_it_is_the_start() -> None:
    row = {"arm": "a", "baseline": "b", "tokenizer": "hf", "ratio": 3.0, "low": 2.5, "high": 3.5,
           "n_rounds": 6, "prepare_s": None, "in_all": 1.0, "in_all_low": 0.9, "in_all_high": 1.1,
           "late": False}  # fmt: skip
    assert words.claim(row) == "hf tokenizer: a is 3.00× b (2.50–3.50, 6 rounds; start included 1.00×)"
    told = "(1.00×, 0.90–1.10, 6 rounds; start included; after the first batch 3.00×)"
    assert words.claim({**row, "late": True}) == (
        f"hf tokenizer: a and b: no difference larger than the noise {told}"
    )


def test_a_late_first_batch_is_told(both: Analysis) -> None:
    (note,) = [n for n in both.notes if "Before the first batch" in n]
    assert "fast tokenizer: python-single 50 %, " in note and "; hf tokenizer: " in note
    assert "torch-dataloader" not in note


def test_the_parts_of_an_analysis(both: Analysis) -> None:
    load, train = both.of("load"), both.of("train")
    assert len(load.cases) == 12 and len(train.cases) == 3
    assert len(load.cases) + len(train.cases) == len(both.cases)
    assert load.loading and not train.loading and not load.break_even and train.break_even
    assert not any("autotuning" in note for note in analyze_load_only_notes(load))


def analyze_load_only_notes(analysis: Analysis) -> list[str]:
    from bench.analyze import notes

    class Empty:
        def rows(self, name: str) -> list[dict[str, object]]:
            return []

    empty: Any = Empty()
    return notes.notes(empty, analysis.cases, analysis.comparisons, analysis.loading)
