"""metrics.csv, read with Python's csv module."""

from __future__ import annotations

import csv
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.rundir.metrics import read_metrics
from gpt_lightning.training.loggers import MetricsCSV


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
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    result = command("train", *tiny, f"logger={logger}", env=environment)
    assert result.returncode == 0, result.stderr
    if logger == "mlflow":
        database = sqlite3.connect(tmp_path / "run" / "mlflow.db")
        question = "select step from metrics where key = 'train/loss' order by step"
        assert [step for (step,) in database.execute(question)] == list(range(1, 9))
        database.close()
    else:
        assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
