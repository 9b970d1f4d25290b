"""What docs/reliability.md says is tested, is; links lead somewhere; the reference is complete."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from support.runs import ROOT
from support.shown import PAGES, commands

from gpt_lightning.config.command_line import readable
from gpt_lightning.config.resolvers import CONF
from gpt_lightning.config.rules import validate

LINES = PAGES["reliability"].splitlines()
ROWS = [re.split(r" \| ", line.strip("| ")) for line in LINES if line.startswith("| ")][2:]
PROMISES = [(promise, name) for promise, tests in ROWS for name in re.findall(r"`([^`]+)`", tests)]


@pytest.mark.parametrize(("promise", "name"), PROMISES, ids=[name for _, name in PROMISES])
def test_promise_has_a_test_that_exists(promise: str, name: str) -> None:
    path, _, test = name.partition("::")
    code = (ROOT / path).read_text(encoding="utf-8")
    assert re.search(rf"^def {test or 'test_.*'}\(", code, re.M), f"{promise}: {name}"


def test_every_promise_names_a_test_and_is_made_once() -> None:
    assert len(ROWS) > 20
    assert all(len(row) == 2 and re.fullmatch(r"`[^`]+`(, `[^`]+`)*", row[1]) for row in ROWS)
    assert len({promise for promise, _ in ROWS}) == len(ROWS)


RUN = {command for page in PAGES if page != "reproductions" for command in commands(page)}
SHOWN = [command for command in commands("reproductions") if not command.startswith("python -c")]
TITLES = re.findall(r"^`(python benchmarks/.*)`$", PAGES["reproductions"], re.M)


@pytest.mark.parametrize("command", sorted({*SHOWN, *TITLES} - RUN))
def test_command_of_the_reproductions_can_be_composed(command: str) -> None:
    program, first, *arguments = shlex.split(command)[1:]
    if program == "benchmarks/reproduce.py":  # a preset and overrides of train
        name, arguments = "train", [f"experiment={first}", *(text for text in arguments if "=" in text)]
    else:
        assert program == "-m"
        name = first.removeprefix("gpt_lightning.")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compose(name, readable(arguments))


@pytest.mark.parametrize("command", [shown for shown in commands("report") if ".train -m " in shown])
def test_jobs_of_a_sweep_on_the_page_on_reports_have_their_size_and_length(command: str) -> None:
    """test_commands.py runs the sweep with smaller values."""
    given = [text for text in shlex.split(command)[3:] if text != "-m"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=given, return_hydra_config=True)
        params = OmegaConf.to_container(cfg.hydra.sweeper.params)
        assert isinstance(params, dict)
        jobs = [
            [f"{key}={value}" for key, value in zip(params, values, strict=True)]
            for values in zip(*(str(text).split(",")[:3] for text in params.values()), strict=True)
        ]
        for job in jobs:
            cfg = compose("train", overrides=["paths.run=run", *given, *job])
            validate(cfg)
            assert cfg.model.n_embd == int(cfg.size[1:])
            limits = (cfg.trainer.max_steps, cfg.trainer.max_flops or cfg.trainer.tokens_per_parameter)
            assert limits[0] is None
            assert limits[1] == float(job[1].partition("=")[2])


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]),
    ids=lambda path: path.stem,
)
def test_links_of_a_page_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_plugin_shown_is_the_one_in_examples() -> None:
    files = re.findall(r"```yaml\n# (examples/\S+)\n(.*?)```", PAGES["extending"], re.S)
    assert len(files) == 2
    for path, text in files:
        assert (ROOT / path).read_text(encoding="utf-8") == text


@pytest.fixture
def hooks() -> Any:
    """The module docs/hooks.py."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_llms_txt_lists_every_page_of_the_site(hooks: Any, tmp_path: Path) -> None:
    from mkdocs.config import load_config
    from mkdocs.structure.files import get_files
    from mkdocs.structure.nav import get_navigation

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    files = config.plugins.on_files(get_files(config), config=config)  # of the hooks that mkdocs.yml names
    nav = hooks.on_nav(get_navigation(files, config), config, files)
    for page in nav.pages:
        page.read_source(config)
    hooks.on_post_build(config)
    listed = re.findall(r"^- \[(.+)\]\((.+)\)$", (tmp_path / "llms.txt").read_text(encoding="utf-8"), re.M)
    named = re.findall(r"^ +- ([^\n]+): (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert listed == named
    for _, target in listed:
        assert (tmp_path / target).read_text(encoding="utf-8").startswith("#"), target


def test_configuration_reference_has_every_key_with_its_comment(hooks: Any) -> None:
    pages = hooks.reference()
    for line in (
        "| `seed` | `1337` | of the weights, the order of the data, dropout and samples |",
        "| `lora.r` | `0` | their rank; 0: none, all weights are trained |",
        "| `prompt` | `null` | text to continue, taken literally except for enclosing single quotes; "
        "empty begins a new document |",
    ):
        assert line in pages["commands"].splitlines()
    for line in (
        "## trainer",
        "### trainer=default",
        "| `trainer.max_steps` | `1000` | of the run; null: max\\_epochs decides |",
        "| `model.n_layer` | `12` | blocks |",
        "| `callbacks.progress` | `gpt_lightning.training.callbacks.progress.Progress` | a bar in a "
        "terminal, lines elsewhere |",
        "| `callbacks.last.keep` | `${trainer.keep_last}` | as `trainer.keep_last` |",
        "| `callbacks.samples.path` | `${paths.run}/samples.md` | The file; sections are appended. |",
        "| `model.n_layer` | `48` | blocks |",
    ):
        assert line in pages["configuration"].splitlines()
    text = pages["configuration"]
    assert not re.findall(r"^\| `.*\|  \|$", text, re.M), "keys without a meaning"
    for path in CONF.glob("*/*.yaml"):
        cfg = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(cfg, dict)
        prefix = "" if "@package _global_" in path.read_text(encoding="utf-8") else f"{path.parent.name}."
        for key in cfg:
            if not key.startswith("_") and key not in ("defaults", "hydra"):
                assert re.search(rf"^\| `{prefix}{key}[`.]", text, re.M), (path, key)


def test_spaces_and_launchers_that_exist_are_described() -> None:
    files = {path.stem for path in (CONF / "sweep").glob("optuna*.yaml")}
    assert {name for name in re.findall(r"sweep=(\w+)", PAGES["sweeps"]) if name != "learning_rate"} == files
    launchers = {path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml")}
    rows = PAGES["sweeps"].partition("| `hydra/launcher=` |")[2].partition("\n\n")[0]
    assert launchers < set(re.findall(r"`(\w+)`", rows))


STARTS = re.findall(r"-m gpt_lightning\.(train|plan) (.*)$", "\n".join(commands("scaling")), re.M)


@pytest.mark.parametrize(("name", "settings"), STARTS, ids=[settings for _, settings in STARTS])
def test_settings_of_a_command_on_several_devices_are_valid_together(name: str, settings: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        validate(compose(name, [*settings.split(), "paths.run=x"]))
