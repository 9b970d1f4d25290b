"""The page of a model that was trained on conversations, in a real browser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from serving.conftest import LETTERS

QUESTION = "<b>Who</b> is <img src='http://127.0.0.1:9/x.png'> & why?"  # stays text, and loads nothing


@pytest.mark.slow
def test_page_answers_a_message_and_the_next_one(
    serve: Callable[..., Any], checkpoint: Path, tmp_path: Path, browser: Any
) -> None:
    saved = torch.load(checkpoint / "checkpoints" / "best.ckpt", weights_only=True)
    saved["hyper_parameters"]["data"] = {"corpus": {"_target_": "gpt_lightning.data.corpus.chat.Chat"}}
    torch.save(saved, tmp_path / "chat.ckpt")
    server = serve("-m", "gpt_lightning.demo", f"checkpoint={tmp_path / 'chat.ckpt'}", "port=0", "device=cpu")
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
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
    page.close()
