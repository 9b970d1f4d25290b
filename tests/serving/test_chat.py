"""The page of a model that was trained on conversations, in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.conftest import LETTERS

pytestmark = pytest.mark.slow
QUESTION = "<b>Who</b> is <img src='http://127.0.0.1:9/x.png'> & why?"  # stays text, and loads nothing
WATCH = """button => {
    window.enabled = [!button.disabled]  // at first, and whenever it changes
    const look = () => window.enabled.push(!button.disabled)
    new MutationObserver(look).observe(button, {attributeFilter: ["disabled"]})
}"""


@pytest.fixture(scope="module")
def url(serve: Callable[..., Any], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    saved = torch.load(checkpoint / "checkpoints" / "best.ckpt", weights_only=True)
    saved["hyper_parameters"]["data"] |= {"corpus": {"_target_": "gpt_lightning.data.corpus.chat.Chat"}}
    path = tmp_path_factory.mktemp("chat") / "chat.ckpt"
    torch.save(saved, path)
    limit = "max_new_tokens=100000"
    return str(serve("-m", "gpt_lightning.demo", f"checkpoint={path}", "port=0", "device=cpu", limit).url)


@pytest.fixture
def page(url: str, browser: Any) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    page.set_default_timeout(120_000)  # a browser on a busy machine may get no processor for half a minute
    page.goto(url)
    yield page
    page.close()


def send(page: Any, message: str) -> Any:
    """Ask, and the answers that will be there."""
    box = page.locator("textarea").first
    box.fill(message)
    box.press("Enter")
    return page.locator("#conversation .bot.message")


def test_page_answers_a_message_and_the_next_one(page: Any, url: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    assert page.locator("h1").inner_text() == "letters: 8,944 parameters, trained on <b>corpus"
    page.get_by_role("button", name="Stop").evaluate(WATCH)
    for number, question in enumerate([QUESTION, "?"], 1):
        answers = send(page, question)
        page.wait_for_function(
            "n => { const all = [...document.querySelectorAll('#conversation .bot.message')];"
            "return all.length == n && all[n - 1].innerText.trim().length >= 200 }",
            arg=number,
        )
        page.wait_for_function("n => window.enabled.length == 2 * n + 1", arg=number)
    assert page.evaluate("window.enabled") == [False, True, False, True, False]
    answer = answers.last.inner_text().strip()
    assert set(answer.encode()) <= set(LETTERS)
    assert page.locator("#conversation .user.message").first.inner_text().strip() == QUESTION
    assert all(request.startswith((url, "data:", "blob:")) for request in asked)
    page.get_by_text("Loss of each token").click()
    tokens = page.frame_locator("#tokens iframe").locator(".token")
    tokens.nth(31).wait_for()
    asked_for = "<|endoftext|><|user|>\n?\n<|assistant|>\n"
    shown = tokens.evaluate_all("all => all.map(one => one.firstChild.textContent)")
    assert "".join(shown).replace("↵", "") == asked_for + answer[:6]  # the model reads 32 tokens
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    for part in ("h1", "#conversation", "button:text('Stop')"):
        box = page.locator(part).bounding_box()
        assert 0 <= box["x"] < box["x"] + box["width"] <= 390
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, colour[4:-1].split(","))) < 3 * 128


def test_stop_ends_an_answer(page: Any) -> None:
    page.get_by_text("Settings", exact=True).first.click()
    setting = page.get_by_label("New tokens, at most").first
    setting.fill("100000")
    setting.press("Tab")
    answer, stop = send(page, "x").last, page.get_by_role("button", name="Stop")
    page.wait_for_function(
        "() => document.querySelector('#conversation .bot.message')?.innerText.length > 250"
    )
    stop.click()
    page.wait_for_function("stop => stop.disabled", arg=stop.element_handle())
    page.wait_for_timeout(300)  # what was on its way
    length = len(answer.inner_text())
    assert length < 100_000
    page.wait_for_timeout(300)
    assert len(answer.inner_text()) == length
