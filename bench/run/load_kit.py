"""What loading cases need: text on disk in their format, a tokenizer, the ids it must give, a page cache.

Three texts a group, in one format and with one tokenizer: `main` is timed, `gate` is small and hard on
loaders, `short` (other text of the same kind) is for calibration and for what is observed apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import corpus, documents, ids, textfiles, textgen
from bench import plan as planning
from bench.run import tree
from stacks.load import spec

if TYPE_CHECKING:
    from bench.run.observe import Context, Request

Row = dict[str, Any]
NOT_STORED = ("files",)  # of a job: as many as the corpus has
MB = 1_000_000
GATE_BYTES = 4 * MB  # at most, and no more than what is timed
SHORT_BYTES = {"fast": 32 * MB, "hf": 4 * MB}
LARGEST_ID = 2**31 - 1
COLD_SHARE = 0.02  # of the pages: a page cache that keeps more of them is not cold
TEXT_OF = {"timed": "main", "breakdown": "main", "prepare": "main", "parity": "gate"}  # by kind; else short


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Documents of one kind: how to make them again, and a key that says which they are."""

    size: int  # bytes, about
    key: tuple[Any, ...]
    texts: Callable[[], Iterable[str]]
    facts: dict[str, Any]


# ------------------------------------------------------------------------------------------------- the input
def prepare(
    plan: planning.Plan, cases: Sequence[planning.Case], inputs: Path, cache_dir: Path, say: Any
) -> Row:
    """Texts, tokenizer and ids of a group on disk: the group's row of the session's `inputs`."""
    case, suite = cases[0], plan.suite
    given = {name: Path(suite[name]) if suite[name] else None for name in ("corpus", "tokenizer")}
    kinds = texts_of(case, suite["seed"], given["corpus"])
    sample = documents.documents_of(case.workload, kinds["main"].texts())
    vocab = spec.VOCAB if given["tokenizer"] is None else LARGEST_ID
    tokenizer = corpus.prepare_tokenizer(
        sample, vocab=vocab, out_dir=inputs, cache_dir=cache_dir, given=given["tokenizer"]
    )
    row: Row = {"tokenizer": tokenizer.path.name, "end": tokenizer.end, "texts": {}}
    for name, kind in kinds.items():
        say(f"text {name} of {case.group}")
        row["texts"][name] = text_row(case.axes["format"], name, kind, tokenizer, inputs, cache_dir)
    main = row["texts"]["main"]
    row["provenance"] = {
        "documents": main["documents"], "bytes": main["bytes"], "text_sha256": main["text_sha256"],
        "tokens": main["expected"]["tokens"] if main["expected"] else None, "seed": suite["seed"],
        **kinds["main"].facts, **tokenizer.facts,
    }  # fmt: skip
    return row


@lru_cache(maxsize=1)
def source() -> textgen.Source:
    """The generator's source, fitted once a process."""
    return textfiles.source_of()


def texts_of(case: planning.Case, seed: int, given: Path | None) -> dict[str, Text]:
    """main, gate and short."""
    size, made = case.axes["megabytes"] * MB, source()
    short = min(size, SHORT_BYTES[case.axes["tokenizer"]])
    mark = made.facts["fitted_sha256"]

    def generated(seed: int, size: int) -> Text:
        return Text(
            size=size, key=("synthetic", mark, seed, size), texts=lambda: textgen.documents(made, seed, size),
            facts={"corpus_kind": "generated text", **made.facts},
        )  # fmt: skip

    hard = min(size, GATE_BYTES)
    gate = Text(
        size=hard, key=("gate", mark, seed, hard), facts={},
        texts=lambda: textfiles.gate_texts(made, seed + 2, hard),
    )  # fmt: skip
    if case.workload == "load/synthetic":
        return {"main": generated(seed, size), "gate": gate, "short": generated(seed + 1, short)}
    return {"main": real(given, size), "gate": gate, "short": real(given, short)}


def real(given: Path | None, size: int) -> Text:
    """As much of the suite's corpus as there is, up to a size."""
    texts, facts = textfiles.real_texts(given, size)
    key = documents.documents_of("real", texts).sha256
    there = min(size, sum(map(len, texts)))
    return Text(size=there, key=("real", key, len(texts), size), texts=lambda: texts, facts=facts)


def text_row(
    format: str, name: str, kind: Text, tokenizer: corpus.Tokenizer, inputs: Path, cache_dir: Path
) -> Row:
    """One text in a format, linked into the inputs, with what its ids must be."""
    plain = textfiles.prepare(cache_dir, kind.key, "jsonl" if format == "tokens" else format, kind.texts,
                              kind.facts, kind.size)  # fmt: skip
    expected = None
    if name != "short" or format == "tokens":
        expected = ids.prepare(
            cache_dir, plain.text_sha256, kind.texts, tokenizer, hashes=name == "gate",
            shards=format == "tokens",
        )  # fmt: skip
        link(inputs, expected.directory)
    files = [f"{plain.directory.name}/{path.name}" for path in plain.files]
    if format == "tokens" and expected is not None:
        files = [f"{expected.directory.name}/shard-00000.tokens"]
    else:
        link(inputs, plain.directory)
    totals = {n: getattr(expected, n) for n in ("documents", "tokens", "total")} if expected else None
    return {
        "files": files, "documents": plain.documents, "bytes": plain.bytes, "text_sha256": plain.text_sha256,
        "expected": totals, "hashes": f"{expected.directory.name}/hashes.bin" if expected else None,
    }  # fmt: skip


def link(inputs: Path, directory: Path) -> None:
    """A name in the results directory for what lies in the cache: large texts are not copied."""
    place = inputs / directory.name
    if not place.exists():
        place.unlink(missing_ok=True)  # a link to what was cleared away
        place.symlink_to(directory.resolve(), target_is_directory=True)


def ready(row: Mapping[str, Any], inputs: Path) -> bool:
    """Whether what `prepare` put there is there still."""
    files = [name for text in row["texts"].values() for name in text["files"]]
    return all(Path(inputs, name).exists() for name in (*files, row["tokenizer"]))


# --------------------------------------------------------------------------------------------------- the job
def cpus(context: Context, case: planning.Case) -> list[int]:
    """As many of the session's CPUs as the axis `cores` says: the whole tree is bound to them."""
    return list(context.session["cpus"][: case.axes["cores"]])


def variables(job: Mapping[str, Any]) -> dict[str, str]:
    return {"TOKENIZERS_PARALLELISM": "true" if len(job["cpus"]) > 1 else "false"}


def job(context: Context, request: Request, directory: Path) -> Row:
    """The part of a job that is loading's own: see bench.protocol."""
    case, row = request.case, context.session["inputs"][request.case.group]
    inputs, name = context.out.resolve() / "inputs", TEXT_OF.get(request.kind, "short")
    text = row["texts"][name]
    return {
        "model": case.model, "values": 1,
        "files": [str(inputs / file) for file in text["files"]], "text": name, "format": case.axes["format"],
        "bytes": text["bytes"], "expected": text["expected"],
        "tokenizer": str(inputs / row["tokenizer"]), "end": row["end"],
        "cache": str(request.cache.resolve()), "scratch": str(directory / "scratch"),
        "keeps": request.kind in ("calibration", "consumer", "gil"),  # builds first what it keeps of its text
        "parity": {"out": str(directory / "documents.bin")} if request.kind == "parity" else None,
    }  # fmt: skip


def problem(job: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
    """How what a timed worker did is other work than the job asked for; empty if it is not."""
    found = {m["metric"]: m["value"] for m in messages if m["type"] == "metric"}
    share = found.get("page_cache_resident_share")
    if job["axes"]["page_cache"] == "cold" and (share is None or share > COLD_SHARE):
        kept = "it does not say what it keeps" if share is None else f"{share:.0%} of the files stayed in it"
        return f"unsupported: the page cache cannot be emptied here: {kept}"
    wanted, end = job["expected"], job["end"]
    if wanted is None:
        return ""
    padding = found.get("padding") or 0
    tokens, total = (found.get("tokens") or 0) - padding, (found.get("token_sum") or 0) - padding * end
    right = wanted["tokens"] + wanted["documents"], wanted["total"] + end * wanted["documents"]
    if (tokens, total) == right:
        return ""
    return (
        f"wrong tokens: {tokens:,.0f} without padding, sum {total:,.0f}; the corpus has {right[0]:,}, "
        f"sum {right[1]:,}"
    )


# ------------------------------------------------------------------------------------------- around a worker
class Watch(tree.Sampler):
    """The tree's memory, and what was in the page cache when it began."""

    def __init__(self, resident: float | None) -> None:
        super().__init__()
        self.resident = resident

    def end(self) -> list[Row]:
        row = {"type": "metric", "metric": "page_cache_resident_share", "value": self.resident, "unit": "1",
               "phase": "start", "source": "measured", "censored": False}  # fmt: skip
        return [*super().end(), row]


@contextlib.contextmanager
def watched(job: Mapping[str, Any]) -> Iterator[Watch]:
    """Around a worker's life: the page cache as its axis says, the tree's memory sampled from here."""
    places = [Path(file) for file in job["files"]]
    if job["axes"]["page_cache"] == "cold" and job["text"] == "main":
        files = tree.files_in([*places, Path(job["cache"])])
        tree.drop(files)
    else:
        files = tree.files_in(places)
        tree.warm(files)
    watch = Watch(tree.resident_share(files))
    try:
        yield watch
    finally:
        watch.stop()
