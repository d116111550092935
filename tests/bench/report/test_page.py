"""The page in a real browser: nothing fetched, nothing run, every figure seen, no sideways scrolling."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bench import store
from bench.analyze import analyze
from bench.report import html
from bench.report.figures import style
from tests.fixtures.results import Results, make

pytestmark = pytest.mark.xdist_group("pages")  # they are written once
CHROMIUM = Path("/usr/bin/chromium")
EVIL = (
    "<img src=x onerror=alert(1)>\"'&"
    "</script><script>alert(2)</script> $\\frac{1}{2}$ --> \x1b[31m ]]> \u202eevil 中 "
)


def write(out: Path) -> Path:
    tables = store.load([out])
    path = out / "report.html"
    html.write(path, tables, analyze(tables, price_per_hour=3.0))
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pages")
    failed = {
        "torch-compile@llama-tiny": ("not comparable", "parity: x"),
        "jax-xla": ("failed", "crash: exit code 1"),
    }
    made = {
        "good": make(root / "good", device="h200", precision="bf16", energy=True),
        "bad": make(root / "bad", rounds=1, gates=failed),
        "nothing": make(root / "nothing", rounds=1, fail=lambda w, a, i: "timeout: no end after 900 s"),
        "hostile": Results(rename=lambda t: EVIL + t, gates={"torch-compile": ("failed", EVIL * 9)}).write(
            root / "hostile"
        ),
    }
    return {name: write(out) for name, out in made.items()}


NAMES = ["good", "bad", "nothing", "hostile"]


class Checker(HTMLParser):
    """Collects what must not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name.startswith("on") or name in ("src", "action", "formaction", "data"):
                self.outside.append(f"{tag} {name}={value}")
            if name in ("href", "xlink:href") and not (value or "").startswith(("#", "data:,")):
                self.outside.append(f"{tag} {name}={value}")


@pytest.mark.parametrize("name", NAMES)
def test_the_page_stands_alone(pages: dict[str, Path], name: str) -> None:
    text = pages[name].read_text()
    checker = Checker()
    checker.feed(text)
    assert not {"script", "img", "iframe", "object", "embed", "base", "form"} & set(checker.tags)
    assert not checker.outside
    assert len(checker.ids) == len(set(checker.ids))
    assert checker.tags.count("style") == 1 and "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\u202a-\u202e]", text)


def test_colours_follow_the_theme(pages: dict[str, Path]) -> None:
    body = pages["good"].read_text().split("</style>", 1)[1]
    assert "var(--s0)" in body and "var(--ink)" in body
    for colour in style.theme():
        assert colour not in body


def test_headline_first_and_units(pages: dict[str, Path]) -> None:
    text = pages["good"].read_text()
    assert (
        text.index('class="verdicts"')
        < text.index("<h2>Results</h2>")
        < text.index("<h2>Tokens a second</h2>")
    )
    for words in ("tokens a second", "milliseconds a step", "MFU, % of the dense peak", "millijoules a token",
                  "times as fast as torch-eager (logarithmic)", "seconds (logarithmic)", "steps",
                  "error / tolerance (logarithmic)", "$ a billion tokens", "12·L·d·T"):  # fmt: skip
        assert words in text, words
    assert "Too few rounds for intervals" in pages["bad"].read_text()
    assert "Nothing was timed" in pages["nothing"].read_text()


# --------------------------------------------------------------------------------------------------- browser
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield launched
        launched.close()


LOOK = """() => ({
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  figures: [...document.querySelectorAll('figure')].map(f =>
    [...f.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).filter(r => r.width > 0)
      .map(r => [r.width, r.height, r.left, r.right])),
  tables: [...document.querySelectorAll('table')].every(t => t.closest('.scroll')),
  unnamed: [...document.querySelectorAll('svg')].filter(s => !s.getAttribute('aria-label')).length,
  small: [...document.querySelectorAll('figure svg text')].filter(t => t.getBoundingClientRect().height > 0)
    .map(t => t.getBoundingClientRect().height).reduce((a, b) => Math.min(a, b), 99),
  injected: document.querySelectorAll('img, script').length,
})"""


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", NAMES)
def test_in_the_browser(pages: dict[str, Path], browser: Any, name: str, width: int) -> None:
    page = browser.new_page(
        viewport={"width": width, "height": 900}, color_scheme="dark" if width == 400 else "light"
    )
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else said.append(r.url))
    page.goto(pages[name].as_uri())
    seen = page.evaluate(LOOK)
    page.close()
    assert said == []
    assert seen["overflow"] <= 0
    assert len(seen["figures"]) >= {"good": 8, "bad": 4, "nothing": 2, "hostile": 5}[name]
    for shown in seen["figures"]:
        assert len(shown) == 1  # of the two drawings the one for this width
        w, h, left, right = shown[0]
        assert w > 250 and h > 60 and left >= 0 and right <= width
    assert seen["tables"] and seen["unnamed"] == 0 and seen["injected"] == 0
    assert seen["small"] >= 9  # pixels: the smallest text can be read


@pytest.mark.parametrize("noise", [0.01, 0.8])
def test_panels_fill_their_figure(tmp_path: Path, noise: float) -> None:
    """Also where values scatter so widely that the axis is logarithmic and no warm-up lies beyond it."""
    from bench.report.figures import break_even, compile_time, parity, ratios, step_times, throughput

    analysis = analyze(store.load([make(tmp_path / "r", noise=noise)]))
    for module in (throughput, ratios, step_times, compile_time, break_even, parity):
        for wide in (True, False):
            figure = module.draw(analysis, wide)
            assert figure is not None
            style.to_svg(figure, "x", "")
            columns = 2 if module is break_even and wide else 1
            heights = [axes.get_position().height for axes in figure.axes]
            assert sum(heights) / columns > 0.25 and all(
                axes.get_xlabel() or module is ratios for axes in figure.axes
            )
