"""A run directory of somebody else runs no code unless the user trusts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
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


BAD = {"_target_": "planted.made"}
PROOF = "open('proof', 'w').close()\n\ndef made(**_):\n    pass\n"
ELSEWHERE = (
    "../" * 12 + "proc/self/cwd/run/planted"
)  # a file below the folder of the configuration, for Hydra
KNOWN = {"run": "torch.optim.SGD"}
LATER = "${oc.select:known.${hydra:runtime.output_dir},planted.made}"  # the run directory has another name


def overrides_first(run: Path, *texts: str) -> None:
    """Overrides before those that the run has, with all that it would take by default."""
    path = run / ".hydra" / "overrides.yaml"
    path.write_text(
        yaml.safe_dump(
            [
                *texts,
                "model=rotary_tiny",
                "optimizer=muon",
                "scheduler=cosine",
                *yaml.safe_load(path.read_text()),
            ]
        )
    )


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        ([], {"hydra": {"callbacks": {"x": BAD}}}),
        ([], {"hydra.callbacks.x": BAD}),
        ([], {"known": KNOWN, "own": {"_target_": LATER}}),
        ([], {"trust=true,x": 1, "own": BAD}),
        ([], {"x@hydra.callbacks.x": BAD}),
        (["--config-dir=run/planted"], {"own": BAD}),
        (["--experimental-rerun=run/planted.pickle"], {}),
        ([f"experiment={ELSEWHERE}"], {}),
        ([f"+data@hydra.callbacks.x={ELSEWHERE}_class"], {}),
        (["+data@_global_.hydra.callbacks=text"], {}),
        (["+callbacks.own={_target_: planted.made},null"], {}),
        ([f'+callbacks.own={{_target_: "{LATER}", is: "_target_: planted.made"}}'], {"known": KNOWN}),
    ],
)  # fmt: skip
def test_run_directory_tells_hydra_nothing(
    run: Path, texts: list[str], values: dict[str, Any], call: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "planted", raising=False)
    (tmp_path / "planted.py").write_text(PROOF)
    (run / "planted").mkdir()
    for name in ("planted/own", "planted_class"):
        (run / f"{name}.yaml").write_text(yaml.safe_dump(BAD))
    hooked = {"hydra": {"callbacks": {"x": BAD}}}
    (run / "planted.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(hooked)}")
    (run / "planted.pickle").write_bytes(b"cplanted\nmade\n.")
    overrides_first(run, *texts)
    config = run / ".hydra" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["callbacks"].update({key: value for key, value in values.items() if key == "own"})
    config.write_text(yaml.safe_dump(content | {key: value for key, value in values.items() if key != "own"}))
    edit(run / ".hydra" / "hydra.yaml", "hydra.runtime.cwd", str(tmp_path))
    with suppress(SystemExit):
        in_sweep = ["-m", "repeat=run", "seed=1", "hydra/launcher=basic"]
        call("train", *(in_sweep if any("own=" in text for text in texts) else ["resume=run"]))
    assert not (tmp_path / "proof").exists()


def test_folder_of_the_users_choices_is_below_the_current_directory(
    run: Path, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """And not below the one that the run directory names as that of the first start."""
    (planted := run / "mine" / "callbacks").mkdir(parents=True)
    (planted / "own.yaml").write_text(yaml.safe_dump({"own": BAD}))
    edit(run / ".hydra" / "hydra.yaml", "hydra.runtime.cwd", str(run))
    edit(run / ".hydra" / "config.yaml", "callbacks.own", BAD)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        call("train", "resume=run", "--config-dir", "mine")
    assert "runs their code: planted.made; name their --config-dir" in capsys.readouterr().err
