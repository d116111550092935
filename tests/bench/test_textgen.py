"""Generated text: seeded, as varied as real text, new words at the fitted rate."""

from __future__ import annotations

import math
import re
import statistics
from itertools import islice

import pytest

from bench import documents, textgen


@pytest.fixture(scope="module")
def source() -> textgen.Source:
    return textgen.fit(documents.read_documents(None, 3_000_000).texts)


def test_the_same_seed_gives_the_same_text(source: textgen.Source) -> None:
    one, again = (list(textgen.documents(source, 7, 300_000)) for _ in range(2))
    assert one == again
    assert one[:20] != list(islice(textgen.documents(source, 8, 300_000), 20))
    longer = list(textgen.documents(source, 7, 600_000))
    assert longer[: len(one) - 1] == one[:-1], "more text begins with the same documents"


def test_sizes(source: textgen.Source) -> None:
    texts = list(textgen.documents(source, 0, 8_000_000))
    sizes = [len(text.encode()) for text in texts]
    assert 8_000_000 <= sum(sizes) <= 8_000_000 + textgen.LARGEST + 100
    assert min(sizes) >= 1 and max(sizes) <= textgen.LARGEST + 1000
    assert 1700 < statistics.median(sizes) < 2400
    assert sum(size > 20_000 for size in sizes) > 10
    assert all(texts)


def test_new_words_come_at_the_fitted_rate(source: textgen.Source) -> None:
    """Between the first and the second half of a million words, against K beta n^(beta - 1)."""
    words: list[str] = []
    for text in textgen.documents(source, 1, 40_000_000):
        words += re.findall(r"\w+", text)
        if len(words) >= 1_000_000:
            break
    half = len(words) // 2
    new = len(set(words)) - len(set(words[:half]))
    k, beta = source.facts["heaps_k"], source.facts["heaps_beta"]
    expected = k * (len(words) ** beta - half**beta)
    assert 0.6 < new / expected < 1.5, (new, expected)


def test_frequent_words_are_as_frequent_as_in_real_text(source: textgen.Source) -> None:
    real = re.findall(r"\w+", "\n".join(documents.read_documents(None, 3_000_000).texts))
    made = re.findall(r"\w+", "\n".join(textgen.documents(source, 3, 3_000_000)))
    for word in ("self", "the", "def", "return"):
        share = real.count(word) / len(real)
        assert math.isclose(made.count(word) / len(made), share, rel_tol=0.1), word


def test_facts_show_lexicon_and_rate(source: textgen.Source) -> None:
    assert source.facts["lexicon_words"] > 1000 and 0 < source.facts["tail_share"] < 0.5
    assert 0.4 < source.facts["heaps_beta"] < 0.9 and source.facts["heaps_k"] > 0


def test_heaps_of_words_that_never_repeat() -> None:
    k, beta, rate = textgen.heaps([str(i) for i in range(40_000)])
    assert beta == 0.9, "held below 1"
    assert rate == pytest.approx(1, rel=0.01) and k > 0
