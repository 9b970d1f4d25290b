"""metrics.csv, read with Python's csv module."""

from __future__ import annotations

import csv
import re
import sqlite3
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.training.loggers import MetricsCSV, log_metrics, silent_tensorboard_thread, true_reason


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_of_one_step_share_a_row(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"train/loss": 2.5}, step=1)
    logger.log_metrics({"train/loss": 2.25}, step=2)
    logger.log_metrics({"val/loss": 2.0}, step=2)
    logger.finalize("success")
    assert rows(tmp_path / "metrics.csv") == [
        {"step": "1", "train/loss": "2.5", "val/loss": ""},
        {"step": "2", "train/loss": "2.25", "val/loss": "2"},
    ]


def test_complete_rows_are_on_disk_before_the_end(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "metrics.csv")
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_metrics({"a": 2.0}, step=2)
    assert read_metrics(tmp_path / "metrics.csv") == [{"step": 1, "a": 1}]


def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    for step in (1, 2, 3):
        first.log_metrics({"a": step * 10}, step=step)
    first.save()
    second = MetricsCSV(path, resume_step=2)
    second.log_metrics({"a": 33}, step=3)
    second.save()
    assert read_metrics(path) == [{"step": 1, "a": 10}, {"step": 2, "a": 20}, {"step": 3, "a": 33}]


def test_file_that_could_not_be_rewritten_gets_no_row_of_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    for step in (1, 2):
        first.log_metrics({"a": step}, step=step)
    first.save()
    temporary = tmp_path / "metrics.csv.tmp"
    temporary.mkdir()  # nothing can be written there
    first.log_metrics({"b": 3}, step=3)
    second = MetricsCSV(path, resume_step=1)
    for logger in (first, second):
        for end in (logger.save, lambda logger=logger: logger.finalize("failed")):
            with pytest.raises(OSError, match=r"metrics\.csv"):
                end()
    assert read_metrics(path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}]
    temporary.rmdir()
    first.save()
    assert read_metrics(path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 3, "b": 3}]
    second.save()
    assert read_metrics(path) == [{"step": 1, "a": 1}]


DAMAGE = {
    "more fields than columns": (b"3,30\r\n", b"3,34,40\r\n"),
    "fewer fields than columns": (b"3,30\r\n", b"3\r\n"),
    "no number": (b"3,30\r\n", b"3,3O\r\n"),
    "zeros": (b"3,30\r\n", b"\0" * 6 + b"\r\n"),
    "zeros at the end": (b"4,40\r\n", b"\0" * 4096),
    "byte that is not UTF-8": (b"3,30\r\n", b"3,\xff30\r\n"),
    "byte order mark": (b"step", b"\xef\xbb\xbfstep"),
    "header": (b"step", b"st\xffp"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_lines_are_set_aside_and_the_run_goes_on(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, aside = tmp_path / "metrics.csv", tmp_path / "metrics.csv.damaged"
    first = MetricsCSV(path)
    for step in (1, 2, 3, 4):
        first.log_metrics({"a": step * 10}, step=step)
    first.save()
    whole, (before, after) = path.read_bytes(), DAMAGE[kind]
    assert before in whole
    path.write_bytes(whole.replace(before, after))
    good = [row for row in read_metrics(path) if row["step"] <= 3]
    assert {row["step"]: row["a"] for row in good}.items() <= {1: 10, 2: 20, 3: 30}.items()
    second = MetricsCSV(path, resume_step=3)
    second.log_metrics({"a": 40}, step=4)
    second.save()
    assert rows(path) == [{"step": f"{row['step']:g}", "a": f"{row['a']:g}"} for row in good] + [
        {"step": "4", "a": "40"}
    ]
    if kind in ("byte order mark", "zeros at the end"):  # nothing is lost
        assert len(good) == 3
        assert not aside.exists()
    else:
        assert len(good) == (0 if kind == "header" else 2)
        assert after.strip() in aside.read_bytes()
        assert f"{path}: " in caplog.text
        assert " moved to metrics.csv.damaged" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size")
@pytest.mark.parametrize("room", range(0, 12, 3))  # bytes
def test_row_that_does_not_fit_on_the_disk_leaves_no_part_of_it(room: int, tmp_path: Path) -> None:
    import resource

    path = tmp_path / "metrics.csv"
    logger = MetricsCSV(path)
    for step in (1, 2):
        logger.log_metrics({"a": 1 / 3}, step=step)
    logger.save()
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    logger.log_metrics({"a": 2 / 3}, step=3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(path))):
            logger.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == whole
    logger.save()  # there is room again
    assert path.read_bytes() == whole + f"3,{2 / 3}\r\n".encode()


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size")
def test_full_disk_of_tensorboard_is_named_as_the_reason(tmp_path: Path) -> None:
    import resource

    logger = TensorBoardLogger(tmp_path)
    trainer = pl.Trainer(logger=logger, enable_checkpointing=False, default_root_dir=tmp_path)
    log_metrics(trainer, {"loss": 3.06}, step=1)
    logger.experiment.flush()
    size = max(path.stat().st_size for path in tmp_path.rglob("events*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with silent_tensorboard_thread():
            log_metrics(trainer, {"loss": 3.06}, step=2)
            with pytest.raises(OSError, match="File too large"):
                logger.experiment.flush()
            with pytest.raises(OSError, match="File too large"):
                log_metrics(trainer, {"loss": 3.06}, step=3)
            with pytest.raises(OSError, match="File too large"), true_reason():
                logger.log_hyperparams({"lr": 1e-3}, {"hparams/val_loss": 3.06}, step=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_new_run_replaces_the_rows_of_an_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    for value in (1, 2):
        logger = MetricsCSV(path)
        logger.log_metrics({"a": value}, step=1)
        logger.save()
    assert read_metrics(path) == [{"step": 1, "a": 2}]


def test_nan_and_infinity_are_read_back(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "m.csv")
    logger.log_metrics({"a": float("nan"), "b": float("inf")}, step=1)
    logger.save()
    row = read_metrics(tmp_path / "m.csv")[0]
    assert row["a"] != row["a"]
    assert row["b"] == float("inf")


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["wandb", "mlflow"])
@pytest.mark.filterwarnings("ignore")  # of the services' own packages
def test_services_get_the_metrics(logger: str, tiny: list[str], command: Any, tmp_path: Path) -> None:
    pytest.importorskip(logger, reason=f"the extra {logger} is not installed")
    result = command("train", *tiny, f"logger={logger}", WANDB_MODE="offline", WANDB_SILENT="true")
    assert result.returncode == 0, result.stderr
    if logger == "mlflow":
        database = sqlite3.connect(tmp_path / "run" / "mlflow.db")
        question = "select step from metrics where key = 'train/loss' order by step"
        assert [step for (step,) in database.execute(question)] == list(range(1, 9))
        database.close()
    else:
        assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
