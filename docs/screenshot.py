"""Take docs/demo.png again: `python docs/screenshot.py CHECKPOINT [PROMPT]`.

Needs the extra demo, the package playwright, and Chromium (on Debian: apt-get install chromium).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright


def main(checkpoint: str, prompt: str = "In a cozy hut") -> None:
    command = [sys.executable, "-m", "gpt_lightning.demo", f"checkpoint={checkpoint}", "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().removeprefix("page: ").strip()
            flags = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
            page = browser.new_page(viewport={"width": 1240, "height": 600})
            page.goto(url)
            for label, value in {"Prompt": prompt, "Samples": "2", "New tokens": "160", "Seed": "1"}.items():
                page.get_by_label(label).first.fill(value)
                page.keyboard.press("Tab")
            page.get_by_role("button", name="Generate").click()
            expect(page.locator("#status")).to_contain_text("Done", timeout=120_000)
            page.get_by_text("Loss of each token").click()
            tokens = page.frame_locator("#tokens iframe").first.locator(".token")
            tokens.nth(60).hover()  # shows what was expected there
            page.wait_for_timeout(500)
            page.screenshot(path=Path(__file__).with_name("demo.png"), full_page=True)
            browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
