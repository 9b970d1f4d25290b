"""Searches with Optuna: real processes that are killed, pruned and started again."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from support.sweeps import OPTIONS, ended, fork, ledger, reached
from support.zygote import Zygote

from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.resolvers import CONF
from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.rundir.report import Result, notes, read_results
from gpt_lightning.rundir.report_study import JOURNAL, study_figures
from gpt_lightning.rundir.summary import read_summary
from gpt_lightning.sweeping.jobs import Job
from gpt_lightning.sweeping.search import Search, pruner_of, shared_storage
from gpt_lightning.sweeping.space import Dimension, read_space

optuna = pytest.importorskip("optuna")
RATES = "optimizer.lr=tag(log,interval(1e-4,1e-2))"


@pytest.fixture
def options(small_text: Path, tmp_path: Path) -> list[str]:
    return [
        "-m",
        *OPTIONS,
        f"data.path={small_text}",
        f"hydra.sweep.dir={tmp_path / 'study'}",
        "sweep=optuna",
    ]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def place(study: Path, number: int) -> Path | None:
    """The directory of a trial."""
    return next(study.glob(f"{number:03d}-*"), None)


@pytest.mark.slow
def test_study_that_is_killed_twice_goes_on_with_the_same_trials(
    zygote: Zygote, options: list[str], tmp_path: Path, call: Callable[..., Any]
) -> None:
    study = tmp_path / "study"
    length = ["trainer.max_steps=60", "trainer.save_every_steps=10", "trainer.val_every_steps=20"]
    command = [*options, *length, RATES, "sweep.n_trials=3"]
    untouched: dict[Path, bytes] = {}
    for number in (0, 1):
        process = fork(zygote, tmp_path, *command)
        process.wait_for(lambda n=number: (run := place(study, n)) and reached(run, 15)())  # type: ignore[misc]
        process.kill(signal.SIGKILL)
        ended(process, -9)
        for finished in range(number):
            untouched |= contents(place(study, finished) or study)
    out = ended(fork(zygote, tmp_path, *command), 0)
    jobs = ledger(study)
    assert [job["number"] for job in jobs.values()] == [0, 1, 2]
    assert [job["attempts"] for job in jobs.values()] == [2, 2, 1]
    assert {job["status"] for job in jobs.values()} == {"finished"}
    assert len({job["overrides"][-1] for job in jobs.values()}) == 3  # a restart repeats no draw
    assert sorted(path.name for path in study.glob("0*")) == sorted(jobs)
    assert {path: path.read_bytes() for path in untouched} == untouched
    best = min(jobs.values(), key=lambda job: job["result"])
    assert (
        f"best trial: {best['number']}, validation loss {best['result']:.4f}, in {study / best['name']}"
        in out
    )
    assert f"{best['overrides'][-1]}\n" in out

    call("train", *jobs[(place(study, 1) or study).name]["overrides"], f"hydra.run.dir={tmp_path / 'alone'}")
    a, b = (
        read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
        for run in (place(study, 1) or study, tmp_path / "alone")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_hopeless_trial_is_stopped_and_one_that_diverges_does_not_end_the_study(
    zygote: Zygote, options: list[str], tmp_path: Path
) -> None:
    """Each of three pairs is tried once; one learns, one does not within any time, one diverges."""
    (tmp_path / "mine" / "sweep").mkdir(parents=True)
    (tmp_path / "mine" / "sweep" / "pairs.yaml").write_text(
        "# @package _global_\n"
        "defaults: [optuna]\n"
        "sweep:\n"
        "  sampler: {_target_: optuna.samplers.BruteForceSampler}\n"
        "  pruner: {_target_: optuna.pruners.ThresholdPruner, upper: 5, n_warmup_steps: 40}\n"
        "hydra:\n  sweeper:\n    params:\n"
        "      optimizer.lr, trainer.max_steps: choice([1e-2,60],[1e-9,1000000],[1e30,60])\n"
    )
    study = tmp_path / "study"
    command = [
        *options,
        "sweep=pairs",
        "--config-dir",
        "mine",
        "trainer.val_every_steps=20",
    ]
    command += ["sweep.n_trials=9", "trainer.save_every_steps=20"]
    process = fork(zygote, tmp_path, *command)
    process.wait_for(lambda: any(job["status"] == "running" for job in ledger(study).values()))
    process.kill(signal.SIGTERM)  # the first job is still starting
    assert "failed" not in ended(process, 143)
    assert [job["status"] for job in ledger(study).values()] == ["interrupted"]

    out = ended(fork(zygote, tmp_path, f"resume={study}", "--config-dir", "mine"), 0)
    (run,) = study.glob("*lr=1e-09,max_steps=1000000")
    jobs = {name.split("-", 1)[1]: job for name, job in ledger(study).items()}
    assert {name: job["status"] for name, job in jobs.items()} == {
        "lr=0.01,max_steps=60": "finished",
        "lr=1e-09,max_steps=1000000": "pruned",
        "lr=1e+30,max_steps=60": "failed",
    }
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "pruned"
    reason = "pruned by ThresholdPruner of the study gpt: validation loss 5."
    assert reason in (run / "train.log").read_text()
    assert "resume=" not in (run / "train.log").read_text()
    assert 40 <= summary["steps"] < 1_000_000
    assert "not finite" in jobs["lr=1e+30,max_steps=60"]["error"]
    assert "trials of the study: 1 failed, 1 finished, 1 pruned\n" in out

    assert notes(read_results([study]))[-3:-1] == [
        "1 of 3 runs were pruned by a search",
        "1 of 3 runs are not finished: 1 failed",
    ]

    before = contents(run)
    ended(fork(zygote, tmp_path, *command), 0)  # nothing is left to do
    assert contents(run) == before
    assert [job["attempts"] for job in ledger(study).values()] == [job["attempts"] for job in jobs.values()]


LINES = [
    # arguments, the line
    ("", "sweep=optuna needs keys that vary, as in 'optimizer.lr=tag(log,interval(1e-4,1e-2))', or a space"),
    ("seed=1,2 sweep.n_trials=0", "sweep.n_trials=0 must be a whole number from 1 to 1000000"),
    ("optimizer.lr=interval(2,1)", "optimizer.lr=interval(2,1): `low <= high` must hold"),
    ("optimizer.lr=tag(lgo,interval(1,2))", "there is no tag lgo; a search knows log"),
    ("optimizer.lrr=interval(1,2)", "there is no key optimizer.lrr; did you mean optimizer.lr?"),
    ("seed=1,2 sweep.study=3", "sweep.study=3 must be text"),
    ("seed=1,2 sweep.storage=nosuch://x", "sweep.storage=nosuch://x cannot be opened"),
    (
        "seed=1,2 sweep.sampler._target_=optuna.samplers.Best",
        "correct sweep.sampler._target_=optuna.samplers.Best",
    ),
    ("seed=1,2 +sweep.sampler.n_start=3", "sweep.sampler.n_start is no argument of TPESampler"),
    ("seed=1,2 +sweep.pruner.n_min_trials=0", "Number of trials for pruning must be at least 1"),
    (
        "seed=1,2 hydra/launcher=slurm",
        "sweep=optuna waits for its trials, so it needs hydra/launcher=processes",
    ),
]


@pytest.mark.parametrize(("arguments", "line"), LINES, ids=[row[0] or "nothing varies" for row in LINES])
def test_mistake_in_a_search_is_told_in_one_line_and_leaves_nothing(
    arguments: str,
    line: str,
    options: list[str],
    tmp_path: Path,
    call: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        call("train", *options, *arguments.split())
    error = capsys.readouterr().err
    assert line in error
    assert (error.startswith("error: "), error.count("\n")) == (True, 1)
    assert not (tmp_path / "study").exists()


def test_missing_optuna_is_named_with_what_brings_it(
    options: list[str],
    call: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit):
        call("train", *options, RATES)
    assert capsys.readouterr().err == (
        "error: the package optuna is not installed; pip install 'gpt-lightning[optuna]'\n"
    )


def space(*arguments: str) -> list[Dimension]:
    return read_space({}, arguments, OverridesParser.create())[0]


def test_space_is_read_in_hydras_grammar() -> None:
    parser = OverridesParser.create()
    params = {
        "model.n_layer, model.n_embd": "choice([2,128],[4,92])",
        "seed": 1,
        "optimizer.lr": "interval(0,1)",
    }
    found, fixed = read_space(
        params, ["sweep=optuna", "sweep.jobs=2", "optimizer.lr=1e-3,1e-2", "name=a"], parser
    )
    assert fixed == ["seed=1", "name=a"]
    assert [(one.name, one.kind, one.arguments) for one in found] == [
        ("model.n_layer,model.n_embd", "categorical", {"choices": ["[2,128]", "[4,92]"]}),
        ("optimizer.lr", "categorical", {"choices": ["0.001", "0.01"]}),  # the command line counts
    ]
    assert found[0].overrides("[4,92]") == ["model.n_layer=4", "model.n_embd=92"]
    found = space(
        "a=interval(1,2)", "b=int(interval(1,8))", "c=tag(log,interval(1e-3,1))", "+d=range(0,301,50)"
    )
    assert [(one.kind, one.arguments) for one in found] == [
        ("float", {"low": 1.0, "high": 2.0, "log": False}),
        ("int", {"low": 1, "high": 8, "log": False}),
        ("float", {"low": 1e-3, "high": 1.0, "log": True}),
        ("int", {"low": 0, "high": 300, "step": 50}),
    ]
    assert found[2].overrides(1 / 300, short=True) == ["c=0.00333"]
    assert found[3].overrides(50) == ["+d=50"]


def opened(folder: Path, *overrides: str, where: tuple[str, ...] = ("optimizer.lr=interval(0,1)",)) -> Search:
    """A study in this process."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["sweep=optuna", "sweep.n_trials=4", *overrides])
    storage = None if cfg.sweep.storage is None else shared_storage(cfg.sweep.storage)
    folder.mkdir(exist_ok=True)
    return Search(cfg, folder, space(*where), [], storage=storage, pruner=pruner_of(cfg))


def begun(search: Search) -> Job:
    """The next trial, whose process begins and is killed."""
    job = next(search.jobs())
    job.begin()
    search.ledger.write()
    return job


@pytest.mark.parametrize("pruner", ["MedianPruner", "HyperbandPruner"])
def test_trials_that_are_worse_at_the_same_step_are_pruned(pruner: str, tmp_path: Path) -> None:
    search = opened(tmp_path / "study", f"sweep.pruner._target_=optuna.pruners.{pruner}", "sweep.n_trials=20")
    reasons = []
    for loss in [1.0] * 10 + [2.0] * 10:
        job = begun(search)
        (search.folder / job.name).mkdir()
        rows = [f"{step},{loss}\n" for step in (1, 3, 9, 27)]
        (search.folder / job.name / "metrics.csv").write_text("step,val/loss\n" + "".join(rows))
        reasons.append(search.hopeless(job))
        job.status, job.result = ("pruned" if reasons[-1] else "finished"), loss
        search.end(job)
    assert reasons[:10] == [None] * 10
    pruned = [reason for reason in reasons[10:] if reason]
    assert len(pruned) == 10 if pruner == "MedianPruner" else pruned
    assert all(f"pruned by {pruner} of the study" in reason for reason in pruned)


@pytest.mark.parametrize("storage", ["sqlite:///{}/all.db", "{}/all.journal"])
def test_directories_that_share_a_study_never_have_the_same_trial(storage: str, tmp_path: Path) -> None:
    shared = f"sweep.storage={storage.format(tmp_path)}"
    a, b = (opened(tmp_path / name, shared) for name in "ab")
    jobs = [begun(a), begun(b), begun(a), begun(b)]
    assert [job.number for job in jobs] == [0, 1, 0, 1]  # an interrupted trial comes before a new one
    more = list(a.jobs())
    assert [job.number for job in more] == [0, 2, 3]  # sweep.n_trials are those of both
    again = opened(tmp_path / "b", shared)
    assert [job.number for job in again.jobs()] == [1]
    assert again.ledger.jobs[0].overrides == jobs[1].overrides
    with pytest.raises(
        ConfigError, match=r"study gpt has other values or another space: seed \(was fixed, now"
    ):
        opened(tmp_path / "c", shared, where=("optimizer.lr=interval(0,1)", "seed=1,2"))
    with pytest.raises(
        ConfigError, match=r"has other values or another space: values .* another sweep\.study="
    ):
        opened(tmp_path / "c", shared, "trainer.max_steps=7")


def test_trial_that_is_pruned_while_it_starts_again_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"status": "interrupted", "best_val_loss": 3.5}')
    job = Job("000-lr=1", [], 0)
    job.end(tmp_path, -signal.SIGTERM, 2.0, "")
    assert job.status == "failed"
    (tmp_path / "pruned.txt").write_text("the pruner sees no hope")
    job.end(tmp_path, -signal.SIGTERM, 2.0, "")  # before the run listens to signals
    assert (job.status, job.result) == ("pruned", 3.5)
    assert read_summary(tmp_path)["status"] == "pruned"


def test_result_of_a_trial_is_recorded_by_the_next_start_if_the_first_was_killed(tmp_path: Path) -> None:
    search = opened(tmp_path / "a")
    jobs = [search.ledger.jobs[-1] for _ in zip(range(3), search.jobs(), strict=False)]
    jobs[0].exit_code = 0
    search.ledger.write()
    for job, status in zip(jobs, ("finished", "pruned", "interrupted"), strict=True):
        run = search.ledger.place(job)
        run.mkdir()
        (run / "summary.json").write_text(json.dumps({"status": status, "best_val_loss": 2.5}))
    with (tmp_path / "a" / JOURNAL).open("a") as journal:
        journal.write('{"op_code":')  # a disk was full
    (tmp_path / "a" / f"{JOURNAL}.lock").touch()
    again = opened(tmp_path / "a")
    assert again.ledger.jobs[0].exit_code == 0
    assert [job.number for job in again.jobs()] == [2, 3]
    assert [trial.state.name for trial in again.study.trials] == ["COMPLETE", "PRUNED", "RUNNING", "RUNNING"]
    assert "1 finished, 1 pruned, 2 running\nbest trial: 0, validation loss 2.5000" in again.best()


def run_into_failures(search: Search) -> None:
    for job in search.jobs():
        job.end(search.ledger.place(job), 1, 0.5, "error: no such corpus")
        search.end(job)


def test_study_whose_trials_all_fail_stops_and_says_why(tmp_path: Path) -> None:
    search = opened(tmp_path / "a", "sweep.n_trials=9")
    with pytest.raises(ConfigError, match="3 trials in a row have failed, the last one with: no such corpus"):
        run_into_failures(search)
    with pytest.raises(ConfigError, match=r"no trial of the study has a result \(3 failed\)"):
        search.best()


def test_seeded_sampler_draws_by_the_number_of_the_trial(tmp_path: Path) -> None:
    first = [job.overrides for job in opened(tmp_path / "a").jobs()]
    assert len({tuple(overrides) for overrides in first}) == 4
    second = [begun(opened(tmp_path / "b", f"sweep.n_trials={count}")).overrides for count in (1, 1)]
    assert second == [first[0]] * 2
    for job in opened(tmp_path / "b").jobs():
        assert job.overrides == first[job.number or 0]
    assert [job.overrides for job in opened(tmp_path / "c", "seed=2").jobs()] != first


def test_grid_keeps_its_seed_and_ends_when_each_point_was_visited_once(tmp_path: Path) -> None:
    grid = [
        "sweep.sampler._target_=optuna.samplers.GridSampler",
        "+sweep.sampler.search_space={seed:[1,2,3,4]}",
    ]
    for _ in range(4):
        search = opened(tmp_path / "a", *grid, "sweep.n_trials=9", where=("seed=range(1,5)",))
        job = begun(search)
        job.status, job.result = "finished", 2.5
        search.end(job)
    assert not list(search.jobs())
    assert sorted(job.overrides[-1] for job in search.ledger.jobs) == ["seed=1", "seed=2", "seed=3", "seed=4"]


def test_report_shows_the_losses_by_trial_and_which_key_mattered(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    search = opened(folder, "sweep.n_trials=12", where=("optimizer.lr=interval(0,1)", "seed=range(1,9)"))
    for job in search.jobs():
        loss = float(job.overrides[0].partition("=")[2])
        job.status, job.result = ("failed", None) if job.number == 1 else ("finished", loss)
        if job.number == 1:
            (folder / job.name).mkdir()
            (folder / job.name / "summary.json").write_text('{"status": "failed"}')
        search.end(job)
    results = [Result(folder / job.name, {}, {}, [], "finished", None) for job in search.ledger.jobs]
    (history, figure), (importances, bars) = study_figures(results)
    assert (history, importances) == ("Search a: loss by trial", "Search a: importance of each key")
    losses = {job.number: job.result for job in search.ledger.jobs if job.result is not None}
    assert len(losses) == 11
    (points,) = figure.axes[0].collections
    assert [tuple(point) for point in points.get_offsets()] == list(losses.items())
    best = figure.axes[0].lines[0].get_ydata()
    assert list(best) == [min(list(losses.values())[: i + 1]) for i in range(11)]
    assert next(text.get_text() for text in bars.axes[0].get_yticklabels()) == "optimizer.lr"
