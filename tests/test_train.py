"""Whole runs, small ones: what they write, learn, and how they are started."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from support.comparison import charts, hyperparameters
from support.runs import TINY
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from gpt_lightning.inference.loading import read_model
from gpt_lightning.rundir import curves
from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.rundir.curves import draw_curves
from gpt_lightning.training.loggers import log_hyperparameters
from gpt_lightning.training.module import LanguageModel

SUMMARY_KEYS = {
    "status", "parameters", "steps", "tokens", "train_loss", "val_loss", "best_val_loss", "perplexity",
    "bits_per_byte", "floor_bits_per_byte", "tokens_per_second", "seconds", "seed", "device",
    "best_checkpoint", "versions", "git_revision", "corpus_digest", "tokenizer_digest",
}  # fmt: skip


@pytest.fixture(scope="module")
def run(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one tiny run, started as a user does, from another working directory."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    arguments = [*TINY, f"data.path={small_text}", "hydra.run.dir=a/run", "trainer.snapshot_every_steps=4"]
    result = subprocess.run(
        [sys.executable, "-m", "gpt_lightning.train", *arguments],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    (elsewhere / "a" / "run" / "stdout.txt").write_text(result.stdout)
    return elsewhere / "a" / "run"


def test_run_directory_is_complete(run: Path) -> None:
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {
        ".hydra/config.yaml", ".hydra/overrides.yaml", "train.log", "metrics.csv", "curves.png", "samples.md",
        "summary.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "checkpoints/last-1.ckpt",
        "checkpoints/step-4.ckpt", "checkpoints/step-8.ckpt",
    } <= files  # fmt: skip
    assert any(file.startswith("tensorboard/events") for file in files)
    assert not any(file.endswith(".tmp") for file in files)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_summary_has_what_it_promises(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["status"] == "finished"
    assert (summary["steps"], summary["tokens"]) == (8, 8 * 8 * 32)
    # 257 ids padded to 320, tied; two blocks of four square matrices and two of 32 × 128, each with a bias,
    # and of two LayerNorms; the last LayerNorm
    assert summary["parameters"] == 320 * 32 + 2 * (4 * 33 * 32 + 33 * 128 + 129 * 32 + 4 * 32) + 2 * 32
    # whose metadata may lack the kind of build, as in 2.13.0+cu130
    assert torch.__version__.startswith(summary["versions"]["torch"])


def test_metrics_have_a_row_for_every_logged_step(run: Path) -> None:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 9)]
    assert [bool(row["val/loss"]) for row in rows] == [False] * 3 + [True] + [False] * 3 + [True]
    summary = json.loads((run / "summary.json").read_text())
    assert float(rows[-1]["val/loss"]) == summary["val_loss"]
    assert summary["best_val_loss"] == min(float(row["val/loss"]) for row in rows if row["val/loss"])


def test_terminal_shows_model_progress_and_result(run: Path) -> None:
    out = (run / "stdout.txt").read_text()
    assert re.search(r"^model.layers.1 +Block +12,704$", out, re.M)
    assert re.search(
        r"^step 8/8 \| loss [\d.]+ \| [\d.]+ ms/step \| [\d,]+ tokens/s \| grad norm [\d.]+ \| lr ", out, re.M
    )
    assert re.search(
        r"^step 8 \| validation loss [\d.]+ \| perplexity [\d.]+ \| [\d.]+ bits per byte$", out, re.M
    )
    assert out.rstrip().endswith(f"run: {run}")


def test_tensorboard_has_scalars_text_and_hyperparameters(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "val/loss", "val/bits_per_byte", "speed/tokens_per_second"} <= set(
        tags["scalars"]
    )
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
    assert not [tag for tag in tags["scalars"] if "hparams" in tag]
    best = json.loads((run / "summary.json").read_text())["best_val_loss"]
    lowest = events.Scalars("val/best_loss")
    assert [event.step for event in lowest] == [4, 8]
    assert lowest[-1].value == pytest.approx(best)
    samples = events.Tensors("sample")
    assert [event.step for event in samples] == [4, 8]
    sample = samples[-1].tensor_proto.string_val[0].decode()
    text = (run / "samples.md").read_text().split("```text\n")[-1].removesuffix("\n```\n\n")
    assert sample == "prompt: none, a new document\n\n---\n\n" + text.replace("\n", "  \n")


def test_hyperparameters_of_an_interrupted_run_are_its_overrides_and_shown_once(
    tiny: list[str], tmp_path: Path, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    step = LanguageModel.on_train_batch_start

    def terminated(self: LanguageModel, *batch: Any) -> None:
        step(self, *batch)
        if self.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "on_train_batch_start", terminated)
        with pytest.raises(SystemExit):
            call("train", *tiny, "seed=7", "optimizer.lr=1e-3", "+trainer.lightning.detect_anomaly=true")
    run = tmp_path / "run"
    assert hyperparameters(run / "tensorboard") == []
    call("train", f"resume={run}")
    given = dict(text.split("=") for text in tiny[:-1])  # the last one is Hydra's: where the run is
    numbers = {key: float(value) for key, value in given.items() if value.isdigit()}
    more = {"seed": 7.0, "optimizer.lr": 0.001, "trainer.lightning.detect_anomaly": "true"}
    assert hyperparameters(run / "tensorboard") == [{**given, **numbers, **more}]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    summary = json.loads((run / "summary.json").read_text())
    tags = {"val_loss": "val/loss", "best_val_loss": "val/best_loss", "bits_per_byte": "val/bits_per_byte"}
    for key, tag in tags.items():
        assert events.Scalars(tag)[-1].value == pytest.approx(summary[key])
    assert len(charts(events)) == 7  # once, though the run was resumed


def test_hyperparameters_of_a_run_without_overrides_are_none(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="")
    trainer = pl.Trainer(logger=logger, enable_checkpointing=False, accelerator="cpu")
    log_hyperparameters(trainer, {"val_loss": 2.0, "best_val_loss": None}, [])
    assert hyperparameters(tmp_path) == [{}]


def test_samples_are_sections_by_step(run: Path) -> None:
    assert re.findall(r"^## Step (\d+)$", (run / "samples.md").read_text(), re.M) == ["4", "8"]


def test_checkpoint_needs_nothing_beside_it(run: Path) -> None:
    path = run / "checkpoints" / "best.ckpt"
    raw = torch.load(path, weights_only=True)
    assert not any("_orig_mod" in key for key in raw["state_dict"])
    assert raw["hyper_parameters"]["model"]["vocab_size"] == 257
    assert raw["progress"]["step"] in (4, 8)
    assert {"train_loss", "best_val_loss", "lr", "metrics"} <= raw["progress"].keys()
    model = read_model(path)
    tokenizer = model.tokenizer
    assert tokenizer.decode(tokenizer.encode_ordinary("a ræd dog")) == "a ræd dog"
    idx = torch.tensor([tokenizer.encode_ordinary("the cat ")])
    assert model.net(idx).shape == (1, 8, 320)


def test_best_checkpoint_holds_the_loss_that_was_measured_with_it(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    progress = read_checkpoint(run / "checkpoints" / "best.ckpt")["progress"]
    assert progress["metrics"]["val/loss"] == summary["best_val_loss"]


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [float(row[key]) for row in rows for key in ("train/loss", "val/loss") if row[key]]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_loses_little(
    precision: str, run: Path, call: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    call("train", *tiny, f"device.precision={precision}", "logger=none")
    assert losses(tmp_path / "run") != losses(run)
    assert losses(tmp_path / "run") == pytest.approx(losses(run), rel=0.02)
    weights = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    kinds = {weight.dtype for weight in weights.values()}
    assert kinds == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


@pytest.mark.slow
def test_compiled_run_has_the_same_losses_and_the_same_names(
    call: Callable[..., Any], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny += ["model.n_layer=1", "logger=none"]
    call("train", *tiny, f"hydra.run.dir={tmp_path / 'plain'}")
    graphs = CompileCounterWithBackend("aot_eager")  # without the C++ compiler, which takes a minute
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=graphs))
    call("train", *tiny, "device.compile=true")
    assert graphs.frame_count == 2  # of the training and of the validation
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(path, weights_only=True)["state_dict"].keys() == {
        f"net.{name}" for name in read_model(path).net.state_dict()
    }


class Returned(Callback):
    """What a job's main returned, as a sweeper reads it; Hydra keeps that of a single run to itself."""

    values: list[float | None]

    def on_job_end(self, config: Any, job_return: JobReturn, **_: Any) -> None:
        self.values.append(job_return.return_value)


def test_main_returns_the_best_validation_loss(
    call: Callable[..., Any], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("of_this_test")
    module.Returned, Returned.values = Returned, []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "of_this_test", module)
    call(
        "train", *tiny, "logger=none", "trainer.val_every_steps=1", "optimizer.lr=1.0",
        "+hydra.callbacks.returned._target_=of_this_test.Returned",
    )  # fmt: skip
    with (tmp_path / "run" / "metrics.csv").open() as file:
        measured = [float(row["val/loss"]) for row in csv.DictReader(file)]
    assert len(measured) == 8
    assert min(measured) < measured[-1] - 1  # at this rate the model gets worse and does not recover
    assert Returned.values == [min(measured)]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_val_loss"] == min(measured)
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_best_checkpoint_is_that_of_the_lowest_training_loss_if_that_is_monitored(
    call: Callable[..., Any], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    def draw(*rows: Any, **options: Any) -> Any:
        drawn.append(draw_curves(*rows, **options))
        return drawn[-1]

    monkeypatch.setattr(curves, "draw_curves", draw)
    call(
        "train", *tiny, "callbacks.best.monitor=train/loss", "logger=none", "trainer.max_steps=12",
        "model=gpt", "optimizer=adamw", "optimizer.lr=1e-9",
    )  # fmt: skip
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["step"]): float(row["train/loss"]) for row in rows}
    # the model hardly changes: its training loss is that of the batch, its validation loss falls by a little
    assert losses[8] < min(losses[4], losses[12])
    assert min(losses.values()) < losses[8]  # at a step after which there was no validation
    validations = {int(row["step"]): float(row["val/loss"]) for row in rows if row["val/loss"]}
    assert min(validations, key=lambda step: validations[step]) == 12
    progress = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")["progress"]
    assert (progress["step"], progress["train_loss"]) == (8, pytest.approx(losses[8]))
    labels = [line.get_label() for line in drawn[-1].axes[0].lines]
    assert f"best.ckpt: {validations[8]:.4f}, step 8" in labels


class Terminal(io.StringIO):
    """Somebody watches."""

    def isatty(self) -> bool:
        return True


def test_log_file_has_every_step_beside_a_progress_bar(
    call: Callable[..., Any],
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    call("train", *tiny, "logger=none")
    assert re.search(r"\d/8 .*left, loss \d\.\d{3}", terminal.getvalue())
    out, log = capsys.readouterr().out, (tmp_path / "run" / "train.log").read_text()
    step, validation = r"(?m)^%sstep (\d+)/8 \| loss \d", r"(?m)^%sstep (\d+) \| validation loss "
    dated = r"\[\d{4}-.*?\]\[gpt_lightning\.training\.callbacks\.progress\]\[%s\] "
    assert re.findall(step % dated % "DEBUG", log) == [str(number) for number in range(1, 9)]
    assert re.findall(validation % dated % "INFO", log) == re.findall(validation % "", out) == ["4", "8"]
    assert "/8 | loss" not in out


def test_training_stops_at_the_target_loss(call: Callable[..., Any], tiny: list[str], tmp_path: Path) -> None:
    call("train", *tiny, "target_loss=5.0", "trainer.max_steps=200", "optimizer.lr=0.01", "logger=none")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["train_loss"] <= 5.0
    assert summary["steps"] < 200
    assert summary["val_loss"] is not None
    assert (
        read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["progress"]["step"]
        == summary["steps"]
    )


def test_early_stopping_ends_a_run_that_does_not_improve(
    call: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    call(
        "train", *tiny, "callbacks=early_stopping", "callbacks.early_stopping.min_delta=100",
        "callbacks.early_stopping.patience=1", "trainer.max_steps=100", "logger=none",
    )  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 8  # the second validation is no improvement of 100 nats


def test_last_step_is_validated_even_between_validations(
    call: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    call("train", *tiny, "trainer.max_steps=6", "logger=none")
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["val/loss"]] == ["4", "6"]
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["progress"]["step"] == 6


def test_epochs_end_a_run_too(
    call: Callable[..., Any], tiny: list[str], tmp_path: Path, small_text: Path
) -> None:
    call(
        "train", *tiny, "trainer.max_steps=null", "trainer.max_epochs=1", "model.block_size=64", "logger=none"
    )
    training = int(len(small_text.read_text()) * 0.9)
    windows = (training - 1) // 64  # one character is one token here
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == windows // 8


def test_weights_of_a_checkpoint_begin_a_new_run(
    call: Callable[..., Any], run: Path, small_text: Path, tmp_path: Path
) -> None:
    text = tmp_path / "other.txt"
    text.write_text(small_text.read_text().replace("dog", "fox"))
    call(
        "train", "data=text", f"data.path={text}", f"init_from={run}", "data.batch_size=4",
        "trainer.max_steps=1", "optimizer.lr=1e-12", "scheduler=constant", "scheduler.warmup_steps=0",
        "model.dropout=0.1", "logger=none", f"hydra.run.dir={tmp_path}/new", "device=cpu",
        "optimizer.weight_decay=0",
    )  # fmt: skip
    old = read_checkpoint(run / "checkpoints" / "best.ckpt")
    new = read_checkpoint(tmp_path / "new" / "checkpoints" / "last.ckpt")
    assert new["hyper_parameters"]["model"] == {**old["hyper_parameters"]["model"], "dropout": 0.1}
    assert new["tokenizer"] == old["tokenizer"]
    for name, weight in old["state_dict"].items():
        assert torch.allclose(weight, new["state_dict"][name], atol=1e-9), name
