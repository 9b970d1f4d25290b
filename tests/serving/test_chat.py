"""The page of a model that was trained on conversations, in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.conftest import LETTERS

expect = pytest.importorskip("playwright.sync_api").expect

QUESTION = "<b>Who</b> is <img src='http://127.0.0.1:9/x.png'> & why?"  # stays text, and loads nothing


@pytest.mark.slow
def test_page_answers_a_message_and_the_next_one(
    serve: Callable[..., Any], checkpoint: Path, tmp_path: Path, browser: Any
) -> None:
    saved = torch.load(checkpoint / "checkpoints" / "best.ckpt", weights_only=True)
    saved["hyper_parameters"]["data"] = {"corpus": {"_target_": "gpt_lightning.data.corpus.chat.Chat"}}
    torch.save(saved, tmp_path / "chat.ckpt")
    server = serve("-m", "gpt_lightning.demo", f"checkpoint={tmp_path / 'chat.ckpt'}", "port=0", "device=cpu")
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    assert page.locator("h1").inner_text().startswith("letters: 8,944 parameters")
    stop = page.get_by_role("button", name="Stop")
    assert stop.is_disabled()
    for number, question in enumerate([QUESTION, "And now?"], 1):
        box = page.locator("textarea").first
        box.fill(question)
        box.press("Enter")
        answers = page.locator("#conversation .bot.message")
        page.wait_for_function(
            "n => { const all = [...document.querySelectorAll('#conversation .bot.message')];"
            "return all.length == n && all[n - 1].innerText.trim().length >= 200 }",
            arg=number,
            timeout=30_000,
        )
    assert set(answers.last.inner_text().strip().encode()) <= set(LETTERS)
    assert page.locator("#conversation .user.message").first.inner_text().strip() == QUESTION
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked)
    expect(stop).to_be_disabled()
    page.get_by_text("Settings").click()
    page.get_by_label("New tokens").first.fill("100000")
    page.locator("textarea").first.fill("At length")
    page.locator("textarea").first.press("Enter")
    expect(stop).to_be_enabled()
    stop.click()
    expect(stop).to_be_disabled()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, colour[4:-1].split(","))) < 3 * 128  # dark
    page.close()
