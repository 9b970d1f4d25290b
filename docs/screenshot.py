"""Take the pictures of docs/ again: `python docs/screenshot.py RUN [PROMPT]`.

RUN is a default run, beside one with optimizer=adamw, which the picture of TensorBoard shows as well.
Another one is trained for the picture of the terminal.

Needs the extra demo, the package playwright, and Chromium (on Debian: apt-get install chromium).
"""

from __future__ import annotations

import contextlib
import fcntl
import html
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path
from typing import Any

from playwright.sync_api import expect, sync_playwright

HERE = Path(__file__).parent
LINES, COLUMNS = 50, 80
SHOWN_AT = 600  # steps when the picture of the terminal is taken, or soon after
PRE = "margin:0;padding:12px;display:inline-block;background:#1d1f21;color:#e0e0e0;font:14px/1.35 monospace"


def terminal(browser: Any) -> None:
    """What a terminal shows of the default run while it trains."""
    with tempfile.TemporaryDirectory() as folder:
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(folder)
            os.execv(sys.executable, [sys.executable, "-m", "gpt_lightning.train"])
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        seen, steps = b"", 0
        while steps < SHOWN_AT:
            seen += os.read(terminal, 1 << 16)
            shown = re.findall(rb"\b(\d+)/1000 ", seen.rpartition(b"\n")[2])  # by the bar
            steps = int(shown[-1]) if shown else 0
        os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(OSError):  # how a terminal ends
            while os.read(terminal, 1 << 16):
                pass
        os.waitpid(pid, 0)
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in seen.decode().split("\n")]
        text = "\n".join(["$ make train", *lines]).replace(folder, "gpt_lightning")
    page = browser.new_page(viewport={"width": 760, "height": 400})
    page.set_content(f'<body style="margin:0"><pre style="{PRE}">{html.escape(text)}</pre></body>')
    page.locator("pre").screenshot(path=HERE / "terminal.png")


def demo(browser: Any, url: str, prompt: str) -> None:
    """The demo with two samples, and what was expected at one of their tokens."""
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
    part = {"x": 120, "y": 0, "width": 1000, "height": 1400}  # the tokens of the first sample as well
    page.screenshot(path=HERE / "demo.png", full_page=True, clip=part)


def tokens(browser: Any, run: Path) -> None:
    """The page of `evaluate tokens=true`, and what was expected at one of its tokens."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.html"
        command = ["gpt_lightning.evaluate", f"checkpoint={run}", "tokens=true", f"output={file}"]
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
        page = browser.new_page(viewport={"width": 900, "height": 560})
        page.goto(file.as_uri())
        page.locator(".token").nth(90).hover()
        page.screenshot(path=HERE / "tokens.png")


def tensorboard(browser: Any, url: str) -> None:
    """The page Custom Scalars, which opens first."""
    page = browser.new_page(viewport={"width": 1240, "height": 640})
    page.goto(url)
    page.wait_for_timeout(8000)  # it loads and draws without a sign that it is done
    page.screenshot(path=HERE / "tensorboard.png")


def started(driver: contextlib.ExitStack, name: str, *arguments: str) -> str:
    """Start a command that serves a page; its address."""
    command = [sys.executable, "-m", f"gpt_lightning.{name}", *arguments]
    server = driver.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    driver.callback(server.terminate)
    assert server.stdout is not None
    return server.stdout.readline().split()[1]


def main(place: str, prompt: str = "In a cozy hut") -> None:
    run = Path(place)  # as it is shown
    flags = ["--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    with sync_playwright() as driver, contextlib.ExitStack() as servers:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        demo(browser, started(servers, "demo", f"checkpoint={run}", "port=0"), prompt)
        tensorboard(browser, started(servers, "report", f"runs={run.parent}", "tensorboard=0"))
        tokens(browser, run)
        terminal(browser)
        browser.close()
    shutil.copy(run / "curves.png", HERE)


if __name__ == "__main__":
    main(*sys.argv[1:])
