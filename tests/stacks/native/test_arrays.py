"""Arrays of a batch are the loader's own memory, for NumPy, DLPack, torch and JAX, and outlive the loader."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="module")
def shards(native: Any, corpus: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    native.tokenize(corpus, tokenizer, out := tmp_path_factory.mktemp("shards") / "out")
    return out


@pytest.fixture(params=["text", "tokens"])
def loader(request: pytest.FixtureRequest, make: Callable[..., Any], shards: Path) -> Any:
    return make() if request.param == "text" else make(sources=shards, tokenizer=None)


def address(array: Any) -> int:
    return int(np.asarray(array).ctypes.data)


def test_numpy(loader: Any) -> None:
    batch = next(loader)
    tokens = np.asarray(batch.tokens)
    assert (tokens.shape, tokens.dtype, tokens.strides) == ((4, 32), np.int32, (128, 4))
    assert tokens.flags.c_contiguous and not tokens.flags.owndata
    assert batch.tokens.shape == (4, 32) and len(batch.tokens) == 4
    others = (
        batch.tokens.numpy(),
        np.from_dlpack(batch.tokens),
        np.array(batch.tokens, copy=None),
        memoryview(batch.tokens),
    )
    assert all(address(other) == tokens.ctypes.data for other in others)
    assert address(np.array(batch.tokens)) != tokens.ctypes.data
    assert np.asarray(batch.tokens, dtype=np.int64).dtype == np.int64
    lengths = np.asarray(batch.lengths)
    assert (lengths.shape, lengths.dtype) == ((4,), np.int32)
    assert batch.positions is None and batch.segments is None
    assert repr(batch) == f"Batch(tokens=int32[4, 32], lane=0, padding={batch.padding})"


def test_memory_outlives_batch_and_loader(loader: Any) -> None:
    batches = [next(loader) for _ in range(20)]
    views = [np.asarray(batch.tokens) for batch in batches]
    copies = [view.copy() for view in views]
    tensors = [np.from_dlpack(batch.tokens) for batch in batches]
    assert len({view.ctypes.data for view in views}) == 20, "a buffer was used again while it was seen"
    loader.close()
    del batches, loader
    gc.collect()
    for view, copy, tensor in zip(views, copies, tensors, strict=True):
        assert (view == copy).all() and (tensor == copy).all()


def test_torch(loader: Any) -> None:
    torch = pytest.importorskip("torch")
    batch = next(loader)
    copy = np.array(batch.tokens)
    read_only = not np.asarray(batch.tokens).flags.writeable
    tensor = batch.tokens.torch()
    assert (tuple(tensor.shape), tensor.dtype) == ((4, 32), torch.int32)
    if not read_only or tensor.data_ptr() == address(batch.tokens):
        assert tensor.data_ptr() == address(batch.tokens)
    del batch, loader
    gc.collect()
    assert (tensor.numpy() == copy).all()


def test_jax(make: Callable[..., Any]) -> None:
    jax = pytest.importorskip("jax")
    batch = next(make())
    copy = np.array(batch.tokens)
    array = batch.tokens.jax()
    assert (array.shape, array.dtype) == ((4, 32), np.int32)
    if jax.default_backend() == "cpu":
        assert array.unsafe_buffer_pointer() == address(batch.tokens)
    assert address(batch.tokens) % 64 == 0
    del batch
    gc.collect()
    assert (np.asarray(array) == copy).all()


def test_mapped_memory_is_read_only(make: Callable[..., Any], shards: Path) -> None:
    batch = next(make(sources=shards, tokenizer=None))
    tokens = np.asarray(batch.tokens)
    assert not tokens.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        tokens[0, 0] = 1
    plain = np.asarray(next(make()).tokens)
    plain[0, 0] = 7  # memory of a batch is the consumer's
    assert plain[0, 0] == 7
    with pytest.raises(BufferError):
        batch.tokens.__dlpack__(dl_device=(2, 0))
    with pytest.raises(BufferError):
        batch.tokens.__dlpack__(copy=False)  # a consumer before DLPack 1.0 knows no read-only memory
    assert "dltensor_versioned" in repr(batch.tokens.__dlpack__(max_version=(1, 0), copy=False))
    assert '"dltensor"' in repr(batch.tokens.__dlpack__())  # a copy, and freed with its capsule


def test_a_capsule_that_nobody_takes_is_freed(make: Callable[..., Any]) -> None:
    batch = next(make())
    for _ in range(1000):
        batch.tokens.__dlpack__()
        batch.tokens.__dlpack__(max_version=(1, 1), copy=True)


FAKE = """
#include <stddef.h>
static int registered, unregistered, fail_with;
int cudaHostRegister(void *p, size_t bytes, unsigned flags) {
    (void)p; (void)flags; if (fail_with) return fail_with; if (bytes == 0) return 1; registered++; return 0; }
int cudaHostUnregister(void *p) { (void)p; unregistered++; return 0; }
int count_registered(void) { return registered; }
int count_unregistered(void) { return unregistered; }
void set_failure(int code) { fail_with = code; }
"""


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    (source := tmp_path / "fake.c").write_text(FAKE)
    library = tmp_path / "libcudart.so.13"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    return library


def test_pinned_memory_is_registered_and_let_go(make: Callable[..., Any], runtime: Path) -> None:
    loader = make(pinned=runtime, depth=2)
    count = sum(int(np.asarray(batch.tokens).size > 0) for batch in loader)
    library = ctypes.CDLL(str(runtime))
    assert 2 <= library.count_registered() < count, "buffers are registered once, and used again"
    loader.close()
    del loader
    gc.collect()
    assert library.count_unregistered() == library.count_registered()
    library.set_failure(2)
    with pytest.raises(ValueError, match="CUDA error 2; valid: pinned=False"):
        next(make(pinned=runtime))
    with pytest.raises(ValueError, match="needs the CUDA runtime"):
        make(pinned=runtime.with_name("none.so"))


def test_pinned_true_finds_the_runtime(native: Any, corpus: Path, tokenizer: Path, runtime: Path) -> None:
    script = (
        "import sys, stackbench_native as n\n"
        "l = n.Loader(sys.argv[1], sys.argv[2], batch=2, sequence=16, pinned=True)\n"
        "print(next(l).tokens.shape)"
    )
    environment = {"LD_LIBRARY_PATH": str(runtime.parent), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", script, corpus, tokenizer]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "(2, 17)\n", done.stderr
