"""The notebooks run from their first cell to their last."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from support.runs import ROOT, TINY

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's own packages
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, small_text: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.source.startswith("overrides = "))
    cell.source = f"overrides = {[*TINY, f'data.path={small_text}']}"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")
    text = "".join(
        output.get("text", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert re.search(r"validation loss [\d.]+", text)
    assert "## Step 8" in text
    assert len(re.findall("## Step", text)) == 2
    kept = torch.load(tmp_path / "weights.pt", weights_only=True)
    trained = torch.load(tmp_path / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert {f"net.{name}" for name in kept} == trained.keys()
    assert all(torch.equal(kept[name.removeprefix("net.")], weight) for name, weight in trained.items())
    assert "36,736 parameters reloaded" in text  # as counted by hand in test_train.py


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS
