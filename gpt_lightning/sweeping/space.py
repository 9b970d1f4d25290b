"""The space of a search, in Hydra's grammar: choice(…), range(…), interval(…), tag(log, interval(…))."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from gpt_lightning.config.command_line import key_of
from gpt_lightning.config.errors import ConfigError


@dataclass(frozen=True)
class Dimension:
    """What a search varies."""

    keys: tuple[str, ...]  # of its overrides; several ones take the elements of a list
    kind: str  # float, int or categorical
    arguments: dict[str, Any]  # of Optuna's suggest_KIND: low and high (included), log, step; or choices

    @property
    def name(self) -> str:
        """Its name in the study."""
        return ",".join(key.lstrip("+") for key in self.keys)

    @property
    def first(self) -> Any:
        """One of its values."""
        return self.arguments["choices"][0] if self.kind == "categorical" else self.arguments["low"]

    def overrides(self, value: Any, *, short: bool = False) -> list[str]:
        """The overrides that set a value; `short` ones, for a name, have three digits."""
        if len(self.keys) == 1:
            return [f"{self.keys[0]}={format(value, '.3g') if short and self.kind == 'float' else value}"]
        values = OverridesParser.create().parse_override(f"key={value}").value()
        if not isinstance(values, list) or len(values) != len(self.keys):
            raise ConfigError(f"{self.name}={value} must be a list of {len(self.keys)} values")
        return [f"{key}={'null' if v is None else v}" for key, v in zip(self.keys, values, strict=True)]


def read_space(
    params: Mapping[str, Any], arguments: Sequence[str], parser: OverridesParser
) -> tuple[list[Dimension], list[str]]:
    """The dimensions of a search, and the overrides that do not vary.

    The command line counts more than params, hydra.sweeper.params, in which keys that are joined by commas
    vary together.

    Raises:
        ConfigError: If nothing varies, or the range of a key is none.
    """
    found: dict[str, Dimension | str] = {}
    for keys, value in params.items():
        first, *others = str(keys).replace(" ", "").split(",")
        override = parser.parse_override(f"{first}={'null' if value is None else value}")
        found[",".join([first, *others])] = _dimension(override, others)
    for override in parser.parse_overrides(list(arguments)):
        key = override.get_key_element()
        if not key_of(key).startswith("sweep"):
            found[key] = _dimension(override, [])
    space = [dimension for dimension in found.values() if isinstance(dimension, Dimension)]
    if not space:
        raise ConfigError(
            "sweep=optuna needs keys that vary, as in 'optimizer.lr=tag(log,interval(1e-4,1e-2))', or a "
            "space such as sweep=optuna_optimizer"
        )
    for dimension in space:
        for choice in dimension.arguments.get("choices", [dimension.first]):
            dimension.overrides(choice)
    return space, [text for text in found.values() if isinstance(text, str)]


def _dimension(override: Override, others: list[str]) -> Dimension | str:
    """The dimension of an override that sweeps; the text of any other one."""
    from optuna import distributions

    key, text = override.get_key_element(), str(override.input_line)
    if not override.is_sweep_override():
        return text
    sweep: Any = override.value()
    arguments: dict[str, Any]
    if tags := sweep.tags - {"log"}:
        raise ConfigError(f"{text}: there is no tag {min(tags)}; a search knows log")
    if isinstance(sweep, IntervalSweep):
        kind = "int" if type(sweep.start) is int else "float"
        arguments = {"low": sweep.start, "high": sweep.end, "log": "log" in sweep.tags}
    elif isinstance(sweep, RangeSweep):
        values = sorted(map(float, sweep.range()))
        kind = "int" if all(type(n) is int for n in (sweep.start, sweep.step)) else "float"
        number = int if kind == "int" else float
        if not values or sweep.tags:
            raise ConfigError(f"{text} must have values, and no tag")
        arguments = {"low": number(values[0]), "high": number(values[-1]), "step": number(abs(sweep.step))}
    else:
        kind, arguments = "categorical", {"choices": list(override.sweep_string_iterator())}
    try:
        getattr(distributions, f"{kind.title()}Distribution")(**arguments)
    except ValueError as error:
        raise ConfigError(f"{text}: {error}") from error
    return Dimension((key, *others), kind, arguments)
