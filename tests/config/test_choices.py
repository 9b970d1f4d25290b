"""A choice of the user is kept: by other choices, by weights to begin from, and on every start."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from support.models import random_net, save_checkpoint
from support.runs import BIGRAM, TINY

import gpt_lightning
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.recorded import flat
from gpt_lightning.config.resolvers import CONF
from gpt_lightning.config.resume import check_extension, recorded_values
from gpt_lightning.config.start import plan_arguments, start_arguments
from gpt_lightning.rundir.checkpoint import read_checkpoint


def composed(*overrides: str, config_dir: Path | None = None) -> DictConfig:
    search = [f"hydra.searchpath=[file://{config_dir}]"] if config_dir else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=["paths.run=run", *search, *overrides])


@pytest.fixture
def sgd(tmp_path: Path) -> Path:
    """A configuration folder with an optimizer of the user's own."""
    (tmp_path / "mine" / "optimizer").mkdir(parents=True)
    text = "_target_: torch.optim.SGD\n_partial_: true\nlr: 0.1\n"
    (tmp_path / "mine" / "optimizer" / "sgd.yaml").write_text(text)
    (tmp_path / "mine" / "optimizer" / "rateless.yaml").write_text(text.replace("lr: 0.1\n", ""))
    return tmp_path / "mine"


@pytest.mark.parametrize("model", ["tiny", "baby", "gpt2_small"])
def test_model_does_not_change_a_users_optimizer(sgd: Path, model: str) -> None:
    assert composed("optimizer=sgd", f"model={model}", config_dir=sgd).optimizer.lr == 0.1
    assert "lr" not in composed("optimizer=rateless", f"model={model}", config_dir=sgd).optimizer


def test_built_in_choices_take_what_the_model_recommends_unless_told_otherwise() -> None:
    tiny, baby = composed(), composed("model=baby")
    assert (tiny.optimizer.lr, tiny.data.batch_size, tiny.data.random_offset) == (6e-3, 4, True)
    assert (baby.optimizer.lr, baby.data.batch_size, baby.data.random_offset) == (1e-3, 32, False)
    told = composed("optimizer.lr=3e-4", "data.batch_size=7")
    assert (told.optimizer.lr, told.data.batch_size) == (3e-4, 7)


@pytest.mark.parametrize(
    ("overrides", "optimizer"),
    [
        ("", "muon"),
        ("device=cpu tokenizer=byte", "muon"),
        ("device=cuda", "adamw"),  # Muon has not been measured there
        ("model=tiny", "adamw"),
        ("experiment=finetune_gpt2", "adamw"),
        ("device=cuda optimizer=muon", "muon"),
    ],
)
def test_default_optimizer_is_muon_where_it_was_measured(
    overrides: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt_lightning.config.resolvers.detect_device", lambda: "cpu")
    found = composed(*overrides.split()).optimizer._target_
    assert found.endswith(f".{optimizer}")


@pytest.mark.parametrize(
    ("overrides", "choices"),
    [
        ("init_from=weights.ckpt", ["optimizer=adamw"]),
        ("init_from=hf:gpt2 seed=1,2 -m", ["optimizer=adamw"]),
        ("init_from=weights.ckpt optimizer=muon", ["optimizer=muon"]),
        ("experiment=finetune_gpt2 init_from=weights.ckpt", []),  # which has chosen one
        ("init_from=null", []),
    ],
)
def test_weights_are_trained_on_with_adamw_unless_an_optimizer_is_chosen(
    overrides: str, choices: list[str]
) -> None:
    for arguments in (start_arguments(overrides.split()), plan_arguments(overrides.split())):
        assert [text for text in arguments if text.startswith("optimizer=")] == choices


REFERRING = {  # keys that refer to model.recommended
    "optimizer": ["lr"],
    "data": ["batch_size", "random_offset"],
    "device": ["micro_batch_size"],
}


def test_model_files_write_nothing_outside_the_model_but_the_tokenizer() -> None:
    plain = composed("model=gpt", "tokenizer=byte")
    for path in (CONF / "model").glob("*.yaml"):
        cfg = composed(f"model={path.stem}", "tokenizer=byte", "optimizer=adamw")
        for group in set(plain) - {"model"}:
            for key in REFERRING.get(group, []):
                cfg[group][key] = plain[group][key] = None
            assert cfg[group] == plain[group], (path.stem, group)


def test_gpt2_small_on_a_mac_fits_into_sixteen_gigabytes(
    tmp_path: Path,
) -> None:
    (tmp_path / "text.txt").write_text("the cat sees a dog.\n" * 4000)
    options = ["model=small", "device=mps", "data=text", f"data.path={tmp_path}/text.txt", "tokenizer=byte"]
    # the byte tokenizer stands for GPT-2's own, which may have to be downloaded; its 50,257 ids count here
    plan = gpt_lightning.plan(*options, "model.vocab_size=50257")
    assert plan.parameters == 124_475_904
    assert plan.micro_batch_size * plan.accumulation == 32  # what is computed is the same
    assert sum(plan.memory.values()) < 8 * 2**30  # a Mac leaves two thirds of 16 GB to its GPU


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A model with two layers of 16."""
    return save_checkpoint(tmp_path / "begin.ckpt", random_net())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"_target_": "a.A", "k": 1}, {"_target_": "b.B", "k": 2, "more": {"a": 1, "b": {"c": None}}}),
        ({"_target_": "a.A", "more": {"a": 1}}, {"_target_": "b.B", "more": {"a": 1, "b": 2}}),
        ({"x": 1}, [1, 2]),
        ([1, {"a=b": {"c,d": "e", "f g": []}}], {"x": 1}),
        ({"x": {"y": 1}}, None),
        ({"x": 1}, "${seed}"),
        ("${oc.env:'HOME'}", 1),
        ("it's \"\\${seed}\\", "null"),
        (None, {"_target_": "b.B"}),
    ],
)
def test_recorded_values_stand_for_those_that_have_changed_since(
    before: Any, after: Any, tmp_path: Path
) -> None:
    place = tmp_path / "mine" / "callbacks" / "own.yaml"
    place.parent.mkdir(parents=True)
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    OmegaConf.save({"own": before}, place)
    recorded = composed("callbacks=own", config_dir=tmp_path / "mine")
    OmegaConf.save(recorded, tmp_path / "run" / ".hydra" / "config.yaml")
    OmegaConf.save({"hydra": {"runtime": {"choices": {}}}}, tmp_path / "run" / ".hydra" / "hydra.yaml")
    OmegaConf.save({"own": after}, place)
    start = ["callbacks=own", "trust=true"]
    given = [f"--config-dir={tmp_path / 'mine'}", *start]
    values = recorded_values(given, [], tmp_path / "run", resumes=False)
    assert flat(composed(*start, *values, config_dir=tmp_path / "mine")) == flat(recorded) | {"trust": True}


def test_recorded_key_that_no_override_can_have_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save({"data": {"trust=true,x": 1}}, tmp_path / ".hydra" / "config.yaml")
    OmegaConf.save({"hydra": {"runtime": {}}}, tmp_path / ".hydra" / "hydra.yaml")
    with pytest.raises(
        ConfigError, match=r"^data\.trust=true,x=1 is what the run has, and its files have not"
    ):
        recorded_values([], [], tmp_path, resumes=False)


FINETUNE = [option for option in TINY if not option.startswith("model.")]


@pytest.fixture
def finetuned(
    call: Callable[..., Any], small_text: Path, tmp_path: Path, weights: Path
) -> Callable[..., Any]:
    def run(*overrides: str) -> dict[str, Any]:
        options = [*FINETUNE, f"data.path={small_text}", "logger=none", "callbacks.samples=null"]
        call("train", *options, f"init_from={weights}", "trainer.max_steps=1", "scheduler.warmup_steps=0",
             f"hydra.run.dir={tmp_path / 'run'}", *overrides)  # fmt: skip
        return dict(read_checkpoint(tmp_path / "run")["hyper_parameters"]["model"])

    return run


def test_dropout_of_an_experiment_reaches_the_model_that_begins_from_weights(
    finetuned: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nmodel:\n  dropout: 0.25\n"
    (tmp_path / "mine" / "experiment" / "gentle.yaml").write_text(text)
    model = finetuned("experiment=gentle", "--config-dir", str(tmp_path / "mine"))
    assert (model["dropout"], model["n_layer"], model["n_embd"]) == (0.25, 2, 16)


@pytest.mark.parametrize("asked", ["model=gpt2_medium", "model.n_layer=3", "model=tiny"])
def test_shape_that_the_weights_do_not_have_is_refused_in_one_line(
    finetuned: Callable[..., Any], asked: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        finetuned(asked, "tokenizer=byte")
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "but the weights in" in line
    assert not (tmp_path / "run").exists()


def test_default_model_is_not_asked_for(finetuned: Callable[..., Any]) -> None:
    assert finetuned()["n_embd"] == 16  # and not the 128 of model=tiny


@pytest.mark.parametrize("steps", [1, 5, 40, 1000])
def test_number_of_steps_alone_is_enough(steps: int) -> None:
    from gpt_lightning.config.nodes import build
    from gpt_lightning.config.parts import with_length

    cfg = composed(f"trainer.max_steps={steps}")
    schedule = with_length(build(cfg, "scheduler"), steps)
    assert max(map(schedule, range(steps))) == 1.0  # the peak is reached


def test_each_step_calls_the_schedule_without_hydra() -> None:
    """Hydra checks every call of what it built, which takes longer than a schedule."""
    from gpt_lightning.config.nodes import build
    from gpt_lightning.config.parts import with_length

    called: set[str] = set()
    schedule = with_length(build(composed(), "scheduler"), 40)
    sys.setprofile(lambda frame, *_: called.add(str(frame.f_globals.get("__name__"))))
    try:
        schedule(20)
    finally:
        sys.setprofile(None)
    assert {name.partition(".")[0] for name in called} >= {"gpt_lightning"}
    assert not any(name.startswith("hydra") for name in called)


def test_schedule_of_the_users_own_keeps_its_state() -> None:
    """LambdaLR saves the attributes of an object that it is given, not those of one inside another."""
    from gpt_lightning.config.parts import with_length

    class Halves:
        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, step: int) -> float:
            self.calls += 1
            return 0.5**step

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, with_length(Halves(), 10))
    assert scheduler.state_dict()["lr_lambdas"] == [{"calls": 2}]  # with_length has tried it


def test_asked_warmup_that_does_not_fit_is_refused() -> None:
    from gpt_lightning.config.nodes import build
    from gpt_lightning.config.parts import with_length

    cfg = composed("scheduler.warmup_steps=100")
    with pytest.raises(ValueError, match=r"scheduler\.warmup_steps=100 must be at least 0 and smaller than"):
        with_length(build(cfg, "scheduler"), 40)


@pytest.mark.slow
def test_run_with_a_users_configuration_is_resumed_with_it_and_without_it(
    command: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    """The first start is a console script, which finds the user's classes in the working directory, too."""
    (tmp_path / "plugin.py").write_text(BIGRAM)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    text = "_target_: plugin.Bigram\nvocab_size: null\nblock_size: 32\n"
    (tmp_path / "mine" / "model" / "bigram.yaml").write_text(text)
    options = [option for option in tiny if not option.startswith("model.")]
    script = [
        str(Path(sys.executable).parent / "gpt-lightning-train"),
        "model=bigram",
        "--config-dir",
        "mine",
    ]
    first = subprocess.run([*script, *options, "logger=none"], cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    told = f"command: python -m gpt_lightning.train --config-dir={tmp_path / 'mine'} model=bigram "
    assert told in first.stdout
    starts = [["--config-dir", "mine", "resume=run"], ["resume=run", "--config-dir", "mine"]]
    summary = tmp_path / "run" / "summary.json"
    for start in starts:
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "interrupted"}))
        result = command("train", *start)
        assert result.returncode == 0, result.stderr
        assert json.loads(summary.read_text())["status"] == "finished"
    shutil.rmtree(tmp_path / "mine")
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "interrupted"}))
    result = command("train", "resume=run")
    assert result.stderr.count("\n") == 1
    assert "runs their code: plugin.Bigram" in result.stderr
    result = command("train", "resume=run", "trust=true")
    assert result.returncode == 0, result.stderr


def test_run_with_lists_in_a_users_optimizer_has_checkpoints_that_load(
    call: Callable[..., Any], tiny: list[str], sgd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noted.py").write_text(
        "import torch\n\n"
        "class Noted(torch.optim.SGD):\n"
        "    def __init__(self, params, lr, betas):\n"
        "        super().__init__(params, lr=lr)\n"
        "        for group in self.param_groups:\n"
        "            group['betas'] = betas\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = "_target_: noted.Noted\n_partial_: true\nlr: 0.1\nbetas: [0.8, 0.9]\n"
    (sgd / "optimizer" / "noted.yaml").write_text(text)
    call("train", "--config-dir", str(sgd), "optimizer=noted", *tiny, "logger=none", "callbacks.samples=null")
    (state,) = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["optimizer_states"]
    assert state["param_groups"][0]["betas"] == [0.8, 0.9]


def test_help_ends_quietly_when_its_reader_does(tmp_path: Path) -> None:
    command = f"{sys.executable} -m gpt_lightning.train --help | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout == "python -m gpt_lightning.train key=value …\n"
    assert result.stderr == ""


def test_help_shows_every_key_with_its_comment_and_no_internal_choice(
    call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    call("train", "--help")
    text = capsys.readouterr().out
    assert "_windows" not in text
    for key, comment in (("seed", "of the weights"), ("  n_inner", "width of the feed-forward layer")):
        (line,) = (line for line in text.splitlines() if line.startswith(f"{key}:"))
        assert comment in line
    call("train", "--help", "model=gpt2_small", "optimizer=adamw")
    assert "model: # model=gpt2_small" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    ["train", "train model=tiny", "train model=gpt2_small trainer=debug callbacks=diagnostics",
     "train model=gpt2_small tokenizer=byte", "train experiment=fast_shakespeare_char_cpu",
     "train experiment=nanogpt_shakespeare_char_cpu", "train sweep=optuna data=tales", "plan", "prepare",
     "generate", "evaluate"],
)  # fmt: skip
def test_help_shows_every_key_once_with_the_value_that_it_has(
    arguments: str, call: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    name, *chosen = arguments.split()
    call(name, "--help", *chosen)
    keys, _, end = capsys.readouterr().out.partition("== Keys: KEY=VALUE ==\n")[2].partition("\n\n")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = flat(compose(name, chosen))
    shown = flat(OmegaConf.create(keys))  # refuses a key that is there twice
    assert len(shown) > 10
    assert {key: value for key, value in shown.items() if value is not None}.items() <= composed.items()
    assert ("-m " in end) == (name in ("train", "prepare"))


def test_run_under_wsd_is_extended_until_its_decay_has_begun(tmp_path: Path) -> None:
    options = ["scheduler=wsd", "scheduler.warmup_steps=10", f"resume={tmp_path}"]
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(composed(*options, "trainer.max_steps=100"), tmp_path / ".hydra" / "config.yaml")
    longer = composed(*options, "trainer.max_steps=200")
    assert check_extension(longer, 80)  # the last fifth of a hundred steps decays
    with pytest.raises(ConfigError, match="up to step 90 depend on the number of steps"):
        check_extension(longer, 90)


def test_finished_run_is_extended_under_a_constant_rate(
    call: Callable[..., Any], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*tiny, "scheduler=constant", "logger=none", "callbacks.samples=null"]
    call("train", *options)
    call("train", f"resume={tmp_path / 'run'}", "trainer.max_steps=12")
    call("train", *options[:-2], f"hydra.run.dir={tmp_path / 'whole'}", "trainer.max_steps=12", "logger=none")
    extended, whole = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("run", "whole")
    )
    for name, value in whole["state_dict"].items():
        assert (value == extended["state_dict"][name]).all(), name
    capsys.readouterr()
    call("train", f"resume={tmp_path / 'run'}")  # later starts know the new length
    assert "is finished; there is nothing to resume" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        call("train", f"resume={tmp_path / 'run'}", "trainer.max_steps=6")
    assert "only raise it" in capsys.readouterr().err
