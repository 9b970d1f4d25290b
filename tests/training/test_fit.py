"""`fit`: how runs end, and how finished runs are extended."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerStatus

from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.token_store import TokenStore, prepare
from gpt_lightning.data.tokenizer import Byte
from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.rundir.checkpoint import Checkpoint, read_checkpoint
from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.rundir.summary import RunSummary, read_summary
from gpt_lightning.training.callbacks.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint
from gpt_lightning.training.callbacks.interruption import Interrupted
from gpt_lightning.training.callbacks.metrics import StepMetrics
from gpt_lightning.training.callbacks.samples import Samples
from gpt_lightning.training.callbacks.stop import Stop
from gpt_lightning.training.fit import closing_lines, fit, quiet_lightning
from gpt_lightning.training.loggers import MetricsCSV
from gpt_lightning.training.module import LanguageModel
from gpt_lightning.training.muon import muon
from gpt_lightning.training.optimizers import OptimizerFactory, adamw
from gpt_lightning.training.schedules import constant


@pytest.fixture(scope="module")
def store(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return prepare(TextFiles(str(small_text)), Byte(), tmp_path_factory.mktemp("store"))


Run = Callable[..., RunSummary]
ADAMW = partial(adamw, lr=1e-2)


@pytest.fixture
def run(store: TokenStore) -> Run:
    """Train in a folder with two micro-batches per step."""

    def train(
        folder: Path,
        *callbacks: pl.Callback,
        max_steps: int = 8,
        save_every_steps: int = 3,
        val_every_steps: int = 4,
        checkpoint: Path | None = None,
        data: type[TextDataModule] = TextDataModule,
        optimizer: OptimizerFactory = ADAMW,
    ) -> RunSummary:
        quiet_lightning()
        torch.manual_seed(1)
        shape = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "dropout": 0.1}
        module = LanguageModel(
            GPT(GPTConfig(vocab_size=store.n_vocab, **shape)),
            optimizer=optimizer,
            schedule=partial(constant, max_steps=max_steps, warmup_steps=2),
            tokenizer=store.tokenizer,
            config={"model": {}, "trainer": {"max_steps": max_steps}},
        )
        resume_step = None if checkpoint is None else read_checkpoint(checkpoint)["progress"]["step"]
        last = LastCheckpoint(folder / "checkpoints", every_steps=save_every_steps)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=max_steps,
            max_epochs=-1,
            check_val_every_n_epoch=None,
            limit_val_batches=2,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            callbacks=[*callbacks, StepMetrics(every_steps=1), last],
            logger=MetricsCSV(folder / "metrics.csv", resume_step=resume_step),
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        batches = data(store, block_size=16, batch_size=4, micro_batch_size=2, max_steps=max_steps, seed=1)
        return fit(
            module,
            batches,
            trainer,
            folder=folder,
            facts={"seed": 1},
            val_every_steps=val_every_steps,
            checkpoint=checkpoint,
        )

    return train


def last(folder: Path) -> Checkpoint:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")


def assert_same_training(a: Path, b: Path) -> None:
    """Weights, optimizer and random generators bit for bit, and the training losses of every step."""
    one, other = last(a), last(b)
    assert one["progress"]["step"] == other["progress"]["step"]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "random_states"):
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)  # type: ignore[literal-required]
    losses = [[(row["step"], row["train/loss"]) for row in read_metrics(f / "metrics.csv")] for f in (a, b)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("stop", [[], [Stop()]], ids=["no callback that stops", "stop"])
def test_run_saves_its_last_step(run: Run, tmp_path: Path, stop: list[pl.Callback]) -> None:
    summary = run(tmp_path, *stop, val_every_steps=100)
    assert (summary["status"], summary["steps"]) == ("finished", 8)
    assert last(tmp_path)["progress"]["step"] == 8  # not only 6, the last multiple of three


class StopsEarly(pl.Callback):
    """Stops Lightning within the fourth step, as a timer might."""

    def on_train_batch_end(self, trainer: pl.Trainer, *values: Any) -> None:
        trainer.should_stop |= values[-1] == 6  # the index of the first of two micro-batches


def test_run_that_is_stopped_early_by_no_rule_is_interrupted_and_goes_on_exactly(
    run: Run, tmp_path: Path
) -> None:
    short, whole = tmp_path / "short", tmp_path / "whole"
    summary = run(short, StopsEarly(), Stop())
    assert (summary["status"], summary["steps"]) == ("interrupted", 4)
    assert last(short)["pending"] == {"stop": False, "validation": False}
    summary = run(short, Stop(), checkpoint=short / "checkpoints" / "last.ckpt")
    assert (summary["status"], summary["steps"]) == ("finished", 8)
    run(whole, Stop())
    assert_same_training(short, whole)


class Corrupt(pl.Callback):
    """Multiplies the weights after the second step, as a diverging run might."""

    def __init__(self, factor: float):
        self.factor = factor

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2 and pl_module.step_ended:
            pl_module.net.transformer.wte.weight.data *= self.factor


@pytest.mark.parametrize(("factor", "loss"), [(math.nan, "nan"), (-300.0, r"\d+\.\d+")])
def test_model_that_is_worse_than_guessing_is_never_the_best_and_the_run_goes_on(
    run: Run, tmp_path: Path, factor: float, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    best = BestCheckpoint(tmp_path / "checkpoints", "best", "val/loss", save_on_train_epoch_end=False)
    samples = Samples(tmp_path / "samples.md", max_new_tokens=4)
    summary = run(tmp_path, Corrupt(factor), samples, best, Stop())
    assert (summary["status"], summary["steps"]) == ("finished", 8)
    assert summary["best_val_loss"] is summary["best_checkpoint"] is None
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"last.ckpt", "last-1.ckpt"}
    guess = f"{math.log(257):.4f}"
    for step in (4, 8):
        line = f"the validation loss of {loss} at step {step} is worse than {guess}, that of guessing"
        assert re.search(line, caplog.text)
        assert (f"step {step} has no sample: the validation loss is nan" in caplog.text) == (loss == "nan")


def test_picture_that_cannot_be_written_is_told_and_the_run_is_finished(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "curves.png").mkdir()
    assert run(tmp_path, Stop())["status"] == "finished"
    assert "curves.png was not drawn: " in caplog.text


class StopsLate(pl.Callback):
    """Ends the run at a point where no other callback is asked any more."""

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = True


def test_run_that_a_callback_ends_saves_its_last_step(run: Run, tmp_path: Path) -> None:
    run(tmp_path, StopsLate(), max_steps=7, val_every_steps=100)
    assert last(tmp_path)["progress"]["step"] == 7


@pytest.mark.parametrize("stop", [[], [Stop()]], ids=["no callback that stops", "stop"])
@pytest.mark.parametrize("val_every_steps", [4, 100])
def test_extended_run_equals_an_uninterrupted_one(
    run: Run, tmp_path: Path, stop: list[pl.Callback], val_every_steps: int
) -> None:
    short, whole = tmp_path / "short", tmp_path / "whole"
    run(short, *stop, val_every_steps=val_every_steps)
    checkpoint = short / "checkpoints" / "last.ckpt"
    summary = run(short, *stop, max_steps=12, val_every_steps=val_every_steps, checkpoint=checkpoint)
    assert (summary["status"], summary["steps"]) == ("finished", 12)
    run(whole, Stop(), max_steps=12, val_every_steps=val_every_steps)
    assert_same_training(short, whole)
    assert summary["val_loss"] is not None or not stop


def test_run_with_muon_goes_on_exactly(run: Run, tmp_path: Path) -> None:
    short, whole, optimizer = tmp_path / "short", tmp_path / "whole", partial(muon, lr=1e-2)
    run(short, optimizer=optimizer)
    run(short, max_steps=12, checkpoint=short / "checkpoints" / "last.ckpt", optimizer=optimizer)
    run(whole, Stop(), max_steps=12, optimizer=optimizer)
    assert_same_training(short, whole)


def test_checkpoint_of_an_older_release_is_extended(run: Run, tmp_path: Path) -> None:
    """It has no version, and a stop is pending although only the length of the run was reached."""
    old, new = tmp_path / "old", tmp_path / "new"
    run(old, Stop())
    checkpoint = last(old)
    assert checkpoint.pop("format_version") == 1
    checkpoint["pending"]["stop"] = True
    torch.save(checkpoint, tmp_path / "old.ckpt")
    summary = run(old, Stop(), max_steps=12, checkpoint=tmp_path / "old.ckpt")
    assert summary["steps"] == 12
    run(new, Stop(), max_steps=12)
    assert_same_training(old, new)


@pytest.mark.parametrize(
    ("callbacks", "steps"),
    [
        (lambda: [Stop(target_loss=99.0)], 1),
        (lambda: [Stop(), EarlyStopping("val/loss", patience=1, min_delta=99.0)], 8),
    ],
    ids=["target loss", "early stopping at the last step"],
)
def test_run_that_stopped_early_stays_stopped(
    run: Run, tmp_path: Path, callbacks: Callable[[], list[pl.Callback]], steps: int
) -> None:
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    for options in ({}, {"max_steps": 12, "checkpoint": checkpoint}):
        summary = run(tmp_path, *callbacks(), **options)
        assert (summary["status"], summary["steps"]) == ("finished", steps)


class FailingThread(pl.Callback):
    """A thread of the user's own, such as one that sends metrics elsewhere."""

    def on_train_start(self, *_: Any) -> None:
        def fail() -> None:
            raise OSError("the server is gone")

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()


def test_error_of_another_thread_is_reported(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    hook = threading.excepthook
    run(tmp_path, FailingThread(), max_steps=3)
    assert [str(args.exc_value) for args in reported] == ["the server is gone"]
    assert threading.excepthook is hook


class SignalDuringSetup(TextDataModule):
    """SIGTERM arrives when Lightning has set its signal handlers, before the first step."""

    def train_dataloader(self) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().train_dataloader()


def test_signal_before_the_first_step_interrupts_the_run(run: Run, tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as caught:
        run(tmp_path, data=SignalDuringSetup)
    assert caught.value.code == 128 + signal.SIGTERM
    assert read_summary(tmp_path)["status"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class SignalsAtTheEnd(TextDataModule):
    """SIGTERM arrives in the last step, and again when Lightning has given the signals back."""

    @property
    def tokens_per_step(self) -> int:  # for the metrics of each step, and for the summary
        trainer: Any = self.trainer
        if trainer and (trainer.global_step == 8 or trainer.state.status == TrainerStatus.FINISHED):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().tokens_per_step


def test_signal_in_the_last_step_or_later_leaves_a_finished_run(run: Run, tmp_path: Path) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        run(tmp_path, Hangup(), data=SignalsAtTheEnd, val_every_steps=100)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, ignored)
    assert received == [signal.SIGTERM]  # the one after the run
    assert read_summary(tmp_path)["status"] == "finished"
    assert last(tmp_path)["progress"]["step"] == 8
    assert (tmp_path / "curves.png").exists()


class Hangup(pl.Callback):
    """The terminal is closed in the first step."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)


def test_last_lines_compare_with_the_corpus_entropy(tmp_path: Path) -> None:
    summary: RunSummary = {
        "val_loss": 0.5, "perplexity": 1.65, "bits_per_byte": 0.33, "floor_bits_per_byte": 0.30,
        "status": "interrupted", "steps": 3, "tokens": 3000, "seconds": 61.0, "tokens_per_second": 50.0,
    }  # fmt: skip
    trainer = pl.Trainer(max_steps=9, logger=False, enable_checkpointing=False)
    lines = closing_lines(summary, trainer, tmp_path).splitlines()
    assert lines == [
        "steps            3",
        "tokens           3,000",
        "time             1:01, 50 tokens/s",
        "validation loss  0.5000 nats per token",
        "perplexity       1.65",
        "bits per byte    0.3300, 10.0% above the corpus entropy of 0.3000",
        "                 over windows end to end; evaluate gives tokens more context",
        f"stopped before step 9; go on with resume={tmp_path}",
        f"run: {tmp_path}",
    ]
