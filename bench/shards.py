"""`stackbench tokenize`: a corpus as pre-tokenized shards, or only its manifest and document index."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from bench.errors import UserError, did_you_mean

SHUFFLES = ("none", "block", "global")


def native() -> Any:
    """The Rust loader's module. Raises UserError where it is not installed."""
    try:
        import stackbench_native
    except ImportError:
        raise UserError(
            "the Rust loader (stackbench-native) is not installed here",
            next_command="install Rust (cargo) and then: make setup",
        ) from None
    return stackbench_native


def run_tokenize(
    corpus: str, out: Path, *, tokenizer: Path | None, index_only: bool, shuffle: str, field: str,
    skip_errors: bool, as_json: bool,
) -> int:  # fmt: skip
    """Writes `out`: shards with their index, or with `index_only` what a loader keeps in its `cache`.

    Raises UserError for input that can be corrected; nothing that lies in `out` is changed.
    """
    if shuffle not in SHUFFLES:
        valid = list(SHUFFLES)
        raise UserError(f"--shuffle {shuffle}{did_you_mean(shuffle, valid)}", valid=valid)
    loader = native()
    started = time.monotonic()
    with corrected(f"stackbench tokenize {corpus} --out DIR"):
        if index_only:
            manifest, blocks, documents = loader.index(corpus, out, shuffle=shuffle, text_field=field)
            told: dict[str, Any] = {"manifest": manifest, "blocks": blocks, "documents": documents or None}
        else:
            used = tokenizer_of(corpus, tokenizer)
            told = written(loader, corpus, out, used, field, skip_errors, as_json)
            shutil.copyfile(used, out / "tokenizer.json")  # whoever reads the shards can decode them
    told |= {"out": str(out), "seconds": time.monotonic() - started}
    if as_json:
        print(json.dumps(told))
    elif index_only:
        counted = f", {documents} documents" if documents else ""
        print(f"{out}: manifest {manifest[:12]}, {blocks} blocks{counted}, {told['seconds']:.2f} s")
    else:
        rate = told["tokens"] / max(told["seconds"], 1e-9) / 1e6
        print(
            f"{out}: {told['documents']} documents, {told['tokens']} tokens in {len(told['shards'])} shards, "
            f"{told['seconds']:.1f} s ({rate:.1f} Mtok/s)"
        )
    return 0


def written(
    loader: Any, corpus: str, out: Path, tokenizer: Path, field: str, skip_errors: bool, quiet: bool
) -> dict[str, Any]:
    """Shards, with a line of progress on a terminal."""
    show = sys.stderr.isatty() and not quiet

    def progress(tokens: int) -> None:
        print(f"\r{tokens / 1e6:.0f} Mtok", end="", file=sys.stderr, flush=True)

    header = loader.tokenize(
        corpus, tokenizer, out, text_field=field, on_error="skip" if skip_errors else "error",
        progress=progress if show else None,
    )  # fmt: skip
    if show:
        print("\r", end="", file=sys.stderr)
    totals = {name: sum(shard[name] for shard in header["shards"]) for name in ("documents", "tokens")}
    return {**totals, "tokenizer": header["tokenizer"], "end": header["end"], "shards": header["shards"]}


def tokenizer_of(corpus: str, given: Path | None) -> Path:
    """The user's tokenizer.json, or one trained on the corpus, as `run` does without --tokenizer."""
    if given is not None:
        return given
    if "://" in corpus:
        raise UserError(
            f"{corpus}: a tokenizer is trained on local text only",
            next_command=f"stackbench tokenize {corpus} --tokenizer TOKENIZER.json --out DIR",
        )
    from bench import corpus as texts
    from bench import documents
    from bench.run.execute import cache_dir
    from stacks.load.spec import VOCAB

    read = documents.read_documents(Path(corpus), texts.READ_BYTES)
    place = cache_dir() / "trained"
    return texts.prepare_tokenizer(read, vocab=VOCAB, out_dir=place, cache_dir=cache_dir()).path


@contextlib.contextmanager
def corrected(command: str) -> Any:
    """The loader's complaints about input, in our form."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(str(error), next_command=command) from None
