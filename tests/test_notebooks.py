"""The notebooks run from their first cell to their last."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import ROOT, TINY

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
    assert re.search(r"[\d,]+ parameters reloaded", text)


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS
