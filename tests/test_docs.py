"""What docs/reliability.md says is tested, is; commands of the pages compose; the reference is complete."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from support.runs import ROOT

from gpt_lightning.config.command_line import readable
from gpt_lightning.config.resolvers import CONF
from gpt_lightning.config.rules import validate
from gpt_lightning.sweeping.space import read_space

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [re.split(r" \| ", line.strip("| ")) for line in PAGE.splitlines() if line.startswith("| ")][2:]
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


REPORT = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", REPORT, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_of_the_page_on_reports_is_one(command: str) -> None:
    program, *overrides = shlex.split(command.removeprefix("python -m gpt_lightning."))
    sweeps = "-m" in overrides
    given = [text for text in overrides if text != "-m"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(program, overrides=given, return_hydra_config=True)
        if not sweeps:
            assert program == "report"
            return
        params = OmegaConf.to_container(cfg.hydra.sweeper.params)
        assert isinstance(params, dict)
        jobs = [
            [f"{key}={value}" for key, value in zip(params, values, strict=True)]
            for values in zip(*(str(text).split(",")[:3] for text in params.values()), strict=True)
        ]
        for job in jobs:
            cfg = compose(program, overrides=["paths.run=run", *given, *job])
            validate(cfg)
            assert cfg.model.n_embd == int(cfg.size[1:])
            limits = (cfg.trainer.max_steps, cfg.trainer.max_flops or cfg.trainer.tokens_per_parameter)
            assert limits[0] is None
            assert limits[1] == float(job[1].partition("=")[2])


README = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
SHOWN = dict.fromkeys(
    line
    for name, page in PAGES.items()
    if name not in ("report", "scaling")  # which have tests of their own
    for block in re.findall(r"```bash\n(.*?)```", page, re.S)
    for line in block.splitlines()
    if line not in README  # whose commands run in test_readme.py
) | dict.fromkeys(re.findall(r"`(python -?[mb][^`]*)`", PAGES["reproductions"]))


@pytest.mark.parametrize("command", SHOWN)
def test_command_of_a_page_can_be_composed(command: str) -> None:
    python, program, first, *arguments = shlex.split(command)
    assert python == "python"
    if program == "benchmarks/reproduce.py":  # a preset and overrides of train
        name, arguments = "train", [f"experiment={first}", *(text for text in arguments if "=" in text)]
    else:
        assert program == "-m"
        name = first.removeprefix("gpt_lightning.")
    search = ["hydra.searchpath=[file://" + str(ROOT / "examples/plugin/conf") + "]"]
    if "--config-dir" in arguments:
        arguments = [*search, *arguments[2:]]
    given = readable([text for text in arguments if text != "-m"])
    parsed = OverridesParser.create().parse_overrides(given)
    fixed = [text for text, override in zip(given, parsed, strict=True) if not override.is_sweep_override()]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        params = compose(name, fixed, return_hydra_config=True).hydra.sweeper.params or {}
        if params or len(fixed) < len(given):
            space, _ = read_space(params, given, OverridesParser.create())
            compose(name, fixed + [text for one in space for text in one.overrides(one.first)])


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
    (command,) = (shown for shown in SHOWN if "train --config-dir" in shown)
    assert command in (ROOT / "examples/plugin/README.md").read_text(
        encoding="utf-8"
    )  # test_examples.py runs it


def test_configuration_reference_has_every_key_with_its_comment() -> None:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
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
        "| `trainer.max_steps` | `1000` | null: max\\_epochs decides |",
        "| `model.n_layer` | `12` | blocks |",
        "| `callbacks.progress` | `gpt_lightning.training.callbacks.progress.Progress` |  |",
    ):
        assert line in pages["configuration"].splitlines()
    text = pages["configuration"]
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


SCALING = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").replace("\\\n", " ")
STARTS = re.findall(r"^.*-m gpt_lightning\.(train|plan) (.*)$", SCALING, re.M)


@pytest.mark.parametrize(("name", "settings"), STARTS, ids=[settings for _, settings in STARTS])
def test_settings_of_a_command_on_several_devices_are_valid_together(name: str, settings: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        validate(compose(name, [*settings.split(), "paths.run=x"]))
