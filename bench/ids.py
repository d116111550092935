"""The ids that a corpus must give: every document through Hugging Face `tokenizers`, once, kept.

What loaders are judged by: for the gate the hash of every document's ids; for a timed run the number of
tokens and their sum. Text never becomes a special token and nothing is added. Empty documents have no ids and
are left out. Pre-tokenized shards are the same ids on disk (layout: stacks/native/loader/src/shards.rs).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from bench.corpus import Tokenizer
from bench.documents import MIB, package
from bench.errors import UserError
from bench.textfiles import Count, sync

if TYPE_CHECKING:
    import numpy as np

FORMAT: Final = 1  # of the cache
CHUNK_BYTES: Final = 2 * MIB  # of text tokenized at a time
HASH_BYTES: Final = 16  # BLAKE2b-128 of a document's int32 ids, little-endian


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ids:
    """`tokens` and `total` (their sum) leave end-of-text out; `documents` are those that have ids."""

    directory: Path
    documents: int
    tokens: int
    total: int

    @property
    def hashes(self) -> Path:
        """uint8 [documents, HASH_BYTES], in corpus order; there where it was asked for."""
        return self.directory / "hashes.bin"


def prepare(
    cache: Path, text_sha256: str, texts: Callable[[], Iterable[str]], tokenizer: Tokenizer, *,
    hashes: bool = False, shards: bool = False,
) -> Ids:  # fmt: skip
    """The ids of a corpus; `hashes` and `shards` say what is kept beside the totals."""
    key = json.dumps([FORMAT, text_sha256, tokenizer.sha256, tokenizer.facts["tokenizers"], hashes, shards])
    entry = cache / "ids" / hashlib.sha256(key.encode()).hexdigest()[:24]
    if (found := load(entry)) is not None:
        return found
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".new-") as folder:
        place = Path(folder, "ids")
        place.mkdir()
        count = Count()
        passed = (text for text, _ in count.over(texts()))
        make(place, passed, tokenizer, hashes=hashes, shards=shards)
        if count.digest.hexdigest() != text_sha256:
            raise UserError(
                f"the text in {cache} is not what is generated now: it was written by another version",
                next_command=f"rm -r {cache / 'text'}",
            )
        for path in place.iterdir():
            sync(path)
        if load(entry) is None:
            place.rename(entry)
    found = load(entry)
    assert found is not None, "what was written can be read"
    return found


def load(entry: Path) -> Ids | None:
    try:
        row = json.loads((entry / "ids.json").read_text())
        whole = all((entry / name).stat().st_size == size for name, size in row["files"].items())
        counts = {name: int(row[name]) for name in ("documents", "tokens", "total")}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Ids(directory=entry, **counts) if whole else None


def make(place: Path, texts: Iterable[str], tokenizer: Tokenizer, *, hashes: bool, shards: bool) -> None:
    documents = tokens = total = 0
    hashed = (place / "hashes.bin").open("wb") if hashes else None
    shard = Shard(place, tokenizer.end) if shards else None
    for ids in tokenized(texts, tokenizer):
        if not len(ids):
            continue
        documents += 1
        tokens += len(ids)
        total += int(ids.sum(dtype="int64"))
        if hashed is not None:
            hashed.write(hashlib.blake2b(ids.tobytes(), digest_size=HASH_BYTES).digest())
        if shard is not None:
            shard.add(ids)
    if hashed is not None:
        hashed.close()
    if shard is not None:
        shard.close(documents, tokens + documents, tokenizer)
    sizes = {path.name: path.stat().st_size for path in place.iterdir()}
    row = {"documents": documents, "tokens": tokens, "total": total, "files": sizes}
    (place / "ids.json").write_text(json.dumps(row))


def tokenized(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """int32 ids of every document, in order."""
    import numpy as np

    library: Any = package("tokenizers", "to tokenize text")
    tok = library.Tokenizer.from_file(str(tokenizer.path))
    tok.no_truncation()
    tok.no_padding()
    tok.encode_special_tokens = True
    group: list[str] = []
    size = 0

    def flush() -> Iterator[np.ndarray]:
        for encoding in tok.encode_batch_fast(group, add_special_tokens=False):
            yield np.array(encoding.ids, "<i4")

    for text in texts:
        group.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            yield from flush()
            group, size = [], 0
    yield from flush()


class Shard:
    """`.tokens`: int32, end-of-text after each document; `.tokens.ends`: uint64, where each document ends."""

    def __init__(self, place: Path, end: int) -> None:
        import numpy as np

        self.place, self.end, self.position = place, np.array([end], "<i4").tobytes(), 0
        self.tokens = (place / "shard-00000.tokens").open("wb")
        self.ends = (place / "shard-00000.tokens.ends").open("wb")

    def add(self, ids: np.ndarray) -> None:
        self.tokens.write(ids.tobytes() + self.end)
        self.position += len(ids) + 1
        self.ends.write(self.position.to_bytes(8, "little"))

    def close(self, documents: int, tokens: int, tokenizer: Tokenizer) -> None:
        """The index; hashes by BLAKE3 are `stackbench tokenize`'s, and no reader here asks for them."""
        self.tokens.close()
        self.ends.close()
        shard = {"file": "shard-00000.tokens", "documents": documents, "tokens": tokens, "blake3": ""}
        index = {"format": "stackbench-tokens", "version": 1, "end": tokenizer.end, "tokenizer": "",
                 "shards": [shard]}  # fmt: skip
        (self.place / "index.json").write_text(json.dumps(index))
