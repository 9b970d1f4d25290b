"""A run that was killed anywhere and resumed is the run that was never interrupted: bits, logs, samples."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hub import dataset
from support.ranks import start as start_ranks
from support.runs import TINY
from support.zygote import Process, Zygote
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.util.tensor_util import make_ndarray

from gpt_lightning.config.start import start_arguments
from gpt_lightning.data import tokenizer as tokenizers
from gpt_lightning.data.files import write_json
from gpt_lightning.data.tokenizer import BPE
from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.rundir.metrics import Row, read_metrics

STEPS = 80
# Several epochs (one is 49 steps), accumulation, dropout, and every callback that has a state
RUN = [
    *TINY,
    "model.dropout=0.1",
    "device.micro_batch_size=4",
    "data.val_fraction=0.3",
    f"trainer.max_steps={STEPS}",
    "trainer.val_every_steps=20",
    "trainer.val_batches=null",
    "trainer.save_every_steps=7",
    "scheduler.warmup_steps=10",
    "callbacks=early_stopping",
    "callbacks.early_stopping.patience=100",
    "callbacks.layers=null",
]
VALIDATION_STEP = "gpt_lightning.training.module:LanguageModel.validation_step"
TRAINING_STEP = "gpt_lightning.training.module:LanguageModel.training_step"


@pytest.fixture(scope="module")
def options(small_text: Path) -> list[str]:
    return [*RUN, f"data.path={small_text}"]


@pytest.fixture(scope="module")
def uninterrupted(zygote: Zygote, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, out = zygote.run("train", *options, f"hydra.run.dir={folder}")
    assert code == 0, out
    return folder


@pytest.fixture(scope="module")
def stopped(zygote: Zygote, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that a signal ended after its step 31."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    process = zygote.start("train", *options, f"hydra.run.dir={folder}")
    assert process.end_when(reached(folder, 31), signal.SIGTERM) == 128 + signal.SIGTERM
    return folder


Start = Callable[..., Process]


@pytest.fixture
def start(zygote: Zygote, options: list[str], tmp_path: Path) -> Start:
    """Start the run in tmp_path/run."""

    def begin(*arguments: str, **kwargs: Any) -> Process:
        return zygote.start("train", *options, f"hydra.run.dir={tmp_path / 'run'}", *arguments, **kwargs)

    return begin


def metrics(run: Path) -> list[Row]:
    """The rows of metrics.csv without what a clock measured."""
    return [
        {key: value for key, value in row.items() if not key.startswith("speed/")}
        for row in read_metrics(run / "metrics.csv")
    ]


def tensorboard(run: Path) -> list[dict[str, list[tuple[int, Any]]]]:
    """What each of TensorBoard's loaders shows of a run by tag, without what a clock measured."""
    shown = []
    for loader in (event_accumulator, plugin_event_accumulator):  # of --load_fast=false, it is the second
        events: Any = loader.EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "tensors": 0})
        tags = events.Reload().Tags()
        found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags.get("scalars", [])}
        # of text, only TensorBoard's own loader leaves out what a restart replaces
        for tag in tags["tensors"] if loader is plugin_event_accumulator else ():
            found[tag] = [(e.step, make_ndarray(e.tensor_proto).tolist()) for e in events.Tensors(tag)]
        shown.append({tag: points for tag, points in found.items() if not tag.startswith("speed/")})
    return shown


def equal(a: Any, b: Any) -> bool:
    """Whether two trees are the same, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def callback_states(checkpoint: Any, run: Path) -> Any:
    """The states of the callbacks, with paths in the run directory."""
    states = {key: dict(state) for key, state in checkpoint["callbacks"].items()}
    for state in states.values():
        for key, value in state.items():
            if isinstance(value, str):
                state[key] = value.replace(str(run), "")
            elif isinstance(value, dict):
                state[key] = {name.replace(str(run), ""): score for name, score in value.items()}
    return states


def assert_same(run: Path, reference: Path) -> None:
    """Weights, optimizer, random generators and positions bitwise, and everything a user reads."""
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (read_checkpoint(folder / "checkpoints" / name) for folder in (run, reference))
        keys = ("state_dict", "optimizer_states", "lr_schedulers", "random_states", "progress")
        for key in keys:
            assert equal(a[key], b[key]), f"{key} of {name} differs"
        assert a["loops"]["fit_loop"]["state_dict"] == b["loops"]["fit_loop"]["state_dict"]
        assert equal(callback_states(a, run), callback_states(b, reference))
    assert metrics(run) == metrics(reference)
    assert tensorboard(run) == tensorboard(reference)
    assert (run / "samples.md").read_text() == (reference / "samples.md").read_text()
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (run, reference))
    assert a.keys() == b.keys()
    assert a["seconds"] > 0
    for key in a.keys() - {
        "seconds",
        "tokens_per_second",
        "best_checkpoint",
        "git_revision",
        "slurm_job",
        "overrides",
    }:
        assert a[key] == b[key], key
    assert a["best_checkpoint"] == str(run / "checkpoints" / "best.ckpt")
    assert not list(run.rglob("*.tmp"))


def resume(zygote: Zygote, run: Path, *arguments: str, **kwargs: Any) -> str:
    code, out = zygote.run("train", f"resume={run}", *arguments, **kwargs)
    assert code == 0, out
    assert "Warning" not in out
    return out


def status(run: Path) -> str:
    return str(json.loads((run / "summary.json").read_text())["status"])


def logged_step(run: Path) -> int:
    path = run / "metrics.csv"
    return int(read_metrics(path)[-1]["step"]) if path.exists() and len(read_metrics(path)) else 0


def reached(run: Path, step: int) -> Callable[[], bool]:
    return lambda: logged_step(run) >= step


@pytest.mark.slow
def test_run_killed_twenty_times_ends_as_if_it_never_was(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    run, draw, places = tmp_path / "run", random.Random(20), []
    process = start()
    for kill in range(20):
        step = max(
            1, kill * (STEPS - 5) // 20 + draw.randint(-4, 4)
        )  # anywhere, on the whole further each time
        pause = draw.random() * 0.02
        process.wait_for(reached(run, step))
        with pytest.raises(AssertionError):  # a little later, unless it has ended
            process.wait_for(lambda: False, timeout=pause)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        places.append(logged_step(run))
        process = zygote.start("train", f"resume={run}")
    assert process.wait() == 0, process.out.read_text()
    assert len(set(places)) > 5
    assert_same(run, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_finishes_the_step_and_leaves_a_run_that_goes_on(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = start()
    assert process.end_when(reached(run, 25), number) == 128 + number
    out = process.out.read_text()
    assert out.splitlines()[-1] == f"stopped by {number.name}; go on with resume={run}"
    assert "Traceback" not in out
    assert status(run) == "interrupted"
    # nothing of what was trained is lost
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["progress"]["step"] == logged_step(run)
    assert f"at step {logged_step(run)}" in resume(zygote, run)
    assert_same(run, uninterrupted)


def test_ctrl_c_before_the_training_leaves_nothing(
    zygote: Zygote, options: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    slow = {"gpt_lightning.train:starting_state": 60}
    process = zygote.start("train", *options, f"hydra.run.dir={run}", slow=slow)
    code = process.end_when(lambda: f"run: {run}" in process.out.read_text(), signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert not run.exists()


def test_run_is_extended_with_the_warm_up_that_it_had(
    call: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    shared = [*tiny[:-1], "scheduler=constant", "logger=none", "trainer.val_batches=1"]
    short, whole = tmp_path / "short", tmp_path / "whole"
    own = ["trainer.max_steps=20", "scheduler.warmup_steps=null", f"hydra.run.dir={short}"]
    call("train", *shared, *own)
    call("train", f"resume={short}", "trainer.max_steps=60")
    call("train", f"resume={short}", "trainer.max_steps=61")  # the warm-up is recorded
    own = ["trainer.max_steps=61", "scheduler.warmup_steps=2", f"hydra.run.dir={whole}"]
    call("train", *shared, *own)
    a, b = (read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (short, whole))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_second_ctrl_c_asks_for_patience_and_the_third_leaves_at_once(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    start().end_when(reached(run, 11))
    before = set(run.glob("tensorboard/*"))
    process = zygote.start("train", f"resume={run}", "data.num_workers=1", slow={TRAINING_STEP: 300})
    process.wait_for(lambda: set(run.glob("tensorboard/*")) - before)  # later, the signals are handled
    for line in ("SIGINT: finishing the step and writing a checkpoint", "please wait; another Ctrl-C"):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it to workers, too
        process.wait_for(lambda line=line: line in process.out.read_text())
    code = None
    while code is None:  # somebody hammers on the keyboard
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.005)  # Python itself prints a traceback if a signal comes just as it begins to ignore it
        code = process.poll()
    assert code == 128 + signal.SIGINT
    out = process.out.read_text()
    assert out.endswith(f"\nstopped by SIGINT; go on with resume={run}\n")
    assert [out.count(text) for text in ("SIGINT: ", "please wait", "Traceback")] == [1, 1, 0]
    assert status(run) == "interrupted"
    resume(zygote, run)
    assert_same(run, uninterrupted)


@pytest.mark.parametrize("step", [20, STEPS])
def test_kill_while_validating(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    process = start(slow={VALIDATION_STEP: 0.05} if step == 20 else {})
    if step == STEPS:  # the last validation; without waiting for all those before
        process.end_when(reached(run, STEPS - 9))
        process = zygote.start("train", f"resume={run}", slow={VALIDATION_STEP: 0.05})
    process.end_when(lambda: f"step {step}/{STEPS}" in process.out.read_text())
    assert f"step {step} | validation" not in process.out.read_text()
    assert status(run) == "interrupted"
    resume(zygote, run)
    assert_same(run, uninterrupted)


@pytest.mark.parametrize("step", [20, STEPS])
def test_signal_does_not_wait_for_a_validation_which_is_done_again(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    process = start()
    process.end_when(reached(run, step - 9))
    process = zygote.start("train", f"resume={run}", slow={VALIDATION_STEP: 0.5})
    code = process.end_when(lambda: f"step {step}/{STEPS}" in process.out.read_text(), signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, process.out.read_text()
    assert f"step {step} | validation" not in process.out.read_text()
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["progress"]["step"] == step
    resume(zygote, run)
    assert_same(run, uninterrupted)


def test_kill_while_writing_a_checkpoint(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    process = start(slow={"os:fsync": 0.3})
    process.wait_for(
        lambda: (checkpoints / "last-1.ckpt").exists() and (checkpoints / "last.ckpt.tmp").exists()
    )
    process.kill()
    process.wait()
    assert (checkpoints / "last.ckpt.tmp").exists()
    (checkpoints / "step-9.ckpt.tmp").touch()  # which no later step writes again
    assert "resuming from" in resume(zygote, tmp_path / "run")
    assert_same(tmp_path / "run", uninterrupted)


def test_damaged_last_checkpoint_is_replaced_by_the_one_before(
    stopped: Path, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    last, before = run / "checkpoints" / "last.ckpt", run / "checkpoints" / "last-1.ckpt"
    last.write_bytes(last.read_bytes()[:20000])
    out = resume(zygote, run)
    assert re.search(rf"damaged: {last} \(.*\); going on from {before}", out)
    assert_same(run, uninterrupted)


def test_torn_summary_does_not_keep_an_intact_run_from_going_on(
    stopped: Path, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    path = run / "summary.json"
    path.write_text(path.read_text()[:100])
    assert "resuming from" in resume(zygote, run)
    assert_same(run, uninterrupted)


def test_checkpoint_that_cannot_be_written_leaves_the_one_before(
    stopped: Path, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    code, out = zygote.run("train", f"resume={run}", file_limit=100_000)
    assert code == 1
    assert out.splitlines()[-1] == (
        f"error: cannot write the checkpoint {last} (File too large); make room or give the right to write "
        f"there, then go on from the checkpoint before it with resume={run}"
    )
    assert "Traceback" not in out
    assert status(run) == "failed"
    assert last.read_bytes() == before
    assert not list(run.rglob("*.tmp"))
    resume(zygote, run)
    assert_same(run, uninterrupted)


def test_damaged_checkpoint_never_replaces_the_one_before(
    stopped: Path, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(stopped, tmp_path / "run")
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    code, out = zygote.run("train", f"resume={run}", file_limit=100_000)  # ends when it writes the next one
    assert code == 1
    assert "cannot write the checkpoint" in out
    assert "last.ckpt at step 28" in resume(zygote, run)
    assert_same(run, uninterrupted)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small disk"
)
@pytest.mark.parametrize("size", [200, 1150])  # kB: for no checkpoint, for one and a bit
def test_full_disk_ends_in_one_line_and_the_run_goes_on_when_there_is_room(
    zygote: Zygote, options: list[str], uninterrupted: Path, tmp_path: Path, size: int
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "small", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        code, out = zygote.run("train", *options, f"hydra.run.dir={tmp_path / 'run'}")
        assert code == 1
        assert "Traceback" not in out
        assert re.search(
            r"\nerror: [^\n]*No space left on device[^\n]*; make room [^\n]*resume=[^\n]*\n$", out
        )
        assert not list(tmp_path.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(tmp_path)], check=True)
        resume(zygote, tmp_path / "run")
        assert_same(tmp_path / "run", uninterrupted)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_deleted_cache_does_not_end_a_run(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    process = start(f"paths.cache={cache}", slow={TRAINING_STEP: 0.01})
    process.wait_for(reached(run, 10))
    shutil.rmtree(cache)
    assert process.wait() == 0, process.out.read_text()
    assert_same(run, uninterrupted)


def test_run_killed_after_the_best_checkpoint_of_its_first_step_begins_again(
    start: Start, zygote: Zygote, tmp_path: Path
) -> None:
    run, twin = tmp_path / "run", tmp_path / "twin"
    first = "target_loss=100"  # it ends with a validation at step 1
    process = start(first, slow={"os:fsync": 0.3})
    process.end_when((run / "checkpoints" / "best.ckpt").exists)
    assert not (run / "checkpoints" / "last.ckpt").exists()
    assert "it begins again" in resume(zygote, run)
    assert start(first, f"hydra.run.dir={twin}").wait() == 0
    assert_same(run, twin)


def test_run_killed_before_its_first_checkpoint_begins_again(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(slow={TRAINING_STEP: 60})
    process.end_when((run / "summary.json").exists)
    assert not (run / "checkpoints" / "last.ckpt").exists()
    assert status(run) == "interrupted"
    assert "it begins again" in resume(zygote, run)
    assert_same(run, uninterrupted)


def test_run_goes_on_with_its_own_text_and_tokenizer_only(
    zygote: Zygote, small_text: Path, tmp_path: Path
) -> None:
    text, run, cache = tmp_path / "my.txt", tmp_path / "run", tmp_path / "cache"
    whole = small_text.read_text()
    text.write_text(whole)
    options = [*RUN, f"data.path={text}", f"hydra.run.dir={run}", f"paths.cache={cache}"]
    options += ["tokenizer=bpe", "tokenizer.vocab_size=300"]
    process = zygote.start("train", *options, slow={TRAINING_STEP: 0.02})
    process.end_when(reached(run, 9), signal.SIGTERM)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".json", ".csv", ".ckpt")}
    text.write_text(whole.replace("cat", "cow"))
    code, out = zygote.run("train", f"resume={run}")
    assert code == 1
    assert "error: the corpus is not the one that the run in" in out.splitlines()[-1]
    assert f"init_from={run}" in out
    assert {path: path.read_bytes() for path in before} == before
    text.write_text(whole)
    own = read_checkpoint(run / "checkpoints" / "last.ckpt")
    (learned,) = (cache / "tokenizers").glob("*.json")
    other = tokenizers.to_state(BPE(280).build(lambda split: iter([whole[:5000]])))
    learned.write_text(json.dumps(other))  # as damage, or another release, may leave it
    resume(zygote, run)
    new = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert new["progress"]["step"] == STEPS
    assert equal(new["tokenizer"], own["tokenizer"])
    summary = json.loads((run / "summary.json").read_text())
    for key in ("corpus_digest", "tokenizer_digest"):
        assert own[key] == new[key] == summary[key]


def test_run_without_its_last_checkpoint_goes_on_from_a_snapshot_or_is_refused(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start("trainer.snapshot_every_steps=30")
    process.end_when(reached(run, 46))
    for path in run.glob("checkpoints/last*.ckpt"):
        path.unlink()
    shutil.copytree(run, tmp_path / "without")
    assert "resuming from" in (out := resume(zygote, run))
    assert "step-30.ckpt at step 30" in out
    assert_same(run, uninterrupted)
    (tmp_path / "without" / "checkpoints" / "step-30.ckpt").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "without").rglob("*") if path.is_file()}
    code, out = zygote.run("train", f"resume={tmp_path / 'without'}")
    assert code == 1
    assert "has no last.ckpt to go on from" in out
    assert f"init_from={tmp_path / 'without' / 'checkpoints' / 'best.ckpt'}" in out
    log_file = tmp_path / "without" / "train.log"
    assert {path: path.read_bytes() for path in before if path != log_file} == {
        path: content for path, content in before.items() if path != log_file
    }


def test_snapshot_of_a_step_is_there_before_its_last_checkpoint(
    start: Start, zygote: Zygote, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    last = run / "checkpoints" / "last.ckpt"
    process = start("trainer.snapshot_every_steps=10", "trainer.save_every_steps=10", slow={"os:fsync": 0.3})
    process.wait_for(last.exists)
    first = last.stat().st_ino  # of step 1
    process.end_when(lambda: last.stat().st_ino != first)
    assert "at step 10" in resume(zygote, run)
    assert (run / "checkpoints" / "step-10.ckpt").is_file()


def test_time_limit_ends_a_run_that_goes_on(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start("time_limit=0:00:03", slow={TRAINING_STEP: 0.05})  # in all it would take eight
    assert process.wait() == 124
    out = process.out.read_text()
    assert out.splitlines()[-1] == f"stopped by its time limit; go on with resume={run}"
    assert status(run) == "interrupted"
    resume(zygote, run, "time_limit=null")
    assert_same(run, uninterrupted)


def test_slurm_requeues_a_job_that_then_goes_on(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    run, tools = tmp_path / "run", tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\n")
    (tools / "scontrol").chmod(0o755)
    slurm = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "77", "SLURM_PROCID": "0"}
    slurm |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "PATH": f"{tools}:{os.environ['PATH']}"}
    process = start(**slurm)
    assert process.end_when(reached(run, 11), signal.SIGUSR1) == 128 + signal.SIGUSR1, process.out.read_text()
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    again = start(**slurm, SLURM_RESTART_COUNT="1")  # the very same command
    assert again.wait() == 0, again.out.read_text()
    assert "resuming from" in again.out.read_text()
    assert_same(run, uninterrupted)
    again = start(TORCHELASTIC_RESTART_COUNT="1")  # torchrun's way to say the same
    assert again.wait() == 0, again.out.read_text()
    assert "is finished; there is nothing to resume" in again.out.read_text()


def test_slurm_job_without_a_run_directory_goes_on_with_its_own_run(
    zygote: Zygote, options: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    job |= {"SLURM_NODEID": "0", "SLURM_JOB_ID": "78", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "1"}

    def folders() -> set[Path]:
        return {path.parent for path in tmp_path.glob("outputs/**/summary.json")}

    process = zygote.start("train", *options, cwd=tmp_path, **job)
    process.end_when(lambda: any(reached(folder, 11)() for folder in folders()))
    (run,) = folders()
    assert json.loads((run / "summary.json").read_text())["slurm_job"] == "77_1"
    decoys = {"task": {"slurm_job": "77_2"}, "none": {"slurm_job": None}, "command": {}}
    for name, changes in decoys.items():  # newer runs: of others, and of the job's next command
        shutil.copytree(run, run.parent / name)
        summary = json.loads((run / "summary.json").read_text()) | changes
        (run.parent / name / "summary.json").write_text(json.dumps(summary))
    other = run.parent / "command" / ".hydra" / "overrides.yaml"
    other.write_text(other.read_text() + "- trainer.keep_last=3\n")
    code, out = zygote.run("train", *options, cwd=tmp_path, **job, SLURM_RESTART_COUNT="1")
    assert code == 0, out
    assert f"resuming from {run}" in out
    assert_same(run, uninterrupted)
    code, out = zygote.run("train", *options, cwd=tmp_path, **job, SLURM_RESTART_COUNT="2")
    assert (code, out) == (0, f"the run in {run} is finished; there is nothing to resume\n")
    before = folders()
    few = ["trainer.max_steps=1", "scheduler.warmup_steps=0", "logger=none", "callbacks.samples=null"]
    code, out = zygote.run("train", *options, *few, cwd=tmp_path, **job, SLURM_RESTART_COUNT="2")
    assert code == 0, out  # a command of the job that has not begun
    assert len(folders() - before) == 1


@pytest.mark.parametrize(
    "end",
    [["target_loss=3.7"], ["callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=9"]],
    ids=["target_loss", "early_stopping"],
)
def test_run_that_stopped_early_does_not_train_on_when_killed_before_it_said_so(
    start: Start, zygote: Zygote, tmp_path: Path, end: list[str]
) -> None:
    run = tmp_path / "run"
    assert start(*end).wait() == 0
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["steps"] < STEPS
    (run / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    shutil.copytree(run, tmp_path / "before")
    resume(zygote, run)
    again = json.loads((run / "summary.json").read_text())
    for key in ("status", "steps", "val_loss", "best_val_loss", "train_loss"):
        assert again[key] == summary[key]
    assert metrics(run) == metrics(tmp_path / "before")


def test_run_directory_may_move_and_latest_finds_it(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    process = start()
    process.end_when(reached(tmp_path / "run", 46))
    moved = tmp_path / "outputs" / "another place, it's new" / "run=1"
    moved.parent.mkdir(parents=True)
    (tmp_path / "run").rename(moved)
    code, out = zygote.run("train", "resume=latest", cwd=tmp_path)
    assert code == 0, out
    assert f"resuming from {moved}" in out
    assert_same(moved, uninterrupted)


@pytest.mark.parametrize("weights", ["weights.ckpt", "base/latest"])
@pytest.mark.parametrize("place", [[], ["hydra.run.dir=outputs/tuned"]])
def test_restarted_job_finds_its_run_that_began_from_weights(
    weights: str, place: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(folder: Path, overrides: list[str]) -> None:
        (folder / ".hydra").mkdir(parents=True)
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.ckpt").touch()
        write_json(folder / "summary.json", {"status": "interrupted", "slurm_job": "77"})
        hydra = {"job": {"config_name": "train"}, "overrides": {"hydra": []}}
        hydra["runtime"] = {"cwd": str(tmp_path), "config_sources": []}
        for name, content in (("overrides", overrides), ("config", {}), ("hydra", {"hydra": hydra})):
            (folder / ".hydra" / f"{name}.yaml").write_text(json.dumps(content))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    begin(tmp_path / "outputs" / "base", [])
    command = ["seed=2", f"init_from={weights}", "data=text", *place]
    begin(tmp_path / "outputs" / "tuned", start_arguments(command))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert f"resume='{tmp_path}/outputs/tuned'" in start_arguments(command)


def test_latest_prefers_a_run_that_is_not_finished(tmp_path: Path) -> None:
    states = {"a": "interrupted", "b": "failed", "c": "finished", "d": "finished"}
    for age, (name, state) in enumerate(states.items()):  # the last one is the newest
        path = tmp_path / name / "summary.json"
        write_json(path, {"status": state})
        os.utime(path, (1000 + age, 1000 + age))
        (tmp_path / name / ".hydra").mkdir(exist_ok=True)
        for file, text in (("overrides.yaml", "[]\n"), ("config.yaml", "{}\n")):
            (tmp_path / name / ".hydra" / file).write_text(text)
        (tmp_path / name / ".hydra" / "hydra.yaml").write_text(
            f"hydra: {{job: {{config_name: train}}, overrides: {{hydra: []}}, "
            f"runtime: {{cwd: {tmp_path}/gone, config_sources: []}}}}\n"
        )

    def latest() -> str:
        arguments = start_arguments(["resume=latest", f"paths.outputs={tmp_path}"])
        return next(argument for argument in arguments if argument.startswith("resume="))

    assert latest() == f"resume='{tmp_path}/a'"  # b failed at its start: it has no checkpoint
    (tmp_path / "b" / "checkpoints").mkdir()
    (tmp_path / "b" / "checkpoints" / "last.ckpt").touch()
    assert latest() == f"resume='{tmp_path}/b'"
    write_json(tmp_path / "b" / "summary.json", {"status": "finished"})
    assert latest() == f"resume='{tmp_path}/a'"
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    assert latest() == f"resume='{tmp_path}/d'"


def test_choices_and_interpolations_of_the_command_line_come_back(
    zygote: Zygote, options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "mine" / "optimizer").mkdir(parents=True)
    (tmp_path / "mine" / "optimizer" / "plain.yaml").write_text(
        "_target_: torch.optim.SGD\n_partial_: true\nlr: 0.1\n"
    )
    run = tmp_path / "run"
    mine = ["hydra.searchpath=[file://mine]", "optimizer=plain", "hydra.run.dir=${name}", "name=run"]
    few = ["trainer.max_steps=8", "scheduler.warmup_steps=0", "callbacks.samples=null", "logger=none"]
    few += ["lora.lora_alpha=${trainer.keep_last}"]
    code, out = zygote.run("train", *options, *mine, *few, cwd=tmp_path)
    assert code == 0, out
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    assert "at step 8" in resume(zygote, run)
    assert status(run) == "finished"


def test_what_would_change_a_run_is_refused_and_the_rest_allowed(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start()
    process.wait_for(reached(run, 11))
    second = zygote.start("train", f"resume={run}")  # while the first still trains
    assert second.wait() == 1
    assert f"error: another process trains in {run}" in second.out.read_text()
    process.kill()
    process.wait()
    changes = ["model.n_layer=3", "optimizer.lr=1", "seed=2", "data.batch_size=16", "trainer.max_steps=500"]
    changes += ["trainer.val_every_steps=7", "trainer.val_batches=3"]  # since it may stop early
    before = (run / "metrics.csv").read_bytes()
    code, out = zygote.run("train", f"resume={run}", *changes, "logger=none")
    assert code == 1
    assert out.count("\n") == 1
    for change in changes:
        key, value = change.split("=")
        assert re.search(rf"{re.escape(key)} \(was [^)]*, now {value}\)", out)
    assert "logger" not in out
    assert before == (run / "metrics.csv").read_bytes()
    resume(zygote, run, "callbacks.samples=null", "trainer.save_every_steps=50", "data.num_workers=1")
    a, b = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, uninterrupted))
    assert equal(a["state_dict"], b["state_dict"])
    out = resume(zygote, run)
    assert out == f"the run in {run} is finished; there is nothing to resume\n"


def test_validations_at_other_steps_do_not_change_the_weights(
    start: Start, zygote: Zygote, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start("callbacks.early_stopping=null")  # which never stops the other
    process.end_when(reached(run, 23), signal.SIGTERM)
    stopped = logged_step(run)
    resume(zygote, run, "trainer.val_every_steps=7")
    a, b = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, uninterrupted))
    assert equal(a["state_dict"], b["state_dict"])
    validated = [row["step"] for row in metrics(run) if "val/loss" in row]
    assert validated == [20, *(step for step in range(7, STEPS, 7) if step > stopped), STEPS]
    rows = [{k: v for k, v in row.items() if not k.startswith("val/")} for row in metrics(run)]
    assert rows == [{k: v for k, v in r.items() if not k.startswith("val/")} for r in metrics(uninterrupted)]


@pytest.mark.slow
def test_two_ranks_with_workers_go_on_exactly_with_a_dataset_that_streams(
    zygote: Zygote, small_text: Path, tmp_path: Path
) -> None:
    texts = small_text.read_text().split(".\n")
    hub = dataset(tmp_path / "hub", [texts[start::3] * 4 for start in range(3)])
    options = [text for text in RUN if text != "data=text"]
    options += ["data=huggingface", f"data.name={hub}", "data.streaming=true", "data.shuffle_buffer=16"]
    options += ["trainer.val_batches=4"]
    ranks = ["device.devices=2", "device.micro_batch_size=2", "data.num_workers=1"]
    a, b = tmp_path / "a", tmp_path / "b"
    whole = start_ranks(zygote, [*options, *ranks, f"hydra.run.dir={a}"])
    process = zygote.start("train", *options, *ranks, f"hydra.run.dir={b}")  # Lightning starts the second one
    process.wait_for(lambda: logged_step(b) > 40)  # shortly before the epoch ends
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    (second,) = (pid for pid in children if b"train_ddp_process_1" in commands[pid])
    os.kill(int(second), signal.SIGKILL)
    assert process.wait() == 1
    out = process.out.read_text()
    assert "Traceback" not in out
    line = f"rank 1 (process {second}) was killed by SIGKILL; go on with resume={b}"
    assert out.splitlines()[-1].removeprefix("error: ") == line
    for rank in [*whole, *start_ranks(zygote, [f"resume={b}"])]:
        assert rank.wait() == 0, rank.out.read_text()
    assert_same(b, a)
