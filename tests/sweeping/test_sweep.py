"""Sweeps as a user starts them: real processes that are killed, told to end, started again and extended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict
from support.comparison import hyperparameters
from support.sweeps import OPTIONS, end, ended, fork, is_running, ledger, reached, start
from support.zygote import Zygote

from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.resolvers import CONF, sweep_digest
from gpt_lightning.config.run_directory import check_same_sweep
from gpt_lightning.config.start import start_arguments
from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.rundir.report import overview, read_results
from gpt_lightning.sweeping.jobs import jobs_of, name_of
from gpt_lightning.sweeping.launcher import refuse_unfinished, shares
from gpt_lightning.sweeping.process import job_environment

LONG = ["trainer.max_steps=120", "trainer.save_every_steps=20", "trainer.val_every_steps=60"]


@pytest.fixture
def options(small_text: Path, tmp_path: Path) -> list[str]:
    return [*OPTIONS, f"data.path={small_text}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]


@pytest.mark.slow
def test_killed_job_leaves_the_others_alone_and_the_same_command_resumes_it(
    zygote: Zygote,
    options: list[str],
    tmp_path: Path,
    call: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    sweep = tmp_path / "sweep"
    options = [option for option in options if option != "logger=none"]
    options += ["optimizer.lr=1e-3", "optimizer.betas=[0.9, 0.95]"]
    command = ["-m", *options, *LONG, "sweep.jobs=2"]
    process = fork(zygote, tmp_path, *command, "seed=1,2")
    process.wait_for(reached(sweep / "seed=1", 30))
    job = ledger(sweep)["seed=1"]["pid"]
    os.kill(job, signal.SIGSTOP)  # so that the sweep does not end before the other one is refused
    recorded = (sweep / "multirun.yaml").read_bytes()
    with pytest.raises(SystemExit):
        call("train", *command, "seed=1,2,3")
    assert f"another process trains in {sweep}" in capsys.readouterr().err
    assert (sweep / "multirun.yaml").read_bytes() == recorded
    os.kill(job, signal.SIGKILL)
    out = ended(process, 1)
    assert "seed=1: failed (killed by SIGKILL)" in out
    assert "error: 1 of 2 jobs failed: seed=1;" in out
    assert [ledger(sweep)[f"seed={seed}"]["status"] for seed in (1, 2)] == ["failed", "finished"]
    untouched = {path: path.read_bytes() for path in (sweep / "seed=2").rglob("*") if path.is_file()}

    with pytest.raises(SystemExit):
        call("train", *command, "seed=1,2", "optimizer.weight_decay=0.3")
    assert "holds another sweep: optimizer.weight_decay (was" in capsys.readouterr().err
    same = ["optimizer.lr=0.001", "optimizer.betas=[0.9,0.95]"]
    out = ended(fork(zygote, tmp_path, *command, *same, "seed=1,2,3"), 0)  # extended by a value
    assert "sweep: 3 jobs, 1 of them finished before" in out
    assert "[seed=1] resuming from" in out
    assert {path: path.read_bytes() for path in untouched} == untouched
    jobs = ledger(sweep)
    assert {name: (job["status"], job["attempts"]) for name, job in jobs.items()} == {
        "seed=1": ("finished", 2),
        "seed=2": ("finished", 1),
        "seed=3": ("finished", 1),
    }
    for seed in (1, 2, 3):
        assert hyperparameters(sweep / f"seed={seed}" / "tensorboard") == [{"seed": seed}]
    fixed = [option for option in options if not option.startswith("hydra.sweep.dir")]
    call("train", *fixed, *LONG, "seed=1", f"hydra.run.dir={tmp_path / 'alone'}")
    a, b = (
        read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
        for run in (sweep / "seed=1", tmp_path / "alone")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    summary = json.loads((tmp_path / "alone" / "summary.json").read_text())
    assert jobs["seed=1"]["result"] == summary["best_val_loss"]


@pytest.mark.slow
def test_sweep_that_is_ended_leaves_no_process_and_goes_on_by_its_directory(
    zygote: Zygote, options: list[str], tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    (tmp_path / "mine" / "scheduler").mkdir(parents=True)
    (tmp_path / "mine" / "scheduler" / "mine.yaml").write_text(
        (CONF / "scheduler" / "cosine.yaml").read_text()
    )
    options += ["--config-dir", "mine", "scheduler=mine", "data.stride=${model.block_size}"]
    process = fork(zygote, tmp_path, "-m", *options, *LONG, "seed=1,2")
    for number, step, jobs in ((signal.SIGTERM, 30, 1), (signal.SIGKILL, 50, 2)):
        process.wait_for(reached(sweep / "seed=1", step))
        pid = ledger(sweep)["seed=1"]["pid"]
        process.kill(number)
        ended(process, 143 if number == signal.SIGTERM else -9)
        deadline = time.monotonic() + 60
        while is_running(pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert json.loads((sweep / "seed=1" / "summary.json").read_text())["status"] == "interrupted"
        assert not (sweep / "seed=2").exists()
        process = fork(zygote, tmp_path, f"resume={sweep}", f"sweep.jobs={jobs}", "time_limit=1:00:00")
    out = ended(process, 0)
    assert "[seed=1] resuming from" in out
    assert out.endswith(f"\n{overview(read_results([sweep]))}\nsweep: {sweep}\n")
    assert {job["status"] for job in ledger(sweep).values()} == {"finished"}


def test_ctrl_c_while_the_first_job_starts_ends_the_sweep(options: list[str], tmp_path: Path) -> None:
    process = start(tmp_path, "-m", *options, "seed=1,2", start_new_session=True)
    assert process.stdout is not None
    next(line for line in process.stdout if "sweep: 2 jobs" in line)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it to all processes of the command
    out = end(process, 128 + signal.SIGINT)
    assert "the sweep was interrupted; the same command goes on with it" in out
    assert "Traceback" not in out
    assert {job["status"] for job in ledger(tmp_path / "sweep").values()} <= {"waiting", "interrupted"}


@pytest.mark.slow
def test_jobs_of_a_sweep_may_have_several_processes_and_end_by_themselves(
    zygote: Zygote, options: list[str], tmp_path: Path
) -> None:
    """One and two processes give the same losses; a wrong value ends no other job."""
    sweep = tmp_path / "sweep"
    shared = ["trainer=ddp", *(option for option in options if option.startswith("trainer."))]
    command = [
        "-m",
        *options,
        *shared,
        "trainer.val_batches=null",
        "device.micro_batch_size=4",
        "device.devices=1,2",
        "data.batch_size=8,-1",
    ]
    out = ended(fork(zygote, tmp_path, *command, "sweep.retries=1"), 1)
    jobs = ledger(sweep)
    assert {(job["status"], job["attempts"]) for job in jobs.values()} == {("finished", 1), ("failed", 2)}
    assert "error: 2 of 4 jobs failed" in out
    wrong = jobs["batch_size=-1,devices=2"]
    assert wrong["error"].startswith("data.batch_size=-1 must be a whole number")
    assert not (sweep / "batch_size=-1,devices=2").exists()
    a, b = (sweep / f"batch_size=8,devices={count}" for count in (1, 2))
    counts = [json.loads((run / "summary.json").read_text())["processes"] for run in (a, b)]
    assert counts == [1, 2]
    losses = [
        [row["val/loss"] for row in read_metrics(run / "metrics.csv") if "val/loss" in row] for run in (a, b)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_shards_that_a_sweep_prepares_make_the_tokens_of_one_process(
    small_text: Path, tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    source = ["data=text", f"data.path={small_text}", "tokenizer.vocab_size=300"]
    shards = ["shard=range(3)", "shards=3", "sweep.jobs=2", f"paths.cache={tmp_path / 'many'}"]
    done = command("prepare", "-m", *source, *shards, spares=1)
    assert done.returncode == 0, done.stderr
    sweep = next((tmp_path / "outputs" / "prepare").iterdir())
    assert {job["status"] for job in ledger(sweep).values()} == {"finished"}
    assert {path.name for path in sweep.iterdir()} == {".hydra", "multirun.yaml", "sweep.jsonl"}
    again = command("prepare", "-m", *source, "shard=1,3", *shards[1:], spares=1)  # finished shards are kept
    assert (again.returncode, ledger(sweep)["shard=1"]["status"]) == (1, "finished")
    assert "shard=3: failed (shard=3 must be a whole number from 0 to 2, since shards=3)" in again.stdout
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        read_results([sweep])
    command("prepare", *source, f"paths.cache={tmp_path / 'one'}")
    one, many = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*/*.bin")}
        for name in ("one", "many")
    )
    assert set(one) == {"train.bin", "val.bin"}
    assert one == many


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("sweep.jobs=many", "sweep.jobs='many' must be a whole number from 1 to 1000"),
        ("sweep.jobs=0", "sweep.jobs=0 must be a whole number from 1 to 1000"),
        ("sweep.retries=-1", "sweep.retries=-1 must be a whole number of at least 0"),
        ("data.batch_size=range(0)", "the sweep has no job; one of its keys has no value"),
        (
            "data.batch_size=4,4",
            "jobs of the sweep are the same: batch_size=4,seed=1, batch_size=4,seed=2; name each value once",
        ),
    ],
)
def test_wrong_numbers_of_a_sweep_are_named_and_leave_nothing(
    override: str,
    line: str,
    options: list[str],
    tmp_path: Path,
    call: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        call("train", "-m", *options, "seed=1,2", override)
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not (tmp_path / "sweep").exists()


def test_name_of_a_job_is_short_stable_and_safe() -> None:
    assert name_of(["optimizer.lr=0.003", "seed=2"]) == name_of(["seed=2", "optimizer.lr=0.003"])
    assert name_of(["optimizer.lr=0.003", "seed=2"]) == "lr=0.003,seed=2"
    assert name_of(["model.dropout=0.1", "lora.dropout=0.2"]) == "lora.dropout=0.2,model.dropout=0.1"
    assert name_of(["model=tiny", "data.path='/a b/../c'"]) == "model=tiny,path=a_b_.._c-d01ad173"
    assert name_of([]) == "job"
    assert len(name_of([f"+note={'字' * 100}"]).encode()) <= 120
    assert name_of(["field='a b'"]) != name_of(["field='a/b'"])
    many = [f"callbacks.samples.prompt_{i}=once_upon_a_time" for i in range(20)]
    assert len(name_of(many)) <= 120
    assert name_of(many) != name_of([*many[:-1], "callbacks.samples.prompt_19=twice"])


def test_jobs_have_directories_of_their_own() -> None:
    jobs = jobs_of(
        [["seed=1", "data.field='a b'"], ["seed=1", "data.field='a/b'"]], ["seed=1", "data.field=a"]
    )
    assert len({job.name for job in jobs}) == 2
    assert all(job.name.startswith("field=a_b-") for job in jobs)
    with pytest.raises(ValueError, match="jobs of the sweep are the same"):
        jobs_of([["seed=1"], ["seed=1"]], [])
    (job,) = jobs_of([["seed=1", "sweep.jobs=4"]], ["sweep.jobs=4"])
    assert job.overrides == ["seed=1"]
    given = ["optimizer.lr=1e-3", "optimizer.betas=[0.9, 0.95]", "time_limit=00:10:00", "init_from=hf:gpt2"]
    fixed = [
        "optimizer.lr=0.001",
        "optimizer.betas=[0.9,0.95]",
        r"time_limit=00\:10\:00",
        r"init_from=hf\:gpt2",
    ]
    (job,) = jobs_of([[*fixed, "seed=1"]], [*given, "seed=1,2"])  # as Hydra writes them for a job
    assert job.name == "seed=1"


def test_jobs_that_were_interrupted_make_the_sweep_end_with_an_error(tmp_path: Path) -> None:
    jobs = jobs_of([["seed=1"], ["seed=2"]], [])
    jobs[0].status, jobs[1].status = "finished", "interrupted"
    line = "1 of 2 jobs were interrupted: seed=2; the same command goes on with them"
    with pytest.raises(ValueError, match=line):
        refuse_unfinished(jobs, tmp_path)


def test_sweep_of_an_older_release_goes_on_and_what_only_shows_may_change(tmp_path: Path) -> None:
    def config(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", [*overrides, "paths.run=run"], return_hydra_config=True)

    old = config("optimizer.lr=1e-3")
    with open_dict(old):
        del old.device.matmul_precision  # which that release did not have
        del old.hydra.sweep
    OmegaConf.save(old, tmp_path / "multirun.yaml")
    check_same_sweep(tmp_path, config("optimizer.lr=1e-3", "time_limit=00:10:00", "logger=none"))
    for other in ("optimizer.lr=2e-3", "+note=a", "trainer.val_batches=3"):
        with pytest.raises(ConfigError, match=other.partition("=")[0].lstrip("+")):
            check_same_sweep(tmp_path, config("optimizer.lr=1e-3", other))
    digests = {
        sweep_digest(_root_=config(*o)) for o in ((), ("time_limit=00:10:00",), ("trainer.keep_last=3",))
    }
    assert len(digests) == 1
    assert sweep_digest(_root_=config("trainer.val_batches=3")) not in digests


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["hydra.sweeper.max_batch_size=1"], "hydra.sweeper.max_batch_size= does not go with sweep.jobs="),
        (["hydra/launcher=basic", "device.devices=2"], "several processes per run need a launcher"),
    ],
)
def test_what_no_sweep_can_do_is_refused(
    options: list[str],
    line: str,
    tmp_path: Path,
    call: Callable[..., Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        call(
            "train",
            "-m",
            *OPTIONS,
            "data.path=x",
            f"hydra.sweep.dir={tmp_path / 'sweep'}",
            "seed=1,2",
            *options,
        )
    assert f"error: {line}" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_sweep_of_hydras_own_launchers_is_not_begun_anew(tmp_path: Path) -> None:
    text = "hydra: {launcher: {_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher}}"
    (tmp_path / "multirun.yaml").write_text(text)
    with pytest.raises(ConfigError, match="was started with a launcher that cannot go on; resume its runs"):
        start_arguments([f"resume={tmp_path}"])


def test_launcher_of_a_sweep_is_that_of_its_resume(tmp_path: Path) -> None:
    target = "hydra_plugins.gpt_lightning_sweeps.slurm.Slurm"
    config = {
        "launcher": {"_target_": target},
        "job": {"name": "train", "config_name": "train"},
        "runtime": {"cwd": str(Path.cwd()), "config_sources": []},
        "overrides": {
            "hydra": ["hydra.mode=MULTIRUN", "hydra/launcher=slurm", "hydra.sweep.dir=x"],
            "task": ["seed=1,2"],
        },
    }
    OmegaConf.save({"hydra": config}, tmp_path / "multirun.yaml")
    found = start_arguments([f"resume={tmp_path}", "sweep.jobs=2"])
    assert found == [
        "--multirun", "hydra/launcher=slurm", "seed=1,2", "sweep.jobs=2", f"hydra.sweep.dir='{tmp_path}'",
    ]  # fmt: skip


def test_jobs_have_what_the_choice_of_a_sweep_sets() -> None:
    """experiment=scaling chooses a ladder, which sets another length of the runs."""
    given = ["experiment=scaling", "sweep=isoflop"]
    (job,) = jobs_of([[*given, "size=w24"]], given)
    assert job.name == "size=w24"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        trainer = compose("train", job.overrides).trainer
    assert (trainer.max_flops, trainer.tokens_per_parameter, trainer.max_steps) == (2.5e11, None, None)


def test_job_has_no_rank_of_another_process_and_its_share_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "PL_GLOBAL_SEED", "TORCHELASTIC_RUN_ID")
    slurm = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "HYDRA_FULL_ERROR")
    kept = {"HOME": "/home", "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}
    assert job_environment(dict.fromkeys(names + slurm, "1") | kept) == kept
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert shares(1) == [{}]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares(2)] == ["4,6", "5"]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares(4)] == ["4", "5", "6", "4"]
    assert {share["OMP_NUM_THREADS"] for share in shares(1000)} == {"1"}
