"""Reports of runs whose numbers were made up, against means worked out by hand and a real browser."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from gpt_lightning.data.files import write_json
from gpt_lightning.rundir.report import as_csv, differing, notes, over_seeds, read_results, table
from gpt_lightning.rundir.report_page import as_html


def make(folder: Path, overrides: list[str], losses: list[float], **facts: Any) -> None:
    """A run of 100 steps per validation, 1,000 tokens each."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("[]")
    steps = 100 * len(losses)
    summary = {"status": "finished", "overrides": ["data=text", *overrides], "steps": steps}
    summary |= {"tokens": 1000 * steps, "best_val_loss": min(losses), "val_loss": losses[-1]}
    summary |= {"corpus_digest": "c", "tokenizer_digest": "t", "seconds": 60.0}
    write_json(folder / "summary.json", summary | facts)
    rows = [f"{100 * (i + 1)},{loss}\n" for i, loss in enumerate(losses)]
    (folder / "metrics.csv").write_text("step,val/loss\n" + "".join(rows))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    make(folder / "a", ["optimizer.lr=0.001", "seed=1"], [3.0, 2.0])
    make(folder / "b", ["optimizer.lr=0.001", "seed=2"], [3.0, 2.5, 2.6], bits_per_byte=1.25)
    make(folder / "c", ["optimizer.lr=0.01", "seed=1"], [2.0, 1.75])
    make(folder / "d", ["optimizer.lr=0.01", "seed=2"], [5.0], status="interrupted")
    return folder


def test_runs_are_ranked_with_the_overrides_that_differ(runs: Path) -> None:
    results = read_results([runs])
    assert differing(results) == ["optimizer.lr", "seed"]
    columns, rows = table(results)
    found = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["run"] for row in found] == ["c", "a", "b", "d"]
    assert found[2]["best_val_loss"] == "2.5000"
    assert found[2]["val_loss"] == "2.6000"
    # d ended after 100 steps of 1,000 tokens: the others are compared there as well
    assert [row["loss_at_100000_tokens"] for row in found] == ["2.0000", "3.0000", "3.0000", "5.0000"]
    exact = list(csv.DictReader(io.StringIO(as_csv(results))))
    assert exact[2]["bits_per_byte"] == "1.25"
    assert exact[2]["tokens"] == "300000"


def test_seeds_of_finished_runs_are_averaged(runs: Path) -> None:
    columns, rows = over_seeds(read_results([runs]))
    assert columns == ["optimizer.lr", "n", "mean_best_val_loss", "std"]
    # (2.0 + 2.5) / 2, and sqrt(2 · 0.25²); the interrupted run is no measurement
    assert rows == [["0.01", "1", "1.7500", "-"], ["0.001", "2", "2.2500", "0.3536"]]


def test_what_cannot_be_compared_is_said(runs: Path, tmp_path: Path) -> None:
    found = " ".join(notes(read_results([runs])))
    assert "different numbers of tokens" in found
    assert "1 of 4 runs are not finished" in found
    assert "tokenizers" not in found
    assert "corpora" not in found
    make(tmp_path / "e", [], [1.0], corpus_digest="other", tokenizer_digest="other")
    found = " ".join(notes(read_results([runs, tmp_path / "e"])))
    assert "different tokenizers" in found
    assert "different corpora" in found


def test_command_writes_each_format_and_replaces_reports_only(
    runs: Path, tmp_path: Path, call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    call("report", f"runs={runs}")
    assert re.search(r"^1 +c +finished +0\.01", capsys.readouterr().out, re.MULTILINE)
    for name in ("r.csv", "r.md", "r.html"):
        call("report", f"runs=[{runs / 'a'},{runs / 'b'}]", f"output={tmp_path / name}")
        before = (tmp_path / name).read_bytes()
        call("report", f"runs={runs}", f"output={tmp_path / name}")
        assert (tmp_path / name).read_bytes() != before
        (tmp_path / name).write_text("mine")
        with pytest.raises(SystemExit):
            call("report", f"runs={runs}", f"output={tmp_path / name}")
        assert "holds what this command did not write" in capsys.readouterr().err
        assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "runs= is missing"),
        (["runs=nowhere"], "there is no run in"),
        (["runs=nowhere", "output=x.pdf"], "output=x.pdf must end in .csv, .md, .html"),
        (["runs=nowhere", "watch=3"], "watch=3 must be true or false"),
    ],
)
def test_wrong_use_of_report_ends_in_one_line(
    arguments: list[str], line: str, call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call("report", *arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert line in error


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_page_sorts_its_tables_and_loads_nothing(runs: Path) -> None:
    (runs / "c" / "samples.md").write_text(
        "## Step 1\n\n```text\nold\n```\n## Step 2\n\n```text\n<b>new\n```\n"
    )
    page_text = as_html(read_results([runs]), "<runs>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page()
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.set_content(page_text)
        assert page.locator("h1").inner_text() == "<runs>"
        names = page.locator("table").first.locator("tbody tr td:nth-child(2)")
        assert names.all_inner_texts() == ["c", "a", "b", "d"]
        heading = page.locator("th", has_text="val_loss").nth(1)
        assert heading.inner_text() == "val_loss"
        heading.click()
        assert names.all_inner_texts() == ["c", "a", "b", "d"]
        heading.click()
        assert names.all_inner_texts() == ["d", "b", "a", "c"]
        assert page.locator("img").count() == 2  # over tokens, and against the learning rate
        assert page.locator("img").evaluate_all("all => all.every(one => one.naturalWidth > 500)")
        assert "<b>new" in page.locator("pre").last.inner_text()
        assert "old" not in page.locator("pre").last.inner_text()
        browser.close()
    assert not [url for url in requests if not url.startswith("data:")]
