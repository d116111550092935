"""The numerical libraries really loaded in this process: what the installed versions only promise.

A stray cuDNN on LD_LIBRARY_PATH shadows the wheel's; two OpenMP runtimes fight over the CPUs: /proc/self/maps
shows both. Versions come from a library's own version function where one runs without a device, else from
the framework's module, else from the file's name. No path is given, only file names.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

Version = Callable[[ctypes.CDLL], str | None]


def _dotted(number: int, *steps: int) -> str:
    """92000 as 9.20.0 with steps (10000, 100, 1)."""
    parts = []
    for step in steps:
        part, number = divmod(number, step)
        parts.append(str(part))
    return ".".join(parts)


def _property(symbol: str) -> Version:
    """`cublasGetProperty(libraryPropertyType, int *)`: 0 major, 1 minor, 2 patch; needs no handle."""

    def version(library: ctypes.CDLL) -> str | None:
        function, parts = getattr(library, symbol), []
        for which in range(3):
            value = ctypes.c_int()
            if function(which, ctypes.byref(value)) != 0:
                return None
            parts.append(str(value.value))
        return ".".join(parts)

    return version


def _number(symbol: str, *steps: int) -> Version:
    """A function without arguments that returns a number."""

    def version(library: ctypes.CDLL) -> str:
        function = getattr(library, symbol)
        function.restype = ctypes.c_size_t
        return _dotted(function(), *steps)

    return version


def _into(symbol: str, *steps: int) -> Version:
    """A function that writes a number into its only argument and returns 0."""

    def version(library: ctypes.CDLL) -> str | None:
        value = ctypes.c_int()
        failed = getattr(library, symbol)(ctypes.byref(value))
        return None if failed else _dotted(value.value, *steps)

    return version


def _openblas(library: ctypes.CDLL) -> str | None:
    for symbol in ("openblas_get_config", "scipy_openblas_get_config64_", "openblas_get_config64_"):
        function = getattr(library, symbol, None)
        if function is not None:
            function.restype = ctypes.c_char_p
            words = (function() or b"").decode().split()
            return words[1] if len(words) > 1 else None
    return None


def _mkl(library: ctypes.CDLL) -> str | None:
    buffer = ctypes.create_string_buffer(200)
    library.MKL_Get_Version_String(buffer, ctypes.c_int(len(buffer)))
    found = re.search(r"Version ([\d.]+)", buffer.value.decode(errors="replace"))
    return found[1] if found else None


def _module(name: str) -> Version:
    """The version of the Python module that brought the library, if it is imported."""

    def version(_: ctypes.CDLL) -> str | None:
        found = getattr(sys.modules.get(name), "__version__", None)
        return None if found is None else str(found)

    return version


# Name, pattern of the file name, version function (None: the file's name has to do).
KNOWN: Final[tuple[tuple[str, str, Version | None], ...]] = (
    ("cublasLt", r"libcublasLt\.so", _number("cublasLtGetVersion", 10000, 100, 1)),
    ("cublas", r"libcublas\.so", _property("cublasGetProperty")),
    ("cudnn", r"libcudnn\.so", _number("cudnnGetVersion", 10000, 100, 1)),
    ("cudnn-part", r"libcudnn_\w+\.so", _number("cudnnGetVersion", 10000, 100, 1)),
    ("nccl", r"libnccl\.so", _into("ncclGetVersion", 10000, 100, 1)),
    ("cudart", r"libcudart[-.]", _into("cudaRuntimeGetVersion", 1000, 10, 1)),
    ("cuda-driver", r"libcuda\.so", _into("cuDriverGetVersion", 1000, 10, 1)),
    ("cupti", r"libcupti\.so", None),
    ("nvrtc", r"libnvrtc\.so", None),
    ("nvidia-ml", r"libnvidia-ml\.so", None),
    ("cusolver", r"libcusolver\.so", _property("cusolverGetProperty")),
    ("cusparse", r"libcusparse\.so", _property("cusparseGetProperty")),
    ("cufft", r"libcufft\.so", _property("cufftGetProperty")),
    ("torch", r"libtorch_(cpu|cuda)\.so", _module("torch")),
    ("triton", r"libtriton\.so", _module("triton")),
    ("jaxlib", r"libjax_common\.so|xla_extension\.so|_jax\..*so", _module("jaxlib")),
    ("xla-cuda-plugin", r"xla_cuda_plugin\.so", None),
    ("mkl", r"libmkl_(rt|core)\.so", _mkl),
    ("openblas", r"lib(scipy_)?openblas", _openblas),
    ("blis", r"libblis", None),
    ("openmp-gnu", r"libgomp[-.]", None),
    ("openmp-llvm", r"libomp[-.]", None),
    ("openmp-intel", r"libiomp5", None),
    ("tcmalloc", r"libtcmalloc", None),
    ("jemalloc", r"libjemalloc", None),
)


def mapped_files(maps: Iterable[str]) -> list[Path]:
    """The files mapped into a process, by the lines of its maps, in order of their names."""
    files = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    return sorted(Path(name) for name in files if name.startswith("/"))


def _file_version(name: str) -> str | None:
    """What stands after `.so.`, or after the dash before it (`libgomp-24e2ab19.so.1.0.0`)."""
    found = re.search(r"\.so\.([\d.]+)$", name)
    return found[1] if found else None


def _ask(path: Path, version: Version) -> str | None:
    """The library's own answer. It is loaded already: opening it again gives the same handle."""
    try:
        return version(ctypes.CDLL(str(path), mode=getattr(ctypes, "RTLD_LOCAL", 0)))
    except (OSError, AttributeError):
        return None


def _linked_in() -> list[dict[str, Any]]:
    """What torch carries inside its own libraries (MKL and oneDNN, by its build record)."""
    config = getattr(sys.modules.get("torch"), "__config__", None)
    text = config.show() if config is not None else ""
    found = []
    carried = {"mkl": r"Math Kernel Library Version ([\d.]+)", "onednn": r"MKL-DNN v([\d.]+)"}
    for name, pattern in carried.items():
        if match := re.search(pattern, text):
            row = {"name": name, "version": match[1], "file": "libtorch_cpu.so", "source": "build record"}
            found.append(row)
    return found


def loaded(maps: Iterable[str] | None = None) -> dict[str, str]:
    """Known libraries of this process: `cublas` to `13.1.1 (libcublas.so.13)`, copies joined by ` + `."""
    found: dict[str, str] = {}
    for row in rows(maps):
        text = f"{row['version'] or 'unknown'} ({row['file']})"
        found[row["name"]] = f"{found[row['name']]} + {text}" if row["name"] in found else text
    return found


def rows(maps: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Every known library in this process: name, version, file name, and where the version comes from.

    `maps` replaces /proc/self/maps in tests; without it an empty list where the system has no such file.
    """
    own = maps is None
    if maps is None:
        try:
            maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            maps = []
    found = []
    for path in mapped_files(maps):
        for name, pattern, version in KNOWN:
            if not re.match(pattern, path.name):
                continue
            asked = _ask(path, version) if version is not None and own else None
            found.append(
                {
                    "name": name,
                    "version": asked or _file_version(path.name),
                    "file": path.name,
                    "source": "library" if asked else "file name" if _file_version(path.name) else None,
                }
            )
            break
    return found + _linked_in() if own else found


if __name__ == "__main__":
    for row in rows():
        print(json.dumps(row))
