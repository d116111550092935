"""What the Python loaders share: parts cover the corpus once, packing closes and fills up, stages add up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import registry
from stacks.load import reading

DOCUMENTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=20)


def write_jsonl(path: Path, texts: list[str], newline_at_end: bool = True) -> Path:
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    path.write_bytes(b"\n".join(lines) + b"\n" * (newline_at_end and bool(lines)))
    return path


# ------------------------------------------------------------------------------------------ parts
@settings(deadline=None)
@given(texts=DOCUMENTS, size=st.integers(1, 300), newline=st.booleans())
def test_parts_of_jsonl_hold_every_document_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], size: int, newline: bool
) -> None:
    path = write_jsonl(tmp_path_factory.mktemp("parts") / "a.jsonl", texts, newline)
    parts = reading.parts([path], "jsonl", size)
    found = [text for part in parts for text in reading.read_part(part, "jsonl")]
    assert found == [text for text in texts if text] == list(reading.documents([path], "jsonl"))


@pytest.mark.parametrize("format", ["parquet", "text", "jsonl.zst"])
def test_parts_of_the_other_formats(format: str, tmp_path: Path) -> None:
    import polars as pl

    texts = [f"document {i}\r\n" * (i % 3) for i in range(20)]
    if format == "parquet":
        pl.DataFrame({"text": texts}).write_parquet(tmp_path / "a.parquet", row_group_size=5)
    elif format == "text":
        for i, text in enumerate(texts):
            (tmp_path / f"{i:02d}.txt").write_bytes(text.encode())
    else:
        plain = write_jsonl(tmp_path.parent / "plain.jsonl", texts).read_bytes()
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(plain))
    files = sorted(tmp_path.iterdir())
    whole = [text for text in texts if text]
    parts = reading.parts(files, format, 40)
    assert [text for part in parts for text in reading.read_part(part, format)] == whole
    assert list(reading.documents(files, format)) == whole
    if format == "text":
        assert list(reading.documents([tmp_path], "text")) == whole, "a directory stands for its files"


def test_shuffled_parts_are_a_permutation_that_the_seed_determines(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [str(i) for i in range(200)])

    def order(seed: int) -> list[str]:
        parts = reading.parts([path], "jsonl", 300, "block", seed)
        return [text for part in parts for text in reading.read_part(part, "jsonl", "block", seed)]

    assert order(1) == order(1) != order(2)
    assert sorted(order(1), key=int) == [str(i) for i in range(200)] != order(1)
    window = list(reading.windowed(map(str, range(200)), "block", 1, 16))
    assert sorted(window, key=int) == [str(i) for i in range(200)] != window


def test_a_truncated_zst_file_is_an_error(tmp_path: Path) -> None:
    data = zstandard.compress(b'{"text": "abc"}\n' * 10_000)
    (tmp_path / "a.jsonl.zst").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="truncated in the middle"):
        list(reading.documents([tmp_path / "a.jsonl.zst"], "jsonl.zst"))


def test_files_are_dealt_out_in_order() -> None:
    files = [Path(str(i)) for i in range(5)]
    assert reading.shares(files, 2) == [[files[0], files[2], files[4]], [files[1], files[3]]]
    assert reading.shares(files[:1], 2) == [[files[0]], []]


# ------------------------------------------------------------------------------------------ packing
@given(lengths=st.lists(st.integers(0, 40), max_size=30), cut=st.integers(1, 7))
def test_packing_closes_documents_and_fills_up(lengths: list[int], cut: int) -> None:
    documents = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
    packer, got = reading.Packer(2, 4, 0), []
    for start in range(0, len(documents), cut):
        group = documents[start : start + cut]
        ids = np.concatenate(group)
        offsets = np.cumsum([0, *map(len, group)])
        got += packer.add(reading.with_ends((ids, offsets), 0))
    got += packer.flush()
    want = [token for document in documents if len(document) for token in [*document.tolist(), 0]]
    stream = [token for batch in got for token in batch.ravel().tolist()]
    assert stream == want + [0] * packer.padding
    assert all(batch.shape == (2, 5) and batch.dtype == np.int32 for batch in got)
    assert packer.padding == len(stream) - len(want) < 10


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'slow'; valid: hf, fast"):
        reading.open_tokenizer(tmp_path, "slow")


# ------------------------------------------------------------------------------------------ stages
def test_stages_of_threads_and_processes_add_up(tmp_path: Path) -> None:
    stages = reading.Stages(tmp_path)
    with stages.of("read"):
        started = time.thread_time_ns()
        while time.thread_time_ns() - started < 20_000_000:
            pass
    threads = [threading.Thread(target=stages.add, args=("pack", 5)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    program = "import sys, pathlib\nfrom stacks.load.reading import Stages\n"
    program += "s = Stages(pathlib.Path(sys.argv[1])); s.add('pack', 100); s.save(); s.save()"
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, cwd=registry.ROOT, env=os.environ)
    total = stages.totals()
    assert total["pack"] == 120, "saving twice counts once"
    assert 20_000_000 <= total["read"] < 2_000_000_000
    assert stages.totals() == total


def test_the_clock_changes_no_item_and_begins_no_iterator_anew(tmp_path: Path) -> None:
    class Anew:
        """As litdata's StreamingDataset: `iter` begins the epoch again."""

        def __iter__(self) -> Anew:
            self.n = 0
            return self

        def __next__(self) -> int:
            self.n += 1
            if self.n > 200:
                raise StopIteration
            return self.n

    assert list(reading.clocked(Anew(), reading.Stages(tmp_path), "read")) == list(range(1, 201))
    assert list(reading.clocked(Anew(), None, "read")) == list(range(1, 201))


# ------------------------------------------------------------------------------------------ resume
PROGRAM = """
import json, sys
from pathlib import Path
from stacks.load import torch_dataloader_stateful as stack
from torchdata.stateful_dataloader import StatefulDataLoader

root, workers, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
job = dict(files=sorted(root.glob("*.jsonl")), format="jsonl", tokenizer=root / "tokenizer.json", engine="hf",
           end=0, batch=2, sequence=15, shuffle="none", seed=0, stages=None, documents=3, group=2,
           batched=False)

def loader():
    return StatefulDataLoader(stack.Packed(job), batch_size=None, num_workers=workers)

whole = [group.tolist() for group, _, _ in loader()]
first, head = loader(), []
for group, _, _ in first:
    head.append(group.tolist())
    if len(head) == stop:
        break
second = loader()
second.load_state_dict(first.state_dict())
tail = [group.tolist() for group, _, _ in second]
print(json.dumps([len(whole), head + tail == whole]))
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("workers", "stop"), [(0, 1), (0, 5), (2, 4)])
def test_the_stateful_loader_resumes_where_it_was(workers: int, stop: int, tmp_path: Path) -> None:
    python = registry.environment("peers") / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment 'peers'. Next: make setup-peers")
    import tokenizers

    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(["some words"], trainer)
    tok.save(str(tmp_path / "tokenizer.json"))
    for number in range(2):
        texts = [f"document {number} {i} " * (i % 5) for i in range(40)]
        write_jsonl(tmp_path / f"{number}.jsonl", texts)
    command = [python, "-W", "ignore", "-c", PROGRAM, tmp_path, str(workers), str(stop)]
    done = subprocess.run(command, cwd=registry.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, same = json.loads(done.stdout)
    assert count > stop and same
