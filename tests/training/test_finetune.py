"""Runs that begin from weights: with adapters, and gone on with after an interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import random_net, save_checkpoint
from support.runs import TINY
from support.zygote import Zygote

from gpt_lightning.inference.loading import read_model
from gpt_lightning.rundir.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow
LORA = ["lora.r=2", "lora.lora_alpha=8", "lora.lora_dropout=0.1", "lora.target_modules=[c_attn,c_fc]"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that the Hugging Face hub leaves on a machine."""
    return tmp_path_factory.mktemp("huggingface") / "hub"


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory, hub: Path) -> Iterator[Zygote]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(hub.parent))  # read when it is imported, which is before a run starts
        patch.setenv("HF_HUB_OFFLINE", "1")
        with Zygote(tmp_path_factory.mktemp("zygote")) as started:
            yield started


@pytest.fixture
def options(small_text: Path, tmp_path: Path) -> list[str]:
    weights = save_checkpoint(tmp_path / "base" / "best.ckpt", random_net())
    own = [f"data.path={small_text}", f"init_from={weights}", "model.dropout=0.1", "logger=none"]
    shape = [option for option in TINY if not option.startswith("model.")]  # that of the weights
    return [*shape, *own, "scheduler.warmup_steps=0", "optimizer.lr=1e-2"]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"])


def test_adapters_are_all_that_changes(call: Callable[..., Any], options: list[str], tmp_path: Path) -> None:
    call("train", *options, *LORA, f"hydra.run.dir={tmp_path / 'run'}")
    weights, base = weights_of(tmp_path / "run"), random_net().state_dict()
    adapters = {name for name in weights if ".lora_" in name}
    # A and B beside two layers of two blocks
    assert len(adapters) == 2 * 2 * 2
    assert all(weights[name].abs().sum() > 0 for name in adapters)
    for name in weights.keys() - adapters:
        plain = name.removeprefix("net.").replace(".base_layer", "")
        assert torch.equal(weights[name], base[plain]), name


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft's own making
def test_run_with_adapters_becomes_a_plain_model_and_a_folder_for_peft(
    call: Callable[..., Any], options: list[str], tmp_path: Path
) -> None:
    run, text = tmp_path / "run", torch.tensor([list(b"the cat sees")])
    call("train", *options, *LORA, f"hydra.run.dir={run}")
    adapted, merged = read_model(run, merge=False).net, read_model(run).net
    expected = adapted(text)
    assert not torch.allclose(expected, random_net()(text), atol=1e-3)
    torch.testing.assert_close(merged(text), expected, atol=1e-4, rtol=1e-4)
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    call("export", f"checkpoint={tmp_path / 'base' / 'best.ckpt'}", f"output={tmp_path / 'gpt2'}")
    call("export", f"checkpoint={run}", f"output={tmp_path / 'adapter'}", "format=peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(text).logits, expected[..., :257], atol=1e-4, rtol=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base" / "best.ckpt")
    # what was trained begins another run, merged
    call("train", *options, f"init_from={run}", "optimizer.lr=1e-12", f"hydra.run.dir={tmp_path / 'next'}")
    torch.testing.assert_close(read_model(tmp_path / "next").net(text), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [[], LORA], ids=["all weights", "adapters"])
def test_interrupted_run_goes_on_exactly_though_what_it_began_from_is_gone(
    zygote: Zygote, options: list[str], lora: list[str], tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    code, out = zygote.run("train", *options, *lora, f"hydra.run.dir={whole}")
    assert code == 0, out
    slow = {"gpt_lightning.training.module:LanguageModel.training_step": 0.1}
    process = zygote.start("train", *options, *lora, f"hydra.run.dir={run}", slow=slow)
    process.wait_for((run / "checkpoints" / "last.ckpt").exists)
    process.kill()
    process.wait()
    shutil.rmtree(tmp_path / "base")
    code, out = zygote.run("train", f"resume={run}")
    assert code == 0, out
    assert "resuming from" in out
    ours, theirs = weights_of(run), weights_of(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_from_the_hubs_cache_train_a_step(
    zygote: Zygote, hub: Path, options: list[str], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "n_positions": 32, "n_layer": 1, "n_head": 2, "n_embd": 16}
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **ends))
    snapshot = hub / "models--someone--small" / "snapshots" / ("0" * 40)
    theirs.save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    run, lr = tmp_path / "run", 1e-3
    code, out = zygote.run(
        "train", *options, "init_from=hf:someone/small", "model.dropout=0", "trainer.max_steps=1",
        f"optimizer.lr={lr}", "optimizer.weight_decay=0", f"hydra.run.dir={run}",
    )  # fmt: skip
    assert code == 0, out
    trained, moved = weights_of(run), []
    for name, weight in theirs.transformer.state_dict().items():
        ours = trained[f"net.transformer.{name}"][: len(weight) if name == "wte.weight" else None]
        conv1d = name.startswith("h.") and weight.dim() == 2  # theirs are (in, out)
        moved.append((ours - (weight.T if conv1d else weight)).abs().flatten())
    steps = torch.cat(moved)
    # Adam's first step is the rate times the sign of the gradient, where that is much above its epsilon
    assert steps.max() < 1.001 * lr
    assert steps.median() > 0.99 * lr


def test_adapters_without_weights_are_refused(
    call: Callable[..., Any], tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call("train", *tiny, "lora.r=2")
    line = capsys.readouterr().err
    assert line == "error: lora.r=2 trains beside frozen weights; give these with init_from=\n"
