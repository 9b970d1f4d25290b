"""Imports between folders only point downwards, and each framework stays in its folders."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "gpt_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
COMMANDS = "commands"  # modules directly in the package
ORDER = (  # a folder imports itself and those of the rows below
    {COMMANDS},
    {"sweeping"},
    {"config"},
    {"training", "evaluation", "serving"},
    {"inference"},
    {"interop"},
    {"rundir"},
    {"model", "data"},
)
# where a framework may be imported; a name with .py is that file alone
FRAMEWORKS = {
    ("hydra", "omegaconf"): {COMMANDS, "config", "sweeping"},
    ("lightning", "pytorch_lightning"): {"training", "data/datamodule.py", "config/parts.py", "train.py"},
    ("gradio", "fastapi", "starlette", "uvicorn", "pydantic"): {"serving"},
    ("safetensors", "transformers", "huggingface_hub", "peft"): {"interop"},
    ("matplotlib",): {"rundir"},
    ("optuna",): {"sweeping", "rundir/report_study.py"},
}
TORCH_IN_DATA = {"datamodule.py", "windows.py"}  # the rest of data/ works on numpy arrays


def layer(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else COMMANDS


def imports(path: Path) -> set[str]:
    """Absolute names of everything that a file imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def row(folder: str) -> int:
    return next(number for number, folders in enumerate(ORDER) if folder in folders)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    here = layer(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "gpt_lightning" or len(parts) < 2:
            continue
        target = parts[1] if (PACKAGE / parts[1]).is_dir() else COMMANDS
        assert target == here or row(target) > row(here), f"{path.relative_to(PACKAGE)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_frameworks_stay_in_their_folders(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    for frameworks, places in FRAMEWORKS.items():
        if not {layer(path), path.relative_to(PACKAGE).as_posix()} & places:
            assert not roots & set(frameworks)
    if layer(path) == "data" and path.name not in TORCH_IN_DATA:
        assert "torch" not in roots


def test_every_folder_has_a_place_in_the_order() -> None:
    folders = {layer(path) for path in FILES}
    assert folders <= set().union(*ORDER)


def test_gpt_can_be_copied_alone() -> None:
    assert {name.split(".")[0] for name in imports(PACKAGE / "model" / "gpt.py")} <= {
        "__future__",
        "collections",
        "dataclasses",
        "math",
        "typing",
        "torch",
    }


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import gpt_lightning, gpt_lightning.train, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_function_is_longer_than_fifty_lines() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
                length = (body[-1].end_lineno or 0) - body[0].lineno + 1
                assert length <= 50, f"{path.relative_to(PACKAGE)}: {node.name} has {length} lines"


def test_private_names_of_dependencies_are_those_that_contributing_lists() -> None:
    page = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = page.partition("| name | of | because |")[2].partition("\n\n")[0].splitlines()[2:]
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in FILES]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    ours = {
        node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    ours |= {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)} | {
        part
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for part in [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    }
    private = {name for name in used - ours if name.startswith("_") and not name.endswith("_")}
    assert sorted(private - {"_exit"}) == sorted(listed)  # os._exit is documented
