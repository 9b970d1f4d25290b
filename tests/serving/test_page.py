"""The web page in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving.conftest import KEY

from gpt_lightning import load
from gpt_lightning.inference.inspection import attention

pytestmark = pytest.mark.slow
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}


class Page:
    """The page as a visitor uses it, with what it asked for and what went wrong."""

    def __init__(self, page: Any, url: str):
        self.page, self.url = page, url
        self.asked: list[str] = []
        self.wrong: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("response", lambda r: self.wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.goto(url)

    def set(self, **values: Any) -> None:
        for label, value in values.items():
            field = self.page.get_by_label(label.replace("_", " ")).first
            field.fill(str(value))
            field.press("Tab")

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def text(self, sample: int = 1) -> str:
        return str(self.page.locator(f"#sample-{sample} .text").text_content())

    def can_stop(self) -> bool:
        return bool(self.page.get_by_role("button", name="Stop").is_enabled())

    def status(self) -> str:
        return str(self.page.locator("#status span.prose").inner_text())

    def wait_for(self, condition: Callable[[], bool]) -> None:
        for _ in range(2400):  # a browser on a busy machine may get no processor for half a minute
            if condition():
                return
            self.page.wait_for_timeout(50)
        state = f"the page says {self.status()!r} and has {len(self.text())} characters"
        tokens = self.page.evaluate("document.querySelector('#tokens')?.innerHTML.slice(0, 200)")
        raise AssertionError(f"it did not happen within 120 s; {state}; tokens: {tokens}")

    def finish(self) -> None:
        self.wait_for(lambda: self.status().startswith("Done"))


@pytest.fixture
def page(browser: Any, server: Any) -> Iterator[Page]:
    context = browser.new_context(http_credentials={"username": "anyone", "password": KEY})
    context.set_default_timeout(120_000)
    yield Page(context.new_page(), server.url)
    context.close()


def requests(server: Any) -> int:
    request = urllib.request.Request(f"{server.url}/health", headers=HEADERS)
    with urllib.request.urlopen(request) as answer:
        return int(json.load(answer)["requests"])


def test_page_streams_the_text_of_the_model(page: Page, checkpoint: Path) -> None:
    page.set(Prompt="abc\nd", New_tokens=800, Seed=7)
    page.page.evaluate("""() => {
        const seen = window.lengths = new Set()  // of the text, whenever the page changes
        const look = () => seen.add(document.querySelector("#sample-1 .text")?.textContent.length)
        const all = {subtree: true, childList: true, characterData: true}
        new MutationObserver(look).observe(document.body, all)
    }""")
    page.click("Generate")
    page.finish()
    assert page.page.evaluate("[...lengths].filter(n => 5 < n && n < 5 + 800).length") > 3
    model = load(checkpoint, "cpu")
    expected = model.generate("abc\nd", max_new_tokens=800, seed=7)
    page.wait_for(lambda: page.text() == "abc\nd" + expected)
    assert page.page.locator("#sample-1 .given").text_content() == "abc\nd"
    assert page.status().startswith("Done: 800 tokens in ")
    assert page.status().endswith("seed 7")


def test_settings_change_the_answer(page: Page, checkpoint: Path) -> None:
    model = load(checkpoint, "cpu")
    page.set(Prompt="x", Samples=3, New_tokens=30, Seed=1)
    page.click("Generate")
    page.finish()
    expected = model.generate("x", num_samples=3, max_new_tokens=30, seed=1)
    page.wait_for(lambda: [page.text(n) for n in (1, 2, 3)] == ["x" + text for text in expected])
    page.set(Samples=1, Temperature=0, Stop_before="h")
    page.click("Generate")
    page.wait_for(
        lambda: page.text() == "x" + model.generate("x", max_new_tokens=30, temperature=0, stop="h")
    )
    assert not page.page.locator("#sample-2 .text").is_visible()


def test_stop_ends_the_computation(page: Page, server: Any) -> None:
    page.set(Prompt="x", New_tokens=100_000)
    assert not page.can_stop()
    page.click("Generate")
    page.wait_for(lambda: len(page.text()) > 20)
    assert requests(server) == 1
    page.click("Stop")
    page.wait_for(lambda: not page.can_stop())
    page.wait_for(lambda: requests(server) == 0)
    page.page.wait_for_timeout(300)  # what was on its way
    length = len(page.text())
    assert 20 < length < 100_000
    page.page.wait_for_timeout(500)
    assert len(page.text()) == length
    page.set(New_tokens=10)
    page.click("Generate")
    page.finish()
    page.wait_for(lambda: len(page.text()) == 11 and not page.can_stop())


def test_reload_ends_the_computation_and_gives_a_fresh_page(page: Page, server: Any) -> None:
    page.set(Prompt="something else", New_tokens=100_000)
    page.click("Generate")
    page.wait_for(lambda: len(page.text()) > 20)
    page.page.reload()
    assert page.page.get_by_label("Prompt").input_value() == "Once upon a time"
    page.wait_for(lambda: requests(server) == 0)
    page.set(New_tokens=5)
    page.click("Generate")
    page.finish()
    page.wait_for(lambda: len(page.text()) == len("Once upon a time") + 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"Seed": -5}, "seed=-5 must be a whole number"), ({"Top_k": -1}, "top_k=-1 must be a whole number")],
)
def test_bad_input_shows_a_message(page: Page, server: Any, settings: dict[str, Any], message: str) -> None:
    before = server.log.read_text()
    page.set(**settings)
    page.click("Generate")
    page.page.get_by_text(message).wait_for()
    page.wait_for(lambda: not page.can_stop())
    assert server.log.read_text() == before
    page.set(Seed=1, Top_k=5, New_tokens=5)
    page.click("Generate")
    page.finish()


def test_full_server_shows_a_message(page: Page, server: Any) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 100_000, "stream": True}).encode()
    request = urllib.request.Request(f"{server.url}/v1/completions", body, HEADERS)
    streams: list[Any] = []
    try:
        for n in range(3):
            thread = threading.Thread(
                target=lambda: streams.append(urllib.request.urlopen(request)), daemon=True
            )
            thread.start()
            page.wait_for(lambda n=n: requests(server) == n + 1)
        page.click("Generate")
        page.page.get_by_text("try again in a moment").wait_for()
    finally:
        for _ in range(3):
            page.wait_for(lambda: bool(streams))
            streams.pop().close()
    page.wait_for(lambda: requests(server) == 0)


def test_prompt_cannot_be_longer_than_the_limit(page: Page) -> None:
    prompt = page.page.get_by_label("Prompt")
    page.set(Prompt="a" * 1999)
    prompt.press_sequentially("bcd")
    assert prompt.input_value() == "a" * 1999 + "b"


def test_page_says_which_model_and_shows_the_picture_of_its_run(page: Page) -> None:
    page.wait_for(lambda: page.page.title() == "letters - gpt_lightning")
    heading = page.page.locator("h1").inner_text()
    assert heading == "letters: 8,944 parameters, trained on <b>corpus"  # a name is text, not HTML
    card = page.page.locator("#card")
    for row in ("parameters\t8,944", "training steps\t1,234", "training text\t<b>corpus\n", "layers\t1\n"):
        assert row in card.inner_text()
    page.wait_for(lambda: card.locator("img").evaluate("image => image.complete && image.naturalWidth > 0"))


def test_tokens_of_a_text_have_their_losses(page: Page, checkpoint: Path) -> None:
    page.set(Prompt="${1+1} {{x}} <b>", New_tokens=8, Seed=3)
    page.click("Generate")
    page.page.get_by_text("Loss of each token").click()
    frame = page.page.frame_locator("#tokens iframe")
    tokens = frame.locator(".token")
    page.wait_for(lambda: tokens.count() == 16 + 8)
    model = load(checkpoint, "cpu")
    text = "${1+1} {{x}} <b>" + model.generate("${1+1} {{x}} <b>", max_new_tokens=8, seed=3)
    assert page.text() == text
    assert "".join(tokens.evaluate_all("all => all.map(one => one.firstChild.textContent)")) == text
    assert frame.locator(".token.prompt").count() == 16
    tokens.nth(20).hover()
    first, _, *expected = frame.locator(".tip:visible").inner_text().splitlines()
    assert first == f'"{text[20]}"  12.5%, loss 2.079 nats'  # one of eight letters: ln 8
    assert len(expected) == 5
    assert all(line.split()[0] == "12.5%" for line in expected)
    page.set(Attention_head=1)
    frame.get_by_label("attention of layer 0, head 1").check()
    tokens.nth(20).hover()
    weights = attention(model, list(text.encode()), layer=0, head=1)
    assert weights is not None
    shown = tokens.evaluate_all("all => all.map(one => +one.style.getPropertyValue('--weight'))")
    assert shown == pytest.approx((weights[20] / weights[20].max()).tolist(), abs=1 / 255)
    assert page.wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_follows_its_colours(browser: Any, server: Any, scheme: str) -> None:
    context = browser.new_context(
        http_credentials={"username": "anyone", "password": KEY},
        viewport={"width": 390, "height": 800},
        color_scheme=scheme,
    )
    page = Page(context.new_page(), server.url)
    page.page.locator("#card img").evaluate("image => { image.style.width = '1000px' }")
    page.set(New_tokens=100)
    page.click("Generate")
    page.finish()
    assert page.page.evaluate("document.documentElement.scrollWidth") == 390
    for part in ("#card img", "#card table", "#sample-1", "button:text('Generate')"):
        box = page.page.locator(part).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    colour = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour[4:-1].split(","))) < 3 * 128) == (scheme == "dark")
    context.close()


def test_page_uses_no_other_servers(page: Page, server: Any) -> None:
    page.set(New_tokens=5)
    page.click("Generate")
    page.finish()
    time.sleep(0.5)
    assert len(page.asked) > 5
    assert [url for url in page.asked if not url.startswith((server.url, "data:", "blob:"))] == []
    assert page.wrong == []
