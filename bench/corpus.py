"""Real text in, token batches out: train or load a tokenizer, pack rows, keep the result.

By default the documents are the source files of the running Python's standard library. Heavy packages are
imported where they are used, so that `plan` stays fast and a cached result needs none of them.

    bounded      at most READ_BYTES of text (or BYTES_PER_TOKEN for each token needed, if more) is read, in
                 corpus order; the seed permutes those documents, and only as many as needed are tokenized
    packed       documents, each followed by end-of-text, form one stream; row k is tokens
                 [k (sequence + 1), (k + 1) (sequence + 1)) of it: windows that neither overlap nor leave gaps
    reproducible the order is that of sha256("seed:index"); BPE training adds up counts (in any order of
                 threads) and breaks ties by token id over a sorted alphabet, so no thread count changes it
    cached       under a key of everything that determines the content, each file beside its sha256, which is
                 verified on use; a writer renames a finished file into place, so that two may run at once
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bench.documents import MIB, TRAINER_BYTES, Documents, missing, package, read_documents, shown, typed
from bench.errors import UserError

READ_BYTES: Final = TRAINER_BYTES
BYTES_PER_TOKEN: Final = 16  # far more than text takes
TRAIN_PER_ENTRY: Final = 256  # bytes of text that the trainer gets for each entry of the vocabulary …
TRAIN_LEAST: Final = 4 * MIB  # … but so many at least
END_OF_TEXT: Final = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # the first that a tokenizer has
BYTE_LEVEL_VOCAB: Final = 257  # 256 bytes and end-of-text
FORMAT: Final = 1  # of the cache: raise it when the content for the same input changes

Facts = dict[str, str | int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Batches:
    """Token batches in a file: raw little-endian int32, `shape` = [n, batch, sequence + 1].

    `provenance` holds hashes, counts and rules, and neither paths nor names of files, users or hosts.
    """

    path: Path
    sha256: str
    shape: tuple[int, int, int]
    provenance: dict[str, str | int]


def prepare_batches(
    *,
    n: int,
    batch: int,
    sequence: int,
    vocab: int,
    seed: int,
    out_dir: Path,
    cache_dir: Path,
    corpus: Path | None = None,
    tokenizer: Path | None = None,
) -> Batches:
    """Write `n` batches of `batch` rows of `sequence + 1` tokens (int32, each below `vocab`) into `out_dir`.

    `corpus` is a directory, .jsonl, .jsonl.zst or .parquet (None: the standard library's sources),
    `tokenizer` a tokenizer.json (None: a byte-level BPE of at most `vocab` entries, trained on the corpus).
    A second call with equal content only reads and hashes the corpus.

    Raises UserError for a corpus that is missing, empty, malformed or too small, a tokenizer that is none,
    has no end-of-text token or has ids of `vocab` or more, and for a package that is not installed.
    """
    if min(n, batch, sequence) < 1:
        raise ValueError(f"n, batch and sequence are at least 1, not {n}, {batch}, {sequence}")
    if tokenizer is None and vocab < BYTE_LEVEL_VOCAB:
        raise UserError(
            f"vocabulary of {vocab}: a byte-level tokenizer has at least {BYTE_LEVEL_VOCAB} entries",
            next_command="--tokenizer TOKENIZER.json with a smaller vocabulary, or a larger model vocabulary",
        )
    shape = (n, batch, sequence + 1)
    needed = n * batch * (sequence + 1)
    given = None if tokenizer is None else _tokenizer_bytes(tokenizer)
    documents = read_documents(corpus, max(READ_BYTES, BYTES_PER_TOKEN * needed))
    version = _version("tokenizers")
    origin = f"given:{_sha256(given)}" if given is not None else f"trained:{documents.trainable_sha256}"
    key = _key("batches", documents.sha256, origin, version, *shape, vocab, seed)
    entry = cache_dir / "batches" / key
    kept = _load(entry)
    if kept is not None:
        _, facts, sha256 = kept
    else:
        place, trained = f"--tokenizer {shown(tokenizer or Path())}", Facts()
        if given is None:
            place = "the trained tokenizer"
            given, trained = _trained(documents, vocab, cache_dir, version)
        tok, end, found = _open_tokenizer(given, vocab, place)
        data, used = _pack(tok, end, documents, needed, seed, place)
        facts = {f"tokenizer_{name}": fact for name, fact in (found | trained).items()}
        facts |= {"tokenizer_sha256": _sha256(given), "tokenizers": version, "documents_used": used}
        sha256 = _save(entry, data, facts)
    path = _place(entry.with_suffix(".bin"), out_dir / f"batches-{key[:16]}.bin", sha256)
    kind = "given" if tokenizer else "byte-level BPE trained on the corpus"
    provenance = _provenance(documents) | {"tokenizer_kind": kind, "seed": seed} | facts
    return Batches(path=path, sha256=sha256, shape=shape, provenance=provenance)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizer:
    """A tokenizer.json in a file, its end-of-text, and what is known of its origin."""

    path: Path
    sha256: str
    end: int
    facts: Facts


def prepare_tokenizer(
    documents: Documents, *, vocab: int, out_dir: Path, cache_dir: Path, given: Path | None = None
) -> Tokenizer:
    """A given tokenizer.json, else one trained on the documents, as a file in `out_dir`.

    Raises UserError as `prepare_batches` does.
    """
    version = _version("tokenizers")
    place, trained = f"--tokenizer {shown(given or Path())}", Facts()
    if given is not None:
        data = _tokenizer_bytes(given)
    else:
        place = "the trained tokenizer"
        data, trained = _trained(documents, vocab, cache_dir, version)
    _, end, found = _open_tokenizer(data, vocab, place)
    sha256 = _sha256(data)
    path = out_dir / f"tokenizer-{sha256[:16]}.json"
    if not (path.is_file() and _sha256(path.read_bytes()) == sha256):
        _write(path, lambda temporary: temporary.write_bytes(data))
    facts: Facts = {f"tokenizer_{name}": fact for name, fact in (found | trained).items()}
    kind = "given" if given is not None else "byte-level BPE trained on the corpus"
    facts |= {"tokenizer_kind": kind, "tokenizer_sha256": sha256, "tokenizers": version}
    return Tokenizer(path=path, sha256=sha256, end=end, facts=facts)


def _provenance(documents: Documents) -> Facts:
    return {
        "corpus_kind": documents.kind,
        "corpus_documents": len(documents.texts),
        "corpus_bytes": documents.bytes,
        "corpus_sha256": documents.sha256,
        "corpus_read": "whole" if documents.whole else "first documents, up to a limit",
        "corpus_files_skipped": documents.files_skipped,
        "corpus_documents_empty": documents.empty,
        "packing": "documents in the order of sha256(seed:index), end-of-text after each, disjoint rows",
    }


# ----------------------------------------------------------------------------------------- tokenizer
def _tokenizer_bytes(path: Path) -> bytes:
    place, valid = f"--tokenizer {shown(path)}", ["a tokenizer.json of the `tokenizers` library"]
    if not path.exists():
        missing(path, place, valid)
    if not path.is_file():
        inside = f"--tokenizer {typed(path / 'tokenizer.json')}"
        raise UserError(f"{place}: not a file", valid=valid, next_command=inside)
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}", valid=valid) from error


def _trained(documents: Documents, vocab: int, cache_dir: Path, version: str) -> tuple[bytes, Facts]:
    """(tokenizer.json, facts): byte-level BPE of at most `vocab` entries, fewer where the pairs run out.

    Trained on documents in the order of sha256("train:index") up to `TRAIN_PER_ENTRY` bytes for each entry.
    """
    entry = cache_dir / "tokenizers" / _key("tokenizer", documents.trainable_sha256, vocab, version)
    if (kept := _load(entry)) is not None:
        return kept[0], kept[1]
    tokenizers = package("tokenizers", "to tokenize text")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT[0]],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    share, size = max(TRAIN_LEAST, TRAIN_PER_ENTRY * vocab), 0
    sample: list[str] = []
    for i in _order("train", documents.trainable):
        if size >= share:
            break
        sample.append(documents.texts[i])
        size += len(sample[-1].encode())
    tok.train_from_iterator(sample, trainer)
    data: bytes = tok.to_str().encode()
    facts: Facts = {"trained_documents": len(sample), "trained_bytes": size}
    _save(entry, data, facts)
    return data, facts


def _open_tokenizer(data: bytes, vocab: int, place: str) -> tuple[Any, int, Facts]:
    """(tokenizer, id of end-of-text, facts). Text in a document never becomes a special token."""
    tokenizers = package("tokenizers", "to tokenize text")
    try:
        tok = tokenizers.Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises plain Exception
        message = f"{place}: not a tokenizer.json: {str(error).partition(chr(10))[0]}"
        raise UserError(message, valid=["a tokenizer.json of the `tokenizers` library"]) from error
    ids = tok.get_vocab(with_added_tokens=True)
    largest = max(ids.values(), default=0)
    if largest >= vocab:
        message = f"{place}: has ids up to {largest}, the model a vocabulary of {vocab}"
        raise UserError(message, next_command="a model of that vocabulary, or another --tokenizer")
    if dropout := getattr(tok.model, "dropout", None):
        message = f"{place}: has a dropout of {dropout}, so its tokens are random"
        raise UserError(message, next_command='set "dropout": null in its model')
    end = next((token for token in END_OF_TEXT if token in ids), None)
    if end is None:
        special = ", ".join(t.content for t in tok.get_added_tokens_decoder().values() if t.special)
        message = f"{place}: has no end-of-text token; its special tokens: {special or 'none'}"
        raise UserError(message, valid=END_OF_TEXT, next_command="another --tokenizer, or none")
    tok.no_truncation()
    tok.no_padding()
    tok.encode_special_tokens = True
    return tok, ids[end], {"vocab": len(ids), "end_of_text": end}


# ------------------------------------------------------------------------------------------- packing
def _pack(tok: Any, end: int, documents: Documents, needed: int, seed: int, place: str) -> tuple[bytes, int]:
    """(`needed` tokens as little-endian int32, documents used), tokenizing only until there are enough."""
    import numpy as np

    order = _order(str(seed), len(documents.texts))
    tokens, have, used = np.empty(needed, "<i4"), 0, 0
    while have < needed and used < len(order):
        group: list[str] = []
        size, wanted = 0, min(4 * MIB, 4 * (needed - have))
        for i in order[used:]:
            if size >= wanted:
                break
            group.append(documents.texts[i])
            size += len(group[-1])
        try:
            encoded = tok.encode_batch_fast(group, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{place}: cannot tokenize the corpus: {error}") from error
        for encoding in encoded:
            ids = [*encoding.ids, end][: needed - have]
            tokens[have : have + len(ids)] = ids
            have += len(ids)
            used += 1
            if have == needed:
                break
    if have < needed:
        part = "" if documents.whole else f" (the first {documents.bytes} bytes, which is all that is read)"
        raise UserError(
            f"{documents.place}: too small: {needed} tokens are needed, {have} are in it{part}",
            next_command="--corpus PATH with more text, a smaller batch or sequence, or fewer batches",
        )
    return tokens.tobytes(), used


def _order(seed: str, count: int) -> list[int]:
    """A permutation that any language can repeat: indices by sha256("seed:index")."""
    return sorted(range(count), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())


# --------------------------------------------------------------------------------------------- cache
def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _key(*parts: object) -> str:
    return _sha256(json.dumps([FORMAT, *map(str, parts)]).encode())


def _load(entry: Path) -> tuple[bytes, Facts, str] | None:
    """(content, its facts, sha256), or None where it is missing or does not have the recorded hash."""
    try:
        record = json.loads(entry.with_suffix(".json").read_bytes())
        data = entry.with_suffix(".bin").read_bytes()
        sha256, facts = record["sha256"], record["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (data, facts, sha256) if _sha256(data) == sha256 else None


def _save(entry: Path, data: bytes, facts: Facts) -> str:
    """Keep the content, then the record that makes it valid; returns its sha256."""
    sha256 = _sha256(data)
    record = json.dumps({"sha256": sha256, "facts": facts}, indent=1).encode()
    _write(entry.with_suffix(".bin"), lambda temporary: temporary.write_bytes(data))
    _write(entry.with_suffix(".json"), lambda temporary: temporary.write_bytes(record))
    return sha256


def _place(source: Path, target: Path, sha256: str) -> Path:
    """A hard link, or a copy on another file system, of a cached file; kept where it is there already."""
    if not (target.is_file() and _sha256(target.read_bytes()) == sha256):

        def link(temporary: Path) -> None:
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)

        _write(target, link)
    return target


def _write(target: Path, fill: Callable[[Path], object]) -> None:
    """Atomically: a temporary name beside it, fsync, rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as folder:
        temporary = Path(folder, target.name)
        fill(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        message = f"the package {name!r} is needed to tokenize text"
        raise UserError(message, next_command=f"pip install {name}") from error
