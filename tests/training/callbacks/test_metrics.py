"""Callbacks in real runs of a tiny model: metrics, samples, progress, stopping."""

from __future__ import annotations

import logging
import math
import os
import re
import struct
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint
from support.runs import ROOT

from gpt_lightning.data.corpus.files import TextFiles
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.token_store import TokenStore, prepare
from gpt_lightning.data.tokenizer import Byte
from gpt_lightning.model.gpt import GPT, GPTConfig
from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.rundir.metrics import Row, read_metrics
from gpt_lightning.training.callbacks.checkpoints import LastCheckpoint
from gpt_lightning.training.callbacks.diagnostics import Diagnostics
from gpt_lightning.training.callbacks.metrics import StepMetrics
from gpt_lightning.training.callbacks.progress import Layers, Progress, format_duration
from gpt_lightning.training.callbacks.samples import Samples
from gpt_lightning.training.callbacks.stop import Stop
from gpt_lightning.training.fit import quiet_lightning
from gpt_lightning.training.intervals import log_interval, save_interval
from gpt_lightning.training.loggers import MetricsCSV
from gpt_lightning.training.module import LanguageModel
from gpt_lightning.training.optimizers import adamw
from gpt_lightning.training.schedules import constant

T, BATCH, MICRO, STEPS = 16, 8, 2, 7
PARTS = BATCH // MICRO  # micro-batches of an optimizer step
TOKENS = BATCH * T  # of an optimizer step


@pytest.fixture(scope="module")
def store(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return prepare(TextFiles(str(small_text)), Byte(), tmp_path_factory.mktemp("store"))


def module(store: TokenStore, *, lr: float = 1e-2, **shape: Any) -> LanguageModel:
    torch.manual_seed(0)
    shape = {"block_size": T, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1, **shape}
    return LanguageModel(
        GPT(GPTConfig(vocab_size=store.n_vocab, **shape)),
        optimizer=partial(adamw, lr=lr),
        schedule=partial(constant, max_steps=STEPS),
        tokenizer=store.tokenizer,
        config={"model": {}},
    )


Fit = Callable[..., pl.Trainer]


@pytest.fixture
def fit(store: TokenStore, tmp_path: Path) -> Fit:
    """Train a module, or a new one, under callbacks; metrics go to tmp_path/metrics.csv."""

    def run(
        *callbacks: pl.Callback,
        net: LanguageModel | None = None,
        steps: int = STEPS,
        val_every_steps: int = 3,
        checkpoint: Path | None = None,
    ) -> pl.Trainer:
        quiet_lightning()
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            accumulate_grad_batches=PARTS,
            val_check_interval=val_every_steps * PARTS,
            check_val_every_n_epoch=None,
            limit_val_batches=2,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            callbacks=list(callbacks),
            logger=MetricsCSV(tmp_path / "metrics.csv"),
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = TextDataModule(
            store, block_size=T, batch_size=BATCH, micro_batch_size=MICRO, max_steps=1000, seed=1
        )
        trainer.fit(net or module(store), datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return trainer

    return run


class Losses(pl.Callback):
    """The loss of every micro-batch, as the training step returned it."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]) * PARTS)  # Lightning divides it by their number

    @property
    def of_steps(self) -> list[float]:
        return [sum(self.values[i : i + PARTS]) / PARTS for i in range(0, len(self.values), PARTS)]


def rows(folder: Path, key: str) -> list[Row]:
    return [row for row in read_metrics(folder / "metrics.csv") if key in row]


def test_metrics_are_means_over_the_step_and_logged_at_the_interval(fit: Fit, tmp_path: Path) -> None:
    losses, metrics = Losses(), StepMetrics(every_steps=3)
    fit(losses, metrics)
    logged = rows(tmp_path, "train/loss")
    assert [row["step"] for row in logged] == [1, 3, 6]
    for row in logged:
        step = int(row["step"])
        assert row["train/loss"] == pytest.approx(losses.of_steps[step - 1], rel=1e-6)
        assert row["train/tokens"] == step * TOKENS
        assert row["speed/tokens_per_second"] * row["speed/ms_per_step"] == pytest.approx(1000 * TOKENS)
    last_parts = [losses.values[int(row["step"]) * PARTS - 1] for row in logged]
    assert max(abs(row["train/loss"] - part) for row, part in zip(logged, last_parts, strict=True)) > 0.01
    # each row is about the steps since the one before: one, two and three
    assert metrics.steps == 6
    seconds = [row["speed/ms_per_step"] / 1000 * n for row, n in zip(logged, (1, 2, 3), strict=True)]
    assert metrics.seconds == pytest.approx(sum(seconds))
    assert metrics.latest["train/loss"] == logged[-1]["train/loss"]


@pytest.mark.parametrize(
    ("max_steps", "log", "save"),
    [(1, 1, 1), (7, 1, 1), (40, 1, 5), (200, 3, 25), (3000, 50, 375), (10**6, 50, 500)],
)
def test_default_intervals_follow_the_length_of_the_run(max_steps: int, log: int, save: int) -> None:
    assert (log_interval(max_steps), save_interval(max_steps)) == (log, save)


def test_default_intervals_use_the_length_at_the_start_of_the_run(fit: Fit, tmp_path: Path) -> None:
    class Longer(pl.Callback):
        """The number of steps becomes known after the trainer is built."""

        def setup(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            trainer.fit_loop.epoch_loop.max_steps = 130

    fit(Longer(), StepMetrics(), LastCheckpoint(tmp_path), steps=1, val_every_steps=1000)
    assert [row["step"] for row in rows(tmp_path, "train/loss")] == [1, *range(2, 131, 2)]
    steps = [read_checkpoint(tmp_path / name)["progress"]["step"] for name in ("last-1.ckpt", "last.ckpt")]
    assert steps == [128, 130]  # every 16 steps and at the end


class Pause(pl.Callback):
    """Optimizer steps and validations that take their time, in seconds."""

    def __init__(self, *, step: float = 0.0, validation: float = 0.0):
        self.step, self.validation = step, validation

    def on_before_optimizer_step(self, *_: Any) -> None:
        time.sleep(self.step)

    def on_validation_start(self, *_: Any) -> None:
        time.sleep(self.validation)


def test_speed_excludes_validation(fit: Fit) -> None:
    metrics, started = StepMetrics(every_steps=1), time.perf_counter()
    fit(metrics, Pause(validation=0.5), val_every_steps=2)  # after steps 2, 4 and 6
    assert metrics.steps == STEPS
    assert metrics.seconds + 3 * 0.5 < time.perf_counter() - started


def test_run_stops_at_the_first_step_whose_mean_loss_reaches_the_target(fit: Fit, store: TokenStore) -> None:
    losses = Losses()
    fit(losses, net=module(store, lr=1e-3))
    target = losses.of_steps[5] + 1e-4
    assert all(mean > target for mean in losses.of_steps[:5])
    assert min(losses.values[: 5 * PARTS]) < target  # a part of a step was that low before: it does not count
    stopped, stop = Losses(), Stop(target_loss=target)
    trainer = fit(stopped, stop, net=module(store, lr=1e-3), val_every_steps=100)
    assert trainer.global_step == 6
    assert len(stopped.values) == 6 * PARTS
    assert "val/loss" in trainer.callback_metrics  # validated on the way out


def test_run_ends_with_one_validation_at_its_last_step(fit: Fit, tmp_path: Path) -> None:
    fit(Stop(), val_every_steps=STEPS)  # due there anyway: still one
    assert [row["step"] for row in rows(tmp_path, "val/loss")] == [STEPS]
    fit(Stop(), val_every_steps=4)
    assert [row["step"] for row in rows(tmp_path, "val/loss")] == [4, STEPS]


def check_that_training_is_the_same(
    fit: Fit, store: TokenStore, *callbacks: pl.Callback, val_every_steps: int
) -> None:
    """Neither the weights, under dropout, nor what is drawn afterwards depends on the callbacks."""
    nets, draws = [], []
    for chosen in ((), callbacks):
        net = module(store)
        fit(*chosen, net=net, val_every_steps=val_every_steps)
        nets.append(net.state_dict())
        draws.append(torch.rand(3).tolist())
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    assert draws[0] == draws[1]


def test_samples_do_not_change_the_training(fit: Fit, store: TokenStore, tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.md", max_new_tokens=20)
    check_that_training_is_the_same(fit, store, samples, val_every_steps=2)


class Observer(pl.Callback):
    """The weights of the first block before and after each step, and its last output in each."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.block = pl_module.net.transformer.h[0]
        self.block.register_forward_hook(lambda *all: self.outputs.append(all[-1].detach()))
        self.weights.append(torch.cat([p.detach().flatten() for p in self.block.parameters()]))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.step_ended:
            self.weights.append(torch.cat([p.detach().flatten() for p in self.block.parameters()]))


def test_diagnostics_measure_each_layer_and_do_not_change_the_training(
    fit: Fit, store: TokenStore, tmp_path: Path
) -> None:
    observer = Observer()
    check_that_training_is_the_same(fit, store, Diagnostics(every_steps=3), observer, val_every_steps=100)
    layers = ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f"]
    logged = rows(tmp_path, "update_ratio/transformer.h.0")
    assert [row["step"] for row in logged] == [1, 3, 6]
    for row in logged:
        assert row.keys() == {"step"} | {
            f"{kind}/{n}" for kind in ("update_ratio", "activation_std") for n in layers
        }
        step = int(row["step"])
        before, after = observer.weights[step - 1 : step + 1]
        ratio = float((after - before).norm() / before.norm())
        assert row["update_ratio/transformer.h.0"] == pytest.approx(ratio, rel=1e-5)
        last = observer.outputs[step * PARTS - 1]
        assert row["activation_std/transformer.h.0"] == pytest.approx(float(last.std()), rel=1e-5)


def sections(path: Path) -> dict[int, str]:
    """The texts of samples.md by step."""
    found = re.findall(r"## Step (\d+)\n\n```text\n(.*?)\n```\n\n", path.read_text(), re.S)
    return {int(step): text for step, text in found}


def test_samples_are_written_by_step_and_repeat_with_their_seed(fit: Fit, tmp_path: Path) -> None:
    written = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        samples = Samples(tmp_path / name / "samples.md", prompt="the cat", max_new_tokens=20, seed=seed)
        fit(samples, val_every_steps=3)
        written[name] = sections(samples.path)
        assert list(written[name]) == [3, 6]
        assert all(text.startswith("the cat") for text in written[name].values())
        assert samples.latest == written[name][6]
        assert len(samples.latest.encode(errors="replace")) > len("the cat")
    assert written["a"] == written["b"] != written["c"]


@pytest.mark.parametrize("show", [True, False])
def test_samples_are_printed_only_if_asked(
    fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture, show: bool
) -> None:
    caplog.set_level(logging.DEBUG, "gpt_lightning")
    samples = Samples(tmp_path / "samples.md", prompt="the cat", max_new_tokens=20, show=show)
    fit(samples, val_every_steps=3)
    texts = sections(samples.path)
    assert list(texts) == [3, 6]
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    printed = [(level, line) for level, line in lines if "the cat" in line]
    assert printed == ([("INFO", f"{text}\n") for text in texts.values()] if show else [])


def test_resuming_drops_samples_after_the_checkpoint(fit: Fit, tmp_path: Path) -> None:
    samples = Samples(tmp_path / "samples.md", max_new_tokens=8)
    trainer = fit(samples, steps=4, val_every_steps=2)
    trainer.save_checkpoint(tmp_path / "at-4.ckpt")
    before = sections(samples.path)
    with samples.path.open("a") as file:
        file.write("## Step 6\n\n```text\nwill be written again\n```\n\n## Step 10\n\n```text\nhalf of")
    # an editor and a power cut have been here
    samples.path.write_bytes(b"\xef\xbb\xbf" + samples.path.read_bytes() + b" \xff\0\0")
    fit(samples, val_every_steps=2, checkpoint=tmp_path / "at-4.ckpt")
    after = sections(samples.path)
    assert list(after) == [2, 4, 6]
    assert {step: after[step] for step in (2, 4)} == before
    assert "again" not in after[6]
    fit(samples, steps=2, val_every_steps=2)  # a new run in the same place
    assert list(sections(samples.path)) == [2]


def test_progress_without_a_terminal_is_one_line_per_row(fit: Fit, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gpt_lightning")
    metrics = StepMetrics(every_steps=3)
    fit(metrics, Pause(step=0.2), Progress())  # else all would be left in 0:00
    lines = [line for line in caplog.messages if line.startswith("step ")]
    steps = [line for line in lines if "validation" not in line]
    assert [re.match(r"step (\d+)/7 \| loss \d\.\d{4} \| ", line)[1] for line in steps] == ["1", "3", "6"]  # type: ignore[index]
    assert [line.split(" | ")[0] for line in lines if "validation" in line] == ["step 3", "step 6"]
    latest = metrics.latest
    left = format_duration((STEPS - 6) * latest["speed/ms_per_step"] / 1000)
    assert steps[-1].endswith(f"| grad norm {latest['train/grad_norm']:.2f} | lr 1.00e-02 | {left} left")
    assert f"loss {latest['train/loss']:.4f}" in steps[-1]


def test_log_line_is_written_when_no_row_was_due_for_long(
    fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "gpt_lightning")
    monkeypatch.setattr("gpt_lightning.training.callbacks.progress.LONGEST_SILENCE", 0.0)
    losses = Losses()
    fit(losses, StepMetrics(every_steps=3), Progress())
    lines = [re.match(r"step (\d+)/7 \| loss (\d\.\d{4}) \| ", line) for line in caplog.messages]
    shown = [(int(line[1]), line[2]) for line in lines if line]
    assert shown == [(step, f"{loss:.4f}") for step, loss in enumerate(losses.of_steps, start=1)]
    assert [row["step"] for row in rows(tmp_path, "train/loss")] == [1, 3, 6]  # which stay as they are


@pytest.mark.slow
def test_notebook_shows_a_progress_bar() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    code = "from gpt_lightning.training.callbacks.progress import can_show_bar\nprint(can_show_bar())"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert notebook.cells[0].outputs[-1]["text"] == "True\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals on this system")
def test_progress_on_a_terminal_is_one_bar(
    fit: Fit, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl
    import termios

    caplog.set_level(logging.INFO, "gpt_lightning")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # rows and columns
    shown: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(ours, 4096):
                shown.append(piece)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress, metrics = Progress(), StepMetrics(every_steps=1)
        fit(metrics, progress)
    reader.join()
    os.close(ours)
    text = b"".join(shown).decode()
    lines = re.split(r"[\r\n]", text)
    assert max(map(len, lines)) <= 80
    assert re.match(r"0/7   0% \|", lines[1])
    last = [line for line in lines if line.startswith("7/7 100% |")][-1]
    pattern = r"7/7 100% \|[^|]{4,}\| 00:00 left, loss (\d\.\d{3}), val (\d\.\d{3}), [\d,]+ tokens/s"
    train, val = re.match(pattern, last).groups()  # type: ignore[union-attr]
    assert train == f"{metrics.latest['train/loss']:.3f}"
    assert val == f"{rows(tmp_path, 'val/loss')[-1]['val/loss']:.3f}"
    assert progress.bar is not None
    assert progress.bar.n == progress.bar.total == STEPS
    assert not [line for line in caplog.messages if "ms/step" in line]  # the bar says it
    assert [line.split(" | ")[0] for line in caplog.messages if "validation" in line] == ["step 3", "step 6"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
        (360_000, "100:00:00"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_durations_are_formatted(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize("tied", [True, False])
def test_layer_table_counts_tied_weights_once_and_marks_them(
    fit: Fit, store: TokenStore, caplog: pytest.LogCaptureFixture, tied: bool
) -> None:
    caplog.set_level(logging.INFO, "gpt_lightning")
    fit(Layers(max_depth=1), net=module(store, tie_weights=tied), steps=1)
    rows = [line.split() for line in caplog.messages]
    embedding = 320 * 16  # 257 ids, padded to a multiple of 64
    block = 12 * 16 * 16 + 13 * 16
    total = embedding + T * 16 + 2 * block + 2 * 16 + (0 if tied else embedding)
    assert rows == [
        ["layer", "type", "parameters"],
        ["model", "GPT", f"{total:,}"],
        ["transformer", "Transformer", f"{total - (0 if tied else embedding):,}"],
        ["lm_head", "Head", f"{embedding:,}", *(["(shared", "with", "transformer.wte)"] if tied else [])],
    ]
