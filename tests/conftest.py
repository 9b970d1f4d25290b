"""What several tests use: a small text, a prepared store of it, and the commands inside this process."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from support.runs import TINY

if TYPE_CHECKING:
    from support.zygote import Zygote

# the same examples on every machine, however slow it is
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
hypothesis.settings.load_profile("tests")

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sees",
    "hears",
    "finds",
    "likes",
    "old",
    "new",
    "red",
    "stone",
    "tree",
    "river",
    "and",
    "then",
    "it",
    "was",
    "there",
]
# Files that take minutes begin first, so that no process is left with one of them at the end
LONGEST = ("test_commands.py", "test_resume.py", "test_optuna.py", "test_processes.py", "test_devices.py")
LONGEST += ("test_sweep.py", "test_hosts.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the user's cache out of the tests and the tests out of it."""
    os.environ["GPT_LIGHTNING_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts runs as real processes, quickly; it imports what only POSIX has."""
    from support.zygote import Zygote

    with Zygote(tmp_path_factory.mktemp("zygote")) as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by Playwright; no other module, as its event loop runs on between tests."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium (apt-get install chromium)")
    flags = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update")
    flags += ("disable-sync", "no-first-run")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=[f"--{flag}" for flag in flags])
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def _ctrl_c_is_as_before() -> Iterator[None]:
    """A command in this process that was interrupted ignores Ctrl-C; later tests' processes would, too."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _logs_are_closed() -> Iterator[None]:
    """A command in this process leaves the log of its run open, as the end of a process would close it."""
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if type(handler) is logging.FileHandler]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 kB of nonsense in which words follow each other at random, without separators."""
    draw = random.Random(1)
    path = tmp_path_factory.mktemp("text") / "small.txt"
    sentences = (" ".join(draw.choices(WORDS, k=draw.randint(4, 9))) + ".\n" for _ in range(600))
    path.write_text("".join(sentences), encoding="utf-8")
    return path


@pytest.fixture
def tiny(small_text: Path, tmp_path: Path) -> list[str]:
    """Overrides of a run of seconds on the small text, in tmp_path/run."""
    return [*TINY, f"data.path={small_text}", f"hydra.run.dir={tmp_path / 'run'}"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run an entry point in this process: `call("train", "seed=1", …)` returns what its main returns."""

    def run(name: str, *arguments: str) -> Any:
        import importlib

        # a run that goes on does so where it was started, and its modules come from here
        monkeypatch.chdir(Path.cwd())
        monkeypatch.setattr(sys, "path", list(sys.path))
        for variable in ("PYTHONPATH", "PYTHONSAFEPATH"):
            monkeypatch.setenv(variable, os.environ.get(variable, ""))
        monkeypatch.setattr(sys, "argv", [f"gpt-lightning-{name}", *arguments])
        return importlib.import_module(f"gpt_lightning.{name}").main()

    return run


@pytest.fixture
def command(zygote: Zygote, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run an entry point in a process of its own: `command("train", "seed=1", …)` in an empty folder."""

    def run(name: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        errors = tmp_path / "stderr.txt"
        process = zygote.start(name, *arguments, cwd=tmp_path, errors=errors, **options)
        code, out = process.wait(300), process.out.read_text()
        result = subprocess.CompletedProcess(arguments, code, out, errors.read_text())
        errors.unlink()
        return result

    return run
