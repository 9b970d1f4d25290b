"""What the configuration gives a class, held against what the class says it takes: names and types."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

# a type as an annotation has it, and as a user reads it; the ones that YAML can say
WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "keys with values",
    types.NoneType: "null",
}
ALIASES: dict[Any, Any] = {Path: str, os.PathLike: str, Mapping: dict}
ALIASES |= dict.fromkeys((tuple, Sequence, Iterable), list)


def check_arguments(target: Callable[..., Any], node: DictConfig, *, without: Iterable[str] = ()) -> None:
    """Refuse arguments that a class does not have, and values of a type that its annotations exclude.

    A type that YAML cannot say is not judged; a range is the class's own business.

    Args:
        target: The class, or a function.
        node: Its arguments in the configuration; keys that begin with an underscore are Hydra's.
        without: Arguments that the class has but must not get from here.

    Raises:
        ValueError: If one does not fit; names the key that the user set.
    """
    try:
        everything = _signature(target).parameters.values()
    except (TypeError, ValueError):  # some that are written in C have none
        return
    known = {p.name: p for p in everything if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in everything)
    for name in (str(name) for name in node if not str(name).startswith("_")):
        if name in without:
            raise ValueError(f"{node._get_full_key(name)} has another key, or cannot be chosen; leave it out")
        if name in known:
            _check_value(node, name, known[name])
        elif not takes_all:
            names = [one for one in known if one not in without]
            close = difflib.get_close_matches(name, names, 1)
            remedy = f"did you mean {close[0]}?" if close else f"it takes {', '.join(names) or 'none'}"
            raise ValueError(f"{node._get_full_key(name)} is no argument of {target.__name__}; {remedy}")


def _signature(target: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(target, eval_str=True)
    except NameError:  # annotations that are for type checkers alone
        return inspect.signature(target)


def _check_value(node: DictConfig, name: str, parameter: inspect.Parameter) -> None:
    value, allowed = node[name], _alternatives(parameter.annotation)
    if allowed is None or (OmegaConf.is_dict(value) and "_target_" in value):  # any, or an object
        return
    if parameter.default is None:
        allowed.append(types.NoneType)
    if not any(_fits(value, choice) for choice in allowed):
        key = _key_to_set(node, name)
        wanted = dict.fromkeys(WORDS.get(choice, str(choice)) for choice in allowed)
        quote = isinstance(value, (int, float)) and str in allowed
        remedy = f"; quote it, as in {key}=\"'{value}'\"" if quote else ""
        raise ValueError(f"{key}={value!r} must be {' or '.join(wanted)}{remedy}")


def _alternatives(annotation: Any) -> list[Any] | None:
    """The types of an annotation, or its literal values; None if it has one that YAML cannot say."""
    origin = typing.get_origin(annotation) or annotation
    if origin in (typing.Union, types.UnionType):
        parts = [_alternatives(part) for part in typing.get_args(annotation)]
        found = [choice for part in parts for choice in part or ()]
        return None if None in parts else [c for c in found if c is not int or float not in found]
    if origin is typing.Literal:
        return list(typing.get_args(annotation))
    origin = ALIASES.get(origin, origin)
    return [origin] if origin in WORDS else None


def _fits(value: Any, choice: Any) -> bool:
    if choice not in WORDS:  # a literal value
        return type(value) is type(choice) and value == choice
    if choice in (int, float):
        return isinstance(value, (int, choice)) and not isinstance(value, bool)
    if choice in (list, dict):
        return OmegaConf.is_list(value) if choice is list else OmegaConf.is_dict(value)
    return isinstance(value, choice)


def _key_to_set(node: DictConfig, name: str) -> str:
    """The key that gives a value: where it is taken from another key, that one."""
    raw = typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))[name]
    found = re.fullmatch(r"\$\{(?:([\w.]+)\.)?(\w+)\}", str(raw))
    if found is None:
        return str(node._get_full_key(name))
    root: Any = node._get_root()
    return _key_to_set(OmegaConf.select(root, found[1]) if found[1] else root, found[2])
