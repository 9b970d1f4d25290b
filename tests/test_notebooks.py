"""The notebooks run from their first cell to their last, one after the other in one kernel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hub import dataset
from support.runs import ROOT, TINY

from gpt_lightning.rundir.checkpoint import read_checkpoint

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBER = r"([\d.,]*\d)"


def small_settings(text: Path, hub: Path) -> dict[str, dict[str, Any]]:
    """What stands in the cells with the tag parameters, by notebook; the sixth opens the run of the first."""
    tiny = ["model=gpt", *TINY, f"data.path={text}"]
    quick = [*tiny, "callbacks.samples=null", "logger=none"]
    own = ("model", "tokenizer=", "trainer.max_steps", "data", "scheduler.")  # of the experiment
    ladder = [setting for setting in quick if not setting.startswith(own)]
    ladder += ["model.block_size=16", "model.n_layer=1", "data.batch_size=64"]
    stories = ["experiment=tinystories_124m", "size=small", f"data.name={hub}"]
    stories += [setting for setting in TINY if setting != "data=text"]
    return {
        "01_quickstart": {"overrides": tiny},
        "02_model_sizing": {"overrides": tiny, "steps": 4},
        "03_sweeps": {"overrides": quick, "values": "optimizer.lr=1e-4,1e-3"},
        "04_scaling_laws": {
            "overrides": [*ladder, "data.stories=300", "data.val_fraction=0.05", "tokenizer.vocab_size=300"],
            "sizes": ["w16", "w24"],
            "tokens_per_parameter": [0.3, 0.5, 0.9],
        },
        "05_tinystories": {"overrides": stories, "prompt": "the"},
        "06_inside_gpt": {"checkpoint": "run", "text": text.read_text()[:30]},
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> tuple[Path, dict[str, str]]:
    """The folder in which all notebooks ran, and what each of them printed."""
    folder = tmp_path_factory.mktemp("notebooks")
    hub = dataset(tmp_path_factory.mktemp("hub"), [small_text.read_text().split(".\n")])
    settings, together = small_settings(small_text, hub), nbformat.v4.new_notebook()
    for path in NOTEBOOKS:
        together.cells.append(nbformat.v4.new_code_cell("%reset -f"))
        for cell in nbformat.read(path, as_version=4).cells:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = "\n".join(f"{name} = {value!r}" for name, value in settings[path.stem].items())
            cell.metadata["of"] = path.stem
            together.cells.append(cell)
    nbclient.NotebookClient(together, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    printed: dict[str, str] = {}
    for cell in together.cells:
        for output in cell.get("outputs", []):
            name = cell.metadata.get("of", "")
            printed[name] = printed.get(name, "") + output.get("text", "")
    return folder, printed


pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the kernel's own packages
]


def test_quickstart_trains_and_keeps_weights(ran: tuple[Path, dict[str, str]]) -> None:
    folder, text = ran[0], ran[1]["01_quickstart"]
    assert re.search(rf"validation loss {NUMBER}", text)
    assert text.count("## Step") == 2
    assert re.search(r"8/8 100% \|█+\| 00:00 left, loss", text)  # the bar, on standard error
    kept = torch.load(folder / "weights.pt", weights_only=True)
    trained = torch.load(folder / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert {f"net.{name}" for name in kept} == trained.keys()
    assert all(torch.equal(kept[name.removeprefix("net.")], weight) for name, weight in trained.items())
    assert "36,736 parameters reloaded" in text  # as counted by hand in test_train.py


def test_sizes_predicted_are_those_measured(ran: tuple[Path, dict[str, str]]) -> None:
    text = ran[1]["02_model_sizing"]
    assert "by hand 36,736, plan 36,736, measured 36,736" in text
    flops = re.search(rf"by hand {NUMBER}, plan {NUMBER}, measured {NUMBER} per token", text)
    assert flops is not None
    by_hand, planned, measured = (float(number.replace(",", "")) for number in flops.groups())
    assert by_hand == planned
    assert measured == pytest.approx(planned, rel=0.05)
    pairs = re.findall(rf"plan {NUMBER} MiB, (measured|by hand) {NUMBER} MiB", text)
    (planned, _, measured), (fixed, _, by_hand) = ((float(a), how, float(b)) for a, how, b in pairs)
    assert measured == pytest.approx(planned, rel=0.25)
    assert fixed == by_hand
    assert re.search(rf"plan, from a measurement of a part of the work: {NUMBER} minutes", text)


def test_sweep_is_reported(ran: tuple[Path, dict[str, str]]) -> None:
    folder, text = ran[0], ran[1]["03_sweeps"]
    assert (folder / "report.html").is_file()
    assert re.search(rf"best optimizer\.lr=0\.001: {NUMBER} nats", text)


def test_law_is_fitted_to_the_ladder(ran: tuple[Path, dict[str, str]]) -> None:
    text = ran[1]["04_scaling_laws"]
    assert len(re.findall(r"^w\d\d ", text, re.M)) == 6
    assert re.search(rf"best size for 1e13 FLOPs: {NUMBER} parameters, from {NUMBER} to {NUMBER}", text)
    assert re.search(rf"^corpus entropy, for comparison with E +{NUMBER} +known$", text, re.M)


def test_stories_are_plotted_and_sampled(ran: tuple[Path, dict[str, str]]) -> None:
    folder, text = ran[0], ran[1]["05_tinystories"]
    config = read_checkpoint(folder / "stories" / "checkpoints" / "last.ckpt")["hyper_parameters"]
    assert (config["model"]["qkv_bias"], config["model"]["tie_weights"]) == (False, False)
    assert (folder / "losses.pdf").read_bytes().startswith(b"%PDF")
    assert text.count("## Step") == 2
    samples = re.findall(r"```text\n(.*?)\n```", text, re.S)
    assert all(text.count(sample) >= 2 for sample in samples)  # printed on the way as well
    assert text.count("'temperature'") == 3
    weights = torch.load(folder / "stories.pt", weights_only=True)
    trained = torch.load(folder / "stories" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert {f"net.{name}" for name in weights} == trained.keys()


def test_opened_model_is_the_one_that_was_trained(ran: tuple[Path, dict[str, str]]) -> None:
    text = ran[1]["06_inside_gpt"]  # it asserts that the last lens is the model's own output
    whole = re.search(rf"whole model: {NUMBER}", text)
    first = re.search(rf"tokens, loss {NUMBER} nats", text)
    assert whole is not None
    assert first is not None
    assert whole[1] == first[1]
    assert len(re.findall(r"block \d head \d:", text)) == 4


def test_outputs_in_the_repository_are_small_and_say_nothing_of_their_machine() -> None:
    assert len(NOTEBOOKS) == 6
    for path in NOTEBOOKS:
        assert path.stat().st_size < 100_000, path.name
        cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        assert any(cell.outputs for cell in cells), path.name
        assert not re.search(r"/(work|home|tmp|root)/", path.read_text(encoding="utf-8")), path.name
