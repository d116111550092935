"""Ids are those of Hugging Face `tokenizers`, whatever the text, the family of tokenizer and the engine."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import FAMILIES, write_lines

KINDS = ("code", "prose", "scripts", "random", "repeats")


def documents_of(loader: Any) -> list[list[int]]:
    """Ids of each document, without its end."""
    stream: list[int] = []
    for batch in loader:
        tokens, lengths = np.asarray(batch.tokens), np.asarray(batch.lengths)
        for row, length in zip(tokens, lengths, strict=True):
            stream.extend(row[:length].tolist())
    found: list[list[int]] = [[]]
    for token in stream:
        found[-1].append(token)
        if token == loader.end:
            found[-1].pop()
            found.append([])
    assert found.pop() == []
    return found


@pytest.mark.parametrize("engine", ["fast", "hf", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ids(
    native: Any,
    texts: dict[str, list[str]],
    tokenizers: dict[str, Path],
    tmp_path: Path,
    family: str,
    engine: str,
) -> None:
    hf = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tokenizers[family]))
    hf.encode_special_tokens = True  # text never becomes a special token
    for kind in KINDS:
        path = write_lines(tmp_path / kind / "a.jsonl", texts[kind])
        if (family, engine) == ("metaspace", "fast"):
            with pytest.raises(ValueError, match="unsupported pre-tokenizer type: Metaspace"):
                native.Loader(path, tokenizers[family], batch=4, sequence=512, engine=engine)
            return
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loader = native.Loader(path, tokenizers[family], batch=4, sequence=512, engine=engine)
        fell_back = any("tokenizers is used" in str(w.message) for w in said)
        assert fell_back == (family == "metaspace" and engine == "auto")
        assert loader.engine.startswith("tokenizers" if engine == "hf" or fell_back else "fastokens")
        expected = [encoding.ids for encoding in hf.encode_batch(texts[kind], add_special_tokens=False)]
        for text, ids, right in zip(texts[kind], documents_of(loader), expected, strict=True):
            assert ids == right, f"{family}, {kind}, {loader.engine}: {text[:80]!r}"


def test_a_tokenizer_that_the_fast_engine_cannot_read(
    native: Any, corpus: Path, documents: list[str], tmp_path: Path
) -> None:
    hf = pytest.importorskip("tokenizers")
    tokenizer = hf.Tokenizer(hf.models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    special = ["[UNK]", "<eos>"]
    trainer = hf.trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.save(str(path := tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        native.Loader(corpus, path, batch=2, sequence=64, engine="fast")
    with pytest.warns(RuntimeWarning, match="tokenizers is used"):
        loader = native.Loader(corpus, path, batch=2, sequence=64)
    assert loader.engine.startswith("tokenizers ")
    assert documents_of(loader) == [e.ids for e in tokenizer.encode_batch(documents)]


def test_truncation_and_padding_of_a_tokenizer_are_not_for_documents(
    make: Callable[..., Any], tokenizer: Path, documents: list[str], tmp_path: Path
) -> None:
    content = json.loads(tokenizer.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    (path := tmp_path / "tokenizer.json").write_text(json.dumps(content))
    expected = documents_of(make())
    assert sum(map(len, expected)) > 3 * len(documents)
    assert documents_of(make(tokenizer=path)) == expected == documents_of(make(tokenizer=path, engine="hf"))


def test_the_end_of_text_can_be_named(make: Callable[..., Any], tokenizer: Path) -> None:
    vocabulary = json.loads(tokenizer.read_text())["model"]["vocab"]
    assert make(end_of_text="a").end == vocabulary["a"]
    with pytest.raises(ValueError, match="no end-of-text token in the tokenizer; looked for <none>"):
        make(end_of_text="<none>")
