"""A resumed or repeated run: the values it was recorded with, and what must not have changed since."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from gpt_lightning.config.command import imports
from gpt_lightning.config.command_line import OWN_KEYS, as_given, as_of_job, key_of
from gpt_lightning.config.composed import as_value, composed
from gpt_lightning.config.errors import ConfigError
from gpt_lightning.config.nodes import build, is_defined_in, targets
from gpt_lightning.config.parts import with_length
from gpt_lightning.config.recorded import (
    HARMLESS,
    VALIDATION,
    flat,
    group_choices,
    read_recorded,
    recorded_overrides,
    write_yaml,
)
from gpt_lightning.rundir.directory import HYDRA
from gpt_lightning.rundir.provenance import versions
from gpt_lightning.rundir.summary import read_summary
from gpt_lightning.training.schedules import default_warmup

if TYPE_CHECKING:
    from gpt_lightning.data.corpus.base import Corpus

log = logging.getLogger(__name__)

ELASTIC = (  # what may differ, too: it changes the weights by rounding alone
    "device.devices",
    "device.micro_batch_size",
    "trainer.num_nodes",
    "trainer.strategy",
)
OLDER_VALUES: dict[tuple[str, Any], Any] = {  # of earlier releases, with what they stood for
    ("device.micro_batch_size", "auto"): 32,
}
# Keys that earlier releases had not, with what they did
OLDER_KEYS = {"data.align_documents": False, "model.exact_gelu": False}
TARGET = "_target_"
# Packages whose classes a run directory of somebody else may name: they run no code that comes with it.
SAFE = (
    r"gpt_lightning\.(model|training|data\.(corpus|tales|tokenizer))|torch\.optim|"
    r"lightning\.pytorch\.(callbacks|loggers|strategies|plugins|profilers)"
)


def recorded_values(arguments: list[str], given: list[str], folder: Path, *, resumes: bool) -> list[str]:
    """Overrides that make the configuration the recorded one, where files of it have changed since.

    Args:
        arguments: The command line of the run: flags, recorded choices and overrides, and those given now.
        given: The overrides that are given now, which count more than recorded values.
        folder: The run directory.
        resumes: Whether the same run goes on.

    Raises:
        ConfigError: If a resumed run would not be the same run; lists the keys with both values. If the run
            names classes that may run code of its author, unless trust=true was given.
    """
    cfg = composed(arguments)
    keys = [key_of(text) for text in given if key_of(text) not in OWN_KEYS and text[:5] != "hydra"]
    before, now = recorded_config(folder), flat(cfg)
    for key, value in OLDER_KEYS.items():
        target = f"{key.partition('.')[0]}.{TARGET}"
        if key in now and now.get(target) == before.get(target):
            before.setdefault(key, value)
    if resumes:
        _check_unchanged(cfg, folder, keys, before)
    values = _differing(cfg, folder, keys, before)
    if values:
        cfg = composed([*arguments, *values])
    if resumes and (steps := _kept_warmup(cfg, before.get("trainer.max_steps"))) is not None:
        values.append(f"scheduler.warmup_steps={steps}")
    check_classes(cfg, folder, given)
    return values


def recorded_config(folder: Path) -> dict[str, Any]:
    """The recorded values of a run by their keys; Hydra's own configuration is not the run's."""
    values = flat(read_recorded(folder, "config.yaml"))
    return {key: value for key, value in values.items() if key.partition(".")[0] != "hydra"}


def _differing(cfg: DictConfig, folder: Path, keys: list[str], before: dict[str, Any]) -> list[str]:
    """Overrides for the recorded values that `cfg` does not have, but for those of `keys`.

    A class of this package may have moved since, if its choice is still there.
    """
    now, earlier, chosen = flat(cfg), group_choices(folder), cfg.hydra.runtime.choices
    texts = []
    for key, value in before.items():
        value = OLDER_VALUES.get((key, value), value) if isinstance(value, str) else value
        if key in OWN_KEYS or _covered(key, [*keys, "paths.run"]) or (key in now and now[key] == value):
            continue
        if key.endswith("._target_"):
            group, node = key.partition(".")[0], key.removesuffix("_target_")
            if str(value).startswith("gpt_lightning.") and earlier.get(group) == chosen.get(group):
                if key in now:
                    continue
            else:  # the class that is no longer chosen takes other arguments; Hydra deletes no null
                other = dict.fromkeys(_not_in(before, one) for one in now if one.startswith(node))
                texts += [text for one in other if one for text in (f"++{one}=0", f"~{one}")]
        if key not in now:  # Hydra merges neither keys into a list, nor a list into keys
            others = [one for one in now if _covered(key, [one])]
            others += [key] * (isinstance(value, list) and any(_covered(one, [key]) for one in now))
            texts += [f"++{one}=0" for one in others if f"++{one}=0" not in texts]
        texts.append(_override(key, value))
    return texts


def _not_in(keys: Iterable[str], key: str) -> str | None:
    """The largest node with a key that has none of `keys`."""
    parts = key.split(".")
    nodes = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next((node for node in nodes if not any(_covered(one, [node]) for one in keys)), None)


def _override(key: str, value: Any) -> str:
    """Sets a recorded value.

    Raises:
        ConfigError: If Hydra would read anything else, as a key of somebody else's run could have it.
    """
    text = f"++{key}={as_value(value)}"
    try:
        read = OverridesParser.create().parse_override(text)
        if (read.key_or_group, read.package, repr(read.value())) == (key, None, repr(value)):
            return text
    except HydraException:
        pass
    raise ConfigError(
        f"{key}={value!r} is what the run has, and its files have not, and no override can say it; bring the "
        "files of its configuration back as they were"
    )


def _kept_warmup(cfg: DictConfig, max_steps: int | None) -> int | None:
    """The warm-up of a run that is extended: the one that followed from the number of steps it had."""
    ours = is_defined_in(cfg.scheduler.get("_target_", ""), r"gpt_lightning\.training\.schedules")
    if ours and cfg.scheduler.warmup_steps is None and max_steps not in (None, cfg.trainer.max_steps):
        return default_warmup(max_steps)
    return None


def check_classes(cfg: DictConfig, folder: Path, given: list[str]) -> None:
    """Refuse classes that may run code of a run's author, without those that the user names.

    Args:
        cfg: The configuration of the run, with what is given now on top.
        folder: The run directory.
        given: The overrides that are given now; in those that name the run, its author chose the text.

    Raises:
        ConfigError: Lists them, unless trust=true was given.
    """
    if cfg.trust is True:
        return
    sources = HydraConfig.get().runtime.config_sources
    named = [source for source in sources if source.provider.endswith("command-line")]  # searchpath, too
    files = [f.read_text("utf-8", "ignore") for source in named for f in Path(source.path).rglob("*.yaml")]
    values = [f"++{key}={as_value(value)}" for key, value in recorded_config(folder).items()]
    theirs = {as_of_job(text) for text in [*recorded_overrides(folder), *values] if TARGET in text}
    chosen = [text for text in given if TARGET in text and key_of(text) not in OWN_KEYS]
    chosen = [text for text in chosen if as_of_job(text) not in theirs]
    known = set(re.findall(rf"{TARGET}\W+([\w.]+)", "\n".join([*files, *chosen])))
    ours = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    with imports():
        foreign = sorted(t for t in targets(ours) if not is_defined_in(t, SAFE) and t not in known)
    if foreign:
        raise ConfigError(
            f"the run names classes that are not of gpt_lightning, and building them runs their code: "
            f"{', '.join(foreign)}; name their --config-dir, or add trust=true if you trust the run"
        )


def check_classes_again(cfg: DictConfig) -> None:
    """`check_classes` in the job: interpolations may have other values there than before Hydra began."""
    if source := cfg.resume or cfg.repeat:
        check_classes(cfg, Path(source), as_given(HydraConfig.get().overrides.task))
        OmegaConf.resolve(cfg.logger)  # which is built when torch has set variables of the environment


def _covered(key: str, overridden: list[str]) -> bool:
    """Whether a key, or a group that it belongs to, is set by an override."""
    return any(key == one or key.startswith(one.replace("/", ".") + ".") for one in overridden)


def _check_unchanged(cfg: DictConfig, folder: Path, keys: list[str], before: dict[str, Any]) -> None:
    now = flat(cfg)
    nodes = [node for node in cfg.callbacks.values() if OmegaConf.is_dict(node)]
    stops_early = any("patience" in node or "EarlyStopping" in str(node.get("_target_")) for node in nodes)
    allowed = [rule for rule in HARMLESS + ELASTIC if not (stops_early and rule in VALIDATION)]
    differing = [
        key
        for key in sorted(before.keys() | now.keys())
        if _covered(key, keys)
        and before.get(key) != now.get(key)
        and not any(fnmatch.fnmatch(key, rule) for rule in allowed)
    ]
    if differing and differing != ["trainer.max_steps"]:  # `extends` judges that alone
        earlier = read_recorded(folder, "config.yaml")
        values = ((key, OmegaConf.select(earlier, key), OmegaConf.select(cfg, key)) for key in differing)
        listed = "; ".join(f"{key} (was {was}, now {now})" for key, was, now in values)
        raise ConfigError(
            f"resume= goes on with the same run, but these would change it: {listed}; "
            "begin a new run with init_from= instead"
        )


def check_extension(cfg: DictConfig, step: int) -> bool:
    """Whether a resumed run has more steps than before, which its schedule must allow.

    That is so if the learning rate of every step that is done stays what it was: under a constant rate, or
    under `wsd` before its decay.

    Raises:
        ConfigError: If the schedule would have been another one.
    """
    before, now = read_recorded(Path(cfg.resume), "config.yaml").trainer.max_steps, cfg.trainer.max_steps
    if before == now:
        return False
    change = f"trainer.max_steps (was {before}, now {now})"
    if before is None or now is None or now < before:
        raise ConfigError(f"resume= cannot change {change}, only raise it; begin a new run with init_from=")
    earlier = cast(DictConfig, OmegaConf.merge(cfg, {"trainer": {"max_steps": before}}))
    old, new = (with_length(build(c, "scheduler"), c.trainer.max_steps) for c in (earlier, cfg))
    if any(old(i) != new(i) for i in range(step)):
        raise ConfigError(
            f"these would change the run in {cfg.resume}: {change}: its learning rates up to step {step} "
            "depend on the number of steps (not so under scheduler=constant, or wsd before its decay); "
            "begin a new run with init_from="
        )
    return True


def record_extension(cfg: DictConfig) -> None:
    """Let later starts know the new number of steps."""
    folder = Path(cfg.resume)
    config, texts = read_recorded(folder, "config.yaml"), recorded_overrides(folder)
    for key in ("trainer.max_steps", "scheduler.warmup_steps"):
        if (value := OmegaConf.select(cfg, key)) != OmegaConf.select(config, key):
            OmegaConf.update(config, key, value)
            texts = [*(text for text in texts if key_of(text) != key), f"{key}={value}"]
    write_yaml(folder / HYDRA / "config.yaml", config)
    write_yaml(folder / HYDRA / "overrides.yaml", OmegaConf.create(texts))


def check_corpus(corpus: Corpus, folder: Path, recorded: str | None) -> None:
    """Refuse to go on with another text than the run began with.

    Raises:
        ConfigError: If the digest of the corpus is not the recorded one; None if nothing was recorded.
    """
    if recorded is not None and (now := corpus.digest()) != recorded:
        raise ConfigError(
            f"the corpus is not the one that the run in {folder} is trained on (its digest was "
            f"{recorded[:16]} and is {now[:16]}); bring that text back, or train on this one in a new run "
            f"with init_from={folder}"
        )


def warn_of_versions(folder: Path) -> None:
    """Say so if a run goes on under other packages than it began with: the bits may then differ."""
    before, now = read_summary(folder).get("versions") or {}, versions()
    changed = [f"{name} {was} → {now.get(name)}" for name, was in before.items() if was != now.get(name)]
    if changed:
        log.warning("the run began under other versions (%s) and may now differ slightly", ", ".join(changed))
