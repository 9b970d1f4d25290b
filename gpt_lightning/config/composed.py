"""Composes the configuration of a command line, as Hydra will, for code that runs before Hydra does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, open_dict

from gpt_lightning.config.command_line import split_arguments
from gpt_lightning.config.resolvers import CONF

SEARCH = "hydra.searchpath"


def composed(arguments: Sequence[str]) -> DictConfig:
    """The configuration of flags and overrides, with Hydra's own; what varies in a sweep keeps its default.

    Raises:
        HydraException: If they cannot be composed.
    """
    found, _, overrides = split_arguments(list(arguments))
    places: list[Any] = [f"file://{Path(found.config_dir).absolute()}"] if found.config_dir else []
    texts = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.is_sweep_override():
            continue
        if override.get_key_element() == SEARCH:
            places += override.value()  # type: ignore[arg-type]
        else:
            texts.append(str(override.input_line))
    texts += [f"{SEARCH}={as_value(places)}"] * bool(places)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(found.config_name or "train", texts, return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = "run"  # interpolations of the run directory can be resolved
    HydraConfig.instance().set_config(cfg)
    return cfg


def as_value(value: Any) -> str:
    """A plain value in the grammar of Hydra's overrides; an interpolation stays one, which has no escapes."""
    if isinstance(value, str):
        quote = Quote.double if "'" in value and '"' not in value else Quote.single
        return QuotedString(value, quote).with_quotes()
    if isinstance(value, dict):
        pairs = ((re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", str(key)), item) for key, item in value.items())
        return "{" + ",".join(f"{key}:{as_value(item)}" for key, item in pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_value, value)) + "]"
    return "null" if value is None else str(value)
