"""device.precision=auto: what it chooses, and that a resumed run keeps it."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning.rundir.checkpoint import read_checkpoint
from gpt_lightning.rundir.summary import read_summary
from gpt_lightning.training import precision
from gpt_lightning.training.precision import choose_precision, multiplies_bfloat16


@pytest.mark.parametrize(
    ("accelerator", "parameters", "has_bfloat16", "amx", "chosen"),
    [
        ("cpu", 10_700_000, True, False, "bf16-mixed"),
        ("cpu", 10_700_000, False, False, "32-true"),
        ("cpu", 800_000, True, False, "32-true"),
        ("cpu", 800_000, True, True, "bf16-mixed"),
        ("cpu", 200_000, True, True, "32-true"),
        ("cuda", 200_000, True, False, "bf16-mixed"),
        ("cuda", 10_700_000, False, False, "32-true"),
        ("mps", 10_700_000, False, False, "32-true"),
    ],
    ids=str,
)
def test_precision_follows_the_device_and_the_size(
    accelerator: str, parameters: int, has_bfloat16: bool, amx: bool, chosen: str
) -> None:
    assert choose_precision(accelerator, parameters, has_bfloat16=has_bfloat16, amx=amx) == chosen


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have other names for it")
def test_bfloat16_is_found_where_the_kernel_lists_it(monkeypatch: pytest.MonkeyPatch) -> None:
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    expected = bool({"avx512_bf16", "amx_bf16"} & set(flags))
    assert multiplies_bfloat16("cpu") == (expected and hasattr(torch.cpu, "get_capabilities"))
    assert not multiplies_bfloat16("mps")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not multiplies_bfloat16("cpu")


@pytest.mark.slow
def test_chosen_precision_trains_is_recorded_and_kept_by_a_resumed_run(
    call: Callable[..., Any],
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [*tiny, "logger=none", "callbacks.samples=null", "scheduler=constant"]
    folders = {"32-true": tmp_path / "exact", "bf16-mixed": tmp_path / "mixed"}
    monkeypatch.setattr(precision, "WORTHWHILE", {False: 1, True: 1})
    for chosen, folder in folders.items():
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda _, yes=chosen == "bf16-mixed": yes)
        call("train", *options, f"hydra.run.dir={folder}")
        assert f"precision: {chosen}, chosen by device.precision=auto" in capsys.readouterr().out
        assert read_summary(folder)["precision"] == chosen
    exact, mixed = (read_summary(folder)["val_loss"] for folder in folders.values())
    assert exact is not None
    assert mixed is not None
    assert exact != mixed
    assert abs(exact - mixed) < 0.005 * exact
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda _: False)
    call("train", f"resume={folders['bf16-mixed']}", "trainer.max_steps=10")
    summary = read_summary(folders["bf16-mixed"])
    assert (summary["precision"], summary["steps"]) == ("bf16-mixed", 10)
    last = read_checkpoint(folders["bf16-mixed"] / "checkpoints" / "last.ckpt")
    assert last["hyper_parameters"]["device"]["precision"] == "bf16-mixed"
