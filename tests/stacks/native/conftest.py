"""A small corpus, tokenizers trained here, and a server that stops to answer."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

WHY = "the extension is not built: maturin build, or set-up with cargo present"


@pytest.fixture(scope="session")
def native() -> Any:
    return pytest.importorskip("stackbench_native", reason=WHY)


def write_lines(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def texts() -> dict[str, list[str]]:
    """Documents of five kinds: what tokenizers are known to disagree about lies at their borders."""
    draw = random.Random(0)
    code = Path(json.__file__).with_name("decoder.py").read_text()
    words = [
        "the",
        "a",
        "of",
        "it",
        "don't",
        "We'LL",
        "they're",
        "3.14",
        "1,000",
        "(so)",
        "“quoted”",
        "—",
        "naïve",
        "café",
    ]
    scripts = [
        "Привет, мир! ",
        "你好，世界。",
        "こんにちは 世界 ",
        "안녕하세요 ",
        "שלום עולם ",
        "مرحبا بالعالم ٣٤ ",
        "नमस्ते दुनिया १२ ",
        "สวัสดีชาวโลก ",
        "e\u0301 Å ﬁ ǅ ",
        "👩‍👩‍👧‍👦🏳️‍🌈 ",
        "\u200b\u3000\u2028\x85",
    ]

    def point() -> str:
        while 0xD800 <= (code := draw.choice([draw.randrange(0x110000), draw.randrange(0x3000)])) < 0xE000:
            pass
        return chr(code)

    repeats = [
        "a",
        " ",
        "\n",
        "ab",
        "1",
        "é",
        "▁",
        "🙂",
        " a",
        "\r\n",
        "=",
        "'s",
        "\u00a0",
        "<|endoftext|>",
        "</s>",
    ]
    return {
        "code": [code[i : i + 700] for i in range(0, len(code), 700)],
        "prose": [
            " ".join(draw.choices(words, k=60)) + draw.choice(["", "\n\n", "  ", " <|endoftext|>!"])
            for _ in range(60)
        ],
        "scripts": ["".join(draw.choices(scripts, k=20)) for _ in range(60)],
        "random": ["".join(point() for _ in range(draw.randrange(1, 60))) for _ in range(120)],
        "repeats": [text * count for text in repeats for count in (1, 2, 3, 7, 500)],
    }


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAMILIES = ("gpt2", "llama3", "sentencepiece", "metaspace")


@pytest.fixture(scope="session")
def tokenizers(texts: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer.json of each family, trained on the texts."""
    hf = pytest.importorskip("tokenizers")
    models, before, train = hf.models, hf.pre_tokenizers, hf.trainers.BpeTrainer
    directory = tmp_path_factory.mktemp("tokenizers")
    lines = [line for kind in texts.values() for text in kind for line in text[:2000].split("\n")]
    alphabet = sorted(before.ByteLevel.alphabet())
    made = {}
    for family in FAMILIES:
        bytes_too: list[str] = []
        if family in ("gpt2", "llama3"):
            tokenizer = hf.Tokenizer(models.BPE(ignore_merges=family == "llama3"))
            split = before.Split(hf.Regex(LLAMA_3), "isolated")
            level = before.ByteLevel(add_prefix_space=False, use_regex=family == "gpt2")
            tokenizer.pre_tokenizer = level if family == "gpt2" else before.Sequence([split, level])
            end = "<|endoftext|>" if family == "gpt2" else "<|end_of_text|>"
            trainer = train(
                vocab_size=1500, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
            )
        else:
            tokenizer = hf.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
            tokenizer.pre_tokenizer = before.Metaspace(prepend_scheme="first")
            bytes_too = [f"<0x{byte:02X}>" for byte in range(256)]
            special = ["<unk>", "<s>", "</s>", *bytes_too]
            trainer = train(vocab_size=1500, special_tokens=special, limit_alphabet=150, show_progress=False)
        tokenizer.train_from_iterator(lines, trainer)
        content = json.loads(tokenizer.to_str())
        content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in bytes_too]
        if family == "sentencepiece":  # as Llama 2 has it
            replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
            content["normalizer"] = {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace],
            }
            content["pre_tokenizer"] = None
        made[family] = directory / f"{family}.json"
        made[family].write_text(json.dumps(content))
    return made


@pytest.fixture(scope="session")
def documents() -> list[str]:
    draw = random.Random(1)
    words = ["alpha", "beta", "gamma", "naïve", "語", "x\n"]
    return [f"document {i}: " + " ".join(draw.choices(words, k=draw.randrange(40))) for i in range(600)]


@pytest.fixture(scope="session")
def corpus(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        write_lines(directory / f"{number}.jsonl", documents[200 * number : 200 * (number + 1)])
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizers: dict[str, Path]) -> Path:
    return tokenizers["gpt2"]


@pytest.fixture
def make(native: Any, corpus: Path, tokenizer: Path) -> Callable[..., Any]:
    """A loader of the corpus: small rows and segments."""

    def loader(**choices: Any) -> Any:
        given = {"batch": 4, "sequence": 31, "segment_bytes": 2000, "engine": "fast", **choices}
        return native.Loader(given.pop("sources", corpus), given.pop("tokenizer", tokenizer), **given)

    return loader


@pytest.fixture
def hanging(corpus: Path) -> Iterator[str]:
    """The URL of a file whose server answers two reads, and then says nothing (`once`: one, `hang`: none)."""
    body = (corpus / "0.jsonl").read_bytes()
    ended = threading.Event()
    count = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(200, {"Content-Length": str(len(body))})

        def do_GET(self) -> None:
            nonlocal count
            count += 1
            if count > (1 if "once" in self.path else 2) or "hang" in self.path:
                ended.wait(30)
                return
            first, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
            part = body[first : last + 1]
            where = f"bytes {first}-{first + len(part) - 1}/{len(body)}"
            self.answer(206, {"Content-Range": where, "Content-Length": str(len(part))}, part)

        def answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
            if "hang" in self.path:
                ended.wait(30)
                return
            self.send_response(status)
            headers |= {"ETag": '"one"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/a.jsonl"
    ended.set()
    server.shutdown()
    time.sleep(0.05)
    server.socket.close()
