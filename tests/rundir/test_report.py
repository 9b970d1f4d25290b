"""Reports of runs whose numbers were made up, against means worked out by hand and a real browser."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import itertools
import json
import math
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.runs import TINY
from support.sweeps import wait_for
from torch.utils.tensorboard import SummaryWriter

from gpt_lightning.data.files import write_json
from gpt_lightning.rundir.curves import draw_curves
from gpt_lightning.rundir.report import as_csv, as_markdown, differing, notes, over_seeds, read_results, table
from gpt_lightning.rundir.report_figures import loss_curves, losses_by_key, parallel_coordinates
from gpt_lightning.rundir.report_page import as_html
from gpt_lightning.serving.dashboard import link


def make(folder: Path, overrides: list[str], losses: list[float], **facts: Any) -> None:
    """A run of 100 steps per validation, 1,000 tokens each."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(["data=text", *overrides]))
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
    # the shortest finished run has 200 steps of 1,000 tokens, which d has not reached
    assert [row["loss_at_200000_tokens"] for row in found] == ["1.7500", "2.0000", "2.5000", "-"]
    exact = list(csv.DictReader(io.StringIO(as_csv(results))))
    assert exact[2]["bits_per_byte"] == "1.25"
    assert exact[2]["tokens"] == "300000"


def test_runs_that_are_not_finished_do_not_shorten_the_comparison(runs: Path) -> None:
    results = read_results([runs / name for name in "acd"])
    assert table(results)[0][-1] == "tokens_per_second"
    assert notes(results) == ["1 of 3 runs are not finished: 1 interrupted"]
    make(runs / "e", [], [4.0, 3.0], status="pruned")
    columns, rows = table(read_results([runs / name for name in "de"]))
    assert (columns[-1], [row[-1] for row in rows]) == ("loss_at_100000_tokens", ["4.0000", "5.0000"])


def test_overrides_of_a_run_with_a_damaged_summary_are_those_that_hydra_recorded(runs: Path) -> None:
    (runs / "b" / "summary.json").write_text('{"status": "fini')
    results = read_results([runs])
    assert differing(results) == ["optimizer.lr", "seed"]
    (damaged,) = [result for result in results if result.folder.name == "b"]
    assert damaged.overrides == {"data": "text", "optimizer.lr": "0.001", "seed": "2"}
    assert damaged.loss == 2.5
    (runs / "b" / ".hydra" / "overrides.yaml").write_text("[data=text")
    assert len(read_results([runs])) == 4


def add_events(run: Path) -> None:
    with SummaryWriter(str(run / "tensorboard")) as writer:
        writer.add_scalar("val/loss", 2.0, 1)


@contextlib.contextmanager
def killed_at_the_end(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_tensorboard_names_runs_by_what_they_override(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (links := tmp_path / "links").mkdir()
    monkeypatch.setenv("TMPDIR", str(links))
    for name in "abc":
        add_events(runs / name)
    command = [sys.executable, "-m", "gpt_lightning.report", f"runs={runs}", "tensorboard=0"]
    with killed_at_the_end(command) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("TensorBoard: http://127.0.0.1:"), line
        address, _, opened = line.split()[1].partition("#")
        assert opened == "custom_scalars"

        def names() -> list[str]:
            with urllib.request.urlopen(f"{address}data/runs") as response:
                return json.load(response)

        swept = {"a": "lr=0.001,seed=1", "b": "lr=0.001,seed=2", "c": "lr=0.01,seed=1"}
        expected = [f"{name} data=text,{overrides}" for name, overrides in swept.items()]
        wait_for(lambda: names() == expected, process)
        add_events(runs / "d")  # begins while the page is open
        wait_for(lambda: names() == [*expected, "d data=text,lr=0.01,seed=2"], process)
        taken = [*command[:-1], f"tensorboard={urllib.parse.urlsplit(address).port}"]
        refused = subprocess.run(taken, capture_output=True, text=True)
        assert refused.returncode == 1
        (only,) = refused.stderr.splitlines()
        assert "in use" in only
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
    assert not list(links.glob("tensorboard-*"))


def test_run_inside_another_one_is_linked_without_a_trace_in_it(tmp_path: Path) -> None:
    (folder := tmp_path / "links").mkdir()
    runs = {name: tmp_path / f"{name}/tensorboard" for name in ("a", "a/b")}
    for events in runs.values():
        events.mkdir(parents=True)
    for _ in range(2):
        link(runs, folder)
    assert {path.name: path.readlink() for path in folder.iterdir()} == {"a": runs["a"], "a_b": runs["a/b"]}
    assert list(runs["a"].iterdir()) == []


def test_tokens_and_training_time_of_validations_come_from_the_metrics(tmp_path: Path) -> None:
    make(tmp_path / "run", [], [1.0], status="interrupted", tokens=None, steps=None, bits_per_byte=9.0)
    (tmp_path / "run" / "metrics.csv").write_text(
        "step,train/tokens,speed/ms_per_step,val/loss,val/bits_per_byte\n"
        "1,64,1000,,\n10,640,100,3.0,1.5\n15,,,2.5,1.25\n20,1280,200,2.0,1.0\n25,,,nan,nan\n"
    )
    (result,) = read_results([tmp_path])
    points = [(v.step, v.tokens, pytest.approx(v.seconds)) for v in result.validations]
    # 1 s, then 9 steps of 0.1 s, then 10 of 0.2 s; between two rows at the speed of the first
    assert points == [(10, 640, 1.9), (15, 960, 2.4), (20, 1280, 3.9), (25, 1600, 4.9)]
    # the summary of a run that is not finished is as old as its checkpoint
    assert (result.summary["tokens"], result.loss, result.summary["bits_per_byte"]) == (1600, 2.0, None)


def test_jobs_that_have_not_trained_are_listed_as_their_sweep_has_them(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    make(sweep / "seed=1", ["seed=1"], [2.0])
    make(sweep / "seed=2", ["seed=2"], [3.0], status="interrupted")
    statuses = {1: "finished", 2: "running", 3: "failed", 4: "waiting", 5: "running", 6: "running"}
    jobs = [
        {"name": f"seed={n}", "overrides": ["data=text", f"seed={n}"], "status": status}
        for n, status in statuses.items()
    ]
    jobs[1]["pid"] = jobs[4]["pid"] = 4711  # the sixth runs on another machine
    jobs[2]["error"] = "killed by SIGKILL"
    (sweep / "sweep.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))

    def found() -> list[tuple[str | None, str]]:
        return [(r.overrides["seed"], r.status) for r in read_results([tmp_path])]

    # nobody holds the locks: the sweep was killed
    dead = [("1", "finished"), ("2", "interrupted"), ("3", "failed"), ("4", "waiting"), ("5", "interrupted")]
    dead.append(("6", "running"))
    assert found() == dead
    assert notes(read_results([sweep]))[-2:] == [
        "5 of 6 runs are not finished: 1 failed, 2 interrupted, 1 running, 1 waiting",
        "seed=3 failed: killed by SIGKILL",
    ]
    code = "import sys, time; from gpt_lightning.rundir.directory import *; from pathlib import Path\n"
    code += "[take_lock(Path(p)) for p in sys.argv[1:]]; print(); sys.stdout.flush(); time.sleep(600)"
    command = [sys.executable, "-c", code, str(sweep), str(sweep / "seed=2")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seen = found()
        process.kill()
    assert seen == [(n, "running" if n in "25" else status) for n, status in dead]


@pytest.mark.slow
def test_sweep_is_watched_until_all_runs_are_over(
    small_text: Path,
    tmp_path: Path,
    call: Callable[..., Any],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpt_lightning.report.WATCH_SECONDS", 0.1)
    sweep = tmp_path / "lr sweep"
    command = [sys.executable, "-m", "gpt_lightning.train", "-m", *TINY, f"data.path={small_text}"]
    command += ["logger=none", "seed=1,2,-1", f"hydra.sweep.dir='{sweep}'"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        while not (sweep / "sweep.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        call("report", f"runs={sweep}", "watch=true", f"output={tmp_path / 'page.html'}")
        assert process.wait(60) == 1
    shown = capfd.readouterr().out
    assert "\x1b" not in shown  # no terminal
    tables = re.split(r"^rank +run ", shown, flags=re.M)[1:]
    assert re.search(r"^\d +seed=2 +waiting ", tables[0], re.M)
    assert any(re.search(r"^\d +seed=1 +running ", one, re.M) for one in tables)
    assert re.findall(r"^\d +seed=\S+ +(\w+) ", tables[-1], re.M) == ["finished", "finished", "failed"]
    assert "note: seed=-1 failed: seed=-1 must be a whole number" in tables[-1]
    (best,) = re.findall(r"<pre>(python -m .*?)</pre>", (tmp_path / "page.html").read_text())
    program, *arguments = shlex.split(html.unescape(best))[2:]
    call(program.rpartition(".")[2], *arguments, f"hydra.run.dir={tmp_path / 'again'}")
    assert read_results([tmp_path / "again"])[0].loss == read_results([sweep])[0].loss


def test_picture_of_a_key_has_means_and_deviations_over_seeds(runs: Path) -> None:
    make(runs / "e", ["optimizer.lr=0.01", "seed=3"], [2.25])
    ((heading, figure),) = losses_by_key(read_results([runs]))
    assert heading == "Best validation loss and optimizer.lr"
    (axes,) = figure.axes
    (container,) = axes.containers
    line, _, (bars,) = container.lines
    # of lr=0.001: 2.0 and 2.5; of lr=0.01: 1.75 and 2.25; d is interrupted
    assert line.get_xydata().tolist() == [[0.001, 2.25], [0.01, 2.0]]
    std = 0.5 / math.sqrt(2)
    found = [[y for _, y in segment] for segment in bars.get_segments()]
    assert found == [pytest.approx([m - std, m + std]) for m in (2.25, 2.0)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.01"]


def test_values_of_a_search_are_legible_and_where_they_belong(tmp_path: Path) -> None:
    draws = random.Random(0)
    for count in (6, 20):
        rates = [10 ** draws.uniform(-4, -2) for _ in range(count)]
        for number, lr in enumerate(rates):
            overrides = [f"optimizer.lr={lr}", f"optimizer.weight_decay={1 + lr}"]
            make(tmp_path / f"{count}/{number}", overrides, [2.0 + abs(math.log10(lr) + 3)])
        results = read_results([tmp_path / str(count)])
        (_, curves), (_, figure), *_ = [*loss_curves(results), *losses_by_key(results)]
        axes = figure.axes[0]
        drawn = sorted(x for line in axes.containers for x, _ in line.lines[0].get_xydata())
        assert (axes.get_xscale(), drawn) == ("log", sorted(rates))
        for each in (curves, figure):
            each.draw_without_rendering()
        ticks = [tick.get_window_extent() for tick in axes.get_xticklabels() if tick.get_text()]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(ticks))
        legend = curves.legends[0].get_window_extent()
        assert 0 <= legend.x0 < legend.x1 <= curves.bbox.x1


def test_parallel_coordinates_draw_each_run_through_its_values(runs: Path) -> None:
    ((_, figure),) = parallel_coordinates(read_results([runs]))
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["optimizer.lr", "seed", "best validation loss"]
    lines = [line.get_ydata() for line in axes.lines[:4]]  # worst first: d, b, a, c
    assert lines == [
        pytest.approx(line) for line in ([1, 1, 1], [0, 1, 0.75 / 3.25], [0, 0, 0.25 / 3.25], [1, 0, 0])
    ]


def test_dollars_and_bars_in_names_and_values_are_text(tmp_path: Path) -> None:
    for lr, note in ((1, "'cost $_$'"), (2, "a|b"), (2, "'cost $_$'")):
        make(tmp_path / f"{lr}{note[0]}$_$", [f"+lr$_$={lr}", f"+note={note}"], [2.0 + lr])
    results = read_results([tmp_path])
    assert as_html(results, "costs").count("<img") == 4  # curves, losses by lr$_$ and by note, all runs
    row = next(line for line in as_markdown(results).splitlines() if "b |" in line)
    assert [cell.strip() for cell in re.split(r"(?<!\\)\|", row)][2:6] == ["2a$_$", "finished", "2", r"a\|b"]
    draw_curves([{"step": 1.0, "val/loss": 2.0}], title="cost $_$").savefig(io.BytesIO())


def test_seeds_of_finished_runs_are_averaged(runs: Path) -> None:
    columns, rows = over_seeds(read_results([runs]))
    assert columns == ["optimizer.lr", "n", "mean_best_val_loss", "std"]
    # (2.0 + 2.5) / 2, and sqrt(2 · 0.25²); the interrupted run is no measurement
    assert rows == [["0.01", "1", "1.7500", "-"], ["0.001", "2", "2.2500", "0.3536"]]


def test_seed_that_ran_twice_counts_once_with_its_best_run(runs: Path) -> None:
    make(runs / "again", ["optimizer.lr=0.001", "seed=2"], [2.25])
    make(runs / "default", ["optimizer.lr=0.001"], [3.0], seed=2)
    _, rows = over_seeds(read_results([runs]))
    # (2.0 + 2.25) / 2, and sqrt(2 · 0.125²)
    assert rows == [["0.01", "1", "1.7500", "-"], ["0.001", "2", "2.1250", "0.1768"]]


def test_values_that_hydra_reads_as_equal_are_one_value(tmp_path: Path) -> None:
    make(tmp_path / "a", ["optimizer.lr=1e-3", "a=[1,2]", "b=true", "c=1", "d='1'", "seed=1"], [1.0])
    make(tmp_path / "b", ["++optimizer.lr=0.001", "a=[1, 2]", "b=True", "c=1.0", "d=1", "seed=2"], [2.0])
    results = read_results([tmp_path])
    assert differing(results) == ["d", "seed"]
    assert results[1].overrides["optimizer.lr"] == "1e-3"


def test_runs_with_different_tokenizers_are_compared_by_bits_per_byte(tmp_path: Path) -> None:
    for name, tokenizer, seed, losses, bits in (
        ("a", "char", 1, [1.25, 1.5], [1.75, 2.125]),
        ("b", "char", 2, [1.75, 1.5], [2.5, 2.125]),
        ("c", "bpe", 1, [4.0, 3.0], [2.0, 1.5]),
        ("d", "bpe", 2, [4.0, 3.5], [2.0, 1.75]),
    ):
        facts = {"tokenizer_digest": tokenizer, "bits_per_byte": bits[-1]}
        make(tmp_path / name, [f"tokenizer={tokenizer}", f"seed={seed}"], losses, **facts)
        rows = [f"{i},{loss},{bit}\n" for i, (loss, bit) in enumerate(zip(losses, bits, strict=True), 1)]
        (tmp_path / name / "metrics.csv").write_text("step,val/loss,val/bits_per_byte\n" + "".join(rows))
    results = read_results([tmp_path])
    columns, rows = table(results)
    best = [(row[1], row[-1]) for row in rows]
    assert columns[-1] == "best_bits_per_byte"
    assert best == [("c", "1.5000"), ("a", "1.7500"), ("d", "1.7500"), ("b", "2.1250")]
    columns, rows = over_seeds(results)
    # (1.5 + 1.75) / 2, (1.75 + 2.125) / 2
    assert [columns[2], *(row[:3] for row in rows)] == [
        "mean_best_bits_per_byte",
        ["bpe", "2", "1.6250"],
        ["char", "2", "1.9375"],
    ]
    (_, figure), *_ = loss_curves(results)
    assert [2.0, 1.5] in [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert "Best validation loss, bits per byte: 1.5000 (tokenizer=bpe, seed=1)" in as_html(results, "")
    # runs of one setting have different tokenizers
    for name, tokenizer in (("e", "bpe"), ("f", "char")):
        make(tmp_path / name, ["seed=1"], [1.0], tokenizer_digest=tokenizer, bits_per_byte=1.0)
    assert over_seeds(read_results([tmp_path]))[1] == rows


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


def test_page_sorts_its_tables_and_loads_nothing(runs: Path, browser: Any) -> None:
    (runs / "c" / "samples.md").write_text(
        "## Step 1\n\n```text\nold\n```\n## Step 2\n\n```text\n<b>new\n```\n"
    )
    page = browser.new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.set_content(as_html(read_results([runs]), "<runs>"))
    assert page.locator("h1").inner_text() == "<runs>"
    names = page.locator("table").first.locator("tbody tr td:nth-child(2)")
    assert names.all_inner_texts() == ["c", "a", "b", "d"]
    heading = page.locator("th", has_text="val_loss").nth(1)
    assert heading.inner_text() == "val_loss"
    heading.click()
    assert names.all_inner_texts() == ["c", "a", "b", "d"]
    heading.click()
    assert names.all_inner_texts() == ["d", "b", "a", "c"]
    assert page.locator("img").count() == 3  # curves, losses by learning rate, all runs
    assert page.locator("img").evaluate_all("all => all.every(one => one.naturalWidth > 500)")
    picture = page.locator("img").first
    page.set_viewport_size({"width": 400, "height": 800})
    for shown in ("width <= 400", "width === naturalWidth", "width <= 400"):  # a click shows all of it
        assert picture.evaluate(f"({{width, naturalWidth}}) => {shown}")
        picture.click()
    assert "<b>new" in page.locator("pre").last.inner_text()
    assert "old" not in page.locator("pre").last.inner_text()
    page.close()
    assert not [url for url in requests if not url.startswith("data:")]
