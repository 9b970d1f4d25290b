"""A run directory of somebody else runs no code unless the user trusts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.runs import TINY
from support.zygote import Zygote

FAST = [*TINY, "logger=none", "callbacks.samples=null", "callbacks.layers=null", "trainer.max_steps=4"]


@pytest.fixture(scope="module")
def trained(zygote: Zygote, small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("trained")
    code, out = zygote.run("train", *FAST, f"data.path={small_text}", "hydra.run.dir=run", cwd=folder)
    assert code == 0, out
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(trained, tmp_path / "run")


def edit(path: Path, key: str, value: Any) -> None:
    """Set a value in a YAML file."""
    content = yaml.safe_load(path.read_text())
    node, names = content, key.split(".")
    for name in names[:-1]:
        node = node[name]
    node[names[-1]] = value
    path.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize("verb", ["resume", "repeat"])
@pytest.mark.parametrize(
    ("key", "node"),
    [
        ("callbacks.layers", {"_target_": "subprocess.run", "args": ["touch", "planted"]}),
        ("callbacks.own", {"_target_": "subprocess.run", "args": ["touch", "planted"]}),
        ("callbacks.layers", {"_target_": "gpt_lightning.train.shlex.os.system", "command": "touch planted"}),
        ("model.n_layer", {"_target_": "os.system", "command": "touch planted"}),
        ("trainer.strategy", {"_target_": "lightning.pytorch.trainer.trainer.os.system", "command": "true"}),
        ("name", "${oc.create:'{_target_: os.system, command: touch planted}'}"),
        ("callbacks.layers", {"_target_": "gpt_lightning.data.files.write_json", "path": "x", "content": {}}),
        ("callbacks.layers", {"_target_": "gpt_lightning.data.corpus.shakespeare.download", "url": "x"}),
    ],
)
def test_classes_of_others_are_listed_and_refused(
    run: Path, verb: str, key: str, node: Any, call: Callable[..., Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    edit(run / ".hydra" / "config.yaml", key, node)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        call("train", f"{verb}={run}")
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    if isinstance(node, dict):
        assert f"runs their code: {node['_target_']}; name their --config-dir, or add trust=true" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_name_of_a_run_directory_makes_no_class_trusted(
    run: Path, call: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run / ".hydra" / "config.yaml", "callbacks.layers", {"_target_": "os.system", "command": "true"})
    for name in ("os.system", "_target_=os.system"):
        run = run.rename(tmp_path / name)
        capsys.readouterr()
        with pytest.raises(SystemExit):
            call("train", f"resume={run}")
        assert "runs their code: os.system;" in capsys.readouterr().err


def test_hydra_is_told_nothing_by_the_run_directory(
    run: Path, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (planted := tmp_path / "planted" / "hydra" / "callbacks").mkdir(parents=True)
    (planted / "bad.yaml").write_text("x: {_target_: os.system, command: touch proof}\n")
    overrides = yaml.safe_load((run / ".hydra" / "overrides.yaml").read_text())
    overrides += ["+hydra.callbacks.x={_target_: os.system, command: touch proof}"]
    (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    for key, value in {
        "hydra.overrides.hydra": ["hydra.searchpath=[file://planted]", "+hydra/callbacks=bad"],
        "hydra.runtime.config_sources": [
            {"path": str(tmp_path / "planted"), "schema": "file", "provider": "command-line"}
        ],
    }.items():
        edit(run / ".hydra" / "hydra.yaml", key, value)
    call("train", f"resume={run}")
    assert not (tmp_path / "proof").exists()


@pytest.mark.slow
def test_modules_beside_the_recorded_working_directory_are_not_imported(run: Path, tmp_path: Path) -> None:
    """Not even by a second rank, which starts in that directory."""
    (planted := tmp_path / "planted").mkdir()
    for name in ("torch", "matplotlib", "lightning"):
        (planted / f"{name}.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\nraise SystemExit(3)\n")
    (here := tmp_path / "here").mkdir()
    edit(run / ".hydra" / "hydra.yaml", "hydra.runtime.cwd", str(planted))
    command = [sys.executable, "-m", "gpt_lightning.train", f"repeat={run}", "paths.outputs=out"]
    result = subprocess.run(
        [*command, "trainer=ddp", "device.devices=2", "trainer.max_steps=4", "trainer.val_batches=2"],
        cwd=here,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "proof").exists()
    assert len(list(here.glob("out/**/summary.json"))) == 1
