"""Datasets in the layout of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest


def dataset(folder: Path, files: Sequence[Sequence[str]]) -> Path:
    """A folder with the texts of the training split, in these Parquet files."""
    pytest.importorskip("datasets")
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    (folder / "data").mkdir(parents=True)
    for number, texts in enumerate(files):
        name = f"train-{number:05}-of-{len(files):05}.parquet"
        parquet.write_table(table({"text": list(texts)}), folder / "data" / name)
    return folder
